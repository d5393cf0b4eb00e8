"""Scores of drawn pictures from what was found in them, with intervals, for results.json."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from jax_distill.evaluation.benchmarks import distances, dpg, geneval
from jax_distill.evaluation.benchmarks.drawn import Drawn
from jax_distill.evaluation.benchmarks.findings import Embeddings
from jax_distill.evaluation.benchmarks.generation import SPEED
from jax_distill.evaluation.benchmarks.intervals import Estimate, Figure, differences, estimates
from jax_distill.evaluation.benchmarks.prompts import OVERALL
from jax_distill.evaluation.scoring import results
from jax_distill.storage.files import FileError, read_json

SCORE, CLIP_SCORE, CMMD = OVERALL, "clip_score", "cmmd"
_ENDS = {"geneval": (0.0, 1.0), "dpg": (0.0, 100.0), "prompts": (0.0, 100.0)}
_ENDS |= {CLIP_SCORE: (0.0, 100.0), CMMD: (0.0, math.inf)}
"""What figures can be; intervals are cut there."""
_OF_ALL = {
    "benchmark": "prompts",
    "prompts": "prompts",
    "pictures": "numbers of pictures",
    "resolution": "sizes of pictures",
    "seed": "seeds",
}
"""Facts that are the same of all folders that are compared, and what they are called."""
_OF_A_KIND = {"network": "networks", "encoders": "text encoders", "guidance": "guidance scales"}
"""Likewise, of all of a teacher's, and of all of a student's."""


class Judged(NamedTuple):
    """A folder of pictures and its figures.

    Attributes:
      drawn: the folder.
      figures: "score" and tasks, as functions of the prompts' weights.
      features: CLIP score and CMMD, likewise, where CLIP has looked.
    """

    drawn: Drawn
    figures: Mapping[str, Figure]
    features: Mapping[str, Figure]

    @property
    def name(self) -> str:
        return f"{self.drawn.facts['kind']} in {self.drawn.facts['steps']} steps"


class _Speed(TypedDict):
    """The key of `speed.json` that is read here."""

    seconds_a_picture: float


def judge(
    drawn: Drawn,
    findings: Path | None = None,
    embedded: Embeddings | None = None,
    real: np.ndarray | None = None,
) -> Judged:
    """The figures of a folder.

    Args:
      drawn: the folder.
      findings: file of detections or answers; plain prompts have none.
      embedded: by CLIP; plain prompts are scored by them.
      real: embeddings (m, d) of real pictures, for CMMD.

    Raises:
      ValueError: the findings do not fit the folder, or there are none.
    """
    features = {}
    if embedded is not None:
        features[CLIP_SCORE] = distances.clip_figure(*embedded)
        if real is not None:
            features[CMMD] = distances.cmmd_figure(embedded.pictures, real, embedded.prompts)
    benchmark, prompts = drawn.asked.benchmark, drawn.asked.prompts
    if benchmark == "prompts":
        if embedded is None:
            raise FileError("--clip is missing; plain prompts are scored by CLIP alone")
        return Judged(drawn, {SCORE: features[CLIP_SCORE]}, features)
    try:
        if benchmark == "dpg":
            found = dpg.read_answers(findings, prompts)
            figures = dpg.figures(found, prompts)
        else:
            found = geneval.read_detections(findings, prompts)
            figures = geneval.figures(geneval.verdicts(found, prompts), prompts)
    except FileNotFoundError:
        fix = "give --answers" if benchmark == "dpg" else "give --detections, or a --detector"
        raise FileError(f"'{findings}' is missing; {fix}") from None
    if len(found[0]) != drawn.facts["pictures"]:
        raise FileError(
            f"'{findings}' is of {len(found[0])} pictures a prompt, '{drawn.folder}' has"
            f" {drawn.facts['pictures']}; give what was found in these"
        )
    return Judged(drawn, figures, features)


def groups(drawn: Drawn) -> list[Hashable]:
    """What prompts are resampled within, see `intervals.resamples`: GenEval's tasks."""
    if drawn.asked.benchmark == "geneval":
        return [prompt.tag for prompt in drawn.asked.prompts]
    return [""] * len(drawn.asked.prompts)


def layout(judged: Sequence[Judged], level: float = 0.95) -> dict[str, Any]:
    """The content of results.json for folders of one benchmark's prompts.

    Beside the scores of `scoring.results` it has, for each number of steps, intervals, CLIP's
    figures and the seconds a picture took; and what each student has more than the teacher at its
    most steps, paired.

    Args:
      judged: of a teacher, of students, or of both.
      level: of the intervals.

    Raises:
      ValueError: folders are of other prompts, or two of the same network and steps.
    """
    first = judged[0].drawn
    found: dict[str, dict[str, dict]] = {"teacher": {}, "student": {}}
    by_steps: dict[str, dict[int, Judged]] = {"teacher": {}, "student": {}}
    for each in judged:
        facts = each.drawn.facts
        _check_alike(each.drawn, first, _OF_ALL)
        if same := by_steps[facts["kind"]]:
            _check_alike(each.drawn, next(iter(same.values())).drawn, _OF_A_KIND)
        if facts["steps"] in by_steps[facts["kind"]]:
            raise FileError(
                f"--judge: '{each.drawn.folder}' is another folder of the {each.name}; give one"
            )
        by_steps[facts["kind"]][facts["steps"]] = each
    for kind, table in by_steps.items():
        found[kind] = {str(steps): _entry(table[steps], level) for steps in sorted(table)}
    made = results(**found, seed=first.facts["seed"])
    made |= {
        "benchmark": first.asked.benchmark,
        "prompts": len(first.asked.prompts),
        "pictures": first.facts["pictures"],
        "level": level,
        "config": next(iter((by_steps["student"] or by_steps["teacher"]).values())).drawn.facts[
            "config"
        ],
    }
    if by_steps["teacher"] and by_steps["student"]:
        best = by_steps["teacher"][max(by_steps["teacher"])]
        made["differences"] = {
            str(steps): _paired(best, student, level)
            for steps, student in sorted(by_steps["student"].items())
        }
    return made


def _check_alike(drawn: Drawn, first: Drawn, named: Mapping[str, str]) -> None:
    """Raises FileError where folders differ in something that one table says of all of them."""
    for key, name in named.items():
        if drawn.facts.get(key) != first.facts.get(key):
            raise FileError(
                f"--judge: '{drawn.folder}' and '{first.folder}' are of other {name}; judge them"
                " apart"
            )


def _entry(judged: Judged, level: float) -> dict[str, Any]:
    """The scores of a folder with their intervals."""
    labels = groups(judged.drawn)
    known = estimates(judged.figures, labels, level=level)
    entry: dict[str, Any] = {
        "score": known[SCORE].value,
        "tasks": {name: each.value for name, each in known.items() if name != SCORE},
        "intervals": {
            name: _cut(each, judged.drawn.asked.benchmark)[1:]
            for name, each in known.items()
            if _finite(each)
        },
    }
    if judged.features:
        features = estimates(judged.features, labels, level=level)
        entry["features"] = {name: _cut(each, name) for name, each in features.items()}
    if (path := judged.drawn.folder / SPEED).exists():
        entry["seconds_a_picture"] = read_json(path, _Speed)["seconds_a_picture"]
    return entry


def _paired(teacher: Judged, student: Judged, level: float) -> dict[str, list[float]]:
    """What a student has more than the teacher, and the ends of its interval, by figure."""
    ours, theirs = ({**each.figures, **each.features} for each in (student, teacher))
    labels = groups(student.drawn)
    found = differences(theirs, ours, labels, level=level)
    return {name: list(each) for name, each in found.items() if _finite(each)}


def _cut(estimate: Estimate, name: str) -> list[float]:
    """A figure and the ends of its interval within what such figures can be."""
    least, most = _ENDS[name]
    return [estimate.value, max(estimate.low, least), min(estimate.high, most)]


def _finite(estimate: Estimate) -> bool:
    return all(map(math.isfinite, estimate))
