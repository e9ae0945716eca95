"""The fused layer in Triton (`triton.fused_layer`): its config, what it refuses, and the rule that plans it."""

import dataclasses
from collections.abc import Mapping

from fdpp_jax.plans import hopper, triton, triton_matmul
from fdpp_jax.plans.backend import LayerOp, LayerPlan
from fdpp_jax.plans.device import Device
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, MatmulShape
from fdpp_jax.plans.triton_matmul import GemvConfig, MatmulConfig

# Limits of the kernels.
MAX_NORM_SIZE = 32_768  # columns of a row that one program holds
_MAX_WEIGHT_SIZE = 1 << 31  # elements, which a program numbers with 32 bits
_MAX_HEAD_DIM = 1024
_HEAD_MULTIPLE = 8  # of a head's elements, of those that turn and of the others

# The rule.
MAX_ROWS = 16  # measured with 1 and 8; beyond, what XLA does between the products is small beside them


@dataclasses.dataclass(frozen=True)
class FusedLayerConfig:
    """Tiles of the four products of `triton.fused_layer`, none of which splits K.

    Attributes:
      o: Of attention's output projection.
      mlp_in: Of the MLP's first product.
      mlp_out: Of its second one.
      qkv: Of the next layer's queries, keys and values.
    """

    o: MatmulConfig
    mlp_in: MatmulConfig
    mlp_out: MatmulConfig
    qkv: MatmulConfig

    def smem_bytes(self, shape: LayerShape) -> int:
        """Shared memory per program of the product that takes most."""
        return max(getattr(self, name).smem_bytes(product) for name, product in products(shape).items())


def products(shape: LayerShape) -> dict[str, MatmulShape]:
    """The four products by the names of `FusedLayerConfig`."""
    hidden, query = shape.hidden_size, shape.num_query_heads * shape.head_dim
    sizes = dict(
        o=(query, hidden),
        mlp_in=(hidden, (1 + shape.spec.is_gated) * shape.intermediate_size),
        mlp_out=(shape.intermediate_size, hidden),
        qkv=(hidden, query + 2 * shape.num_kv_heads * shape.head_dim),
    )
    return {name: MatmulShape(shape.batch, k, n, shape.dtype, w_order="nk") for name, (k, n) in sizes.items()}


def folds_norms(spec: LayerSpec) -> bool:
    """Whether the norms of the hidden size are within the products: a factor of each row, and a gain of each column.

    Else each one is a launch of its own: what a layer norm subtracts would cancel too much of a product.
    """
    return spec.norm.kind == "rms" and not spec.norms_products


def num_launches(spec: LayerSpec) -> int:
    """Launches between two attentions."""
    return 4 + 2 * (not folds_norms(spec)) + spec.norms_queries_and_keys


def refuse(shape: LayerShape, device: Device, algorithm: str | None = "fused") -> str | None:
    """Why the fused layer cannot compute `shape` on `device`, or None if it can; see `backend.Op`."""
    del algorithm  # there is one
    if device.arch == hopper.ARCHITECTURE and device.only_backend != triton.NAME:
        return f"{triton.NAME}'s fused layer is for GPUs whose matmuls are {triton.NAME}'s"
    refusal = triton.refuse_device(device) or refuse_spec(shape.spec)
    if refusal is not None:
        return refusal
    if shape.dtype != "bfloat16":  # x times a gain, without the norm's factor, may leave float16's range
        return f"the fused layer takes bfloat16, got {shape.dtype}"
    if not 1 <= shape.batch <= MAX_ROWS:
        return f"1 to {MAX_ROWS} rows gain by a fused layer, got B = {shape.batch}"
    num_rotated = shape.spec.num_rotated(shape.head_dim)
    if shape.head_dim % _HEAD_MULTIPLE or num_rotated % _HEAD_MULTIPLE or shape.head_dim > _MAX_HEAD_DIM:
        turned = "" if num_rotated in (0, shape.head_dim) else f", of which {num_rotated} rotate"
        wanted = f"multiples of {_HEAD_MULTIPLE} up to {_MAX_HEAD_DIM}"
        return f"the fused layer takes head dims that are {wanted}, got H = {shape.head_dim}{turned}"
    if shape.hidden_size > MAX_NORM_SIZE and not folds_norms(shape.spec):
        return f"a program of the norm holds up to {MAX_NORM_SIZE} columns, got D = {shape.hidden_size}"
    for name, product in products(shape).items():
        if product.k * product.n >= _MAX_WEIGHT_SIZE:
            return f"the fused layer takes weights of fewer than {_MAX_WEIGHT_SIZE} elements, got {name}"
        if (refusal := triton_matmul.refuse(product, device, None)) is not None:
            return f"{name}: {refusal}"
    return None


def refuse_spec(spec: LayerSpec) -> str | None:
    """Why the kernels do not compute such a layer whatever its sizes, or None if they do."""
    if spec.norms_products and spec.norm.kind != "rms":
        return f"the fused layer's norms after a product are RMSNorm, got {spec.norm.kind}"
    if spec.norms_queries_and_keys and spec.norm.kind != "rms":
        return f"the fused layer's norms of queries and keys are RMSNorm, got {spec.norm.kind}"
    rotation = spec.rotation
    if rotation is not None and not 0 < rotation.share <= 1:
        return f"a rotation turns a share of a head in 0..1, got {rotation.share}"
    return None


def rule_config(shape: LayerShape, device: Device, algorithm: str = "fused") -> FusedLayerConfig:
    """The tiles of each product as `triton_matmul` has them, with K whole."""
    assert algorithm == "fused"

    def tiles(product: MatmulShape) -> MatmulConfig:
        name = triton_matmul.OP.algorithm(product, device)
        return dataclasses.replace(triton_matmul.rule_config(product, device, name), split_k=1)

    return FusedLayerConfig(**{name: tiles(product) for name, product in products(shape).items()})


def _keeps_halves(config: MatmulConfig, shape: LayerShape) -> bool:
    """Whether the pairs of a program of qkv lie in two blocks of columns, as those on CUDA cores must.

    Elements i and i + R / 2 of a head are a pair. So half a block divides half of those that turn, and of the others.
    """
    if not isinstance(config, GemvConfig) or shape.spec.norms_queries_and_keys:  # whose pairs another launch has
        return True
    num_rotated = shape.spec.num_rotated(shape.head_dim)
    return all(half % (config.block_n // 2) == 0 for half in (num_rotated // 2, (shape.head_dim - num_rotated) // 2))


def _plan(shape: LayerShape, device: Device, why: str) -> LayerPlan:
    del why  # it is the first choice wherever it runs
    reason = f"{num_launches(shape.spec)} launches between two attentions"
    return LayerPlan(triton.NAME, "fused", rule_config(shape, device), reason)


def _with_tiles(shape: LayerShape, plan: LayerPlan, tiles: Mapping[str, MatmulConfig]) -> LayerPlan:
    """With measured tiles where they leave K whole, and halves of heads."""
    whole = {name: config for name, config in tiles.items() if config.split_k == 1}
    if "qkv" in whole and not _keeps_halves(whole["qkv"], shape):
        del whole["qkv"]
    if not whole:
        return plan
    reason = f"{plan.reason}; measured tiles of {', '.join(whole)}"
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **whole), reason=reason)


OP = LayerOp(
    configs={"fused": FusedLayerConfig},
    algorithm=lambda *_: "fused",
    refuse=refuse,
    config=rule_config,
    plan=_plan,
    products=products,
    with_tiles=_with_tiles,
)
