"""The fused layer on Hopper (`pallas.fused_layer`): its config, what it refuses, and the rule that plans it.

Every constant of the rule was measured: docs/experiments/fused_layer.md.
"""

import dataclasses

from fdpp_jax.plans import hopper
from fdpp_jax.plans.backend import LayerPlan, Op
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import SMEM_RESERVE, with_stages_that_fit
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, round_up

# Limits of the kernel.
UNIT_WIDTH = 32  # columns of a result that one CTA finishes, half the rows of wgmma's large operand
MAX_COUNTERS = 128  # pieces of a result that CTAs can wait for one by one: a thread of a warpgroup each
_SWIZZLE_COLUMNS = 64  # of which TMA wants whole ones, but for a last axis that has less

# The rule: docs/experiments/fused_layer.md#rows and #tiles-and-rings
MAX_ROWS = 32  # beyond, a launch per product is as fast
_BLOCK_K = 256
_MAX_STAGES = 5
_X_TILES = 6  # of the ring of x
_X_BYTES = 64 * 1024
_ONLINE_UP_TO = 2048  # slots: docs/experiments/decode_step.md#which-softmax


def rows_behind_norm(spec: LayerSpec, batch: int) -> int:
    """Rows of a product's x behind a norm, by the kind of the norm (`pallas.fused_layer.norms`)."""
    if spec.norms_products:
        return 2 * batch
    return batch + 2 if spec.norm.kind == "layer" else batch


def inner_width(spec: LayerSpec) -> int:
    """Columns of the MLP that a unit makes: without a gate its partner columns are some, too."""
    return UNIT_WIDTH if spec.is_gated else 2 * UNIT_WIDTH


def padded_rows(spec: LayerSpec, batch: int) -> int:
    """Rows of the product that has most, padded to a multiple of 8: one behind a norm."""
    return round_up(rows_behind_norm(spec, batch), 8)


@dataclasses.dataclass(frozen=True)
class FusedLayerConfig:
    """Tiles of `pallas.fused_layer`.

    Attributes:
      num_ctas: CTAs, one per SM.
      block_k: Columns of a tile of weights, which has 64 rows.
      num_stages: Tiles in the ring of weights.
      num_x_tiles: Tiles of x, each of block_k columns, that are loaded together: a chunk.
      num_x_stages: Chunks in the ring of x.
    """

    num_ctas: int
    block_k: int
    num_stages: int
    num_x_tiles: int
    num_x_stages: int

    @property
    def chunk(self) -> int:
        """Columns of x that are loaded together."""
        return self.num_x_tiles * self.block_k

    def smem_bytes(self, shape: LayerShape) -> int:
        """Shared memory per CTA: both rings, and a product on its way from one warpgroup to another."""
        rows = padded_rows(shape.spec, shape.batch)
        ring = self.num_stages * 2 * UNIT_WIDTH * self.block_k * 2
        x_ring = self.num_x_stages * rows * self.chunk * 2
        return ring + x_ring + 2 * UNIT_WIDTH * rows * 4 + SMEM_RESERVE


def refuse(shape: LayerShape, device: Device, algorithm: str | None = "fused") -> str | None:
    """Why the fused layer cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    del algorithm  # there is one
    refusal = refuse_spec(shape.spec) or hopper.refuse_device(device)
    if refusal is not None:
        return refusal
    if shape.dtype != "bfloat16":
        return f"the fused layer takes bfloat16, got {shape.dtype}"
    if not 1 <= shape.batch <= MAX_ROWS:
        return f"1 to {MAX_ROWS} rows are faster fused, more in a launch for each product, got B = {shape.batch}"
    if (refusal := _refuse_head(shape.spec, shape.head_dim)) is not None:
        return refusal
    sizes = shape.hidden_size, shape.intermediate_size, shape.num_query_heads * shape.head_dim
    if any(size % _SWIZZLE_COLUMNS for size in sizes):
        got = "D = {}, F = {}, N H = {}".format(*sizes)
        return f"the fused layer wants multiples of {_SWIZZLE_COLUMNS}, got {got}"
    config, units_per_head = fused_layer_config(shape, device), shape.head_dim // (2 * UNIT_WIDTH)
    if shape.spec.norms_queries_and_keys and config.num_ctas < units_per_head:  # which wait for each other
        return f"a CTA for each of the {units_per_head} units of a head that is normalised, got {config.num_ctas} CTAs"
    depth = max(sizes)
    max_depth = MAX_COUNTERS * config.chunk
    if depth > max_depth:
        return f"the fused layer multiplies at most {max_depth} columns, got {depth}"
    return None


def _refuse_head(spec: LayerSpec, head_dim: int) -> str | None:
    """Why units cannot have all columns of a head, those that rotate and the others apart, or None if they can."""
    pair, num_rotated = 2 * UNIT_WIDTH, spec.num_rotated(head_dim)
    parts = num_rotated, head_dim - num_rotated
    got = f"H = {head_dim}" if 0 in parts else f"H = {head_dim}, of which {num_rotated} rotate"
    if any(part % 16 or 0 < part < pair for part in parts):
        return f"the fused layer takes head dims that are multiples of 16, at least {pair}, got {got}"
    if spec.norms_queries_and_keys and any(part % pair for part in parts):  # a column of two units would count twice
        return f"the fused layer normalises heads of multiples of {pair} columns, got {got}"
    return None


def refuse_spec(spec: LayerSpec) -> str | None:
    """Why the kernel does not compute such a layer whatever its sizes, or None if it does."""
    if spec.norms_products and spec.norm.kind != "rms":
        return f"the fused layer normalises products by RMSNorm only, got a {spec.norm.kind} norm"
    if spec.norms_queries_and_keys and spec.norm.kind != "rms":
        return f"the fused layer normalises queries and keys by RMSNorm only, got a {spec.norm.kind} norm"
    return None


def fused_layer_config(shape: LayerShape, device: Device) -> FusedLayerConfig:
    """Tiles by rule: as deep a ring as shared memory holds, up to what a wait for the grid lasts."""
    # Each CTA has a unit of the MLP, which tells it that the product before is done. All of them must run at once.
    num_ctas = min(device.num_sms, shape.intermediate_size // inner_width(shape.spec))
    rows = padded_rows(shape.spec, shape.batch)
    num_x_tiles = 2 if rows == 8 else 1
    num_x_stages = min(_X_TILES, _X_BYTES // (2 * rows * _BLOCK_K)) // num_x_tiles
    config = FusedLayerConfig(num_ctas, _BLOCK_K, _MAX_STAGES, num_x_tiles, num_x_stages)
    return with_stages_that_fit(config, shape, device.smem_bytes)


def _config(shape: LayerShape, device: Device, algorithm: str) -> FusedLayerConfig:
    assert algorithm == "fused"
    return fused_layer_config(shape, device)


def _plan(shape: LayerShape, device: Device, why: str) -> LayerPlan:
    del why  # it is the first choice wherever it runs
    config = fused_layer_config(shape, device)
    fuses_head = shape.vocab_size > 0 and shape.vocab_size % UNIT_WIDTH == 0
    how = f"one stream of weights through {config.num_ctas} CTAs, which wait for each other in memory"
    return LayerPlan(
        hopper.NAME,
        "fused",
        config,
        f"{how}; online softmax up to {_ONLINE_UP_TO} slots",
        fuses_head,
        overlaps_attention=True,
        online_up_to=_ONLINE_UP_TO,
    )


OP = Op(
    configs={"fused": FusedLayerConfig},
    algorithm=lambda *_: "fused",
    refuse=refuse,
    config=_config,
    plan=_plan,
)
