"""Plots of a run as inline images for a page: vector graphics, for light and for dark surroundings.

A plot is a function that draws on matplotlib axes with the colours of a `Theme`; `inline` turns it
into HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from jax_distill.storage.files import write_atomically
from jax_distill.storage.quoting import one_line

MAX_POINTS = 600  # of a curve; more cannot be told apart
SMOOTHING = 0.05  # of a curve's points, averaged into one
MIN_SMOOTHED = 30  # points; a shorter curve is shown as it is


class Theme(NamedTuple):
    """Colours; those of `student` go from few steps to many."""

    ink: str
    line: str
    teacher: str
    few: str
    student: tuple[str, ...]
    methods: tuple[str, ...]  # that can be told apart

    def method(self, index: int) -> dict[str, str]:
        """How the curve of a study's method is drawn: dashed where colours come round again."""
        turn, place = divmod(index, len(self.methods))
        return {"color": self.methods[place], "linestyle": ("-", "--", ":")[turn % 3]}


LIGHT = Theme(
    *("#1f2328", "#d8dee4", "#6e7781", "#bc4c00", ("#9ecbf5", "#4f9ce8", "#0a58b8")),
    ("#0a58b8", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700", "#0e7c86", "#57606a"),
)
DARK = Theme(
    *("#e6edf3", "#3d444d", "#9198a1", "#f0883e", ("#1f4f8f", "#3f86dd", "#8cc4ff")),
    ("#6cb0ff", "#f0883e", "#56d364", "#bc8cff", "#f778ba", "#e3b341", "#39c5cf", "#9198a1"),
)


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that holds it; `kind` as in "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def label(text: str) -> str:
    """Untrusted text for axes and legends, where dollars would begin a formula."""
    return one_line(text).replace("$", r"\$")


def inline(draw: Callable[[Axes, Theme], None], size: tuple[float, float], alt: str) -> Markup:
    """The HTML of a plot, which follows the reader's choice of light or dark.

    Args:
      draw: puts the plot on axes.
      size: width and height in inches at 96 pixels each.
      alt: says in words what is drawn.
    """
    light, dark = (data_uri(_svg(draw, theme, size), "image/svg+xml") for theme in (LIGHT, DARK))
    return Markup(
        '<picture><source media="(prefers-color-scheme: dark)" srcset="{}">'
        '<img src="{}" alt="{}"></picture>'
    ).format(dark, light, alt)


def save(path: Path, draw: Callable[[Axes, Theme], None], size: tuple[float, float]) -> None:
    """Writes a plot as an SVG file on white; arguments as those of `inline`."""
    write_atomically(path, _svg(draw, LIGHT, size, alpha=1).decode())


def _svg(
    draw: Callable[[Axes, Theme], None], theme: Theme, size: tuple[float, float], alpha: float = 0
) -> bytes:
    style = {
        "font.size": 8.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "svg.hashsalt": "jax_distill",  # the same plot gives the same bytes
    }
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        figure.patch.set_alpha(alpha)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes, theme)
        content = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return content.getvalue()


def score_by_steps(
    student: Mapping[int, float],
    few: Mapping[int, float],
    teacher: float | None,
    teacher_name: str,
) -> Callable[[Axes, Theme], None]:
    """Scores against steps: the student, the teacher at as few, the teacher's own as a line."""

    def draw(axes: Axes, theme: Theme) -> None:
        curves = [
            (student, few, "student", theme.student[-1], "o"),
            (few, student, "teacher at few steps", theme.few, "s"),
        ]
        steps = sorted({*student, *few})
        if teacher is not None:
            axes.axhline(teacher, color=theme.teacher, dashes=(5, 3), label=teacher_name)
        for scores, others, name, color, marker in curves:
            if scores:
                at = sorted(scores)
                values = [scores[step] for step in at]
                axes.plot(at, values, marker=marker, color=color, label=name, linewidth=1.8)
                for step, value in zip(at, values):
                    above = value > others.get(step, value)  # away from the other curve
                    axes.annotate(
                        f"{value:.2f}",
                        (step, value),
                        (0, 7 if above else -7),
                        textcoords="offset points",
                        ha="center",
                        va="bottom" if above else "top",
                        color=color,
                    )
        top = max([*student.values(), *few.values(), teacher or 0]) or 1.0
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(steps) / 1.4, max(steps) * 1.4)
        axes.xaxis.set_major_locator(FixedLocator(steps))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.09 * top, 1.12 * top)  # room for the numbers beside the points
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("steps per picture")
        axes.set_ylabel("score")
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.2)

    return draw


def bars_by_task(
    tasks: Sequence[str],
    teacher: Mapping[str, float] | None,
    teacher_name: str,
    student: Mapping[int, Mapping[str, float]],
) -> Callable[[Axes, Theme], None]:
    """One group of bars a task: the teacher, and the student at each number of steps."""

    def draw(axes: Axes, theme: Theme) -> None:
        steps = sorted(student)
        bars = [] if teacher is None else [(teacher_name, theme.teacher, teacher)]
        for index, step in enumerate(steps):
            shade = max(len(theme.student) - len(steps) + index, 0)
            bars.append((f"student, {step}", theme.student[shade], student[step]))
        thickness = 0.8 / len(bars)
        for index, (name, color, scores) in enumerate(bars):
            y = np.arange(len(tasks)) + (index - (len(bars) - 1) / 2) * thickness
            values = [scores.get(task, np.nan) for task in tasks]
            axes.barh(y, values, thickness * 0.9, color=color, label=name)
        axes.set_yticks(range(len(tasks)), [label(task.replace("_", " ")) for task in tasks])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("score")
        axes.figure.legend(
            loc="outside upper left", ncols=4, handlelength=0.8, handleheight=0.8, columnspacing=1
        )

    return draw


def curve(
    steps: np.ndarray, values: np.ndarray, *, log: bool, from_zero: bool
) -> Callable[[Axes, Theme], None]:
    """A metric against steps: each value faint, and their running mean where they are noisy.

    Args:
      steps: (n,), ascending.
      values: (n,), finite; positive if `log`.
      log: a logarithmic axis of values.
      from_zero: the axis of values starts at zero.
    """

    def draw(axes: Axes, theme: Theme) -> None:
        color = theme.student[-1]
        stride = max(1, -(-len(steps) // MAX_POINTS))
        turns = np.mean(np.diff(np.sign(np.diff(values))) != 0) if len(values) > 2 else 0
        if len(values) >= MIN_SMOOTHED and turns > 0.1:  # a schedule is not noise
            smooth = running_mean(values, max(3, round(SMOOTHING * len(values))))
            axes.plot(steps[::stride], values[::stride], color=color, alpha=0.3, linewidth=0.9)
            axes.plot(steps[::stride], smooth[::stride], color=color, linewidth=1.6)
        else:
            marker = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=color, linewidth=1.4, marker=marker)
        if log:
            axes.set_yscale("log")
            decades = np.log10(values.max()) - np.log10(values.min())
            if decades < 0.7:
                axes.yaxis.set_major_locator(MaxNLocator(5))
            elif decades < 3:
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step")

    return draw


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` neighbours (fewer at the ends): (n,) -> (n,)."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    begin = np.maximum(index - window // 2, 0)
    end = np.minimum(index + window // 2 + 1, len(values))
    return (sums[end] - sums[begin]) / (end - begin)
