"""From a configuration to its parts: networks, objective, encoders, data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_distill import embedded
from jax_distill.config import ConfigError
from jax_distill.data import shapes
from jax_distill.data.captions import CaptionEncoder
from jax_distill.flow import Text
from jax_distill.models import mmdit
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.latents import LatentCodec
from jax_distill.objectives.flow_matching import FlowMatching
from jax_distill.objectives.imm import IMM
from jax_distill.objectives.meanflow import MeanFlow
from jax_distill.objectives.objective import Batch, Objective
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.teacher import TeacherVelocity, classifier_free, embedded_guidance
from jax_distill.objectives.time_rescale import TimeRescale

OBJECTIVES = {
    "flow_matching": FlowMatching,
    "time_rescale": TimeRescale,
    "scm": SCM,
    "meanflow": MeanFlow,
    "imm": IMM,
}

TEACHERS = ("flow_matching", "time_rescale")
"""Objectives whose networks are velocities."""


def network_config(config: ConfigDict) -> mmdit.MMDiTConfig:
    try:
        return mmdit.MMDiTConfig(**config.model)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def network(config: ConfigDict):
    """The pure functions of the network that `config.model` describes."""
    return mmdit.as_network(network_config(config), dtype=config.dtype)


def initial_parameters(config: ConfigDict) -> dict:
    """Fresh parameters of the network, from the seed."""
    return mmdit.initial_parameters(network_config(config), nnx.Rngs(config.seed))


def objective(config: ConfigDict, teacher: ConfigDict | None = None) -> Objective:
    """The objective that `config.objective` names.

    Args:
      config: of the run.
      teacher: configuration of the teacher; without one the objective can only be sampled.

    Raises:
      ConfigError: unknown name, or a value that the objective refuses.
    """
    settings = dict(config.objective)
    name = settings.pop("name")
    if name not in OBJECTIVES:
        raise ConfigError(f"objective.name: {name!r} is not one of {', '.join(OBJECTIVES)}")
    if name != "flow_matching":
        settings["teacher"] = teacher_velocity(teacher) if teacher is not None else None
    return OBJECTIVES[name](network(config), **settings)


def objective_settings(name: str, **settings: Any) -> dict[str, Any]:
    """What `config.objective` holds: an objective's defaults, and what is set otherwise.

    With all of them there, the command line can change each; a default of None waits for a number.
    """
    defaults = settings_of(OBJECTIVES[name])
    waiting = {key: placeholder(float) for key, value in defaults.items() if value is None}
    return {"name": name, **defaults, **waiting, **settings}


def settings_of(kind: type[Objective]) -> dict[str, Any]:
    """The settings of an objective and their defaults; networks and encoders are not settings."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def teacher_velocity(teacher: ConfigDict) -> TeacherVelocity:
    """The teacher's velocity, in the way its network takes guidance."""
    kind = embedded_guidance if teacher.model.guidance_embeds else classifier_free
    return kind(network(teacher))


def abstract_loss(config: ConfigDict, teacher: ConfigDict | None = None) -> tuple[Callable, tuple]:
    """The loss of one micro-batch, and the shapes of its arguments: to trace, not to run.

    Args:
      config: of the run.
      teacher: configuration of the network whose velocity is learned, if there is one.

    Returns:
      (function, arguments); the function takes (params, frozen, batch, key) and returns a scalar.
    """
    method = objective(config, teacher)
    size = config.batch_size // config.accumulate

    def arguments():
        key = jax.random.key(config.seed)
        params = method.init(key, initial_parameters(config))
        null = null_text(config)
        text = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:])), null)
        frozen = {"null": null, "average": params}
        if teacher is not None:
            frozen["teacher"] = initial_parameters(teacher)
        return params, frozen, Batch(jnp.zeros((size, *token_shape(config))), text), key

    def loss(params, frozen, batch, key):
        draws = method.draw(key, batch)
        return method.loss(params, frozen, batch, draws, jnp.zeros((), jnp.int32))[0]

    return loss, jax.eval_shape(arguments)


def caption_encoder(config: ConfigDict) -> CaptionEncoder:
    return CaptionEncoder(config.data.text_length)


def null_text(config: ConfigDict) -> Text:
    """The empty caption, with a leading axis of length one."""
    return Text(*caption_encoder(config).encode([""]))


def embedded_codec() -> LatentCodec:
    """The autoencoder that ships with the package."""
    params, description = embedded.load("autoencoder")
    return LatentCodec(AutoencoderConfig.from_dict(description), params)


def picture_size(config: ConfigDict) -> tuple[int, int]:
    """Height and width in pixels."""
    return shapes.IMAGE_SIZE, shapes.IMAGE_SIZE


def token_shape(config: ConfigDict) -> tuple[int, int]:
    """Tokens and channels of one packed picture."""
    side = shapes.IMAGE_SIZE // 16
    return side * side, config.model.in_channels


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
