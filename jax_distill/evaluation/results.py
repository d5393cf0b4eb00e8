"""The scores of a run, as results.json holds them, and their table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax_distill.storage.files import FileError, parse_json, read_text
from jax_distill.storage.quoting import shown

T = TypeVar("T")

# Limits of a table and a plot; no evaluation here writes as much.
_MOST_COUNTS, _MOST_TASKS, _MOST_KEYS, _LONGEST_NAME = 16, 32, 1000, 80
_LARGEST = 1e6  # of a score
_SMALLEST = 1e-9  # of a score that others are shares of


class Score(NamedTuple):
    """The mean over tasks and each task's score."""

    score: float
    tasks: dict[str, float]


class Measures(NamedTuple):
    """Diversity of a prompt's pictures and distances of sets of pictures, see `measures`.

    Attributes:
      latents, place, size, color, twice: as in `measures.Diversity`.
      to_real, to_teacher: Fréchet distances to the pictures of others, in units of the total
        variance of real pictures' features.
    """

    latents: float | None = None
    place: float | None = None
    size: float | None = None
    color: float | None = None
    twice: float | None = None
    to_real: float | None = None
    to_teacher: float | None = None

    def diversity_share(self, teacher: Measures) -> float | None:
        """The least share of the teacher's diversity, of latents, places, sizes and colours."""
        pairs = list(zip(self[:4], teacher[:4]))
        if any(ours is None or not theirs or theirs < _SMALLEST for ours, theirs in pairs):
            return None
        return min(ours / theirs for ours, theirs in pairs)


MEASURES = {
    "latents": "latents",
    "place": "place, px",
    "size": "size, px",
    "color": "colour",
    "twice": "right twice",
    "to_real": "distance to real",
    "to_teacher": "distance to teacher",
}
"""What tables call them."""


@dataclass(frozen=True)
class Measured:
    """Measures of a run's networks: a student's by ascending steps, the teacher's in `nfe`."""

    real: Measures | None = None
    teacher: Measures | None = None
    nfe: int | None = None
    student: dict[int, Measures] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """results.json: scores by ascending steps; `teacher` is at its full number of steps, `nfe`.

    Files of older versions have no measures.
    """

    teacher: Score | None = None
    nfe: int | None = None
    few: dict[int, Score] = field(default_factory=dict)
    student: dict[int, Score] = field(default_factory=dict)
    measured: Measured = Measured()

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for _, _, score in self.columns() for task in score.tasks))

    @property
    def teacher_name(self) -> str:
        return f"teacher, {self.nfe} steps" if self.nfe else "teacher"

    def columns(self) -> list[tuple[str, str, Score]]:
        """The columns of a table, in order: teacher or student, steps, score."""
        columns = []
        if self.teacher is not None:
            columns.append(("teacher", str(self.nfe or "full"), self.teacher))
        columns += [("student", str(steps), score) for steps, score in self.student.items()]
        columns += [("teacher", str(steps), score) for steps, score in self.few.items()]
        return columns

    def shares(self, scores: Mapping[int, Score]) -> dict[int, float]:
        """Scores as shares of the teacher's; empty without a teacher that scores."""
        if self.teacher is None or not self.teacher.score > _SMALLEST:
            return {}
        return {steps: score.score / self.teacher.score for steps, score in scores.items()}

    def rows(self) -> list[tuple[str, list[str]]]:
        """The table's rows below its head: a name, and a text for each of `columns`."""
        scores = [score for _, _, score in self.columns()]
        rows = [("overall", [f"{score.score:.3f}" for score in scores])]
        shares = self.shares(dict(enumerate(scores)))
        if shares:
            rows.append(("share of teacher", [f"{100 * share:.1f}%" for share in shares.values()]))
        for task in self.tasks:
            values = [score.tasks.get(task) for score in scores]
            cells = ["-" if value is None else f"{value:.2f}" for value in values]
            rows.append((task.replace("_", " "), cells))
        return rows

    def measured_columns(self) -> list[tuple[str, str, Measures]]:
        """As `columns`, of measures; real pictures are last."""
        found, columns = self.measured, []
        if found.teacher is not None:
            columns.append(("teacher", str(found.nfe or "full"), found.teacher))
        columns += [("student", str(steps), each) for steps, each in found.student.items()]
        if found.real is not None:
            columns.append(("real", "-", found.real))
        return columns

    def measured_rows(self) -> list[tuple[str, list[str]]]:
        """As `rows`, for `measured_columns`."""
        measured = [each for _, _, each in self.measured_columns()]
        rows = [
            (label, [_cell(value, ".3f") for value in values])
            for label, values in zip(MEASURES.values(), zip(*measured))
            if any(value is not None for value in values)
        ]
        if self.measured.teacher is not None:
            shares = [each.diversity_share(self.measured.teacher) for each in measured]
            rows.insert(0, ("least share of teacher's", [_cell(share, ".1%") for share in shares]))
        return rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def parse_results(results: Mapping[str, Any]) -> Results:
    """Checks the content of results.json, see `Results`; raises ValueError naming what is wrong."""

    def number(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"{name} is {shown(value)}, not a finite number")
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{name} is {shown(value)}, which is no score")
        return float(value)

    def mapping(value: Any, name: str, most: int = _MOST_KEYS) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {shown(value)}, not a table of names and values")
        if len(value) > most:
            raise ValueError(
                f"{name} has {len(value)} entries, more than the {most} that are shown"
            )
        return value

    def score(value: Any, name: str) -> Score:
        value = mapping(value, name)
        tasks = mapping(value.get("tasks", {}), f"{name}.tasks", _MOST_TASKS)
        for task in tasks:
            if len(task) > _LONGEST_NAME or not task.isprintable():
                raise ValueError(f"{name}.tasks has {shown(task)} for the name of a task")
        return Score(
            number(value.get("score"), f"{name}.score"),
            {task: number(tasks[task], f"{name}.tasks.{task}") for task in tasks},
        )

    def measures(value: Any, name: str) -> Measures:
        value = mapping(value, name)
        if unknown := [key for key in value if key not in Measures._fields]:
            raise ValueError(f"{name} has {shown(unknown[0])} for the name of a measure")
        known = {key: each for key, each in value.items() if each is not None}
        return Measures(**{key: number(each, f"{name}.{key}") for key, each in known.items()})

    def by_steps(value: Any, name: str, parse: Callable[[Any, str], T]) -> dict[int, T]:
        table = {}
        for steps, content in mapping(value, name, _MOST_COUNTS).items():
            if not re.fullmatch("[1-9][0-9]{0,6}", steps):
                raise ValueError(f"{name} has {shown(steps)} for a number of steps")
            table[int(steps)] = parse(content, f"{name}.{steps}")
        return dict(sorted(table.items()))

    def optional(value: Mapping[str, Any], key: str) -> Measures | None:
        return measures(value[key], f"measures.{key}") if key in value else None

    def count(value: Any, name: str) -> int:
        if number(value, name) != int(value) or not 1 <= value < 10**7:
            raise ValueError(f"{name} is {shown(value)}, not a number of steps")
        return int(value)

    results = mapping(results, "the content")
    student = by_steps(results.get("student", {}), "student", score)
    others = mapping(results.get("measures", {}), "measures")
    measured = Measured(
        real=optional(others, "real"),
        teacher=optional(others, "teacher"),
        nfe=count(others["nfe"], "measures.nfe") if "nfe" in others else None,
        student=by_steps(others.get("student", {}), "measures.student", measures),
    )
    if "teacher" not in results:
        return Results(student=student, measured=measured)
    teacher = mapping(results["teacher"], "teacher")
    return Results(
        teacher=score(teacher, "teacher"),
        nfe=count(teacher["nfe"], "teacher.nfe") if "nfe" in teacher else None,
        few=by_steps(teacher.get("few", {}), "teacher.few", score),
        student=student,
        measured=measured,
    )


def read_results(path: Path) -> Results | None:
    """Reads a results.json; None if there is none, ValueError if it is not one."""
    if not path.exists():
        return None
    fix, text = "evaluate again to replace it", read_text(path)
    try:
        return parse_results(parse_json(text, where="it", fix=fix))
    except FileError as error:
        raise FileError(f"'{path}' does not hold the scores of a run: {error}") from None
    except ValueError as error:
        raise ValueError(f"'{path}' does not hold the scores of a run ({error}); {fix}") from None
