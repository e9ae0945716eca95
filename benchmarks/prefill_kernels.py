"""The prefill kernels of PyTorch, FlashInfer and JAX: each in its own framework, with a reference of that framework."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

from attention_peers import Graph
from peer_process import RefusedError, check

_NUM_SETS = 2  # keys and values of a call are read once, and there is little of them beside the products
_PROGRAM_BYTES = 2 << 30
_MAX_CALLS = 64
_SAMPLE_SECONDS = 0.02
_TOLERANCE = 0.02  # of the largest value: bfloat16 weights and results
_REFERENCE_ROWS = 256  # queries whose float32 scores are there at once
_MOSAIC_BLOCKS_KV = (256, 128, 64)  # the example's own choices: the first that fits the shared memory


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape of fdpp_jax.bench.prefill.TABLE. The queries are the last tokens of their sequence.

    Attributes:
      has_lengths: Whether ours gets lengths, which are those of the arrays.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    query_length: int
    capacity: int | None = None
    head_dim: int = 128
    is_causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_lengths: bool = False

    @property
    def num_keys(self) -> int:
        """Keys per sequence."""
        return self.capacity or self.query_length

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of query, key and value."""
        kv = (self.batch, self.num_keys, self.num_kv_heads, self.head_dim)
        return (self.batch, self.query_length, self.num_heads, self.head_dim), kv, kv

    def visible(self, row: int) -> tuple[int, int]:
        """First and last key that a query sees."""
        position = row + self.num_keys - self.query_length
        last = position if self.is_causal else self.num_keys - 1
        return max(0, position - self.window + 1) if self.window else 0, last

    @property
    def flops(self) -> int:
        """Of both products, over the keys that each query sees."""
        pairs = sum(last - first + 1 for first, last in map(self.visible, range(self.query_length)))
        return 4 * self.batch * self.num_heads * self.head_dim * pairs

    @property
    def num_bytes(self) -> int:
        """Bytes of queries, keys, values and results."""
        rows = self.query_length * self.num_heads + self.num_keys * self.num_kv_heads
        return 4 * self.batch * self.head_dim * rows

    @property
    def label(self) -> str:
        """As in `fdpp-jax bench prefill`."""
        keys = "" if self.num_keys == self.query_length else f" of {self.num_keys}"
        parts = [str(self.batch), f"{self.num_heads}/{self.num_kv_heads}", f"{self.query_length}{keys}"]
        if self.head_dim != 128:
            parts.append(f"H {self.head_dim}")
        if not self.is_causal:
            parts.append("not causal")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.soft_cap is not None:
            parts.append(f"soft cap {self.soft_cap:g}")
        if self.has_lengths:
            parts.append("lengths")
        return ", ".join(parts)

    def refuse(self, *, offset: bool = False, window: bool = False, soft_cap: bool = False) -> None:
        """Raises RefusedError unless all that the case has is named."""
        if self.num_keys > self.query_length and not offset:
            raise RefusedError("the causal mask begins at the first key")
        if self.window is not None and not window:
            raise RefusedError("no window")
        if self.soft_cap is not None and not soft_cap:
            raise RefusedError("no soft cap")


def relative_error(out: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float(abs(out - expected).max() / abs(expected).max())


def _num_calls(case: Case) -> int:
    """Calls of one program, in whole rounds of the sets."""
    return _NUM_SETS * max(1, min(_MAX_CALLS, _PROGRAM_BYTES // case.num_bytes) // _NUM_SETS)


# PyTorch and FlashInfer: a kernel takes a case, and gives a function of query [B, T, N, H], key and value.


def _sdpa(case: Case, *, backend: str) -> Callable[..., Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    case.refuse(offset=backend == "FLASH_ATTENTION")
    has_offset = case.num_keys > case.query_length
    mask = causal_lower_right(case.query_length, case.num_keys) if has_offset and case.is_causal else None

    def run(query: Any, key: Any, value: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                attn_mask=mask,
                is_causal=case.is_causal and mask is None,
                enable_gqa=case.num_heads != case.num_kv_heads,
            )
        return out.transpose(1, 2)

    return run


def _flashinfer_single(case: Case) -> Callable[..., Any]:
    import flashinfer

    case.refuse(offset=True, window=True, soft_cap=True)
    if case.batch != 1:
        raise RefusedError("one sequence only")
    return lambda query, key, value: flashinfer.single_prefill_with_kv_cache(
        query[0],
        key[0],
        value[0],
        causal=case.is_causal,
        kv_layout="NHD",
        window_left=-1 if case.window is None else case.window - 1,
        logits_soft_cap=case.soft_cap,
    )[None]


def torch_reference(case: Case, query: Any, key: Any, value: Any) -> Any:
    """Attention in float32, some queries at a time."""
    import torch

    groups = case.num_heads // case.num_kv_heads
    key, value = (x.float().repeat_interleave(groups, dim=2) for x in (key, value))
    keys = torch.arange(case.num_keys, device=query.device)
    outs = []
    for start in range(0, case.query_length, _REFERENCE_ROWS):
        rows = query[:, start : start + _REFERENCE_ROWS].float()
        position = start + torch.arange(rows.shape[1], device=query.device) + case.num_keys - case.query_length
        scores = torch.einsum("btnh,bsnh->bnts", rows, key) * case.head_dim**-0.5
        if case.soft_cap is not None:
            scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
        if case.is_causal:
            scores = scores.masked_fill(keys > position[:, None], -torch.inf)
        if case.window is not None:
            scores = scores.masked_fill(keys <= position[:, None] - case.window, -torch.inf)
        outs.append(torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), value))
    return torch.cat(outs, dim=1)


class TorchKernel:
    """A kernel of PyTorch's world, in the process that it has to itself."""

    def __init__(self, name: str) -> None:
        self._make = _TORCH_KERNELS[name]
        self._graph: Graph | None = None

    def prepare(self, case: Case) -> None:
        """Compiles the kernel for a case, and checks what it computes."""
        import torch

        self._graph = None
        torch.cuda.empty_cache()
        kernel = self._make(case)
        torch.manual_seed(0)
        query, *kv = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in case.shapes)
        sets = [kv, *([x.clone() for x in kv] for _ in range(_NUM_SETS - 1))]
        graph = Graph(lambda index: kernel(query, *sets[index]), _NUM_SETS, case.num_bytes)
        expected = torch_reference(case, query, *kv)
        for out in (graph.outs[0], graph.outs[-1]):
            check(relative_error(out.float(), expected), _TOLERANCE)
        self._graph = graph

    def sample(self) -> float:
        """Microseconds a call."""
        assert self._graph is not None
        return self._graph.sample() * 1e6


# JAX: a kernel takes a case, and gives functions of query, key and value to try in turn, the factor on the query that
# they leave to the caller, and the dtype of the arrays.
type _JaxKernels = tuple[list[Callable[..., Any]], float, str]


def _jax_cudnn(case: Case) -> _JaxKernels:
    import jax

    case.refuse(window=True)
    window = None if case.window is None else (case.window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=case.is_causal, local_window_size=window, implementation="cudnn"
    )
    return [attend], 1.0, "bfloat16"


def _jax_mosaic(case: Case) -> _JaxKernels:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    case.refuse(offset=not case.is_causal)
    configs = (
        attention_mgpu.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=case.is_causal)
        for block_kv in _MOSAIC_BLOCKS_KV
    )
    kernels = [functools.partial(attention_mgpu.attention, config=config) for config in configs]
    return kernels, case.head_dim**-0.5, "float16"  # it stores float16, whatever it reads


def jax_reference(case: Case, query: Any, key: Any, value: Any, scale: float) -> Any:
    """Attention in float32, some queries at a time, which are a divisor of all."""
    import jax
    import jax.numpy as jnp

    rows = min(_REFERENCE_ROWS, case.query_length)
    groups = case.num_heads // case.num_kv_heads
    key, value = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (key, value))
    keys = jnp.arange(case.num_keys)

    def some(start: Any) -> Any:
        some_rows = jax.lax.dynamic_slice_in_dim(query, start, rows, axis=1).astype(jnp.float32)
        position = (start + jnp.arange(rows) + case.num_keys - case.query_length)[:, None]
        scores = scale * jnp.einsum("btnh,bsnh->bnts", some_rows, key, precision="highest")
        if case.soft_cap is not None:
            scores = case.soft_cap * jnp.tanh(scores / case.soft_cap)
        if case.is_causal:
            scores = jnp.where(keys <= position, scores, -jnp.inf)
        if case.window is not None:
            scores = jnp.where(keys > position - case.window, scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value, precision="highest")

    outs = jax.lax.map(some, jnp.arange(0, case.query_length, rows))  # [blocks, B, rows, N, H]
    return jnp.moveaxis(outs, 0, 1).reshape(query.shape)


class JaxKernel:
    """A kernel of JAX's, in the process that it has to itself."""

    def __init__(self, name: str) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers share the GPU
        self._make = _JAX_KERNELS[name]
        self._run: Callable[[int], float] | None = None
        self._num_programs = 1

    def prepare(self, case: Case) -> None:
        """Compiles the kernel for a case, and checks what it computes."""
        import jax
        import jax.numpy as jnp

        self._run = None
        kernels, factor, dtype = self._make(case)
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = zip(keys, case.shapes, strict=True)
        query, *kv = (jax.random.normal(key, shape, dtype) for key, shape in shapes)
        query = (query * factor).astype(dtype)
        kernel = jax.jit(_first_that_fits(kernels, query, kv))
        reference = jax.jit(functools.partial(jax_reference, case, scale=case.head_dim**-0.5 / factor))
        check(relative_error(kernel(query, *kv).astype(jnp.float32), reference(query, *kv)), _TOLERANCE)
        sets = [kv, *([jnp.copy(x) for x in kv] for _ in range(_NUM_SETS - 1))]
        num_calls = _num_calls(case)

        def program(query: Any, sets: Any) -> Any:
            total = jnp.float32(0)
            for index in range(num_calls):
                # The barrier makes a call wait for the one before.
                query, out = jax.lax.optimization_barrier((query, kernel(query, *sets[index % _NUM_SETS])))
                total += out[0, 0, 0, 0].astype(jnp.float32)
            return total, out

        compiled = jax.jit(program).lower(query, sets).compile()

        def run(num_programs: int) -> float:
            started = time.perf_counter()
            out = None
            for _ in range(num_programs):
                del out
                out = compiled(query, sets)
            jax.block_until_ready(out)
            return (time.perf_counter() - started) / (num_programs * num_calls)

        run(1)
        self._num_programs = max(1, min(256, round(_SAMPLE_SECONDS / (run(1) * num_calls))))
        self._run = run

    def sample(self) -> float:
        """Microseconds a call."""
        assert self._run is not None
        self._run(1)  # the GPU comes from another process
        return self._run(self._num_programs) * 1e6


def _first_that_fits(kernels: list[Callable[..., Any]], query: Any, kv: list[Any]) -> Callable[..., Any]:
    """The first kernel whose blocks fit the shared memory."""
    import jax

    *wide, last = kernels
    for kernel in wide:
        try:
            jax.jit(kernel).lower(query, *kv).compile()
        except ValueError as error:
            if "shared memory" not in str(error):
                raise
        else:
            return kernel
    return last


_TORCH_KERNELS: dict[str, Callable[[Case], Callable[..., Any]]] = {
    "torch SDPA, cuDNN": functools.partial(_sdpa, backend="CUDNN_ATTENTION"),
    "torch SDPA, flash": functools.partial(_sdpa, backend="FLASH_ATTENTION"),
    "FlashInfer single": _flashinfer_single,
}
_JAX_KERNELS: dict[str, Callable[[Case], _JaxKernels]] = {
    "jax.nn, cuDNN": _jax_cudnn,
    "JAX, Mosaic GPU (float16)": _jax_mosaic,
}
KERNELS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(TorchKernel, name) for name in _TORCH_KERNELS},
    **{name: functools.partial(JaxKernel, name) for name in _JAX_KERNELS},
}
