"""Adversarial training: losses of heads and student, the heads' penalty, f-distill's weights.

A discriminator is heads (`models/heads.py`) on the hidden tokens of a network, most often of the
frozen teacher, at noised samples. Its logits are (B, K), K outputs a sample; all losses are means
over both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_distill.flow import Text
from jax_distill.models import heads as models
from jax_distill.objectives.teacher import TeacherVelocity

GAN_LOSSES = ("softplus", "hinge")


def generator_loss(fake: jax.Array, kind: str = "softplus") -> jax.Array:
    """The student's loss by the logits of its samples: softplus(-l), or -l beside the hinge."""
    return jnp.mean(jax.nn.softplus(-fake) if kind == "softplus" else -fake)


def discriminator_loss(real: jax.Array, fake: jax.Array, kind: str = "softplus") -> jax.Array:
    """The heads' loss: mean softplus(-real) + mean softplus(fake), or the hinge.

    The latter is mean max(1 - real, 0) + mean max(1 + fake, 0); SANA-Sprint has half of it.

    Args:
      real: logits of data (B, K).
      fake: logits of samples, and of whatever else counts as fake.
      kind: one of `GAN_LOSSES`.
    """
    bend = jax.nn.softplus if kind == "softplus" else lambda x: jax.nn.relu(1 + x)
    return jnp.mean(bend(-real)) + jnp.mean(bend(fake))


def approximate_r1(real: jax.Array, perturbed: jax.Array) -> jax.Array:
    """The mean square of what a perturbation of their input changes of the logits of data.

    With a perturbation a n, n standard normal, its expectation is a^2 |grad D|^2 for small a: R1
    without a second derivative.

    Source: APT, arXiv:2501.08316.
    """
    return jnp.mean(jnp.square(real - perturbed))


def perturbed_input(
    x: jax.Array, x_t: jax.Array, noise: jax.Array, size: float, where: str = "noised"
) -> jax.Array:
    """The input of the second logits of `approximate_r1`, at the time of x_t.

    Args:
      x: data (B, ...).
      x_t: the same noised, as the first logits have it.
      noise: n, standard normal.
      size: a.
      where: "noised", x_t + a n (APT); or "clean", x + a n (FastGen, which feeds it as if it were
        noised).
    """
    return (x_t if where == "noised" else x) + size * noise


def widths(params: Mapping[str, Any]) -> tuple[int, int]:
    """Channels of the hidden tokens and of the pooled caption, of a network's parameters."""
    embedder = params["pooled_embedder"]
    return embedder["linear_2"]["bias"].shape[0], embedder["linear_1"]["kernel"].shape[0]


def teacher_logits(
    heads: dict,
    teacher: TeacherVelocity,
    frozen: dict,
    x_t: jax.Array,
    t: jax.Array,
    text: Text,
    guidance: jax.Array,
    blocks: tuple[int, ...],
) -> jax.Array:
    """Logits (B, K) by features of the frozen teacher; a gradient reaches the heads and x_t."""
    features = teacher.features(frozen, x_t, t, text, guidance, blocks=blocks)
    return models.logits(heads, features, blocks, teacher.network.grid, t, text.pooled)


# f-distill. Source: arXiv:2502.15681.

DIVERGENCES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "js": lambda r: 1 - 1 / (1 + r),
    "reverse_kl": jnp.ones_like,
    "forward_kl": lambda r: r,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "squared_hellinger": jnp.sqrt,
    "jeffreys": lambda r: 1 + r,
}
"""h(r) = r^2 f''(r), up to a factor, of the density ratio r = real / fake, by the divergence."""


def density_ratio(logits: jax.Array, low: float = 0.1, high: float = 20.0) -> jax.Array:
    """r = exp(l) (B,), l within [-10, 10] the mean logit (B, K) of a sample; r within [low, high].

    For heads that are trained by softplus, whose best logit is the log of the density ratio.
    """
    mean = jnp.mean(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)
    return jnp.clip(jnp.exp(jnp.clip(mean, -10, 10)), low, high)


def over_mean_of_bin(
    ratio: jax.Array, t: jax.Array, bins: int = 10, time_min: float = 0.0, time_max: float = 0.999
) -> jax.Array:
    """Each ratio (B,) divided by the mean of those in the same of `bins` equal bins of t (B,).

    The mean is this batch's: that is FastGen's running mean at its default rate, 0, and needs no
    state. With gradient accumulation it is the micro-batch's.
    """
    place = jnp.floor((t - time_min) / ((time_max - time_min) / bins)).astype(jnp.int32)
    place = jnp.clip(place, 0, bins - 1)
    member = jax.nn.one_hot(place, bins, dtype=ratio.dtype)
    means = jnp.sum(ratio[:, None] * member, 0) / (jnp.sum(member, 0) + 1e-6)
    return ratio / (means[place] + 1e-6)


def divergence_weights(
    logits: jax.Array,
    t: jax.Array,
    divergence: str = "js",
    *,
    low: float = 0.1,
    high: float = 20.0,
    bins: int = 10,
    time_min: float = 0.0,
    time_max: float = 0.999,
) -> jax.Array:
    """f-distill's weights (B,) of the samples' score differences: h(r) / (mean h + 1e-6).

    Args:
      logits: of the student's noised samples (B, K).
      t: their times (B,).
      divergence: a key of `DIVERGENCES`.
      low, high: see `density_ratio`.
      bins: of time, see `over_mean_of_bin`; 0 leaves ratios as they are.
      time_min, time_max: where the first bin begins and the last one ends, in FastGen those of the
        noise schedule, wherever the times are drawn.

    Returns:
      Weights without gradient, whose mean is 1.
    """
    ratio = density_ratio(logits, low, high)
    if bins:
        ratio = over_mean_of_bin(ratio, t, bins, time_min, time_max)
    weight = DIVERGENCES[divergence](ratio)
    return jax.lax.stop_gradient(weight / (jnp.mean(weight) + 1e-6))
