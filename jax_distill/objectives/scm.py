"""sCM: continuous-time consistency distillation in TrigFlow coordinates.

Source: Lu & Song, arXiv:2410.11081; in the form of SANA-Sprint, arXiv:2503.09641, and T2I-Distill,
arXiv:2512.13006, whose loss this is; the options marked rCM are those of arXiv:2510.08431.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import (
    Batch,
    Network,
    Text,
    log_normal_angle,
    per_sample,
    straight_step,
    trig_to_linear,
    trig_to_linear_time,
    trig_velocity,
)
from jax_distill.objectives.objective import Method, View
from jax_distill.objectives.settings import Rule, choice, finite, positive, scales, setting, steps
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import Angles, Restart

BETWEEN = Rule(lambda angle: 0 < angle < math.pi / 2, "between 0 and pi / 2")


class SCMDraws(NamedTuple):
    angle: jax.Array  # (B,), in (0, pi/2)
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)


class Tangent(NamedTuple):
    """The result of one forward-mode pass through the student."""

    output: jax.Array  # (B, N, C): F, TrigFlow's network output
    tangent: jax.Array  # (B, N, C): g, before normalisation, no gradient


def trig_output(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array, angle: jax.Array
) -> jax.Array:
    """TrigFlow's F of a velocity function (x_t, t), at z = y / s_d (B, N, C) and angle (B,)."""
    t, x_t = trig_to_linear_time(angle), trig_to_linear(z, angle, 1.0)
    return trig_velocity(x_t, t, velocity(x_t, t))


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


@dataclasses.dataclass(frozen=True)
class SCM(Method):
    """Continuous-time consistency distillation.

    With y = s_d (cos(a) x + sin(a) e) and dy/da = s_d F_teacher(y/s_d, a), the student's sample
    f = cos(a) y - sin(a) s_d F is pulled along the tangent

      g = -cos^2(a) (s_d F - dy/da) - r (cos a sin a y + s_d dF),    r = min(1, step / warmup),

    where dF = cos a sin a (dF/da along the teacher's flow) comes, with F, from one jvp; then
    g <- g / (|g| + c), the norm over a sample, and

      loss = mean( (1 / (s_d tan a)) exp(-lv) (F - sg(F) - g)^2 + lv ),

    lv a learned scalar a sample: a linear function of the network's summed embedding at a.

    Attributes:
      network: the student.
      teacher: the velocity it learns from.
      data_scale: s_d.
      angle_mean, angle_std: a = atan(exp(mean + std n) / s_d).
      guidance_scales: the scales w that are drawn, uniformly.
      tangent_warmup: steps until the tangent's second term has full weight; 0 for none.
      warmup: "scm", as above, or "rcm": the first term is
        -cos(a) sqrt(1 - r^2 sin^2 a) (s_d F - dy/da).
      normalize_tangent: False leaves g as it is.
      tangent_constant: c.
      weighting: "learned", as above, or "sum" (rCM): 100 times the sum of squares over a sample.
      drop_nonfinite: samples whose output or tangent is not finite are left out of the loss, of its
        gradient too, and counted; the loss is NaN if every sample was dropped. It costs one more
        forward of the student: the output is made again without them, to be differentiated.
      middle_angle: of the sampler's two-step schedule.
    """

    name = "scm"
    summary = "A student by sCM (continuous-time consistency distillation, arXiv:2410.11081)"
    card_steps = 2

    network: Network
    teacher: TeacherVelocity
    data_scale: float = positive(0.5)
    angle_mean: float = finite(0.2)
    angle_std: float = positive(1.6)
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    tangent_warmup: int = steps(4000)
    warmup: str = choice("scm", "rcm")
    normalize_tangent: bool = True
    tangent_constant: float = positive(0.1)
    weighting: str = choice("learned", "sum")
    drop_nonfinite: bool = False
    middle_angle: float = setting(1.3, BETWEEN)

    @property
    def sampled_by(self) -> Restart:
        return Restart(Angles(self.middle_angle))

    def init_student(self, key: jax.Array, params: dict) -> dict:
        if self.weighting == "sum":
            return {"network": params}
        width = params["pooled_embedder"]["linear_2"]["bias"].shape[0]
        kernel = jax.nn.initializers.xavier_uniform()(key, (width, 1), jnp.float32)
        return {"network": params, "logvar": {"kernel": kernel, "bias": jnp.zeros(1)}}

    def draw(self, key: jax.Array, batch: Batch) -> SCMDraws:
        key_angle, key_noise, key_guidance = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        return SCMDraws(
            log_normal_angle(key_angle, count, self.angle_mean, self.angle_std, self.data_scale),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.choice(key_guidance, scales, count),
        )

    def point(self, batch: Batch, draws: SCMDraws) -> jax.Array:
        """y, (B, N, C)."""
        angle = per_sample(draws.angle, batch.x)
        return self.data_scale * (jnp.cos(angle) * batch.x + jnp.sin(angle) * draws.noise)

    def student(
        self, params: dict, batch: Batch, draws: SCMDraws
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """F of the student as a function of (y / s_d, a)."""

        def velocity(x, t):
            return self.network.velocity(params["network"], x, t, batch.text, draws.guidance)

        return functools.partial(trig_output, velocity)

    def tangent(
        self, params: dict, view: View, batch: Batch, draws: SCMDraws, step: jax.Array
    ) -> Tangent:
        """The student's output and its un-normalised tangent, from one jvp."""
        sigma = self.data_scale
        angle = per_sample(draws.angle, batch.x)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        y = self.point(batch, draws)

        def teacher(x, t):
            return self.teacher(view.frozen, x, t, batch.text, draws.guidance)

        dy = sigma * jax.lax.stop_gradient(trig_output(teacher, y / sigma, draws.angle))
        speed = jnp.cos(draws.angle) * jnp.sin(draws.angle)
        output, d_output = jax.jvp(
            self.student(params, batch, draws),
            (y / sigma, draws.angle),
            (per_sample(speed, dy) * dy / sigma, speed),
        )
        fixed, d_output = jax.lax.stop_gradient((output, d_output))
        ratio = jnp.minimum(1.0, step / self.tangent_warmup) if self.tangent_warmup else 1.0
        if self.warmup == "scm":
            pull = cos**2
        else:
            pull = cos * jnp.sqrt(1 - (ratio * sin) ** 2)
        tangent = -pull * (sigma * fixed - dy) - ratio * (cos * sin * y + sigma * d_output)
        return Tangent(output, tangent)

    def loss(
        self, params: dict, view: View, batch: Batch, draws: SCMDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        # What is dropped has no part in the backward pass: there 0 times infinity is not a number.
        differentiated = jax.lax.stop_gradient(params) if self.drop_nonfinite else params
        output, tangent = self.tangent(differentiated, view, batch, draws, step)
        axes = tuple(range(1, tangent.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(tangent), axes))  # not finite where the output is not
        kept = jnp.isfinite(norm) if self.drop_nonfinite else jnp.ones_like(norm, bool)
        if self.drop_nonfinite:
            batch, draws = first_kept_for_dropped((batch, draws), kept)
            y = self.point(batch, draws)
            output = self.student(params, batch, draws)(y / self.data_scale, draws.angle)
        if self.normalize_tangent:
            tangent = tangent / per_sample(norm + self.tangent_constant, tangent)
        tangent = jnp.where(per_sample(kept, tangent), tangent, 0)
        square = jnp.square(output - jax.lax.stop_gradient(output) - tangent)
        if self.weighting == "sum":
            sample_loss = 100.0 * jnp.sum(square, axes)
        else:
            logvar = self.logvar(params, batch, draws)
            weight = 1 / (self.data_scale * jnp.tan(draws.angle))
            sample_loss = weight * jnp.exp(-logvar) * jnp.mean(square, axes) + logvar
        dropped = kept.size - jnp.sum(kept)
        metrics = {"tangent_norm": jnp.mean(norm, where=kept), "dropped_samples": dropped}
        return jnp.mean(sample_loss, where=kept), metrics

    def logvar(self, params: dict, batch: Batch, draws: SCMDraws) -> jax.Array:
        """(B,): a linear function of the network's embedding with the angle in time's place."""
        embedding = self.network.embedding(
            params["network"], draws.angle, batch.text, draws.guidance
        )
        head = params["logvar"]
        return (jnp.dot(embedding, head["kernel"], precision="highest") + head["bias"])[:, 0]

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The map to s = 0, `x - t net(x, t)`: TrigFlow's cos(a) y - sin(a) s_d F."""
        del null

        def jump(x, t, s, text, guidance):
            velocity = self.network.velocity(params["network"], x, t, text, guidance)
            return straight_step(x, t, s, velocity)

        return jump
