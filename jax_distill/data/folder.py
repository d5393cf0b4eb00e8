"""A folder of pictures with captions, as people have them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


class Captioned(NamedTuple):
    """A picture's file and what it shows."""

    path: Path
    caption: str


def find(folder: Path) -> list[Captioned]:
    """The pictures of a folder, in order of their names.

    Captions are in `metadata.jsonl`, a line {"file_name": .., "text": ..} a picture, or, where that
    is missing, in a text file beside each picture, `cat.txt` for `cat.png`.

    Raises:
      ValueError: no such folder, no pictures in it, or one that is missing, has no caption, or is
        no picture by its first bytes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is no folder; give one of pictures with captions")
    if (folder / METADATA).is_file():
        found = [
            _described(folder, number, line)
            for number, line in enumerate((folder / METADATA).read_text().splitlines(), 1)
            if line.strip()
        ]
    else:
        pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
        found = [Captioned(picture, _beside(picture)) for picture in pictures]
    if not found:
        raise ValueError(f"'{folder}' has no pictures ({', '.join(ENDINGS)}) and no {METADATA}")
    for picture in found:
        with _reading(picture.path), Image.open(picture.path):
            pass
    return found


def _described(folder: Path, number: int, line: str) -> Captioned:
    try:
        entry = json.loads(line)
        path, caption = folder / entry["file_name"], str(entry["text"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(
            f"'{folder / METADATA}', line {number}: it is no JSON object with file_name and text"
        ) from None
    if not path.is_file():
        raise ValueError(f"'{folder / METADATA}', line {number}: there is no file '{path}'")
    return Captioned(path, caption)


def _beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(
            f"'{picture}' has no caption; write it into '{text}', or all of them into"
            f" '{picture.parent / METADATA}'"
        )
    return text.read_text().strip()


def read(path: Path, height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3) uint8: resized until it covers that, the middle cut out.

    Raises:
      ValueError: the file is no picture.
    """
    with _reading(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the picture in whatever Pillow raises."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{path}' cannot be read as a picture: {error}") from None
