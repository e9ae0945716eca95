"""Plans are for the platform of a lowering: ops as they are lowered and exported for GPUs on whatever machine."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hopper_case import attention_arrays, bf16, mesh
from jax.sharding import PartitionSpec as P
from triton_case import needs_plugin

import fdpp_jax
from fdpp_jax import UnifiedMax
from fdpp_jax.plans import device

pytestmark = pytest.mark.filterwarnings("error")


def attend(softmax, query, key, value, lengths):
    return fdpp_jax.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, softmax=softmax)


def lowered(call, *arguments, platforms=("cuda",)):
    return jax.jit(call).trace(*arguments).lower(lowering_platforms=platforms).as_text()


@needs_plugin
def test_the_target_s_kernel_is_lowered():
    arrays = attention_arrays()
    with fdpp_jax.target("H100"):
        text = lowered(attend, UnifiedMax(), *arrays)
        assert text.count("custom_call @mosaic_gpu") == 1
        assert "dot_general" not in text
        assert lowered(fdpp_jax.flat_matmul, bf16(0, 4, 256), bf16(1, 256, 128)).count("custom_call @mosaic_gpu") == 1
        assert "mosaic_gpu" not in lowered(attend, UnifiedMax(), *arrays, platforms=("cpu",))
    with fdpp_jax.target("A100"):
        assert "mosaic_gpu" not in lowered(attend, UnifiedMax(), *arrays)


@needs_plugin
def test_the_target_is_part_of_what_jit_knows():
    call, arrays = jax.jit(attend), attention_arrays()
    counts = []
    for name in ("H100", "A100", "H100"):
        with fdpp_jax.target(name):
            text = call.trace(UnifiedMax(), *arrays).lower(lowering_platforms=("cuda",)).as_text()
            counts.append(text.count("mosaic_gpu"))
    assert counts[0] == counts[2] > counts[1] == 0


def test_within_a_target_the_cpu_runs_its_own_plan():
    arrays = attention_arrays()
    expected = attend(UnifiedMax(), *arrays)
    with fdpp_jax.target("H200"):
        np.testing.assert_array_equal(attend(UnifiedMax(), *arrays), expected)
        assert fdpp_jax.flat_matmul(bf16(0, 4, 256), bf16(1, 256, 128)).shape == (4, 128)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU, which is the target")
def test_without_a_target_a_lowering_for_gpus_says_what_is_missing():
    with pytest.warns(UserWarning, match=r'name one: with fdpp_jax.target\("H100"\)') as warned:
        text = lowered(attend, UnifiedMax(), *attention_arrays())
    assert "mosaic_gpu" not in text
    assert {one.filename for one in warned} == {__file__}  # the caller's, not the package's or JAX's


def test_a_target_must_be_known():
    with pytest.raises(ValueError, match="unknown device 'H1000'; known are"):
        fdpp_jax.target("H1000")


@pytest.mark.parametrize(
    "softmax",
    [
        None,
        UnifiedMax(1.0),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (UnifiedMax.bound("launch"), UnifiedMax(jnp.zeros(8)))),
    ],
)
def test_exports_for_several_platforms_come_back(softmax):
    arrays = attention_arrays()
    with fdpp_jax.target("H200"):
        exported = jax.export.export(jax.jit(attend), platforms=("cpu", "cuda"))(softmax, *arrays)
    assert "mosaic_gpu" in exported.mlir_module()
    pytest.importorskip("flatbuffers", reason="by which JAX serialises what it exports")
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda")
    np.testing.assert_array_equal(again.call(softmax, *arrays), jax.jit(attend)(softmax, *arrays))


def test_manual_shards_are_exported():
    arrays = attention_arrays()
    over = mesh()
    specs = (P(), P("a", None, "b"), P("a", None, "b"), P("a", None, "b"), P("a"))
    call = jax.jit(jax.shard_map(attend, mesh=over, in_specs=specs, out_specs=specs[1]))
    with fdpp_jax.target("H200"):
        exported = jax.export.export(call, platforms=("cuda",))(UnifiedMax(), *arrays)
    assert "mosaic_gpu" in exported.mlir_module()
    assert exported.nr_devices == 8


@pytest.mark.parametrize("name", ["H200", None])
def test_symbolic_batches_are_xla_s(name):
    (batch,) = jax.export.symbolic_shape("batch")
    arrays = attention_arrays()
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    with fdpp_jax.target(name) if name else warnings.catch_warnings():
        platforms = ("cpu", "cuda") if name else ("cpu",)
        export = lambda call, *shapes: jax.export.export(jax.jit(call), platforms=platforms)(*shapes)  # noqa: E731
        exported = export(attend, UnifiedMax(1.0), *shapes)
        matmul = export(fdpp_jax.flat_matmul, jax.ShapeDtypeStruct((batch, 256), jnp.bfloat16), bf16(1, 256, 128))
    assert "mosaic_gpu" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(UnifiedMax(1.0), *arrays), jax.jit(attend)(UnifiedMax(1.0), *arrays))
    assert matmul.call(bf16(0, 5, 256), bf16(1, 256, 128)).shape == (5, 128)


@pytest.mark.parametrize("softmax", [None, UnifiedMax(1.0), UnifiedMax.bound()], ids=["online", "unified", "bound"])
@pytest.mark.parametrize("mapped", [None, (0, 0, 0), (0, None, None)], ids=["T and S", "vmap", "beams"])
def test_any_symbolic_size_is_xla_s(softmax, mapped):
    size, capacity = jax.export.symbolic_shape("n, s")
    query, key, value, _ = attention_arrays()
    if mapped is None:
        shapes = [(*query.shape[:1], size, *query.shape[2:]), *2 * [(*key.shape[:1], capacity, *key.shape[2:])]]
    else:
        shapes = [
            x.shape if axis is None else (size, *x.shape) for x, axis in zip((query, key, value), mapped, strict=True)
        ]
    shapes = [jax.ShapeDtypeStruct(shape, query.dtype) for shape in shapes]

    def call(*arrays):
        run = lambda *arrays: fdpp_jax.dot_product_attention(*arrays, softmax=softmax)  # noqa: E731
        return (run if mapped is None else jax.vmap(run, mapped))(*arrays)

    with fdpp_jax.target("H200"):
        exported = jax.export.export(jax.jit(call), platforms=("cpu", "cuda"))(*shapes)
    axes = mapped or (None, None, None)
    arrays = zip((query, key, value), axes, strict=True)
    given = [x if axis is None else jnp.stack([x, 2 * x]) for x, axis in arrays]
    assert "mosaic_gpu" not in exported.mlir_module()
    assert oracle.relative_error(exported.call(*given), jax.jit(call)(*given)) < oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("w_is_mapped", [False, True])
def test_a_matmul_mapped_over_a_symbolic_axis_is_xla_s(w_is_mapped):
    (size,) = jax.export.symbolic_shape("n")
    x, w = bf16(0, 3, 256), bf16(1, 3, 256, 128) if w_is_mapped else bf16(1, 256, 128)
    call = jax.jit(jax.vmap(fdpp_jax.flat_matmul, (0, 0 if w_is_mapped else None)))
    shapes = [jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)]
    shapes.append(jax.ShapeDtypeStruct((size, *w.shape[1:]) if w_is_mapped else w.shape, w.dtype))
    with fdpp_jax.target("H200"):
        exported = jax.export.export(call, platforms=("cpu", "cuda"))(*shapes)
    assert oracle.relative_error(exported.call(x, w), call(x, w)) < oracle.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("batch", [pytest.param(4, marks=pytest.mark.slow), "batch"])
@pytest.mark.parametrize("softmax", [None, UnifiedMax(1.0), UnifiedMax.bound()], ids=["online", "unified", "bound"])
def test_exports_have_starts_bias_and_both_results(batch, softmax):
    if batch == "batch":
        (batch,) = jax.export.symbolic_shape(batch)
    arrays = *attention_arrays(), jnp.array([0, 1, 2, 11]), bf16(3, 4, 1, 1, 32)
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]

    def call(query, key, value, lengths, starts, bias):
        arguments = dict(key_value_seq_lengths=lengths, key_value_seq_starts=starts, softmax=softmax)
        arguments |= dict(return_residual=True)
        attend = fdpp_jax.dot_product_attention
        return attend(query, key, value, **arguments), attend(query, key, value, bias, **arguments)

    with fdpp_jax.target("H200"):
        exported = jax.export.export(jax.jit(call), platforms=("cpu", "cuda"))(*shapes)
    assert ("mosaic_gpu" in exported.mlir_module()) == (batch == 4)
    for ours, theirs in zip(*(jax.tree.leaves(f(*arrays)) for f in (exported.call, jax.jit(call))), strict=True):
        assert oracle.relative_error(ours, theirs) < oracle.TOLERANCE["bfloat16"]


def test_arrays_on_another_platform_s_devices_run_its_plan(monkeypatch):
    """On a GPU host, arrays that are committed to the CPU."""
    monkeypatch.setattr(device, "current", lambda: device.by_name("H200"))
    on_cpu = lambda *arrays: jax.device_put(arrays, jax.devices("cpu")[0])  # noqa: E731
    assert jnp.isfinite(attend(UnifiedMax(), *on_cpu(*attention_arrays(batch=2)))).all()
    assert jnp.isfinite(fdpp_jax.flat_matmul(*on_cpu(bf16(0, 4, 256), bf16(1, 256, 128)))).all()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU, for which cuDNN is lowered")
def test_cudnn_is_lowered_where_there_is_a_gpu():
    x = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    with fdpp_jax.target("H200"):
        for call in (fdpp_jax.dot_product_attention, jax.vmap(fdpp_jax.dot_product_attention)):
            with pytest.warns(UserWarning, match="cuDNN's attention only where there is a GPU; plain XLA") as warned:
                assert "dot_general" in lowered(call, x, x, x)
            assert {one.filename for one in warned} == {__file__}
        with pytest.raises(NotImplementedError, match="'cudnn' cannot run this call: JAX lowers cuDNN's"):
            lowered(lambda x: fdpp_jax.dot_product_attention(x, x, x, implementation="cudnn"), x)
