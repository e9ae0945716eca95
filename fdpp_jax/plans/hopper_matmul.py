"""Matmuls of few rows on Hopper (`pallas.flat_matmul`, `pallas.gemv`): configs, refusals, the rule, candidates.

Without a measurement of the weight, one row is gemv's (the paper's ImplA), and up to 64 are the flat kernel's (ImplB).

Source: FlashDecoding++ (arXiv 2311.01282), section 5.
"""

import dataclasses
import itertools

from fdpp_jax.plans import hopper
from fdpp_jax.plans.attention import DTYPES
from fdpp_jax.plans.backend import MatmulOp, MatmulPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import MAX_STAGES, MIN_STAGES, SMEM_RESERVE, with_stages_that_fit
from fdpp_jax.plans.shapes import MatmulShape, cdiv, round_up

# Limits of the kernels.
# The paper's M2: rows are the N operand of wgmma, and beyond 64 cuBLAS wastes no rows any more.
MAX_ROWS = 64
MAX_K_SPLITS = 8  # CTAs that share a column block
# wgmma's large operand has 64 rows, the swizzle 64 elements.
BLOCKS_N = (64, 128)
BLOCKS_K = (64, 128, 256)
_ALIGNMENT = 16  # 16-bit elements: TMA reads whole swizzle widths along the last axes, the narrowest has 32 bytes

# The rule: docs/experiments/matmul.md#the-rules-tiles
_MIN_FLAT_ROWS = {"H200": 1}  # the paper's M1, from which on the flat kernel beats gemv: 2 unless measured
_FLAT_BLOCK_N, _FLAT_BLOCK_K = 64, 256
_GEMV_WIDE_TILE, _GEMV_DEEP_TILE = (128, 64), (64, 128)  # block_n, block_k: 16 KiB of weights either way
_GEMV_CTAS_PER_SM = 2
_GEMV_MIN_BLOCKS_PER_SPLIT = 4  # a shorter split is over before its ring is full

# Candidates of a measurement.
_TILES = ((64, 256), (64, 128), (128, 128))  # block_n, block_k: 16 or 32 KiB of weights
_CTAS_PER_SM = (1, 2)
_GEMV_TILES = ((64, 128), (128, 64))
_GEMV_SPLITS = (1, 2, 4, 8)
_MAX_CTAS_PER_SM = 4  # beyond, CTAs run in waves, and a split is only one more partial sum to merge


@dataclasses.dataclass(frozen=True)
class FlatMatmulConfig:
    """Tiles of `pallas.flat_matmul`: CTAs, output columns and contraction depth of a tile, depth of the TMA ring.

    The CTAs share all tiles evenly, also those of one column block.
    """

    num_ctas: int
    block_n: int
    block_k: int
    num_stages: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory per CTA: the ring of w and x tiles."""
        return self.num_stages * (self.block_n + round_up(shape.m, 8)) * self.block_k * 2 + SMEM_RESERVE

    def ctas(self, shape: MatmulShape) -> int:
        """CTAs of the grid."""
        del shape  # the same for every shape
        return self.num_ctas

    def refuse_ctas(self, shape: MatmulShape) -> str | None:
        """Why so many CTAs cannot share `shape`, or None if they can."""
        num_units, max_splits = cdiv(shape.n, self.block_n), _max_splits(shape, self.block_k)
        if 1 <= self.num_ctas <= num_units * max_splits:
            return None
        return f"num_ctas must lie in 1..{num_units * max_splits} ({num_units} column blocks), got {self.num_ctas}"

    def shares(self, shape: MatmulShape) -> str:
        """ "132 CTAs share 64 column blocks"."""
        num_units = cdiv(shape.n, self.block_n)
        takers = "1 CTA takes" if self.num_ctas == 1 else f"{self.num_ctas} CTAs share"
        return f"{takers} {num_units} column block" + "s" * (num_units != 1)

    @property
    def text(self) -> str:
        """ "64 x 256, 5 stages, 132 CTAs"."""
        return f"{self.block_n} x {self.block_k}, {self.num_stages} stages, {self.num_ctas} CTAs"


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """Tiles of `pallas.gemv`: output columns and contraction depth of a tile, depth of the TMA ring, splits of K."""

    block_n: int
    block_k: int
    num_stages: int
    split_k: int

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory per CTA: the ring of w and x tiles."""
        del shape  # the same for every shape
        return self.num_stages * (self.block_n + 1) * self.block_k * 2 + SMEM_RESERVE

    def ctas(self, shape: MatmulShape) -> int:
        """CTAs of the grid."""
        return cdiv(shape.n, self.block_n) * self.split_k

    def refuse_ctas(self, shape: MatmulShape) -> str | None:
        """Why K cannot be split so, or None if it can."""
        max_splits = _max_splits(shape, self.block_k)
        if 1 <= self.split_k <= max_splits:
            return None
        return f"split_k must lie in 1..{max_splits} (K = {shape.k}), got {self.split_k}"

    def shares(self, shape: MatmulShape) -> str:
        """ "split 4"."""
        del shape  # the same for every shape
        return f"split {self.split_k}"

    @property
    def text(self) -> str:
        """ "64 x 128, 5 stages, split 2"."""
        return f"{self.block_n} x {self.block_k}, {self.num_stages} stages, split {self.split_k}"


def refuse(shape: MatmulShape, device: Device, algorithm: str | None) -> str | None:
    """Why "gemv" or "flat" cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    if algorithm is None:
        return _refuse_rule(shape, device)
    if algorithm == "gemv" and shape.m != 1:
        return f"gemv takes one row, got M = {shape.m}"
    if not 1 <= shape.m <= MAX_ROWS:
        return f"{algorithm} takes 1 to {MAX_ROWS} rows, got M = {shape.m}"
    return hopper.refuse_device(device) or _refuse_weight(shape)


def _refuse_rule(shape: MatmulShape, device: Device) -> str | None:
    if shape.m > MAX_ROWS:
        bound = hopper.bound(_intensity(shape), device)
        return f"rule: M = {shape.m} > {MAX_ROWS} fills cuBLAS's tiles ({bound})"
    return refuse(shape, device, _rule_algorithm(shape, device))


def _refuse_weight(shape: MatmulShape) -> str | None:
    """Why neither kernel takes a weight whatever the device, or None."""
    if shape.dtype not in DTYPES:
        return f"the kernel takes {' or '.join(DTYPES)}, got {shape.dtype}"
    if shape.k % _ALIGNMENT or shape.n % _ALIGNMENT or not shape.k or not shape.n:
        return f"the kernel takes K and N that are multiples of {_ALIGNMENT}, got K = {shape.k}, N = {shape.n}"
    return None


def refuse_config(
    shape: MatmulShape, device: Device, algorithm: str, config: FlatMatmulConfig | GemvConfig
) -> str | None:
    """Why "gemv" or "flat" cannot compute `shape` with its config on `device`, or None if it can."""
    refusal = refuse(shape, device, algorithm)
    if refusal is not None:
        return refusal
    for name, blocks in (("block_n", BLOCKS_N), ("block_k", BLOCKS_K)):
        if getattr(config, name) not in blocks:
            return f"{name} must be one of {blocks}, got {getattr(config, name)}"
    if not MIN_STAGES <= config.num_stages <= MAX_STAGES:
        return f"num_stages must lie in {MIN_STAGES}..{MAX_STAGES}, got {config.num_stages}"
    if (refusal := config.refuse_ctas(shape)) is not None:
        return refusal
    if (smem_bytes := config.smem_bytes(shape)) > device.smem_bytes:
        return f"the tiles need {smem_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"
    return None


def _max_splits(shape: MatmulShape, block_k: int) -> int:
    """CTAs that can share a column block: a tile of K for each."""
    return min(MAX_K_SPLITS, cdiv(shape.k, block_k))


def _min_flat_rows(device: Device) -> int:
    return _MIN_FLAT_ROWS.get(device.kind, 2)


def _rule_algorithm(shape: MatmulShape, device: Device) -> str:
    return "flat" if shape.m >= _min_flat_rows(device) else "gemv"


def rule_config(shape: MatmulShape, device: Device, algorithm: str) -> FlatMatmulConfig | GemvConfig:
    """Tiles and splits of "gemv" or "flat" where nothing was measured."""
    return _gemv_config(shape, device) if algorithm == "gemv" else _flat_config(shape, device)


def _flat_config(shape: MatmulShape, device: Device) -> FlatMatmulConfig:
    """A CTA per SM, with as deep a ring as it has room for; fewer where a share would be too short."""
    block_n, block_k = _FLAT_BLOCK_N, _FLAT_BLOCK_K
    while block_k > BLOCKS_K[0] and block_k >= 2 * shape.k:
        block_k //= 2
    num_ctas = min(device.num_sms, cdiv(shape.n, block_n) * _max_splits(shape, block_k))
    config = FlatMatmulConfig(num_ctas, block_n, block_k, MAX_STAGES)
    return with_stages_that_fit(config, shape, device.smem_bytes)


def _gemv_config(shape: MatmulShape, device: Device) -> GemvConfig:
    """Two CTAs per SM; wide tiles where narrow ones would need more."""
    narrow_fits = cdiv(shape.n, _GEMV_DEEP_TILE[0]) <= _GEMV_CTAS_PER_SM * device.num_sms
    block_n, block_k = _GEMV_DEEP_TILE if narrow_fits else _GEMV_WIDE_TILE
    num_units = cdiv(shape.n, block_n)
    max_splits = min(MAX_K_SPLITS, cdiv(shape.k, block_k) // _GEMV_MIN_BLOCKS_PER_SPLIT)
    smallest = GemvConfig(block_n, block_k, MIN_STAGES, 1).smem_bytes(shape)
    ctas_per_sm = _GEMV_CTAS_PER_SM if smallest <= device.smem_bytes_shared(_GEMV_CTAS_PER_SM) else 1
    split_k = _gemv_splits(num_units, max_splits, ctas_per_sm * device.num_sms)
    shares_sm = num_units * split_k > device.num_sms
    smem_bytes = device.smem_bytes_shared(ctas_per_sm if shares_sm else 1)
    return with_stages_that_fit(GemvConfig(block_n, block_k, MAX_STAGES, split_k), shape, smem_bytes)


def _gemv_splits(num_units: int, max_splits: int, max_ctas: int) -> int:
    """Smallest power of two that fills three quarters of the CTAs that run together, without a second wave of them.

    Three quarters, since doubling beyond costs a longer reduction and buys no bandwidth: an SM fewer in four
    still leaves enough loads in flight to fill memory.
    """
    splits = 1
    while 4 * num_units * splits < 3 * max_ctas and 2 * splits <= max_splits and 2 * num_units * splits <= max_ctas:
        splits *= 2
    return splits


def candidates(shape: MatmulShape, device: Device, algorithm: str) -> list[FlatMatmulConfig | GemvConfig]:
    """The configs of "gemv" or "flat" worth a measurement, all legal, each with as many stages as fit its SM's CTAs.

    The rule's own config is the first. A grid of gemv has a CTA for every second SM at least, and four per SM at most,
    where a split of K allows. The flat kernel's grid has one or two CTAs per SM.
    """
    found = [rule_config(shape, device, algorithm)]
    if algorithm == "gemv":
        for (block_n, block_k), split_k in itertools.product(_GEMV_TILES, _GEMV_SPLITS):
            gemv = GemvConfig(block_n, block_k, MAX_STAGES, split_k)
            enough = 2 * gemv.ctas(shape) >= device.num_sms or split_k == _GEMV_SPLITS[-1]
            if enough and (split_k == 1 or gemv.ctas(shape) <= _MAX_CTAS_PER_SM * device.num_sms):
                found.append(fit(shape, device, gemv))
    else:
        for (block_n, block_k), ctas_per_sm in itertools.product(_TILES, _CTAS_PER_SM):
            flat = FlatMatmulConfig(ctas_per_sm * device.num_sms, block_n, block_k, MAX_STAGES)
            found.append(fit(shape, device, flat))
    return [config for config in dict.fromkeys(found) if refuse_config(shape, device, algorithm, config) is None]


def fit[C: (FlatMatmulConfig, GemvConfig)](shape: MatmulShape, device: Device, config: C) -> C:
    """The config with no more stages than fit an SM that holds one CTA, or two where the grid has so many."""
    smem_bytes = device.smem_bytes_shared(min(2, cdiv(config.ctas(shape), device.num_sms)))
    return with_stages_that_fit(config, shape, smem_bytes)


def _intensity(shape: MatmulShape) -> float:
    """flop per byte of x [m, k] @ w [k, n], all three in 16 bits."""
    elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    return shape.m * shape.k * shape.n / max(elements, 1)


def _plan(shape: MatmulShape, device: Device, why: str) -> MatmulPlan:
    del why  # it is the first choice wherever it runs
    algorithm = _rule_algorithm(shape, device)
    config = rule_config(shape, device, algorithm)
    measured = ", measured faster than gemv" if _min_flat_rows(device) == shape.m == 1 else ""
    bound = hopper.bound(_intensity(shape), device)
    reason = f"rule: M = {shape.m}{measured}, {config.shares(shape)} ({bound})"
    return MatmulPlan(hopper.NAME, algorithm, config, reason)


OP = MatmulOp(
    configs={"gemv": GemvConfig, "flat": FlatMatmulConfig},
    algorithm=_rule_algorithm,
    refuse=refuse,
    config=rule_config,
    plan=_plan,
    refuse_config=refuse_config,
    candidates=candidates,
    fit=fit,
)
