"""Plans, and what they are made by: a record for each backend. The table of backends is `backends`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape
from fdpp_jax.unified_max import Recompute


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which kernel computes a call, and why.

    Attributes:
      backend: Whose kernel it is, such as "mosaic_gpu" or "xla".
      algorithm: Which one of the backend's, such as "gemv" or "cudnn".
      config: Its tiles; None where it has none.
      reason: Why, in one line.
    """

    backend: str
    algorithm: str
    config: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class AttentionPlan(Plan):
    """How attention is computed.

    Attributes:
      recompute: Where a row that left the window is redone, unless `UnifiedMax.recompute` names a place.
    """

    recompute: Recompute = "cond"

    @property
    def implementation(self) -> str:
        """The backend, by which a caller asks for it."""
        return self.backend


@dataclasses.dataclass(frozen=True)
class MatmulPlan(Plan):
    """How a matmul is computed."""

    @property
    def implementation(self) -> str:
        """The paper's name of the algorithm, by which a caller asks for it: "gemv", "flat" or "xla"."""
        return "xla" if self.backend == "xla" else self.algorithm


@dataclasses.dataclass(frozen=True)
class LayerPlan(Plan):
    """Whether all between two attentions is a backend's own ("fused"), or matmuls with XLA between them ("unfused").

    Attributes:
      fuses_head: Whether the last layer's launch has the model's head, too.
      overlaps_attention: Whether attention may start before the layer's launch has ended (its `starts_early`). XLA must
        then not record the launches as CUDA graphs.
      online_up_to: Slots of the KV cache up to which decode steps are mostly faster with online softmax.
    """

    fuses_head: bool = False
    overlaps_attention: bool = False
    online_up_to: int = 0

    def prefers_online(self, capacity: int) -> bool:
        """Whether `generate` takes online softmax for decode steps over so many slots, where nothing is asked for."""
        return capacity <= self.online_up_to

    @property
    def implementation(self) -> str:
        """The algorithm."""
        return self.algorithm


@dataclasses.dataclass(frozen=True)
class Op[S, P: Plan]:
    """How a backend computes one op.

    Attributes:
      configs: The class of each algorithm's config, None where it has none.
      algorithm: algorithm(shape, device) -> the one that the rule means for the shape, which it may refuse.
      refuse: refuse(shape, device, algorithm) -> why the algorithm cannot compute the shape there, or None if it can.
        Without an algorithm it speaks of the one that the rule would choose.
      config: config(shape, device, algorithm) -> the algorithm's tiles by rule, whether or not it is the rule's choice.
      plan: plan(shape, device, why) -> the rule's plan; `why` the backends before refused.
    """

    configs: Mapping[str, type | None]
    algorithm: Callable[[S, Device], str]
    refuse: Callable[[S, Device, str | None], str | None]
    config: Callable[[S, Device, str], Any]
    plan: Callable[[S, Device, str], P]


@dataclasses.dataclass(frozen=True)
class AttentionOp(Op[AttentionShape, AttentionPlan]):
    """How a backend computes attention.

    Attributes:
      recomputes: Where it can redo a row that left the safe window.
      weights_dtype: weights_dtype(shape) -> dtype of the weights e^(s - phi) as they meet the values, which decides the
        safe window.
    """

    recomputes: tuple[Recompute, ...]
    weights_dtype: Callable[[AttentionShape], str]


@dataclasses.dataclass(frozen=True)
class MatmulOp(Op[MatmulShape, MatmulPlan]):
    """How a backend computes matmuls of few rows.

    Attributes:
      refuse_config: refuse_config(shape, device, algorithm, config) -> why the algorithm cannot compute the shape with
        a config, or None if it can: of a table's configs.
      candidates: candidates(shape, device, algorithm) -> configs worth a measurement, all of them legal, the rule's
        first.
      fit: fit(shape, device, config) -> a candidate of the same weight at fewer rows, changed to fit this many.
    """

    refuse_config: Callable[[MatmulShape, Device, str, Any], str | None]
    candidates: Callable[[MatmulShape, Device, str], list[Any]]
    fit: Callable[[MatmulShape, Device, Any], Any]


@dataclasses.dataclass(frozen=True)
class LayerOp(Op[LayerShape, LayerPlan]):
    """How a backend computes a layer by products that have the tiles of its matmuls, which tables may have measured.

    Attributes:
      products: products(shape) -> the matmuls by name.
      with_tiles: with_tiles(shape, plan, tiles) -> the plan with other configs of some products, by name, where the
        kernels can have them.
    """

    products: Callable[[LayerShape], Mapping[str, MatmulShape]]
    with_tiles: Callable[[LayerShape, LayerPlan, Mapping[str, Any]], LayerPlan]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend: a folder of kernels, and what plans know of it.

    Attributes:
      name: By which a caller asks for it.
      architectures: Of the devices that it runs on, as `Device.arch` names them; empty: all.
      run: The module that runs its plans: see below. A name, since plans lie below kernels, and a kernel is imported
        when it is first called (`ops.running`).
      attention: How it computes attention; None: not at all.
      matmul: How it computes matmuls of few rows.
      layer: How it computes what lies between two attentions.

    The module of `run` has these functions, as far as the backend computes the op (`plans.calls` has their arrays):

    - attention(arrays, options, plan, *, recompute=None, redone=None, starts_early=False) -> out [B, T, N, H], with
      `options.return_residual` the pair of out and the rows' log-sum-exp [B, T, N] float32 (NaN where out is; its sink
      or -inf where a row sees no key), with `redone` the pair of this and redone. Lengths are given. Rows outside the
      safe window are NaN, unless `recompute` is one of `AttentionOp.recomputes` other than "cond".
    - matmul(x [..., K], w, plan, *, out_dtype, w_order) -> [..., N].
    - layer_state(shape, plan) -> the state of a decode step; first_layer(x, weights, cache, state, spec, plan) ->
      (NextAttention, state); layer(attended, hidden, weights, following, cache, state, spec, plan) -> (hidden,
      NextAttention, logits or None, state): see `ops.layer.FusedLayers`.
    """

    name: str
    architectures: tuple[str, ...]
    run: str
    attention: AttentionOp | None = None
    matmul: MatmulOp | None = None
    layer: Op[LayerShape, LayerPlan] | None = None

    def is_asked(self, device: Device) -> bool:
        """Whether calls on the device may be planned for it: see `Device.only_backend`."""
        return not self.architectures or device.only_backend in (None, self.name)

    def runs_on(self, device: Device) -> bool:
        """Whether it is asked, and has kernels for the device, or needs none."""
        return self.is_asked(device) and (not self.architectures or device.arch in self.architectures)
