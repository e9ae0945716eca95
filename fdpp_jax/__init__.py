"""FlashDecoding++ for JAX: decode attention without softmax synchronisation, and matmuls for few rows."""

import importlib
from typing import TYPE_CHECKING, Any

from fdpp_jax._version import __version__

if TYPE_CHECKING:
    from fdpp_jax import calibration, heuristics, models
    from fdpp_jax.calibration import Calibration, calibrate
    from fdpp_jax.generation import generate, stream
    from fdpp_jax.ops import dot_product_attention, flat_matmul, merge_attention_states
    from fdpp_jax.plans.device import target
    from fdpp_jax.unified_max import UnifiedMax

__all__ = [
    "Calibration",
    "UnifiedMax",
    "__version__",
    "calibrate",
    "calibration",
    "dot_product_attention",
    "flat_matmul",
    "generate",
    "heuristics",
    "merge_attention_states",
    "models",
    "stream",
    "target",
]

# Imported at first use, since Flax alone takes as long to import as JAX.
_HOME = {
    "Calibration": "calibration",
    "UnifiedMax": "unified_max",
    "calibrate": "calibration",
    "dot_product_attention": "ops",
    "flat_matmul": "ops",
    "generate": "generation",
    "merge_attention_states": "ops",
    "stream": "generation",
    "target": "plans.device",
}
_ROOMS = ("calibration", "heuristics", "models")


if not TYPE_CHECKING:  # to a type checker a name that is not imported above is an error

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(f"fdpp_jax.{_HOME[name]}"), name)
        if name in _ROOMS:
            return importlib.import_module(f"fdpp_jax.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
