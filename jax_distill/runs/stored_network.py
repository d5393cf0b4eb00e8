"""Trained networks on disk, opened without reading their parameters."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
from ml_collections import ConfigDict

from jax_distill.assembly import adapters, build
from jax_distill.assembly.resolution import EMBEDDED, trained_config
from jax_distill.data.identity import of_weights
from jax_distill.interop import diffusers_folder, lora_weights, ported_folder
from jax_distill.interop.orbax_tree import StoredLeaf, check_shapes, open_tree
from jax_distill.objectives.objective import STUDENT
from jax_distill.storage import paths
from jax_distill.storage.files import check_no_partial, read_json
from jax_distill.training import checkpoint
from jax_distill.worlds.shapes import bundled


class _Progress(TypedDict):
    """The keys beside a checkpoint that are read here."""

    checksums: dict[str, int]


class StoredNetwork(NamedTuple):
    """A trained network, not read yet.

    Attributes:
      config: of its run.
      tree: its parameters, nested `StoredLeaf`s, with `Adapted` kernels where it has adapters.
      folder: its workdir or ported folder; None for the bundled teacher.
      teacher: the network with the frozen kernels of its adapters; None without adapters.
      check: raises ValueError when the parameters that were read are not those that were saved.
    """

    config: ConfigDict
    tree: dict[str, Any]
    folder: Path | None
    teacher: "StoredNetwork | None" = None
    check: Callable[[], None] = lambda: None

    def merged(self) -> dict[str, Any]:
        """Its parameters, adapters merged into their kernels."""
        if self.teacher is None:
            return self.tree
        return lora_weights.merged(self.tree, self.config.lora.base == "int8")


def open_network(source: str) -> StoredNetwork:
    """Opens a network; only descriptions are read.

    Args:
      source: a workdir, a ported folder, or "embedded" for the bundled teacher.

    Raises:
      ValueError: the source has no such network.
    """
    check_no_partial(source, "--checkpoint")
    config = trained_config(source)
    if (name := config.objective.name) not in build.OBJECTIVES:
        raise ValueError(f"--checkpoint: '{source}' is a run of {name!r}, which trains no network")
    if source == EMBEDDED:
        params, _ = bundled.load("teacher")
        return StoredNetwork(config, jax.tree.map(StoredLeaf, params), None)
    folder = paths.path(source)
    if not ported_folder.is_ported(folder):
        return _open_run(folder, config)
    tree = open_tree(folder / "network")
    _check_shapes(folder, config, tree)
    return StoredNetwork(config, tree, folder)


def weights_of(source: str) -> str:
    """A digest of the weights of a network, as of `open_network`; see `of_weights`."""
    if source == EMBEDDED:
        return of_weights(bundled.FOLDER)
    if ported_folder.is_ported(paths.path(source)):
        return of_weights(paths.path(source) / "network")
    step = checkpoint.complete_steps(paths.path(source))[0]
    return of_weights(paths.path(source) / "checkpoints" / str(step))


def _open_run(folder: Path, config: ConfigDict) -> StoredNetwork:
    """The average of the student in a run's latest whole checkpoint."""
    step = folder / "checkpoints" / str(checkpoint.complete_steps(folder)[0])
    average = open_tree(step / "state", ("players", STUDENT, "ema"), checked=True)
    if "network" not in average:
        raise ValueError(f"'{step}' holds no network; give another --checkpoint")
    check = functools.partial(_check_sums, step, average)
    beside = adapters.settings(config)
    if beside is None:
        _check_shapes(step, config, average["network"])
        return StoredNetwork(config, average["network"], folder, check=check)
    teacher = open_network(config.teacher.checkpoint or EMBEDDED)

    def check_both() -> None:
        check()
        teacher.check()

    whole = beside.attach(teacher.merged(), average["network"])
    return StoredNetwork(config, whole, folder, teacher, check_both)


def _check_shapes(where: Path, config: ConfigDict, tree: Mapping[str, Any]) -> None:
    """Raises ValueError when stored parameters are not those of the network in the config."""
    check_shapes(str(where), tree, diffusers_folder.shapes(build.network_config(config)))


def _check_sums(step: Path, average: Mapping[str, Any]) -> None:
    """Compares what was read with the checksum that was saved; the first versions saved none."""
    path = step / "progress" / "metadata"
    saved = read_json(path, _Progress)["checksums"] if path.exists() else {}
    found = sum(leaf.checksum() for leaf in jax.tree.leaves(average)) % 2**32
    if saved.get(f"{STUDENT}.ema", found) != found:
        raise ValueError(f"'{step}' is damaged: its checksums do not fit; move it elsewhere")
