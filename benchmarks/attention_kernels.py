"""The attention kernels of PyTorch and FlashInfer, each on its own view of the same keys and values."""

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

from peer_process import RefusedError

HEAD_DIM = 128
_SHORTEST_MIXED = 64
_PAGE_OF_UNPAGED = 64  # FlashInfer's batch decode knows pages only: here they follow each other
_WORKSPACE_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape of fdpp_jax.bench.attention.TABLE, which a test compares with this file's."""

    batch: int
    num_heads: int
    num_kv_heads: int
    capacity: int
    lengths: str | int = "full"
    page_size: int | None = None
    kv_dtype: str | None = None
    scales: str | None = None

    def live_lengths(self) -> tuple[int, ...]:
        """Live keys of each sequence."""
        if self.lengths != "mixed":
            return (self.capacity if self.lengths == "full" else int(self.lengths),) * self.batch
        seeded = random.Random(0)
        octaves = math.log2(self.capacity / _SHORTEST_MIXED)
        between = [round(_SHORTEST_MIXED * 2 ** (octaves * seeded.random())) for _ in range(self.batch - 2)]
        lengths = [_SHORTEST_MIXED, self.capacity, *between]
        seeded.shuffle(lengths)
        return tuple(lengths)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.num_kv_heads * HEAD_DIM * (2 if self.kv_dtype is None else 1)

    @property
    def live_bytes(self) -> int:
        """Bytes of the live keys and values."""
        return sum(self.live_lengths()) * self.token_bytes

    @property
    def label(self) -> str:
        """As in `fdpp-jax bench attention`."""
        parts = [str(self.batch), f"{self.num_heads}/{self.num_kv_heads}", str(self.capacity)]
        if self.lengths == "mixed":
            parts.append(f"lengths {_SHORTEST_MIXED}..{self.capacity}")
        elif self.lengths != "full":
            parts.append(f"length {self.lengths}")
        if self.page_size is not None:
            parts.append(f"pages of {self.page_size}")
        if self.kv_dtype is not None:
            parts.append(f"{self.kv_dtype} a {self.scales}")
        return ", ".join(parts)


Run = Callable[[int], Any]  # calls the kernel on one of the sets
View = Callable[[Any], Any]  # flat keys or values as [B, S, K, H], as the kernel reads them


# The kernels: each takes a case, the query [B, N, H] and sets of flat keys and values, and gives a function to time and
# the view for the reference.


def _sdpa(case: Case, query: Any, sets: list[Any], *, backend: str | None) -> tuple[Run, View]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.page_size is not None or case.kv_dtype is not None:
        raise RefusedError("no paged and no quantised cache")
    lengths = case.live_lengths()
    longest, mask = max(lengths), None
    if min(lengths) < longest:
        if backend == "FLASH_ATTENTION":
            raise RefusedError("lengths need a mask, which the flash backend does not take")
        lengths_of = torch.tensor(lengths, device="cuda")
        mask = (torch.arange(longest, device="cuda") < lengths_of[:, None])[:, None, None]  # [B, 1, 1, S]
    cache_shape = (case.batch, case.num_kv_heads, case.capacity, HEAD_DIM)
    # One length for all: a slice, which a CUDA graph of a growing cache could not have.
    caches = [[buffer.view(cache_shape)[:, :, :longest] for buffer in pair] for pair in sets]
    query = query[:, :, None]  # [B, N, 1, H]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        attn_mask=mask,
        enable_gqa=case.num_heads != case.num_kv_heads,
    )

    def run(index: int) -> Any:
        if backend is None:
            return attend(query, *caches[index])
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attend(query, *caches[index])

    return run, lambda buffer: buffer.view(cache_shape).transpose(1, 2)


def _flashinfer_single(case: Case, query: Any, sets: list[Any], *, use_tensor_cores: bool) -> tuple[Run, View]:
    import flashinfer

    if case.batch != 1 or case.page_size is not None or case.kv_dtype is not None:
        raise RefusedError("one sequence of a contiguous bfloat16 cache only")
    (length,) = case.live_lengths()
    caches = [[buffer.view(case.capacity, case.num_kv_heads, HEAD_DIM)[:length] for buffer in pair] for pair in sets]

    def run(index: int) -> Any:
        return flashinfer.single_decode_with_kv_cache(
            query[0], *caches[index], kv_layout="NHD", use_tensor_cores=use_tensor_cores
        )

    return run, lambda buffer: buffer.view(1, case.capacity, case.num_kv_heads, HEAD_DIM)


def _paged(case: Case, sets: list[Any]) -> tuple[Any, list[Any], View]:
    """A page table [B, pages] on the CPU, the sets as pools of pages [P, page_size, K, H], and the view."""
    import torch

    if case.kv_dtype == "int8":
        raise RefusedError("no int8 cache")
    page_size = case.page_size or _PAGE_OF_UNPAGED
    num_pages = case.batch * case.capacity // page_size
    if case.page_size is None:
        pages = torch.arange(num_pages)
    else:
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    pool_shape = (num_pages, page_size, case.num_kv_heads, HEAD_DIM)
    pools = [tuple(buffer.view(pool_shape) for buffer in pair) for pair in sets]

    def view(buffer: Any) -> Any:
        gathered = buffer.view(pool_shape).to(torch.bfloat16)[
            pages.to(buffer.device)
        ]  # float8 is not indexed everywhere
        return gathered.view(case.batch, case.capacity, case.num_kv_heads, HEAD_DIM)

    return pages.view(case.batch, -1).int(), pools, view


def _flashinfer_batch(case: Case, query: Any, sets: list[Any], *, use_tensor_cores: bool) -> tuple[Run, View]:
    import flashinfer
    import torch

    page_table, pools, view = _paged(case, sets)
    page_size = pools[0][0].shape[1]
    lengths = torch.tensor(case.live_lengths(), dtype=torch.int32)
    live_pages = (lengths + page_size - 1) // page_size
    indices = torch.cat([row[:live] for row, live in zip(page_table, live_pages.tolist(), strict=True)])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), live_pages.cumsum(0).int()])
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=use_tensor_cores)
    wrapper.plan(
        indptr.cuda(),
        indices.cuda(),
        (lengths - (live_pages - 1) * page_size).cuda(),
        case.num_heads,
        case.num_kv_heads,
        HEAD_DIM,
        page_size,
        q_data_type=query.dtype,
        kv_data_type=pools[0][0].dtype,
    )
    # The scale of the values would be a launch of its own in some versions; a model can fold it into its weights.
    scale = {} if case.kv_dtype is None else dict(k_scale=1.0)

    def run(index: int) -> Any:
        return wrapper.run(query, pools[index], **scale)

    return run, view


def _flashinfer_xqa(case: Case, query: Any, sets: list[Any]) -> tuple[Run, View]:
    import flashinfer.decode
    import torch

    page_table, pools, view = _paged(case, sets)
    lengths = case.live_lengths()
    arguments = dict(
        workspace_buffer=torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"),
        block_tables=page_table.cuda(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).to(torch.uint32).cuda(),
        max_seq_len=max(lengths),
        bmm1_scale=HEAD_DIM**-0.5,
        bmm2_scale=1.0,
        kv_layout="NHD",
    )

    def run(index: int) -> Any:
        return flashinfer.decode.xqa_batch_decode_with_kv_cache(query=query, kv_cache=pools[index], **arguments)

    return run, view


KERNELS: dict[str, Callable[[Case, Any, list[Any]], tuple[Run, View]]] = {
    "torch SDPA": functools.partial(_sdpa, backend=None),
    "torch SDPA, flash": functools.partial(_sdpa, backend="FLASH_ATTENTION"),
    "torch SDPA, cuDNN": functools.partial(_sdpa, backend="CUDNN_ATTENTION"),
    "FlashInfer single": functools.partial(_flashinfer_single, use_tensor_cores=False),
    "FlashInfer single, tensor cores": functools.partial(_flashinfer_single, use_tensor_cores=True),
    "FlashInfer batch": functools.partial(_flashinfer_batch, use_tensor_cores=False),
    "FlashInfer batch, tensor cores": functools.partial(_flashinfer_batch, use_tensor_cores=True),
    "FlashInfer XQA": _flashinfer_xqa,
}


def reference(case: Case, query: Any, keys: Any, values: Any) -> Any:
    """Attention of a query [B, N, H] with keys and values [B, S, K, H] in float32."""
    import torch

    rows = []
    for row, length in enumerate(case.live_lengths()):
        key, value = (x[row, :length].float() for x in (keys, values))
        groups = query[row].float().view(case.num_kv_heads, -1, HEAD_DIM)
        weights = (torch.einsum("kgh,skh->kgs", groups, key) * HEAD_DIM**-0.5).softmax(-1)
        rows.append(torch.einsum("kgs,skh->kgh", weights, value).reshape(case.num_heads, HEAD_DIM))
    return torch.stack(rows)


def relative_error(out: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    return ((out.reshape(expected.shape).float() - expected).abs().max() / expected.abs().max()).item()
