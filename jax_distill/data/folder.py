"""Pictures with captions as people keep them: in folders."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypedDict

from absl import logging

from jax_distill.data import pictures
from jax_distill.data.pictures import read
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, read_json_lines, read_text

__all__ = ["METADATA", "Captioned", "find", "plain_caption", "read"]

METADATA = "metadata.jsonl"
CAPTION_CHARACTERS = 2**16
CHECKS_LOGGED = 1000

_HIDDEN = "files or folders are left out: hidden, or of another system"
_LINK = "folders are left out: links to them are not followed"
_OTHER = "files are left out: of other endings, and no captions of a picture"
_UNLISTED = f"files are left out: not listed in {METADATA}"
_REPEATED = "lines name a picture that another line names: each is an example"


class Captioned(NamedTuple):
    """The file of a picture, and its caption."""

    path: Path
    caption: str


class _Entry(TypedDict):
    """A line of `metadata.jsonl`."""

    file_name: str
    text: str


class _Found(NamedTuple):
    path: Path
    caption: str | None  # None where it is in a file beside the picture


def find(folder: Path, resolution: tuple[int, int] = (1, 1)) -> list[Captioned]:
    """Finds the pictures of a folder, then those of its subfolders, each sorted by name.

    Captions are in a text file beside each picture, `cat.txt` for `cat.png`. A folder with a
    `metadata.jsonl`, one line {"file_name": .., "text": ..} a picture, is read by that alone, in
    its order. Hidden files and links to folders are skipped. The log counts skipped files. Every
    picture is decoded, so that none of them fails hours later.

    Args:
      folder: to look in.
      resolution: height and width that pictures will be fitted to; smaller ones are counted.

    Raises:
      FileError: the folder is missing or has no pictures, or some pictures are missing, have no
        caption, or cannot be decoded to the end: the first is named, the others are counted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"'{folder}' is not a folder; give one of pictures with captions")
    left_out: dict[str, list[Path]] = defaultdict(list)
    candidates = list(_walk(folder, left_out))
    for reason, paths in left_out.items():
        logging.warning("'%s': %d %s, such as '%s'", folder, len(paths), reason, paths[0])
    if not candidates:
        raise FileError(
            f"'{folder}' has no pictures ({', '.join(pictures.endings())}) and no {METADATA}"
        )
    found, problems, notes = [], [], defaultdict(list)
    for number, (path, caption) in enumerate(candidates, 1):
        try:
            found.append(Captioned(path, _beside(path) if caption is None else caption))
            for note in pictures.check(path, *resolution):
                notes[note].append(path)
        except FileError as error:
            problems.append(error)
        if number % CHECKS_LOGGED == 0:
            logging.info("checked %d of %d pictures", number, len(candidates))
    for note, paths in sorted(notes.items()):
        logging.warning(
            "%d of %d pictures %s, such as '%s'", len(paths), len(candidates), note, paths[0]
        )
    if problems:
        others = f" (and {len(problems) - 1} more of {len(candidates)} pictures)"
        raise FileError(f"{problems[0]}{others * (len(problems) > 1)}")
    return found


def _walk(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[_Found]:
    """The pictures of a folder and below it; adds other files to `left_out`, by the reason."""
    waiting = [folder]  # the next one last
    while waiting:
        folder = waiting.pop()
        if _is_there(folder / METADATA, follow=False):
            yield from _listed(folder, left_out)
            continue
        here, below, others = [], [], []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out[_HIDDEN].append(path)
            elif entry.is_dir(follow_symlinks=False):
                below.append(path)
            elif entry.is_dir():
                left_out[_LINK].append(path)
            elif path.suffix.lower() in pictures.endings():
                here.append(path)
            else:
                others.append(path)
        captions = {path.with_suffix(".txt") for path in here}
        if others := [path for path in others if path not in captions]:
            left_out[_OTHER] += others
        yield from (_Found(path, None) for path in here)
        waiting += reversed(below)


def _listed(folder: Path, left_out: dict[str, list[Path]]) -> Iterator[_Found]:
    """The pictures listed in `metadata.jsonl`, each of which exists."""
    listed = set()
    for number, entry in read_json_lines(folder / METADATA, _Entry):
        where = f"'{folder / METADATA}', line {number}"
        name = PurePosixPath(entry["file_name"])
        if not name.parts:
            raise FileError(f"{where}: file_name is empty; name a picture or remove the line")
        if name.is_absolute() or ".." in name.parts:
            raise FileError(
                f"{where}: {entry['file_name']!r:.200} leads out of the folder; move the picture"
                " into it"
            )
        path = folder / name
        if not _is_there(path):
            raise FileError(
                f"{where}: {entry['file_name']!r:.200} is missing; restore the file or remove the"
                " line"
            )
        check_caption(entry["text"], where)
        if path in listed:
            left_out[_REPEATED].append(path)
        listed.add(path)
        yield _Found(path, entry["text"])
    listed.add(folder / METADATA)
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    if unlisted := [path for path in files if path not in listed]:
        left_out[_UNLISTED] += unlisted


def _is_there(path: Path, *, follow: bool = True) -> bool:
    """Whether there is a file; `os.path.exists` calls it missing when its disk fails.

    Raises:
      OSError: an error that may pass, such as of rights.
    """
    try:
        os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError) as error:  # ValueErrors are of names that no file can have
        if disks.raised(error):
            raise
        return False
    return True


def _beside(picture: Path) -> str:
    """The caption in the text file beside a picture, without blanks around it."""
    path = picture.with_suffix(".txt")
    try:
        text = read_text(path)
    except FileNotFoundError:
        table = picture.with_name("metadata.csv")
        unread = f"; '{table}' is not read" if table.exists() else ""
        raise FileError(
            f"'{picture}' has no caption; write it into '{path}', or all of them into"
            f" '{picture.parent / METADATA}'{unread}"
        ) from None
    return plain_caption(text, f"'{path}'")


def plain_caption(text: str, where: str) -> str:
    """Strips a caption of the blanks around it, and ends the lines inside it with LF.

    Args:
      text: as read from a file.
      where: as in `check_caption`.

    Raises:
      FileError: as `check_caption`; or CR inside, perhaps between several captions.
    """
    caption = text.replace("\r\n", "\n").strip()
    if "\r" in caption:
        raise FileError(f"{where}: the caption has CR inside; end lines with LF or CR LF")
    check_caption(caption, where)
    return caption


def check_caption(caption: str, where: str) -> None:
    """Checks that an encoder can read a caption.

    Args:
      caption: of a picture, or to be drawn.
      where: the place it was found, which begins the message.

    Raises:
      FileError: it is empty, too long, or has NUL characters.
    """
    if not caption.strip():
        raise FileError(f"{where}: the caption is empty; write one or take its picture away")
    if "\0" in caption:
        raise FileError(f"{where}: the caption has NUL characters; remove them")
    if len(caption) > CAPTION_CHARACTERS:
        raise FileError(
            f"{where}: the caption has {len(caption)} characters, more than {CAPTION_CHARACTERS};"
            " shorten it"
        )
