"""Peers of a benchmark that fail in every way, and a good one. Each is made in a process of its own."""

import os
import threading

FLOOR_US = 2.0


class Good:
    """Takes three microseconds, or milliseconds."""

    def prepare(self, case):
        pass

    def sample(self):
        return 3.0

    def measure(self, case):
        return 3.0


class Floor(Good):
    def warm_up(self):
        pass

    def sample(self):
        return {"sum": FLOOR_US, "mv": FLOOR_US + 1}


class Crashes(Good):
    def prepare(self, case):
        os.abort()

    measure = prepare


class CrashesAtFirst(Good):
    """With one sequence."""

    def prepare(self, case):
        if case.batch == 1:
            os.abort()


class CrashesLate(Good):
    def sample(self):
        os._exit(3)


class Hangs(Good):
    def prepare(self, case):
        threading.Event().wait()

    measure = prepare


class AnswersWrongly(Good):
    def prepare(self, case):
        from peer_process import check

        check(0.31, tolerance=0.02)

    measure = prepare


class AnswersNaN(Good):
    def prepare(self, case):
        from peer_process import check

        check(float("nan"), tolerance=0.02)


class Refuses(Good):
    def prepare(self, case):
        from peer_process import RefusedError

        raise RefusedError("one sequence only")


class Raises(Good):
    def prepare(self, case):
        raise ValueError("no plan\nfor this")


class IsNotInstalled(Good):
    def prepare(self, case):
        import no_such_peer  # noqa: F401

    measure = prepare


class Counts(Good):
    """The calls of its process."""

    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1
        return self.calls
