"""From a configuration to its parts: networks and objective."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jax_distill import streams, worlds
from jax_distill.assembly import adapters
from jax_distill.assembly.frozen import frozen_network
from jax_distill.config import ConfigError
from jax_distill.config.rules import MOST_PIXELS, PATCH
from jax_distill.flow import Batch, Network, Text
from jax_distill.models import mmdit
from jax_distill.objectives.methods import KINDS, OBJECTIVES
from jax_distill.objectives.objective import Method, View
from jax_distill.objectives.settings import settings_of
from jax_distill.objectives.teacher import (
    TeacherVelocity,
    classifier_free,
    embedded_guidance,
    unguided,
)

TEACHERS = ("flow_matching", "time_rescale")
"""Objectives whose networks are velocities."""

GUIDANCE = {
    "auto": "",
    "embedded": "the guidance scale is an input of its network",
    "cfg": "classifier-free guidance, two evaluations of its network",
    "none": "its network takes no guidance scale, and none is applied",
}
"""What `teacher.guidance` may be, and what that means."""

_GUIDED = {"embedded": embedded_guidance, "cfg": classifier_free, "none": unguided}


def network_config(config: ConfigDict) -> mmdit.MMDiTConfig:
    try:
        return mmdit.MMDiTConfig(**config.model)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def network(config: ConfigDict, resolution: tuple[int, int] | None = None) -> Network:
    """The pure functions of the network that `config.model` describes.

    Args:
      config: of the run.
      resolution: height and width of the pictures in pixels; the world's by default.
    """
    grid = token_grid(resolution or worlds.of(config).resolution)
    return mmdit.as_network(network_config(config), dtype=config.dtype, grid=grid)


def initial_parameters(config: ConfigDict) -> dict:
    """Fresh parameters of the network, from the seed."""
    with streams.default_settings():
        return mmdit.initial_parameters(network_config(config), nnx.Rngs(streams.key(config.seed)))


def objective(
    config: ConfigDict,
    teacher: ConfigDict | None = None,
    *,
    resolution: tuple[int, int] | None = None,
) -> Method:
    """The objective that `config.objective` names.

    Args:
      config: of the run.
      teacher: configuration of the teacher; without one the objective can only be sampled. With
        one, and `config.lora.rank`, it trains adapters.
      resolution: height and width of the pictures in pixels; the world's by default.

    Raises:
      ConfigError: unknown name, or a value that the objective refuses.
    """
    settings = dict(config.objective)
    name = settings.pop("name")
    if name not in OBJECTIVES:
        raise ConfigError(f"objective.name: {name!r} is not one of {', '.join(OBJECTIVES)}")
    world, kind = worlds.of(config), OBJECTIVES[name]
    resolution = resolution or world.resolution
    made, velocity = network(config, resolution), None
    if kind.from_scratch:
        velocity = guided(config)(made)
    elif teacher is not None:
        velocity = teacher_velocity(teacher, resolution)
    if follows_world(config):
        settings["time_shift"] = world.time_shift(token_shape(config, resolution)[0])
    method = kind(made, velocity, **settings)
    beside = adapters.settings(config)
    if teacher is None or beside is None:
        return method
    return adapters.AdapterObjective(method, beside)


def objectives(
    config: ConfigDict,
    teacher: ConfigDict | None,
    resolutions: Sequence[tuple[int, int] | None],
) -> list[Method]:
    """The objective for each size of pictures, with its own tokens, places and time shift.

    Args:
      config: of the run.
      teacher: as in `objective`.
      resolutions: heights and widths in pixels; None for the world's.
    """
    return [objective(config, teacher, resolution=resolution) for resolution in resolutions]


def follows_world(config: ConfigDict) -> bool:
    """Whether the shift of the sampling schedule is the world's: `objective.time_shift` is None."""
    settings = {**settings_of(OBJECTIVES[config.objective.name]), **dict(config.objective)}
    return settings.get("time_shift", 0.0) is None


def without_networks(config: ConfigDict) -> Method:
    """The objective of a configuration, to be asked for its settings and players alone.

    Raises:
      ValueError: a setting that the objective refuses.
    """
    settings = dict(config.objective)
    kind = KINDS[settings.pop("name")]
    known = settings_of(kind)
    needed = {field.name: None for field in dataclasses.fields(kind) if field.name not in known}
    return kind(**needed, **settings)


def objective_settings(name: str, **settings: Any) -> dict[str, Any]:
    """Makes `config.objective`: an objective's defaults, and what is set otherwise.

    With all of them there, the command line can change each; a default of None waits for a number.
    """
    defaults = settings_of(OBJECTIVES[name])
    waiting = {key: placeholder(float) for key, value in defaults.items() if value is None}
    return {"name": name, **defaults, **waiting, **settings}


def guidance_of(config: ConfigDict) -> str:
    """How the velocity network of a configuration is guided: "embedded", "cfg" or "none".

    `teacher.guidance` of a network from scratch or a ported one says so; where it is "auto", the
    network's own input of the scale, if it has one, and else the world's custom.

    Raises:
      ConfigError: the network has no such input, or has one that would be left open.
    """
    embeds = config.model.guidance_embeds
    asked = "auto"
    if config.objective.name == "flow_matching":
        asked = config.teacher.get("guidance", "auto")  # the first versions had no such key
    if asked == "auto":
        return "embedded" if embeds else worlds.of(config).plain_guidance
    check_guidance(asked, embeds)
    return asked


def check_guidance(asked: str, embeds: bool) -> None:
    """Raises ConfigError when a network cannot be guided as `teacher.guidance` asks.

    Args:
      asked: "embedded", "cfg" or "none".
      embeds: whether the network takes the scale as an input.
    """
    if embeds != (asked == "embedded"):
        has = "has an input for the guidance scale" if embeds else "has no guidance embedder"
        fix = "embedded" if embeds else "cfg or none"
        raise ConfigError(
            f"teacher.guidance: {asked!r}, but the teacher's network {has}; set it to {fix}"
        )


def guided(config: ConfigDict) -> Callable[[Network], TeacherVelocity]:
    """How the velocity network of a configuration takes guidance."""
    return _GUIDED[guidance_of(config)]


def needs_null(config: ConfigDict) -> bool:
    """Whether drawing with a configuration's network takes the empty caption."""
    return config.objective.name == "flow_matching" and guidance_of(config) == "cfg"


def role(config: ConfigDict) -> str:
    """What a configuration's network is: a "teacher" or a "student"."""
    return "teacher" if config.objective.name in TEACHERS else "student"


def takes_guidance(config: ConfigDict) -> bool:
    """Whether a guidance scale changes what a configuration's network draws."""
    return config.model.guidance_embeds or needs_null(config)


def teacher_velocity(
    teacher: ConfigDict, resolution: tuple[int, int] | None = None
) -> TeacherVelocity:
    """The teacher's velocity, at a height and width in pixels; its world's by default."""
    return guided(teacher)(network(teacher, resolution))


def abstract_losses(
    config: ConfigDict,
    teacher: ConfigDict | None = None,
    moves: int = 0,
    *,
    resolution: tuple[int, int] | None = None,
) -> Iterator[tuple[str, Callable, tuple]]:
    """The loss of each player for one micro-batch, and the shapes of its arguments, to be traced.

    Args:
      config: of the run.
      teacher: configuration of the network whose velocity is learned, if there is one.
      moves: that the player has made before, a constant in the function.
      resolution: height and width of the pictures in pixels; the world's by default.

    Yields:
      (player, function, arguments); the function takes (own, view, batch, key) and returns a
      scalar.
    """
    method = objective(config, teacher, resolution=resolution)
    size = config.batch_size // config.accumulate

    def arguments():
        key = streams.key(config.seed)
        trees = method.init(key, initial_parameters(config))
        null, text = (text_like(config, count) for count in (1, size))
        frozen = {"null": null}
        if teacher is not None:
            frozen["teacher"] = frozen_network(config, initial_parameters(teacher))
        batch = Batch(jnp.zeros((size, *token_shape(config, resolution))), text)
        averaged = {name: trees[name] for name, x in method.players.items() if x.averaged}
        return trees, View(frozen, trees, averaged), batch, key

    trees, *others = jax.eval_shape(arguments)
    for name, player in method.players.items():

        def loss(own, view, batch, key, player=player):
            draws = method.draw(key, batch)
            return player.loss(own, view, batch, draws, np.int32(moves))[0]

        yield name, loss, (trees[name], *others)


def text_like(config: ConfigDict, count: int) -> Text:
    """Embedded captions, all zeros: (count, ..) of the shapes that the network takes."""
    model = config.model
    return Text(
        jnp.zeros((count, config.data.text_length, model.joint_attention_dim)),
        jnp.zeros((count, model.pooled_projection_dim)),
    )


def token_grid(resolution: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens of a picture.

    Raises:
      ValueError: the height or the width is no multiple of 16 pixels, or more than `MOST_PIXELS`.
    """
    for name, size in zip(("height", "width"), resolution):
        if size < 1 or size % PATCH:
            raise ValueError(f"{name}: {size} is no multiple of {PATCH} pixels")
        if size > MOST_PIXELS:
            raise ValueError(f"{name}: {size} is more than the {MOST_PIXELS} pixels that are drawn")
    return resolution[0] // PATCH, resolution[1] // PATCH


def token_shape(config: ConfigDict, resolution: tuple[int, int] | None = None) -> tuple[int, int]:
    """Tokens and channels of one packed picture; of the world's height and width by default."""
    rows, columns = token_grid(resolution or worlds.of(config).resolution)
    return rows * columns, config.model.in_channels


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
