"""Checks that a place can be written to, before the work is done; nothing is left there."""

import contextlib
import os
import tempfile
from pathlib import Path

from jax_distill.storage import paths
from jax_distill.storage.files import FileError

_LONGEST = ".lease.json.1234567.12.old"
"""The longest ending that a name has for a while, beside a dot before it; see `lease`."""


def check_new_folder(folder: Path, name: str = "--output") -> None:
    """Checks that a folder can be made at a path, whether or not something is there.

    Args:
      folder: to make; those above it that are missing are made, too.
      name: of the flag, for the message.

    Raises:
      FileError: it has no name of its own, or cannot be made there.
    """
    bucket = paths.is_bucket(folder)
    if folder.name in ("", "..") or bucket and "/" not in str(folder).removeprefix("gs://"):
        what = "is a whole bucket" if bucket else "is no name for a new folder"
        example = folder / "latents" if bucket else "results"
        raise FileError(f"{name}: '{folder}' {what}; name a folder, such as {name}={example}")
    if not bucket:
        check_beside(folder, name)


def check_beside(path: Path, name: str) -> None:
    """Checks that files of a disk can be made beside a path, in its folder or those to come.

    Args:
      path: of a file or a folder, which need not be there.
      name: of the flag, for the message.

    Raises:
      FileError: they cannot.
    """
    folder = path.parent
    try:
        while not folder.exists():
            if folder.is_symlink():
                raise FileError(f"{name}: '{folder}' is a link to nothing; give another folder")
            folder = folder.parent
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path.with_name(f".{path.name}{_LONGEST}"))  # too long a name?
        with tempfile.TemporaryFile(dir=folder):  # has no name, where the file system knows such
            pass
    except FileError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"{name}: '{path}' cannot be written ({reason} at '{folder}'); give another path"
        ) from None
