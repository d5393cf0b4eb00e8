"""The files that a workdir has beside checkpoints, written once a run is accepted.

config.json     the configuration
data.json       which data `data.path` holds
"""

from pathlib import Path
from typing import TypedDict

from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.data.folders import folders
from jax_distill.data.identity import Identity, identity_of
from jax_distill.devices import processes
from jax_distill.storage.files import read_json, read_text, write_json

DATA = "data.json"


class Kept(TypedDict, total=False):
    """The contents of `DATA`.

    Attributes:
      records: the data set at `data.path`, when the run began.
    """

    records: Identity


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
    _keep(workdir, _with_records(known(workdir), config))
    configuration.save(config, workdir)


def known(workdir: Path) -> Kept:
    """The facts noted about the data of a run; none of one that older versions began.

    Raises:
      FileError: the file is damaged.
    """
    try:
        return read_json(workdir / DATA, Kept)
    except FileNotFoundError:
        return {}


def _with_records(kept: Kept, config: ConfigDict) -> Kept:
    if config.objective.name == "autoencoder" or not config.data.path or "records" in kept:
        return kept
    return {**kept, "records": identity_of(folders(config.data.path))}


def _keep(workdir: Path, kept: Kept) -> None:
    if kept != known(workdir):
        write_json(workdir / DATA, kept)
