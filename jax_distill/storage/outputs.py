"""Folders that a command makes: whole or not at all, by one process at a time."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from jax_distill.devices.processes import ALONE, Share
from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.storage import disks, lease
from jax_distill.storage.files import (
    FileError,
    is_address,
    partial_of,
    remove_leftovers,
    unfinished_of,
)


class Stopped(RuntimeError):
    """SIGTERM or SIGINT came while a folder was made; it is not there."""


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


@contextlib.contextmanager
def made_in_tries(folder: Path, share: Share = ALONE) -> Iterator[Path]:
    """Makes a folder that appears once the block has ended well; else what was done is kept.

    Several processes may make it together, on a disk that all of them see.

    Args:
      folder: to make; its parent is made if it is missing.
      share: of this process.

    Yields:
      The folder beside it that is filled; it holds what earlier tries have done, and is kept if the
      block fails, unless it is empty.

    Raises:
      ValueError: the folder exists, others are making it, or the disk is full.
      Stopped: by a signal.
    """
    what, unfinished = f"--output: '{folder}'", unfinished_of(folder)

    def begin() -> None:
        check_absent(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(lease.of_output(folder))
        check_absent(folder)  # which another process may have made meanwhile
        unfinished.mkdir(exist_ok=True)

    def end() -> None:
        _flush(unfinished)
        unfinished.rename(folder)

    try:
        with _stopping(each=True), contextlib.ExitStack() as held:
            share.first(begin, what)
            try:
                yield unfinished
                share.first(end, what)
            finally:
                with contextlib.suppress(OSError):  # not empty, or not there
                    unfinished.rmdir()
    except Interrupted:
        message = f"{what} is not finished, by a signal; run the same command to go on"
        raise Stopped(message) from None
    except Exception as error:
        if (found := disks.full(error)) is None:
            raise
        cause, fix = found
        message = f"{what} is not finished: {cause}; {fix} and run the same command to go on"
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


def _stopping(each: bool = False) -> contextlib.AbstractContextManager:
    """Raises `Interrupted` at a signal, in the only thread that can; see `Signals`."""
    if threading.current_thread() is threading.main_thread():
        return Signals(interrupt=True, each=each)
    return contextlib.nullcontext()


def _flush(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, where a rename alone would not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
