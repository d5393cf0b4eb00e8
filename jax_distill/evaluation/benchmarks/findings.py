"""What networks find in drawn pictures: detections for GenEval, and embeddings of CLIP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from jax_distill.data import pictures
from jax_distill.data.making import Pace
from jax_distill.evaluation.benchmarks.clip import Clip, Colors
from jax_distill.evaluation.benchmarks.detectors import Detector, Found
from jax_distill.evaluation.benchmarks.drawn import Drawn, read_picture
from jax_distill.evaluation.benchmarks.geneval import Detection
from jax_distill.evaluation.benchmarks.prompts import Prompt
from jax_distill.storage.files import FileError, write_atomically

DETECTIONS, ANSWERS = "detections.jsonl", "answers.jsonl"
"""Files of a folder of pictures: what was found in them."""


def detect(drawn: Drawn, detector: Detector, clip: Clip | None = None) -> Path:
    """Writes `DETECTIONS` into a folder of GenEval's pictures.

    Args:
      drawn: the folder.
      detector: of objects.
      clip: names the colours of objects that a prompt asks a colour of.

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
    pace = Pace("pictures looked at", len(prompts) * drawn.facts["pictures"])
    lines = []
    for place, prompt in enumerate(prompts):
        named = {clause.name for clause in prompt.include if clause.color}
        for number, image in enumerate(drawn.layout.read(place)):
            objects = _detections(image, detector.find(image), named, colors)
            lines.append(
                {"picture": f"{place:05d}/samples/{number:04d}.png", "objects": list(objects)}
            )
            pace.add(1)
    path = drawn.folder / DETECTIONS
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


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
    count = drawn.facts["pictures"]
    pace = Pace("pictures embedded", len(drawn.asked.captions) * count)
    found = []
    for place in range(len(drawn.asked.captions)):
        found.append(clip.pictures(drawn.layout.read(place)))
        pace.add(count)
    places = np.repeat(np.arange(len(found)), count)
    return Embeddings(np.concatenate(found), clip.texts(drawn.asked.captions)[places], places)


def embed_folder(folder: Path, clip: Clip) -> np.ndarray:
    """Embeds all pictures in a folder, (n, d), in the order of their names.

    Raises:
      FileError: it has none, or one cannot be read.
    """
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
