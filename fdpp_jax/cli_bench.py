"""`fdpp-jax bench attention`: its flags, and from flags to one shape or the standard table."""

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdpp_jax.bench_attention import Lengths
    from fdpp_jax.device import Device
    from fdpp_jax.timing import BenchReport

ATTENTION_EXAMPLES = """\
  fdpp-jax bench attention                           the standard table, a line a shape (some minutes on a GPU)
  fdpp-jax bench attention --quick --only 32/8       of it the shapes that hold this text, ours and the floor only
  fdpp-jax bench attention --batch 8 --context 4096 --num-kv-heads 8     one shape, a line a kernel
  fdpp-jax bench attention --batch 8 --num-kv-heads 8 --capacity 8192 --lengths mixed --page-size 64
  fdpp-jax bench attention --batch 8 --kv-dtype int8 --scale-per token --json record.json
"""
_DTYPES = ("bfloat16", "float16", "float32")
# Of one shape, where any of its flags is given.
_DEFAULTS = dict(batch=1, num_heads=32, num_kv_heads=32, capacity=4096, head_dim=128, query_length=1)
_SHAPE_FLAGS = (*_DEFAULTS, "dtype", "lengths", "page_size", "kv_dtype", "scale_per")


def add_attention_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench attention`; any of the first group means one shape instead of the table."""
    shape = parser.add_argument_group("one shape (any of these)")
    shape.add_argument("--batch", type=int, metavar="B", help="sequences (default: 1)")
    shape.add_argument("--num-heads", type=int, metavar="N", help="query heads (default: 32)")
    shape.add_argument("--num-kv-heads", type=int, metavar="K", help="key/value heads (default: 32)")
    shape.add_argument(
        "--capacity", "--context", type=int, metavar="S", help="keys that a sequence has room for (default: 4096)"
    )
    shape.add_argument("--head-dim", type=int, metavar="H", help="default: 128")
    shape.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16")
    shape.add_argument(
        "--query-length", type=int, metavar="T", help="the last T tokens attend, causally: speculation (default: 1)"
    )
    shape.add_argument(
        "--lengths",
        type=_lengths,
        metavar="full|mixed|N",
        help="live keys: all, from 64 to the capacity, or N of each sequence (default: full)",
    )
    shape.add_argument("--page-size", type=int, metavar="P", help="pages of P keys, anywhere in a pool (default: none)")
    shape.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="of a quantised cache")
    shape.add_argument("--scale-per", choices=("head", "token"), help="scales of --kv-dtype (default: head)")

    table = parser.add_argument_group("the table (none of those)")
    table.add_argument("--only", metavar="TEXT", help="of the table the shapes whose label holds TEXT")
    parser.add_argument("--quick", action="store_true", help="leave out ablations and peers")


def _lengths(text: str) -> "Lengths":
    if text == "full":
        return "full"
    if text == "mixed":
        return "mixed"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected full, mixed or a number, got {text!r}") from None


def attention_bench(args: argparse.Namespace, running: "Device") -> "Callable[[], BenchReport]":
    """What the flags ask for, checked and ready to run.

    Raises:
      ValueError: The flags do not fit together, or ask for the table without a GPU.
    """
    given: dict[str, Any] = {name: value for name in _SHAPE_FLAGS if (value := getattr(args, name)) is not None}
    if given and args.only is not None:
        raise ValueError("--only picks shapes of the table, and does not go with the flags of one shape")
    if "scale_per" in given and "kv_dtype" not in given:
        raise ValueError("--scale-per belongs to --kv-dtype")
    if not given and not running.is_gpu:
        raise ValueError(
            f"the table of bench attention needs a GPU, this is {running.kind}; try one small shape: "
            "--num-heads 4 --num-kv-heads 2 --context 256"
        )
    from fdpp_jax import bench_attention

    if given:
        if "scale_per" in given:
            given["scales"] = given.pop("scale_per")
        case = bench_attention.attention_case(**_DEFAULTS | given)
        return functools.partial(bench_attention.bench_attention, case, quick=args.quick)
    cases = [case for case in bench_attention.TABLE if args.only is None or args.only in case.label]
    if not cases:
        labels = "; ".join(case.label for case in bench_attention.TABLE)
        raise ValueError(f"--only {args.only!r} is in no label of the table: {labels}")
    return functools.partial(bench_attention.bench_attention_table, cases, quick=args.quick, record_path=args.json)
