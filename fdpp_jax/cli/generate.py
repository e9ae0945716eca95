"""`fdpp-jax generate`: continues prompts, and says how fast it was and which kernels ran."""

import argparse
import dataclasses
import pathlib
import sys
import warnings
from typing import TYPE_CHECKING

from fdpp_jax.cli.arguments import Commands, add_checkpoint, add_command
from fdpp_jax.cli.checkpoints import checkpoint_directory, default_dtype, keep_compiled
from fdpp_jax.cli.output import print_plans

if TYPE_CHECKING:
    from collections.abc import Generator

    from fdpp_jax.generation import GenerationResult, StreamChunk
    from fdpp_jax.models import SamplingDefaults, Tokenizer
    from fdpp_jax.unified_max import UnifiedMax

_EXAMPLES = """\
  fdpp-jax generate --prompt "def "
  fdpp-jax generate --prompt "class Node" --prompt "import " --max-new-tokens 32    one batch of two
  fdpp-jax generate --model org/name --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7
  fdpp-jax generate --model org/name --chat --prompt "Who are you?"
  fdpp-jax generate --prompt "def " --phi 40    a phi far off: watch the recomputed steps, not the text
"""
_STREAM_CHUNK = 8  # tokens per exchange with the device: few enough to be lively, enough to be cheap


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    summary = "continue prompts, then say how fast it was and which kernels ran"
    parser = add_command(commands, "generate", run, summary, _EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; again for a batch")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="new tokens (default: 64)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 takes the best token (default: 1 with --top-k or --top-p; without, all three as the checkpoint's "
        "generation_config.json has them, which is 0 if it does not sample)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K best tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the best tokens of probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--softmax",
        choices=("auto", "unified", "bound", "online"),
        default="auto",
        help="auto: unified with a calibrated phi where one fits, without a calibration what suits the family; "
        "unified: one phi for all; bound: phi from |q| max|k|; online: running max (default: auto)",
    )
    parser.add_argument("--phi", type=float, help="of --softmax unified, in natural-log units (default: 6.0)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")


def run(args: argparse.Namespace) -> None:
    """Prints the texts as they come, then speed and kernels."""
    if args.phi is not None and args.softmax not in ("auto", "unified"):
        raise ValueError(f"--phi belongs to --softmax unified, got --softmax {args.softmax}")
    if args.system is not None and not args.chat:
        raise ValueError("--system belongs to --chat")
    if not all(args.prompt):
        raise ValueError("--prompt must not be empty")

    import jax
    import numpy as np

    from fdpp_jax import generation, models
    from fdpp_jax.plans import device

    keep_compiled()
    directory = checkpoint_directory(args.model)
    # The tokenizer comes first: a wrong one shows at once, weights take a while.
    tokenizer = models.load_tokenizer(directory, vocab_size=models.loading.read_config(directory).vocab_size)
    prompts = [_prompt_tokens(args, prompt, directory, tokenizer) for prompt in args.prompt]
    sampling = _sampling(args, directory)
    running = device.current()
    dtype = args.dtype or default_dtype(running)
    softmax, why = choose_softmax(args.softmax, args.phi, directory, dtype)
    model = models.load(directory, dtype=dtype)

    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    chunks = generation.stream(
        model,
        tokens,
        lengths,
        args.max_new_tokens,
        eos_ids=() if args.ignore_eos else tokenizer.eos_ids,
        **dataclasses.asdict(sampling),
        key=jax.random.key(args.seed),
        softmax=softmax,
        chunk_size=_STREAM_CHUNK,
    )
    print(f"fdpp-jax: softmax: {why}", file=sys.stderr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = print_stream(chunks, prompts, tokenizer)
    for warning in caught:
        print(f"fdpp-jax: warning: {warning.message}", file=sys.stderr)
    print_speed(result, lengths.tolist())
    plans = models.model_plans(
        model.config, batch=len(prompts), capacity=result.cache_capacity, device=running, dtype=model.dtype
    )
    print_plans(plans, f"Kernels of a decode step on {running.kind}")


def _prompt_tokens(args: argparse.Namespace, text: str, directory: pathlib.Path, tokenizer: "Tokenizer") -> list[int]:
    """The tokens of one --prompt."""
    from fdpp_jax import models

    if not args.chat:
        return tokenizer.encode(text)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    return tokenizer.encode(models.chat_text(directory, messages), add_special_tokens=False)


def _sampling(args: argparse.Namespace, directory: pathlib.Path) -> "SamplingDefaults":
    """How to sample: by the flags, or as the checkpoint says where no flag is given."""
    from fdpp_jax import models

    flags = args.temperature, args.top_k, args.top_p
    if flags == (None, None, None):
        return models.sampling_defaults(directory)
    temperature = 1.0 if args.temperature is None else args.temperature
    return models.SamplingDefaults(temperature, args.top_k, args.top_p)


def print_stream(
    chunks: "Generator[StreamChunk, None, GenerationResult]", prompts: list[list[int]], tokenizer: "Tokenizer"
) -> "GenerationResult":
    """Prints the text of one prompt as it comes; of several prompts, each text when it has ended."""
    new_tokens: list[list[int]] = [[] for _ in prompts]
    waiting = dict.fromkeys(range(len(prompts)))
    written = ""

    def text(row: int) -> str:
        return tokenizer.decode([*prompts[row], *new_tokens[row]])

    def print_whole(row: int) -> None:
        print(f"[{row + 1} of {len(prompts)}] {text(row)}\n", flush=True)
        del waiting[row]

    num_tokens = 0
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as stop:
            result: GenerationResult = stop.value
            break
        num_tokens += chunk.tokens.shape[1]
        for row, length in enumerate(chunk.lengths.tolist()):
            new_tokens[row] = [*new_tokens[row], *chunk.tokens[row].tolist()][:length]
            if len(prompts) > 1 and row in waiting and length < num_tokens:
                print_whole(row)
        if len(prompts) == 1:
            # A character with bytes still to come decodes to U+FFFD: it waits for the next chunk.
            ready = text(0).rstrip("\ufffd")
            print(ready.removeprefix(written), end="", flush=True)
            written = ready
    if len(prompts) == 1:
        print(text(0).removeprefix(written), end="\n\n")
    else:
        for row in tuple(waiting):
            print_whole(row)
    return result


def print_speed(result: "GenerationResult", prompt_lengths: list[int]) -> None:
    """Prints tokens per second, and how many steps were recomputed."""
    num_prompt, num_new = sum(prompt_lengths), int(result.lengths.sum()) - len(prompt_lengths)
    print(f"prefill  {_rate(num_prompt, result.prefill_seconds)}")
    print(f"decode   {_rate(num_new, result.decode_seconds)}", end="")
    if result.decode_steps:
        print(f", {result.decode_seconds / result.decode_steps * 1e3:.2f} ms a step", end="")
    print(f"\ncompile  {result.compile_seconds:.1f} s")
    print(f"recomputed steps: {result.recomputed_steps} of {result.decode_steps}\n")


def _rate(num_tokens: int, seconds: float) -> str:
    """ "63 tokens in 0.42 s: 150.0 tokens/s"."""
    speed = f": {num_tokens / seconds:.1f} tokens/s" if num_tokens and seconds > 0 else ""
    return f"{num_tokens} tokens in {seconds:.3f} s{speed}"


def choose_softmax(
    name: str, phi: float | None, directory: pathlib.Path, dtype: str
) -> tuple["UnifiedMax | None", str]:
    """The policy that --softmax and --phi ask for, and the reason in one line.

    Raises:
      ValueError: The checkpoint's calibration is malformed or of another model.
    """
    from fdpp_jax import calibration
    from fdpp_jax.models.loading import read_config
    from fdpp_jax.unified_max import UnifiedMax

    if name == "online":
        return None, "online, as asked"
    if name == "bound":
        return UnifiedMax.bound(), "bound, as asked"
    if phi is not None or name == "unified":
        policy = UnifiedMax() if phi is None else UnifiedMax(phi)
        return policy, f"unified, phi {policy.phi:g}, as asked"
    return calibration.choose_softmax(read_config(directory), directory, dtype)
