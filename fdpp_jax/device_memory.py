"""What a user is told when a device's memory is used up."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping

import jax

_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED:\s*(.+)|(Out of memory allocating .+)")  # the latter is a CPU's


@contextlib.contextmanager
def explained(held: Callable[[], Mapping[str, int]], advice: str) -> Iterator[None]:
    """Raises what JAX says of memory that is used up as a MemoryError that says what takes it, and what to lower.

    Args:
      held: What the device holds or is to hold: a name and its bytes each. Asked for after a failure only.
      advice: What to lower.

    Raises:
      MemoryError: The device has too little memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        parts = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in held().items())
        raise MemoryError(f"{request(error)}. Of the device's {_capacity()}: {parts}. {advice}") from error


def is_exhausted(error: BaseException) -> bool:
    """Whether JAX has failed for want of a device's memory, which no class of error says."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _EXHAUSTED.search(str(error)) is not None


def request(error: BaseException) -> str:
    """The line of XLA's that says how much was asked for, of an error that `is_exhausted`."""
    match = _EXHAUSTED.search(str(error))
    assert match is not None
    return (match[1] or match[2]).rstrip(".")


def check_fits(what: str, num_bytes: int) -> None:
    """Refuses arrays before they are made: of sizes that no device has, XLA may crash instead of saying so.

    Raises:
      MemoryError: The first device has less memory.
    """
    capacity = _capacity_bytes()
    if capacity is not None and num_bytes > capacity:
        raise MemoryError(f"expected {what} that fit the device's {_capacity()}, got {size(num_bytes)}")


def size(num_bytes: float) -> str:
    """ "3.1 GB", "12 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _capacity() -> str:
    """ "memory (24 GB)", or "memory" where nobody says how much the first device has."""
    num_bytes = _capacity_bytes()
    return "memory" if num_bytes is None else f"memory ({size(num_bytes)})"


def _capacity_bytes() -> int | None:
    """Memory of the first device, as far as JAX may use it; a CPU's is the machine's. None where nobody says."""
    first = jax.local_devices()[0]
    if first.platform == "cpu" and hasattr(os, "sysconf"):  # which Windows lacks
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (first.memory_stats() or {}).get("bytes_limit")
