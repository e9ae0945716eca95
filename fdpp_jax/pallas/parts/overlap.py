"""Launches that overlap: a kernel may start while its predecessor ends (programmatic dependent launch).

Used by `decode_attention` and `fused_layer`.

Before it waits, a kernel must neither read what its predecessor writes nor write what its predecessor reads. Every
kernel waits before it lets its successor start, so at most two run at a time, and all earlier launches are done.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu


def await_predecessor(*, is_interpreted: bool) -> None:
    """Waits until the predecessor has ended and its writes are visible. Each thread that needs them must wait itself.

    A kernel that calls this may start before its predecessor ends, if the predecessor permits.
    """
    if not is_interpreted:
        plgpu.griddepcontrol_wait()


def let_successor_start(*, is_interpreted: bool) -> None:
    """Permits the successor to start once all CTAs have called this or ended. Call await_predecessor() first."""
    if not is_interpreted:
        plgpu.griddepcontrol_launch_dependents()
