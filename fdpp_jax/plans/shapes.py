"""Static shapes of calls, from which kernels are planned: frozen dataclasses of plain Python values.

A shape can be cached, printed, stored as JSON and compared. There are no arrays here and no devices.
"""

import dataclasses
from typing import Literal

AttentionImplementation = Literal["mosaic_gpu", "triton", "cudnn", "xla"]
MatmulImplementation = Literal["gemv", "flat", "xla"]
# The axes of a weight: [K, N], or [N, K] as PyTorch and Hugging Face store it.
WeightOrder = Literal["kn", "nk"]
ScaleKind = Literal["head", "token"]

QUANTISED_DTYPES = ("int8", "float8_e4m3fn")
PAGE_SIZES = (16, 32, 64, 128, 256)


def cdiv(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return cdiv(value, multiple) * multiple


def in_order[T](w_order: WeightOrder, k: T, n: T) -> tuple[T, T]:
    """The values of a weight's K and N axes, in the order of the axes."""
    return (k, n) if w_order == "kn" else (n, k)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Static facts of one attention call.

    Attributes:
      batch: Sequences, B.
      query_length: Queries per sequence, T.
      capacity: Keys that a sequence has room for, S; of a paged cache in all of its pages.
      num_query_heads: N.
      num_kv_heads: K, which divides N.
      head_dim: H.
      dtype: Of the query and the result.
      is_causal: Whether a query sees keys up to its position only.
      has_lengths: Whether key_value_seq_lengths is given. cuDNN's padding mask lets NaN beyond a length through.
      local_window_size: (left, right) keys around its position that a query sees; None: all.
      logits_soft_cap: Cap of the scores; None: none.
      kv_dtype: Of the cache; None: the query's.
      page_size: Keys per page; None: the cache is contiguous.
      scales: Scales of a quantised cache: "head" [K] or "token" [B, S, K].
      has_sinks: Whether sinks are given.
      has_query_offset: Whether query_offset is given.
      has_traced_scale: Whether the factor on the scores is an array; kernels take a number.
      starts_early: Whether the call follows a fused layer, and starts while that layer ends.
      is_online: Whether softmax keeps a running max; a unified max does without.
      has_bias: Whether a bias on the scores is given.
      has_mask: Whether a mask is given as an array.
      has_starts: Whether key_value_seq_starts is given.
      returns_residual: Whether the rows' log-sum-exp is a second result.
    """

    batch: int
    query_length: int
    capacity: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    is_causal: bool = False
    has_lengths: bool = True
    local_window_size: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    kv_dtype: str | None = None
    page_size: int | None = None
    scales: ScaleKind | None = None
    has_sinks: bool = False
    has_query_offset: bool = False
    has_traced_scale: bool = False
    starts_early: bool = False
    is_online: bool = False
    has_bias: bool = False
    has_mask: bool = False
    has_starts: bool = False
    returns_residual: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def live_rows(self) -> int:
        """Query rows per key/value head."""
        return self.group_size * self.query_length

    @property
    def score_bytes(self) -> int:
        """Bytes of all scores [B, N, T, S] in float32."""
        return 4 * self.batch * self.num_query_heads * self.query_length * self.capacity

    @property
    def kv_itemsize(self) -> int:
        """Bytes of one element of the cache."""
        dtype = self.kv_dtype or self.dtype
        return 1 if dtype in QUANTISED_DTYPES else 4 if dtype == "float32" else 2


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """x [m, k] @ w [k, n], or with w stored [n, k]."""

    m: int
    k: int
    n: int
    dtype: str = "bfloat16"
    w_order: WeightOrder = "kn"

    @property
    def w_shape(self) -> tuple[int, int]:
        """[k, n] or [n, k]."""
        return in_order(self.w_order, self.k, self.n)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm over the hidden size, in float32.

    Attributes:
      kind: "rms": x / rms(x) * gain. "layer": (x - mean(x)) / std(x) * gain + bias.
      eps: Added to the mean square, or to the variance.
      gain_offset: The gain is gain_offset + weight.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    gain_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotary embedding of queries and keys: elements i and i + R / 2 of a head turn together.

    Attributes:
      share: R / H, the share of the head dim that turns, its first elements; the rest stays as it is.
    """

    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What lies between two attentions. The defaults are LLaMA's.

    attention -> o (+ bias) [-> norm] -> + residual -> norm -> MLP's first product (+ bias) -> activation
    -> MLP's second product (+ bias) [-> norm] -> + residual -> next layer's norm -> its qkv (+ bias)
    [-> norms of queries and keys] -> rotation -> cache.

    Attributes:
      norm: Of every norm of the hidden size.
      norms_products: Whether o and the MLP's second product are normalised before they join the residual stream.
      norms_queries_and_keys: Whether queries and keys are normalised over the head dim before they are rotated.
      activation: Of the MLP.
      is_gated: Whether the MLP is activation(gate) * up, gate and up in one product; else activation(up).
      has_qkv_bias: Whether queries, keys and values have biases.
      has_o_bias: Whether attention's output projection has one.
      has_mlp_bias: Whether both products of the MLP have them.
      rotation: Of queries and keys; None: positions are added to the embedding.
      logits_soft_cap: Logits become cap * tanh(logits / cap); None: they stay.
    """

    norm: Norm = Norm()
    norms_products: bool = False
    norms_queries_and_keys: bool = False
    activation: Literal["silu", "gelu_tanh", "relu"] = "silu"
    is_gated: bool = True
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    rotation: Rotation | None = Rotation()
    logits_soft_cap: float | None = None

    def num_rotated(self, head_dim: int) -> int:
        """Elements of a head that turn: its first ones."""
        return 0 if self.rotation is None else int(head_dim * self.rotation.share)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One layer's matmuls for `batch` rows, from attention's output to the next layer's queries, keys and values.

    Attributes:
      batch: Rows, B.
      hidden_size: D.
      intermediate_size: Width of the MLP, F.
      num_query_heads: N.
      num_kv_heads: K.
      head_dim: H.
      dtype: Of weights and activations.
      spec: What is computed.
      vocab_size: Logits per row, V, of the head behind the last layer; 0 if it is not asked for.
    """

    batch: int
    hidden_size: int
    intermediate_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    spec: LayerSpec = LayerSpec()
    vocab_size: int = 0
