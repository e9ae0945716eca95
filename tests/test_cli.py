"""The command line: what each command prints, and how errors and Ctrl-C end."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models

import fdpp_jax
from fdpp_jax import bench_attention, cli, cli_generate, device, timing
from fdpp_jax.generation import GenerationResult, StreamChunk


def _run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _help(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        *([], ["generate"], ["calibrate"], ["tune"], ["plan"], ["info"]),
        *(["bench", "decode"], ["bench", "attention"], ["bench", "matmul"]),
    ],
)
def test_every_help_has_examples(capsys, command):
    text = _help(capsys, *command)
    assert "examples:" in text
    assert " ".join(["fdpp-jax", *command]) in text.split("examples:")[1]


def test_the_help_has_an_example_of_each_command_that_takes_a_model(capsys):
    examples = _help(capsys).split("examples:")[1]
    assert all(f"fdpp-jax {name} " in examples for name in ("generate", "calibrate", "plan", "bench"))


def test_help_needs_no_jax():
    code = (
        "import sys\nfrom fdpp_jax import cli\ntry:\n    cli.main(['--help'])\n"
        "finally:\n    print('jax' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0
    assert result.stderr == "False\n"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fdpp-jax {fdpp_jax.__version__}\n"


def test_plan_of_a_preset_on_a_named_device(capsys):
    code, out, _ = _run(
        capsys, "plan", "--model", "llama-2-7b", "--batch", "8", "--context", "4096", "--device", "A100"
    )
    assert code == 0
    for expected in ("qkv", "attention", "gate_up", "down", "head", "[8, 4096] @ [4096, 12288]", "no kernel for sm_80"):
        assert expected in out


def test_plan_on_hopper_takes_the_kernels(capsys):
    code, out, _ = _run(capsys, "plan", "--model", "qwen3-8b", "--device", "h100")  # whose layers are not fused
    assert code == 0
    assert "gemv" in out
    assert "rule: M = 1, split" in " ".join(out.split())
    assert "mosaic_gpu" in out
    assert re.search(r"block_kv \d+, num_splits \d+", " ".join(out.split()))


def test_plan_of_a_directory(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64, '
        '"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}'
    )
    code, out, _ = _run(capsys, "plan", "--model", str(tmp_path), "--device", "H200")
    assert code == 0
    assert "[1, 64] @ [64, 96]" in out


@pytest.mark.parametrize("name", ["tiny", "llama-2-7b"])
def test_a_directory_that_is_named_goes_before_a_preset(capsys, monkeypatch, tmp_path, checkpoint, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / name)
    code, out, _ = _run(capsys, "plan", "--model", name, "--device", "H200")
    assert code == 0
    assert "[1, 160] @ [160, 64]" in out
    code, out, err = _run(capsys, "generate", "--model", name, "--prompt", "a", "--max-new-tokens", "1")
    assert code == 0, err
    assert "[1, 160] @ [160, 64]" in out
    # Where none is named, the default stays what --help says.
    assert "[1, 4096] @ [4096, 32000]" in _run(capsys, "plan", "--device", "A100")[1]
    assert "[1, 160] @ [160, 64]" not in _run(capsys, "generate", "--prompt", "a", "--max-new-tokens", "1")[1]


def test_info_names_versions_device_and_kernels(capsys):
    code, out, _ = _run(capsys, "info")
    assert code == 0
    for expected in ("jaxlib", fdpp_jax.__version__, "decode attention (mosaic_gpu)", "gemv", "flat"):
        assert expected in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--model", "nope"], "unknown model 'nope': neither a directory .* nor one of tiny, llama-2-7b"),
        (["plan", "--device", "V100"], "unknown device 'V100'; known are A100"),
        (["plan", "--device", "H200", "--batch", "0"], "batch"),
        (["generate", "--prompt", "x", "--phi", "3", "--softmax", "online"], "--phi belongs to --softmax unified"),
        (["generate", "--prompt", ""], "--prompt must not be empty"),
        (["generate", "--prompt", "x", "--system", "y"], "--system belongs to --chat"),
        (["generate", "--prompt", "x", "--chat"], "expected chat_template.jinja or a chat_template"),
        (["generate", "--prompt", "x", "--model", "llama-2-7b"], "llama-2-7b is a preset of shapes without weights"),
        (["generate", "--prompt", "x", "--model", "./no/such/dir"], "no/such/dir"),
    ],
)
def test_expected_errors_are_one_line(capsys, argv, message):
    code, out, err = _run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("fdpp-jax: error: ")
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


@pytest.mark.parametrize("argv", [[], ["bench"], ["generate"], ["plan", "--batch", "many"], ["calibrate"]])
def test_wrong_usage_is_argparse_s(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: fdpp-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (KeyboardInterrupt(), 130, "\nfdpp-jax: interrupted\n"),
        (NotImplementedError("the kernel refuses"), 2, "fdpp-jax: error: the kernel refuses\n"),
        (FileNotFoundError("no such shard"), 2, "fdpp-jax: error: no such shard\n"),
    ],
)
def test_how_a_command_ends(capsys, monkeypatch, error, code, err):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    assert _run(capsys, "info") == (code, "", err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_info", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["info"])


def test_large_bench_on_a_cpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    code, _, err = _run(capsys, "bench", "decode", "--model", "llama-2-7b")
    assert code == 2
    assert "needs a GPU, this is cpu; the bundled model, without --model, does not" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("decode --model nosuch", "unknown model 'nosuch'"),
        ("matmul --m 0 --k 64 --n 64", "expected sizes of at least 1, got m=0, k=64 and n=64"),
    ],
)
def test_a_bench_that_can_only_fail_is_refused_at_once(capsys, flags, message):
    code, out, err = _run(capsys, "bench", *flags.split())
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none/such/m.json", "no directory /none/such to write m.json to"),
        ("/", "expected a file, got the directory /"),
    ],
)
@pytest.mark.parametrize("flags", ["bench matmul --json", "calibrate --data x --plot", "calibrate --data x --output"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(capsys, flags, path, message):
    with pytest.raises(SystemExit) as stop:
        cli.main([*flags.split(), path])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the table of bench attention needs a GPU, this is cpu; try one small shape"),
        (["--batch", "2", "--only", "32/8"], "--only picks shapes of the table"),
        (["--scale-per", "token"], "--scale-per belongs to --kv-dtype"),
        (["--lengths", "5000"], "lengths must lie in query_length=1..capacity=4096, got 5000"),
    ],
)
def test_bench_attention_refuses(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(device, "current", lambda: device.by_name("cpu"))
    code, out, err = _run(capsys, "bench", "attention", *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"fdpp-jax: error: {message}")
    assert err.count("\n") == 1


def test_bench_attention_of_one_shape(capsys, monkeypatch, tmp_path):
    cases = []

    def bench(case, *, quick):
        cases.append((case, quick))
        return timing.BenchReport("title", ("kernel",), (("public op",),), {"attention": case.label})

    monkeypatch.setattr(bench_attention, "bench_attention", bench)
    flags = "--batch 8 --num-kv-heads 8 --context 8192 --lengths mixed --page-size 64 --kv-dtype int8 --scale-per token"
    code, out, _ = _run(
        capsys, "bench", "attention", *flags.split(), "--quick", "--json", str(tmp_path / "record.json")
    )
    assert code == 0
    assert "public op" in out
    same = bench_attention.attention_case(
        8, 32, 8, 8192, lengths="mixed", page_size=64, kv_dtype="int8", scales="token"
    )
    assert cases == [(same, True)]
    assert json.loads((tmp_path / "record.json").read_text()) == {"attention": same.label}


def test_bench_attention_of_the_table(capsys, monkeypatch):
    tables = []

    def bench(cases, *, quick, record_path):
        assert record_path is None
        tables.append((cases, quick))
        return timing.BenchReport("title", ("shape",), (), {})

    monkeypatch.setattr(bench_attention, "bench_attention_table", bench)
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    assert _run(capsys, "bench", "attention")[0] == 0
    assert _run(capsys, "bench", "attention", "--only", "pages")[0] == 0
    assert tables[0] == (list(bench_attention.TABLE), False)
    assert [case.shape.page_size for case in tables[1][0]] == [16, 64, 256]
    code, _, err = _run(capsys, "bench", "attention", "--only", "9, 9/9")
    assert code == 2
    assert "--only '9, 9/9' is in no label of the table: 1, 32/32, 1024; 1, 32/32, 4096" in err


class _ByteTokenizer:
    """Each token is a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def _stream(rows, chunk_sizes, lengths):
    """Chunks of the rows' bytes, as generation.stream yields them."""
    tokens = np.array([list(row) for row in rows], np.int32)  # [B, n]
    position = 0
    for size in chunk_sizes:
        so_far = np.minimum(lengths, position + size).astype(np.int32)
        yield StreamChunk(tokens[:, position : position + size], so_far)
        position += size
    return types.SimpleNamespace(tokens=tokens)


def test_text_streams_without_broken_characters(capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    # The two bytes of e with acute come in two chunks.
    cli_generate.print_stream(_stream(["caf\u00e9!".encode()], [4, 2], [6]), [list(b"> ")], _ByteTokenizer())
    monkeypatch.undo()
    assert [piece for piece in pieces if piece] == ["> caf", "\u00e9!", "\n\n"]


def test_several_prompts_are_printed_when_they_end(capsys):
    chunks = _stream([b"ab....", b"cdefgh"], [1, 2, 3], [2, 6])
    cli_generate.print_stream(chunks, [list(b"1 "), list(b"2 ")], _ByteTokenizer())
    assert capsys.readouterr().out == "[1 of 2] 1 ab\n\n[2 of 2] 2 cdefgh\n\n"


def test_speed_counts_decoded_tokens_only(capsys):
    result = GenerationResult(
        tokens=np.zeros((2, 8), np.int32),
        lengths=np.array([8, 3]),
        recomputed_steps=1,
        softmax_reason="unified, as asked",
        online_from=None,
        decode_steps=7,
        prefill_seconds=0.5,
        decode_seconds=0.25,
        compile_seconds=2.0,
        cache_capacity=64,
    )
    cli_generate.print_speed(result, [10, 5])
    assert capsys.readouterr().out == (
        "prefill  15 tokens in 0.500 s: 30.0 tokens/s\n"
        "decode   9 tokens in 0.250 s: 36.0 tokens/s, 35.71 ms a step\n"
        "compile  2.0 s\n"
        "recomputed steps: 1 of 7\n\n"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaMA of two layers with a tokenizer of single ASCII characters."""
    directory = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(pathlib.Path(__file__).parent / "fixtures" / "llama3_gqa" / name, directory)
    vocabulary = {chr(code): code for code in range(127)} | {"?": 127}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def _generate(capsys, checkpoint, *argv):
    """stdout of generate: the text, and what follows it."""
    code, out, err = _run(capsys, "generate", "--model", checkpoint, "--ignore-eos", *argv)
    assert code == 0, err
    text, _, report = out.partition("prefill  ")
    return text, report


def test_generate_reports_speed_kernels_and_recomputes(capsys, checkpoint):
    text, report = _generate(capsys, checkpoint, "--prompt", "def ", "--max-new-tokens", "12")
    assert text.startswith("def ")
    for expected in ("4 tokens in", "11 tokens in", "tokens/s", "recomputed steps: 0 of 11", "attention", "gate_up"):
        assert expected in report


def test_softmax_changes_the_recomputed_steps_and_not_the_text(capsys, checkpoint):
    argv = ["--prompt", "class ", "--max-new-tokens", "8"]
    online, report = _generate(capsys, checkpoint, *argv, "--softmax", "online")
    assert "recomputed steps: 0 of 7" in report
    for softmax, recomputed in ((["--phi", "500"], 7), (["--softmax", "bound"], 0), (["--softmax", "unified"], 0)):
        text, report = _generate(capsys, checkpoint, *argv, *softmax)
        assert text == online
        assert f"recomputed steps: {recomputed} of 7" in report


def test_a_phi_that_fails_too_often_is_warned_of(capsys, checkpoint):
    argv = ["generate", "--model", str(checkpoint), "--prompt", "class ", "--max-new-tokens", "80", "--phi", "500"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 8 of the latest 8 decode steps left the safe window" in err
    assert cli.main([*argv[:-3], "8", "--phi", "500"]) == 0
    err = capsys.readouterr().err
    assert "fdpp-jax: warning: 7 of the latest 7 decode steps left the safe window" in err


def test_chat_fills_in_the_template_and_defaults_come_from_the_checkpoint(capsys, checkpoint, tmp_path):
    directory = pathlib.Path(shutil.copytree(checkpoint, tmp_path / "chat"))
    template = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    (directory / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0}')
    argv = ["--chat", "--system", "a", "--prompt", "b", "--max-new-tokens", "8"]
    sampled, _ = _generate(capsys, str(directory), *argv)
    assert sampled.startswith("s=a;u=b;")
    assert sampled != _generate(capsys, str(directory), *argv, "--temperature", "0")[0]


@pytest.mark.parametrize("flags", [["--top-p", "0.99"], ["--top-k", "100"]])
def test_a_filter_alone_samples_at_temperature_1(capsys, checkpoint, flags):
    argv = ["--prompt", "x", "--max-new-tokens", "8", *flags]
    text = _generate(capsys, checkpoint, *argv)[0]
    assert text == _generate(capsys, checkpoint, *argv, "--temperature", "1")[0]
    assert text != _generate(capsys, checkpoint, *argv, "--temperature", "0")[0]


def test_sampling_follows_the_seed(capsys, checkpoint):
    argv = ["--prompt", "x", "--max-new-tokens", "8", "--temperature", "2", "--top-k", "50", "--top-p", "0.9"]
    texts = [_generate(capsys, checkpoint, *argv, "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_gives_each_prompt_its_own_text(capsys, checkpoint):
    argv = ["--max-new-tokens", "6", "--dtype", "float32"]
    alone = [_generate(capsys, checkpoint, "--prompt", prompt, *argv)[0].rstrip("\n") for prompt in ("ab", "cdefg")]
    together, report = _generate(capsys, checkpoint, "--prompt", "ab", "--prompt", "cdefg", *argv)
    assert together.rstrip("\n") == f"[1 of 2] {alone[0]}\n\n[2 of 2] {alone[1]}"
    assert "10 tokens in" in report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--max-new-tokens", "1000000"], "max_position_embeddings"),
    ],
)
def test_bad_values_are_refused(capsys, checkpoint, argv, message):
    code, out, err = _run(capsys, "generate", "--model", checkpoint, "--prompt", "x", *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_the_second_run_finds_what_the_first_has_compiled(tmp_path):
    options = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    environment = os.environ | options | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fdpp_jax", "generate", "--prompt", "def ", "--max-new-tokens", "4"]

    def compiled():
        """The programs that are kept after a run, and when they were written."""
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        found = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("-atime")]
        return {path.relative_to(tmp_path): path.stat().st_mtime_ns for path in found}

    first = compiled()
    assert first
    assert {path.parts[:2] for path in first} == {("fdpp_jax", "xla")}
    assert compiled() == first


def test_generate_with_the_bundled_model(capsys):
    code, out, err = _run(capsys, "generate", "--prompt", "def ", "--max-new-tokens", "10")
    assert code == 0, err
    assert out.startswith("def ")
    assert "Kernels of a decode step" in out
