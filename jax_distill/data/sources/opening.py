"""Opens a source, whose kind is told by what its name leads to."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from jax_distill.data import pictures
from jax_distill.data.sources import arrow_files, text_tables
from jax_distill.data.sources.folder import TABLES, PictureFolder
from jax_distill.data.sources.parquet import open_parquet
from jax_distill.data.sources.prompts import Prompts
from jax_distill.data.sources.source import USUAL, CaptionedSource, Columns, is_hidden
from jax_distill.data.sources.tars import Tars
from jax_distill.data.sources.tensorflow_datasets import PREFIX, TensorflowDataset
from jax_distill.storage.files import FileError, check_no_partial
from jax_distill.storage.paths import is_address

_KINDS = {
    ".tar": Tars,
    ".parquet": open_parquet,
    ".arrow": arrow_files.open_arrow,
    **dict.fromkeys((".txt", *text_tables.ENDINGS), Prompts),
}
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})")
_SPLITS = {  # words in names of files, as Hugging Face reads them, and the split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_PACKED = (".tar", ".parquet", ".arrow")  # files that a folder may have instead of pictures


def open_source(names: Sequence[str], columns: Columns = USUAL) -> CaptionedSource:
    """Opens captioned pictures, or captions alone.

    Args:
      names: one of
        - a folder of pictures, of tars, of parquet or arrow files, or that
          `datasets.save_to_disk` wrote. Tars and the others may lie in one of its subfolders;
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
    for name in names:
        if is_address(name):
            raise FileError(
                f"'{name}' is an address; copy it to a disk, or mount the bucket, and give that"
            )
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
    matching = sorted(glob.glob(name, recursive=True))
    if not matching:
        pattern = glob.has_magic(name)
        raise FileError(
            f"'{name}' {'matches no file' if pattern else 'is missing'}; give a folder of pictures"
            " with captions, or files of them"
        )
    return [Path(path) for path in matching]


def _open_files(paths: Sequence[Path], columns: Columns) -> CaptionedSource:
    again = next((path for path, times in Counter(paths).items() if times > 1), None)
    if again is not None:
        raise FileError(f"'{again}' is given twice; give it once")
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
    if (folder / "features.json").exists():
        raise FileError(f"'{folder}' is a data set of tfds; give it as '{PREFIX}{folder}'")
    packed, others = _look(folder)
    if not packed:
        _check_one_split_of_pictures(folder)
        return PictureFolder(folder, columns)
    if others or len({path.suffix.lower() for path in packed}) > 1:
        ending = next(end for end in _PACKED if any(end == p.suffix.lower() for p in packed))
        first = next(path for path in packed if path.suffix.lower() == ending)
        raise FileError(
            f"'{folder}' has files that end in {ending} beside others; say which to read, such as"
            f" '{first.with_name('*' + first.suffix)}'"
        )
    folders = sorted({path.parent for path in packed})
    if len(folders) > 1:
        every, one = (f / f"*{packed[0].suffix}" for f in (folder / "**", folders[0]))
        raise FileError(
            f"'{folder}' has files that end in {packed[0].suffix} in {len(folders)} folders; say"
            f" which to read, such as '{one}' or '{every}'"
        )
    if folders != [folder]:
        return _open_folder(folders[0], columns)  # which may say more of its files
    _check_one_split(folder, packed)
    _check_shards(folder, packed)
    return _open_files(packed, columns)


def _look(folder: Path) -> tuple[list[Path], bool]:
    """Finds files of `_PACKED` in a folder, or else below it; tells whether pictures are there too.

    Pictures in the folder itself hide what is below it, which `PictureFolder` tells.
    """

    def stop(error: OSError) -> None:
        raise error

    packed, others = [], False
    for parent, below, names in os.walk(folder, onerror=stop):
        below[:] = sorted(name for name in below if not is_hidden(name))
        for path in (Path(parent, name) for name in sorted(names) if not is_hidden(name)):
            table = path.name in TABLES
            if path.name == text_tables.PARQUET:
                table = text_tables.lists_files(path)
            if path.suffix.lower() in _PACKED and not table:
                packed.append(path)
            others |= path.suffix.lower() in pictures.endings() or table
        if Path(parent) == folder and (packed or others):
            break
    return packed, others


def _check_one_split(folder: Path, files: Sequence[Path]) -> None:
    """Raises FileError if files, such as train-00000-of-00002.parquet, are of several splits."""
    splits: dict[str, str] = {}
    for path in files:
        shard = _SHARD.fullmatch(path.stem)
        words = re.split(r"[^a-z]+", path.stem.lower())
        word = next((_SPLITS[word] for word in words if word in _SPLITS), None)
        if shard or word:
            example = f"{shard['split']}-*{path.suffix}" if shard else path.name
            splits.setdefault(shard["split"] if shard else word, example)
        else:
            splits.setdefault("", path.name)
    if len(splits) > 1:
        told = [name or f"that of '{of}'" for name, of in splits.items()]
        raise _several_splits(folder, told, folder / splits[max(splits)])


def _check_one_split_of_pictures(folder: Path) -> None:
    """Raises FileError if a folder without a table has folders of several splits."""
    named = [path for path in sorted(folder.iterdir()) if path.is_dir() or path.name in TABLES]
    if any(path.name in TABLES for path in named):
        return
    splits = {_SPLITS[path.name.lower()]: path for path in named if path.name.lower() in _SPLITS}
    if len(splits) > 1:
        raise _several_splits(folder, splits, splits[max(splits)])


def _several_splits(folder: Path, splits: Iterable[str], one: Path) -> FileError:
    told = ", ".join(sorted(splits))
    return FileError(f"'{folder}' has the splits {told}; say which to read, such as '{one}'")


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Raises FileError if a shard is missing, or there are some of two versions of a data set."""
    shards = [shard for path in files if (shard := _SHARD.fullmatch(path.stem))]
    if not shards:
        return
    split, ending, counts = shards[0]["split"], files[0].suffix, {x["count"] for x in shards}
    if len(counts) > 1:
        first, second = (f"{split}-*-of-{count}{ending}" for count in sorted(counts)[:2])
        raise FileError(
            f"'{folder}' has '{first}' and '{second}', which are two versions; say which to read"
        )
    (count,) = counts
    numbers = {int(shard["number"]) for shard in shards}
    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if missing < int(count):
        name = f"{split}-{missing:0{len(count)}}-of-{count}{ending}"
        raise FileError(
            f"'{folder / name}' is missing; restore it, or name the files to read without it"
        )
