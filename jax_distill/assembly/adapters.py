"""LoRA: an objective whose players train adapters beside one frozen copy of their teacher.

What is trained, averaged, optimised and saved is what `models.lora.LoRA.split` makes of the
student (adapters, and the embedders of time, guidance and interval, which a student has of its own)
and what the objective trains besides, such as sCM's logvar. All else is the teacher's,
`frozen["teacher"]`, which exists once: the teacher is the student with its adapters off.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_distill.config import ConfigError
from jax_distill.devices import processes
from jax_distill.flow import Batch
from jax_distill.models import lora
from jax_distill.objectives.objective import Loss, Method, Player, View
from jax_distill.storage.files import read_json, write_json
from jax_distill.training.checkpoint import bit_sums

TEACHER = "teacher.json"  # in a workdir: what its frozen parameters were when it began

BASES = ("", "int8")
"""What `lora.base` may be: how the frozen kernels are kept."""


def settings(config: ConfigDict) -> lora.LoRA | None:
    """The settings of `config.lora`; None where all of the student is trained.

    Raises:
      ConfigError: a value that cannot be.
    """
    section = config.get("lora")  # the first versions had none
    if section is None or not section.rank:
        return None
    try:
        return lora.LoRA(section.rank, section.alpha, section.targets)
    except ValueError as error:
        raise ConfigError(f"lora.{error}") from None


@dataclasses.dataclass(frozen=True)
class AdapterObjective(Method):
    """An objective with a teacher, of whose networks adapters are trained.

    Every player that has a network has adapters of its own beside the one frozen copy of the
    teacher's; players without one, such as heads, are as they were.

    Attributes:
      objective: the method, of whole networks.
      lora: which kernels have adapters.
    """

    objective: Method
    lora: lora.LoRA

    @property
    def rows_per_example(self) -> int:
        return self.objective.rows_per_example

    @property
    def players(self) -> Mapping[str, Player]:
        return {
            name: player._replace(loss=functools.partial(self._loss, player.loss))
            for name, player in self.objective.players.items()
        }

    def init(self, key: jax.Array, params: dict) -> dict[str, Any]:
        key_adapters, key_objective = jax.random.split(key)
        made = self.objective.init(key_objective, params)
        for index, (name, own) in enumerate(made.items()):
            if "network" in own:
                key = jax.random.fold_in(key_adapters, index) if index else key_adapters
                made[name] = {**own, "network": self.lora.split(key, own["network"])}
        return made

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        return self.objective.draw(key, batch)

    def turn(self, step: int) -> tuple[str, ...]:
        return self.objective.turn(step)

    def _loss(
        self, loss: Loss, own: dict, view: View, batch: Batch, draws: Any, moves: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        whole = functools.partial(attached, self.lora, view.frozen["teacher"])
        nets, averages = (
            {name: whole(tree) for name, tree in trees.items()}
            for trees in (view.nets, view.averages)
        )
        return loss(whole(own), View(view.frozen, nets, averages), batch, draws, moves)


def attached(adapters: lora.LoRA, teacher: Mapping[str, Any], params: dict) -> dict:
    """A player's tree, whole: its "network", if it has one, with the teacher's parameters."""
    if "network" not in params:
        return params
    return {**params, "network": adapters.attach(teacher, params["network"])}


def whole(config: ConfigDict, teacher: Mapping[str, Any], params: dict) -> dict:
    """Trained parameters as they are drawn with: with the teacher's, if they are of adapters.

    Args:
      config: of the run.
      teacher: parameters of the frozen network, as `frozen_network` makes them.
      params: what is in the run's state.
    """
    adapters = settings(config)
    return params if adapters is None else attached(adapters, teacher, params)


def check_teacher(
    config: ConfigDict, workdir: Path, teacher: Mapping[str, Any], *, note: bool = False
) -> None:
    """Checks that adapters are laid beside the parameters that they were trained beside.

    Args:
      config: of the run.
      workdir: of the run.
      teacher: parameters of the frozen network, as `frozen_network` makes them.
      note: writes down what they are, where that is not known.

    Raises:
      ValueError: the teacher has changed.
    """
    if settings(config) is None:
        return
    path = workdir / TEACHER
    if not path.exists() and not note:
        return
    found = {"checksum": bit_sums({"teacher": teacher})["teacher"]}
    fix = "restore it, or train anew in another --workdir"
    if path.exists() and read_json(path, dict[str, int], fix=fix) != found:
        raise ValueError(
            f"teacher.checkpoint: '{config.teacher.checkpoint or 'embedded'}' is no longer what the"
            f" adapters in '{workdir}' were trained beside; put the old one back, or train anew in"
            " another --workdir"
        )
    if not path.exists() and processes.is_leader():
        write_json(path, found)
