"""The flags, prompts and printed text of `fdpp-jax generate`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Generator

    from fdpp_jax.generation import GenerationResult, StreamChunk
    from fdpp_jax.models import SamplingDefaults, Tokenizer

GENERATE_EXAMPLES = (
    '  fdpp-jax generate --prompt "def "\n'
    '  fdpp-jax generate --prompt "class Node" --prompt "import " --max-new-tokens 32    one batch of two\n'
    '  fdpp-jax generate --model org/name --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7\n'
    '  fdpp-jax generate --model org/name --chat --prompt "Who are you?"\n'
    '  fdpp-jax generate --prompt "def " --phi 40    a phi far off: watch the recomputed steps, not the text\n'
)


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """What to continue, and how to sample."""
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


def prompt(args: argparse.Namespace, text: str, directory: "pathlib.Path", tokenizer: "Tokenizer") -> list[int]:
    """The tokens of one --prompt."""
    from fdpp_jax import models

    if not args.chat:
        return tokenizer.encode(text)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    return tokenizer.encode(models.chat_text(directory, messages), add_special_tokens=False)


def sampling(args: argparse.Namespace, directory: "pathlib.Path") -> "SamplingDefaults":
    """What the flags say, and the checkpoint where they say nothing at all."""
    from fdpp_jax import models

    flags = args.temperature, args.top_k, args.top_p
    if flags == (None, None, None):
        return models.sampling_defaults(directory)
    temperature = 1.0 if args.temperature is None else args.temperature
    return models.SamplingDefaults(temperature, args.top_k, args.top_p)


def print_stream(
    chunks: "Generator[StreamChunk, None, GenerationResult]", prompts: list[list[int]], tokenizer: "Tokenizer"
) -> "GenerationResult":
    """Prints one prompt's text as it comes, of several prompts each text when it has ended."""
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
            # A character whose bytes are not all there yet decodes to U+FFFD: it waits for the next chunk.
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
