"""Paths, coordinates, time distributions, and a Gaussian whose flow is known exactly.

Conventions, here and everywhere: time t is in [0, 1], 0 is data and 1 is noise;
``x_t = (1 - t) x + t e`` and ``v = dx_t/dt = e - x``. Samples are (B, N, C), times (B,) or scalar.
Nothing casts: functions compute in the precision of their arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Text(NamedTuple):
    """A batch of embedded captions, the pair that FLUX is conditioned on."""

    sequence: jax.Array  # (B, L, D), one vector a token (T5)
    pooled: jax.Array  # (B, P), one vector a caption (CLIP)


class Batch(NamedTuple):
    """One batch of training data."""

    x: jax.Array  # (B, N, C) packed latents; (B, H, W, 3) pictures for the autoencoder
    text: Text | None = None


class Network(NamedTuple):
    """A raw velocity network as pure functions of a parameter tree.

    Attributes:
      velocity: ``(params, x, t, text, guidance=None, interval=None) -> (B, N, C)``; x (B, N, C),
        t (B,), guidance (B,) the embedded scale, interval (B,) ``h = t - s`` for networks that
        learn an average velocity.
      embedding: ``(params, t, text, guidance=None) -> (B, hidden)``, the summed time, guidance and
        pooled-text embedding that modulates the blocks.
      features: ``(params, x, t, text, guidance=None, interval=None, *, blocks,
        with_velocity=False)`` -> a tuple of hidden image tokens (B, N, hidden), one for each of
        ``blocks``, in their order and in the type of the computation. Number i is block i's output;
        double-stream blocks are numbered first, from 0, then single-stream blocks. Only the blocks
        up to the last chosen one are computed. With ``with_velocity``, ``(velocity, features)``
        from one pass. None for a network without blocks.
      grid: rows and columns of its tokens, row-major; None where they are not fixed.
    """

    velocity: Callable[..., jax.Array]
    embedding: Callable[..., jax.Array]
    features: Callable[..., Any] | None = None
    grid: tuple[int, int] | None = None


def per_sample(value: ArrayLike, x: jax.Array) -> jax.Array:
    """Reshapes one value per sample so that it broadcasts against the samples.

    Args:
      value: (B,) or scalar; in general, leading axes of x.
      x: (B, ...).

    Returns:
      value with trailing axes of length one, x.ndim axes in all (a scalar stays a scalar).

    Raises:
      ValueError: value's shape is not the beginning of x's.
    """
    value = jnp.asarray(value)
    if value.shape != x.shape[: value.ndim]:
        raise ValueError(
            f"one value a sample is needed: got shape {value.shape} for samples of shape "
            f"{x.shape}; pass a scalar or shape {x.shape[:1]}"
        )
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


# The linear path.


def interpolate(x: jax.Array, noise: jax.Array, t: ArrayLike) -> jax.Array:
    """The point ``x_t = (1 - t) x + t e`` between data x and noise e (B, ...), at time t (B,).

    Source: Flow Matching (arXiv:2210.02747), Rectified Flow (arXiv:2209.03003).
    """
    t = per_sample(t, x)
    return (1 - t) * x + t * noise


def path_velocity(x: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity ``dx_t/dt = e - x`` of the linear path between data x and noise e."""
    return noise - x


def straight_step(x: jax.Array, t: ArrayLike, s: ArrayLike, velocity: jax.Array) -> jax.Array:
    """Moves x (B, ...) from time t to time s along a constant velocity, ``x - (t - s) v``.

    With an instantaneous velocity this is Euler's step, and s = 0 gives the predicted data; with
    the average velocity u(x, t, t - s) it is the flow map of MeanFlow (arXiv:2505.13447, eq. 12)
    and of IMM's Euler parameterisation (arXiv:2503.07565).
    """
    return x - per_sample(jnp.asarray(t) - s, x) * velocity


def velocity_map(network: Network, params: dict) -> Callable[..., jax.Array]:
    """The map x - (t - s) net(x, t): to data for s = 0, Euler's step for others.

    Returns:
      ``(x, t, s, text, guidance) -> x_s``; x (B, ...), t and s (B,).
    """

    def jump(x, t, s, text=None, guidance=None):
        return straight_step(x, t, s, network.velocity(params, x, t, text, guidance))

    return jump


def average_velocity_map(network: Network, params: dict) -> Callable[..., jax.Array]:
    """The flow map X(x, t -> s) = x - (t - s) net(x, t, t - s) of a network of average velocities.

    Returns:
      ``(x, t, s, text, guidance) -> x_s``; x (B, ...), t and s (B,).
    """

    def jump(x, t, s, text=None, guidance=None):
        return straight_step(x, t, s, network.velocity(params, x, t, text, guidance, t - s))

    return jump


def guided_velocity(conditional: jax.Array, null: jax.Array, scale: ArrayLike) -> jax.Array:
    """Classifier-free guidance ``v_null + w (v_c - v_null)``; w (B,) or scalar, 1 is no guidance.

    Source: arXiv:2207.12598, in the convention of diffusers and FLUX.
    """
    return null + per_sample(scale, null) * (conditional - null)


# TrigFlow: y = s_d (cos(a) x + sin(a) e), with the angle a in [0, pi/2] and the data scale s_d.
# Source: sCM (arXiv:2410.11081), section 3; from and to linear: SANA-Sprint (arXiv:2503.09641).


def _radius(t: ArrayLike) -> jax.Array:
    """The length of the path's coefficients, ``rho = |(1-t, t)| = 1 / (sin a + cos a)``."""
    t = jnp.asarray(t)
    return jnp.sqrt(t**2 + (1 - t) ** 2)


def trig_to_linear_time(angle: ArrayLike) -> jax.Array:
    """The time ``t = sin a / (sin a + cos a)`` in [0, 1] with the signal-to-noise ratio of a."""
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return sin / (sin + cos)


def linear_to_trig_time(t: ArrayLike) -> jax.Array:
    """The angle ``a = atan(t / (1 - t))`` in [0, pi/2] with the signal-to-noise ratio of t."""
    t = jnp.asarray(t)
    return jnp.arctan2(t, 1 - t)


def trig_to_linear(y: jax.Array, angle: ArrayLike, data_scale: float) -> jax.Array:
    """The point ``x_t = (y / s_d) rho`` of the linear path that y (B, ...) is at angle (B,).

    With data_scale=1, y is taken to be divided by the data scale already, as networks see it.
    """
    return y / data_scale * per_sample(_radius(trig_to_linear_time(angle)), y)


def linear_to_trig(x_t: jax.Array, t: ArrayLike, data_scale: float) -> jax.Array:
    """The inverse of `trig_to_linear`: ``y = s_d x_t / rho`` for x_t (B, ...) at time t (B,)."""
    return data_scale * x_t / per_sample(_radius(t), x_t)


def trig_velocity(x_t: jax.Array, t: ArrayLike, velocity: jax.Array) -> jax.Array:
    """TrigFlow's ``F = (dy/da) / s_d = ((1 - 2t) x_t + rho^2 v) / rho`` from the linear velocity.

    Args:
      x_t: (B, ...), the point in linear coordinates.
      t: (B,), its linear time.
      velocity: (B, ...), ``dx_t/dt`` there.

    Returns:
      (B, ...), the derivative of ``y / s_d`` by the angle; it does not depend on the data scale.
    """
    t = per_sample(t, x_t)
    radius = _radius(t)
    return (1 - 2 * t) / radius * x_t + radius * velocity


def velocity_from_trig(x_t: jax.Array, t: ArrayLike, trig: jax.Array) -> jax.Array:
    """The inverse of `trig_velocity`: ``v = (rho F - (1 - 2t) x_t) / rho^2``, F given as trig."""
    t = per_sample(t, x_t)
    radius = _radius(t)
    return (trig - (1 - 2 * t) / radius * x_t) / radius


# Distributions of training times. Each draws an array of the given shape from a key.


def uniform(
    key: jax.Array, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> jax.Array:
    """Times uniform in [low, high)."""
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def logit_normal(
    key: jax.Array, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """Times ``sigmoid(mean + std n)``, n ~ N(0, 1) (arXiv:2403.03206, eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def sorted_logit_normal(
    key: jax.Array,
    shape: tuple[int, ...],
    mean: float = -0.4,
    std: float = 1.0,
    equal_share: float = 0.25,
) -> tuple[jax.Array, jax.Array]:
    """MeanFlow's pair of times r <= t: two logit-normal draws, sorted.

    Args:
      key: random key.
      shape: of each of the two.
      mean: of the draws, before the sigmoid.
      std: of the draws, before the sigmoid.
      equal_share: probability that r is set to t.

    Returns:
      (t, r), the later first.

    Source: arXiv:2505.13447, section 4.3.
    """
    key_pair, key_equal = jax.random.split(key)
    first, second = logit_normal(key_pair, (2, *shape), mean, std)
    t, r = jnp.maximum(first, second), jnp.minimum(first, second)
    return t, jnp.where(jax.random.bernoulli(key_equal, equal_share, shape), t, r)


def log_normal_angle(
    key: jax.Array,
    shape: tuple[int, ...],
    mean: float = 0.2,
    std: float = 1.6,
    data_scale: float = 0.5,
) -> jax.Array:
    """sCM's angles ``atan(exp(mean + std n) / s_d)`` in (0, pi/2), n ~ N(0, 1).

    Source: arXiv:2410.11081, algorithm 1; the defaults are those of T2I-Distill (arXiv:2512.13006).
    """
    return jnp.arctan(jnp.exp(mean + std * jax.random.normal(key, shape)) / data_scale)


# FLUX's schedule: with more tokens, more of the steps are near noise.


def flux_shift(
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> float:
    """The shift mu of FLUX's schedule, linear in the number of image tokens.

    Args:
      tokens: image tokens: (height / 16) (width / 16) for FLUX.
      base_shift: mu at base_tokens.
      max_shift: mu at max_tokens; 1.15 in FLUX's code and in diffusers; T2I-Distill uses 1.16.
      base_tokens: see base_shift.
      max_tokens: see max_shift.

    Returns:
      mu, also beyond the two ends (it is not clipped).

    Source: `get_lin_function` of github.com/black-forest-labs/flux, `calculate_shift` of diffusers.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (tokens - base_tokens)


def shift_time(t: ArrayLike, mu: float) -> jax.Array:
    """``e^mu / (e^mu + 1/t - 1)``: adds mu to the logit of t, and keeps 0 and 1.

    Source: arXiv:2403.03206, eq. 23, with e^mu for the ratio of resolutions, as FLUX has it.
    """
    t = jnp.asarray(t)
    shifted = jnp.exp(mu) * t
    return shifted / (shifted + (1 - t))


# The oracle.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussianOracle:
    """Data ~ N(mean, std^2), independent in each coordinate: all of its flow in closed form.

    A pytree, and the parameter tree of its own networks, so that losses can be differentiated with
    respect to its mean and std: ``oracle.network().velocity(oracle, x, t, text)``.

    Attributes:
      mean: scalar, or anything that broadcasts against one sample, such as (C,).
      std: likewise, positive.
    """

    mean: ArrayLike
    std: ArrayLike

    def marginal(self, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Mean ``(1-t) m`` and standard deviation ``sqrt((1-t)^2 S^2 + t^2)`` of x_t.

        t broadcasts against mean and std; for times (B,) and samples (B, N, C) pass
        ``per_sample(t, x)``.
        """
        t = jnp.asarray(t)
        return (1 - t) * self.mean, jnp.sqrt(((1 - t) * self.std) ** 2 + t**2)

    def velocity(self, x: jax.Array, t: ArrayLike) -> jax.Array:
        """Marginal velocity ``E[e - x_0 | x_t = x]`` for x (B, ...) and t (B,)."""
        return self.average_velocity(x, t, t)

    def average_velocity(self, x: jax.Array, t: ArrayLike, s: ArrayLike) -> jax.Array:
        """``(x - X(x, t -> s)) / (t - s)``, written without the division: s = t is the velocity.

        With S_t the marginal's standard deviation,
        ``u = -m + (t + s - S^2 (2 - t - s)) / (S_t (S_t + S_s)) (x - m_t)``.
        """
        t, s = per_sample(t, x), per_sample(s, x)
        mean_t, std_t = self.marginal(t)
        _, std_s = self.marginal(s)
        slope = (t + s - self.std**2 * (2 - t - s)) / (std_t * (std_t + std_s))
        return slope * (x - mean_t) - self.mean

    def flow_map(self, x: jax.Array, t: ArrayLike, s: ArrayLike) -> jax.Array:
        """The point at time s (B,) on the flow through x (B, ...) at time t (B,).

        ``m_s + (S_s / S_t) (x - m_t)``, in the notation of `average_velocity`.
        """
        mean_t, std_t = self.marginal(per_sample(t, x))
        mean_s, std_s = self.marginal(per_sample(s, x))
        return mean_s + std_s / std_t * (x - mean_t)

    @staticmethod
    def network() -> Network:
        """The oracle as a network: the teacher, and the exact student of MeanFlow and of IMM.

        Without an interval it gives the velocity; with one, the average velocity over
        [t - interval, t]. Its parameters are an oracle; text and guidance are ignored.
        """

        def velocity(oracle, x, t, text=None, guidance=None, interval=None):
            s = t if interval is None else t - interval
            return oracle.average_velocity(x, t, s)

        return Network(velocity, _oracle_embedding)

    @staticmethod
    def consistency_network() -> Network:
        """The exact student of sCM as a network: ``x - t net(x, t)`` is the flow map to time 0."""

        def velocity(oracle, x, t, text=None, guidance=None, interval=None):
            return oracle.average_velocity(x, t, jnp.zeros_like(t))

        return Network(velocity, _oracle_embedding)


def _oracle_embedding(oracle, t, text=None, guidance=None):
    return t[:, None]
