"""The bridge to jax-triton: programs lowered for GPUs that are not here."""

import contextlib
import functools
import hashlib
import importlib
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import triton_toy
from jax._src.lib import gpu_triton
from triton_case import needs_plugin

import fdpp_jax.triton
from fdpp_jax.plans import device, installed

_PROGRAM = """
import hashlib, sys
from test_bridge import lowered
print(hashlib.sha256(lowered(sys.argv[1]).encode()).hexdigest())
"""


def lowered(arch):
    """A program that calls the toy and reads one of its results."""
    x, w = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128, 64), jnp.bfloat16)
    call = jax.jit(lambda x, w: triton_toy.product(x, w, arch=arch, num_stages=2)[0])
    platform = "rocm" if arch.startswith("gfx") else "cuda"
    return call.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@needs_plugin
@pytest.mark.parametrize("arch", ["sm_80", "sm_120", "gfx90a", "gfx942"])
def test_a_call_is_lowered_without_its_gpu(arch):
    text = lowered(arch)
    operations = set(re.findall(r"(?:stablehlo|mhlo)\.(\w+)(?= )", text)) - {"custom_call"}
    assert text.count("custom_call @triton_kernel_call_ffi(") == 1
    assert operations <= {"num_partitions", "num_replicas", "backend_config"}  # no zeros, and no copies
    assert "tensor<16x64xbf16>, tensor<1xi32>" in text


@needs_plugin
@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_what_is_updated_is_written_in_place(arch):
    """It has one buffer of its own, the donated one, and the kernel one pointer to it."""
    x, kept = jax.ShapeDtypeStruct((64,), jnp.bfloat16), jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    call = jax.jit(functools.partial(triton_toy.update, arch=arch), donate_argnums=1)
    platform = "rocm" if arch.startswith("gfx") else "cuda"
    text = call.trace(x, kept).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("custom_call @triton_kernel_call_ffi(") == 1
    alias = r"output_operand_alias<output_tuple_indices = \[1\], operand_index = 1, operand_tuple_indices = \[\]>"
    assert re.search(alias, text)
    assert "tf.aliasing_output = 1" in text or "jax.buffer_donor" in text
    assert "tensor<64xbf16>, tensor<3x64xbf16>" in text


@pytest.mark.gpu
def test_what_is_updated_on_a_gpu():
    x, kept = jnp.arange(64.0), jnp.ones((3, 64))
    before, after = jax.jit(functools.partial(triton_toy.update, arch="sm_80"), donate_argnums=1)(x, kept)
    assert before.tolist() == [1.0] * 64
    assert after.tolist() == [[1.0] * 64, list(range(64)), [1.0] * 64]


@needs_plugin
@pytest.mark.parametrize(
    ("arch", "running", "target", "number"),
    [
        ("sm_80", "cpu", None, 80),
        ("sm_80", "H200", None, 90),
        ("sm_80", "H200", "A100", 80),  # an export
        ("sm_86", "cpu", "L4", 89),
        ("sm_89", "A100", None, 89),
        ("sm_80", "MI300X", None, 80),
        ("sm_90", "B200", None, 90),  # which does not run sm_90a
        ("sm_90", "H200", None, 90),
    ],
)
def test_older_code_is_assembled_for_the_gpu_that_runs_it(arch, running, target, number, monkeypatch):
    made, make = [], gpu_triton.TritonKernel
    monkeypatch.setattr(gpu_triton, "TritonKernel", lambda *arguments: made.append(arguments) or make(*arguments))
    monkeypatch.setattr(device, "current", lambda: device.by_name(running))
    with contextlib.nullcontext() if target is None else fdpp_jax.target(target):
        lowered(arch)
    (arguments,) = made
    assert re.findall(r"\.target (sm_\d+)", str(arguments[4])) == [arch]  # the PTX
    assert arguments[6] == number


@needs_plugin
def test_the_arch_decides_what_is_compiled():
    assert lowered("sm_80") != lowered("sm_90")


@needs_plugin
def test_a_program_is_the_same_in_every_process_and_warns_of_nothing():
    """So that XLA finds it in its cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (os.path.dirname(__file__), *sys.path) if path)
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", _PROGRAM, "sm_80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == hashlib.sha256(lowered("sm_80").encode()).hexdigest()


def test_the_users_cache_of_triton_stays_where_it_is():
    program = "from fdpp_jax.triton import bridge; import os; print(os.environ.get('TRITON_CACHE_DIR'))"
    for folder in (None, "elsewhere"):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
        environment |= {} if folder is None else {"TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{folder}\n"


def test_missing_packages_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(installed, "refuse_triton", lambda: "no triton here: pip install it")
    with pytest.raises(ImportError, match=r"^no triton here: pip install it$"):
        importlib.reload(fdpp_jax.triton)


def test_a_missing_plugin_is_one_clear_error():
    program = """
import jax, types
from jax._src import lib
lib.gpu_triton = types.ModuleType("gpu_triton")
try:
    from fdpp_jax.triton import bridge
    bridge.call(print, results=(), grid=(1,), arch="sm_80", num_warps=4, num_stages=2)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'fdpp-jax[cuda13,triton]'" in done.stdout
    assert done.stdout.count("\n") == 1


@needs_plugin
def test_neither_derivative_nor_vmap_is_made_silently():
    x, w = jnp.zeros((16, 64), jnp.bfloat16), jnp.zeros((64, 64), jnp.bfloat16)
    call = functools.partial(triton_toy.product, arch="sm_80")
    with pytest.raises(NotImplementedError, match="differentiation"):
        jax.make_jaxpr(lambda x: jax.jvp(lambda x: call(x, w)[0], (x,), (x,)))(x)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.make_jaxpr(jax.vmap(call, (0, None)))(x[None], w)
