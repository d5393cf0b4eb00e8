"""Identities of data sets and of folders of weights, wherever they lie."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from jax_distill.data import manifest
from jax_distill.storage import contents, paths

_FILES = 64  # read at most
_BYTES = 2**16  # of each, from its beginning


class Identity(TypedDict):
    """The number of examples, and a digest to tell data sets apart."""

    examples: int
    digest: str


def identity_of(folders: Sequence[str | Path]) -> Identity:
    """Identifies the data of a run: one folder or several, in their order."""
    found = [identity(paths.path(folder)) for folder in folders]
    if len(found) == 1:
        return found[0]
    digest = hashlib.sha256("".join(each["digest"] for each in found).encode())
    return {"examples": sum(each["examples"] for each in found), "digest": digest.hexdigest()}


def identity(folder: Path) -> Identity:
    """Identifies a data set by facts that copying and moving do not change.

    They are those of its manifest, which has checksums of all its files; these may be damaged.

    Args:
      folder: of records.

    Raises:
      ValueError: it is no such folder.
    """
    description = manifest.read(folder, whole=False)
    digest = hashlib.sha256(manifest.canonical(description))
    return {"examples": description["examples"], "digest": digest.hexdigest()}


def of_weights(folder: Path) -> str:
    """A digest to tell folders of weights apart, which copying and moving do not change.

    It covers the names and sizes of all files and the beginnings of some of them: a few megabytes
    are read. Weights that are written anew have another.
    """
    folder = paths.path(folder)
    files, digest = contents.files(folder), hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {paths.size(path)}\n".encode())
    for path in files[:: -(-len(files) // _FILES) or 1]:
        with path.open("rb") as file:
            digest.update(file.read(_BYTES))
    return digest.hexdigest()[:32]
