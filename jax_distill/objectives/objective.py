"""The interface between a method, the training loop and the samplers.

A method has players: named trees of parameters, each with a loss, an optimizer and perhaps a
running average of its own. `turn` says who moves at a step, and every number that is drawn for the
step comes from `draw`, so that a loss is a deterministic function of (its player's parameters, the
other players, batch, draws, moves). How a student is sampled is data, `sampled_by`, and a
function, `motion`. Adding a method is adding one file beside this one, and a config.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, Text, per_sample
from jax_distill.objectives import settings
from jax_distill.sampling import Sampler, draw

STUDENT = "student"
"""The player that is sampled, evaluated and exported; a lone network goes by this name, too."""


class View(NamedTuple):
    """All that a loss reads beside its own player's parameters; no gradient reaches it.

    Attributes:
      frozen: "teacher", a network's parameters, and "null", the `Text` of the empty caption with a
        leading axis of length one.
      nets: every player's parameters.
      averages: the running averages of the players that keep one.
    """

    frozen: Mapping[str, Any]
    nets: Mapping[str, Any] = {}
    averages: Mapping[str, Any] = {}


Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""(own, view, batch, draws, moves) -> (scalar, what else is worth logging).

`own` is a player's tree, differentiated; `moves`, a scalar, the moves that it has made before.
"""


class Player(NamedTuple):
    """One that learns.

    Attributes:
      loss: see `Loss`.
      averaged: whether a running average is kept.
      optimizer: a name under `optimizers` in the configuration; "" for `optimizer` itself.
      follows: the share of the way to the student's network that its own goes, each time that the
        student has moved.
    """

    loss: Loss
    averaged: bool = False
    optimizer: str = ""
    follows: float = 0.0


class Method:
    """The base of distillation methods, and of all other training objectives: pure functions.

    Settings are dataclass fields and are checked. By default a student learns alone, by `loss`.

    Attributes:
      name: that `objective.name` has in a configuration.
      summary: the words of a model card.
      from_scratch: whether it learns from data alone, without a teacher.
      card_steps: sampling steps in a model card's program; 0 for those of a teacher. It may be a
        property of the settings.
      guidance_scales: those that are drawn, which the stage before learns too; () for its own.
      rows_per_example: how many rows of a (micro-)batch in turn are one example, each with draws of
        its own; the loader reads it once.
      sampled_by: how the student is drawn from. It depends on the settings alone, which are stored
        with the student; the shift of its schedule may be None for the world's.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    from_scratch: ClassVar[bool] = False
    card_steps: int = 0
    guidance_scales: tuple[float, ...] = ()
    rows_per_example = 1
    sampled_by: Sampler
    loss: Loss

    def __post_init__(self):
        settings.check(self)

    @property
    def players(self) -> Mapping[str, Player]:
        """By name, `STUDENT` among them."""
        return {STUDENT: Player(self.loss, averaged=True)}

    def init(self, key: jax.Array, params: dict) -> dict[str, Any]:
        """A tree for each player, made from a network's parameters.

        Those of networks have them as "network".
        """
        return {STUDENT: self.init_student(key, params)}

    def init_student(self, key: jax.Array, params: dict) -> dict[str, Any]:
        """The student's tree."""
        del key
        return {"network": params}

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """All randomness of one step, as a NamedTuple of arrays."""
        raise NotImplementedError

    def turn(self, step: int) -> tuple[str, ...]:
        """The players that move at a step, counted from 0, in their order.

        The later ones of a turn see what the earlier ones have become. Every distinct turn is a
        program of its own.
        """
        del step
        return (STUDENT,)

    def check_run(self, dtype: str) -> Iterable[str]:
        """Checks the settings with each other, and with the type that networks compute in.

        Returns:
          Warnings, each beginning with a setting's name.

        Raises:
          ValueError: they cannot be together.
        """
        del dtype
        return ()

    def motion(self, params: dict, null: Text | None) -> Callable[..., jax.Array]:
        """The flow map, or for `Solve` the velocity, of the student's tree, see `sampling.draw`."""
        raise NotImplementedError

    def sample(
        self,
        params: dict,
        noise: jax.Array,
        text: Text,
        null: Text,
        guidance: jax.Array,
        key: jax.Array,
        steps: int,
    ) -> jax.Array:
        """Data from noise (B, N, C), see `sampling.draw`.

        Args:
          params: the student's tree.
          noise: (B, N, C).
          text: (B, ..).
          null: with a leading axis of length one, as in `View.frozen`.
          guidance: (B,).
          key: of noise that is drawn on the way, one or (B,).
          steps: of the schedule.
        """
        return draw(self.sampled_by, self.motion(params, null), noise, text, guidance, key, steps)


def drop_text(text: Text, null: Text, dropped: jax.Array) -> Text:
    """Replaces the captions where `dropped` (B,) is true by the null caption."""

    def choose(full, empty):
        return jnp.where(dropped.reshape(-1, *[1] * (full.ndim - 1)), empty, full)

    return jax.tree.map(choose, text, null)


def first_kept_for_dropped(tree: Any, kept: jax.Array) -> Any:
    """Arrays with the first kept sample in the place of each that is not; zeros if none is.

    Args:
      tree: arrays (B, ...).
      kept: (B,) bool.
    """
    first = kept & (jnp.cumsum(kept) == 1)

    def replace(leaf):
        # As a sum, one sample is all that devices send each other.
        sample = jnp.sum(jnp.where(per_sample(first, leaf), leaf, 0), axis=0, dtype=leaf.dtype)
        return jnp.where(per_sample(kept, leaf), leaf, sample)

    return jax.tree.map(replace, tree)
