"""`fdpp-jax calibrate`: from text files to a calibration of a checkpoint."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import pathlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdpp_jax.cli.arguments import Commands, add_checkpoint, add_command, given, output_file, unwritable_because
from fdpp_jax.cli.checkpoints import checkpoint_directory, default_dtype, keep_compiled
from fdpp_jax.cli.output import print_table
from fdpp_jax.progress import bar

if TYPE_CHECKING:
    import numpy as np

    from fdpp_jax.calibration import Calibration
    from fdpp_jax.models import Tokenizer

_EXAMPLES = """\
  fdpp-jax calibrate --model ./Llama-2-7b-hf --data ./texts             then generate finds it beside the checkpoint
  fdpp-jax calibrate --data README.md --samples 8 --output tiny.json     the bundled model, on whatever device there is
  fdpp-jax calibrate --model ./Llama-2-7b-hf --data ./texts --length 2048 --plot scores.png
"""
_DEFAULT_LENGTH = 512
_UTF8 = "utf-8-sig"  # a byte order mark is none of the text


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    summary = "record a model's attention scores on your texts, and find the phi for its unified max"
    parser = add_command(commands, "calibrate", run, summary, _EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=given,
        metavar="FILE-OR-DIR",
        help="a text file, or a directory of them, as they will be decoded",
    )
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="pieces of the text (default: 256)")
    parser.add_argument(
        "--length",
        type=int,
        metavar="T",
        help=f"tokens of a piece (default: {_DEFAULT_LENGTH}, or the model's context)",
    )
    parser.add_argument(
        "--min-tokens",
        type=int,
        metavar="N",
        help="tokens that there must be for a phi to be worth something (default: 1024)",
    )
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="pieces computed together (default: 4)")
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE.png", help="also draw the ranges by layer; needs matplotlib"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="where to write (default: fdpp_calibration.json beside the checkpoint)",
    )


def run(args: argparse.Namespace) -> None:
    """Records, writes the file and prints its tables.

    Raises:
      ValueError: The flags, the data or a partial file do not fit.
      KeyboardInterrupt: Ctrl-C or SIGTERM. A partial file has what was recorded; the same command goes on from there.
    """
    from fdpp_jax.plans import device

    keep_compiled()
    directory = checkpoint_directory(args.model)
    dtype = args.dtype or default_dtype(device.current())
    _check_flags(args)
    from fdpp_jax import calibration, models
    from fdpp_jax.models.loading import fingerprint, read_config

    output, partial = _output_files(args.output, directory)
    config = read_config(directory)
    length = args.length or min(_DEFAULT_LENGTH, config.max_position_embeddings)
    tokenizer = models.load_tokenizer(directory, vocab_size=config.vocab_size)
    tokens, lengths = _samples(pathlib.Path(args.data), tokenizer, args.samples, length)
    min_tokens = calibration.MIN_TOKENS if args.min_tokens is None else args.min_tokens
    calibration.check_tokens(int(lengths.sum()), min_tokens, "--min-tokens")
    digest = hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()[:16]
    data = f"{len(tokens)} pieces of {length} tokens from {pathlib.Path(args.data).name}, sha256 {digest}"
    weights = fingerprint(directory)
    resumed = _resumed(partial, data, dtype, weights)

    model = models.load(directory, dtype=dtype)
    done = 0 if resumed is None else resumed.num_sequences
    recorded = resumed
    with bar("Calibrating", len(tokens), done) as update, _sigterm_as_ctrl_c():

        def progress(so_far: "Calibration") -> None:
            nonlocal recorded
            recorded = so_far
            update(done=so_far.num_sequences)

        try:
            batches = _batches(tokens[done:], lengths[done:], args.batch)
            recorded = calibration.calibrate(model, batches, progress=progress, resume=resumed, min_tokens=min_tokens)
        except KeyboardInterrupt:
            if recorded is None:
                raise
            dataclasses.replace(recorded, data=data, weights=weights).save(partial)
            raise KeyboardInterrupt(
                f"{partial} has the first {recorded.num_sequences}; the same command goes on"
            ) from None
    recorded = dataclasses.replace(recorded, data=data, weights=weights)
    recorded.save(output)
    partial.unlink(missing_ok=True)
    if args.plot:
        _save_plot(recorded, args.plot)
    _print_layers(recorded)
    _print_levels(recorded)
    print(f"wrote {output}")


def _check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that cannot be followed, before any work."""
    for name in ("samples", "batch", "length", "min_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'fdpp-jax[plots]'")
    if args.plot and (kind := pathlib.Path(args.plot).suffix[1:].lower()) not in (kinds := _plot_kinds()):
        raise ValueError(f"--plot must end in one of {', '.join(kinds)}; got {kind!r} in {args.plot}")


def _output_files(named: str | None, directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The file to write, and the partial one that an interrupted run leaves; both can be written."""
    from fdpp_jax import calibration, models

    if not named and directory == models.bundled_path():
        raise ValueError("the bundled model lies in the installed package, where nothing is written: name an --output")
    output = pathlib.Path(named) if named else directory / calibration.FILE_NAME
    partial = output.with_name(output.name + ".partial")
    for path in (output, partial):
        if reason := unwritable_because(path):
            raise ValueError(f"{reason}; name another --output")
    return output, partial


def _resumed(partial: pathlib.Path, data: str, dtype: str, weights: str) -> "Calibration | None":
    """The calibration of an interrupted run of the same command; None where there is none.

    Raises:
      ValueError: The partial file is of another run.
    """
    from fdpp_jax import calibration

    found = calibration.Calibration.load(partial) if partial.is_file() else None
    if found is not None and (found.data, found.dtype, found.weights) != (data, dtype, weights):
        raise ValueError(
            f"{partial} holds another run, of {found.data} in {found.dtype} with weights {found.weights}; this "
            f"one is of {data} in {dtype} with weights {weights}: remove it or name another --output"
        )
    return found


def _samples(
    path: pathlib.Path, tokenizer: "Tokenizer", num_samples: int, length: int
) -> tuple["np.ndarray", "np.ndarray"]:
    """Up to num_samples pieces, evenly spread over the text: tokens [B, T] int32, right-padded, and lengths [B].

    Each piece starts as the tokenizer starts a text.
    """
    import numpy as np

    empty, pieces = tokenizer.encode(""), []
    for text in _texts(path):
        ids = tokenizer.encode(text)
        start = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(empty, ids, strict=False))]
        step = length - len(start)
        if step < 1:
            raise ValueError(f"--length must exceed the {len(start)} tokens that each piece starts with, got {length}")
        pieces += [start + ids[i : i + step] for i in range(len(start), len(ids), step)]
    if not pieces:
        raise ValueError(f"expected text in {path}, found none")
    count = min(num_samples, len(pieces))
    tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for row in range(count):
        piece = pieces[row * len(pieces) // count]
        tokens[row, : len(piece)], lengths[row] = piece, len(piece)
    return tokens, lengths


def _texts(path: pathlib.Path) -> Iterator[str]:
    """The text of a file, or of all UTF-8 files below a directory, in the order of their names."""
    from fdpp_jax.models.loading import refuse_pointers

    if not path.exists():
        raise ValueError(f"--data must be a file or a directory, got {path}")
    if path.is_file():
        refuse_pointers(path.parent, [path.name])
        try:
            yield path.read_text(encoding=_UTF8)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error
        return
    for entry in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in entry.relative_to(path).parts)
        if entry.is_file() and not hidden:
            refuse_pointers(entry.parent, [entry.name])
            with contextlib.suppress(UnicodeDecodeError):
                yield entry.read_text(encoding=_UTF8)


def _batches(tokens: "np.ndarray", lengths: "np.ndarray", batch: int) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Batches of one shape; rows of length 0 fill the last batch."""
    import numpy as np

    for start in range(0, len(tokens), batch):
        fill = (0, max(0, start + batch - len(tokens)))
        yield np.pad(tokens[start : start + batch], (fill, (0, 0))), np.pad(lengths[start : start + batch], fill)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Schedulers end a job with SIGTERM, which alone would leave no partial file."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_layers(recorded: "Calibration") -> None:
    """The ranges of scores, by layer."""
    stats = recorded.stats
    bottom, top = recorded.window()
    rows = []
    for layer in range(recorded.num_layers):
        central_low, central_high = (ends[layer] for ends in stats.scores.central_range())
        ranges = [(d.low[layer].min(), d.high[layer].max()) for d in (stats.scores, stats.row_max, stats.log_den)]
        ranges.insert(1, (central_low.min(), central_high.max()))
        low, high = ranges[-1]
        margin = (top - bottom - (high - low)) / 2
        rows.append((str(layer), *(f"{low:.1f} .. {high:.1f}" for low, high in ranges), f"{margin:.1f}"))
    title = f"Scores in nats, {recorded.num_tokens} tokens in {recorded.dtype}"
    print_table(title, ("layer", "scores", "99.99 % of them", "row max", "ln den", "margin"), rows)


def _print_levels(recorded: "Calibration") -> None:
    """Whether a phi fits the model, each layer or each head."""
    from fdpp_jax.calibration import LEVELS

    rows = []
    for level in LEVELS:
        judgement = recorded.judge(level)
        low, high = judgement.phi.min(), judgement.phi.max()
        rows.append(
            (
                level,
                f"{low:.2f}" if level == "model" else f"{low:.2f} .. {high:.2f}",
                f"{judgement.margin_nats:.1f}",
                f"{judgement.recompute_rate:.4%}",
                "unified max" if judgement.fits else "refused",
                judgement.reason,
            )
        )
    title = "Unified max with one phi for the model, a layer or a head"
    print_table(title, ("level", "phi", "margin", "rows outside", "verdict", "why"), rows)


def _plot_kinds() -> list[str]:
    """The formats that matplotlib can write, as ends of file names."""
    return sorted(importlib.import_module("matplotlib.figure").Figure().canvas.get_supported_filetypes())


def _save_plot(recorded: "Calibration", path: str) -> None:
    from fdpp_jax import calibration

    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4), layout="constrained")
    calibration.plot(recorded, figure.subplots())
    figure.savefig(path, dpi=150)
