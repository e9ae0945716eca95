"""`fdpp-jax generate`: continues prompts or holds a conversation; the text on stdout, all else on stderr."""

import argparse
import codecs
import contextlib
import dataclasses
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fdpp_jax.cli.arguments import Commands, add_checkpoint, add_command, utf8
from fdpp_jax.cli.chat import Conversation, chat_tokens, messages
from fdpp_jax.cli.checkpoints import checkpoint_directory, default_dtype, keep_compiled
from fdpp_jax.cli.output import kernels_line, plan_records, print_json, print_plans, report

if TYPE_CHECKING:
    from collections.abc import Generator

    from fdpp_jax.cli.output import NamedPlan
    from fdpp_jax.generation import Softmax
    from fdpp_jax.models import CausalLM, SamplingDefaults, Tokenizer
    from fdpp_jax.plans.device import Device
    from fdpp_jax.prompts import PromptCache
    from fdpp_jax.results import GenerationResult, StreamChunk

_EXAMPLES = """\
  fdpp-jax generate --prompt "def "
  fdpp-jax generate --prompt "class Node" --prompt "import " --max-new-tokens 32    one batch of two
  fdpp-jax generate --model org/name --prompt-file story.txt --temperature 0.8 --top-p 0.95 --seed 7
  fdpp-jax generate --model org/name --chat --prompt "Who are you?"
  fdpp-jax generate --model org/name --chat                         a conversation; Ctrl-D ends it
  echo "def " | fdpp-jax generate --prompt - --quiet > out.txt      the generated text alone
  fdpp-jax generate --prompt "def " --phi 200   a phi far off: watch the recomputed steps, not the text
"""
_STREAM_CHUNK = 8  # tokens per exchange with the device: few enough to be lively, enough to be cheap
_STDIN = "-"


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    summary = "continue prompts, or chat; the text goes to stdout, and how fast it was, and why, to stderr"
    parser = add_command(commands, "generate", run, summary, _EXAMPLES)
    add_checkpoint(parser)
    prompts = parser.add_argument_group("prompts, any number of them: one batch")
    prompts.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help=f"text to continue; {_STDIN} reads it from stdin",
    )
    prompts.add_argument(
        "--prompt-file",
        action="append",
        dest="prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="file with a text to continue, in UTF-8; its last line break is no part of it",
    )
    prompts.add_argument(
        "--chat",
        action="store_true",
        help="a prompt is a user's message: use the chat template; without a prompt, a conversation",
    )
    prompts.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="new tokens (default: 64)")
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 takes the best token (default: 1 with --top-k or --top-p; without, all three as the checkpoint's "
        "generation_config.json has them, which is 0 if it does not sample)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K best tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the best tokens of probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, a 64-bit integer (default: 0)")
    parser.add_argument(
        "--softmax",
        choices=("auto", "unified", "bound", "online"),
        default="auto",
        help="auto: unified with a calibrated phi where one fits, without a calibration what suits the family, and "
        "online for decode steps where that is measured to be faster; "
        "unified: one phi for all; bound: phi from |q| max|k|; online: running max (default: auto)",
    )
    parser.add_argument("--phi", type=float, help="of --softmax unified, in natural-log units (default: 6.0)")
    parser.add_argument(
        "--prefill-chunk-size",
        type=int,
        metavar="T",
        help="tokens of a prompt that run at once; longer prompts run in pieces, and smaller pieces take less memory "
        "(default: 4096; on a GPU with cuDNN and no kernel for pieces, the whole prompt)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    shown = parser.add_argument_group("output").add_mutually_exclusive_group()
    shown.add_argument(
        "--json", action="store_true", help="print one JSON object instead: texts, tokens, times, kernels"
    )
    shown.add_argument("--verbose", action="store_true", help="report every kernel of a decode step, and why it runs")
    shown.add_argument("--quiet", action="store_true", help="report nothing but warnings and errors")


@dataclasses.dataclass(frozen=True)
class _Session:
    """A loaded model, and how to sample from it."""

    args: argparse.Namespace
    directory: pathlib.Path
    tokenizer: "Tokenizer"
    model: "CausalLM"
    running: "Device"
    sampling: "SamplingDefaults"
    softmax: "Softmax"

    def stream(
        self,
        prompts: list[list[int]],
        turn: int = 0,
        *,
        cache: "PromptCache | None" = None,
        return_cache: bool = False,
    ) -> "Generator[StreamChunk, None, GenerationResult]":
        """Generates; turns of a conversation draw other numbers."""
        import jax

        from fdpp_jax import generation

        return generation.stream(
            self.model,
            prompts,
            max_new_tokens=self.args.max_new_tokens,
            eos_ids=() if self.args.ignore_eos else self.tokenizer.eos_ids,
            **dataclasses.asdict(self.sampling),
            key=jax.random.fold_in(seed_key(self.args.seed), turn) if turn else seed_key(self.args.seed),
            softmax=self.softmax,
            chunk_size=_STREAM_CHUNK,
            tokenizer=self.tokenizer,
            cache=cache,
            return_cache=return_cache,
            prefill_chunk_size=self.args.prefill_chunk_size,
        )

    def plans(self, result: "GenerationResult") -> "list[NamedPlan]":
        """The kernels of the decode steps that led to a result."""
        from fdpp_jax import models

        return models.model_plans(
            self.model.config,
            batch=len(result.lengths),
            capacity=result.cache_capacity,
            device=self.running,
            dtype=self.model.dtype,
            is_online=result.is_online,
        )


def run(args: argparse.Namespace) -> None:
    """Prints texts as they come, then says how fast it was and which kernels ran.

    Raises:
      ValueError: Flags, prompts or the checkpoint don't fit. Raised before weights are loaded.
    """
    _check_flags(args)
    texts = [prompt_text(source) for source in args.prompts or ()]
    if not all(texts):
        raise ValueError("expected prompts that are not empty, got one that is")

    from fdpp_jax import calibration, models
    from fdpp_jax.models.checks import positive_int
    from fdpp_jax.plans import device
    from fdpp_jax.prompts import check_prompts
    from fdpp_jax.sampling import make_sampling

    running = device.current()
    keep_compiled()
    directory = checkpoint_directory(args.model)
    config = models.loading.read_config(directory)
    # The tokenizer comes first: a wrong one shows at once, weights take a while. So does all else that can be wrong.
    tokenizer = models.load_tokenizer(directory, vocab_size=config.vocab_size)
    prompts = [_prompt_tokens(args, text, directory, tokenizer) for text in texts]
    sampling = _sampling(args, directory)
    make_sampling(**dataclasses.asdict(sampling), vocab_size=config.vocab_size)
    positive_int("max_new_tokens", args.max_new_tokens)
    if args.prefill_chunk_size is not None:
        positive_int("prefill_chunk_size", args.prefill_chunk_size)
    seed_key(args.seed)
    if prompts:
        check_prompts(config, prompts, max_new_tokens=args.max_new_tokens)
    dtype = args.dtype or default_dtype(running)
    softmax = asked_softmax(args.softmax, args.phi)
    if softmax == "auto":
        calibration.choose_softmax(config, directory, dtype)  # a malformed calibration shows before weights are loaded
    model = models.load(directory, dtype=dtype, progress=False if args.quiet else None)
    session = _Session(args, directory, tokenizer, model, running, sampling, softmax)
    if texts:
        _complete(session, texts, prompts)
    else:
        _converse(session)


def _check_flags(args: argparse.Namespace) -> None:
    if args.phi is not None and args.softmax not in ("auto", "unified"):
        raise ValueError(f"--phi belongs to --softmax unified, got --softmax {args.softmax}")
    if args.system is not None and not args.chat:
        raise ValueError("--system belongs to --chat")
    if not args.prompts and not args.chat:
        raise ValueError("expected --prompt TEXT or --prompt-file FILE, or --chat for a conversation")
    if not args.prompts and args.json:
        raise ValueError("--json belongs to prompts, not to a conversation")
    if args.prompts and args.prompts.count(_STDIN) > 1:
        raise ValueError(f"stdin is one prompt: expected --prompt {_STDIN} once")


def prompt_text(source: str | pathlib.Path) -> str:
    """The text that --prompt or --prompt-file names.

    Raises:
      ValueError: It is not UTF-8.
      OSError: The file cannot be read.
    """
    if isinstance(source, pathlib.Path):
        return _file_text(source.read_bytes(), str(source))
    if source == _STDIN:
        return _file_text(sys.stdin.buffer.read(), "stdin")
    return utf8(os.fsencode(source), "--prompt")


def _file_text(content: bytes, name: str) -> str:
    """What a file says, without what editors write around it: a byte order mark, and the last line's break."""
    content = content.removeprefix(codecs.BOM_UTF8)
    return utf8(content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content, name)


def seed_key(seed: int) -> Any:
    """The PRNG key of a seed: another one for each of the 64-bit integers, and `jax.random.key`'s own for 32 bits.

    Raises:
      ValueError: The seed is no 64-bit integer.
    """
    import jax
    import numpy as np

    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--seed must be within -2^63..2^63 - 1, got {seed}")
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def _prompt_tokens(args: argparse.Namespace, text: str, directory: pathlib.Path, tokenizer: "Tokenizer") -> list[int]:
    """The tokens of one prompt."""
    if args.chat:
        return chat_tokens(directory, tokenizer, [*_system(args), {"role": "user", "content": text}])
    from fdpp_jax.prompts import encoded

    return encoded(text, tokenizer)[0]


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": utf8(os.fsencode(args.system), "--system")}]


def _sampling(args: argparse.Namespace, directory: pathlib.Path) -> "SamplingDefaults":
    """How to sample: by the flags, or as the checkpoint says where no flag is given."""
    from fdpp_jax import models

    flags = args.temperature, args.top_k, args.top_p
    if flags == (None, None, None):
        return models.sampling_defaults(directory)
    temperature = 1.0 if args.temperature is None else args.temperature
    return models.SamplingDefaults(temperature, args.top_k, args.top_p)


def _complete(session: _Session, texts: list[str], prompts: list[list[int]]) -> None:
    """Continues all prompts as one batch."""
    args = session.args
    with _reported_warnings():
        if args.json:
            result = exhaust(session.stream(prompts))
        else:
            # A terminal shows the prompt before the text that continues it; a pipe gets that text alone.
            is_echoed = sys.stdout.isatty() and sys.stderr.isatty() and not (args.chat or args.quiet)
            result = print_stream(session.stream(prompts), len(prompts), texts if is_echoed else None)
    plans = session.plans(result)
    if args.json:
        print_json(_record(session, texts, result, plans))
    elif not args.quiet:
        _report(session, result, plans)


def _converse(session: _Session) -> None:
    """Answers one message after the other, until there are no more."""
    conversation = Conversation(session.directory, session.tokenizer, _system(session.args))
    for turn, text in enumerate(messages()):
        prompts, cache = conversation.asked(text)
        with _reported_warnings():
            result = print_stream(session.stream(prompts, turn, cache=cache, return_cache=True), 1)
        conversation.answered(result)
        if session.args.verbose or (turn == 0 and not session.args.quiet):
            _report(session, result, session.plans(result))


@contextlib.contextmanager
def _reported_warnings() -> Iterator[None]:
    """Says what Python warns of in a line each, once the work inside is over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                report(f"warning: {warning.message}")


def exhaust(
    chunks: "Generator[StreamChunk, None, GenerationResult]", show: "Callable[[StreamChunk, int], None] | None" = None
) -> "GenerationResult":
    """Runs a stream to its end, and shows each chunk, with the number of tokens so far."""
    num_tokens = 0
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as stop:
            result: GenerationResult = stop.value
            return result
        num_tokens += chunk.tokens.shape[1]
        if show is not None:
            show(chunk, num_tokens)


def print_stream(
    chunks: "Generator[StreamChunk, None, GenerationResult]", num_prompts: int, echo: list[str] | None = None
) -> "GenerationResult":
    """Prints the text of one prompt as it comes; of several prompts, each text when it has ended.

    Args:
      chunks: With texts.
      num_prompts: Rows of a chunk.
      echo: The prompts, to be printed before what continues them, on stderr.
    """
    texts = [""] * num_prompts
    waiting = dict.fromkeys(range(num_prompts))

    def show_prompt(row: int) -> None:
        if echo is not None:
            sys.stderr.write(echo[row])
            sys.stderr.flush()

    def print_whole(row: int) -> None:
        print(f"[{row + 1} of {num_prompts}] ", end="", flush=True)
        show_prompt(row)
        print(texts[row], end="\n\n", flush=True)
        del waiting[row]

    if num_prompts == 1:
        show_prompt(0)

    def print_new(chunk: "StreamChunk", num_tokens: int) -> None:
        for row, text in enumerate(chunk.texts or ()):
            texts[row] += text
            if num_prompts == 1:
                print(text, end="", flush=True)
            elif row in waiting and chunk.lengths[row] < num_tokens:
                print_whole(row)

    try:
        result = exhaust(chunks, print_new)
    except BaseException:
        if num_prompts == 1 and texts[0]:  # an error stands on a line of its own
            print(flush=True)
        raise
    if num_prompts == 1:
        print(flush=True)
    for row in tuple(waiting) if num_prompts > 1 else ():
        print_whole(row)
    return result


def _report(session: _Session, result: "GenerationResult", plans: "list[NamedPlan]") -> None:
    """Says on stderr how fast it was, which softmax ran, and which kernels."""
    report(speed_line(result))
    redone = f"{result.recomputed_steps} of {result.decode_steps} steps recomputed"
    report(f"softmax: {result.softmax_reason}; {redone}")
    if session.args.verbose:
        print_plans(plans, f"Kernels of a decode step on {session.running.kind}", file=sys.stderr)
    else:
        report(kernels_line(plans, session.running))


def speed_line(result: "GenerationResult") -> str:
    """Tokens per second, and what came before."""
    num_prompt, num_new = sum(map(len, result.prompts)), int(result.lengths.sum()) - len(result.lengths)
    num_cached = int(result.cached_tokens.sum())
    cached = f", behind {num_cached} in the cache" if num_cached else ""
    steps = f", {result.decode_seconds / result.decode_steps * 1e3:.2f} ms a step" if result.decode_steps else ""
    return (
        f"decode: {_rate(num_new, result.decode_seconds)}{steps}; prefill: "
        f"{_rate(num_prompt, result.prefill_seconds)}{cached}; compilation: {result.compile_seconds:.1f} s"
    )


def _rate(num_tokens: int, seconds: float) -> str:
    """ "63 tokens in 0.42 s, 150.0 tokens/s"."""
    speed = f", {num_tokens / seconds:.1f} tokens/s" if num_tokens and seconds > 0 else ""
    return f"{num_tokens} tokens in {seconds:.3f} s{speed}"


def _record(
    session: _Session, texts: list[str], result: "GenerationResult", plans: "list[NamedPlan]"
) -> dict[str, Any]:
    """What --json prints."""
    rows = zip(texts, result.prompts, result.token_lists, result.texts or (), strict=True)
    eos_ids = () if session.args.ignore_eos else session.tokenizer.eos_ids
    return {
        "model": str(session.args.model or session.directory),
        "device": session.running.kind,
        "dtype": session.model.dtype.name,
        "results": [
            {
                "prompt": text,
                "text": new_text,
                "tokens": tokens,
                "prompt_tokens": len(prompt),
                "ended": tokens[-1] in eos_ids,
            }
            for text, prompt, tokens, new_text in rows
        ],
        "softmax": result.softmax_reason,
        "is_online": result.is_online,
        "decode_steps": result.decode_steps,
        "recomputed_steps": result.recomputed_steps,
        "online_from": result.online_from,
        "seconds": {
            "prefill": result.prefill_seconds,
            "decode": result.decode_seconds,
            "compile": result.compile_seconds,
        },
        "kernels": plan_records(plans),
    }


def asked_softmax(name: str, phi: float | None) -> "Softmax":
    """What --softmax and --phi ask for."""
    from fdpp_jax.unified_max import UnifiedMax

    if name == "online":
        return None
    if name == "bound":
        return UnifiedMax.bound()
    if phi is not None or name == "unified":
        return UnifiedMax() if phi is None else UnifiedMax(phi)
    return "auto"
