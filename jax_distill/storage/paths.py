"""Paths of disks and of buckets: what a flag or a setting names, as an object to read and write by.

A path of a disk is a `pathlib.Path`. An address, `gs://bucket/run`, is an `etils.epath.Path`, which
has the same methods; `pathlib` would take one of its slashes away. On a bucket there are objects
alone: a folder is there as soon as an object below it is, and is never made.
"""

import functools
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

from etils import epath

_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/")
_PACKAGES = {"gs": ("gcsfs", "gcs")}  # the package that reads a bucket, and the extra it comes with


class NoBucket(ValueError):
    """An address that cannot be used; the message says why."""


def path(name: str | Path) -> Path:
    """The path that a text names, of a disk or of a bucket.

    Raises:
      NoBucket: it is an address of another kind, or a package is missing to reach it.
    """
    if not is_address(name):
        return Path(name)
    text = str(name)
    scheme = _ADDRESS.match(text)["scheme"]
    if scheme not in _PACKAGES:
        raise NoBucket(
            f"'{text}' is an address of a kind that is not read; give a folder, such as that of a"
            " mounted bucket, or an address gs://bucket/folder"
        )
    if not re.fullmatch(r"gs://[\w.-]+(/.*)?", text):
        raise NoBucket(f"'{text}' names no bucket; write it as gs://bucket/folder")
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise NoBucket(
            f"'{text}' is in a bucket, which needs {package}; pip install 'jax-distill[{extra}]'"
        )
    _set_up()
    return epath.Path(text)


def is_address(name: str | Path) -> bool:
    """Whether a text names a bucket or something else that is no path of a disk."""
    return _ADDRESS.match(str(name)) is not None


def is_bucket(name: str | Path) -> bool:
    """Whether a path, as `path` makes them, is in a bucket."""
    return str(name).startswith("gs://")


def absolute(name: str | Path) -> Path:
    """The same path whatever the current folder; links are followed, which buckets do not have."""
    found = path(name)
    return found if is_bucket(found) else found.resolve()


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where there are folders."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def size(file: Path) -> int:
    """The length of a file or an object in bytes."""
    found = file.stat()
    return found.length if is_bucket(file) else found.st_size


def kvstore(folder: Path) -> dict[str, Any]:
    """A folder for TensorStore."""
    if not is_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, key = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}


@functools.cache
def _set_up() -> None:
    """Settings of gcsfs, for ourselves and for those who reach it through epath, such as Orbax."""
    import fsspec

    for library, level in (("gcsfs", logging.CRITICAL), ("fsspec", logging.WARNING)):
        logging.getLogger(library).setLevel(level)  # errors are raised, too
    for name in ("gcs", "gs"):
        # Listings that are kept hide what other hosts write; checksums end what a cut line spoils.
        given = {"use_listings_cache": False, "consistency": "md5"}
        fsspec.config.conf[name] = given | fsspec.config.conf.get(name, {})
