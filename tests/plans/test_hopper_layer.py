"""Whether a layer's matmuls are one launch: legal for every model and device, and refused with a reason."""

import dataclasses

import pytest

from fdpp_jax import heuristics
from fdpp_jax.models import PRESETS
from fdpp_jax.plans import device
from fdpp_jax.plans.hopper_layer import inner_width
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm, Rotation


@pytest.mark.parametrize("name", device.names())
@pytest.mark.parametrize("model", PRESETS)
def test_every_layer_has_a_legal_plan_everywhere(model, name):
    """CTAs that wait for each other all run at once, and each has a unit of the MLP."""
    config, known = PRESETS[model], device.by_name(name)
    for batch in (1, 2, 8, 9, 17, 32, 64, 256):
        shape = config.layer_shape(batch, "bfloat16")
        plan = heuristics.plan_layer(shape, name)
        assert plan.reason
        assert (plan.config is None) == (plan.implementation == "unfused")
        if plan.backend != "mosaic_gpu":
            assert known.arch != "sm_90" or batch > 32 or config.head_dim % 64 or "columns" in plan.reason
            continue
        assert known.arch == "sm_90"
        assert plan.config.smem_bytes(shape) <= known.smem_bytes
        assert plan.config.num_stages >= 2
        assert plan.config.num_ctas <= min(known.num_sms, config.intermediate_size // inner_width(shape.spec))
        assert plan.fuses_head == (config.vocab_size % 32 == 0)
        depth = max(config.query_size, config.hidden_size, config.intermediate_size)
        assert depth <= 128 * plan.config.num_x_tiles * plan.config.block_k  # counters: a thread each waits for them


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dtype="float16"), "bfloat16"),
        (dict(batch=33), "1 to 32 rows"),
        (dict(intermediate_size=131136), "65536 columns, got 131136"),
        (dict(head_dim=72), "multiples of 16, at least 64, got H = 72"),
        (dict(head_dim=48), "multiples of 16, at least 64, got H = 48"),
        (
            dict(head_dim=96, spec=LayerSpec(norms_queries_and_keys=True)),
            "heads of multiples of 64 columns, got H = 96",
        ),
        (dict(head_dim=80, num_query_heads=33, num_kv_heads=33), "N H = 2640"),
        (dict(intermediate_size=11040), "multiples of 64"),
        (dict(head_dim=64, spec=LayerSpec(rotation=Rotation(0.5))), "of which 32 rotate"),
        (dict(spec=LayerSpec(norms_products=True, norm=Norm("layer"))), "products by RMSNorm only"),
        (dict(spec=LayerSpec(norms_queries_and_keys=True, norm=Norm("layer"))), "keys by RMSNorm only"),
        (dict(head_dim=256, intermediate_size=64, spec=LayerSpec(norms_queries_and_keys=True)), "got 2 CTAs"),
        (dict(batch=5, intermediate_size=36864, spec=LayerSpec(norms_products=True)), "32768 columns, got 36864"),
    ],
)
def test_a_refused_layer_says_why(changes, why):
    shape = dataclasses.replace(LayerShape(1, 4096, 11008, 32, 32, 128), **changes)
    plan = heuristics.plan_layer(shape, "H200")
    assert plan.implementation == "unfused"
    assert why in plan.reason
