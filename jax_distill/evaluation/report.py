"""What a run shows to people: a page of its workdir, and the table of its scores."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from jax_distill.evaluation import page, plots
from jax_distill.evaluation.metrics import Metrics, read_metrics
from jax_distill.evaluation.results import Results, Score, parse_results, read_results
from jax_distill.storage.files import FileError, read_json
from jax_distill.storage.quoting import one_line

MAX_SAMPLES = 4
MAX_STAGES, MAX_PLOTS, MAX_SETTINGS = 8, 24, 1000  # more than runs have; a page must be done once


def format_table(results: Mapping[str, Any]) -> str:
    """The scores of results.json as a plain-text table, for a terminal.

    Args:
      results: as in results.json; what is missing has no column.

    Raises:
      ValueError: it holds something else than scores, naming what.
    """
    parsed = parse_results(results)
    columns = parsed.columns()
    lines = [
        ("", [who for who, _, _ in columns]),
        ("steps", [steps for _, steps, _ in columns]),
        *parsed.rows(),
    ]
    first = max(len(name) for name, _ in lines) + 1
    return "\n".join(
        name.ljust(first) + "".join(cell.rjust(9) for cell in cells) for name, cells in lines
    )


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html`: one file, which needs no other, about what lies in a workdir.

    Read are config.json, metrics.jsonl (and those of stages before, one folder down),
    results.json and samples/*.png. What is missing is left out.

    Returns:
      The page's path.

    Raises:
      ValueError: no such folder, or a results.json that holds something else.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"'{workdir}' is no folder; give the workdir of a run")
    results = read_results(workdir / "results.json")
    metrics = read_metrics(workdir / "metrics.jsonl")
    notes, config = [], {}
    try:
        config = read_json(workdir / "config.json")
    except FileNotFoundError:
        pass
    except FileError:
        notes.append("config.json is not valid JSON with the settings of a run and is left out.")
    if metrics is not None and metrics.stride > 1:
        notes.append(f"One of {metrics.stride} lines of metrics.jsonl is shown.")
    if metrics is not None and metrics.unreadable:
        count = metrics.unreadable
        notes.append(f"{count} unreadable {page.plural('line', count)} of metrics.jsonl left out.")

    name = one_line(str(config.get("name") or workdir.resolve().name))
    sections = [
        _summary(results, metrics, config, notes),
        _scores(results),
        _samples(workdir / "samples"),
        _training("Training", metrics),
    ]
    for path in sorted(workdir.glob("*/metrics.jsonl"))[:MAX_STAGES]:
        stage = one_line(path.parent.name.replace("_", " "))
        sections.append(_training(f"Stage before: {stage}", read_metrics(path)))
    sections.append(_configuration(config))
    body = "\n".join(filter(None, sections))
    path = workdir / "report.html"
    page.write(path, name, body)
    return path


def _summary(
    results: Results | None, metrics: Metrics | None, config: Mapping, notes: list[str]
) -> str:
    sentences, tiles = [], ""
    if results is None or not results.columns():
        sentences.append("This run has not been evaluated yet.")
    else:
        sentences += _score_sentences(results)
        tiles = "".join(
            f"<div><dt>{n} {page.plural('step', n)}</dt><dd>{_percent(share)}</dd></div>"
            for n, share in results.shares(results.student).items()
        )
    if tiles:
        tiles = f'<div class="tiles"><p>Share of the teacher&#x27;s score</p><dl>{tiles}</dl></div>'
    if metrics is not None:
        sentences.append(_training_sentence(metrics, config))
    return f"<p>{escape(' '.join(sentences + notes))}</p>{tiles}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _score_sentences(results: Results) -> list[str]:
    def in_steps(scores: Mapping[int, Score]) -> str:
        return f"in {page.listed(map(str, scores))} {page.plural('step', max(scores))}"

    sentences = []
    shares = results.shares(results.student)
    if results.teacher is not None:
        full = f"{results.teacher.score:.3f}"
        full += f" in {results.nfe} steps" if results.nfe else ""
    if shares:
        reached = page.listed(map(_percent, shares.values()))
        sentences.append(
            f"The student reaches {reached} of its teacher's score ({full})"
            f" {in_steps(shares)} per picture."
        )
    else:
        if results.teacher is not None:
            sentences.append(f"The teacher scores {full}.")
        if results.student:
            values = page.listed(f"{score.score:.3f}" for score in results.student.values())
            sentences.append(
                f"The student scores {values} {in_steps(results.student)} per picture."
            )
    kept = results.shares(results.few)
    if kept:
        sentences.append(
            f"The teacher itself keeps {page.listed(map(_percent, kept.values()))} of it"
            f" {in_steps(kept)}."
        )
    return sentences


def _training_sentence(metrics: Metrics, config: Mapping) -> str:
    total = config.get("total_steps")
    known = _is_count(total) and total != metrics.last_step
    of = f" of {total:,}" if known else ""
    sentence = f"Trained for {metrics.last_step:,}{of} steps"
    if _is_count(config.get("batch_size")):
        sentence += f" of {config['batch_size']:,} pictures"
    objective = config.get("objective")
    if isinstance(objective, Mapping) and objective.get("name"):
        sentence += f" with the objective {one_line(str(objective['name']))}"
    if metrics.seconds:
        sentence += f" in {page.duration(metrics.seconds)}"
    return sentence + "."


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _scores(results: Results | None) -> str:
    if results is None or not results.columns():
        return ""
    columns, figures = results.columns(), []
    if results.student or results.few:
        draw = plots.score_by_steps(
            {n: score.score for n, score in results.student.items()},
            {n: score.score for n, score in results.few.items()},
            results.teacher.score if results.teacher else None,
            results.teacher_name,
        )
        figures.append(
            page.figure(
                plots.inline(draw, (4.6, 3.2), "Score against steps; the table has the numbers"),
                "Score against steps per picture",
            )
        )
    if results.tasks:
        draw = plots.bars_by_task(
            results.tasks,
            results.teacher.tasks if results.teacher else None,
            results.teacher_name,
            {n: score.tasks for n, score in results.student.items()},
        )
        figures.append(
            page.figure(
                plots.inline(draw, (4.6, 3.2), "Score by task; the table has the numbers"),
                "Score by task",
            )
        )
    groups = [(who, len(list(group))) for who, group in groupby(columns, lambda column: column[0])]
    spans = "".join(f'<colgroup span="{width}"></colgroup>' for _, width in groups)
    head = "".join(f'<th colspan="{width}" scope="colgroup">{who}</th>' for who, width in groups)
    steps = "".join(f'<th scope="col">{escape(steps)}</th>' for _, steps, _ in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in results.rows()
    )
    return (
        "<h2>Scores</h2><p>The share of pictures that show what was asked for, by task; overall is"
        " the mean of the tasks.</p>"
        f'<div class="scroll"><table class="scores"><colgroup></colgroup>{spans}'
        f"<thead><tr><td></td>{head}</tr>"
        f'<tr><th scope="row">steps</th>{steps}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _samples(folder: Path) -> str:
    """The latest grid, and those before it in a box that opens."""
    found = []
    for path in folder.glob("*.png"):
        step = re.search("[0-9]{1,15}", path.stem)
        found.append((int(step[0]) if step else math.inf, path.stem, path))
    figures = []
    for step, stem, path in sorted(found, reverse=True)[:MAX_SAMPLES]:
        caption = {"final": "At the end"}.get(
            stem, f"After {step:,} steps" if step < math.inf else one_line(stem)
        )
        image = page.picture(path)
        if image:
            figures.append(
                f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll grid">'
                f'<img src="{image}" alt="Pictures drawn for fixed prompts"></div></figure>'
            )
    if not figures:
        return ""
    earlier = "".join(figures[1:])
    if earlier:
        earlier = f"<details><summary>Earlier samples</summary>{earlier}</details>"
    return f"<h2>Samples</h2>{figures[0]}{earlier}"


def _training(heading: str, metrics: Metrics | None) -> str:
    """Loss and throughput, then the other metrics smaller; a metric that never changes is named."""
    if metrics is None:
        return ""
    speed = next((n for n in ("examples_per_sec", "steps_per_sec") if n in metrics.names()), None)
    large, small, constant, others = [], [], [], 0
    for name in metrics.names():
        steps, values = metrics.series(name)
        if name in ("step", "time") or not len(values):
            continue
        if name.endswith("_per_sec") and name != speed:
            continue
        if name == "loss":
            log = bool(values.min() > 0)
            caption = "Loss"
            lost = sum(name in line for line in metrics.lines) - len(values)
            if lost:
                caption += f" ({lost} {page.plural('value', lost)} not finite, not drawn)"
        elif name == speed:
            log = False
            median = np.median(values)
            caption = f"{name.removesuffix('_per_sec').capitalize()} per second, median "
            caption += f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
        elif values.min() == values.max():
            constant.append(f"{name} = {values[0]:g}")
            continue
        else:
            log = bool(values.min() > 0 and values.max() > 100 * values.min())
            caption = name
        is_large = name in ("loss", speed)
        if len(small) >= MAX_PLOTS and not is_large:
            others += 1
            continue
        draw = plots.curve(steps, values, log=log, from_zero=name == speed)
        size = (4.6, 2.6) if is_large else (3.3, 2.1)
        figure = page.figure(plots.inline(draw, size, f"{name} against training steps"), caption)
        (large if is_large else small).append(figure)
    parts = [f"<h2>{escape(heading)}</h2>"]
    parts += [f'<div class="plots">{"".join(large)}</div>'] * bool(large)
    parts += [f'<div class="plots small">{"".join(small)}</div>'] * bool(small)
    if constant:
        parts.append(f'<p class="note">Constant throughout: {escape(", ".join(constant))}.</p>')
    if others:
        parts.append(f'<p class="note">{others} more {page.plural("metric", others)}.</p>')
    return "".join(parts)


def _configuration(config: Mapping) -> str:
    """The settings by the dotted names that the command line takes."""

    def flat(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping):
            return [item for key in value for item in flat(value[key], f"{name}.{key}".strip("."))]
        return [(name, json.dumps(value, ensure_ascii=False))]

    if not config:
        return ""
    settings = flat(config, "")
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in settings[:MAX_SETTINGS]
    )
    if len(settings) > MAX_SETTINGS:
        rows += f"<tr><th>{len(settings) - MAX_SETTINGS} more</th><td></td></tr>"
    return (
        "<h2>Configuration</h2><details><summary>All settings</summary>"
        f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div></details>'
    )
