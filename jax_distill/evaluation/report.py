"""Reports of a run for people: a page about its workdir, and the table of its scores."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_distill.evaluation import curves, judged, page, plots
from jax_distill.evaluation.metrics import Metrics, read_metrics
from jax_distill.evaluation.results import Results, parse_results, read_results
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, read_json, write_atomically
from jax_distill.storage.quoting import one_line

MAX_SAMPLES = 6
MAX_BENCHMARKS, MAX_SETTINGS = 8, 1000  # more than runs have; a page must be done once


def format_table(results: Mapping[str, Any]) -> str:
    """The scores of results.json as a plain-text table, and its measures, for a terminal.

    Args:
      results: as in results.json; missing ones have no column.

    Raises:
      ValueError: it holds something other than scores; the message names it.
    """
    parsed = parse_results(results)
    measured = format_measures(results)
    return _text(parsed.columns(), parsed.rows()) + f"\n\n{measured}" * bool(measured)


def format_benchmark(results: Mapping[str, Any]) -> str:
    """A benchmark's figures with intervals, as `format_table`; "" where none was judged."""
    return judged.format_table(results)


def format_measures(results: Mapping[str, Any]) -> str:
    """The measures of results.json as `format_table` does its scores; "" where there are none."""
    parsed = parse_results(results)
    columns = parsed.measured_columns()
    return _text(columns, parsed.measured_rows()) if columns else ""


def _text(columns: Sequence[tuple], rows: Sequence[tuple[str, list[str]]]) -> str:
    lines = [("", [who for who, *_ in columns]), ("steps", [each[1] for each in columns]), *rows]
    first = max(len(name) for name, _ in lines) + 1
    return "\n".join(
        name.ljust(first) + "".join(cell.rjust(9) for cell in cells) for name, cells in lines
    )


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html`: one file, which needs no other, about the content of a workdir.

    Reads config.json, metrics.jsonl (and those of stages before, one folder down), results.json,
    results-*.json of more benchmarks, and samples/*.png; any of them may be missing.

    Returns:
      The page's path.

    Raises:
      ValueError: no such folder, or a results.json that holds something else.
    """
    workdir = paths.path(workdir)
    if paths.is_bucket(workdir):
        return _report_of_bucket(workdir)
    if not workdir.is_dir():
        raise ValueError(f"'{workdir}' is no folder; give the workdir of a run")
    files = [workdir / "results.json", *sorted(workdir.glob("results-*.json"))[:MAX_BENCHMARKS]]
    results = next(filter(None, map(read_results, files)), None)
    tables = [judged.read_table(path) for path in files]
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

    shares = results.shares(results.student) if results else {}
    path = workdir / "report.html"
    page.write(
        path,
        "report.html",
        one_line(str(config.get("name") or workdir.resolve().name)),
        sentences=_sentences(results, metrics, config) + notes,
        shares={steps: _percent(share) for steps, share in shares.items()},
        scores=_scores(results),
        of_shapes=tables[0] is None,
        benchmarks=[each for each in tables if each],
        measured=_measured(results),
        samples=_samples(workdir / "samples"),
        stages=curves.stages(workdir, metrics),
        settings=_settings(config, ""),
        most_settings=MAX_SETTINGS,
    )
    return path


def _report_of_bucket(workdir: Path) -> Path:
    """As `write_report`, from a copy of the files that the page is made of."""
    with tempfile.TemporaryDirectory(prefix="jax_distill-") as temporary:
        copy = Path(temporary, workdir.name)
        for pattern in ("*.json", "*.jsonl", "*/metrics.jsonl", "samples/*.png"):
            for found in workdir.glob(pattern):
                to = copy / found.relative_to(workdir)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(found.read_bytes())
        copy.mkdir(exist_ok=True)
        content = write_report(copy).read_bytes()
    write_atomically(workdir / "report.html", content)
    return workdir / "report.html"


def _sentences(results: Results | None, metrics: Metrics | None, config: Mapping) -> list[str]:
    scored = results is not None and results.columns()
    sentences = _score_sentences(results) if scored else ["This run has not been evaluated yet."]
    return sentences + ([_training_sentence(metrics, config)] if metrics is not None else [])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _score_sentences(results: Results) -> list[str]:
    def in_steps(scores: Iterable[int]) -> str:
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
    measured = results.measured
    if measured.teacher is not None:
        diverse = {
            n: each.diversity_share(measured.teacher) for n, each in measured.student.items()
        }
        diverse = {steps: share for steps, share in diverse.items() if share is not None}
        if diverse:
            least = page.listed(map(_percent, diverse.values()))
            sentences.append(
                f"The student's pictures of one prompt are at least {least} as diverse as the"
                f" teacher's {in_steps(diverse)}."
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
    _, speeds = metrics.series("examples_per_sec")
    if len(speeds):
        sentence += f", at {curves.count(np.median(speeds))} examples per second"
    return sentence + "."


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


class Table(NamedTuple):
    """The table of scores or measures, and its plots.

    Attributes:
      groups: "teacher", "student" or "real", and how many columns side by side are its.
      steps: of each column.
      rows: a name, and a text for each column.
      figures: plots of the table.
    """

    groups: list[tuple[str, int]]
    steps: list[str]
    rows: list[tuple[str, list[str]]]
    figures: list[page.Figure]


def _table(
    columns: Sequence[tuple], rows: list[tuple[str, list[str]]], figures: Iterable[page.Figure] = ()
) -> Table:
    groups = [(who, len(list(group))) for who, group in groupby(who for who, *_ in columns)]
    return Table(groups, [steps for _, steps, _ in columns], rows, list(figures))


def _measured(results: Results | None) -> Table | None:
    if results is None or not results.measured_columns():
        return None
    return _table(results.measured_columns(), results.measured_rows())


def _scores(results: Results | None) -> Table | None:
    if results is None or not results.columns():
        return None
    teacher = results.teacher
    drawn = []
    if results.student or results.few:
        student, few = (
            {n: score.score for n, score in scores.items()}
            for scores in (results.student, results.few)
        )
        full = teacher.score if teacher else None
        draw = plots.score_by_steps(student, few, full, results.teacher_name)
        drawn.append(("Score against steps", " per picture", draw))
    if results.tasks:
        tasks = {n: score.tasks for n, score in results.student.items()}
        full = teacher.tasks if teacher else None
        draw = plots.bars_by_task(results.tasks, full, results.teacher_name, tasks)
        drawn.append(("Score by task", "", draw))
    figures = [
        page.Figure(x + y, plots.inline(draw, (4.6, 3.2), f"{x}; the table has the numbers"))
        for x, y, draw in drawn
    ]
    return _table(results.columns(), results.rows(), figures)


class Sample(NamedTuple):
    """A grid of pictures, as a data URI, and its caption."""

    caption: str
    image: str


def _samples(folder: Path) -> list[Sample]:
    """Grids from the last one to the first, evenly over training where there are more than fit."""
    found = []
    for path in folder.glob("*.png"):
        step = re.search("[0-9]{1,15}", path.stem)
        found.append((int(step[0]) if step else math.inf, path.stem, path))
    samples = []
    found.sort(reverse=True)
    if len(found) > MAX_SAMPLES:
        last = len(found) - 1
        found = [found[round(n * last / (MAX_SAMPLES - 1))] for n in range(MAX_SAMPLES)]
    for step, stem, path in found:
        caption = f"After {step:,} steps" if step < math.inf else one_line(stem)
        if image := page.picture(path):
            samples.append(Sample("At the end" if stem == "final" else caption, image))
    return samples


def _settings(value: Any, name: str) -> list[tuple[str, str]]:
    """Settings and their values, by the dotted names that the command line takes."""
    if isinstance(value, Mapping):
        return [row for key in value for row in _settings(value[key], f"{name}.{key}".strip("."))]
    return [(name, json.dumps(value, ensure_ascii=False))]
