"""The fused layer in Triton: compiled for every GPU, and run on Hopper by its own code and by sm_80's."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import layer_case
import numpy as np
import oracle
import pytest
import triton_case
from jax.sharding import PartitionSpec as P
from layer_case import CAPACITY, SPECS, Case

from fdpp_jax.plans import device, triton_layer
from fdpp_jax.plans.shapes import LayerShape, Norm
from fdpp_jax.triton.fused_layer import fused_layer, fused_qkv

LLAMA_2_7B = 4096, 11008, 32, 32, 128
LLAMA_3_8B = 4096, 14336, 32, 8, 128
LLAMA_3_2_1B = 2048, 8192, 32, 8, 64
GEMMA_2_2B = 2304, 9216, 8, 4, 256
OPT_1_3B = 2048, 8192, 32, 32, 64
ALL_GPUS = "A100", "A10", "L4", "H200", "B200", "RTX 5090", "MI210", "MI300X"
SIZES = {"gemma": GEMMA_2_2B, "opt": OPT_1_3B}


def planned(batch, sizes, spec="llama", gpu="A100", seed=0):
    shape = LayerShape(batch, *sizes, spec=SPECS[spec])
    return Case(shape, seed), triton_layer.rule_config(shape, device.by_name(gpu))


def _calls(case, config):
    inputs = jax.eval_shape(case.inputs)
    return triton_case.calls_of(functools.partial(fused_layer, spec=case.shape.spec, config=config), *inputs)


# A family's specs differ in what a kernel does with its columns: on one GPU of each maker's.
@pytest.mark.parametrize(
    ("gpu", "batch", "spec"),
    [
        *((gpu, batch, "llama") for gpu in ALL_GPUS for batch in (1, 8)),
        *((gpu, 16, "qwen3") for gpu in ("A100", "MI210")),
        *((gpu, batch, spec) for gpu, batch in (("A100", 1), ("MI210", 8)) for spec in ("gemma", "opt", "chatglm")),
    ],
)
def test_the_rule_s_kernels_compile(gpu, batch, spec):
    case, config = planned(batch, SIZES.get(spec, LLAMA_3_8B), spec, gpu)
    gpu = device.by_name(gpu)
    triton_case.skip_unless_compiled_for(gpu.arch)
    calls = _calls(case, config)
    assert len(calls) == triton_layer.num_launches(case.shape.spec)
    for call in calls:
        compiled = triton_case.compiled(call)
        compiled.check_fits()
        assert compiled.shared_bytes <= config.smem_bytes(case.shape)
        if "f" in call.constants:  # of a product
            assert compiled.has_matrix_products == (batch > 1)
            assert batch == 1 or not gpu.is_nvidia or compiled.has_async_copies
            # Ten programs of one row fit an SM.
            assert batch > 1 or not gpu.is_nvidia or compiled.num_registers <= 48
            # Few loads beside those of tiles: no thread loads what belongs to all columns.
            num_loads = len(re.findall(r"ld\.global|global_load|buffer_load", compiled.assembly))
            assert 0 < num_loads < (24 if gpu.is_nvidia else 40)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("llama", ["fused_product", "fused_mlp_in", "fused_product", "fused_qkv"]),
        ("chatglm", ["fused_product", "fused_mlp_in", "fused_product", "fused_qkv"]),
        ("qwen3", ["fused_product", "fused_mlp_in", "fused_product", "fused_product", "fused_heads"]),
        ("opt", ["fused_product", "fused_norm", "fused_mlp_in", "fused_product", "fused_norm", "fused_qkv"]),
        ("gemma", ["fused_product", "fused_norm", "fused_mlp_in", "fused_product", "fused_norm", "fused_qkv"]),
    ],
)
def test_a_layer_is_a_launch_for_each_product_and_its_own_norms(spec, names):
    case, config = planned(8, LLAMA_3_8B, spec)
    assert [call.kernel.__name__ for call in _calls(case, config)] == names
    assert len(names) == triton_layer.num_launches(case.shape.spec)


def test_refuses_another_layer_with_the_reason():
    case, config = planned(8, LLAMA_3_8B, "gemma")
    spec = dataclasses.replace(case.shape.spec, norm=Norm("layer"))
    with pytest.raises(NotImplementedError, match="norms after a product are RMSNorm, got layer"):
        jax.eval_shape(functools.partial(fused_layer, spec=spec, config=config), *jax.eval_shape(case.inputs))


@triton_case.needs_plugin
def test_results_vary_within_shard_map_as_operands_do():
    """Rows divided among two devices, each with the cache of its own."""
    over = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    case, config = planned(8, LLAMA_3_2_1B)
    attended, hidden, weights, following, cache = jax.eval_shape(case.inputs)
    call = functools.partial(fused_layer, spec=case.shape.spec, config=config)
    cached = jax.tree.map(lambda x: P(None, "a") if x.ndim == 3 else P("a"), cache)
    specs = P("a"), P("a"), jax.tree.map(lambda _: P(), weights), jax.tree.map(lambda _: P(), following), cached
    run = jax.jit(jax.shard_map(call, mesh=over, in_specs=specs, out_specs=(P("a"), P("a"))))
    traced = run.trace(attended, hidden, weights, following, cache)
    assert traced.out_info[0].shape == hidden.shape
    assert "output_operand_alias<" in traced.lower(lowering_platforms=("cuda",)).as_text()


# On a GPU.

on_both_codes = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])


def _compiled_for(config, arch):
    tiles = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: dataclasses.replace(tile, arch=arch) for name, tile in tiles.items()})


@pytest.mark.gpu
@on_both_codes
@pytest.mark.parametrize(
    ("batch", "sizes", "spec"),
    [
        *((batch, LLAMA_2_7B, "llama") for batch in (1, 8)),
        *((batch, LLAMA_3_2_1B, "llama") for batch in (2, 9, 16)),
        *((batch, LLAMA_3_2_1B, spec) for batch in (1, 8) for spec in ("qwen3", "chatglm")),
        *((batch, SIZES[spec], spec) for batch in (1, 8) for spec in ("gemma", "opt")),
        (5, (896, 4864, 14, 2, 64), "qwen2"),  # Qwen2.5-0.5B
    ],
)
def test_agrees_with_float64(batch, sizes, spec, arch):
    case, config = planned(batch, sizes, spec, "H200")
    attended, hidden, weights, following, cache = case.inputs()
    cache = cache._replace(slots=cache.slots.at[-1].set(CAPACITY))
    inputs = attended, hidden, weights, following, cache
    config = _compiled_for(config, arch)
    run = jax.jit(functools.partial(fused_layer, spec=case.shape.spec, config=config))
    out, attention = run(*inputs)
    for x, exact in zip((out, *attention), case.expected(*inputs), strict=True):
        assert oracle.relative_error(x, exact) < 2 * oracle.TOLERANCE["bfloat16"]
    layer_case.check_slots(cache, attention)
    for _ in range(20):
        for x, y in zip(jax.tree.leaves((out, attention)), jax.tree.leaves(run(*inputs)), strict=True):
            assert (x == y).all()


@pytest.mark.gpu
def test_before_the_first_attention():
    case, config = planned(8, LLAMA_2_7B, "qwen2", "H200")
    _, x, weights, _, cache = case.inputs()
    following = jax.jit(functools.partial(fused_qkv, spec=case.shape.spec, config=config))(x, weights, cache)
    exact = case.expected_attention(np.asarray(x.astype(jnp.float32), np.float64), weights, cache)
    for out, expected in zip(following, exact, strict=True):
        assert oracle.relative_error(out, expected) < oracle.TOLERANCE["bfloat16"]
