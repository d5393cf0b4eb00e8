"""What networks find in drawn pictures: detections for GenEval, and embeddings of CLIP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from jax_distill.data import pictures
from jax_distill.data.making import Pace
from jax_distill.evaluation.benchmarks.clip import Clip, Colors
from jax_distill.evaluation.benchmarks.detectors import Detector, Found
from jax_distill.evaluation.benchmarks.drawn import (
    FACTS,
    Drawn,
    read_drawn,
    read_picture,
)
from jax_distill.evaluation.benchmarks.geneval import Detection
from jax_distill.evaluation.benchmarks.prompts import Prompt
from jax_distill.storage.files import FileError, write_atomically, write_json

DETECTIONS, ANSWERS = "detections.jsonl", "answers.jsonl"
"""Files of a folder of pictures: what was found in them."""
_BY, _UNFINISHED = "detected.json", "detections.unfinished.jsonl"
_SECONDS = 30  # after which detections are saved, to go on with


def detect(
    drawn: Drawn,
    detector: Detector,
    clip: Clip | None = None,
    networks: Mapping[str, str] | None = None,
) -> Path:
    """Writes `DETECTIONS` into a folder of GenEval's pictures.

    Pictures that the same networks have looked at, in this try or in one that was stopped, are not
    looked at again.

    Args:
      drawn: the folder.
      detector: of objects.
      clip: names the colours of objects that a prompt asks a colour of.
      networks: digests of both; nothing is known of other tries by default.

    Raises:
      ValueError: the prompts ask for classes that the detector does not know, or for colours and
        there is no CLIP.
    """
    prompts: Sequence[Prompt] = drawn.asked.prompts
    asked = {clause.name for prompt in prompts for clause in (*prompt.include, *prompt.exclude)}
    if unknown := sorted(asked - detector.classes):
        raise ValueError(
            f"--detector: it knows no {unknown[0]!r}, which the prompts ask for ({len(unknown)} of"
            f" {len(asked)} classes are unknown); give another one, or name its classes in"
            " config.json as the prompts do"
        )
    colored = any(clause.color for prompt in prompts for clause in prompt.include)
    if colored and clip is None:
        raise ValueError("--clip is missing; the prompts ask for colours, which CLIP names")
    colors = None if clip is None else Colors(clip)
    drawing = (drawn.folder / FACTS).read_bytes()
    by = networks and {**networks, "drawing": hashlib.sha256(drawing).hexdigest()}
    lines = {} if by is None else _known(drawn.folder, by)
    count = drawn.facts["pictures"]
    pace, saved = Pace("pictures looked at", len(prompts) * count - len(lines)), time.monotonic()
    for place, prompt in enumerate(prompts):
        names = [f"{place:05d}/samples/{number:04d}.png" for number in range(count)]
        if lines.keys() >= set(names):
            continue
        named = {clause.name for clause in prompt.include if clause.color}
        for name, image in zip(names, drawn.layout.read(place)):
            objects = _detections(image, detector.find(image), named, colors)
            lines[name] = json.dumps({"picture": name, "objects": list(objects)})
        pace.add(count)
        if by is not None and time.monotonic() - saved > _SECONDS:
            _write_lines(drawn.folder / _UNFINISHED, [json.dumps(by), *lines.values()])
            saved = time.monotonic()
    path = drawn.folder / DETECTIONS
    _write_lines(path, [lines[name] for name in sorted(lines)])
    if by is not None:
        write_json(drawn.folder / _BY, {**by, "file": _digest(path)})
        (drawn.folder / _UNFINISHED).unlink(missing_ok=True)
    return path


def _known(folder: Path, by: Mapping[str, str]) -> dict[str, str]:
    """Lines by picture of what the same networks found: all, or those of a try that was stopped."""
    whole, unfinished = folder / DETECTIONS, folder / _UNFINISHED
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / _BY).read_bytes()) == {**by, "file": _digest(whole)}:
            return _by_picture(whole.read_text().splitlines())
    with contextlib.suppress(OSError, ValueError):
        first, *lines = unfinished.read_text().splitlines()
        if json.loads(first) == by:
            return _by_picture(lines)
    return {}


def _by_picture(lines: Sequence[str]) -> dict[str, str]:
    return {json.loads(line)["picture"]: line for line in lines}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_atomically(path, "".join(line + "\n" for line in lines))


def _detections(
    image: np.ndarray, found: Sequence[Found], named: set[str], colors: Colors | None
) -> Iterator[dict]:
    """Objects as `geneval.read_detections` takes them, those of some classes with colours."""
    scores: dict[int, dict[str, float]] = {}
    for name in sorted(named):
        places = [place for place, each in enumerate(found) if each.name == name]
        if places:
            crops = [(found[place].box, found[place].mask) for place in places]
            scores |= zip(places, colors(image, name, crops))
    for place, each in enumerate(found):
        made = Detection(name=each.name, box=each.box, score=each.score, colors=scores.get(place))
        fields = msgspec.to_builtins(made)
        yield {name: value for name, value in fields.items() if value is not None}


class Embeddings(NamedTuple):
    """CLIP's embeddings of drawn pictures.

    Attributes:
      pictures: (n, d).
      texts: (n, d), of each picture's prompt.
      prompts: (n,), places of the prompts.
    """

    pictures: np.ndarray
    texts: np.ndarray
    prompts: np.ndarray


def embed(drawn: Drawn, clip: Clip) -> Embeddings:
    """Embeds the pictures of a folder and their prompts."""
    pictures, captions = _embedded(drawn, clip), drawn.asked.captions
    places = np.repeat(np.arange(len(captions)), drawn.facts["pictures"])
    return Embeddings(pictures, clip.texts(captions)[places], places)


def _embedded(drawn: Drawn, clip: Clip) -> np.ndarray:
    """Embeddings of a folder's pictures, (n, d), in the order of prompts."""
    count = drawn.facts["pictures"]
    pace, found = Pace("pictures embedded", len(drawn.asked.captions) * count), []
    for place in range(len(drawn.asked.captions)):
        found.append(clip.pictures(drawn.layout.read(place)))
        pace.add(count)
    return np.concatenate(found)


def embed_folder(folder: Path, clip: Clip) -> np.ndarray:
    """Embeds all pictures in a folder, (n, d), in the order of their names.

    Of a folder that was drawn for a benchmark, each picture once, and no grids.

    Raises:
      FileError: it has none, or one cannot be read.
    """
    if (folder / FACTS).exists():
        return _embedded(read_drawn(folder), clip)
    found = []
    if folder.is_dir():
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in pictures.endings())
    if not found:
        raise FileError(f"--real: '{folder}' has no pictures; give a folder of PNG or JPEG files")
    pace, embedded = Pace("real pictures embedded", len(found)), []
    for path in found:
        embedded.append(clip.pictures([read_picture(path)]))
        pace.add(1)
    return np.concatenate(embedded)
