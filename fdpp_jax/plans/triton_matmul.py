"""Matmuls of few rows in Triton (`triton.flat_matmul`, `triton.gemv`): configs, refusals, the rule, candidates.

Without a measurement of the weight, one row is gemv's (the paper's ImplA), and up to 64 are the flat kernel's (ImplB).

Source: FlashDecoding++ (arXiv 2311.01282), section 5.
"""

import dataclasses
import itertools
from typing import ClassVar

from fdpp_jax.plans import triton
from fdpp_jax.plans.backend import MatmulOp, MatmulPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.hopper import bound
from fdpp_jax.plans.shapes import MatmulShape, WeightOrder, cdiv

# Limits of the kernels.
MAX_ROWS = 64  # the paper's M2: beyond, the vendor's library wastes no rows any more
MAX_K_SPLITS = 8  # programs that share a column block
MAX_STAGES = 8
BLOCKS_N = (4, 8, 16, 32, 64, 128, 256)
BLOCKS_K = (32, 64, 128, 256, 512, 1024)
WARPS = (1, 2, 4, 8)
_MIN_PRODUCT_DEPTH = 16  # of a matrix unit
_MIN_FLAT_BLOCK_N = 16
_MAX_ELEMENTS_PER_THREAD = 64  # of a tile, in registers
_ALIGNMENT = 8  # 16-bit elements: the 16 bytes that a thread loads at once
_OWN_BUFFERS = ("sm_90", "sm_100", "sm_103")  # their matrix units read shared memory while the next tile is on its way

_BARRIER_BYTES = 256

# The rule.
_SHARES_PER_SM = 1.4  # programs, before K is split less
_MIN_TILES_PER_SPLIT = 4
# block_n, block_k and k_groups of the flat kernel, narrow and wide. Blocks are read along memory; where rows are many,
# wide ones read x less often. Measured with sm_80's code on an H200: docs/experiments/triton.md.
_FLAT_TILES = {"nk": ((16, 256, 4), (64, 128, 1)), "kn": ((64, 64, 1), (64, 128, 1))}
_FLAT_TILES_OF_MANY_ROWS = ((64, 128, 1), (128, 64, 1))
_FEW_ROWS = 16
_GEMV_TILES = {"nk": ((4, 1024), (4, 1024)), "kn": ((64, 64), (128, 32))}
_NUM_WARPS = 4
_FLAT_STAGES, _AMD_STAGES = 4, 2

# The candidates.
_FLAT_CANDIDATES = ((16, 256, 4), (32, 128, 2), (64, 128, 1), (64, 64, 1), (128, 64, 1))
_GEMV_CANDIDATES = ((4, 1024), (8, 512))
_MAX_SHARES_PER_SM = 4  # beyond, programs run in waves, and a split is only one more partial sum to add


@dataclasses.dataclass(frozen=True)
class FlatMatmulConfig:
    """Tiles of `triton.flat_matmul`.

    Attributes:
      arch: What the kernel is compiled for.
      block_n: Columns of a tile.
      block_k: Contraction depth of a tile.
      k_groups: Groups of warps that share the depth of a tile.
      split_k: Programs that share a column block.
      num_warps: Warps per program.
      num_stages: Tiles in flight, and the one that is multiplied.
    """

    arch: str
    block_n: int
    block_k: int
    k_groups: int
    split_k: int
    num_warps: int
    num_stages: int

    min_stages: ClassVar[int] = 2  # a single one is no smaller

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory per program: tiles of w and x in flight; afterwards the sums of the groups."""
        rows = padded_rows(shape.m, shape.w_order, self.arch)
        in_flight = self.num_stages if self.arch in _OWN_BUFFERS else max(self.num_stages - 1, 1)
        tiles = in_flight * (self.block_n + rows) * self.block_k * 2 + _BARRIER_BYTES
        return max(tiles, 4 * max(self.k_groups, 2) * self.block_n * rows)

    def refuse_tile(self) -> str | None:
        """Why the warps cannot share a tile, or None if they can."""
        if self.block_n < _MIN_FLAT_BLOCK_N:
            return f"block_n must be at least {_MIN_FLAT_BLOCK_N}, got {self.block_n}"
        if self.num_warps % self.k_groups or self.block_k // self.k_groups < _MIN_PRODUCT_DEPTH:
            most = min(self.num_warps, self.block_k // _MIN_PRODUCT_DEPTH)
            return f"k_groups must divide {self.num_warps} warps, and be at most {most}, got {self.k_groups}"
        return None

    @property
    def text(self) -> str:
        """ "16 x 256 by 4 groups, split 1, 4 warps, 4 stages, sm_80"."""
        tile = f"{self.block_n} x {self.block_k} by {self.k_groups} group" + "s" * (self.k_groups > 1)
        return f"{tile}, {_shares(self)}, {self.num_stages} stages, {self.arch}"


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """Tiles of `triton.gemv`.

    Attributes:
      arch: What the kernel is compiled for.
      block_n: Columns of a tile.
      block_k: Contraction depth of a tile.
      split_k: Programs that share a column block.
      num_warps: Warps per program.
      num_stages: Tiles in flight, and the one that is multiplied; 1: tiles go to registers, not to shared memory.
    """

    arch: str
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    min_stages: ClassVar[int] = 1

    def smem_bytes(self, shape: MatmulShape) -> int:
        """Shared memory per program: tiles of w and x in flight; afterwards sums, up to one of each thread."""
        del shape  # the same for every shape
        per_warp = max(128 if self.arch.startswith("gfx") else 64, self.block_n)
        return max((self.num_stages - 1) * (self.block_n + 1) * self.block_k * 2, 4 * self.num_warps * per_warp)

    def refuse_tile(self) -> str | None:
        """Why the warps cannot share a tile, or None if they can."""
        most = _MAX_ELEMENTS_PER_THREAD * self.num_warps * (64 if self.arch.startswith("gfx") else 32)
        if self.block_n * self.block_k <= most:
            return None
        return f"{self.num_warps} warps hold at most {most} elements, got {self.block_n} x {self.block_k}"

    @property
    def text(self) -> str:
        """ "16 x 256, split 1, 4 warps, 1 stage, sm_80"."""
        stages = f"{self.num_stages} stage" + "s" * (self.num_stages > 1)
        return f"{self.block_n} x {self.block_k}, {_shares(self)}, {stages}, {self.arch}"


type MatmulConfig = FlatMatmulConfig | GemvConfig


def _shares(config: MatmulConfig) -> str:
    return f"split {config.split_k}, {config.num_warps} warp" + "s" * (config.num_warps > 1)


def padded_rows(num_rows: int, w_order: WeightOrder, arch: str) -> int:
    """Rows of x as the flat kernel multiplies them: a power of two.

    The least that a matrix unit takes, as the small operand of weights [N, K]: 8 of NVIDIA's, 16 of AMD's.
    """
    least = 8 if w_order == "nk" and arch.startswith("sm_") else 16
    return max(least, 1 << (num_rows - 1).bit_length())


def refuse(shape: MatmulShape, device: Device, algorithm: str | None) -> str | None:
    """Why "gemv" or "flat" cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    if (refusal := triton.refuse_device(device)) is not None:
        return refusal
    if algorithm is None and shape.m > MAX_ROWS:
        library = "cuBLAS" if device.is_nvidia else "hipBLASLt"
        return f"rule: M = {shape.m} > {MAX_ROWS} fills {library}'s tiles ({bound(_intensity(shape), device)})"
    if algorithm == "gemv" and shape.m != 1:
        return f"gemv takes one row, got M = {shape.m}"
    if not 1 <= shape.m <= MAX_ROWS:
        return f"{algorithm or 'flat'} takes 1 to {MAX_ROWS} rows, got M = {shape.m}"
    if shape.dtype not in triton.DTYPES:
        return f"the kernel takes {' or '.join(triton.DTYPES)}, got {shape.dtype}"
    if shape.k % _ALIGNMENT or shape.n % _ALIGNMENT or not shape.k or not shape.n:
        return f"the kernel takes K and N that are multiples of {_ALIGNMENT}, got K = {shape.k}, N = {shape.n}"
    return None


def refuse_config(shape: MatmulShape, device: Device, algorithm: str, config: MatmulConfig) -> str | None:
    """Why "gemv" or "flat" cannot compute `shape` with its config on `device`, or None if it can."""
    if (refusal := refuse(shape, device, algorithm)) is not None:
        return refusal
    if (refusal := triton.refuse_arch(config.arch, device)) is not None:
        return refusal
    for name, choices in (("block_n", BLOCKS_N), ("block_k", BLOCKS_K), ("num_warps", WARPS)):
        if getattr(config, name) not in choices:
            return f"{name} must be one of {choices}, got {getattr(config, name)}"
    if not config.min_stages <= config.num_stages <= MAX_STAGES:
        return f"num_stages must lie in {config.min_stages}..{MAX_STAGES}, got {config.num_stages}"
    max_splits = _max_splits(shape, config.block_k)
    if not 1 <= config.split_k <= max_splits:
        return f"split_k must lie in 1..{max_splits} (K = {shape.k}), got {config.split_k}"
    if (refusal := config.refuse_tile()) is not None:
        return refusal
    if (smem_bytes := config.smem_bytes(shape)) > device.smem_bytes:
        return f"the tiles need {smem_bytes} bytes of shared memory, a program gets {device.smem_bytes}"
    return None


def _max_splits(shape: MatmulShape, block_k: int) -> int:
    """Programs that can share a column block: a tile of K for each."""
    return min(MAX_K_SPLITS, cdiv(shape.k, block_k))


def _rule_algorithm(shape: MatmulShape, device: Device) -> str:
    del device  # the same on all
    return "flat" if shape.m > 1 else "gemv"


def rule_config(shape: MatmulShape, device: Device, algorithm: str) -> MatmulConfig:
    """Tiles and splits of "gemv" or "flat" where nothing was measured."""
    return _gemv_config(shape, device) if algorithm == "gemv" else _flat_config(shape, device)


def _flat_config(shape: MatmulShape, device: Device) -> FlatMatmulConfig:
    """Wide tiles if that gives the SMs enough column blocks, else narrow ones; if not even these do, K is split."""
    narrow, wide = _FLAT_TILES[shape.w_order] if shape.m <= _FEW_ROWS else _FLAT_TILES_OF_MANY_ROWS
    block_n, block_k, k_groups = wide if _fills(shape, device, wide[0]) else narrow
    while block_k > BLOCKS_K[0] and block_k >= 2 * shape.k:
        block_k //= 2
    k_groups = min(k_groups, block_k // _MIN_PRODUCT_DEPTH)
    stages = _FLAT_STAGES if device.is_nvidia else _AMD_STAGES
    splits = _splits(shape, device, block_n, block_k)
    return fit(shape, device, FlatMatmulConfig(_arch(device), block_n, block_k, k_groups, splits, _NUM_WARPS, stages))


def _gemv_config(shape: MatmulShape, device: Device) -> GemvConfig:
    """As for the flat kernel; tiles go to registers."""
    narrow, wide = _GEMV_TILES[shape.w_order]
    block_n, block_k = wide if _fills(shape, device, wide[0]) else narrow
    while block_k > BLOCKS_K[0] and block_k >= 2 * shape.k:
        block_k //= 2
    return GemvConfig(_arch(device), block_n, block_k, _splits(shape, device, block_n, block_k), _NUM_WARPS, 1)


def _arch(device: Device) -> str:
    """What kernels are compiled for: on Hopper and the large Blackwells the older instructions suit few rows better."""
    return "sm_80" if device.arch in _OWN_BUFFERS else device.arch


def _fills(shape: MatmulShape, device: Device, block_n: int, split_k: int = 1) -> bool:
    return cdiv(shape.n, block_n) * split_k >= _SHARES_PER_SM * device.num_sms


def _splits(shape: MatmulShape, device: Device, block_n: int, block_k: int) -> int:
    """Smallest power of two that gives the SMs enough programs, each with a few tiles."""
    splits = 1
    max_splits = min(MAX_K_SPLITS, cdiv(shape.k, block_k) // _MIN_TILES_PER_SPLIT)
    while not _fills(shape, device, block_n, splits) and 2 * splits <= max_splits:
        splits *= 2
    return splits


def candidates(shape: MatmulShape, device: Device, algorithm: str) -> list[MatmulConfig]:
    """The configs of "gemv" or "flat" worth a measurement, all legal; the rule's own is the first.

    Grids have a program for every second SM at least, where a split of K allows it.
    """
    found = [rule_config(shape, device, algorithm)]
    arch, stages = _arch(device), _FLAT_STAGES if device.is_nvidia else _AMD_STAGES
    for split_k in (1, 2, 4, 8):
        if algorithm == "gemv":
            for (block_n, block_k), num_stages in itertools.product(_GEMV_CANDIDATES, (1, 3)):
                found.append(GemvConfig(arch, block_n, block_k, split_k, _NUM_WARPS, num_stages))
        else:
            for block_n, block_k, k_groups in _FLAT_CANDIDATES:
                found.append(FlatMatmulConfig(arch, block_n, block_k, k_groups, split_k, _NUM_WARPS, stages))

    def is_worth_it(config: MatmulConfig) -> bool:
        num_programs = cdiv(shape.n, config.block_n) * config.split_k
        enough = 2 * num_programs >= device.num_sms or config.split_k == MAX_K_SPLITS
        return enough and (config.split_k == 1 or num_programs <= _MAX_SHARES_PER_SM * device.num_sms)

    fitted = dict.fromkeys([found[0], *(fit(shape, device, config) for config in found[1:] if is_worth_it(config))])
    return [config for config in fitted if refuse_config(shape, device, algorithm, config) is None]


def fit[C: MatmulConfig](shape: MatmulShape, device: Device, config: C) -> C:
    """The config with no more stages than fit an SM that holds one program, or two where the grid has so many."""
    num_programs = cdiv(shape.n, config.block_n) * config.split_k
    smem_bytes = device.smem_bytes_shared(min(2, cdiv(num_programs, device.num_sms)))
    while config.num_stages > config.min_stages and config.smem_bytes(shape) > smem_bytes:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def _intensity(shape: MatmulShape) -> float:
    """flop per byte of x [m, k] @ w [k, n], all three in 16 bits."""
    elements = shape.m * shape.k + shape.k * shape.n + shape.m * shape.n
    return shape.m * shape.k * shape.n / max(elements, 1)


def _plan(shape: MatmulShape, device: Device, why: str) -> MatmulPlan:
    del why  # its own reason says enough
    algorithm = _rule_algorithm(shape, device)
    config = rule_config(shape, device, algorithm)
    num_blocks = cdiv(shape.n, config.block_n)
    shares = f"{num_blocks} column block" + "s" * (num_blocks > 1) + f", split {config.split_k}"
    reason = f"rule: M = {shape.m}, {shares} ({bound(_intensity(shape), device)})"
    return MatmulPlan(triton.NAME, algorithm, config, reason)


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
