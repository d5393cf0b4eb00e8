"""Configurations as runs keep them: writing and reading `config.json`, of older versions too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_distill.config.checking import check
from jax_distill.config.defaults import base
from jax_distill.config.settings import ConfigError, flatten
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.objectives.methods import KINDS
from jax_distill.objectives.settings import settings_of
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, read_json, write_atomically

LATER = (
    *("world", "ema_dtype", "ema_power", "ema_warmup", "teacher.guidance", "data.resolution"),
    *("data.embedding", "evaluation.every", "data.weights", "data.caption_dropout"),
    *("data.damaged", "data.damaged_share", "data.threads", "data.prefetch", "data.workers"),
    *("evaluation.diversity_prompts", "evaluation.diversity_pictures"),
    *("lora.rank", "lora.alpha", "lora.targets", "lora.base", "samples.teacher_steps"),
    *("start.checkpoint", "rescale.total_steps", "rescale.batch_size", "rescale.learning_rate"),
    *("model.remat", "model.attention", "model.guidance_factor", "mesh.split_tokens"),
    *("optimizer.frozen", "optimizer.moments", "optimizers"),
)
"""Keys that older versions did not have; their defaults do the same as those versions did."""

FORMER = ("evaluation.batch_size",)
"""Keys of older versions that nothing reads any more."""


def save(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved configuration as `config.json` into the workdir, made if missing."""
    write_atomically(workdir / "config.json", to_json(config))


def to_json(config: ConfigDict) -> str:
    """The text of `config.json`: with the objective's defaults, which may change in later versions.

    How a student was trained, and is drawn from, stays in its own file.
    """
    whole = config.copy_and_resolve_references()
    if (kind := KINDS.get(whole.objective.name)) is not None:
        with whole.unlocked():
            whole.objective = {**settings_of(kind), **whole.objective}
    return whole.to_json_best_effort(indent=2) + "\n"


def load(workdir: Path) -> ConfigDict:
    """Reads what `save` wrote, in this version or an older one, whose keys are completed.

    Raises:
      ConfigError: it is missing or invalid.
    """
    path = paths.path(workdir) / "config.json"
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"'{workdir}' is no workdir of a run: it has no config.json; make one with"
            " python -m jax_distill.main"
        ) from None
    except FileError as error:
        raise ConfigError(str(error)) from None
    try:
        values = _completed(values)
        check(values, partial=("model",))  # where the network has defaults of its own
        _check_shapes(values)
    except ConfigError as error:
        raise ConfigError(f"'{path}' is no configuration of this version: {error}") from None
    return ConfigDict(values).lock()


def check_teachers(workdir: Path) -> None:
    """Checks that a run of adapters is not its own teacher, directly or through other runs.

    Raises:
      ConfigError: it is, or the configuration of one of them is missing or invalid.
    """
    passed: list[Path] = []
    folder = paths.absolute(workdir)
    while (config := load(folder)).lora.rank and config.teacher.checkpoint not in ("", "embedded"):
        passed.append(folder)
        folder = paths.absolute(config.teacher.checkpoint)
        if folder in passed:
            raise ConfigError(
                f"teacher.checkpoint: '{workdir}' stands beside '{folder}', which stands beside"
                " itself; put the config.json of one of them back"
            )


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys that an older version did not have to the values of its file.

    Raises:
      ConfigError: other keys are missing.
    """
    complete = dict(values)
    for key, default in {**flatten(base().to_dict()), "optimizers": {}}.items():
        name, _, rest = key.partition(".")
        section = complete.get(name, {})
        if name == "objective" or (rest and not isinstance(section, Mapping)):
            continue  # `check` refuses it
        if (rest in section) if rest else (name in complete):
            continue
        if key not in LATER:
            raise ConfigError(f"{key}: missing; restore the file")
        if name != "model":
            complete[name] = {**section, rest: default} if rest else default
    for key in FORMER:
        name, _, rest = key.partition(".")
        if isinstance(complete.get(name), Mapping):
            complete[name] = {k: value for k, value in complete[name].items() if k != rest}
    return complete


def _check_shapes(values: Mapping[str, Any]) -> None:
    """Checks that the sizes of networks fit together.

    Raises:
      ConfigError: naming the setting.
    """
    for section, kind in (("model", MMDiTConfig), ("autoencoder", AutoencoderConfig)):
        try:
            kind(**values[section])
        except ValueError as error:
            raise ConfigError(f"{section}.{error}") from None
