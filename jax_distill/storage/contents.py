"""What lies in a folder, of a disk or of a bucket."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from jax_distill.storage import buckets, paths


def files(folder: Path) -> list[Path]:
    """The files in a folder and below, by name; none where there is no folder."""
    if paths.is_bucket(folder):
        return buckets.objects(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(folder: Path, keep: Sequence[str] = ()) -> None:
    """Removes a folder and all that is in it, as far as that can be removed.

    Args:
      folder: need not be there.
      keep: names of files in it that stay; the folder is then left, too.
    """
    if not paths.is_bucket(folder) and not keep:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in buckets.objects(folder) if paths.is_bucket(folder) else folder.iterdir():
        if path.parent == folder and path.name in keep:
            continue
        if not paths.is_bucket(folder) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
