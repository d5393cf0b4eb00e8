"""A study's cells: the runs that it compares, each in a folder of its own."""

import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from msgspec import Meta

from jax_distill import config as configuration
from jax_distill import pipeline, streams
from jax_distill.assembly import build
from jax_distill.assembly.resolution import resolve
from jax_distill.config import ConfigError
from jax_distill.data.manifest import DESCRIPTION
from jax_distill.evaluation import comparison, grids, scoring
from jax_distill.evaluation.measures import Yardstick
from jax_distill.evaluation.metrics import read_metrics
from jax_distill.evaluation.results import parse_results, read_results
from jax_distill.planning import evaluations
from jax_distill.planning.flops import count_flops
from jax_distill.planning.program import example_flops
from jax_distill.runs import config_flag
from jax_distill.storage.files import read_json, write_json
from jax_distill.storage.quoting import shown
from jax_distill.worlds.shapes.world import preview_captions

RESULTS = "study.json"
COST = "cost.json"
MEASURES = "measures.json"
_AGAIN = "remove the run's folder and run the study again"


class _Cost(TypedDict):
    """cost.json: the command of a run, and the peak of its memory."""

    command: NotRequired[str]
    peak_gib: Annotated[float, Meta(ge=0, le=1e6)]


class _Measured(TypedDict):
    """measures.json: a cell's command, and its measures by sampling steps."""

    command: str
    student: dict[str, Any]


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs what is missing of a study, then compares all of it."""
    workdir.mkdir(parents=True, exist_ok=True)
    data, teacher, drawn = workdir / "data", workdir / "teacher", workdir / "drawn"
    examples = [f"examples={config.examples}", f"seed={config.data_seed}"]
    prepare(data, examples)
    shared = [f"data.path={data}", f"evaluation.prompts={config.prompts}"]
    common = config.common.to_dict()
    budget = common.pop("evaluations", None)
    settings = [f"{key}={_word(value)}" for key, value in common.items()]
    own = [f"teacher.checkpoint={config.teacher.checkpoint}", *config.teacher.settings]
    scored = f"evaluation.teacher_steps={_word(config.teacher_steps)}"
    train(config.teacher.config, teacher, [*shared, scored, *own])
    if not _teacher(teacher)["score"]:
        raise ConfigError(f"teacher: the one in '{teacher}' scores 0, no share of which is known")
    if config.drawn_steps:
        prepare(drawn, [*examples, f"teacher={teacher}", f"steps={config.drawn_steps}"])

    cells = list(_cells(config))
    found = []
    for index, (row, seed, file, own) in enumerate(cells):
        cell = workdir / folder(row, seed)
        own = [setting.format(workdir=workdir, seed=seed) for setting in own]
        steps = drawable(config.student_steps, config_flag.read(file, own))
        logging.info("cell %d of %d: %s, seed %d", index + 1, len(cells), row, seed)
        scored = [
            f"evaluation.student_steps={_word(steps)}",
            "evaluation.teacher_steps=1",  # the teacher is scored once, above
            f"evaluation.every={config.evaluate_every}",
            "evaluation.diversity_prompts=0",  # measured below, beside the teacher's most steps
        ]
        start = [f"teacher.checkpoint={teacher}", f"seed={seed}"]
        every = [*shared, *settings, *scored, *start, *own]
        command = train(file, cell, within(budget, file, every))
        found.append({"row": row, "seed": seed, "command": command, **measured(cell)})
        study = {"name": config.name, "teacher": _teacher(teacher), "cells": found}
        write_json(workdir / RESULTS, study)
    pipes = {"teacher": pipeline.load(teacher)}
    pipes |= {row: pipeline.load(workdir / folder(row, config.seeds[0])) for row, *_ in config.rows}
    counts = {name: drawable(config.student_steps, pipe.config) for name, pipe in pipes.items()}
    counts["teacher"] = config.teacher_steps
    study["sampling"] = {name: sampling_costs(pipe, counts[name]) for name, pipe in pipes.items()}
    study["measures"] = _results(teacher).get("measures", {})
    beside = Beside(pipes["teacher"], study["teacher"]["nfe"])
    for cell in study["cells"] if study["measures"] else ():
        path = workdir / folder(cell["row"], cell["seed"])
        cell["measures"] = beside.measured(path, [int(n) for n in cell["student"]], cell)
    write_json(workdir / RESULTS, study)
    grid = workdir / "samples.png"
    draw_grid(grid, config, pipes)
    page = comparison.write(workdir, study, grid)
    print(comparison.format_table(study))
    print(f"report: {page}")


def _cells(config: ConfigDict) -> Iterator[tuple[str, int, str, Sequence[str]]]:
    """Row, seed, config file, and its own settings, as `key=value`."""
    for row, file, *own in config.rows:
        for seed in config.seeds:
            yield row, seed, file, own


def within(budget: float | None, file: str, settings: Sequence[str]) -> list[str]:
    """The settings of a cell with the steps that a budget in evaluations gives it.

    Those of its own stay, and without a budget all do.
    """
    if budget is None or any(setting.startswith("total_steps=") for setting in settings):
        return [*settings]
    costs = evaluations.of_run(config_flag.read(file, settings))
    return [*settings, f"total_steps={costs.steps_within(budget)}"]


def folder(row: str, seed: int) -> str:
    """A cell's folder: the row's name without what shells and flags read otherwise."""
    return re.sub(r"[^\w.-]+", "_", f"{row}-{seed}")


def drawable(counts: Sequence[int], config: ConfigDict) -> list[int]:
    """Those of some numbers of sampling steps that the schedule of a configuration's student has.

    Raises:
      ValueError: a setting that the objective refuses.
    """
    most = build.without_networks(config).sampled_by.schedule.most_steps
    return [count for count in counts if count <= most]


def _word(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def train(file: str, workdir: Path, settings: Sequence[str]) -> str:
    """Runs the training command until it is done, unless it is; returns the command.

    What it was and the peak of its memory, the largest of all starts, go into `cost.json`.

    Raises:
      ConfigError: the command failed, or was stopped before its end.
    """
    flags = [f"--config={file}", f"--workdir={workdir}"]
    flags += [f"--config.{setting}" for setting in settings]
    spoken = shlex.join(["python", "-m", "jax_distill.main", *flags])
    cost = workdir / COST
    known = _cost(workdir) if cost.exists() else {"peak_gib": 0.0}
    if scoring.concluded(workdir) and known.get("command") == spoken:
        logging.info("%s is finished", workdir)
        return spoken
    code, peak = _run("main", flags)
    if workdir.is_dir():
        write_json(cost, {"command": spoken, "peak_gib": max(known["peak_gib"], peak)})
    if code:
        raise ConfigError(f"a cell of the study failed, see above; its command: {spoken}")
    if not scoring.concluded(workdir):
        raise ConfigError(f"'{workdir}' was stopped before its end; run the study again to go on")
    return spoken


def prepare(path: Path, settings: Sequence[str]) -> None:
    """Makes a folder of latents, unless it is there.

    Raises:
      ConfigError: the command failed.
    """
    if (path / DESCRIPTION).exists():
        return
    if _run("prepare", [f"--output={path}", *(f"--{setting}" for setting in settings)])[0]:
        raise ConfigError(f"'{path}' could not be made, see above")


def _run(module: str, flags: Sequence[str]) -> tuple[int, float]:
    """Runs a command of this package; returns its exit code and the peak of its memory in GiB."""
    process = subprocess.Popen([sys.executable, "-m", f"jax_distill.{module}", *flags])
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return process.returncode, usage.ru_maxrss / 2**20


def measured(cell: Path) -> dict:
    """A finished cell: its scores, by training step too, and what it cost.

    Raises:
      ValueError: what the run has written is not there, or is something else.
    """
    results = _results(cell)
    config = configuration.load(cell)
    history = cell / scoring.SCORES
    metrics = read_metrics(cell / "metrics.jsonl")
    lines = [] if metrics is None else metrics.lines
    if not lines or not all(line.get("steps_per_sec", 0) > 0 for line in lines):
        raise ConfigError(f"'{cell / 'metrics.jsonl'}' has no speeds of a run; {_AGAIN}")
    steps = [0, *(line["step"] for line in lines)]
    seconds = [
        (step - before) / line["steps_per_sec"]
        for before, step, line in zip(steps, steps[1:], lines)
    ]
    scored = _history(history) if history.exists() else {}
    costs = evaluations.of_run(config)
    forward = example_flops(resolve(config).config)
    passed = [0.0, *itertools.accumulate(seconds)]
    return {
        "student": results.get("student", {}),
        "history": scored,
        "steps": config.total_steps,
        "spent": {
            str(step): {
                "evaluations": costs.at(step),
                "seconds": float(np.interp(step, steps, passed)),
            }
            for step in sorted({*map(int, scored), config.total_steps})
        },
        "train_seconds": sum(seconds),
        "evaluations": costs.at(config.total_steps),
        "evaluations_per_step": costs.a_step(config.total_steps),
        "flops_per_step": int(costs.a_step(config.total_steps) * forward),
        "peak_gib": _cost(cell)["peak_gib"],
    }


def _results(workdir: Path) -> dict:
    """results.json of a finished run, checked as `read_results` does; ValueError without one."""
    path = workdir / "results.json"
    if read_results(path) is None:
        raise ConfigError(f"'{path}' is missing; {_AGAIN}")
    return read_json(path)


def _history(path: Path) -> dict[str, dict]:
    """Scores by training step, each by sampling steps; raises ValueError naming the file."""
    history = read_json(path, dict[str, dict[str, Any]], fix=_AGAIN)
    for step, scores in history.items():
        try:
            if not re.fullmatch("[0-9]{1,15}", step):
                raise ValueError(f"{shown(step)} is no step")
            parse_results({"student": scores})
        except ValueError as error:
            message = f"'{path}' does not hold scores by step ({error}); {_AGAIN}"
            raise ConfigError(message) from None
    return history


def _cost(workdir: Path) -> _Cost:
    """Reads the costs that `train` noted; raises ValueError when missing or damaged."""
    path = workdir / COST
    try:
        return read_json(path, _Cost, fix=_AGAIN)
    except FileNotFoundError:
        raise ConfigError(f"'{path}' is missing; {_AGAIN}") from None


class Beside:
    """Measures students beside a teacher, whose pictures are drawn once, when they are needed."""

    def __init__(self, teacher: pipeline.Pipeline, steps: int):
        self._teacher, self._steps = teacher, steps

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        config = self._teacher.config
        yardstick = scoring.yardstick_of(self._teacher, config.evaluation, config.seed)
        yardstick.draw_teacher(self._teacher, self._steps)
        return yardstick

    def measured(self, workdir: Path, steps: Sequence[int], cell: Mapping) -> dict[str, dict]:
        """A finished cell's measures by sampling steps, kept in `measures.json` with its command.

        Raises:
          ValueError: that file holds something else.
        """
        path = workdir / MEASURES
        if path.exists():
            known = read_json(path, _Measured, fix=_AGAIN)
            if known["command"] == cell["command"]:
                try:
                    parse_results({"measures": {"student": known["student"]}})
                except ValueError as error:
                    message = f"'{path}' does not hold measures ({error}); {_AGAIN}"
                    raise ConfigError(message) from None
                return known["student"]
        logging.info("measuring %s", workdir)
        found = scoring.measured(self._yardstick, pipeline.load(workdir), steps)
        write_json(path, {"command": cell["command"], "student": found})
        return found


def _teacher(workdir: Path) -> dict:
    teacher = _results(workdir).get("teacher", {})
    if "nfe" not in teacher:
        raise ConfigError(f"'{workdir / 'results.json'}' has no scores of a teacher; {_AGAIN}")
    return {"tasks": {}, "few": {}, **teacher}


def sampling_costs(
    pipe: pipeline.Pipeline, counts: Sequence[int], pictures: int = 60
) -> dict[str, dict[str, float]]:
    """Arithmetic and seconds of a picture in the transformer, by number of steps.

    The time is that of drawing so many pictures at once, compiled before, over their number.
    """
    text = pipe.world.encode([prompt.caption for prompt in scoring.held_out(pictures)])
    costs = {}
    for steps in counts:
        pipe.latents(text, steps=steps)
        begin = time.perf_counter()
        pipe.latents(text, steps=steps)
        seconds = (time.perf_counter() - begin) / pictures
        costs[str(steps)] = {"flops": sampling_flops(pipe.config, steps), "seconds": seconds}
    return costs


def sampling_flops(config: ConfigDict, steps: int) -> int:
    """Arithmetic of drawing one picture's latents, see `flops.count_flops`."""
    method = build.objective(config)

    def draw(params, noise, text, key):
        guidance = jnp.full(1, config.evaluation.guidance)
        return method.sample(params, noise, text, text, guidance, key[None], steps)

    def arguments():
        params = {"network": build.initial_parameters(config)}
        noise = jnp.zeros((1, *build.token_shape(config)))
        return params, noise, build.text_like(config, 1), streams.key(0)

    return count_flops(draw, *jax.eval_shape(arguments))


def draw_grid(path: Path, config: ConfigDict, pipes: Mapping[str, pipeline.Pipeline]) -> None:
    """The teacher's row, and of each method one for every number of steps in `grid_steps`."""
    prompts = preview_captions(config.grid_prompts)
    rows, labels = [], []
    for name, pipe in pipes.items():
        counts = [max(config.teacher_steps)]
        if name != "teacher":
            counts = drawable(config.grid_steps, pipe.config)
        for steps in counts:
            rows.append(pipe(prompts, steps=steps))
            labels.append(f"{name}, {steps} step{'s' * (steps > 1)}")
    grids.save_grid(path, rows, row_labels=labels, column_labels=prompts, title=config.name)
