"""Compiled programs, kept between starts of a command."""

import contextlib
import hashlib
import os
import threading
from pathlib import Path

import jax
from absl import flags, logging

from jax_distill.storage import disks, files

MOST_BYTES = 2**31  # those used longest ago are deleted
_DIGEST = 32  # bytes of `_digest`


def define_flag() -> None:
    """Defines the flag that `use` reads."""
    if "keep_compiled" in flags.FLAGS:  # where one program imports several commands
        return
    flags.DEFINE_boolean(
        "keep_compiled",
        True,
        "Keep compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR, or in"
        " ~/.cache/jax_distill/compiled, which is kept below 2 GiB.",
    )


def use() -> None:
    """Has JAX read and keep compiled programs; before the first is compiled.

    A folder that the user has given JAX is used as the user has set it up. Where ours cannot be
    written, programs are compiled anew.
    """
    if not flags.FLAGS.keep_compiled:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:
        return
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # there is no home
        writable = False
    if not writable:
        logging.info("'%s' cannot be written; compiled programs are not kept", folder)
        return
    try:
        from jax._src import compilation_cache  # not public: another JAX may not have it
    except ImportError:
        compilation_cache = None
    if not hasattr(compilation_cache, "get_file_cache"):
        logging.info("this JAX has no place for kept programs; they are compiled at each start")
        return
    compilation_cache.get_file_cache = lambda path: (Programs(Path(path)), path)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A start compiles many programs, most of them in less than JAX's default of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Programs:
    """A folder of programs, in place of JAX's: a file each, with a checksum, written at once.

    JAX writes into the file itself and never replaces one. A program that a kill or a full disk
    has cut short would be compiled at every start, and JAX notes the time of use in a second file,
    without which it keeps no more programs at all.

    Nothing here raises: what JAX does not get it compiles, and `put` replaces what is there.
    """

    def __init__(self, folder: Path):
        self._path = folder  # JAX logs it by this name
        self._lock = threading.Lock()
        self._said = False

    def get(self, key: str) -> bytes | None:
        """The program of a key, or None: there is none, or it is damaged."""
        file = self._file(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say("read", error)
            return None
        program = content[_DIGEST:]
        if _digest(program) != content[:_DIGEST]:
            logging.info("'%s' is damaged; its program is compiled anew and replaces it", file)
            return None
        with contextlib.suppress(OSError):  # it may be another user's
            os.utime(file)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, and deletes those used longest ago above `MOST_BYTES`."""
        content = _digest(value) + value
        with self._lock:  # threads of a process would write to the same unfinished file
            try:
                self._make_room(len(content))
                files.write_atomically(self._file(key), content)
            except (OSError, files.FileError) as error:
                self._say("written", error)

    def _make_room(self, size: int) -> None:
        found = []
        with contextlib.suppress(FileNotFoundError):  # another process deletes, too
            for file in filter(Path.is_file, self._path.iterdir()):
                stat = file.stat()
                found.append((stat.st_mtime_ns, stat.st_size, file))
        excess = sum(size for _, size, _ in found) + size - MOST_BYTES
        for _, size, file in sorted(found):
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.program"

    def _say(self, done: str, error: Exception) -> None:
        if not self._said:  # once: a start has hundreds of programs
            self._said = True
            text = (
                "compiled programs cannot be %s in '%s' (%s); mend that or pass --nokeep_compiled"
            )
            logging.info(text, done, self._path, disks.reason(error))


def _digest(program: bytes) -> bytes:
    return hashlib.sha256(program).digest()


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jax_distill" / "compiled"
