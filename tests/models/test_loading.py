"""Checkpoints from disk: what is read, and that every kind of damage is named before weights move."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from fdpp_jax import models
from fdpp_jax.models import LlamaConfig, loading
from fdpp_jax.models.rotary import stored_frequencies
from fdpp_jax.plans.shapes import MatmulShape

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(FIXTURES / "llama2_mha", tmp_path / "checkpoint"))


@pytest.fixture
def single(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(FIXTURES / "llama3_gqa", tmp_path / "checkpoint"))


def edit(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_parameters_are_the_checkpoints_fused(single: pathlib.Path) -> None:
    tensors = load_file(single / "model.safetensors")
    model = models.load(single, jnp.float32)
    layer = model.model.layers[1]
    name = "model.layers.1."
    qkv = [tensors[f"{name}self_attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(layer.self_attn.qkv_proj.weight[...], np.concatenate(qkv))
    gate_up = [tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(layer.mlp.gate_up_proj.weight[...], np.concatenate(gate_up))
    np.testing.assert_array_equal(layer.mlp.down_proj.weight[...], tensors[f"{name}mlp.down_proj.weight"])
    np.testing.assert_array_equal(model.model.embed_tokens.weight[...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(layer.input_layernorm.weight[...], tensors[f"{name}input_layernorm.weight"])
    assert not hasattr(model, "lm_head")  # tied
    assert model.config == LlamaConfig.from_hf(json.loads((single / "config.json").read_text()))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stored_dtypes(single: pathlib.Path, stored: Any) -> None:
    plain = models.load(single, jnp.float32)
    edit(single, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()}))
    model = models.load(single, jnp.float32)
    expected = jax.tree.map(lambda p: np.asarray(p).astype(stored).astype(np.float32), nnx.state(plain))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), expected)


def test_biases_are_loaded(single: pathlib.Path) -> None:
    edit_config(single, attention_bias=True, mlp_bias=True)
    rng = np.random.default_rng(0)

    def add(tensors: dict[str, np.ndarray]) -> None:
        for name, weight in list(tensors.items()):
            if "_proj.weight" in name:
                tensors[name.replace(".weight", ".bias")] = rng.standard_normal(weight.shape[0]).astype(np.float32)

    edit(single, add)
    tensors = load_file(single / "model.safetensors")
    attention = models.load(single, jnp.float32).model.layers[0].self_attn
    qkv = [tensors[f"model.layers.0.self_attn.{part}_proj.bias"] for part in "qkv"]
    np.testing.assert_array_equal(attention.qkv_proj.bias[...], np.concatenate(qkv))
    x = rng.standard_normal((3, 128)).astype(np.float32)
    np.testing.assert_allclose(
        attention.o_proj(jnp.asarray(x)),
        x @ tensors["model.layers.0.self_attn.o_proj.weight"].T + tensors["model.layers.0.self_attn.o_proj.bias"],
        atol=1e-4,
    )


def test_a_fingerprint_is_of_the_weights_and_not_of_their_shards(sharded: pathlib.Path) -> None:
    expected = models.loading.fingerprint(sharded)
    shards = list(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in (*shards, sharded / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, sharded / "model.safetensors")
    assert models.loading.fingerprint(sharded) == expected
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, sharded / "model.safetensors")
    assert models.loading.fingerprint(sharded) != expected
    (sharded / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a shard of safetensors"):
        models.loading.fingerprint(sharded)


def test_git_lfs_pointers_are_no_weights(sharded: pathlib.Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    names = sorted(path.name for path in sharded.glob("*.safetensors"))[1:3]
    for name in names:
        (sharded / name).write_bytes(pointer)
    message = f"expected the files themselves in .*, got git-lfs pointers for {', '.join(names)}: `git lfs pull` there"
    for read in (models.load, models.loading.fingerprint):
        with pytest.raises(ValueError, match=message) as error:
            read(sharded)
        assert "\n" not in str(error.value)
    for path in (*sharded.glob("*.safetensors"), sharded / "model.safetensors.index.json"):
        path.unlink()
    (sharded / "pytorch_model.bin").write_bytes(pointer)  # which no conversion would read
    with pytest.raises(ValueError, match=r"git-lfs pointers for pytorch_model\.bin"):
        models.load(sharded)
    (sharded / "config.json").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"git-lfs pointers for config\.json"):
        models.load(sharded)


def headless(folder: pathlib.Path, prefix: str) -> None:
    """Renames a checkpoint's tensors as those of its model without the head."""
    for path in folder.glob("*.safetensors"):
        save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}, path)
    path = folder / "model.safetensors.index.json"
    if path.is_file():
        index = json.loads(path.read_text())
        index["weight_map"] = {name.removeprefix(prefix): file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index))


@pytest.mark.parametrize("family", ["llama2_mha", "llama3_gqa", "gemma2", "chatglm2", "qwen3"])
def test_names_may_lack_their_first_part(tmp_path: pathlib.Path, family: str) -> None:
    """As in transformers: of all tensors but the head, or of none."""
    folder = pathlib.Path(shutil.copytree(FIXTURES / family, tmp_path / family))
    headless(folder, "transformer." if family == "chatglm2" else "model.")
    expected, found = (nnx.state(models.load(path, jnp.float32)) for path in (FIXTURES / family, folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_without_its_head(single: pathlib.Path) -> None:
    """What LlamaModel saves is a whole checkpoint where the head is tied."""
    headless(single, "model.")
    edit_config(single, architectures=["LlamaModel"])
    models.load(single)
    edit_config(single, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"\n  - tensor lm_head\.weight \[\d+, 64\] is missing$"):
        models.load(single)


def test_problems_name_tensors_as_the_checkpoint_does(single: pathlib.Path) -> None:
    headless(single, "model.")

    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["norm.weight"] = np.zeros(3, np.float32)
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"] + 1
        del tensors["layers.0.mlp.up_proj.weight"]

    edit(single, damage)
    with pytest.raises(ValueError, match="is not the checkpoint its config") as error:
        models.load(single)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  - tensor extra.weight [3] is unknown to the config",
        "  - tensor lm_head.weight differs from embed_tokens.weight, by which the config replaces it",
        "  - tensor model.layers.0.mlp.up_proj.weight [160, 64] is missing",
        "  - tensor norm.weight: expected shape [64], got [3]",
    ]
    # Half of the names is no layout.
    edit(single, lambda tensors: tensors.update({"model.norm.weight": tensors.pop("norm.weight")}))
    with pytest.raises(ValueError, match=r"tensor embed_tokens\.weight .* is unknown to the config"):
        models.load(single)


def test_harmless_extra_tensors_are_ignored(single: pathlib.Path) -> None:
    frequencies, _ = stored_frequencies(models.loading.read_config(single))
    edit(
        single,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies.astype(np.float16),
            }
        ),
    )
    models.load(single, jnp.float32)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lm_head.weight", r"differs from model\.embed_tokens\.weight, by which the config replaces it"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "differs from the rotary settings' own, by which the config"),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_no_harmless_one(single: pathlib.Path, name: str, why: str) -> None:
    """Dropped unseen, the head would give other logits."""

    def add(tensors: dict[str, np.ndarray]) -> None:
        shape = tensors["model.embed_tokens.weight"].shape if name == "lm_head.weight" else (16,)
        tensors[name] = np.ones(shape, np.float32)

    edit(single, add)
    with pytest.raises(ValueError, match=f"tensor {name} {why}"):
        models.load(single, jnp.float32)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_every_family_with_a_tied_head_looks_at_one_of_its_own(tmp_path: pathlib.Path, family: str) -> None:
    folder = pathlib.Path(shutil.copytree(FIXTURES / family, tmp_path / family))
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    embedding = next(x for name, x in tensors.items() if name.endswith("embed_tokens.weight"))
    save_file(tensors | {"lm_head.weight": embedding}, path)
    models.load(folder, jnp.float32)
    save_file(tensors | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight differs from model\..*embed_tokens\.weight"):
        models.load(folder, jnp.float32)


def test_which_files_are_the_checkpoint(single: pathlib.Path) -> None:
    """As in transformers: model.safetensors, else the index, else all but what is no weights of the model."""
    sharded = FIXTURES / "llama2_mha"
    expected = models.loading.fingerprint(single)
    content = (single / "model.safetensors").read_bytes()
    # Beside the whole file: an index with its shards, and other tensors.
    for path in sharded.iterdir():
        if path.name != "config.json":
            shutil.copy(path, single / path.name)
    other = {"model.norm.weight": np.zeros(64, np.float32)}
    for name in ("old.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        save_file(other, single / name)
    assert models.loading.fingerprint(single) == expected
    assert np.asarray(models.load(single, jnp.float32).model.norm.weight[...]).any()
    # Without it the index, whatever else is there.
    (single / "model.safetensors").unlink()
    assert models.loading._shard_names(single)[1] == sorted(path.name for path in sharded.glob("model-*"))
    # Without both all files but those of other things; none twice.
    for path in (*single.glob("model-*"), single / "model.safetensors.index.json"):
        path.unlink()
    (single / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is in two files, old.* and weights\.safetensors"):
        models.load(single)
    (single / "old.safetensors").unlink()
    models.load(single)


def test_no_pickle_is_read_and_the_error_says_what_to_do(single: pathlib.Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin: a pickle may run any program.*\nConvert it once"):
        models.load(single)


def test_progress_goes_to_stderr(single: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.load(single, jnp.float32)
    assert capsys.readouterr() == ("", "")
    models.load(single, jnp.float32, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading checkpoint" in err


def test_all_damaged_tensors_are_listed_at_once(single: pathlib.Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((128, 64), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((160, 64), np.float32)
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((64, 160), np.int8)

    edit(single, damage)
    with pytest.raises(ValueError, match="is not the checkpoint its config") as error:
        models.load(single)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  - tensor model.layers.0.self_attn.k_proj.weight: expected shape [64, 64], got [128, 64]",
        "  - tensor model.layers.1.mlp.down_proj.weight: expected one of BF16, F16, F32, F64, got I8",
        "  - tensor model.layers.2.mlp.up_proj.weight [160, 64] is unknown to the config",
        "  - tensor model.norm.weight [64] is missing",
    ]


def test_layers_that_are_wrong_alike_share_a_line_and_nothing_is_left_out(single: pathlib.Path) -> None:
    edit_config(single, num_hidden_layers=40)  # of which 2 are there

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.replace("mlp.", "ffn.")] = tensors.pop(name)
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((160, 64), np.float32)
        tensors["model.layers.10.mlp.up_proj.weight"] = np.zeros((64, 160), np.float32)
        for layer in range(2):
            for expert in (0, 1, 2, 10):
                tensors[f"model.layers.{layer}.experts.{expert}.w"] = np.zeros(3, np.float32)

    edit(single, rename)
    with pytest.raises(ValueError, match="is not the checkpoint its config") as error:
        models.load(single)
    layer = "  - tensor model.layers"
    assert str(error.value).splitlines()[1:] == [
        f"{layer}.0..39.mlp.down_proj.weight [64, 160] is missing",
        f"{layer}.0..39.mlp.gate_proj.weight [160, 64] is missing",
        f"{layer}.0..6,8..9,11..39.mlp.up_proj.weight [160, 64] is missing",
        f"{layer}.2..39.input_layernorm.weight [64] is missing",
        f"{layer}.2..39.post_attention_layernorm.weight [64] is missing",
        f"{layer}.2..39.self_attn.k_proj.weight [64, 64] is missing",
        f"{layer}.2..39.self_attn.o_proj.weight [64, 128] is missing",
        f"{layer}.2..39.self_attn.q_proj.weight [128, 64] is missing",
        f"{layer}.2..39.self_attn.v_proj.weight [64, 64] is missing",
        f"{layer}.10.mlp.up_proj.weight: expected shape [160, 64], got [64, 160]",
        f"{layer}.0..1.experts.0..2,10.w [3] is unknown to the config",
        f"{layer}.0..1.ffn.down_proj.weight [64, 160] is unknown to the config",
        f"{layer}.0..1.ffn.gate_proj.weight [160, 64] is unknown to the config",
        f"{layer}.0..1.ffn.up_proj.weight [160, 64] is unknown to the config",
    ]


def test_missing_and_truncated_shards_are_listed_at_once(sharded: pathlib.Path) -> None:
    missing, truncated = "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"
    (sharded / missing).unlink()
    with (sharded / truncated).open("r+b") as file:
        file.truncate((sharded / truncated).stat().st_size - 100)
    with pytest.raises(ValueError, match="is not the checkpoint") as error:
        models.load(sharded)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2  # their tensors are not listed besides
    assert lines[0] == f"  - shard {missing} is missing (the index names 4)"
    assert lines[1].startswith(f"  - shard {truncated} cannot be read, truncated perhaps")


def test_truncated_single_file(single: pathlib.Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"shard model\.safetensors cannot be read"):
        models.load(single)


def test_index_and_shards_disagree(sharded: pathlib.Path) -> None:
    shard = sharded / "model-00004-of-00004.safetensors"
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"tensor {name} .* is missing"):
        models.load(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"expected a JSON object in .*index\.json, got list"),
        ("{}", r"expected a weight_map from tensors to shards in .*index\.json, got None"),
        ('{"weight_map": {}}', r"expected a weight_map from tensors to shards in .*index\.json, got {}"),
        ('{"weight_map": ["a"]}', r"expected weight_map in .*index\.json to be an object, got \['a'\]"),
        ('{"weight_map": {"a": "b", "c": 5}}', r"index\.json is malformed:\n  - expected c to be text, got 5$"),
        ("not json", r"index\.json is not valid JSON"),
    ],
)
def test_malformed_index(sharded: pathlib.Path, content: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        models.load(sharded)


def test_no_weights(single: pathlib.Path) -> None:
    (single / "model.safetensors").rename(single / "weights.npz")
    with pytest.raises(ValueError, match=r"expected \*\.safetensors in .* found .*weights\.npz"):
        models.load(single)


def test_no_config(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"expected config\.json in .* found an empty directory"):
        models.load(tmp_path)
    for i in range(12):
        (tmp_path / f"{i:02}.txt").touch()
    with pytest.raises(ValueError, match=r"found 00\.txt, 01\.txt, .*, 09\.txt, 2 more$"):
        models.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_malformed_config(single: pathlib.Path, content: str) -> None:
    (single / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        models.load(single)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn])
def test_unsupported_dtype(single: pathlib.Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="expected a dtype out of bfloat16, float16, float32, got"):
        models.load(single, dtype)


@pytest.mark.parametrize("path", ["nowhere", "/nowhere/at/all", "./no/where", "../nowhere"])
def test_neither_a_directory_nor_a_hub_id(path: str) -> None:
    with pytest.raises(ValueError, match=r"no directory .* a hub id would look like 'org/name'"):
        models.load(path)


def test_a_file_is_not_a_checkpoint(single: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"expected a checkpoint's directory, got the file .*config\.json"):
        models.load(single / "config.json")


def test_hub_id_is_downloaded(single: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repo_id: str, **settings: Any) -> str:
        calls.append((repo_id, settings["allow_patterns"]))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = models.load("some-org/Some-Llama-3.2-1B", jnp.float32)
    assert model.config.hidden_size == 64
    files = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    assert calls == [("some-org/Some-Llama-3.2-1B", files)]


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo_id: str, **settings: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="the hub did not deliver 'org/name': no route to host"):
        models.load("org/name")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3.1-8b", 8.03),
        ("llama-3.2-1b", 1.24),
        ("llama-3.1-70b", 70.55),
    ],
)
def test_presets_have_the_published_size(name: str, billions: float) -> None:
    config = models.PRESETS[name]
    model = nnx.eval_shape(lambda: models.random_model(config))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert round(size / 1e9, 2) == billions


def test_random_model_is_reproducible() -> None:
    config = LlamaConfig.from_hf(json.loads((FIXTURES / "llama3_gqa" / "config.json").read_text()))
    first, again, other = (models.random_model(config, jnp.bfloat16, seed) for seed in (1, 1, 2))
    weights = [np.asarray(model.model.layers[0].mlp.down_proj.weight[...]) for model in (first, again, other)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
    assert weights[0].dtype == jnp.bfloat16


def test_model_plans_name_every_kernel_of_a_step() -> None:
    config = models.PRESETS["llama-3.2-1b"]
    # No table is shipped for an H100, and in float16 no layer is fused.
    plans = models.model_plans(config, batch=8, capacity=4096, device="H100", dtype="float16")
    assert [name for name, _, _ in plans] == ["qkv", "attention", "layer", "o", "gate_up", "down", "head"]
    matmuls = {name: shape for name, shape, _ in plans if isinstance(shape, MatmulShape)}
    shapes = {name: (s.m, s.k, s.n) for name, s in matmuls.items()}
    assert shapes == {
        "qkv": (8, 2048, 3072),
        "o": (8, 2048, 2048),
        "gate_up": (8, 2048, 16384),
        "down": (8, 8192, 2048),
        "head": (8, 2048, 128256),
    }
    assert {s.w_order for s in matmuls.values()} == {"nk"}
    chosen = {name: plan.implementation for name, _, plan in plans}
    assert chosen["attention"] == "mosaic_gpu"
    assert chosen["qkv"] == "flat"
    assert chosen["head"] == "flat"  # tied
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        models.model_plans(config, batch=0, capacity=4096, device="H200")


def test_memory_that_is_used_up_while_loading(monkeypatch) -> None:
    def exhausted(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    monkeypatch.setattr(loading, "_fuse", exhausted)
    with pytest.raises(MemoryError, match=r"allocate 12345 bytes\. .*: the weights take [\d.]+ MB\. Take a smaller"):
        models.load(models.bundled_path())
