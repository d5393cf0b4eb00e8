"""Scores of a pipeline on the held-out prompts, and results.json."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import logging

from jax_distill.devices import processes
from jax_distill.evaluation import report
from jax_distill.pipeline import Pipeline
from jax_distill.storage.files import read_json, write_json
from jax_distill.worlds.shapes import judge, renderer, requests

Scores = dict[str, dict]
"""By number of steps: {"2": {"score": .., "tasks": {..}}, ...}."""

SCORES = "scores.json"  # of a student while it is trained


def held_out(count: int) -> list[renderer.Prompt]:
    """`count` of the held-out prompts, evenly over the tasks.

    Raises:
      ValueError: more than there are, or not a multiple of the number of tasks.
    """
    prompts, tasks = renderer.held_out_prompts(), len(requests.TASKS)
    if not 0 < count <= len(prompts) or count % tasks:
        raise ValueError(f"prompts: {count} is not a multiple of {tasks} up to {len(prompts)}")
    each = len(prompts) // tasks
    return [p for task in range(tasks) for p in prompts[task * each :][: count // tasks]]


def score(
    pipe: Pipeline,
    steps: Sequence[int],
    prompts: Sequence[renderer.Prompt],
    *,
    seed: int = 0,
    guidance: float | None = None,
) -> Scores:
    """The score at each number of sampling steps."""
    scores = {}
    captions = [prompt.caption for prompt in prompts]
    for count in steps:
        pictures = pipe(captions, steps=count, seed=seed, guidance=guidance)
        scores[str(count)] = judge.score(pictures, prompts)
        logging.info("%d steps: score %.3f", count, scores[str(count)]["score"])
    return scores


def results(
    *, teacher: Scores | None = None, student: Scores | None = None, config=None, seed: int = 0
) -> dict:
    """The layout of results.json: the teacher at its most steps, at few, and the student."""
    layout: dict = {"seed": seed}
    if teacher:
        most = max(teacher, key=int)
        few = {count: entry for count, entry in teacher.items() if count != most}
        layout["teacher"] = {"nfe": int(most), **teacher[most], "few": few}
    if student:
        layout["student"] = student
    if config is not None:
        layout["config"] = json.loads(config.to_json_best_effort())
    return layout


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
        prompts = held_out(config.evaluation.prompts)
        logging.info("scoring %d held-out prompts", len(prompts))
        settings, seed = config.evaluation, config.seed
        scores = {"teacher": score(teacher, settings.teacher_steps, prompts, seed=seed)}
        if student:
            scores["student"] = score(student, settings.student_steps, prompts, seed=seed)
        if processes.is_leader():
            write_json(path, results(**scores, config=config, seed=seed))
    if not processes.is_leader():
        return
    page = report.write_report(workdir)
    print(report.format_table(json.loads(path.read_text())))
    print(f"report: {page}")
