"""`fdpp-jax info`: versions, the device, and which kernels it has."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdpp_jax._version import __version__
from fdpp_jax.cli.arguments import Commands, add_command
from fdpp_jax.cli.output import print_json, print_table

if TYPE_CHECKING:
    from fdpp_jax.plans.device import Device

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_EXAMPLES = "  fdpp-jax info\n  fdpp-jax info --json\n"
_ATTENTIONS = (("decode attention", "decode", 1), ("prefill attention", "prefill", 512))  # name, algorithm, queries
_MATMULS = (("flat matmul", "flat", 8), ("gemv", "gemv", 1))  # name, algorithm, rows


def add(commands: Commands) -> None:
    """Adds the command's parser."""
    parser = add_command(commands, "info", run, "show versions, the device, and which kernels it has", _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Prints versions, the device's figures and its kernels."""
    import importlib.metadata
    import platform

    import jax

    from fdpp_jax.plans import device

    versions = [("python", platform.python_version()), ("fdpp-jax", __version__)]
    versions += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    running = device.current()
    if args.json:
        kernels = [{"kernel": name, "available": why is None, "reason": why} for name, why in _kernels(running)]
        figures = dataclasses.asdict(running) | {"devices": len(jax.devices())}
        print_json({"versions": dict(versions), "device": figures, "kernels": kernels})
        return
    print_table("Versions", ("package", "version"), versions)
    figures = {"kind": running.kind, "devices": len(jax.devices()), "SMs or cores": running.num_sms}
    if running.is_gpu:
        figures |= {
            "architecture": running.arch,
            "shared memory a block": f"{running.smem_bytes >> 10} KiB",
            "last cache": f"{running.l2_bytes >> 20} MiB",
            "memory reads": f"{running.read_gbps:.0f} GB/s",
            "bfloat16 peak": f"{running.bf16_tflops:.0f} Tflop/s",
        }
    print_table("Device", ("what", "figure"), [(name, str(value)) for name, value in figures.items()])

    rows = [(name, "yes" if refusal is None else f"no: {refusal}") for name, refusal in _kernels(running)]
    print_table("Kernels", ("kernel", "available"), [*rows, ("XLA (xla)", "yes")])


def _kernels(running: "Device") -> Iterator[tuple[str, str | None]]:
    """The kernels of every backend that has some: the name, and why the kernel does not run, or None if it does."""
    from fdpp_jax.plans.backends import BACKENDS
    from fdpp_jax.plans.shapes import AttentionShape, LayerShape, MatmulShape

    # Of Llama-2-7B.
    layer = LayerShape(1, 4096, 11008, 32, 32, 128)
    for backend in BACKENDS:
        if not backend.architectures:  # plain XLA
            continue
        for name, algorithm, num_queries in _ATTENTIONS:
            if backend.attention is not None and algorithm in backend.attention.configs:
                shape = AttentionShape(1, num_queries, 1024, 32, 32, 128)
                yield f"{name} ({backend.name})", backend.attention.refuse(shape, running, algorithm)
        for name, algorithm, rows in _MATMULS:
            if backend.matmul is not None and algorithm in backend.matmul.configs:
                refusal = backend.matmul.refuse(MatmulShape(rows, 4096, 4096), running, algorithm)
                yield f"{name} ({backend.name})", refusal
        if backend.layer is not None:
            for algorithm in backend.layer.configs:
                yield f"{algorithm} layer ({backend.name})", backend.layer.refuse(layer, running, algorithm)
