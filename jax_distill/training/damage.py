"""Which checkpoint is whole: damage, another state, and errors that pass are told apart.

Damaged are wrong checksums, files that are missing, and files that can be read and do not hold what
they should. All else says nothing about a checkpoint, which is then tried again, and kept.
"""

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from jax_distill.devices import processes
from jax_distill.storage import disks

T = TypeVar("T")

PAUSES = (0.5, 2.0, 5.0)
"""Seconds between tries to read."""


class Changed(ValueError):
    """A checkpoint does not hold what was saved; all processes find so."""


class Other(ValueError):
    """A checkpoint holds a state of other arrays than are asked for; the message names one."""


class Unreadable(ValueError):
    """A checkpoint cannot be read for now, which says nothing about what it holds."""


class _Damaged(Exception):
    """A checkpoint is damaged; the message says how."""


def first_whole(
    directory: Path,
    steps: Sequence[int],
    restore: Callable[[int], T],
    check_itself: Callable[[int], None] = lambda step: None,
) -> tuple[int, T]:
    """The first step that `restore` makes something of, and what; warns of damaged ones.

    Args:
      directory: of the checkpoints.
      steps: in the order in which they are tried.
      restore: reads one; raises `Changed` or `Other`, or whatever libraries raise.
      check_itself: reads one that holds another state, and raises if it is damaged.

    Raises:
      Unreadable: a passing error did not pass.
      ValueError: all are damaged; one holds another state; or one of several processes could not
        read its part, which the others, who wait for it, do not know.
    """
    failures = []
    for step in steps:
        folder = directory / str(step)
        try:
            restored = _restored(folder, lambda step=step: restore(step))
        except Other as error:
            if not processes.joined():
                try:
                    _restored(folder, lambda step=step: check_itself(step))
                except _Damaged as damaged:
                    failures.append((step, str(damaged)))
                    continue
            raise ValueError(
                f"'{folder}' holds another state: {error}; it is kept: go on with the configuration"
                " that made it, or start again in another --workdir"
            ) from None
        except _Damaged as error:
            failures.append((step, str(error)))
            continue
        for damaged, reason in failures:
            where = directory / str(damaged)
            logging.warning("%s is damaged (%s); going back to step %d", where, reason, step)
        return step, restored
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in failures)
    raise ValueError(
        f"'{directory}': no checkpoint can be restored ({reasons}); start again in another"
        " --workdir"
    )


def _restored(folder: Path, restore: Callable[[], T]) -> T:
    """Restores a checkpoint, and tries again where that may help.

    Raises:
      Other: as `restore` does.
      _Damaged: the checkpoint is damaged.
      Unreadable or ValueError: as `first_whole`.
    """
    pauses = list(PAUSES)
    damaged = False
    while True:
        with _quiet_failures():
            try:
                return restore()
            except (Other, Changed) as error:
                found = error
            except Exception as error:  # Orbax and TensorStore raise all kinds
                found = _without_frames(error)
            gc.collect()
        if isinstance(found, Other):
            raise found
        if isinstance(found, Changed):
            raise _Damaged(str(found))
        passing = _passing(found, folder)
        reason = disks.reason(passing or found)
        if processes.joined():
            # The others are in the midst of reading: they cannot begin again with this one.
            what = "cannot be read for now" if passing else "is damaged"
            fix = "it is kept: run" if passing else "move it elsewhere and run"
            raise ValueError(
                f"'{folder}' {what} ({reason}); {fix} the same command again in all processes"
            )
        if passing is None:
            if damaged:
                raise _Damaged(reason)
            damaged = True  # which is believed when it is found twice
            time.sleep(PAUSES[0])
        elif pauses:
            time.sleep(pauses.pop(0))
        else:
            raise Unreadable(
                f"'{folder}' cannot be read for now ({reason}); it is kept: mend that and run the"
                " same command again"
            )


def _passing(error: Exception, folder: Path) -> Exception | None:
    """The error that keeps a checkpoint from being read and may pass; None where it is damaged."""
    if disks.passing(error):
        return error
    try:
        if not folder.is_dir():
            return FileNotFoundError(f"'{folder}' is gone")
        disks.read_all(folder)
    except Exception as plain:
        if not (isinstance(plain, OSError) or disks.of_network(plain)):
            raise
        return plain if disks.passing(plain) else None
    return None


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """How a state's arrays differ from those that are asked for; "" if they do not.

    Args:
      found, wanted: what has a shape and a dtype, by name.
    """
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            return f"it has {name}, which is not asked for"
        if name not in found:
            return f"it has no {name}"
        there, here = found[name], wanted[name]
        if tuple(there.shape) != tuple(here.shape):
            return f"{name} has shape {tuple(there.shape)} there and {tuple(here.shape)} here"
        if there.dtype != here.dtype:
            return f"{name} is {there.dtype} there and {here.dtype} here"
    return ""


def _without_frames(error: Exception) -> Exception:
    """The error without what its frames hold: reads under way, and arrays."""
    for found in list(disks.chain(error)):
        found.__traceback__ = None
    return error


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Keeps the terminal clear of the reads that Orbax abandons when one of them fails."""

    def unraisable(found) -> None:
        if not isinstance(found.exc_value, Exception):  # a signal
            previous(found)

    previous, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines never awaited
            yield
    finally:
        sys.unraisablehook = previous
