"""sCM: continuous-time consistency distillation in TrigFlow coordinates.

Source: Lu & Song, arXiv:2410.11081; in the form of SANA-Sprint, arXiv:2503.09641, and T2I-Distill,
arXiv:2512.13006, whose loss this is; the options marked rCM are those of arXiv:2510.08431.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, log_normal_angle, per_sample
from jax_distill.objectives.consistency import Consistency, SCMDraws
from jax_distill.objectives.objective import View, first_kept_for_dropped
from jax_distill.objectives.settings import Rule, choice, finite, positive, setting, steps
from jax_distill.objectives.trigflow import output_and_change
from jax_distill.sampling import Angles, Restart

BETWEEN = Rule(lambda angle: 0 < angle < math.pi / 2, "between 0 and pi / 2")


class Tangent(NamedTuple):
    """What the student says at a point, and how its data change along the teacher's path."""

    output: jax.Array  # (B, N, C): F, TrigFlow's network output
    tangent: jax.Array  # (B, N, C): g, before normalisation, no gradient


@dataclasses.dataclass(frozen=True)
class SCM(Consistency):
    """Continuous-time consistency distillation.

    With y = s_d (cos(a) x + sin(a) e) and dy/da = s_d F_teacher(y/s_d, a), the student's sample
    f = cos(a) y - sin(a) s_d F is pulled along the tangent

      g = -cos^2(a) (s_d F - dy/da) - r (cos a sin a y + s_d dF),    r = min(1, step / warmup),

    where dF = cos a sin a (dF/da along the teacher's flow); then g <- g / (|g| + c), the norm over
    a sample, and

      loss = mean( (1 / (s_d tan a)) exp(-lv) (F - sg(F) - g)^2 + lv ),

    lv a learned scalar a sample: a linear function of the network's summed embedding at a.

    Attributes, beside those of `Consistency`:
      angle_mean, angle_std: a = atan(exp(mean + std n) / s_d).
      derivative: how dF is found: "jvp", which gives F too; or rCM's finite differences, see
        `trigflow.output_and_change`: "mixed", or "difference", without forward mode.
      difference: h of those, in radians.
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

    angle_mean: float = finite(0.2)
    angle_std: float = positive(1.6)
    derivative: str = choice("jvp", "difference", "mixed")
    difference: float = positive(1e-4)
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

    def check_run(self, dtype: str) -> Iterable[str]:
        if dtype == "bfloat16" and self.derivative != "jvp" and not self.discrete_steps:
            yield (
                f"derivative: a difference over {self.difference} of numbers in bfloat16 is mostly"
                " their rounding; set objective.derivative=jvp or dtype=float32"
            )

    def init_student(self, key: jax.Array, params: dict) -> dict:
        if self.weighting == "sum" or self.discrete_steps:
            return {"network": params}
        width = params["pooled_embedder"]["linear_2"]["bias"].shape[0]
        kernel = jax.nn.initializers.xavier_uniform()(key, (width, 1), jnp.float32)
        return {"network": params, "logvar": {"kernel": kernel, "bias": jnp.zeros(1)}}

    def draw_angles(self, key: jax.Array, count: tuple[int, ...]) -> jax.Array:
        return log_normal_angle(key, count, self.angle_mean, self.angle_std, self.data_scale)

    def tangent(
        self, params: dict, view: View, batch: Batch, draws: SCMDraws, step: jax.Array
    ) -> Tangent:
        """The student's output and its un-normalised tangent."""
        sigma, angle = self.data_scale, per_sample(draws.angle, batch.x)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        y = self.point(batch, draws)
        direction = jax.lax.stop_gradient(self.guide(view, batch, draws)(y / sigma, draws.angle))
        dy = sigma * direction
        student = self.student(params, batch, draws)
        output, d_output = output_and_change(
            student, y / sigma, draws.angle, direction, self.derivative, self.difference
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
        if self.discrete_steps:
            return self.discrete_loss(params, view, batch, draws)
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
