"""A process for each peer of a benchmark: one that crashes, hangs, raises or answers wrongly costs its own cell only.

A GPU fault ends a process's use of the GPU, so nothing less keeps the peers apart.
"""

import faulthandler
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

_ENDS_WITHIN_S = 30.0  # a killed process, whose memory on the GPU the driver takes back
_LEAVES_WITHIN_S = 5.0  # one that nobody asks any more


class RefusedError(Exception):
    """A peer does not take a case; the message says why."""


class WrongError(Exception):
    """A peer's answer is not the reference's."""


class FailedError(Exception):
    """What stands in a peer's cell instead of a time."""


def check(error: float, tolerance: float) -> None:
    """Raises WrongError unless the error of a peer's answer is within the tolerance; NaN is not."""
    if not error <= tolerance:
        raise WrongError(f"wrong: error {error:.2g}")


class PeerProcess:
    """An object in a process of its own, which starts at the first call, and anew after a failure."""

    def __init__(self, make: Callable[[], Any], timeout_s: float) -> None:
        """`make`, which can be pickled, makes the object; a call may take `timeout_s`, the start included."""
        self._make = make
        self._timeout_s = timeout_s
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(_LEAVES_WITHIN_S)
        self._end()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns.

        Raises:
          FailedError: It crashed, did not return in time, or raised.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(self._timeout_s):
                raise FailedError(f"timed out after {self._timeout_s:g} s")
            result, failure, goes_on = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(_ENDS_WITHIN_S)
            code = self._process.exitcode
            self._end()
            how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit {code})"
            raise FailedError(f"crashed{how}") from None
        except BaseException:
            self._end()
            raise
        if failure is not None:
            if not goes_on:
                self._end()
            raise FailedError(failure)
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make))
        self._process.start()
        theirs.close()  # so that its end is the pipe's

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(_ENDS_WITHIN_S)
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, make: Callable[[], Any]) -> None:
    """The peer's side: answers calls until one fails or nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the table's process ends this one
    os.dup2(2, 1)  # stdout is the table's
    faulthandler.enable()
    peer, goes_on = None, True
    while goes_on:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        result, failure = None, None
        try:
            peer = make() if peer is None else peer
            result = getattr(peer, method)(*arguments)
        except ModuleNotFoundError as error:
            failure = f"not installed: {error.name}"
        except RefusedError as refusal:
            failure = str(refusal)
        except Exception as error:  # whatever a peer raises is its cell
            text = (str(error).splitlines() or [""])[0]
            failure = text if isinstance(error, WrongError) else f"{type(error).__name__}: {text}"
            goes_on = False  # the GPU may have faulted, and then fails every call from here on
        pipe.send((result, failure, goes_on))
