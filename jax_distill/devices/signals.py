"""Signals that end a process: noted, so that its work can end well."""

import os
import signal
import sys
import threading

from jax_distill.devices import processes


class Interrupted(BaseException):
    """SIGTERM or SIGINT came; the state is saved. No `Exception`, so that nothing swallows it."""


class Signals:
    """Notes SIGTERM and SIGINT instead of dying, so that a step can end and be saved.

    Of several processes, JAX notes SIGTERM, for all: see `processes.preempted`. SIGINT is made one.

    Args:
      interrupt: raise `Interrupted` at once instead: outside of steps there is nothing to save.
      each: of several processes, too, each notes its own signals.
    """

    def __init__(self, interrupt: bool = False, each: bool = False):
        self._interrupt, self._each = interrupt, each

    def __enter__(self) -> "Signals":
        self.received = False
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._again
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if processes.joined() and not self._each:
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        self._previous = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }
        return self

    def _note(self, number, frame) -> None:
        del number, frame
        self.received = True
        if self._interrupt:
            raise Interrupted("stopped by a signal")

    def _again(self, found) -> None:
        """Gives a signal once more that came while Python ran a finalizer, which swallows it."""
        if isinstance(found.exc_value, Interrupted):
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            self._unraisable(found)

    def __exit__(self, *exception) -> None:
        if sys.unraisablehook == self._again:
            sys.unraisablehook = self._unraisable
        for number, handler in self._previous.items():
            signal.signal(number, handler)
