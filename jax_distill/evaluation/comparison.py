"""Results of a study: methods side by side, as a table, as plots and as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from jax_distill.evaluation import page, plots
from jax_distill.evaluation.plots import Theme
from jax_distill.evaluation.results import MEASURES, Measures, parse_results
from jax_distill.storage.files import write_atomically
from jax_distill.storage.quoting import COMMAND, one_line, prose


class Spread(NamedTuple):
    """A mean over seeds, and the half of the range they span (none for one seed)."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self:.2f}"

    def __format__(self, form: str) -> str:
        form = form or ".2f"
        return f"{self.mean:{form}}" + (f" ±{self.half:{form}}" if self.half is not None else "")


def spread(values: Sequence[float]) -> Spread:
    """Mean and half range of (n,) values, n at least one."""
    half = (max(values) - min(values)) / 2 if len(values) > 1 else None
    return Spread(sum(values) / len(values), half)


def by_row(study: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The finished cells of study.json under their rows' names, in the study's order."""
    rows: dict[str, list] = {}
    for cell in study["cells"]:
        rows.setdefault(cell["row"], []).append(cell)
    return rows


def shares(study: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[int, Spread]:
    """Shares of the teacher's score at its most steps, by the student's number of steps."""
    full = study["teacher"]["score"]
    return {
        int(steps): spread([cell["student"][steps]["score"] / full for cell in cells])
        for steps in cells[0]["student"]
    }


def step_counts(study: Mapping[str, Any]) -> list[int]:
    """Numbers of sampling steps that a method or another was scored at."""
    return sorted({int(steps) for cell in study["cells"] for steps in cell["student"]})


def table(study: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: a method, its shares of the teacher's score by steps, and its cost."""
    rows = by_row(study)
    steps = step_counts(study)
    costs = ["evaluations", "a step", "train min", "GFLOP a step", "peak GiB"]
    lines = [
        [
            "share of the teacher's score",
            *(f"{n} {page.plural('step', n)}" for n in steps),
            *costs,
        ]
    ]
    for name, cells in rows.items():
        found = shares(study, cells)
        lines.append(
            [
                name,
                *(str(found.get(n, "-")) for n in steps),
                f"{cells[0]['evaluations']:.0f}",
                f"{cells[0]['evaluations_per_step']:.1f}",
                f"{spread([cell['train_seconds'] / 60 for cell in cells]).mean:.1f}",
                f"{cells[0]['flops_per_step'] / 1e9:.0f}",
                f"{max(cell['peak_gib'] for cell in cells):.1f}",
            ]
        )
    full = study["teacher"]["score"]
    few = {int(n): entry["score"] / full for n, entry in study["teacher"]["few"].items()}
    lines.append(["teacher", *(f"{few[n]:.2f}" if n in few else "-" for n in steps)])
    lines[-1] += [""] * len(costs)
    return lines


def format_table(study: Mapping[str, Any]) -> str:
    """The table as text, for a terminal."""
    lines = table(study)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    full = study["teacher"]
    foot = f"teacher's score at {full['nfe']} steps: {full['score']:.3f}"
    body = [
        line[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(line[1:], widths[1:]))
        for line in lines
    ]
    return "\n".join([*body, foot])


def sampling_table(study: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: a picture's cost in the transformer, by method and steps."""
    costs = study["sampling"]
    steps = sorted({int(n) for entries in costs.values() for n in entries})
    lines = [["a picture's cost", *(f"{n} {page.plural('step', n)}" for n in steps)]]
    for name, entries in costs.items():
        cells = [entries.get(str(n)) for n in steps]
        words = [
            f"{cost['flops'] / 1e9:.2f} GFLOP, {1000 * cost['seconds']:.1f} ms" if cost else "-"
            for cost in cells
        ]
        lines.append([name, *words])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A head and rows as a table in Markdown, for documents."""
    head, *lines = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = [[prose(cell).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


def score_by_steps(study: Mapping[str, Any]) -> Callable[[Axes, Theme], None]:
    """Each method's share of the teacher's score against steps, bars over the seeds."""

    def draw(axes: Axes, theme: Theme) -> None:
        axes.axhline(1.0, color=theme.teacher, dashes=(5, 3), label="teacher, all steps")
        known = set()
        for index, (name, cells) in enumerate(by_row(study).items()):
            found = shares(study, cells)
            known |= set(found)
            axes.errorbar(
                list(found),
                [value.mean for value in found.values()],
                [value.half or 0 for value in found.values()],
                **theme.method(index),
                marker="o",
                capsize=2.5,
                linewidth=1.6,
                label=plots.label(name),
            )
        full = study["teacher"]["score"]
        few = {int(n): e["score"] / full for n, e in study["teacher"]["few"].items()}
        few = {n: share for n, share in sorted(few.items()) if n <= max(known, default=math.inf)}
        if few:
            axes.plot(
                list(few), list(few.values()), color=theme.teacher, marker="s", label="teacher"
            )
        ticks = sorted(known | set(few))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("steps per picture")
        axes.set_ylabel("share of the teacher's score")
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2)

    return draw


SPENT = {"evaluations": (1e3, "training, thousands of network evaluations")}
SPENT |= {"seconds": (60.0, "training, minutes")}
"""What a cell has spent at a training step: its unit, and an axis's label."""


def score_by_spent(
    study: Mapping[str, Any], steps: int, kind: str
) -> Callable[[Axes, Theme], None]:
    """Share of the teacher's score in `steps` steps against a key of `SPENT`, seeds apart."""
    unit, words = SPENT[kind]

    def draw(axes: Axes, theme: Theme) -> None:
        full = study["teacher"]["score"]
        axes.axhline(1.0, color=theme.teacher, dashes=(5, 3))
        for index, (name, cells) in enumerate(by_row(study).items()):
            for seed, cell in enumerate(cells):
                known = {int(step): scores for step, scores in cell["history"].items()}
                known[cell["steps"]] = cell["student"]
                at = [step for step in sorted(known) if str(steps) in known[step]]
                axes.plot(
                    [cell["spent"][str(step)][kind] / unit for step in at],
                    [known[step][str(steps)]["score"] / full for step in at],
                    **theme.method(index),
                    marker=".",
                    linewidth=1.4,
                    label=None if seed else plots.label(name),
                )
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(words)
        axes.set_ylabel(f"share in {steps} step{'s' * (steps > 1)}")
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2)

    return draw


def measures_table(study: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows: measures of real pictures, of the teacher, and of each method by steps.

    None for a study of an older version, which measured nothing.
    """
    known = parse_results({"measures": study.get("measures", {})}).measured
    if known.teacher is None or known.real is None:
        return []
    names = [name.removeprefix("distance ") for name in MEASURES.values()]
    lines = [["measure", "steps", "least share", *names]]

    def line(name: str, steps: str, found: Sequence[Measures]) -> None:
        columns = [[each.diversity_share(known.teacher) for each in found], *zip(*found)]
        cells = ["-" if None in each else f"{spread(each):.3f}" for each in columns]
        lines.append([name, steps, *cells])

    line("real", "-", [known.real])
    line("teacher", str(study["teacher"]["nfe"]), [known.teacher])
    for name, cells in by_row(study).items():
        measured = [
            parse_results({"measures": {"student": cell["measures"]}}).measured.student
            for cell in cells
            if "measures" in cell
        ]
        for steps in measured[0] if measured else ():
            line(name, str(steps), [each[steps] for each in measured])
    return lines


MEASURES_NOTE = (
    "How much several pictures of one prompt differ, the least share of the teacher's values, and"
    " Fréchet distances of features to real pictures and to the teacher's: real to real and teacher"
    " to teacher are what two sets of the same kind have."
)
PLOT = (4.6, 3.4)  # inches


def plots_of(study: Mapping[str, Any]) -> list[tuple[str, str, Callable[[Axes, Theme], None]]]:
    """The plots: a file's name, a caption, and a function that draws it."""
    rows = by_row(study)
    if not rows:
        return []
    caption = "Share of the teacher's score against steps per picture"
    made = [("share-by-steps", caption, score_by_steps(study))]
    if any(cell["history"] for cell in study["cells"]):
        for n in step_counts(study):
            for kind, (_, words) in SPENT.items():
                caption = f"Share in {n} {page.plural('step', n)} against {words}"
                made.append((f"share-by-{kind}-{n}", caption, score_by_spent(study, n, kind)))
    return made


def write(folder: Path, study: Mapping[str, Any], grid: Path | None = None) -> Path:
    """Writes the results of a study: study.html, which needs no other file; study.md and its plots.

    Args:
      folder: where the files go.
      study: study.json's content.
      grid: a picture of the methods' samples side by side.

    Returns:
      The page.
    """
    rows, full = by_row(study), study["teacher"]
    note = (
        "Means over the seeds, and half of the range they span. Evaluations are forwards of the"
        " student's network for one picture, by arithmetic: of the whole training, with what comes"
        " before the student's own steps, and of one of these. The teacher's own score at"
        f" {full['nfe']} steps is {full['score']:.3f}."
    )
    tables = [
        ("Shares and costs", note, table(study)),
        ("Sampling", "Of the transformer, on the machine of the study.", sampling_table(study)),
        ("Tasks", "Scores.", _by_task(study, rows, list(full["tasks"]))),
    ]
    if measured := measures_table(study):
        tables.insert(1, ("Diversity and distances", MEASURES_NOTE, measured))
    commands = [str(cell["command"]) for cell in study["cells"]]
    page.write(
        folder / "study.html",
        "study.html",
        str(study["name"]),
        tables=tables,
        figures=[page.Figure(x, plots.inline(draw, PLOT, x)) for _, x, draw in plots_of(study)],
        image=page.picture(grid) if grid is not None else None,
        commands=commands,
    )

    text = [f"## {name}\n\n{note}\n\n{markdown(lines)}" for name, note, lines in tables]
    for name, caption, draw in plots_of(study):
        plots.save(folder / f"{name}.svg", draw, PLOT)
        text.append(f"![{caption}]({name}.svg)")
    lines = (f"    {one_line(command, COMMAND)}" for command in commands)
    text.append("## Commands\n\n" + "\n".join(lines))
    write_atomically(
        folder / "study.md", f"# {prose(str(study['name']))}\n\n" + "\n\n".join(text) + "\n"
    )
    return folder / "study.html"


def _by_task(study: Mapping, rows: Mapping, tasks: Sequence[str]) -> list[list[str]]:
    lines = [["score", "steps", *(task.replace("_", " ") for task in tasks)]]
    full = study["teacher"]
    lines.append(["teacher", str(full["nfe"]), *(f"{full['tasks'][task]:.2f}" for task in tasks)])
    for name, cells in rows.items():
        for steps in cells[0]["student"]:
            values = [
                str(spread([cell["student"][steps]["tasks"][task] for cell in cells]))
                for task in tasks
            ]
            lines.append([name, steps, *values])
    return lines
