"""What an objective is: the interface between a method, the training loop and the samplers.

An objective owns what it trains and knows how it is sampled. The loop knows only that `init` makes
a tree of trainable parameters, that `draw` makes every random number of a step, and that `loss` is
a deterministic function of (parameters, frozen parameters, batch, draws, step). Samplers know only
`sample`. Adding a method is adding one file beside this one.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jax_distill.flow import Text


class Batch(NamedTuple):
    """One batch of training data."""

    x: jax.Array  # (B, N, C) packed latents; (B, H, W, 3) pictures for the autoencoder
    text: Text | None = None


class Objective(Protocol):
    """A distillation method, or any other training objective, as pure functions.

    Attributes:
      rows_per_example: how many rows of a (micro-)batch in turn are one example, each with draws of
        its own; the loader reads it once.
    """

    rows_per_example: int

    def init(self, key: jax.Array, params: dict) -> dict:
        """The tree that is trained, {"network": params} and what else the method trains."""

    def draw(self, key: jax.Array, batch: Batch) -> Any:
        """All randomness of one step, as a NamedTuple of arrays with leading axis B."""

    def loss(
        self, params: dict, frozen: dict, batch: Batch, draws: Any, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The scalar loss and what else is worth logging.

        Args:
          params: what `init` made, or its later value; differentiated.
          frozen: what no gradient reaches: "teacher", a network's parameters, "null", the `Text`
            of the empty caption with a leading axis of length one, and "average", the running
            average of `params`.
          batch: the data.
          draws: what `draw` made.
          step: steps taken so far, a scalar.
        """

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
        """Data from noise (B, N, C) in `steps` steps; guidance and key (B,), null as in `loss`."""


def check_choices(objective: Objective, choices: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError if a setting, by its name, is none of the words it may be."""
    for name, known in choices.items():
        if (value := getattr(objective, name)) not in known:
            raise ValueError(f"objective.{name}: {value!r} is not one of {', '.join(known)}")


def drop_text(text: Text, null: Text, dropped: jax.Array) -> Text:
    """Replaces the captions where `dropped` (B,) is true by the null caption."""

    def choose(full, empty):
        return jnp.where(dropped.reshape(-1, *[1] * (full.ndim - 1)), empty, full)

    return jax.tree.map(choose, text, null)
