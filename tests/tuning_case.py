"""Tables of an H200 that were measured by a fake timer, for the tests of tuning and of tables."""

import dataclasses
import zlib

from fdpp_jax.bench import tuning
from fdpp_jax.bench.tuning import Measured
from fdpp_jax.plans import device, tables
from fdpp_jax.plans.hopper_matmul import FlatMatmulConfig
from fdpp_jax.plans.shapes import MatmulShape
from fdpp_jax.plans.tables import Entry, Run, Table

H200 = device.by_name("H200")
DEVICE = dataclasses.asdict(H200) | {"jax_kind": "NVIDIA H200"}
RUN = Run("2026-11-23T10:00:00+00:00", {"fdpp_jax": "0.1.0", "jax": "0.11.2"}, "abc")
FLAT = FlatMatmulConfig(99, 128, 64, 3)  # by no rule
SHAPE = MatmulShape(8, 4096, 12288, w_order="nk")


def empty_directories(tmp_path, monkeypatch):
    """Where the shipped tables and the user's lie: nothing is in them."""
    found = {"shipped": tmp_path / "shipped", "user": tmp_path / "user"}
    monkeypatch.setattr(tables, "SHIPPED_DIRECTORY", found["shipped"])
    monkeypatch.setenv("FDPP_TUNED_DIR", str(found["user"]))
    return found


def entry(m=8, k=4096, n=12288, config=FLAT, dtype="bfloat16", run=RUN):
    """An entry that flat wins, or XLA without a config."""
    times = {"xla": 30.0 if config else 10.0, "flat": 20.0}
    chosen = "flat" if config else "xla"
    return Entry(MatmulShape(m, k, n, dtype, "nk"), chosen, 15.0, times, {"flat": config or FLAT}, run)


def write(directory, *entries, kind="H200"):
    path = directory / tables.file_name(kind)
    tables.save(Table(DEVICE | {"kind": kind}, entries), path)
    return path


def make_timer(us):
    """A timer of us(weight, job) microseconds; None: the kernel fails. The floor is 10."""

    def of_weight(weight, dtype):
        def measure(jobs, rounds):
            times = {job: us(weight, job) for job in jobs}
            failures = {job: "XlaRuntimeError: no" for job, time in times.items() if time is None}
            return Measured(10.0, {job: time for job, time in times.items() if time is not None}, failures)

        return measure

    return of_weight


def any_time(weight, job):
    """Some time or other: all candidates win somewhere."""
    return 1.0 + zlib.crc32(f"{weight} {job.name}".encode()) % 1000


def tune(weights, us, gpu=H200, **options):
    """The table, and the labels of what was measured."""
    table, done = Table(DEVICE | {"kind": gpu.kind}), []
    for step in tuning.tune(weights, "bfloat16", gpu, table, RUN, make_timer=make_timer(us), **options):
        table = step.table
        done.append(step.weight.label)
    return table, done
