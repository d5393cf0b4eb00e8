"""Files: checked when read and refused by name, written whole or not at all."""

import codecs
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from jax_distill.storage import disks, liveness, paths

TEXT_BYTES = 2**26
"""The most that is read of one text, or of one line of a file that is read line by line."""
JSON_BYTES = 2**24
"""The most that is read as JSON at once, which takes up to thirty times as much memory."""
JSON_DEPTH = 64
"""Depth of nested lists and tables that JSON may have."""

_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

UNFINISHED = ".unfinished"
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})\.partial")
_UNFINISHED = re.compile(r"\..+\.unfinished")


class FileError(ValueError):
    """A file that is not what it should be; the message names it, the cause and the fix."""


class PassingError(FileError):
    """A file that cannot be read for now, which says nothing about its content."""


def unread(
    where: str, error: BaseException, passing: Callable[[BaseException], bool] = disks.passing
) -> PassingError | None:
    """Returns the error to raise if a failed read says nothing about the content.

    Args:
      where: begins the message, such as "'a.pt'".
      error: raised by a library.
      passing: tells such errors from those of damaged files; `disks.raised` is the other one.

    Returns:
      An error to raise, or None if the content is damaged: then the caller says so.
    """
    if not passing(error):
        return None
    reason = disks.reason(error)
    return PassingError(
        f"{where} cannot be read for now ({reason}); mend that and run the same command again"
    )


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Adds the name of an open file to errors of the system, which lack it.

    Raises:
      OSError: as the block does.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_regular(path: Path) -> None:
    """Checks that a path is a file with content: no folder, pipe, socket or device.

    Raises:
      FileError: it is something else, which a reader could wait for without end.
      FileNotFoundError: there is nothing.
    """
    if paths.is_bucket(path):
        if path.stat().is_directory:
            raise FileError(f"'{path}' is no regular file; give an object of a bucket")
        return
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileError(f"'{str(path)[:200]}...' is longer than a file's name can be") from None
    if not stat.S_ISREG(mode):
        raise FileError(f"'{path}' is no regular file; give a file that lies on a disk")


def read_text(path: Path) -> str:
    """The text of a file: UTF-8 whatever the locale, or what a byte order mark says; no mark.

    Raises:
      FileError: it is not text, or longer than `TEXT_BYTES`.
      FileNotFoundError: there is none.
    """
    path = paths.path(path)
    check_regular(path)
    with named(path), path.open("rb") as file:
        content = file.read(TEXT_BYTES + 1)
    if len(content) > TEXT_BYTES:
        raise FileError(f"'{path}' is longer than the {TEXT_BYTES >> 20} MiB that are read of text")
    return decode_text(content, f"'{path}'")


def decode_text(content: bytes, where: str) -> str:
    """Decodes text: UTF-8, or what a byte order mark says; the mark is left out.

    Args:
      content: of a file, or of a member of an archive.
      where: begins the message, such as "'a.txt'".

    Raises:
      FileError: it is not text.
    """
    try:
        return _checked(content.decode(encoding_of(content)), where)
    except UnicodeDecodeError as error:
        raise _no_text(where, error) from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""The lines of a text with their numbers, from 1; they end at \n or \r\n and nowhere else.

    Raises:
      FileError: as `read_text`, of a line.
      FileNotFoundError: there is no file.
    """
    path = paths.path(path)
    check_regular(path)
    with named(path), path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    with io.TextIOWrapper(path.open("rb"), encoding=encoding, newline="\n") as file:
        number = 0
        while True:
            try:
                with named(path):
                    line = file.readline(TEXT_BYTES)
            except UnicodeDecodeError as error:
                raise _no_text(f"'{path}'", error) from None
            if not line:
                return
            number += 1
            if len(line) == TEXT_BYTES and not line.endswith("\n"):
                raise FileError(f"'{path}', line {number}: it is longer than a line of text")
            yield number, _checked(line.removesuffix("\n").removesuffix("\r"), f"'{path}'")


def read_json(path: Path, kind: Any = dict[str, Any], *, fix: str = "restore or remove it") -> Any:
    """Reads a JSON file and checks its types; keys that `kind` does not name are kept.

    Args:
      path: of the file.
      kind: a type such as `dict[str, int]`, or a `TypedDict`, as `msgspec.convert` takes it.
      fix: advice for a file that is something else.

    Raises:
      FileError: it is no JSON, or not of that kind.
      FileNotFoundError: there is none.
    """
    return parse_json(read_text(path), kind, where=f"'{path}'", fix=fix)


def read_json_lines(
    path: Path, kind: Any = dict[str, Any], *, fix: str = "mend or remove that line"
) -> Iterator[tuple[int, Any]]:
    """Reads the lines of a file, each JSON, with their numbers; empty lines are skipped.

    Raises:
      FileError and FileNotFoundError: as `read_json`, naming the line.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_json(line, kind, where=f"'{path}', line {number}", fix=fix)


def parse_json(text: str, kind: Any = Any, *, where: str, fix: str) -> Any:
    """As `read_json`, of a text.

    Args:
      text: JSON.
      kind: as of `read_json`.
      where: begins the message, such as "'a.json', line 3".
      fix: ends it.

    Raises:
      FileError: it is no JSON, longer than `JSON_BYTES`, deeper than `JSON_DEPTH`, has a key twice
        in one table, or is not of that kind.
    """
    if len(text) > JSON_BYTES:
        raise FileError(f"{where} is longer than the {JSON_BYTES >> 20} MiB of JSON that are read")
    try:
        value = json.loads(text, object_pairs_hook=_table)
        json.dumps(value, ensure_ascii=False).encode()  # no halves of characters
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"{where} is not valid JSON ({reason}); {fix}") from None
    if text.count("{") + text.count("[") > JSON_DEPTH and len(list(_levels(value))) > JSON_DEPTH:
        raise FileError(f"{where} has more than {JSON_DEPTH} nested tables; {fix}")
    check_kind(value, kind, where=where, fix=fix)
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        again = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {again!r:.80} twice in one table")
    return table


def _levels(value: Any) -> Iterator[list[Any]]:
    """Walks through JSON: the whole, its items, theirs, down to the allowed depth."""
    level = [value]
    for _ in range(JSON_DEPTH + 2):
        yield level
        nested = (
            x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)
        )
        level = [child for children in nested for child in children]
        if not level:
            return


def check_finite_numbers(value: Any, *, where: str, fix: str) -> None:
    """Raises FileError if JSON holds a number that is NaN or infinite."""
    for level in _levels(value):
        if any(isinstance(x, float) and not math.isfinite(x) for x in level):
            raise FileError(f"{where} holds a number that is not finite; {fix}")


def check_kind(value: Any, kind: Any, *, where: str, fix: str) -> None:
    """Checks the types of values from JSON or a pickle, without converting any.

    Raises:
      FileError: naming the place, such as `$.parts.clip`.
    """
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"{where} does not hold what it should ({reason}); {fix}") from None


def encoding_of(content: bytes) -> str:
    """The encoding that the first bytes of a file name; UTF-8 where they name none."""
    return next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")


def _checked(text: str, where: str) -> str:
    if "\0" in text:  # UTF-16 without its mark reads as UTF-8 with these in between
        raise FileError(f"{where} is not UTF-8 text (it has NUL characters); save it as UTF-8")
    return text


def _no_text(where: str, error: UnicodeDecodeError) -> FileError:
    return FileError(f"{where} is not UTF-8 text ({error.reason}); save it as UTF-8")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader finds the old one or the whole new one, never a part.

    Args:
      path: the file; its folder is made if it is missing.
      content: bytes, or text that is written as UTF-8.

    Raises:
      FileError: the disk is full, or cannot be written.
    """
    path = paths.path(path)
    if paths.is_bucket(path):  # whole or not at all by itself
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        partial = partial_of(path)
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if (found := disks.full(error)) is None:
            raise
        what, fix = found
        raise FileError(f"'{path}': {what}; {fix} and run the same command again") from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented, in the same way."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def partial_of(path: Path) -> Path:
    """The path at which this process makes a file or folder, until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def unfinished_of(path: Path) -> Path:
    """The path at which a folder is made that one process may begin and another one end."""
    return path.with_name(f".{path.name}.unfinished")


def check_no_partial(path: str | Path, name: str) -> None:
    """Checks that a source is not one that a process is making, or was when it died.

    In a bucket, where nothing is renamed, such a folder has an object `UNFINISHED` in it.

    Args:
      path: of the source.
      name: begins the message, such as "--source".

    Raises:
      FileError: it is.
    """
    path = paths.path(path)
    if paths.is_bucket(path):
        half = any((folder / UNFINISHED).exists() for folder in (path, path.parent))
    else:
        parts = path.absolute().parts
        half = any(_PARTIAL.fullmatch(part) or _UNFINISHED.fullmatch(part) for part in parts)
    if half:
        raise FileError(f"{name}: '{path}' is half made; make it whole and give that")


def remove_leftovers(path: Path) -> None:
    """Removes unfinished files or folders of processes of this host that have died."""
    with contextlib.suppress(OSError):
        for leftover in os.scandir(path.parent):
            found = _PARTIAL.fullmatch(leftover.name)
            if found is None or found["name"] != path.name:
                continue
            pid, changed = int(found["pid"]), leftover.stat(follow_symlinks=False).st_mtime
            # A living process of that number may be a later one.
            if liveness.is_alive(pid) and not liveness.started_after(pid, changed):
                continue
            if leftover.is_dir(follow_symlinks=False):
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                os.unlink(leftover)
