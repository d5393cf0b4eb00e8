"""Flow matching: how the teacher is made, and the base of every distillation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill import sampling
from jax_distill.flow import Network, interpolate, logit_normal, path_velocity, shift_time
from jax_distill.objectives.objective import Batch, drop_text
from jax_distill.objectives.teacher import TeacherVelocity


class FlowMatchingDraws(NamedTuple):
    t: jax.Array  # (B,)
    noise: jax.Array  # (B, N, C)
    dropped: jax.Array  # (B,) bool: caption replaced by the null caption


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Conditional flow matching, `mean |net(x_t, t, c) - (e - x)|^2`, with caption dropout.

    Source: Lipman et al., arXiv:2210.02747; logit-normal times: Esser et al., arXiv:2403.03206.

    Attributes:
      network: the velocity network.
      guided: how the sampler follows it under guidance, such as `teacher.classifier_free`.
      time_mean: of the logit-normal times.
      time_std: of the logit-normal times.
      drop_rate: share of captions replaced by the null caption, for classifier-free guidance.
      solver: of the sampler, one of `sampling.SOLVERS`.
      time_shift: mu of the sampling schedule (`flow.shift_time`); None: the world's, or uniform.
    """

    rows_per_example = 1

    network: Network
    guided: Callable[[Network], TeacherVelocity]
    time_mean: float = 0.0
    time_std: float = 1.0
    drop_rate: float = 0.1
    solver: str = "euler"
    time_shift: float | None = None

    def __post_init__(self):
        if self.time_shift is None:
            object.__setattr__(self, "time_shift", 0.0)

    def init(self, key: jax.Array, params: dict) -> dict:
        del key
        return {"network": params}

    def draw(self, key: jax.Array, batch: Batch) -> FlowMatchingDraws:
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        count = batch.x.shape[:1]
        return FlowMatchingDraws(
            logit_normal(key_t, count, self.time_mean, self.time_std),
            jax.random.normal(key_noise, batch.x.shape),
            jax.random.bernoulli(key_drop, self.drop_rate, count),
        )

    def loss(
        self, params: dict, frozen: dict, batch: Batch, draws: FlowMatchingDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        text = drop_text(batch.text, frozen["null"], draws.dropped)
        x_t = interpolate(batch.x, draws.noise, draws.t)
        velocity = self.network.velocity(params["network"], x_t, draws.t, text)
        error = velocity - path_velocity(batch.x, draws.noise)
        return jnp.mean(jnp.square(error)), {}

    def sample(self, params, noise, text, null, guidance, key, steps):
        """Integrates the guided velocity."""
        del key
        frozen = {"teacher": params["network"], "null": null}
        velocity = functools.partial(self.guided(self.network), frozen)
        times = shift_time(sampling.uniform_times(steps), self.time_shift)
        return sampling.solve(
            velocity, noise, times, text, guidance, solver=sampling.SOLVERS[self.solver]
        )
