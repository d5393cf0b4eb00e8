"""What a workdir keeps of a run beside checkpoints; of a run that is there, once it is accepted.

config.json     the configuration
data.json       which data `data.path` holds; the size of batches that old positions count
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.data.identity import Identity, identity
from jax_distill.devices import processes
from jax_distill.storage.files import read_json, read_text, write_json

DATA = "data.json"


class Kept(TypedDict, total=False):
    """What `DATA` holds.

    Attributes:
      records: the data set at `data.path`, when the run began.
      batch_size: of the run when the first versions saved the positions of its input pipeline,
        which counted batches; there once the batch size has changed.
    """

    records: Identity
    batch_size: int


def note_data(config: ConfigDict, workdir: Path) -> None:
    """Writes down which data a new run begins with."""
    _keep(workdir, _with_records({}, config))


def accept(config: ConfigDict, workdir: Path) -> None:
    """Replaces the configuration of a run that goes on, whose checkpoint is read: all is well."""
    path = workdir / "config.json"
    if not (processes.is_leader() and path.exists()):
        return
    if read_text(path) == configuration.to_json(config):
        return
    kept = _with_records(known(workdir), config)
    before = configuration.load(workdir).batch_size
    if before != config.batch_size:
        kept = {"batch_size": before, **kept}
    _keep(workdir, kept)  # first: whoever sees the new batch size finds the old one
    configuration.save(config, workdir)


def known(workdir: Path) -> Kept:
    """What is known of the data of a run; nothing of those that older versions began.

    Raises:
      FileError: the file is damaged.
    """
    try:
        return read_json(workdir / DATA, Kept)
    except FileNotFoundError:
        return {}


def in_examples(
    position: Mapping[str, Any], workdir: Path, batch_size: int, rows_per_example: int
) -> dict[str, int]:
    """The position of the input pipeline in examples; the first versions counted batches.

    Args:
      position: that a checkpoint holds.
      workdir: of the run.
      batch_size: of the run now.
      rows_per_example: of its objective.
    """
    if "next_index" not in position:
        return dict(position)
    if (workdir / "config.json").exists():
        batch_size = configuration.load(workdir).batch_size
    batch_size = known(workdir).get("batch_size", batch_size)
    return {"examples": position["next_index"] * batch_size // rows_per_example}


def _with_records(kept: Kept, config: ConfigDict) -> Kept:
    if config.objective.name == "autoencoder" or not config.data.path or "records" in kept:
        return kept
    return {**kept, "records": identity(Path(config.data.path))}


def _keep(workdir: Path, kept: Kept) -> None:
    if kept != known(workdir):
        write_json(workdir / DATA, kept)
