"""The scores of a run, as results.json holds them, and their table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jax_distill.storage.files import FileError, parse_json, read_text
from jax_distill.storage.quoting import shown

# Limits of a table and a plot; no evaluation here writes as much.
_MOST_COUNTS, _MOST_TASKS, _MOST_KEYS, _LONGEST_NAME = 16, 32, 1000, 80
_LARGEST = 1e6  # of a score
_SMALLEST = 1e-9  # of a score that others are shares of


class Score(NamedTuple):
    """The mean over tasks and each task's score."""

    score: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Results:
    """results.json: scores by ascending steps; `teacher` is at its full number of steps, `nfe`."""

    teacher: Score | None = None
    nfe: int | None = None
    few: dict[int, Score] = field(default_factory=dict)
    student: dict[int, Score] = field(default_factory=dict)

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

    def by_steps(value: Any, name: str) -> dict[int, Score]:
        table = {}
        for steps, content in mapping(value, name, _MOST_COUNTS).items():
            if not re.fullmatch("[1-9][0-9]{0,6}", steps):
                raise ValueError(f"{name} has {shown(steps)} for a number of steps")
            table[int(steps)] = score(content, f"{name}.{steps}")
        return dict(sorted(table.items()))

    def count(value: Any, name: str) -> int:
        if number(value, name) != int(value) or not 1 <= value < 10**7:
            raise ValueError(f"{name} is {shown(value)}, not a number of steps")
        return int(value)

    results = mapping(results, "the content")
    student = by_steps(results.get("student", {}), "student")
    if "teacher" not in results:
        return Results(student=student)
    teacher = mapping(results["teacher"], "teacher")
    return Results(
        teacher=score(teacher, "teacher"),
        nfe=count(teacher["nfe"], "teacher.nfe") if "nfe" in teacher else None,
        few=by_steps(teacher.get("few", {}), "teacher.few"),
        student=student,
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
