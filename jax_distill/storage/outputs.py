"""Files and folders that a command makes: whole or not at all, folders by one process at a time."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax_distill.devices.processes import ALONE, Share
from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.storage import buckets, disks, lease, paths
from jax_distill.storage.files import (
    UNFINISHED,
    FileError,
    partial_of,
    remove_leftovers,
    unfinished_of,
)
from jax_distill.storage.places import check_beside, check_new_folder

DESCRIPTIONS = ("dataset.json", "ported.json", "model_index.json", "README.md")
"""Files that say what is in a folder, which are written into a bucket after all others."""


class Stopped(RuntimeError):
    """SIGTERM or SIGINT came while a folder was made; it is not there."""


def check_output(path: str | Path, endings: Sequence[str] = (), *, name: str = "--output") -> None:
    """Checks that a file can be written, before the work is done; leaves nothing there.

    Args:
      path: of the file; folders that are missing are made when it is written.
      endings: that its name may have, such as ".png"; any by default.
      name: of the flag, for the message.

    Raises:
      FileError: it has another ending, there is something else, or its folder cannot be written.
    """
    text = str(path)
    try:
        path = paths.path(path)
    except paths.NoBucket as error:
        raise FileError(f"{name}: {error}") from None
    if not path.name or endings and path.suffix.lower() not in endings:
        wanted = " or ".join(f"*{ending}" for ending in endings) or "a file"
        raise FileError(f"{name}: '{text}' has the wrong ending; name the file {wanted}")
    if paths.is_bucket(path):
        return _check_object(path, name)
    try:
        taken = os.path.lexists(path) and not path.is_file()
    except (OSError, ValueError):  # of its name or its folder, which are looked at next
        taken = False
    if taken:
        raise FileError(f"{name}: '{text}' exists and is no regular file; choose another")
    check_beside(path, name)


def _check_object(path: Path, name: str) -> None:
    """As `check_output`, of an object of a bucket."""
    try:
        buckets.check_bucket(path)
        taken = path.is_dir()
    except Exception as error:
        if not (isinstance(error, OSError) or disks.of_network(error)):
            raise
        raise FileError(
            f"{name}: '{path}' cannot be written ({disks.reason(error)}); mend that, or give"
            " another path"
        ) from None
    if taken:
        raise FileError(f"{name}: '{path}' exists and is a folder; choose another")


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Makes a folder that appears once the block has ended well, and not before.

    Remains of a dead process are removed first. A folder of a bucket is made in the temporary
    folder of this host and copied then; while it is copied, it has an object `files.UNFINISHED`,
    which readers refuse.

    Args:
      folder: to make; its parent is made if it is missing.

    Yields:
      An empty folder, beside it or on a disk of this host, to be filled; removed if the block
      fails.

    Raises:
      ValueError: the folder exists or cannot be made there, another process is making it, or the
        disk is full.
      Stopped: by a signal.
    """
    check_new_folder(folder)
    check_absent(folder)
    what = f"--output: '{folder}'"
    stopped = f"{what} was not made, by a signal; run the same command again"
    with _told(stopped, what, "or choose another disk"):
        paths.make_folder(folder.parent)
        with _stopping(), lease.of_output(folder):
            check_absent(folder)  # which another process may have made meanwhile
            with _in_bucket(folder) if paths.is_bucket(folder) else _on_disk(folder) as partial:
                yield partial


@contextlib.contextmanager
def made_in_tries(folder: Path, share: Share = ALONE) -> Iterator[Path]:
    """Makes a folder that appears once the block has ended well; else what was done is kept.

    Several processes may make it together, on a disk that all of them see or in a bucket. A folder
    of a bucket is filled in its place; readers refuse it by an object `files.UNFINISHED` in it.

    Args:
      folder: to make; its parent is made if it is missing.
      share: of this process.

    Yields:
      The folder that is filled, beside it or in the bucket; it holds what earlier tries have done,
      and is kept if the block fails, unless it is empty.

    Raises:
      ValueError: the folder exists or cannot be made there, others are making it, or the disk is
        full.
      Stopped: by a signal.
    """
    check_new_folder(folder)
    what, bucket = f"--output: '{folder}'", paths.is_bucket(folder)
    unfinished = folder if bucket else unfinished_of(folder)

    def begin() -> None:
        check_absent(folder)
        paths.make_folder(folder.parent)
        held.enter_context(lease.of_output(folder))
        check_absent(folder)  # which another process may have made meanwhile
        if bucket:
            (folder / UNFINISHED).write_bytes(b"")
        else:
            unfinished.mkdir(exist_ok=True)

    def end() -> None:
        if bucket:
            (folder / UNFINISHED).unlink()
        else:
            _flush(unfinished)
            unfinished.rename(folder)

    with _going_on(what), _stopping(each=True), contextlib.ExitStack() as held:
        share.first(begin, what)
        try:
            yield unfinished
            share.first(end, what)
        finally:
            if not bucket:
                with contextlib.suppress(OSError):  # not empty, or not there
                    unfinished.rmdir()
            elif share.leads:
                _forget_empty(folder)


@contextlib.contextmanager
def _told(stopped: str, what: str, then: str) -> Iterator[None]:
    """Says in a sentence how making an output ended: by a signal, or by a disk that is full.

    Args:
      stopped: the sentence after a signal.
      what: begins that of a full disk.
      then: ends it, after how to make room.
    """
    try:
        yield
    except Interrupted:
        raise Stopped(stopped) from None
    except Exception as error:
        if (found := disks.full(error)) is None:
            raise
        cause, fix = found
        raise FileError(f"{what}: {cause}; {fix} {then}") from error


def _going_on(what: str) -> contextlib.AbstractContextManager:
    what, again = f"{what} is not finished", "run the same command to go on"
    return _told(f"{what}, by a signal; {again}", what, f"and {again}")


def _forget_empty(folder: Path) -> None:
    """Removes the mark of a folder in a bucket that has nothing else in it."""
    with contextlib.suppress(OSError):
        if [path.name for path in buckets.objects(folder)] == [UNFINISHED]:
            (folder / UNFINISHED).unlink()


@contextlib.contextmanager
def filled_in_tries(folder: Path, share: Share = ALONE) -> Iterator[None]:
    """Fills a folder whose files are seen at once, each whole; what was done is kept.

    Several processes may fill it together, in a place that all of them see.

    Args:
      folder: is made if it is missing, and removed again if nothing was put into it.
      share: of this process.

    Raises:
      ValueError: others are filling it, it is a file, or the disk is full.
      Stopped: by a signal.
    """
    what = f"--output: '{folder}'"

    def begin() -> None:
        if paths.is_bucket(folder):
            try:
                buckets.check_bucket(folder)
            except FileNotFoundError as error:
                raise FileError(f"{what}: {error}; make it or choose another") from None
        elif os.path.lexists(folder) and not folder.is_dir():
            raise FileError(f"{what} is a file; give a folder")
        held.enter_context(lease.of_folder(folder, "--output"))

    with _going_on(what), _stopping(each=True), contextlib.ExitStack() as held:
        share.first(begin, what)
        yield


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder to fill, removed at the end, and what dead processes have left of such before."""
    remove_leftovers(folder)
    partial = partial_of(folder)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _on_disk(folder: Path) -> Iterator[Path]:
    with _partial(folder) as partial:
        yield partial
        _flush(partial)
        partial.rename(folder)


@contextlib.contextmanager
def _in_bucket(folder: Path) -> Iterator[Path]:
    with _partial(staged(folder)) as partial:
        yield partial
        _upload(partial, folder)


def staged(path: Path) -> Path:
    """Where this host makes a folder or a file of a bucket."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir(), f"jax_distill-{digest}-{path.name}")


def _upload(made: Path, folder: Path) -> None:
    """Copies a folder that is made to its place in a bucket, where readers refuse it until then."""
    (folder / UNFINISHED).write_bytes(b"")
    for found in buckets.objects(folder):  # of one that did not come to its end
        if found.name != UNFINISHED:
            found.unlink(missing_ok=True)
    buckets.upload(made, folder, last=DESCRIPTIONS)
    (folder / UNFINISHED).unlink(missing_ok=True)


def check_absent(folder: Path) -> None:
    """Checks that a folder to make is not there yet, or in a bucket only half.

    Raises:
      FileError: it is, or the bucket is not there.
    """
    if paths.is_bucket(folder):
        try:
            buckets.check_bucket(folder)
        except FileNotFoundError as error:
            raise FileError(f"--output: '{folder}': {error}; make it or choose another") from None
        there = folder.exists() and not (folder / UNFINISHED).exists()
    else:
        there = os.path.lexists(folder)
    if there:
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
