"""Whether the packages of an optional backend are here, by their metadata: to import them would take seconds."""

import functools
import importlib.metadata
import re

_NOT_OF_3_6 = ("sm_10", "gfx")  # its compiler fails in prefill there, and with int8 caches here
_EXTRA = "pip install 'fdpp-jax[triton]'"


@functools.cache
def refuse_triton(arch: str | None = None) -> str | None:
    """Why no Triton kernel can be called with the packages that are here, or None if they can.

    Args:
      arch: What the kernels are compiled for: "sm_80", "gfx90a", ... None: anything.
    """
    found = {name: version(name) for name in ("jax-triton", "triton")}
    bridge, compiler = found.values()
    # With Triton 3.6 jax-triton 0.4 takes Triton's compiler for NVIDIA GPUs to be missing.
    if bridge >= (0, 3, 1) and compiler >= ((3, 7) if bridge >= (0, 4) else (3, 6)):
        if compiler >= (3, 7) or arch is None or not arch.startswith(_NOT_OF_3_6):
            return None
        return f"Triton 3.6 cannot compile all kernels for {arch}: {_EXTRA}"
    here = " and ".join(f"{name} {'.'.join(map(str, v))}" if v else f"no {name}" for name, v in found.items())
    return f"Triton kernels need jax-triton 0.4 with triton 3.7, or 0.3.1 with triton 3.6, got {here}: {_EXTRA}"


def version(name: str) -> tuple[int, ...]:
    """(0, 4, 1) of a package that is installed, else ()."""
    try:
        text = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, re.findall(r"\d+", text)[:3]))
