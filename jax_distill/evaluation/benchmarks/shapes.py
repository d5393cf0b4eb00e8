"""The shapes world by GenEval's rules: its detector finds the objects, `geneval` judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from jax_distill.evaluation.benchmarks import geneval
from jax_distill.evaluation.benchmarks.geneval import Detection
from jax_distill.evaluation.benchmarks.prompts import Color, Excluded, Included, Prompt
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.detector import Found, find_objects
from jax_distill.worlds.shapes.requests import TASKS, Request

_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_SURE = 0.9  # of every found object: whatever is less like its shape is not found


def asked(request: Request, caption: str = "") -> Prompt:
    """A request of the shapes world as a prompt of GenEval.

    In counting, more objects of a shape than asked are excluded. The second of two objects in a
    relation comes first, since a clause refers to one before it.

    Raises:
      ValueError: it asks for one shape in two entries, which GenEval cannot tell apart.
    """
    shapes = [shape for shape, _, _ in request.objects]
    if len(set(shapes)) < len(shapes):
        raise ValueError(
            f"a request for {' and '.join(shapes)}: GenEval's rules look at the same objects for"
            " both; ask for different shapes"
        )
    clauses = [Included(name=s, count=count, color=color) for s, color, count in request.objects]
    if request.relation is not None:
        first, second = clauses
        beside = Included(
            name=first.name,
            count=first.count,
            color=first.color,
            position=(_RELATIONS[request.relation], 0),
        )
        clauses = [second, beside]
    excluded = []
    if request.task == "counting":
        excluded = [Excluded(name=clause.name, count=clause.count + 1) for clause in clauses]
    return Prompt(tag=request.task, include=tuple(clauses), exclude=tuple(excluded), prompt=caption)


def described(found: Found) -> Detection:
    """An object as a detection: sure enough to count, the surer the more like its shape."""
    x, y, right, down = found.x, found.y, found.width / 2, found.height / 2
    return Detection(
        name=found.shape,
        box=(x - right, y - down, x + right, y + down),
        score=_SURE + (1 - _SURE) * found.confidence,
        colors={color: float(color == found.color) for color in get_args(Color)},
    )


def detect(image: np.ndarray) -> list[Detection]:
    """The objects of a picture, (64, 64, 3) uint8, see `find_objects`."""
    return [described(found) for found in find_objects(image)]


def judge(image: np.ndarray, request: Request) -> bool:
    """Whether a picture, (64, 64, 3) uint8, is what the request asks for."""
    return geneval.judge(detect(image), asked(request)).correct


def score(images: Sequence[np.ndarray], prompts: Sequence[renderer.Prompt]) -> dict:
    """GenEval's score: the mean over tasks of the share of right pictures.

    Args:
      images: N pictures, (64, 64, 3) uint8 each, made for `prompts` in order.
      prompts: N prompts; the mean is over the tasks among them, all six for the full benchmark.

    Returns:
      {"score": mean of the task scores, "tasks": {task: score}}, all in [0, 1].

    Raises:
      ValueError: the numbers of images and prompts differ, or there are none.
    """
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(
            f"images, prompts: expected one image per prompt, got {len(images)} images for "
            f"{len(prompts)} prompts"
        )
    verdicts: dict[str, list[bool]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        verdicts.setdefault(prompt.request.task, []).append(judge(image, prompt.request))
    tasks = {task: float(np.mean(verdicts[task])) for task in TASKS if task in verdicts}
    return {"score": float(np.mean(list(tasks.values()))), "tasks": tasks}
