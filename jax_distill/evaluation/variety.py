"""How much the right pictures of one request differ in what the request leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from jax_distill.evaluation.benchmarks.geneval import Detection, chosen
from jax_distill.evaluation.benchmarks.prompts import Prompt
from jax_distill.evaluation.benchmarks.shapes import asked, detect
from jax_distill.worlds.shapes.requests import Request


class Variety(NamedTuple):
    """Differences of pictures, means over the objects that were asked for.

    Attributes:
      place: distance of an object's centres in pixels.
      size: difference of its widths in pixels.
      color: share of objects of another colour, of those whose colour the request leaves open;
        None where it names all.
    """

    place: float
    size: float
    color: float | None


def leaves_color_open(request: Request) -> bool:
    """Whether an object's colour is not named."""
    return any(color is None for _, color, _ in request.objects)


def difference(
    first: Sequence[Sequence[Detection]], second: Sequence[Sequence[Detection]], prompt: Prompt
) -> Variety:
    """The difference of two pictures whose objects `geneval.chosen` gave for the same prompt.

    Alike objects, such as three circles, have no order: they are matched so that the sum of their
    distances is least.
    """
    places, sizes, colors = [], [], []
    for ours, theirs, clause in zip(first, second, prompt.include, strict=True):
        distances = cdist(list(map(_center, ours)), list(map(_center, theirs)))
        for i, j in zip(*linear_sum_assignment(distances)):
            places.append(distances[i, j])
            sizes.append(abs(_width(ours[i]) - _width(theirs[j])))
            if clause.color is None:
                colors.append(ours[i].color != theirs[j].color)
    color = float(np.mean(colors)) if colors else None
    return Variety(float(np.mean(places)), float(np.mean(sizes)), color)


def _center(found: Detection) -> tuple[float, float]:
    left, top, right, bottom = found.box
    return (left + right) / 2, (top + bottom) / 2


def _width(found: Detection) -> float:
    return found.box[2] - found.box[0]


def among(images: Sequence[np.ndarray], request: Request) -> Variety | None:
    """The mean difference over all pairs of the right pictures of a request.

    Wrong pictures are in no pair: they cannot make a network look diverse.

    Args:
      images: of the request, (64, 64, 3) uint8 each.
      request: theirs.

    Returns:
      None if fewer than two of them are right.
    """
    prompt = asked(request)
    read = (chosen(detect(image), prompt) for image in images)
    right = [objects for objects in read if objects is not None]
    pairs = [difference(a, b, prompt) for a, b in combinations(right, 2)]
    if not pairs:
        return None
    place, size, color = zip(*pairs)
    color = float(np.mean(color)) if leaves_color_open(request) else None
    return Variety(float(np.mean(place)), float(np.mean(size)), color)
