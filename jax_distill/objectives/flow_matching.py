"""Flow matching: how the teacher is made, and the base of every distillation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import Batch, Network, Text, interpolate, logit_normal, path_velocity
from jax_distill.objectives.objective import Method, View, drop_text
from jax_distill.objectives.settings import choice, finite, positive, share
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import SOLVERS, Shifted, Solve


class FlowMatchingDraws(NamedTuple):
    t: jax.Array  # (B,)
    noise: jax.Array  # (B, N, C)
    dropped: jax.Array  # (B,) bool: caption replaced by the null caption


@dataclasses.dataclass(frozen=True)
class FlowMatching(Method):
    """Conditional flow matching, `mean |net(x_t, t, c) - (e - x)|^2`, with caption dropout.

    Source: Lipman et al., arXiv:2210.02747; logit-normal times: Esser et al., arXiv:2403.03206.

    Attributes:
      network: the velocity network.
      teacher: its velocity as the sampler follows it, under guidance.
      time_mean: of the logit-normal times.
      time_std: of the logit-normal times.
      drop_rate: share of captions replaced by the null caption, for classifier-free guidance.
      solver: of the sampler, one of `sampling.SOLVERS`.
      time_shift: mu of the sampling schedule (`flow.shift_time`); None: the world's, or uniform.
    """

    name = "flow_matching"
    summary = "A teacher, made by flow matching"
    from_scratch = True

    network: Network
    teacher: TeacherVelocity
    time_mean: float = finite(0.0)
    time_std: float = positive(1.0)
    drop_rate: float = share(0.1)
    solver: str = choice(*SOLVERS)
    time_shift: float | None = finite(None)

    @property
    def sampled_by(self) -> Solve:
        return Solve(Shifted(self.time_shift or 0.0), self.solver)

    def draw(self, key: jax.Array, batch: Batch) -> FlowMatchingDraws:
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        return FlowMatchingDraws(
            logit_normal(key_t, count, self.time_mean, self.time_std),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.bernoulli(key_drop, self.drop_rate, count),
        )

    def loss(
        self, params: dict, view: View, batch: Batch, draws: FlowMatchingDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        text = drop_text(batch.text, view.frozen["null"], draws.dropped)
        x_t = interpolate(batch.x, draws.noise, draws.t)
        velocity = self.network.velocity(params["network"], x_t, draws.t, text)
        error = velocity - path_velocity(batch.x, draws.noise)
        return jnp.mean(jnp.square(error)), {}

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The guided velocity."""
        return functools.partial(self.teacher, {"teacher": params["network"], "null": null})
