"""Opens a source by what is found where its name leads."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jax_distill.data import pictures
from jax_distill.data.sources import arrow_files, text_tables
from jax_distill.data.sources.folder import TABLES, PictureFolder
from jax_distill.data.sources.parquet import open_parquet
from jax_distill.data.sources.prompts import Prompts
from jax_distill.data.sources.source import USUAL, CaptionedSource, Columns
from jax_distill.data.sources.tars import Tars
from jax_distill.data.sources.tensorflow_datasets import PREFIX, TensorflowDataset
from jax_distill.storage.files import FileError, check_no_partial

_KINDS = {
    ".tar": Tars,
    ".parquet": open_parquet,
    ".arrow": arrow_files.open_arrow,
    **dict.fromkeys((".txt", *text_tables.ENDINGS), Prompts),
}
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+")
_PACKED = (".tar", ".parquet")  # files that a folder may have instead of pictures


def open_source(names: Sequence[str], columns: Columns = USUAL) -> CaptionedSource:
    """Opens captioned pictures, or captions alone.

    Args:
      names: one of
        - a folder of pictures, of tars, of parquet files, or that `datasets.save_to_disk` wrote;
        - files of one kind: `.tar`, `.parquet`, `.arrow`; captions alone in `.txt`, `.jsonl` or
          `.csv`. A name may be a pattern with * or ?, whose files are sorted;
        - tfds:NAME[:SPLIT], see `TensorflowDataset`.
      columns: names of the columns of pictures and captions.

    Raises:
      FileError: there is nothing, or it is of no kind or of several; or as the source.
    """
    if any(name.startswith(PREFIX) for name in names):
        if len(names) > 1:
            raise FileError(f"'{names[0]}' and '{names[1]}' are two sources; give one of them")
        return TensorflowDataset(names[0], columns)
    paths = [path for name in names for path in _matching(name)]
    for path in paths:
        check_no_partial(path, "--source")
    if any(path.is_dir() for path in paths):
        if len(paths) > 1:
            raise FileError(f"'{paths[0]}' and '{paths[1]}' are two sources; give one folder")
        return _open_folder(paths[0], columns)
    return _open_files(paths, columns)


def _matching(name: str) -> list[Path]:
    if os.path.exists(name):
        return [Path(name)]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        pattern = glob.has_magic(name)
        raise FileError(
            f"'{name}' {'matches no file' if pattern else 'is missing'}; give a folder of pictures"
            " with captions, or files of them"
        )
    return [Path(path) for path in found]


def _open_files(paths: Sequence[Path], columns: Columns) -> CaptionedSource:
    endings = sorted({path.suffix.lower() for path in paths})
    if len(endings) > 1 and not {_KINDS.get(ending) for ending in endings} == {Prompts}:
        raise FileError(
            f"'{paths[0]}', ...: files that end in {' and '.join(endings)}; give one kind"
        )
    opened = _KINDS.get(endings[0])
    if opened is None:
        packed = endings[0] in (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst")
        raise FileError(
            f"'{paths[0]}' "
            + (
                "is compressed; unpack it"
                if packed
                else f"is none of {', '.join(_KINDS)}; give one"
            )
        )
    return opened(paths, columns)


def _open_folder(folder: Path, columns: Columns) -> CaptionedSource:
    if (folder / arrow_files.SPLITS).exists() or (folder / arrow_files.STATE).exists():
        return arrow_files.open_arrow(arrow_files.files_of(folder), columns)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    packed = {end: [p for p in files if p.suffix.lower() == end] for end in _PACKED}
    packed = {ending: found for ending, found in packed.items() if found}
    others = any(p.suffix.lower() in pictures.endings() or p.name in TABLES for p in files)
    if packed and (len(packed) > 1 or others):
        ending = next(iter(packed))
        raise FileError(
            f"'{folder}' has files that end in {ending} beside others; say which to read, such as"
            f" '{folder / ('*' + ending)}'"
        )
    if packed:
        (found,) = packed.values()
        _check_one_split(folder, found)
        return _open_files(found, columns)
    return PictureFolder(folder, columns)


def _check_one_split(folder: Path, files: Sequence[Path]) -> None:
    """Raises FileError if shards, such as train-00000-of-00002.parquet, are of several splits."""
    shards = [match for path in files if (match := _SHARD.fullmatch(path.stem))]
    splits = sorted({shard["split"] for shard in shards})
    if len(splits) > 1:
        one = folder / f"{splits[-1]}-*{files[0].suffix}"
        raise FileError(
            f"'{folder}' has the splits {', '.join(splits)}; say which to read, such as '{one}'"
        )
