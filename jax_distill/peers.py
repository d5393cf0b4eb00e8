"""A process of several that is lost ends the others with one sentence."""

import os
import re
import subprocess
import sys

import jax

from jax_distill import disks, lost_report

_SIGNS = re.compile(
    r"CoordinationService|heartbeat|Gloo|Barrier failed|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|[Cc]onnection (?:reset|closed|refused)|Broken pipe|Socket closed|preempted"
)
_STATUS = re.compile(r"[A-Z]+(?:_[A-Z]+)*: ")


def end_if_lost(error: Exception) -> None:
    """Ends this one of several processes, if the error comes of another that is lost."""
    if jax.distributed.is_initialized() and is_of_lost(error):
        os.write(2, f"{lost_report.LOST}\n".encode())
        os._exit(1)


def is_of_lost(error: Exception) -> bool:
    """Whether JAX raised an error because another process did not answer."""
    return any(_of_jax(found) and _SIGNS.search(str(found)) for found in disks.chain(error))


def _of_jax(error: BaseException) -> bool:
    """Whether XLA raised it: ValueErrors of a program that is called begin with their status."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return type(error) is ValueError and _STATUS.match(str(error)) is not None


def shorten_reports() -> None:
    """Makes JAX's reports of a lost process one sentence on stderr, from now on.

    What this process writes to file descriptor 2, and what those write that it starts, goes through
    `lost_report`, in a process of its own: the report is written from C++ while this one aborts.
    (JAX takes a callback in its place, but its bindings cannot call one of Python; with
    `jax_enable_recoverability` the loss of process 0 is fatal as before.) Where there is no stderr,
    or nothing can be started, reports are as they were.
    """
    try:
        os.fstat(2)
    except OSError:
        return
    reading, writing = os.pipe()
    try:
        command = [sys.executable, "-I", "-S", lost_report.__file__]
        # In a session of its own, signals of the terminal do not reach it.
        copier = subprocess.Popen(
            command, stdin=reading, stdout=subprocess.PIPE, cwd="/", start_new_session=True
        )
        with copier.stdout:
            if copier.stdout.readline():
                os.dup2(writing, 2)
    except OSError:
        pass
    finally:
        os.close(reading)
        os.close(writing)
