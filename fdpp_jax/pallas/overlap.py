"""Launches that overlap: a kernel may be started while the one before it ends (programmatic dependent launch).

What it does before it waits may neither read what the kernel before writes nor write what that one reads. Since every
kernel waits before it lets the next one start, no more than two run at a time, and what was launched earlier is done.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu


def await_predecessor(*, is_interpreted: bool) -> None:
    """Waits until the kernel before has ended and all that it wrote is there; each thread that needs it waits itself.

    A kernel that holds this is launched early if the one before allows it.
    """
    if not is_interpreted:
        plgpu.griddepcontrol_wait()


def let_successor_start(*, is_interpreted: bool) -> None:
    """Allows the next kernel to start, once all CTAs of this one have said so or ended; after await_predecessor()."""
    if not is_interpreted:
        plgpu.griddepcontrol_launch_dependents()
