"""Files that are there whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader finds the old one or the whole new one, never a part.

    Args:
      path: the file; its folder is made if it is missing.
      content: bytes, or text that is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented, in the same way."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder that is there once the block has ended well, and not before.

    Args:
      folder: to make; its parent is made if it is missing.

    Yields:
      An empty folder beside it, to be filled; removed if the block fails.

    Raises:
      ValueError: the folder exists, or the disk is full.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"--output: '{folder}' exists; remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        partial.rename(folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = f"--output: no space left for '{folder}'; make room or choose another disk"
        raise ValueError(message) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, where a rename alone would not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
