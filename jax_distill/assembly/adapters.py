"""LoRA students: an objective that trains adapters beside one frozen copy of its teacher.

What is trained, averaged, optimised and saved is what `models.lora.LoRA.split` makes of the
student (adapters, and the embedders of time, guidance and interval, which a student has of its own)
and what the objective trains besides, such as sCM's logvar. All else is the teacher's,
`frozen["teacher"]`, which exists once: the teacher is the student with its adapters off.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_distill.config import ConfigError
from jax_distill.devices import processes
from jax_distill.models import lora
from jax_distill.objectives.objective import Batch, Objective
from jax_distill.storage.files import read_json, write_json
from jax_distill.training.checkpoint import bit_sums

TEACHER = "teacher.json"  # in a workdir: what its frozen parameters were when it began

BASES = ("", "int8")
"""What `lora.base` may be: how the frozen kernels are kept."""


def settings(config: ConfigDict) -> lora.LoRA | None:
    """What `config.lora` says; None where all of the student is trained.

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
class AdapterObjective:
    """Any objective with a teacher, of whose network adapters are trained; see `Objective`.

    Attributes:
      objective: the method, of whole networks.
      lora: which kernels have adapters.
    """

    objective: Objective
    lora: lora.LoRA

    @property
    def rows_per_example(self) -> int:
        return self.objective.rows_per_example

    def init(self, key: jax.Array, params: dict) -> dict:
        key_adapters, key_objective = jax.random.split(key)
        whole = self.objective.init(key_objective, params)
        return {**whole, "network": self.lora.split(key_adapters, whole["network"])}

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        return self.objective.draw(key, batch)

    def loss(
        self, params: dict, frozen: dict, batch: Batch, draws: Any, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        def whole(params):
            return attached(self.lora, frozen["teacher"], params)

        average = whole(frozen["average"])
        return self.objective.loss(
            whole(params), {**frozen, "average": average}, batch, draws, step
        )

    def sample(self, params, noise, text, null, guidance, key, steps):
        """As the method's own: `params` are whole, see `attached`."""
        return self.objective.sample(params, noise, text, null, guidance, key, steps)


def attached(adapters: lora.LoRA, teacher: Mapping[str, Any], params: dict) -> dict:
    """What an objective trains, whole: its "network" with the teacher's frozen parameters."""
    return {**params, "network": adapters.attach(teacher, params["network"])}


def whole(config: ConfigDict, teacher: Mapping[str, Any], params: dict) -> dict:
    """Trained parameters as they are drawn with: with the teacher's, if they are of adapters.

    Args:
      config: of the run.
      teacher: parameters of the frozen network, as `frozen.hold` keeps them.
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
      teacher: parameters of the frozen network, as `frozen.hold` keeps them.
      note: writes down what they are, where that is not known.

    Raises:
      ValueError: the teacher has changed.
    """
    if settings(config) is None:
        return
    path = workdir / TEACHER
    if not path.exists() and not note:
        return
    found = {"checksum": int(bit_sums({"teacher": teacher})["teacher"])}
    fix = "restore it, or train anew in another --workdir"
    if path.exists() and read_json(path, dict[str, int], fix=fix) != found:
        raise ValueError(
            f"teacher.checkpoint: '{config.teacher.checkpoint or 'embedded'}' is no longer what the"
            f" adapters in '{workdir}' were trained beside; put the old one back, or train anew in"
            " another --workdir"
        )
    if not path.exists() and processes.is_leader():
        write_json(path, found)
