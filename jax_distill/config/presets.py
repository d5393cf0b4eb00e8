"""Presets: settings that several config files share."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_distill.config.defaults import MODEL, base


def student(preset: str = "", own: Sequence[str] = ()) -> ConfigDict:
    """Returns `base` with the settings that students of the embedded teacher have in common.

    The preset "smoke" goes through every stage of a run in a minute or two; the student learns
    nothing. A config file calls `shorten` for it, when all else is set. The preset "flux_lite" is
    `flux`. "lora" and "flux_lite_lora" train adapters beside the frozen teacher. A config file's
    `own` presets are its own to set.
    """
    config = base(preset, presets=("", "smoke", "flux_lite", "lora", "flux_lite_lora", *own))
    if preset == "flux_lite":
        return flux(config)
    if preset == "flux_lite_lora":
        flux(config)
        config.batch_size = config.rescale.batch_size = 16
        config.accumulate = 4
        config.rescale.total_steps = 0  # the time embedder is refitted, nothing is trained
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
    """Returns the `model` section of a student: the teacher's, but for these changes.

    Remat and attention are not taken from the teacher.
    """
    model = {"time_scale": 1.0, "guidance_embeds": True, "remat": "none", "attention": "auto"}
    return overrides(MODEL, **{**model, **changes})


def overrides(section: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns a section that changes another one, with all its keys.

    Keys without a change are None, which keeps the other section's value, and wait for a value of
    its type: a config file or the command line can set each of them.
    """
    return {key: placeholder(type(value)) for key, value in section.items()} | changes


def flux(config: ConfigDict) -> ConfigDict:
    """Gives `base` the settings of all runs from FLUX.1-lite-8B: T2I-Distill's (arXiv:2512.13006).

    Such runs need --config.teacher.checkpoint, a folder of jax_distill.port, and
    --config.data.path, a folder of jax_distill.prepare.
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


def as_teacher(config: ConfigDict) -> None:
    """Gives a student of FLUX its teacher's own inputs: it starts as the teacher, not rescaled.

    For methods that take no derivative by time. Where no adapters are trained, all else is.
    """
    config.model.time_scale = MODEL["time_scale"]
    config.rescale.total_steps = 0
    if not config.lora.rank:
        config.optimizer.frozen = ""


def shorten(config: ConfigDict) -> None:
    """Turns a student's run into a smoke test."""
    config.total_steps = config.rescale.total_steps = 4
    config.batch_size = config.rescale.batch_size = 16
    config.log_every = 2
    config.data.examples = 256
    config.samples.prompts = 2
    config.samples.teacher_steps = 4
    config.evaluation.prompts = 12
    config.evaluation.diversity_prompts, config.evaluation.diversity_pictures = 6, 2
    config.evaluation.teacher_steps = (4, 2)
