"""Ends a run whose disk is full with one sentence, whoever was writing.

Orbax, TensorStore and TensorBoard's writer write in threads of their own. What fails there is
raised in the main thread later on; what they print meanwhile, once for each of hundreds of arrays,
says no more.
"""

import contextlib
import gc
import inspect
import logging as standard_logging
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging

from jax_distill.devices import processes
from jax_distill.storage import disks, paths
from jax_distill.storage.files import FileError
from jax_distill.training import checkpoint

PACKAGE = str(Path(__file__).parents[1])
_PATIENCE = 30.0  # seconds for a save that fails, to end
_WRITERS = ("/orbax/", "/clu/", "/asyncio/")


@contextlib.contextmanager
def explained(workdir: Path) -> Iterator[None]:
    """Ends a block whose disk is full, or fails, with a sentence that names the last checkpoint.

    Half a checkpoint that could not be written is removed.

    Raises:
      FileError: the disk takes no more.
    """
    loud = _quiet_writers()
    try:
        yield
    except Exception as error:
        found = disks.full(error) or _other(error)
        if found is None:
            loud()
            raise
        sentence = _sentence(workdir, *found)
        for cause in disks.chain(error):  # lets go of writes that were abandoned
            cause.__traceback__ = None
    except BaseException:
        loud()
        raise
    else:
        loud()
        return
    gc.collect()
    raise FileError(sentence)  # and what writes on stays quiet, until the process ends


def _other(error: Exception) -> tuple[str, str] | None:
    """Likewise of another error of the system that a library has wrapped; that of a device is none.

    Errors of the system themselves, and our own, say what they are of.
    """
    frames = traceback.extract_tb(error.__traceback__)
    known = isinstance(error, OSError) or frames[-1].filename.startswith(PACKAGE)
    if known or any(isinstance(found, jax.errors.JaxRuntimeError) for found in disks.chain(error)):
        return None
    if (reason := disks.of_system(error)) is None:
        return None
    return f"it cannot be written ({reason})", "mend that"


def _sentence(workdir: Path, what: str, fix: str) -> str:
    folders = [workdir / "checkpoints", workdir / "time_rescale" / "checkpoints"]
    if not (processes.joined() or paths.is_bucket(workdir)):
        for thread in threading.enumerate():  # one that still writes would make it anew
            if type(thread).__module__.startswith("orbax."):
                threading.Thread.join(thread, _PATIENCE)  # Orbax's own raises
        for half in [half for folder in folders for half in folder.glob("*.orbax-checkpoint-tmp")]:
            shutil.rmtree(half, ignore_errors=True)
    good = "none yet"
    for stage in (workdir, workdir / "time_rescale"):
        with contextlib.suppress(ValueError, OSError):
            good = f"'{stage / 'checkpoints' / str(checkpoint.complete_steps(stage)[0])}'"
            break
    return (
        f"--workdir: '{workdir}': {what}; last good checkpoint: {good}; {fix} and run the same"
        " command to go on"
    )


def _quiet_writers() -> Callable[[], None]:
    """Keeps the terminal clear of what threads that write print of errors that they raise too.

    Returns:
      A function that ends that.
    """

    def shown(record: standard_logging.LogRecord) -> bool:
        return not any(part in record.pathname for part in _WRITERS)

    def unraisable(found) -> None:
        closed = isinstance(found.exc_value, RuntimeError) and "loop is closed" in str(
            found.exc_value
        )
        if not (closed or inspect.iscoroutine(found.object)):
            previous(found)

    previous, sys.unraisablehook = sys.unraisablehook, unraisable
    handler = logging.get_absl_handler()
    handler.addFilter(shown)

    def loud() -> None:
        handler.removeFilter(shown)
        sys.unraisablehook = previous

    return loud
