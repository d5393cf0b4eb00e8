"""The figures of a benchmark with their intervals, as results.json holds them, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec

from jax_distill.evaluation.results import Results, parse_results
from jax_distill.storage.files import FileError, check_finite_numbers, check_kind, read_json

TITLES = {"geneval": "GenEval", "dpg": "DPG-Bench", "prompts": "CLIP score"}
FEATURES = {"clip_score": "CLIP score", "cmmd": "CMMD (less is better)"}

_Name = Annotated[str, msgspec.Meta(max_length=200)]
_Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
_Estimate = tuple[_Number, _Number, _Number]
_FIX = "judge again to replace it"


class _Entry(TypedDict, total=False):
    intervals: dict[_Name, tuple[_Number, _Number]]
    features: dict[_Name, _Estimate]
    seconds_a_picture: _Number


class _Teacher(_Entry, total=False):
    few: dict[str, _Entry]


class _Judged(TypedDict, total=False):
    """What results.json has of a benchmark beside the scores."""

    benchmark: _Name
    prompts: int
    pictures: int
    level: _Number
    teacher: _Teacher
    student: dict[str, _Entry]
    differences: dict[str, dict[_Name, _Estimate]]


class Table(NamedTuple):
    """Figures of a benchmark.

    Attributes:
      title: name of the benchmark.
      note: about the prompts and the intervals.
      columns: teacher or student, and steps.
      rows: a name, and a text for each column.
    """

    title: str
    note: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Teacher or student, and how many columns side by side are its."""
        return [(who, len(list(each))) for who, each in groupby(who for who, _ in self.columns)]

    @property
    def steps(self) -> list[str]:
        return [steps for _, steps in self.columns]


def table(results: Mapping[str, Any]) -> Table | None:
    """The figures in results.json with their intervals; None where no benchmark was judged.

    Raises:
      ValueError: it holds something else.
    """
    if "benchmark" not in results:
        return None
    check_kind(results, _Judged, where="it", fix=_FIX)
    check_finite_numbers(
        {key: value for key, value in results.items() if key != "config"}, where="it", fix=_FIX
    )
    parsed = parse_results(results)
    entries = _entries(results, parsed)
    differences = results.get("differences", {})
    form = ".1f" if results["benchmark"] != "geneval" else ".3f"
    rows = []
    for name in (None, *parsed.tasks):
        label = "overall" if name is None else name.replace("_", " ")
        cells = []
        for _, _, score, entry in entries:
            value = score.score if name is None else score.tasks.get(name)
            ends = entry.get("intervals", {}).get(name or "score")
            cells.append("-" if value is None else _with_ends(value, ends, form))
        rows.append((label, cells))
    if differences:
        known = [
            differences.get(steps, {}).get("score") if who == "student" else None
            for who, steps, _, _ in entries
        ]
        rows.insert(1, ("more than the teacher", [_signed(each, form) for each in known]))
    for name, label in FEATURES.items():
        known = [entry.get("features", {}).get(name) for *_, entry in entries]
        if any(known):
            cells = [_with_ends(each[0], each[1:], ".2f") if each else "-" for each in known]
            rows.append((label, cells))
    seconds = [entry.get("seconds_a_picture") for *_, entry in entries]
    if any(seconds):
        rows.append(("seconds a picture", [f"{x:.3g}" if x else "-" for x in seconds]))
    columns = [(who, steps) for who, steps, _, _ in entries]
    title = TITLES.get(results["benchmark"], results["benchmark"])
    return Table(title, _note(results, bool(differences)), columns, rows)


def read_table(path: Path) -> Table | None:
    """The table of a results.json; None if there is none, or of no benchmark.

    Raises:
      FileError: it does not hold figures of a benchmark.
    """
    if not path.exists():
        return None
    try:
        return table(read_json(path, fix=_FIX))
    except FileError as error:
        if str(error).startswith(f"'{path}'"):
            raise
        raise FileError(f"'{path}' does not hold figures of a benchmark: {error}") from None
    except ValueError as error:
        raise FileError(
            f"'{path}' does not hold figures of a benchmark ({error}); {_FIX}"
        ) from None


def _entries(results: Mapping[str, Any], parsed: Results) -> list[tuple]:
    """The columns of `Results`, and beside each what results.json has of it."""
    teacher, student = results.get("teacher", {}), results.get("student", {})
    found = []
    for place, (who, steps, score) in enumerate(parsed.columns()):
        if who == "student":
            entry = student[steps]
        else:
            first = place == 0 and parsed.teacher is not None
            entry = teacher if first else teacher.get("few", {})[steps]
        found.append((who, steps, score, entry))
    return found


def _note(results: Mapping[str, Any], paired: bool) -> str:
    pictures = results.get("pictures", 1)
    note = f"{results.get('prompts', 0):,} prompts, {pictures} picture{'s' * (pictures != 1)} each."
    note += f" In brackets are {results.get('level', 0.95):.0%} intervals over such prompts"
    return note + ("; a student's difference is paired, prompt by prompt." if paired else ".")


def _with_ends(value: float, ends: Sequence[float] | None, form: str) -> str:
    if ends is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{ends[0]:{form}}, {ends[1]:{form}}]"


def _signed(estimate: Sequence[float] | None, form: str) -> str:
    if estimate is None:
        return "-"
    value, low, high = (f"{each:+{form}}" for each in estimate)
    return f"{value} [{low}, {high}]"


def format_table(results: Mapping[str, Any]) -> str:
    """The table as text, for a terminal; "" where no benchmark was judged.

    Raises:
      ValueError: as `table`.
    """
    found = table(results)
    if found is None:
        return ""
    heads = [" ".join(each) for each in found.columns]
    lines = [(found.title, heads), *found.rows]
    first = max(len(name) for name, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(heads))]
    body = [
        name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths))
        for name, cells in lines
    ]
    return "\n".join([*body, found.note])
