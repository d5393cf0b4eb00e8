"""One writer in a folder: a lease, which a process takes, and which is taken from it when it dies.

A lease is a small JSON file that says who holds it:

    <workdir>/.lease.json            of a run, for as long as it writes there
    <parent>/.<name>.lease.json      of a folder that is being made, which is not there yet

It is removed when its holder ends. Where the holder was killed, the next to come takes it over: at
once where it can see that the process is gone, which is on the same host; after `LIMIT` seconds
without a sign of life where it cannot. Signs of life are the file's times, which the holder renews
and which are compared by the clock of the disk, not of a host.

The file is made by `link`, which is atomic on NFS as well. On one host, who takes or gives back a
lease holds a lock (`flock`) of the folder meanwhile, so that of any number that find a dead
process' lease one takes it over. In a bucket the lease is an object, see `bucket_lease`.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from jax_distill.devices import processes
from jax_distill.storage import bucket_lease, disks, paths
from jax_distill.storage.files import FileError, parse_json, read_json
from jax_distill.storage.liveness import is_alive, process_started
from jax_distill.storage.places import check_beside

NAME = ".lease.json"
BEAT = 15.0
"""Seconds between signs of life."""
LIMIT = 180.0
"""Seconds after which a process of another host that gives none is taken for dead."""

_TRIES = 20
_serial = itertools.count()
_held: dict[Path, int] = {}  # by this process, and how often


class Holder(TypedDict):
    """The holder of a lease."""

    host: str
    kernel: str  # the start of the machine and the namespace that `pid` is of
    pid: int
    process_started: str  # by the kernel's clock; tells a process from a later one of its number
    since: str  # local time, for people


class InUse(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def of_folder(folder: Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds the lease of a folder, which is made if it is missing, and removed again if it is empty
    at the end.

    A process may hold one more than once.

    Args:
      folder: where this process will write.
      flag: that named it, for the message.

    Raises:
      InUse: another process holds it.
      FileError: the folder cannot be made or written.
    """
    made = []
    if not paths.is_bucket(folder):
        check_beside(folder / NAME, flag)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    paths.make_folder(folder)
    try:
        with _held_file(folder / NAME, f"{flag}: '{folder}'", f"give another {flag}"):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def of_run(workdir: Path) -> Iterator[None]:
    """Holds the lease of a run's folder: of several processes the first does, for all.

    Raises:
      InUse: another run holds it; in all processes.
      FileError: the folder cannot be made or written; in process 0.
    """
    with contextlib.ExitStack() as held:
        refused = None
        if processes.is_leader():
            try:
                held.enter_context(of_folder(workdir))
            except (InUse, FileError) as error:
                refused = error
        if not processes.agreed(refused is None):
            raise refused or InUse(
                f"--workdir: '{workdir}' is in use or cannot be written, as process 0 says"
            )
        yield


@contextlib.contextmanager
def of_output(folder: Path, flag: str = "--output") -> Iterator[None]:
    """Holds the lease of a folder that is to be made; its parent is there.

    Args and raises: as `of_folder`.
    """
    path = folder.with_name(f".{folder.name}{NAME}")
    with _held_file(path, f"{flag}: '{folder}'", f"give another {flag}"):
        yield


@contextlib.contextmanager
def _held_file(path: Path, what: str, advice: str) -> Iterator[None]:
    path = path if paths.is_bucket(path) else path.absolute()
    if _held.get(path):
        _held[path] += 1
        try:
            yield
        finally:
            _held[path] -= 1
        return
    lease = _OnBucket(path) if paths.is_bucket(path) else _OnDisk(path)
    lease.take(what, advice)
    _held[path] = 1
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, lease.renew, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        del _held[path]
        lease.give_back()


class _OnDisk:
    """A lease of this process, as a file."""

    def __init__(self, path: Path):
        self._path, self._content = path, b""

    def take(self, what: str, advice: str) -> None:
        self._content = _take(self._path, what, advice)

    def renew(self) -> bool:
        """Gives a sign of life; False if another process has the lease."""
        try:
            if self._path.read_bytes() != self._content:
                return False
            _renew(self._path, self._content)
        except FileNotFoundError:  # removed by hand
            with contextlib.suppress(OSError), self._path.open("xb") as file:
                file.write(self._content)
        return True

    def give_back(self) -> None:
        _give_back(self._path, self._content)


class _OnBucket:
    """Likewise, as an object of a bucket."""

    def __init__(self, path: Path):
        self._path = path
        self._object = bucket_lease.Lease(path, (json.dumps(_own()) + "\n").encode())
        self.renew = self._object.renew

    def take(self, what: str, advice: str) -> None:
        def check_dead(content: bytes, silent: float) -> None:
            with contextlib.suppress(FileError, UnicodeDecodeError):
                holder = parse_json(content.decode(), Holder, where=f"'{self._path}'", fix="")
                return _check_dead(self._path, holder, silent, what, advice)
            _check_dead(self._path, None, silent, what, advice)

        if not any(self._object.take(check_dead) for _ in range(_TRIES)):
            raise InUse(f"{what} is in use, by one after the other; wait for them, or {advice}")

    def give_back(self) -> None:
        try:
            self._object.give_back()
        except Exception as error:  # it ends by itself
            if not disks.passing(error):
                raise


def _take(path: Path, what: str, advice: str) -> bytes:
    """Makes the lease's file; returns its content.

    Raises:
      InUse: there is one of a process that may be alive.
      FileError: no file can be made in its folder.
    """
    content = (json.dumps(_own()) + "\n").encode()
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{next(_serial)}")
    written = False
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not there: one that gives its lease back has removed the empty folder.
        with contextlib.suppress(FileNotFoundError), _folder_locked(path.parent):
            try:
                fresh.write_bytes(content)
                written = True
                now = os.stat(fresh).st_mtime
                with contextlib.suppress(FileExistsError):
                    _create(path, fresh, content)
                    return content
                _remove_if_dead(path, now, what, advice)
            finally:
                fresh.unlink(missing_ok=True)
    if not written:
        raise FileError(f"{what}: no file can be made in '{path.parent}'; {advice}")
    raise InUse(f"{what} is in use, by one after the other; wait for them, or {advice}")


def _create(path: Path, fresh: Path, content: bytes) -> None:
    """Makes the lease's file of a fresh one.

    Raises:
      FileExistsError: there is one.
    """
    try:
        os.link(fresh, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with path.open("xb") as file:  # mounted buckets know no links
            file.write(content)


def _remove_if_dead(path: Path, now: float, what: str, advice: str) -> None:
    """Removes the lease of a dead process.

    Args:
      path: of the lease.
      now: by the clock of its disk.
      what, advice: begin and end the message.

    Raises:
      InUse: the process may be alive.
      FileNotFoundError: the lease is no longer there.
    """
    found = os.stat(path)
    try:
        holder = read_json(path, Holder)
    except FileError:  # its disk was full, or its machine lost power
        holder = None
    _check_dead(path, holder, now - found.st_mtime, what, advice)
    aside = path.with_name(f"{path.name}.{os.getpid()}.{next(_serial)}.old")
    os.rename(path, aside)
    try:
        if os.stat(aside).st_ino != found.st_ino:  # one of another host was faster
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _check_dead(path: Path, holder: Holder | None, silent: float, what: str, advice: str) -> None:
    """Checks that the holder of a lease is gone.

    Args:
      path: of the lease.
      holder: None where it cannot be read.
      silent: seconds since its last sign of life.
      what, advice: begin and end the message.

    Raises:
      InUse: the holder may be alive.
    """
    seen = None
    if holder is None:
        alive = silent < LIMIT
        message = "is in use, by whom is not said"
    else:
        message = f"is in use by process {holder['pid']} on host {holder['host']}"
        message += f" since {holder['since']}"
        if (seen := _sees(holder)) is not None:
            alive = seen
        else:
            alive = silent < LIMIT
            message += f" (last sign of life {max(silent, 0):.0f} s ago)"
    if alive and seen:
        raise InUse(f"{what} {message}; wait for it, or {advice}")
    if alive:
        raise InUse(
            f"{what} {message}; wait for it, or {advice}; if that process is gone, its lease ends"
            f" after {LIMIT:.0f} s or when you remove '{path}'"
        )


def _give_back(path: Path, content: bytes) -> None:
    with contextlib.suppress(OSError), _folder_locked(path.parent):
        if path.read_bytes() == content:
            path.unlink()


def _beat(path: Path, renew: Callable[[], bool], ended: threading.Event) -> None:
    """Gives signs of life; ends the process when the lease was taken from it meanwhile.

    That happens to one that stood still for longer than `LIMIT`, such as on a laptop asleep.
    """
    while not ended.wait(BEAT):
        try:
            kept = renew()
        except Exception as error:  # of a disk, or of those who reach a bucket
            if isinstance(error, OSError) or disks.passing(error):
                continue
            raise
        if not kept:
            print(f"error: '{path}' was taken over while this process stood still", flush=True)
            os._exit(1)


def _renew(path: Path, content: bytes) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError:  # mounted buckets know no other times than those of writing
        path.write_bytes(content)


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Iterator[None]:
    """Holds the system's lock of a folder, on disks that have such; a dead process loses it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF):
                raise
        yield
    finally:
        os.close(handle)


def _own() -> Holder:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "pid": pid,
        "process_started": process_started(pid) or "",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _kernel() -> str:
    """Names the start of this machine and the namespace of its processes' numbers."""
    with contextlib.suppress(OSError):
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _sees(holder: Holder) -> bool | None:
    """Whether a holder is alive; None where this process cannot see it."""
    if (holder["host"], holder["kernel"]) != (socket.gethostname(), _kernel()):
        return None
    return is_alive(holder["pid"], holder["process_started"])
