"""A study's cells: the runs that it compares, each in a folder of its own."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from jax_distill import build, pipeline, scoring
from jax_distill import config as configuration
from jax_distill.config import ConfigError
from jax_distill.data import records
from jax_distill.data.encoding import encode_shapes
from jax_distill.evaluation import comparison, grids
from jax_distill.evaluation.metrics import read_metrics
from jax_distill.files import write_json
from jax_distill.flops import count_flops
from jax_distill.worlds.shapes import embedded_codec, preview_captions

RESULTS = "study.json"
COST = "cost.json"


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs what is missing of a study, then compares all of it."""
    workdir.mkdir(parents=True, exist_ok=True)
    data, teacher = workdir / "data", workdir / "teacher"
    if not (data / records.DESCRIPTION).exists():
        encode_shapes(data, config.examples, config.data_seed, embedded_codec().encode)
    shared = [f"data.path={data}", f"evaluation.prompts={config.prompts}"]
    settings = [f"{key}={_word(value)}" for key, value in config.common.items()]
    own = [f"teacher.checkpoint={config.teacher.checkpoint}", *config.teacher.settings]
    steps = f"evaluation.teacher_steps={_word(config.teacher_steps)}"
    train(config.teacher.config, teacher, [*shared, steps, *own])
    if not _teacher(teacher)["score"]:
        raise ConfigError(f"teacher: the one in '{teacher}' scores 0, no share of which is known")

    cells = list(_cells(config))
    found = []
    for index, (row, seed, file, own) in enumerate(cells):
        cell = workdir / f"{row}-{seed}"
        logging.info("cell %d of %d: %s, seed %d", index + 1, len(cells), row, seed)
        steps = [
            f"evaluation.student_steps={_word(config.student_steps)}",
            "evaluation.teacher_steps=1",  # the teacher is scored once, above
        ]
        every = [f"evaluation.every={config.evaluate_every}"]
        start = [f"teacher.checkpoint={teacher}", f"seed={seed}"]
        command = train(file, cell, [*shared, *settings, *steps, *every, *start, *own])
        found.append({"row": row, "seed": seed, "command": command, **measured(cell)})
        study = {"name": config.name, "teacher": _teacher(teacher), "cells": found}
        write_json(workdir / RESULTS, study)
    grid = workdir / "samples.png"
    draw_grid(grid, config, workdir)
    comparison.write_page(workdir / "study.html", study, grid)
    print(comparison.format_table(study))
    print(f"report: {workdir / 'study.html'}")


def _cells(config: ConfigDict) -> Iterator[tuple[str, int, str, Sequence[str]]]:
    """Row, seed, config file, and its own settings, as `key=value`."""
    for row, file, *own in config.rows:
        for seed in config.seeds:
            yield row, seed, file, own


def _word(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def train(file: str, workdir: Path, settings: Sequence[str]) -> str:
    """Runs the training command until it is done, unless it is; returns the command.

    What it was and the peak of its memory, the largest of all starts, go into `cost.json`.

    Raises:
      ConfigError: the command failed, or was stopped before its end.
    """
    command = [sys.executable, "-m", "jax_distill.main", f"--config={file}"]
    command += [f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]
    spoken = shlex.join(["python", *command[1:]])
    cost = workdir / COST
    known = json.loads(cost.read_text()) if cost.exists() else {"command": "", "peak_gib": 0.0}
    if scoring.concluded(workdir) and known["command"] == spoken:
        logging.info("%s is finished", workdir)
        return spoken
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if workdir.is_dir():
        peak = max(known["peak_gib"], usage.ru_maxrss / 2**20)
        write_json(cost, {"command": spoken, "peak_gib": peak})
    if process.returncode:
        raise ConfigError(f"a cell of the study failed, see above; its command: {spoken}")
    if not scoring.concluded(workdir):
        raise ConfigError(f"'{workdir}' was stopped before its end; run the study again to go on")
    return spoken


def measured(cell: Path) -> dict:
    """A finished cell: its scores, by training step too, and what it cost."""
    results = json.loads((cell / "results.json").read_text())
    config = configuration.load(cell)
    history = cell / scoring.SCORES
    lines = read_metrics(cell / "metrics.jsonl").lines
    steps = [0, *(line["step"] for line in lines)]
    return {
        "student": results["student"],
        "history": json.loads(history.read_text()) if history.exists() else {},
        "steps": config.total_steps,
        "train_seconds": sum(
            (step - before) / line["steps_per_sec"]
            for before, step, line in zip(steps, steps[1:], lines)
        ),
        "flops_per_step": step_flops(config, configuration.load(Path(config.teacher.checkpoint))),
        "peak_gib": json.loads((cell / COST).read_text())["peak_gib"],
    }


def step_flops(config: ConfigDict, teacher: ConfigDict) -> int:
    """Arithmetic of the loss's gradient for one batch, see `flops.count_flops`."""
    loss, arguments = build.abstract_loss(config, teacher)
    return config.accumulate * count_flops(jax.grad(loss), *arguments)


def _teacher(workdir: Path) -> dict:
    return json.loads((workdir / "results.json").read_text())["teacher"]


def draw_grid(path: Path, config: ConfigDict, workdir: Path) -> None:
    """One row a method (its first seed), in as many steps as `grid_steps` says, and the teacher."""
    prompts = preview_captions(config.grid_prompts)
    teacher = pipeline.load(workdir / "teacher")
    most = max(config.teacher_steps)
    rows, labels = [teacher(prompts, steps=most)], [f"teacher, {most} steps"]
    for row, *_ in config.rows:
        pipe = pipeline.load(workdir / f"{row}-{config.seeds[0]}")
        for steps in config.grid_steps:
            rows.append(pipe(prompts, steps=steps))
            labels.append(f"{row}, {steps} step{'s' * (steps > 1)}")
    grids.save_grid(path, rows, row_labels=labels, column_labels=prompts, title=config.name)
