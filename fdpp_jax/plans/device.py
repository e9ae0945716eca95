"""What the heuristics need to know about a device: published figures by name, or the running one.

Memory bandwidth decides memory- or compute-bound, the number of SMs decides split counts, and the shared
memory of one block decides ring depths. Nothing here starts a GPU; `current` asks JAX which device it has, and `target`
names one that JAX need not have.
"""

import contextlib
import dataclasses
import functools
import os
import re

import jax

from fdpp_jax.plans import installed

_KIB = 1024
_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """Figures of one device.

    Args:
      kind: Name, as in `by_name` or as JAX reports it.
      arch: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120" (NVIDIA), "gfx90a", "gfx942" (AMD), else JAX's
        platform name: "cpu".
      num_sms: Streaming multiprocessors (NVIDIA), compute units (AMD), cores (CPU).
      smem_bytes: Shared memory (LDS) that one block can use.
      l2_bytes: Last cache before memory; a buffer must be larger for its reads to be memory reads.
      read_gbps: Memory bandwidth, 10^9 bytes/s: the vendor's figure, except where measured.
      bf16_tflops: Dense bfloat16 matrix-unit peak with float32 accumulation, 10^12 flop/s.
      why_no_triton: Of a device that runs here: what Triton kernels lack here. None: nothing, or the device is named,
        and another machine's.
      only_backend: Name of the one backend whose kernels are planned for it, beside plain XLA; see `backends.only`.
        None: all of them.
    """

    kind: str
    arch: str
    num_sms: int
    smem_bytes: int
    l2_bytes: int
    read_gbps: float
    bf16_tflops: float
    why_no_triton: str | None = None
    only_backend: str | None = None

    @property
    def is_nvidia(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.arch.startswith("sm_")

    @property
    def is_gpu(self) -> bool:
        """Whether it is an NVIDIA or AMD GPU."""
        return self.is_nvidia or self.arch.startswith("gfx")

    @property
    def compute_capability(self) -> int:
        """NVIDIA's compute capability without the dot (90 for Hopper), 0 for anything else."""
        return int(self.arch.removeprefix("sm_")) if self.is_nvidia else 0

    @property
    def platform(self) -> str:
        """JAX's name of the platform for which programs are lowered: "cuda", "rocm", "cpu", ..."""
        return "cuda" if self.is_nvidia else "rocm" if self.is_gpu else self.arch

    @property
    def ridge(self) -> float:
        """Roofline ridge: a kernel that does more flop a byte than this is compute-bound."""
        return self.bf16_tflops * 1e3 / self.read_gbps

    def smem_bytes_shared(self, num_blocks: int) -> int:
        """Shared memory one block can use when `num_blocks` of them share an SM."""
        # CUDA reserves 1 KiB a block; smem_bytes is the SM's capacity less one such KiB.
        return (self.smem_bytes + _KIB) // num_blocks - _KIB


# Sources: NVIDIA's data sheets and architecture white papers (SXM boards where there are any; SM counts, L2, bandwidth,
# dense bf16 with float32 sums), the CUDA programming guide's table of compute capabilities (shared memory a block),
# AMD's CDNA2 and CDNA3 white papers and data sheets. B200: one of the eight of an HGX B200, whose two dies act as one.
# Of an architecture, the first is taken for those that are not known.
_KNOWN = {
    device.kind: device
    for device in (
        Device("A100", "sm_80", 108, 163 * _KIB, 40 * _MIB, 2039.0, 312.0),  # 80 GB, HBM2e
        Device("A100-40GB", "sm_80", 108, 163 * _KIB, 40 * _MIB, 1555.0, 312.0),  # HBM2
        Device("A30", "sm_80", 56, 163 * _KIB, 24 * _MIB, 933.0, 165.0),
        Device("A10", "sm_86", 72, 99 * _KIB, 6 * _MIB, 600.0, 125.0),
        Device("A40", "sm_86", 84, 99 * _KIB, 6 * _MIB, 696.0, 149.7),
        # GeForce boards add up in float32 at half the rate: GA102, Ada and Blackwell RTX white papers, appendix A.
        Device("RTX 3090", "sm_86", 82, 99 * _KIB, 6 * _MIB, 936.0, 71.0),
        Device("L40S", "sm_89", 142, 99 * _KIB, 96 * _MIB, 864.0, 362.0),
        Device("L4", "sm_89", 58, 99 * _KIB, 48 * _MIB, 300.0, 121.0),
        Device("RTX 4090", "sm_89", 128, 99 * _KIB, 72 * _MIB, 1008.0, 165.2),
        Device("H100", "sm_90", 132, 227 * _KIB, 50 * _MIB, 3350.0, 989.4),  # 80 GB
        # 4.8 TB/s on paper; 4.43 TB/s is what a plain sum over 512 MB reads (H200, November 2026).
        Device("H200", "sm_90", 132, 227 * _KIB, 50 * _MIB, 4430.0, 989.4),
        Device("B200", "sm_100", 148, 227 * _KIB, 126 * _MIB, 8000.0, 2250.0),
        Device("RTX 5090", "sm_120", 170, 99 * _KIB, 96 * _MIB, 1792.0, 209.5),
        Device("MI210", "gfx90a", 104, 64 * _KIB, 8 * _MIB, 1638.4, 181.0),
        # One of the board's two dies (GCD), which is what JAX sees as a device: half the board's figures.
        Device("MI250", "gfx90a", 104, 64 * _KIB, 8 * _MIB, 1638.4, 181.0),
        Device("MI250X", "gfx90a", 110, 64 * _KIB, 8 * _MIB, 1638.4, 191.5),
        # The last cache is the 256 MiB Infinity Cache, not the 4 MiB of L2 in each die.
        Device("MI300X", "gfx942", 304, 64 * _KIB, 256 * _MIB, 5300.0, 1307.4),
        # A nominal laptop: no decision depends on these figures, since no kernel runs on a CPU.
        Device("cpu", "cpu", 8, 0, 16 * _MIB, 50.0, 1.0),
    )
}


def names() -> tuple[str, ...]:
    """Names that `by_name` knows."""
    return tuple(_KNOWN)


def by_name(name: str) -> Device:
    """The device called `name`, in upper or lower case.

    Raises:
      ValueError: The name is unknown; the message lists the known ones.
    """
    for known in _KNOWN.values():
        if known.kind.lower() == name.lower():
            return known
    raise ValueError(f"unknown device {name!r}; known are {', '.join(_KNOWN)}")


def resolve(device: Device | str) -> Device:
    """`device` itself, or the one of that name."""
    return by_name(device) if isinstance(device, str) else device


def current() -> Device:
    """The device that JAX runs on now: `jax_default_device` where it is set, else `jax.devices()[0]`.

    Raises:
      ValueError: JAX has no device of the platforms that it was told to use.
    """
    chosen = jax.config.jax_default_device
    try:
        if isinstance(chosen, str):
            chosen = jax.devices(chosen)[0]
        return from_jax(chosen if chosen is not None else jax.devices()[0])
    except (RuntimeError, AssertionError) as error:  # JAX asserts where JAX_PLATFORMS names what has no plugin
        platforms = chosen if isinstance(chosen, str) else jax.config.jax_platforms
        raise ValueError(
            f"expected a platform that JAX has here, got {platforms!r}, by JAX_PLATFORMS or jax_default_device; an "
            "NVIDIA GPU needs pip install 'fdpp-jax[cuda13]'"
        ) from error


_target = jax.make_user_context(default_value=None)


def target(device: Device | str) -> contextlib.AbstractContextManager[None]:
    """Within it, calls that are lowered for the platform of a device are planned for that device.

    Elsewhere they are planned for the first device that JAX has of the platform. What is lowered for other platforms is
    planned as ever, so that one export can serve several. `jax.jit` traces anew where the target has changed. The
    decode step of a model is planned where it is traced: within a target it is for that device alone.

        with fdpp_jax.target("H100"):
            exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda"))(*arguments)

    Args:
      device: The name of a known device, or a Device.

    Returns:
      A context manager.

    Raises:
      ValueError: The name is unknown; the message lists the known ones.
    """
    found: contextlib.AbstractContextManager[None] = _target(resolve(device))
    return found


def planned() -> Device:
    """The device for which calls are planned that are traced now: that of `target`, else `current`."""
    return _target.value or current()


def lowered_for(platform: str, device: Device) -> Device | None:
    """The device for which a call is planned that is lowered for a platform.

    Args:
      platform: "cpu", "cuda", "rocm", ...
      device: The one for which the call was traced (`planned`), which counts if it is of that platform.

    Returns:
      It, or the first that JAX has of the platform. None: JAX has none.
    """
    return device if device.platform == platform else _first_of(platform)


@functools.cache
def _first_of(platform: str) -> Device | None:
    try:
        return from_jax(jax.devices(platform)[0])
    except RuntimeError:  # how JAX says that there is none
        return None


def from_jax(device: jax.Device) -> Device:
    """The figures of a JAX device.

    A GPU that is not known by name, or that has another number of SMs (a MIG slice, a PCIe board), takes
    the figures of the nearest known one, bandwidth and peak scaled by the number of SMs: an estimate.
    """
    if device.platform not in ("gpu", "cuda", "rocm"):
        num_cores = os.cpu_count() or 1
        return dataclasses.replace(_KNOWN["cpu"], kind=device.device_kind, arch=device.platform, num_sms=num_cores)
    arch = _arch(str(getattr(device, "compute_capability", "")))
    reported_sms = getattr(device, "core_count", None)
    named = [known for known in _named_in(device.device_kind) if known.arch == arch]
    # One name may stand for two boards: "AMD Instinct MI250X / MI250".
    base = next((known for known in named if known.num_sms == reported_sms), named[0] if named else _nearest(arch))
    num_sms = int(reported_sms) if reported_sms else base.num_sms
    why_no_triton = installed.refuse_triton(arch)
    if base in named and num_sms == base.num_sms:
        return base if why_no_triton is None else dataclasses.replace(base, why_no_triton=why_no_triton)
    share = num_sms / base.num_sms
    return Device(
        kind=device.device_kind,
        arch=arch,
        num_sms=num_sms,
        smem_bytes=base.smem_bytes,
        l2_bytes=base.l2_bytes,
        read_gbps=base.read_gbps * share,
        bf16_tflops=base.bf16_tflops * share,
        why_no_triton=why_no_triton,
    )


def _arch(capability: str) -> str:
    """ "9.0" -> "sm_90", "gfx942:sramecc+" -> "gfx942". A GPU that says nothing is taken for an old NVIDIA one."""
    if capability.startswith("gfx"):
        return capability.split(":")[0]
    return "sm_" + capability.replace(".", "") if capability else "sm_0"


def _named_in(device_kind: str) -> list[Device]:
    """The known GPUs whose names' words are all among those of `device_kind`, the longest name first.

    "NVIDIA A100-SXM4-40GB" is an A100-40GB and an A100, and no A10.
    """
    words = set(_words(device_kind))
    found = [known for known in _KNOWN.values() if known.is_gpu and words.issuperset(_words(known.kind))]
    return sorted(found, key=lambda known: -len(_words(known.kind)))


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", text)


def _nearest(arch: str) -> Device:
    """The first known device of that architecture, else the newest older one, else the smallest (by vendor)."""
    gpus = [known for known in _KNOWN.values() if known.is_gpu]
    same = [known for known in gpus if known.arch == arch]
    if same:
        return same[0]
    if arch.startswith("gfx"):
        return _KNOWN["MI210"]
    capability = int(arch.removeprefix("sm_"))
    older = [known for known in gpus if known.is_nvidia and known.compute_capability <= capability]
    return max(older, key=lambda known: known.compute_capability, default=_KNOWN["A10"])
