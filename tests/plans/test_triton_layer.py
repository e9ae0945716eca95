"""The fused layer in Triton: legal for every model and device, and refused with a reason."""

import dataclasses

import pytest
import tuning_case

from fdpp_jax import heuristics
from fdpp_jax.models import PRESETS, model_plans
from fdpp_jax.plans import backends, device, triton, triton_layer, triton_matmul
from fdpp_jax.plans.shapes import LayerShape, LayerSpec, Norm, Rotation
from fdpp_jax.plans.triton_matmul import FlatMatmulConfig, GemvConfig

DEVICES = [gpu for gpu in map(device.by_name, device.names()) if gpu.arch in triton.ARCHITECTURES]
A100, H200 = device.by_name("A100"), device.by_name("H200")
LLAMA = LayerShape(1, 4096, 11008, 32, 32, 128)


def _asked(gpu):
    return backends.only("triton", gpu)


@pytest.mark.parametrize("gpu", DEVICES, ids=lambda gpu: gpu.kind)
@pytest.mark.parametrize("model", PRESETS)
def test_every_layer_has_a_legal_plan_everywhere(model, gpu):
    for batch in (1, 2, 8, 9, 16, 17):
        shape = PRESETS[model].layer_shape(batch, "bfloat16")
        plan = heuristics.plan_layer(shape, _asked(gpu))
        if batch > triton_layer.MAX_ROWS:
            assert (plan.backend, plan.algorithm) == ("xla", "unfused")
            assert "1 to 16 rows" in plan.reason
            continue
        assert (plan.backend, plan.algorithm) == ("triton", "fused")
        assert not plan.overlaps_attention
        assert not plan.fuses_head
        assert plan.config.smem_bytes(shape) <= gpu.smem_bytes
        for name, product in triton_layer.products(shape).items():
            config = getattr(plan.config, name)
            algorithm = "gemv" if batch == 1 else "flat"
            assert isinstance(config, GemvConfig if batch == 1 else FlatMatmulConfig)
            assert triton_matmul.refuse_config(product, gpu, algorithm, config) is None
            assert config.split_k == 1
            assert config.block_n % 2 == 0  # pairs of columns


@pytest.mark.parametrize("spec", [LayerSpec(), LayerSpec(norm=Norm("layer")), LayerSpec(norms_queries_and_keys=True)])
def test_the_reason_counts_the_launches(spec):
    count = 4 + 2 * (spec.norm.kind == "layer") + spec.norms_queries_and_keys
    plan = heuristics.plan_layer(dataclasses.replace(LLAMA, spec=spec), A100)
    assert plan.reason == f"{count} launches between two attentions"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dtype="float16"), "takes bfloat16, got float16"),
        (dict(batch=17), "1 to 16 rows gain by a fused layer, got B = 17"),
        (dict(head_dim=60), "head dims that are multiples of 8 up to 1024, got H = 60"),
        (dict(head_dim=1032), "head dims that are multiples of 8 up to 1024, got H = 1032"),
        (dict(spec=LayerSpec(rotation=Rotation(0.25)), head_dim=80), "got H = 80, of which 20 rotate"),
        (
            dict(hidden_size=32776, spec=LayerSpec(norm=Norm("layer"))),
            "holds up to 32768 columns, got D = 32776",
        ),
        (dict(intermediate_size=300_000), "fewer than 2147483648 elements, got mlp_in"),
        (dict(intermediate_size=11012), "mlp_out: the kernel takes K and N that are multiples of 8, got K = 11012"),
        (dict(spec=LayerSpec(rotation=Rotation(share=0.0))), "a share of a head in 0..1, got 0.0"),
        (dict(spec=LayerSpec(norms_products=True, norm=Norm("layer"))), "after a product are RMSNorm, got layer"),
        (
            dict(spec=LayerSpec(norms_queries_and_keys=True, norm=Norm("layer"))),
            "of queries and keys are RMSNorm, got layer",
        ),
    ],
)
def test_a_refused_layer_says_why(changes, why):
    plan = heuristics.plan_layer(dataclasses.replace(LLAMA, **changes), A100)
    assert plan.implementation == "unfused"
    assert why in plan.reason


@pytest.mark.parametrize("is_fastest", [True, False])
def test_measured_tiles_go_before_the_rule_s(is_fastest, tmp_path, monkeypatch):
    """Where K is whole in them, and whether or not XLA's product was faster."""
    shape = dataclasses.replace(LLAMA, batch=8)
    directory = tuning_case.empty_directories(tmp_path, monkeypatch)["user"]
    rule = heuristics.plan_layer(shape, A100)
    tiles = FlatMatmulConfig("sm_80", 32, 64, 1, 1, 4, 3)
    entries = [
        tuning_case.entry(k=4096, n=22016, config=tiles),
        tuning_case.entry(k=11008, n=4096, config=dataclasses.replace(tiles, split_k=2)),
    ]
    if not is_fastest:
        entries = [dataclasses.replace(entry, implementation="xla") for entry in entries]
    tuning_case.write(directory, *entries, kind="A100")
    plan = heuristics.plan_layer(shape, A100)
    names = "mlp_in, qkv"  # whose weight is near the measured one
    assert plan.reason == f"{rule.reason}; measured tiles of {names}"
    assert plan.config == dataclasses.replace(rule.config, mlp_in=tiles, qkv=tiles)


def test_hopper_has_it_where_triton_alone_is_asked():
    """Else Mosaic GPU's layer, or its matmuls, run there."""
    shape = PRESETS["qwen3-8b"].layer_shape(1, "bfloat16")
    assert "for GPUs whose matmuls are triton's" in triton_layer.refuse(shape, H200)
    assert heuristics.plan_layer(shape, H200).backend != "triton"
    assert heuristics.plan_layer(shape, _asked(H200)).backend == "triton"


def test_a_step_of_fused_layers_has_a_head_of_its_own():
    plans = {name: plan for name, _, plan in model_plans(PRESETS["llama-2-7b"], batch=1, capacity=1024, device="A100")}
    assert list(plans) == ["attention", "layer", "head"]
    assert plans["layer"].reason.endswith("; with qkv")


@pytest.mark.parametrize(
    ("block_n", "changes", "names"),
    [
        (8, {}, "o, mlp_in, mlp_out, qkv"),
        (128, {}, "o, mlp_in, mlp_out, qkv"),  # 64 pairs: half a head
        (256, {}, "o, mlp_in, mlp_out"),
        (128, dict(spec=LayerSpec(rotation=Rotation(0.5))), "o, mlp_in, mlp_out"),
        (256, dict(spec=LayerSpec(norms_queries_and_keys=True)), "o, mlp_in, mlp_out, qkv"),
    ],
)
def test_measured_tiles_of_one_row_keep_halves_of_heads(block_n, changes, names):
    shape = dataclasses.replace(LLAMA, **changes)
    plan = heuristics.plan_layer(shape, A100)
    tiles = GemvConfig("sm_80", block_n, 32, 1, 4, 1)
    measured = triton_layer.OP.with_tiles(shape, plan, dict.fromkeys(triton_layer.products(shape), tiles))
    assert measured.reason.endswith(f"measured tiles of {names}")
