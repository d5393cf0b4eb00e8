"""Files and folders that a command makes: whole or not at all, folders by one process at a time."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.storage import buckets, disks, lease, paths
from jax_distill.storage.files import UNFINISHED, FileError, partial_of, remove_leftovers

DESCRIPTIONS = ("dataset.json", "ported.json", "model_index.json", "README.md")
"""Files that say what is in a folder, which are written into a bucket after all others."""


class Stopped(RuntimeError):
    """SIGTERM or SIGINT came while a folder was made; nothing of it is left."""


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
    folder = path.parent
    try:
        if os.path.lexists(path) and not path.is_file():
            raise FileError(f"{name}: '{text}' exists and is no regular file; choose another")
        while not folder.exists():
            if folder.is_symlink():
                raise FileError(f"{name}: '{folder}' is a link to nothing; give another folder")
            folder = folder.parent
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path.with_name(path.name + ".partial"))  # as it is written: too long a name?
        with tempfile.TemporaryFile(dir=folder):  # has no name, where the file system knows such
            pass
    except FileError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"{name}: '{text}' cannot be written ({reason} at '{folder}'); give another path"
        ) from None


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
      ValueError: the folder exists, another process is making it, or the disk is full.
      Stopped: by a signal.
    """
    check_absent(folder)
    try:
        paths.make_folder(folder.parent)
        with _stopping(), lease.of_output(folder):
            check_absent(folder)  # which another process may have made meanwhile
            with _in_bucket(folder) if paths.is_bucket(folder) else _on_disk(folder) as partial:
                yield partial
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
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    with _partial(Path(tempfile.gettempdir(), f"jax_distill-{digest}-{folder.name}")) as partial:
        yield partial
        (folder / UNFINISHED).write_bytes(b"")
        for found in buckets.objects(folder):  # of one that did not come to its end
            if found.name != UNFINISHED:
                found.unlink(missing_ok=True)
        buckets.upload(partial, folder, last=DESCRIPTIONS)
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
