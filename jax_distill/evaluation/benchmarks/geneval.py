"""GenEval's judge: what was detected in a picture against what its prompt asks for.

The rules are those of the authors' program (Ghosh et al., 2023, arXiv:2310.11513,
evaluation/evaluate_images.py) at its default settings. Detections may come from any detector, in a
file, see `read_detections`, or in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, get_args

import msgspec
import numpy as np

from jax_distill.evaluation.benchmarks.intervals import Figure, mean_of, ratio
from jax_distill.evaluation.benchmarks.prompts import (
    Color,
    Excluded,
    Included,
    Prompt,
    Relation,
    in_order,
)
from jax_distill.storage.files import FileError, check_finite_numbers, read_json_lines
from jax_distill.storage.quoting import shown

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16  # of a class
_SLACK = 0.1  # of an offset, in the sum of both sizes
_CONE = 0.5  # of a direction: the least part of the offset along it
_NOWHERE = 1e-3  # an offset, px

_PICTURE = re.compile(r"(\d{1,9})/samples/(\d{1,9})\.png")
_FIX = "mend that line or detect again"
_Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]


class Detection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object that a detector found.

    Attributes:
      name: of its class, as the prompts call it.
      box: left, top, right and bottom in pixels, y down.
      score: the detector's confidence, 0..1.
      colors: a score for each colour, such as CLIP's cosine; the largest one names the colour.
        Judging needs them only for prompts with colours.
      mask: name of a file with its mask; for whoever makes the colour scores.
    """

    name: str = msgspec.field(name="class")
    box: tuple[_Number, _Number, _Number, _Number]
    score: Annotated[float, msgspec.Meta(ge=0, le=1)]
    colors: dict[Color, _Number] | None = None
    mask: str | None = None

    @property
    def color(self) -> Color:
        """The colour of the largest score, the first in the order of `Color` among equals.

        Raises:
          ValueError: there are no scores.
        """
        if not self.colors:
            raise ValueError(
                f"a detected {shown(self.name)} has no colour scores, but its prompt asks for a"
                " colour; add them as colors"
            )
        return max((x for x in get_args(Color) if x in self.colors), key=self.colors.__getitem__)


class Verdict(NamedTuple):
    """Whether a picture is what the prompt asks for, and if not, why: a line for each clause."""

    correct: bool
    reasons: tuple[str, ...]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of detections."""

    picture: str
    objects: tuple[Detection, ...]


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The objects that count, by class, surest first.

    Scores must be above the threshold, that of counting if this is the task; of each class the
    surest `MOST_OBJECTS` are kept, however they overlap. Among equal scores the later one comes
    first: so does the authors' program sort a few of them, and leaves it to chance for many.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    # In float32, as detectors give them.
    for detection in sorted(reversed(detections), key=lambda each: -np.float32(each.score)):
        if np.float32(detection.score) > np.float32(threshold):
            objects.setdefault(detection.name, []).append(detection)
    return {name: surest[:MOST_OBJECTS] for name, surest in objects.items()}


def relations(first: Detection, second: Detection) -> list[Relation]:
    """Where the first object is relative to the second: none to two of the relations.

    The offset of the centres is shortened along each axis by a tenth of both sizes' sum, down to 0,
    then divided by the length that it had before; parts of more than a half are relations.
    """
    boxes = np.array([first.box, second.box], np.float64).reshape(2, 2, 2)  # object, corner, axis
    offset = np.subtract(*boxes.mean(1))
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])
    shortened = np.maximum(np.abs(offset) - _SLACK * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(shortened) < _NOWHERE):
        return []
    right, down = shortened / np.linalg.norm(offset)
    along = {"left of": -right, "right of": right, "above": -down, "below": down}
    return [relation for relation, part in along.items() if part > _CONE]


def judge(detections: Sequence[Detection], prompt: Prompt) -> Verdict:
    """Judges a picture.

    Clauses of `include` look at the surest objects of their class, as many as they ask for: others
    neither help nor harm. Two clauses of one class look at the same objects. A clause that does not
    hold leaves no objects for later ones to be placed beside. Clauses of `exclude` count all
    objects that are kept.

    Args:
      detections: of the picture, in any order.
      prompt: it was drawn from.

    Raises:
      ValueError: an object whose colour counts has no colour scores.
    """
    _, reasons = _looked_at(detections, prompt)
    return Verdict(not reasons, tuple(reasons))


def chosen(detections: Sequence[Detection], prompt: Prompt) -> list[list[Detection]] | None:
    """The objects that fulfil each clause of `include`; None where the picture is wrong.

    Args and raises: as `judge`.
    """
    groups, reasons = _looked_at(detections, prompt)
    return None if reasons else groups


def _looked_at(
    detections: Sequence[Detection], prompt: Prompt
) -> tuple[list[list[Detection] | None], list[str]]:
    """The objects of each clause, None where it does not hold, and why the picture is wrong."""
    objects = kept(detections, prompt.tag)
    groups: list[list[Detection] | None] = []
    reasons = []
    for clause in prompt.include:
        group = objects.get(clause.name, [])[: clause.count]
        reason = _unmet(clause, group, groups)
        groups.append(None if reason else group)
        if reason:
            reasons.append(reason)
    return groups, [*reasons, *_too_many(prompt.exclude, objects)]


def _unmet(
    clause: Included, group: Sequence[Detection], groups: Sequence[list[Detection] | None]
) -> str | None:
    """Why a clause does not hold; None if it does."""
    name = clause.name
    if len(group) < clause.count:
        return f"{name}: {len(group)} of {clause.count} found"
    if clause.color is not None:
        colors = [each.color for each in group]
        if colors.count(clause.color) < clause.count:
            return f"{name}: not {clause.color} but {', '.join(sorted(set(colors)))}"
    if clause.position is None:
        return None
    relation, place = clause.position
    if groups[place] is None:
        return f"{name}: nothing that it could be {relation}"
    for each in group:
        for other in groups[place]:
            where = relations(each, other)
            if relation not in where:
                return f"{name}: not {relation} {other.name} but {' and '.join(where) or 'neither'}"
    return None


def _too_many(clauses: Sequence[Excluded], objects: Mapping[str, Sequence]) -> Iterator[str]:
    for clause in clauses:
        count = len(objects.get(clause.name, []))
        if count >= clause.count:
            yield f"{clause.name}: {count} found, which is not below {clause.count}"


def read_detections(path: Path, prompts: Sequence[Prompt]) -> list[list[tuple[Detection, ...]]]:
    """Reads what was detected in the pictures of a benchmark.

    Each line of the file is of one picture: {"picture": "00000/samples/0000.png", "objects":
    [{"class": "dog", "box": [left, top, right, bottom], "score": 0.9, "colors": {"red": 0.2, ..},
    "mask": ..}, ..]}, the last two where there are some. The folder is the prompt's place, from 0.

    Returns:
      For each prompt its pictures, in the order of their names, and for each what was found.

    Raises:
      FileError: the file is not of that form, has a picture twice, or lacks those of a prompt.
      FileNotFoundError: there is none.
    """
    detections: list[dict[int, tuple[Detection, ...]]] = [{} for _ in prompts]
    for number, entry in read_json_lines(path, _Line, fix=_FIX):
        where = f"'{path}', line {number}"
        check_finite_numbers(entry, where=where, fix=_FIX)
        line = msgspec.convert(entry, _Line)
        name = _PICTURE.fullmatch(line.picture)
        if name is None:
            raise FileError(
                f"{where}: picture {shown(line.picture)} is not named as 00000/samples/0000.png"
            )
        prompt, sample = int(name[1]), int(name[2])
        if prompt >= len(prompts):
            raise FileError(
                f"{where}: picture {shown(line.picture)} is of prompt {prompt}, but there are"
                f" {len(prompts)}; give the prompts that were drawn"
            )
        if sample in detections[prompt]:
            raise FileError(f"{where}: picture {shown(line.picture)} is listed twice; remove one")
        for each in line.objects:
            if each.colors is not None and len(each.colors) < len(get_args(Color)):
                raise FileError(
                    f"{where}: colors has {len(each.colors)} of the {len(get_args(Color))} colours"
                    " that GenEval chooses from; score all of them"
                )
            left, top, right, bottom = each.box
            if left > right or top > bottom:
                raise FileError(
                    f"{where}: box {shown(list(each.box))} ends before it begins; give left, top,"
                    " right, bottom"
                )
        detections[prompt][sample] = line.objects
    lacking = [place for place, pictures in enumerate(detections) if not pictures]
    if lacking:
        raise FileError(
            f"'{path}' has no picture of {len(lacking)} of {len(prompts)} prompts, such as"
            f" {lacking[0]:05d}; add them, with no objects where none were found"
        )
    return in_order({f"{place:05d}": pictures for place, pictures in enumerate(detections)}, path)


def verdicts(
    detections: Sequence[Sequence[Sequence[Detection]]], prompts: Sequence[Prompt]
) -> list[list[Verdict]]:
    """Judges all pictures of a benchmark: for each prompt, for each of its pictures.

    Raises:
      ValueError: as `judge`, naming the picture.
    """
    judged = []
    for place, (pictures, prompt) in enumerate(zip(detections, prompts, strict=True)):
        judged.append([])
        for number, objects in enumerate(pictures):
            try:
                judged[-1].append(judge(objects, prompt))
            except ValueError as error:
                raise ValueError(f"picture {number} of prompt {place}: {error}") from None
    return judged


def figures(judged: Sequence[Sequence[Verdict]], prompts: Sequence[Prompt]) -> dict[str, Figure]:
    """The scores, 0..1, as functions of the prompts' weights, see `intervals.Figure`.

    Resample prompts within their tasks, so that every task keeps its size.

    Returns:
      A share of right pictures for each task, and "score", the mean of these.
    """
    tags = np.array([prompt.tag for prompt in prompts])
    right = np.array([sum(each.correct for each in pictures) for pictures in judged], np.float64)
    counts = np.array([len(pictures) for pictures in judged], np.float64)
    tasks = {
        tag: ratio(right * (tags == tag), counts * (tags == tag)) for tag in dict.fromkeys(tags)
    }
    return {"score": mean_of(list(tasks.values())), **{str(tag): tasks[tag] for tag in tasks}}
