"""The settings of a study: their types, and what can be told of them before it begins."""

import math
from pathlib import Path
from typing import Any, TypedDict

from ml_collections import ConfigDict

from jax_distill import streams
from jax_distill.config import rules
from jax_distill.storage.files import check_kind


class Teacher(TypedDict):
    """How a study makes the teacher of its cells: a checkpoint, a file and settings of it."""

    checkpoint: str
    config: str
    settings: list[str]


class Study(TypedDict):
    """The settings of a study, see `configs/study.py`."""

    name: str
    rows: list[list[str]]
    seeds: list[int]
    common: dict[str, Any]
    student_steps: list[int]
    teacher_steps: list[int]
    prompts: int
    evaluate_every: int
    examples: int
    data_seed: int
    drawn_steps: int
    teacher: Teacher
    grid_prompts: int
    grid_steps: list[int]


def check(config: ConfigDict) -> None:
    """Checks what can be told from a study's configuration alone.

    Raises:
      ValueError: naming the key.
    """
    check_kind(config.to_dict(), Study, where="--config", fix="see configs/study.py")
    rules.check({"name": config.name}, rules.of_runs())
    if not all(len(row) > 1 for row in config.rows):
        raise ValueError("rows: each needs a name and a config file, see configs/study.py")
    if ("evaluations" in config.common) == ("total_steps" in config.common):
        raise ValueError(
            "common: give total_steps of every cell, or evaluations, a budget that its steps follow"
            " from; not both"
        )
    budget = config.common.get("evaluations", 1)
    if isinstance(budget, bool | str) or not 0 < budget < math.inf:
        raise ValueError(f"common.evaluations: {budget!r} is not a positive number")
    if not (config.rows and config.seeds):
        raise ValueError("rows, seeds: a study needs one of each or more")
    for seed in config.seeds:
        streams.check_seed(seed, "seeds")
    streams.check_seed(config.data_seed, "data_seed")
    for row, file, *_ in config.rows:
        if not Path(file.partition(":")[0]).is_file():  # a preset comes after it
            raise ValueError(f"rows.{row}: there is no file '{file}'")
