"""Trains the bundled tiny LLaMA on the source of Python's standard library.

    python examples/train_tiny.py --out fdpp_jax/models/tiny

The corpus is wherever Python is: every *.py file below the standard library's directory that decodes as
UTF-8. One file in twenty, chosen by a hash of its name, is held out and never seen by the tokenizer or the
model; the loss on those files goes into the README beside the weights. Every window that the model sees
starts with <s>, so that a prompt continues like text from the middle of a file.

Takes about a minute for the tokenizer and a few minutes for the model on one GPU.
"""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fdpp_jax.models import LlamaConfig, LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
# Tables and generated text, no program that a reader would recognise.
SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "encoded_modules"}
HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the corpus."""

    steps: int = 1500
    batch: int = 64
    context: int = 512
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 704
    peak_lr: float = 3e-3
    warmup_steps: int = 200
    steps_per_call: int = 50
    eval_every: int = 250
    max_files: int | None = None


SMOKE = Settings(
    steps=4,
    batch=2,
    context=32,
    vocab_size=384,
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    warmup_steps=2,
    steps_per_call=2,
    eval_every=2,
    max_files=30,
)


# Corpus and tokenizer.


def is_held_out(name: str) -> bool:
    """True for the fixed one in twenty of the file names that are kept from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def read_corpus(root: pathlib.Path, max_files: int | None = None) -> dict[str, str]:
    """Maps the names of the *.py files below root, relative to it and in sorted order, to their text."""
    corpus = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            corpus[relative.as_posix()] = text
        if max_files is not None and len(corpus) == max_files:
            break
    return corpus


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text is encodable, and runs of spaces become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"corpus gave {tokenizer.get_vocab_size()} tokens, expected {vocab_size=}")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one int32 stream, with </s> after each."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream.extend(encoding.ids)
        stream.append(EOS_ID)
    return np.array(stream, np.int32)


# Model and training.


def hf_config(settings: Settings) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.hidden_size // settings.num_heads,
        "max_position_embeddings": settings.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }


def window_loss(model: LlamaForCausalLM, windows: jax.Array) -> jax.Array:
    """Summed cross-entropy, in nats, of windows [B, T], each predicted from <s> on."""
    inputs = jnp.concatenate([jnp.full_like(windows[:, :1], BOS_ID), windows[:, :-1]], axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), windows).sum()


def initialise(params: nnx.State, num_layers: int, key: jax.Array) -> nnx.State:
    """Norms 1, weights normal with deviation 0.02, and those that write to the residual stream smaller."""

    def init(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.ones(leaf.shape, jnp.float32)
        name = jax.tree_util.keystr(path)
        writes_residual = "o_proj" in name or "down_proj" in name
        scale = 0.02 / math.sqrt(2 * num_layers) if writes_residual else 0.02
        leaf_key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
        return scale * jax.random.normal(leaf_key, leaf.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(init, params)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted pieces of the training loop. Parameters are float32, computing is in `dtype`."""

    settings: Settings
    graphdef: nnx.GraphDef
    dtype: jnp.dtype
    optimizer: optax.GradientTransformation

    def model(self, params: nnx.State) -> LlamaForCausalLM:
        """The model with float32 parameters rounded to the computing dtype."""
        return nnx.merge(self.graphdef, jax.tree.map(lambda x: x.astype(self.dtype), params))

    def learning_rate(self, step: jax.Array, total_steps: jax.Array) -> jax.Array:
        """Linear warm-up, then a cosine down to a tenth of the peak at the (traced) total."""
        warmup = self.settings.warmup_steps
        progress = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1.0), 0.0, 1.0)
        decay = 0.1 + 0.9 * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return self.settings.peak_lr * jnp.minimum((step + 1) / warmup, decay)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train_chunk(
        self, state: tuple[nnx.State, Any], stream: jax.Array, key: jax.Array, step: jax.Array, total_steps: jax.Array
    ) -> tuple[tuple[nnx.State, Any], jax.Array]:
        """`steps_per_call` optimizer steps without the host; returns the mean loss in nats per token."""
        batch, context = self.settings.batch, self.settings.context

        def one_step(state: tuple[nnx.State, Any], step: jax.Array) -> tuple[tuple[nnx.State, Any], jax.Array]:
            params, moments = state
            offsets = jax.random.randint(jax.random.fold_in(key, step), (batch, 1), 0, stream.size - context)
            windows = stream[offsets + jnp.arange(context)]  # [B, T]

            def mean_loss(params: nnx.State) -> jax.Array:
                return window_loss(self.model(params), windows) / (batch * context)

            loss, grads = jax.value_and_grad(mean_loss)(params)
            updates, moments = self.optimizer.update(grads, moments, params)
            rate = self.learning_rate(step, total_steps)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, moments), loss

        state, losses = jax.lax.scan(one_step, state, step + jnp.arange(self.settings.steps_per_call))
        return state, losses.mean()

    @functools.partial(jax.jit, static_argnums=0)
    def eval_batch(self, params: nnx.State, windows: jax.Array) -> jax.Array:
        """Summed nats of windows [B, T]."""
        return window_loss(self.model(params), windows)

    def held_out_loss(self, params: nnx.State, stream: np.ndarray) -> float:
        """Nats per token over the whole stream, cut into windows that don't overlap."""
        batch, context = self.settings.batch, self.settings.context
        num_batches = stream.size // (batch * context)
        windows = stream[: num_batches * batch * context].reshape(num_batches, batch, context)
        return float(sum(float(self.eval_batch(params, window)) for window in windows)) / windows.size


def train(
    settings: Settings,
    streams: dict[str, np.ndarray],
    *,
    seed: int,
    dtype: jnp.dtype,
    minutes: float | None,
    report: Callable[[str], None],
) -> tuple[Trainer, nnx.State, int]:
    """Trains from scratch and returns the trainer, the float32 parameters and the number of steps taken.

    With a budget of minutes, compilation not counted, the total that the learning rate decays towards is
    revised to what the measured speed allows.
    """
    shapes = nnx.eval_shape(
        lambda: LlamaForCausalLM(LlamaConfig.from_hf(hf_config(settings)), dtype=dtype, rngs=nnx.Rngs(0))
    )
    graphdef, abstract_params = nnx.split(shapes)
    params = initialise(abstract_params, settings.num_layers, jax.random.key(seed))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    )
    trainer = Trainer(settings, graphdef, dtype, optimizer)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    report(f"{num_params:,} parameters, {streams['train'].size:,} training tokens, {jax.devices()[0].device_kind}")

    state = (params, optimizer.init(params))
    stream, key = jnp.asarray(streams["train"]), jax.random.key(seed + 1)
    total, step, started, timed_from = settings.steps, 0, 0.0, 0
    while step < total:
        state, loss = trainer.train_chunk(state, stream, key, jnp.int32(step), jnp.float32(total))
        step += settings.steps_per_call
        jax.block_until_ready(loss)
        if started == 0.0:  # the first call compiled
            started, timed_from = time.perf_counter(), step
            continue
        elapsed = time.perf_counter() - started
        speed = (step - timed_from) / elapsed  # steps per second
        if minutes is not None:
            total = min(settings.steps, timed_from + int(minutes * 60 * speed))
        if step % settings.eval_every == 0 or step >= total:
            held_out = trainer.held_out_loss(state[0], streams["held_out"])
            tokens = speed * settings.batch * settings.context
            report(f"step {step}/{total}  loss {loss:.3f}  held out {held_out:.3f}  {tokens / 1e6:.2f}M tokens/s")
    return trainer, state[0], step


# Export.


def hf_tensors(params: nnx.State, config: LlamaConfig) -> dict[str, jax.Array]:
    """Our parameters under Hugging Face's names: q, k, v and gate, up apart, in bfloat16."""
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    splits = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), (query_width, query_width + kv_width)),
        "gate_up_proj": (("gate_proj", "up_proj"), (config.intermediate_size,)),
    }
    tensors = {}
    for path, leaf in nnx.to_flat_state(params):
        parts = [str(part) for part in path]
        if parts[-1] != "weight":
            parts.append("weight")
        value = leaf[...].astype(jnp.bfloat16)
        owner = parts[-2]
        if owner in splits:
            names, rows = splits[owner]
            for name, part in zip(names, jnp.split(value, rows), strict=True):
                tensors[".".join([*parts[:-2], name, "weight"])] = part
        else:
            tensors[".".join(parts)] = value
    return tensors


def save_checkpoint(
    out: pathlib.Path, settings: Settings, params: nnx.State, tokenizer: Tokenizer, readme: str
) -> None:
    """Writes the folder in Hugging Face's format."""
    out.mkdir(parents=True, exist_ok=True)
    config = hf_config(settings)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation_config = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    tensors = hf_tensors(params, LlamaConfig.from_hf(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "README.md").write_text(readme)


def readme_text(
    trainer: Trainer, params: nnx.State, steps: int, loss: float, bits_per_byte: float, seed: int, names: Sequence[str]
) -> str:
    """The README beside the weights: what it is, how good it is, how it was made."""
    settings = trainer.settings
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax", "tokenizers")]
    held_out = "\n".join(f"- {name}" for name in names)
    return f"""# A tiny LLaMA of Python's standard library

{num_params:,} parameters in bfloat16, {settings.num_layers} layers of width {settings.hidden_size}, \
{settings.num_heads} query and {settings.num_kv_heads} key/value heads, context {settings.context}, \
byte-level BPE with {settings.vocab_size} tokens. Made by `examples/train_tiny.py`; it is here so that decoding \
can be tried and tested without a download.

**Held-out loss: {loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte**, with the weights rounded to bfloat16 \
as stored, on the files listed below, cut into windows of {settings.context} tokens that each start from `<s>`.

- Corpus: the `*.py` files of the standard library of Python {sys.version_info.major}.{sys.version_info.minor} with \
its tests, without `encodings` and `pydoc_data`. They are under the PSF license.
- Training: {steps} steps of {settings.batch} x {settings.context} tokens, AdamW, peak learning rate \
{settings.peak_lr:g}, seed {seed}, computed in {trainer.dtype.name}.
- Made on {datetime.date.today().isoformat()}, {jax.devices()[0].device_kind}, with {", ".join(packages)}.

## Held-out files

{held_out}
"""


def print_samples(out: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Prints two continuations, generated from the checkpoint as it was saved."""
    from fdpp_jax import models as fdpp_models
    from fdpp_jax.generation import generate

    model = fdpp_models.load(str(out))
    for prompt in ("def ", "class "):
        ids = tokenizer.encode(prompt).ids
        new_tokens = min(160, model.config.max_position_embeddings - len(ids))
        result = generate(
            model, np.array([ids]), max_new_tokens=new_tokens, eos_ids=(EOS_ID,), temperature=0.7, top_p=0.9
        )
        tokens = np.asarray(result.tokens)[0, : int(np.asarray(result.lengths)[0])]
        print(f"--- {prompt!r}\n{tokenizer.decode([*ids, *tokens.tolist()])}\n", flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--corpus",
        type=pathlib.Path,
        default=pathlib.Path(sysconfig.get_paths()["stdlib"]),
        help="folder of *.py files (default: this Python's standard library; some systems ship it without its tests)",
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default {Settings.steps})")
    parser.add_argument("--batch", type=int, help=f"windows a step (default {Settings.batch})")
    parser.add_argument("--minutes", type=float, help="training time, compilation not counted; shortens --steps")
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default {Settings.peak_lr})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="computing dtype (default bfloat16 on a GPU)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a far smaller model, as a check")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    settings = SMOKE if args.smoke else Settings()
    given = {"steps": args.steps, "batch": args.batch, "peak_lr": args.lr}
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    for name in ("steps", "batch"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    on_gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))

    report = functools.partial(print, flush=True)
    corpus = read_corpus(args.corpus, settings.max_files)
    names = [name for name in corpus if is_held_out(name)]
    texts = {
        "train": [text for name, text in corpus.items() if not is_held_out(name)],
        "held_out": [corpus[name] for name in names],
    }
    report(f"{len(texts['train'])} files to train on, {len(names)} held out")
    tokenizer = train_tokenizer(texts["train"], settings.vocab_size)
    streams = {part: encode(tokenizer, texts[part]) for part in texts}
    if streams["held_out"].size < settings.batch * settings.context:
        raise ValueError(f"held-out files have {streams['held_out'].size} tokens, fewer than one batch")

    trainer, params, steps = train(settings, streams, seed=args.seed, dtype=dtype, minutes=args.minutes, report=report)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)  # as it is stored
    loss = trainer.held_out_loss(params, streams["held_out"])
    held_out_bytes = sum(len(text.encode()) for text in texts["held_out"])
    bits_per_byte = loss / math.log(2) * streams["held_out"].size / held_out_bytes
    readme = readme_text(trainer, params, steps, loss, bits_per_byte, args.seed, names)
    save_checkpoint(args.out, settings, params, tokenizer, readme)
    size_mb = sum(path.stat().st_size for path in args.out.iterdir()) / 1e6
    report(f"held out: {loss:.3f} nats/token, {bits_per_byte:.3f} bits/byte; {args.out} holds {size_mb:.1f} MB")
    print_samples(args.out, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
