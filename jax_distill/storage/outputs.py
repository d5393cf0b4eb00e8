"""Folders that a command makes: whole or not at all, by one process at a time."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.storage import disks, lease
from jax_distill.storage.files import FileError, is_address, partial_of, remove_leftovers


class Stopped(RuntimeError):
    """SIGTERM or SIGINT came while a folder was made; nothing of it is left."""


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Makes a folder that appears once the block has ended well, and not before.

    Remains of a dead process are removed first.

    Args:
      folder: to make; its parent is made if it is missing.

    Yields:
      An empty folder beside it, to be filled; removed if the block fails.

    Raises:
      ValueError: the folder exists, another process is making it, or the disk is full.
      Stopped: by a signal.
    """
    check_absent(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _stopping(), lease.of_output(folder):
            check_absent(folder)  # which another process may have made meanwhile
            remove_leftovers(folder)
            partial = partial_of(folder)
            partial.mkdir()
            try:
                yield partial
                _flush(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Interrupted:
        message = f"--output: '{folder}' was not made, by a signal; run the same command again"
        raise Stopped(message) from None
    except Exception as error:
        if (found := disks.full(error)) is None:
            raise
        what, fix = found
        message = f"--output: '{folder}': {what}; {fix} or choose another disk"
        raise FileError(message) from error


def check_absent(folder: Path) -> None:
    """Checks that a folder to make is not there yet, and is one of a disk.

    Raises:
      FileError: something does, or it is an address.
    """
    if is_address(folder):
        raise FileError(
            f"--output: '{folder}' is an address; give a path, such as in a mounted bucket"
        )
    if os.path.lexists(folder):
        raise FileError(f"--output: '{folder}' exists; remove it or choose another")


def _stopping() -> contextlib.AbstractContextManager:
    """Raises `Interrupted` at a signal, in the only thread that can."""
    if threading.current_thread() is threading.main_thread():
        return Signals(interrupt=True)
    return contextlib.nullcontext()


def _flush(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, where a rename alone would not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
