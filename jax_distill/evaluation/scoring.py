"""Scores and measures of a pipeline on the held-out prompts, and results.json."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_distill.devices import processes
from jax_distill.evaluation import measures, report
from jax_distill.evaluation.benchmarks import shapes
from jax_distill.pipeline import Pipeline
from jax_distill.storage.files import read_json, write_json
from jax_distill.worlds.shapes import renderer, requests

Scores = dict[str, dict]
"""By number of steps: {"2": {"score": .., "tasks": {..}}, ...}."""

SCORES = "scores.json"  # of a student while it is trained


def held_out(count: int, name: str = "prompts") -> list[renderer.Prompt]:
    """`count` of the held-out prompts, evenly over the tasks; a setting has the `name`.

    Raises:
      ValueError: more than there are, or not a multiple of the number of tasks.
    """
    prompts, tasks = renderer.held_out_prompts(), len(requests.TASKS)
    if not 0 < count <= len(prompts) or count % tasks:
        raise ValueError(f"{name}: {count} is not a multiple of {tasks} up to {len(prompts)}")
    each = len(prompts) // tasks
    return [p for task in range(tasks) for p in prompts[task * each :][: count // tasks]]


def score(
    pipe: Pipeline,
    steps: Sequence[int],
    prompts: Sequence[renderer.Prompt],
    *,
    seed: int = 0,
    guidance: float | None = None,
    seen: Callable[[int, np.ndarray], None] | None = None,
) -> Scores:
    """The score at each number of sampling steps; `seen` is given them and the pictures."""
    scores = {}
    captions = [prompt.caption for prompt in prompts]
    for count in steps:
        pictures = pipe(captions, steps=count, seed=seed, guidance=guidance)
        if seen is not None:
            seen(count, pictures)
        scores[str(count)] = shapes.score(pictures, prompts)
        logging.info("%d steps: score %.3f", count, scores[str(count)]["score"])
    return scores


def results(
    *,
    teacher: Scores | None = None,
    student: Scores | None = None,
    measured: Mapping | None = None,
    config=None,
    seed: int = 0,
) -> dict:
    """The layout of results.json: the teacher at its most steps, at few, the student; measures."""
    layout: dict = {"seed": seed}
    if teacher:
        most = max(teacher, key=int)
        few = {count: entry for count, entry in teacher.items() if count != most}
        layout["teacher"] = {"nfe": int(most), **teacher[most], "few": few}
    if student:
        layout["student"] = student
    if measured:
        layout["measures"] = measured
    if config is not None:
        layout["config"] = json.loads(config.to_json_best_effort())
    return layout


def scored(
    teacher: Pipeline, student: Pipeline | None, settings: ConfigDict, seed: int
) -> dict[str, dict]:
    """Scores and measures of a teacher and its student, as arguments of `results`.

    Args:
      teacher: measured at its most steps; few have a score alone.
      student: measured at each number of steps.
      settings: the section `evaluation`.
      seed: of the noise.
    """
    prompts, most = held_out(settings.prompts), max(settings.teacher_steps)
    logging.info("scoring %d held-out prompts", len(prompts))
    yardstick = yardstick_of(teacher, settings, seed)

    def seen(steps: int, pictures: np.ndarray) -> None:
        if yardstick is not None and steps == most:
            yardstick.set_teacher(pictures)

    found = {"teacher": score(teacher, settings.teacher_steps, prompts, seed=seed, seen=seen)}
    if student:
        found["student"] = score(student, settings.student_steps, prompts, seed=seed)
    if yardstick is None:
        return found
    found["measured"] = {
        "nfe": most,
        "real": yardstick.real()._asdict(),
        "teacher": yardstick.teacher(teacher, most)._asdict(),
    }
    if student:
        found["measured"]["student"] = measured(yardstick, student, settings.student_steps)
    return found


def yardstick_of(
    pipe: Pipeline, settings: ConfigDict, seed: int, guidance: float | None = None
) -> measures.Yardstick | None:
    """What networks are measured against, by the section `evaluation`; None if it asks for none."""
    if not settings.diversity_prompts:
        return None
    return measures.Yardstick(
        pipe.world.codec,
        held_out(settings.prompts),
        held_out(settings.diversity_prompts),
        pictures=settings.diversity_pictures,
        seed=seed,
        guidance=guidance,
    )


def measured(
    yardstick: measures.Yardstick, pipe: Pipeline, steps: Sequence[int]
) -> dict[str, dict]:
    """Measures of a network by number of steps."""
    return {str(count): yardstick.network(pipe, count)._asdict() for count in steps}


def recorder(path: Path, student: Pipeline) -> Callable[[int, dict], None]:
    """A function (step, parameters) that scores a student and keeps the scores by step in `path`.

    The file is JSON, {"100": {"1": {"score": .., "tasks": {..}}, ..}, ..}: training steps, then
    sampling steps.
    """
    settings = student.config.evaluation

    def record(step: int, params: dict) -> None:
        student.params = params
        prompts = held_out(settings.prompts)
        scores = score(student, settings.student_steps, prompts, seed=student.config.seed)
        if processes.is_leader():
            known = read_json(path) if path.exists() else {}
            write_json(path, {**known, str(step): scores})

    return record


def concluded(workdir: Path) -> bool:
    """Whether a run has scores of its present configuration: the same steps and prompts."""
    results, config = workdir / "results.json", workdir / "config.json"
    if not (results.exists() and config.exists()):
        return False
    return read_json(results).get("config") == read_json(config)


def conclude(workdir: Path, *, teacher: Pipeline, student: Pipeline | None = None) -> None:
    """Scores a network beside its teacher; writes and prints results.json, and report.html.

    Existing scores of the same configuration are kept.
    """
    path = workdir / "results.json"
    config = (student or teacher).config
    if processes.agreed(not concluded(workdir)):
        found = scored(teacher, student, config.evaluation, config.seed)
        if processes.is_leader():
            write_json(path, results(**found, config=config, seed=config.seed))
    if not processes.is_leader():
        return
    page = report.write_report(workdir)
    print(report.format_table(json.loads(path.read_text())))
    print(f"report: {page}")
