"""Grids of sample pictures, drawn while a network is trained."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_distill.devices import processes
from jax_distill.evaluation import grids
from jax_distill.models.finite import NotFinite
from jax_distill.pipeline import Pipeline
from jax_distill.worlds import Source


def reference_row(
    teacher: Pipeline, source: Source, settings: ConfigDict
) -> Callable[[], np.ndarray]:
    """A function that draws the teacher's row of the sample grids, once.

    Args:
      teacher: draws it.
      source: the data.
      settings: the run's section `samples`.
    """

    def draw() -> np.ndarray:
        _, text = teacher.world.preview(source, settings.prompts)
        return teacher.draw(text, steps=settings.teacher_steps)

    return functools.cache(draw)


def previewer(
    workdir: Path,
    trained: Pipeline,
    source: Source,
    steps: dict[str, Sequence[int]],
    reference: Callable[[], np.ndarray] | None = None,
):
    """A function (step, averaged parameters) that draws fixed prompts into `samples/`.

    Args:
      workdir: of the run.
      trained: what is trained; its parameters are set.
      source: the data.
      steps: numbers of sampling steps, a row each, under the name of what is trained.
      reference: draws the first row, see `reference_row`.
    """
    config, world = trained.config, trained.world
    full = config.samples.teacher_steps
    prompts, text = world.preview(source, config.samples.prompts)
    draw = functools.partial(Pipeline.draw, text=text, resolution=world.resolution)
    ((name, counts),) = steps.items()

    def preview(step: int, params: dict) -> None:
        trained.params = params
        rows = {f"{name}, {count} step{'s' * (count > 1)}": count for count in counts}
        pictures = [draw(trained, steps=count) for count in rows.values()]
        labels = list(rows)
        if reference is not None:
            pictures, labels = [reference(), *pictures], [f"teacher, {full} steps", *labels]
        if not processes.is_leader():
            return
        grids.save_grid(
            workdir / "samples" / f"step-{step:06d}.png",
            pictures,
            row_labels=labels,
            column_labels=prompts,
            title=f"{config.name}, step {step}",
        )

    return preview


def under_way(hook: Callable[[int, dict], None]) -> Callable[[int, dict], None]:
    """A hook of training that draws: pictures that are not finite are a line, not the run's end.

    The run may get over it, and may be told to (`on_nonfinite`); what is drawn after it may not.
    """

    def warned(step: int, params: dict) -> None:
        try:
            hook(step, params)
        except NotFinite as error:
            logging.warning("step %d: nothing is drawn or scored; %s", step, error)

    return warned
