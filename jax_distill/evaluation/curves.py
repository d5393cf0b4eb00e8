"""Metrics of a training as plots: losses and throughput large, all others small."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_distill.evaluation import page, plots
from jax_distill.evaluation.metrics import Metrics, read_metrics
from jax_distill.storage.quoting import one_line

MAX_LOSSES, MAX_STAGES, MAX_PLOTS = 4, 8, 24  # more than runs have; a page must be done once

_TIMES = ("step", "time")  # of metrics.jsonl, which no plot shows


class Stage(NamedTuple):
    """The metrics of a training.

    Attributes:
      heading: of the section.
      large: plots of loss and throughput.
      small: plots of other metrics.
      constant: metrics that never change, as "name = value".
      others: how many more there are.
    """

    heading: str
    large: list[page.Figure]
    small: list[page.Figure]
    constant: list[str]
    others: int


def stages(workdir: Path, metrics: Metrics | None) -> list[Stage]:
    """The run's own training, and those before it in folders of the workdir."""
    found = [("Training", metrics)]
    for path in sorted(workdir.glob("*/metrics.jsonl"))[:MAX_STAGES]:
        name = one_line(path.parent.name.replace("_", " "))
        found.append((f"Stage before: {name}", read_metrics(path)))
    return [_stage(heading, each) for heading, each in found if each is not None]


def _stage(heading: str, metrics: Metrics) -> Stage:
    names = metrics.names()
    speed = next((name for name in ("examples_per_sec", "steps_per_sec") if name in names), None)
    stage = Stage(heading, [], [], [], 0)
    drawn = [x for x in names if x == speed or not (x in _TIMES or x.endswith("_per_sec"))]
    for name in drawn:
        steps, values = metrics.series(name)
        is_large = name == speed or _is_loss(name) and len(stage.large) < MAX_LOSSES
        if not len(values):
            continue
        if not is_large and values.min() == values.max():
            stage.constant.append(f"{name} = {values[0]:g}")
        elif not is_large and len(stage.small) >= MAX_PLOTS:
            stage = stage._replace(others=stage.others + 1)
        else:
            contrast = 1 if _is_loss(name) else 100
            log = name != speed and 0 < contrast * values.min() < values.max()
            draw = plots.curve(steps, values, log=bool(log), from_zero=name == speed)
            size = (4.6, 2.6) if is_large else (3.3, 2.1)
            plot = plots.inline(draw, size, f"{name} against training steps")
            caption = _caption(name, values, metrics)
            (stage.large if is_large else stage.small).append(page.Figure(caption, plot))
    return stage


def _is_loss(name: str) -> bool:
    """Whether a metric is a loss: the run's, or a player's, whose name stands before it."""
    return name.rpartition("/")[2] == "loss"


def _caption(name: str, values: np.ndarray, metrics: Metrics) -> str:
    """The caption of a metric's plot, whose finite values are given."""
    if _is_loss(name):
        lost = sum(name in line for line in metrics.lines) - len(values)
        words = f" ({lost} {page.plural('value', lost)} not finite, not drawn)"
        return name.capitalize().replace("/", ": ") + words * bool(lost)
    if not name.endswith("_per_sec"):
        return name
    words = count(np.median(values))
    return f"{name.removesuffix('_per_sec').capitalize()} per second, median {words}"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
