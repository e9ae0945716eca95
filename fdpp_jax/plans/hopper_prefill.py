"""Prefill attention on Hopper (`pallas.prefill_attention`): its config, what it refuses, and the rule that plans it.

Measured: docs/experiments/prefill.md.
"""

import dataclasses

from fdpp_jax.plans import hopper
from fdpp_jax.plans.backend import AttentionPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import AttentionShape, cdiv, round_up
from fdpp_jax.plans.xla import leave_to_cudnn

ROWS = 64  # queries per warpgroup: the rows of a wgmma
CONSUMERS = 2  # warpgroups that compute
MAX_TILES = 256  # per CTA
_L2_SHARE = 0.5  # for keys and values of the heads whose CTAs run together
_WAVES = 3  # of their CTAs
_MAX_KEYS_IN_TURN = 8192  # from where on a CTA takes many tiles in turn no faster
_TILES_PER_SM = 2  # more of them: CTAs take them in turn, and load the next while they compute the last


@dataclasses.dataclass(frozen=True)
class PrefillAttentionConfig:
    """Blocks of `pallas.prefill_attention`.

    Attributes:
      block_kv: Keys per block, a multiple of 64.
      num_stages: Stages of the ring of key and value blocks.
      packs_group: Whether the query heads of a key/value head are rows of one CTA, query by query.
      heads_together: Heads (of any sequence) whose tiles start in turns, those with most keys first.
      num_ctas: CTAs that take all tiles in turn, a tile being `block_q` rows of a head. None: a CTA for each tile.
    """

    block_kv: int
    num_stages: int
    packs_group: bool = False
    heads_together: int = 1
    num_ctas: int | None = None

    @property
    def block_q(self) -> int:
        """Rows per tile: queries of one head, or of a group of them."""
        return ROWS * CONSUMERS

    def query_places(self, head_dim: int, kv_itemsize: int) -> int:
        """Places for queries: with two, those of a CTA's next tile come before the results of the last have left."""
        return 2 if self.num_ctas is not None and head_dim <= 128 and kv_itemsize > 1 else 1

    def smem_bytes(self, shape: AttentionShape) -> int:
        """Shared memory per CTA.

        The ring, that of 8-bit blocks, scales per token, the queries, a number per row, and what is known of tiles.
        """
        head_dim = round_up(shape.head_dim, 64)
        ring = self.num_stages * 2 * self.block_kv * head_dim * 2
        if shape.kv_itemsize == 1:
            ring += num_narrow_stages(head_dim) * self.block_kv * head_dim
        if shape.scales == "token":  # those of 4 heads are loaded together
            ring += (self.num_stages * 2 + num_narrow_stages(head_dim) * 4) * self.block_kv * 4
        queries = self.query_places(head_dim, shape.kv_itemsize) * self.block_q * head_dim * 2
        lists = 0 if self.num_ctas is None else (1 + MAX_TILES + CONSUMERS * MAX_TILES) * 4
        return ring + queries + self.block_q * 4 + lists + hopper.SMEM_RESERVE


def num_ctas(config: PrefillAttentionConfig, num_tiles: int) -> int:
    """CTAs of a launch: one per tile, or as config says, and so many that none has more than `MAX_TILES`."""
    if config.num_ctas is None:
        return num_tiles
    return min(num_tiles, max(config.num_ctas, cdiv(num_tiles, MAX_TILES)))


def num_narrow_stages(head_dim: int) -> int:
    """Stages of the ring of 8-bit blocks, which keys and values take in turn; wide heads have room for one."""
    return 1 if head_dim > 128 else 2


def prefill_attention_config(shape: AttentionShape, device: Device) -> PrefillAttentionConfig:
    """Blocks by rule: as wide as the registers hold, and as many as the shared memory does.

    Heads are packed where a CTA for each would fill no more than half of its rows, and the device has no SM for each.
    """
    packs = shape.group_size > 1 and 2 * shape.query_length <= ROWS * CONSUMERS
    packs = packs and _num_tiles(shape, packs_group=False) > device.num_sms
    block_kv, num_stages = (64, 2) if shape.head_dim > 128 else (128, 4 if shape.head_dim <= 64 else 2)
    takes_turns = _takes_turns(shape) and _num_tiles(shape, packs) > _TILES_PER_SM * device.num_sms
    return PrefillAttentionConfig(
        block_kv,
        num_stages,
        packs,
        heads_together=heads_together(shape, device, ROWS * CONSUMERS, packs),
        num_ctas=device.num_sms if takes_turns else None,
    )


def _takes_turns(shape: AttentionShape) -> bool:
    """Whether tiles are so short that what a CTA takes to start and end shows.

    Not with one place for queries, which the next tile's wait for.
    """
    left, right = shape.local_window_size or (shape.capacity, 0)
    num_keys = min(shape.capacity, left + right + 1)
    return num_keys <= _MAX_KEYS_IN_TURN and shape.head_dim <= 128 and shape.kv_itemsize > 1


def _num_tiles(shape: AttentionShape, packs_group: bool) -> int:
    num_heads, num_rows = shape.num_query_heads, shape.query_length
    if packs_group:
        num_heads, num_rows = shape.num_kv_heads, shape.live_rows
    return shape.batch * num_heads * cdiv(num_rows, ROWS * CONSUMERS)


def heads_together(shape: AttentionShape, device: Device, block_q: int, packs_group: bool) -> int:
    """As many heads as have keys and values in a share of the L2, and CTAs of block_q rows for some waves.

    One alone where its CTAs take half of the SMs: the last of them is short, whatever the others do.
    """
    group, num_rows = (1, shape.live_rows) if packs_group else (shape.group_size, shape.query_length)
    num_blocks = cdiv(num_rows, block_q)
    if 2 * num_blocks > device.num_sms:
        return 1
    kv_bytes = 2 * shape.capacity * shape.head_dim * shape.kv_itemsize  # per key/value head
    in_l2 = int(_L2_SHARE * device.l2_bytes) // max(kv_bytes, 1)
    in_waves = cdiv(_WAVES * device.num_sms, group * max(num_blocks, 1))
    return group * max(1, min(in_l2, in_waves))


def refuse(shape: AttentionShape, device: Device, algorithm: str | None = "prefill") -> str | None:
    """Why the kernel cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    refusal = hopper.refuse_device(device) or _refuse_shape(shape)
    if refusal is None and (num_bytes := prefill_attention_config(shape, device).smem_bytes(shape)) > device.smem_bytes:
        return f"the prefill kernel needs {num_bytes} bytes of shared memory, a CTA gets {device.smem_bytes}"
    return refusal or leave_to_cudnn(shape, device, algorithm)


def _refuse_shape(shape: AttentionShape) -> str | None:
    if shape.query_length < 1:
        return f"the prefill kernel takes 1 query and more, got T = {shape.query_length}"
    return hopper.refuse_attention(shape, "prefill")


def plan(shape: AttentionShape, device: Device) -> AttentionPlan:
    """The rule's plan of a shape that is not refused."""
    config = prefill_attention_config(shape, device)
    num_tiles = _num_tiles(shape, config.packs_group)
    rows = "queries of a group of heads" if config.packs_group else "queries of a head"
    if config.num_ctas is None:
        reason = f"{config.block_q} {rows} per CTA: {num_tiles} on {device.num_sms} SMs"
    else:
        reason = f"{config.block_q} {rows} at a time: {num_tiles} for {config.num_ctas} CTAs on as many SMs"
    return AttentionPlan(hopper.NAME, "prefill", config, reason, recompute="kernel")
