"""Folders of pictures that were drawn for a benchmark: their layouts and their facts.

drawing.json                                  what was drawn, with what; written first
prompts.jsonl, prompts.csv or prompts.txt     the file of prompts, as it was given
00000/metadata.jsonl                          GenEval's layout, which plain prompts have too:
00000/samples/0000.png .. 0003.png            pictures of the first prompt, and of all of them
00000/grid.png
pictures/<item_id>.png                        DPG-Bench's: a grid of a prompt's pictures
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import numpy as np

from jax_distill.data import pictures
from jax_distill.data.sources.prompts import Prompts
from jax_distill.data.sources.source import Columns
from jax_distill.evaluation import png
from jax_distill.evaluation.benchmarks.prompts import (
    BUNDLED,
    DensePrompt,
    Prompt,
    read_dpg,
    read_geneval,
)
from jax_distill.storage import buckets, paths
from jax_distill.storage.files import (
    FileError,
    parse_json,
    read_json,
    read_text,
    write_atomically,
)
from jax_distill.storage.quoting import shown

FACTS = "drawing.json"
BENCHMARKS = ("geneval", "dpg", "prompts")
MOST_PROMPTS, MOST_PICTURES = 2**20, 2**10  # of a benchmark, and of a prompt

_CAPTIONS = ("prompt", "text", "caption")  # columns
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Facts(TypedDict):
    """The facts of `drawing.json` that are read again; there are others, to tell folders apart.

    Attributes:
      file: of the prompts.
      prompts: its digest.
      kind: of network.
      config: of the network's run.
    """

    benchmark: Literal[BENCHMARKS]
    file: str
    pictures: _Count
    steps: _Count
    kind: Literal["teacher", "student"]
    seed: int
    prompts: str
    config: dict[str, Any]


class Asked(NamedTuple):
    """The prompts of a benchmark.

    Attributes:
      benchmark: one of `BENCHMARKS`.
      prompts: as it has them.
      captions: a text each, to be drawn.
      text: the file's content.
      ending: of its name.
    """

    benchmark: str
    prompts: Sequence[Prompt] | Sequence[DensePrompt] | Sequence[str]
    captions: Sequence[str]
    text: str
    ending: str


def read_asked(benchmark: str, path: Path) -> Asked:
    """Reads the prompts of a benchmark.

    Args:
      benchmark: one of `BENCHMARKS`. "prompts" are a caption a line, or those of a `.jsonl` or
        `.csv` in the column prompt, text or caption.
      path: of the file.

    Raises:
      FileError: it holds no such prompts, or too many.
      FileNotFoundError: there is none.
    """
    text = read_text(path)
    if benchmark == "geneval":
        prompts, ending = read_geneval(path), ".jsonl"
        captions = [prompt.prompt for prompt in prompts]
    elif benchmark == "dpg":
        prompts, ending = read_dpg(path), ".csv"
        captions = [prompt.text for prompt in prompts]
    else:
        found, ending = Prompts([path], _columns(path, text)), path.suffix.lower()
        captions = prompts = [found[index].caption for index in range(len(found))]
        ending = ending if ending in (".jsonl", ".csv") else ".txt"
    if len(prompts) > MOST_PROMPTS:
        raise FileError(
            f"'{path}' has {len(prompts)} prompts, more than {MOST_PROMPTS}; draw parts of it"
        )
    return Asked(benchmark, prompts, captions, text, ending)


def digest(text: str) -> str:
    """Of a file of prompts, as `drawing.json` has it."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _columns(path: Path, text: str) -> Columns:
    """The column of captions: the first of `_CAPTIONS` that the first row has.

    Raises:
      FileError: it has none of them.
    """
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv"):
        return Columns()
    if ending == ".csv":
        known = next(csv.reader(io.StringIO(text, newline="")), [])
    else:
        first = next((line for line in text.splitlines() if line.strip()), "{}")
        known = parse_json(first, dict, where=f"'{path}', line 1", fix="mend that line")
    for name in _CAPTIONS:
        if name in known:
            return Columns(None, name)
    raise FileError(f"'{path}' has no column {', '.join(_CAPTIONS)}; call that of captions so")


def bundled(benchmark: str) -> Path:
    """The file of a few prompts of our own.

    Raises:
      ValueError: there is none for this benchmark.
    """
    names = {"geneval": "geneval.jsonl", "dpg": "dpg.csv"}
    if benchmark not in names:
        raise ValueError("--prompts_file: no plain prompts are bundled; give a file, one a line")
    return BUNDLED / names[benchmark]


class InFolders:
    """GenEval's layout: a folder for each prompt, a file for each picture.

    Args:
      folder: of the drawing.
      asked: the prompts.
      pictures: of each of them.
    """

    def __init__(self, folder: Path, asked: Asked, pictures: int):
        self._folder, self._asked, self._pictures = folder, asked, pictures

    def lacking(self, place: int, there: Set[str]) -> list[int] | None:
        """Numbers of a prompt's pictures that must be drawn; None if nothing is missing.

        Args:
          place: of the prompt.
          there: names of the files that there are.
        """
        numbers = [n for n in range(self._pictures) if self._picture(place, n) not in there]
        others = (f"{place:05d}/{name}" for name in ("metadata.jsonl", "grid.png"))
        return None if not numbers and there.issuperset(others) else numbers

    def write(self, place: int, drawn: Mapping[int, np.ndarray]) -> None:
        """Writes those pictures of a prompt that were missing, (H, W, 3) uint8, and its grid."""
        for number, picture in drawn.items():
            png.save(self._folder / self._picture(place, number), picture)
        prompt = self._asked.prompts[place]
        described = {"prompt": prompt} if isinstance(prompt, str) else msgspec.to_builtins(prompt)
        text = json.dumps(described, ensure_ascii=False) + "\n"
        write_atomically(self._folder / f"{place:05d}/metadata.jsonl", text)
        whole = [
            drawn[number] if number in drawn else self._read(place, number)
            for number in range(self._pictures)
        ]
        png.save(self._folder / f"{place:05d}/grid.png", tiled(whole))

    def read(self, place: int) -> list[np.ndarray]:
        """The pictures of a prompt, (H, W, 3) uint8 each."""
        return [self._read(place, number) for number in range(self._pictures)]

    def _read(self, place: int, number: int) -> np.ndarray:
        return read_picture(self._folder / self._picture(place, number))

    def _picture(self, place: int, number: int) -> str:
        return f"{place:05d}/samples/{number:04d}.png"


class InGrids:
    """DPG-Bench's layout: a file for each prompt, its pictures side by side without a gap.

    They lie in a folder of their own, since the authors' program takes every file for a grid.

    Args: as of `InFolders`.
    """

    def __init__(self, folder: Path, asked: Asked, pictures: int):
        self._folder, self._asked, self._pictures = folder, asked, pictures

    def lacking(self, place: int, there: Set[str]) -> list[int] | None:
        """As of `InFolders`: all of them, or none."""
        return None if self._grid(place) in there else list(range(self._pictures))

    def write(self, place: int, drawn: Mapping[int, np.ndarray]) -> None:
        png.save(self._folder / self._grid(place), tiled(list(drawn.values())))

    def read(self, place: int) -> list[np.ndarray]:
        grid = read_picture(self._folder / self._grid(place))
        columns = math.ceil(math.sqrt(self._pictures))
        height, width = (side // columns for side in grid.shape[:2])
        places = (divmod(number, columns) for number in range(self._pictures))
        return [grid[y * height :][:height, x * width :][:, :width] for y, x in places]

    def _grid(self, place: int) -> str:
        return f"pictures/{self._asked.prompts[place].item}.png"


def layout(folder: Path, asked: Asked, count: int) -> InFolders | InGrids:
    """The layout of a benchmark's folder with `count` pictures a prompt.

    Raises:
      ValueError: the benchmark's grids have another number of pictures; or the authors' program,
        which takes what is before the first dot of a grid's name, would not find its prompt.
    """
    if asked.benchmark != "dpg":
        return InFolders(folder, asked, count)
    if count not in (1, 4):
        raise ValueError(f"--pictures: DPG-Bench judges 1 or 4 pictures of a prompt, not {count}")
    if dotted := [prompt.item for prompt in asked.prompts if "." in prompt.item]:
        raise FileError(
            f"item_id {shown(dotted[0])} has a dot, at which DPG-Bench's program cuts names off;"
            " rename it"
        )
    return InGrids(folder, asked, count)


def tiled(images: Sequence[np.ndarray]) -> np.ndarray:
    """A near-square grid of pictures (H, W, 3) without gaps; empty places are black."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    empty = [np.zeros_like(images[0])] * (rows * columns - len(images))
    every = [*images, *empty]
    lines = [np.concatenate(every[at : at + columns], 1) for at in range(0, len(every), columns)]
    return np.concatenate(lines)


def read_picture(path: Path) -> np.ndarray:
    """The pixels of a picture's file, (H, W, 3) uint8.

    Raises:
      FileError: it is missing or damaged.
    """
    path = paths.path(path)
    if paths.is_bucket(path):
        return np.asarray(pictures.shown(pictures.Encoded(path.read_bytes(), f"'{path}'")).image)
    return np.asarray(pictures.shown(path).image)


def names(folder: Path) -> set[str]:
    """Names of all files in a folder and below it, such as "00000/grid.png"."""
    if paths.is_bucket(folder):
        return {str(path.relative_to(folder)) for path in buckets.objects(folder)}
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


class Drawn(NamedTuple):
    """A folder of pictures that is whole.

    Attributes:
      folder: of them.
      facts: of its `drawing.json`.
      asked: its prompts.
      layout: which reads the pictures of a prompt.
    """

    folder: Path
    facts: Facts
    asked: Asked
    layout: InFolders | InGrids


def read_drawn(folder: Path) -> Drawn:
    """Opens a folder of pictures.

    Raises:
      FileError: it is no such folder, or pictures are missing.
    """
    folder = paths.path(folder)
    again = "draw it with python -m jax_distill.evaluate --benchmark"
    try:
        facts = read_json(folder / FACTS, Facts, fix=again)
        asked = read_asked(facts["benchmark"], folder / facts["file"])
    except FileNotFoundError as error:
        raise FileError(f"'{folder}' has no {Path(error.filename).name}; {again}") from None
    if digest(asked.text) != facts["prompts"]:
        raise FileError(
            f"'{folder / facts['file']}' is not as it was drawn from; put the file back, or"
            f" {again} into another folder"
        )
    found = layout(folder, asked, facts["pictures"])
    there = names(folder)
    lacking = [place for place in range(len(asked.prompts)) if found.lacking(place, there)]
    if lacking:
        raise FileError(
            f"'{folder}' lacks pictures of {len(lacking)} of {len(asked.prompts)} prompts; run the"
            " command that began it again"
        )
    return Drawn(folder, facts, asked, found)
