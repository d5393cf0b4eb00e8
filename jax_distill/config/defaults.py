"""The configuration that every config file starts from; how it is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_distill.config import rules
from jax_distill.config.settings import ConfigError, check_keys, flatten
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.objectives.methods import KINDS, settings_of
from jax_distill.storage.files import FileError, read_json, write_atomically
from jax_distill.storage.quoting import shown

LATER = (
    *("world", "ema_dtype", "teacher.guidance", "data.resolution", "evaluation.every"),
    *("lora.rank", "lora.alpha", "lora.targets", "lora.base", "samples.teacher_steps"),
    *("rescale.total_steps", "rescale.batch_size", "rescale.learning_rate"),
    *("model.remat", "model.attention", "model.guidance_factor", "mesh.split_tokens"),
    *("optimizer.frozen", "optimizer.moments"),
)
"""Keys that older versions did not have; their defaults are what those did."""

FORMER = ("evaluation.batch_size",)
"""Keys of older versions that nothing reads any more."""


def base(preset: str = "", *, presets: Sequence[str] = ("",)) -> ConfigDict:
    """All keys with their defaults; a config file sets what is special about it.

    It is locked, so that a misspelt key is an error; only `objective`, whose keys are the
    objective's, takes new ones.

    Args:
      preset: what followed the colon of `--config=file.py:preset`.
      presets: those that the config file knows.

    Raises:
      ConfigError: an unknown preset.
    """
    if preset not in presets:
        known = ", ".join(name for name in presets if name) or "none"
        raise ConfigError(
            f"--config: there is no preset {preset!r} after the colon; known: {known}"
        )
    config = ConfigDict(
        {
            "name": "",
            "world": "shapes",  # or "flux": see worlds/
            "seed": 0,
            "total_steps": 1000,
            "batch_size": 64,
            "accumulate": 1,  # micro-batches a step
            "ema_decay": 0.999,
            "ema_dtype": "float32",  # or "bfloat16", half the memory, see training/rounding.py
            "on_nonfinite": "stop",  # or "skip": leave such steps out and count them
            "dtype": "float32",  # of the networks' computation; parameters stay float32
            "objective": {"name": ""},
            "teacher": {
                # A workdir, or a folder of jax_distill.port; empty: the embedded teacher.
                "checkpoint": "",
                "velocity": "rescaled",  # or "original", of the teacher before the rescale
                "guidance": "auto",  # or "embedded", "cfg", "none", see build.guidance_of
            },
            "rescale": {  # the stage before sCM and MeanFlow, see objectives/time_rescale.py
                "total_steps": 0,
                "batch_size": 64,
                "learning_rate": 1e-3,
            },
            "lora": {  # adapters beside the frozen teacher, see assembly/adapters.py
                "rank": 0,  # 0: all of the student is trained
                "alpha": 16.0,  # adapters count alpha / rank times
                "targets": "blocks/",  # a pattern of the paths of kernels that have one
                "base": "",  # or "int8": how the frozen kernels of the blocks are kept
            },
            "model": {
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 4,
                "attention_head_dim": 64,
                "num_attention_heads": 3,
                "joint_attention_dim": 160,
                "pooled_projection_dim": 144,
                "guidance_embeds": False,
                "axes_dims_rope": (16, 24, 24),
                "time_scale": 1000.0,  # multiplies t before it is embedded
                "guidance_factor": 1000.0,  # likewise the guidance scale
                "interval_embeds": False,
                "remat": "none",
                "attention": "auto",  # or "xla", "blocked", "pallas_tpu", "pallas_gpu"
            },
            "autoencoder": {
                "latent_channels": 16,
                "block_out_channels": (8, 16, 48, 96),
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            "data": {
                "path": "",  # a folder made by jax_distill.prepare; empty: made in the workdir
                "examples": 100_000,  # of the shapes world, when the folder is made
                "seed": 0,
                "text_length": 10,
                "resolution": (512, 512),  # of FLUX's world: height and width in pixels
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": "constant",  # or "cosine", or "trapezoid"
                "decay_share": 0.3,  # of the steps, at the end of a trapezoid
                "warmup_steps": 0,
                "b1": 0.9,
                "b2": 0.999,
                "epsilon": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "moments": "float32",  # or "bfloat16", half the memory, see training/rounding.py
                "frozen": "",  # a pattern of parameter paths that are not trained
                "adam_share": 0.4,  # of the learning rate, for what muon leaves to AdamW
            },
            "mesh": {
                "data": 1,
                "fsdp": -1,
                "tensor": 1,
                "split_tokens": False,  # over `tensor`, for pictures of many tokens
            },
            "log_every": 50,
            "checkpoint": {"every": 500, "keep": 2},
            "samples": {"every": 0, "prompts": 8, "teacher_steps": 50},  # 0: at the end only
            "evaluation": {
                "prompts": 600,
                "every": 0,  # steps between scores of a student under way; 0: at the end only
                "student_steps": (1, 2, 4),
                "teacher_steps": (50, 4, 2, 1),
                "guidance": 4.5,
            },
        }
    ).lock()
    config.objective.unlock()
    return config


def student(preset: str = "") -> ConfigDict:
    """What students have in common: `base` with their settings, those of the embedded teacher.

    The preset "smoke" goes through every stage of a run in a minute or two; the student learns
    nothing. A config file calls `shorten` for it, when all else is set. The preset "flux_lite" is
    `flux`. "lora" and "flux_lite_lora" train adapters beside the frozen teacher.
    """
    config = base(preset, presets=("", "smoke", "flux_lite", "lora", "flux_lite_lora"))
    if preset == "flux_lite":
        return flux(config)
    if preset == "flux_lite_lora":
        flux(config)
        config.batch_size = config.rescale.batch_size = 16
        config.accumulate = 4
        config.rescale.total_steps = 0  # the time embedder is refitted, and that is all
        config.optimizer.learning_rate = 1e-4
        config.optimizer.frozen = "time_embedder|guidance_embedder"
        config.lora.rank = 64
        config.lora.alpha = 64.0
        config.lora.base = "int8"
        return config
    config.batch_size = 64
    config.ema_decay = 0.99
    config.model = student_model()
    config.evaluation.guidance = 2.5
    config.teacher.velocity = "original"
    config.rescale.total_steps = 150
    config.rescale.batch_size = 64
    config.rescale.learning_rate = 3e-4
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.frozen = "time_embedder"  # refitted by hand; trained, students collapse
    config.data.examples = 12_800
    if preset == "lora":
        # Of the guidance embedder, whose first layer makes features, the second is trained.
        config.optimizer.frozen = "time_embedder|guidance_embedder/linear_1"
        config.rescale.learning_rate = 3e-3
        config.lora.rank = 2
        config.lora.targets = "blocks/(?!text/mlp)"
    return config


def student_model(**changes: Any) -> dict[str, Any]:
    """What a student's network changes of its teacher's; all else is the teacher's.

    A guidance factor of None is the teacher's, too, and waits for a number.
    """
    model = {"time_scale": 1.0, "guidance_embeds": True, "guidance_factor": placeholder(float)}
    return model | {"remat": "none", "attention": "auto"} | changes


def flux(config: ConfigDict) -> ConfigDict:
    """Makes `base` what runs from FLUX.1-lite-8B have in common, T2I-Distill's (arXiv:2512.13006).

    They need --config.teacher.checkpoint, a folder of jax_distill.port, and --config.data.path, one
    of jax_distill.prepare.
    """
    config.world = "flux"
    config.dtype = "bfloat16"
    config.total_steps = 20_000
    config.batch_size = 64
    config.model = student_model(remat="full")
    config.teacher.velocity = "original"
    config.rescale.total_steps = 3000
    config.rescale.batch_size = 64
    config.rescale.learning_rate = 1e-5
    config.optimizer.learning_rate = 1e-6
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 0.1
    config.optimizer.frozen = "time_embedder"  # refitted by hand; trained, students collapse
    config.samples.every = 1000
    config.samples.teacher_steps = 28
    config.evaluation.teacher_steps = (28, 4)
    return config


def shorten(config: ConfigDict) -> None:
    """Makes a student's run a smoke test."""
    config.total_steps = config.rescale.total_steps = 4
    config.batch_size = config.rescale.batch_size = 16
    config.log_every = 2
    config.data.examples = 256
    config.samples.prompts = 2
    config.samples.teacher_steps = 4
    config.evaluation.prompts = 12
    config.evaluation.teacher_steps = (4, 2)


def save(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved configuration as `config.json` into the workdir, made if missing."""
    write_atomically(workdir / "config.json", to_json(config))


def to_json(config: ConfigDict) -> str:
    """The text of `config.json`."""
    return config.to_json_best_effort(indent=2) + "\n"


def load(workdir: Path) -> ConfigDict:
    """Reads what `save` wrote, in this version or an older one, whose keys are completed.

    Raises:
      ConfigError: it is not there, or not what it should be.
    """
    path = Path(workdir) / "config.json"
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
    """Checks that a run of adapters is not, over the runs that it stands beside, its own teacher.

    Raises:
      ConfigError: it is, or one of them is not what it should be.
    """
    passed: list[Path] = []
    folder = Path(workdir).resolve()
    while (config := load(folder)).lora.rank and config.teacher.checkpoint not in ("", "embedded"):
        passed.append(folder)
        folder = Path(config.teacher.checkpoint).resolve()
        if folder in passed:
            raise ConfigError(
                f"teacher.checkpoint: '{workdir}' stands beside '{folder}', which stands beside"
                " itself; put the config.json of one of them back"
            )


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a file, with those of keys that its version did not have.

    Raises:
      ConfigError: other keys are missing.
    """
    complete = dict(values)
    for key, default in flatten(base().to_dict()).items():
        name, _, rest = key.partition(".")
        section = complete.get(name, {})
        if name == "objective" or (rest and not isinstance(section, Mapping)):
            continue  # `check` says so
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


def check(values: Mapping[str, Any], partial: Sequence[str] = ()) -> None:
    """Checks names, types and ranges of all settings.

    Args:
      values: of a configuration, nested.
      partial: sections of which some keys may be missing.

    Raises:
      ConfigError: naming the key, its value, and what it must be.
    """
    objective = values.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(objective.get("name"), str):
        raise ConfigError(f"objective: {shown(objective)} must be a section that has a name")
    given, known = dict(values), base().to_dict()
    given.pop("objective"), known.pop("objective")
    check_keys(given, known, partial=partial)
    rules.check(flatten(given), rules.of_runs())
    check_objective(objective)


def check_objective(section: Mapping[str, Any]) -> None:
    """Checks names, types and ranges of an objective's settings.

    Raises:
      ConfigError: as `check`.
    """
    given = dict(section)
    name = given.pop("name")
    if name not in KINDS:
        raise ConfigError(f"objective.name: {shown(name)} is not one of {', '.join(KINDS)}")
    check_keys(given, settings_of(KINDS[name]), "objective.", partial=("objective",))
    rules.check(flatten({"objective": given}), rules.of_objectives())
