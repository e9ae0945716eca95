"""Static facts of the fused layer's launches, as its kernels name them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProductFacts:
    """Static facts of a product x [num_rows, depth] @ w [width, depth]: a constant of its kernel.

    Attributes:
      is_row: Whether the product is on CUDA cores, of one row.
      num_rows: Rows of x.
      padded_rows: num_rows, padded for the matrix unit.
      depth: Columns of x.
      width: Columns of the result.
      block_n: Columns of a program.
      block_k: Contraction depth of a tile.
      k_groups: Groups of warps that share the depth of a tile.
      num_stages: Tiles in flight, and the one that is multiplied.
      has_bias: Whether there is a bias.
      num_parts: Sums of squares of a row of x, which is not yet divided by its rms; 0: it is normalised.
      eps: Of the norm.
    """

    is_row: bool
    num_rows: int
    padded_rows: int
    depth: int
    width: int
    block_n: int
    block_k: int
    k_groups: int
    num_stages: int
    has_bias: bool
    num_parts: int
    eps: float


@dataclasses.dataclass(frozen=True)
class HeadFacts:
    """Static facts of queries, keys and values [num_rows, width], and of the cache: a constant of their kernels.

    Attributes:
      num_rows: Rows.
      width: Columns of queries, keys and values together.
      capacity: Slots of a sequence.
      head_dim: Elements of a head.
      query_width: Columns of the queries.
      kv_width: Columns of the keys, and of the values.
      turned: Elements of a head that rotate, its first ones.
    """

    num_rows: int
    width: int
    capacity: int
    head_dim: int
    query_width: int
    kv_width: int
    turned: int
