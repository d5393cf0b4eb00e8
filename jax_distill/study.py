"""Compare: `python -m jax_distill.study --config=configs/study.py [--workdir=DIR]`.

Every cell of the study is a run of `jax_distill.main`, of one method with one seed, in a folder of
its own; all share the data and the time-rescaled teacher, which the study makes first. A finished
cell is kept, one that was stopped goes on: run the same command again.
"""

from pathlib import Path
from typing import Any, TypedDict

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jax_distill import cells, commands, lease, rules, streams
from jax_distill.files import check_kind
from jax_distill.train import Interrupted, Signals

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the study's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where it lives. Default: runs/<name>.")


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
    if not (config.rows and config.seeds):
        raise ValueError("rows, seeds: a study needs one of each or more")
    for seed in config.seeds:
        streams.check_seed(seed, "seeds")
    streams.check_seed(config.data_seed, "data_seed")
    for row, file, *_ in config.rows:
        if not Path(file).is_file():
            raise ValueError(f"rows.{row}: there is no file '{file}'")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    if not isinstance(config, ConfigDict) or "rows" not in config:
        raise ValueError("--config: give a study's file, such as configs/study.py")
    check(config)
    try:
        with Signals(interrupt=True):
            workdir = Path(_WORKDIR.value or Path("runs") / config.name)
            with lease.of_folder(workdir):
                cells.run(config, workdir)
    except Interrupted as stop:
        logging.info("%s; run the same command to go on", stop)


if __name__ == "__main__":
    commands.run(main)
