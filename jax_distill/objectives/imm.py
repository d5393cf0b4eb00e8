"""IMM: inductive moment matching, as a distillation.

Source: Zhou, Ermon & Song, arXiv:2503.07565, in its Euler parameterisation on the linear path.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_distill.flow import (
    Batch,
    Network,
    Text,
    average_velocity_map,
    interpolate,
    path_velocity,
    straight_step,
    uniform,
)
from jax_distill.objectives.moments import TINY, laplace_kernel, moment_weight
from jax_distill.objectives.objective import STUDENT, Method, View
from jax_distill.objectives.settings import (
    Rule,
    choice,
    finite,
    not_negative,
    positive,
    scales,
    setting,
)
from jax_distill.objectives.teacher import TeacherVelocity
from jax_distill.sampling import PushForward, Restart, Shifted

GAP = Rule(lambda gap: 1 <= gap <= 20, "from 1 to 20; float32 tells no closer times")
BFLOAT16_GAP = 10
"""The largest gap for networks that compute in bfloat16, see `IMM`."""


class IMMDraws(NamedTuple):
    """Each of t, s, r and guidance is the same for the particles of a group."""

    t: jax.Array  # (B,)
    s: jax.Array  # (B,), at most r
    r: jax.Array  # (B,), at most t
    noise: jax.Array  # (B, N, C)
    guidance: jax.Array  # (B,)


@dataclasses.dataclass(frozen=True)
class IMM(Method):
    """Matches, in moments of all orders, what the student makes of x_t and of x_r, r < t, at s.

    f(x, t -> s) = x - (t - s) net(x, t, t - s). M particles, noises of one picture, share
    (s, r, t); x_r is x_t moved along the teacher's velocity, a = f(x_t, t -> s),
    b = sg f(x_r, r -> s), and

      loss = mean over groups of w(t) (mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j)),

    means over the M x M pairs, k the Laplace kernel of `laplace_kernel` with c_out = (t - s) s_x,
    s_x the latents' standard deviation, and w of `moment_weight`.

    Scale: distances in a group are about s_x sqrt(D) times the error, so that k is nearly linear,
    1 - |a - b| / (D c_out), and the loss falls as 1/sqrt(D) with the dimension D of a sample. As
    r -> t it falls with |x_r - x_t|, linear in t - r; dividing by c_out keeps it from vanishing as
    s -> t. The gradient pulls a_i towards the group's b_j and away from its own a_j.

    Attributes:
      network: the student, with a second time embedder.
      teacher: the velocity it learns from.
      particles: M; divides a (micro-)batch, of which M rows in turn are one picture.
      guidance_scales: the scales w that are drawn, uniformly, one a group.
      gap: k; r is (eta_max - eta_min) / 2^k before t in eta = t / (1 - t), or s if that is later.
        At the paper's 12 the difference of a and b is near the rounding errors of bfloat16: after
        60 steps of configs/imm.py the gradient's cosine with that in float32 was 0.88, and 0.94 at
        11, 0.96 at 10, 0.97 to 0.98 up to 9 (`benchmarks/imm_gap.py`).
      time_min, time_max: of t, uniform; sampling begins at time_max.
      data_std: s_x.
      weight_power, weight_offset: a and b of w(t).
      ddim_velocity: from x_t to x_r, "teacher", or "sample" for e - x (the paper's DDIM step).
      target_weights: of b, "current" or the running "average".
      sampler: "push_forward", or "restart" from the predicted data with fresh noise.
      time_shift: mu of the sampling schedule; 0 is uniform.
    """

    name = "imm"
    summary = "A student by IMM (inductive moment matching, arXiv:2503.07565)"
    card_steps = 4

    network: Network
    teacher: TeacherVelocity
    particles: int = positive(4, 2**20)
    guidance_scales: tuple[float, ...] = scales(4.0, 4.5, 5.0)
    gap: int = setting(12, GAP)
    time_min: float = 0.0
    time_max: float = 0.994
    data_std: float = positive(1.0)
    weight_power: float = not_negative(1.0)
    weight_offset: float = finite(4.0)
    ddim_velocity: str = choice("teacher", "sample")
    target_weights: str = choice("current", "average")
    sampler: str = choice("push_forward", "restart")
    time_shift: float = finite(0.0)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.time_min < self.time_max < 1:
            raise ValueError(
                f"objective.time_max: {self.time_max} must be above time_min {self.time_min} and"
                " below 1, where eta = t / (1 - t) is infinite"
            )

    @property
    def rows_per_example(self) -> int:
        return self.particles

    def check_run(self, dtype: str) -> Iterable[str]:
        if dtype == "bfloat16" and self.gap > BFLOAT16_GAP:
            yield (
                f"gap: {self.gap} sets the two groups so near each other that bfloat16 hides much"
                f" of their difference; set objective.gap={BFLOAT16_GAP} or less, or dtype=float32"
            )

    @property
    def sampled_by(self) -> PushForward | Restart:
        kind = Restart if self.sampler == "restart" else PushForward
        return kind(Shifted(self.time_shift, self.time_max))

    def draw(self, key: jax.Array, batch: Batch) -> IMMDraws:
        key_t, key_s, key_noise, key_guidance = jax.random.split(key, 4)
        count = len(batch.x)
        if count % self.particles:
            raise ValueError(
                f"objective.particles: groups of {self.particles} do not divide a batch of {count};"
                f" make batch_size / accumulate a multiple of {self.particles}"
            )
        groups = (count // self.particles,)
        t = uniform(key_t, groups, self.time_min, self.time_max)
        s = self.time_min + uniform(key_s, groups) * (t - self.time_min)
        scales = jnp.asarray(self.guidance_scales, jnp.float32)
        shared = (t, s, self.earlier(t, s), jax.random.choice(key_guidance, scales, groups))
        t, s, r, guidance = (jnp.repeat(value, self.particles) for value in shared)
        return IMMDraws(t, s, r, jax.random.normal(key_noise, batch.x.shape), guidance)

    def earlier(self, t: jax.Array, s: jax.Array) -> jax.Array:
        """r(s, t): a step of constant length in eta before t, but not before s."""

        def eta(t):
            return t / (1 - t)

        step = (eta(self.time_max) - eta(self.time_min)) / 2**self.gap
        r = jnp.maximum(eta(t) - step, eta(s))
        return jnp.clip(r / (1 + r), s, t)

    def groups(
        self, params: dict, view: View, batch: Batch, draws: IMMDraws
    ) -> tuple[jax.Array, jax.Array]:
        """The two groups a and b at time s, (G, M, D) each; b without gradient."""

        def first(leaf):
            return jnp.repeat(leaf[:: self.particles], self.particles, axis=0)

        x, text = first(batch.x), jax.tree.map(first, batch.text)
        x_t = interpolate(x, draws.noise, draws.t)
        if self.ddim_velocity == "teacher":
            velocity = self.teacher(view.frozen, x_t, draws.t, text, draws.guidance)
        else:
            velocity = path_velocity(x, draws.noise)
        x_r = straight_step(x_t, draws.t, draws.r, velocity)
        target = view.averages[STUDENT] if self.target_weights == "average" else params

        def jump(params, x, t):
            flow_map = average_velocity_map(self.network, params["network"])
            return flow_map(x, t, draws.s, text, draws.guidance)

        made = jump(params, x_t, draws.t), jax.lax.stop_gradient(jump(target, x_r, draws.r))
        return tuple(particles.reshape(-1, self.particles, x[0].size) for particles in made)

    def loss(
        self, params: dict, view: View, batch: Batch, draws: IMMDraws, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        a, b = self.groups(params, view, batch, draws)
        t, s = draws.t[:: self.particles], draws.s[:: self.particles]
        scale = jnp.maximum((t - s) * self.data_std, TINY)

        def mean(a, b):
            return jnp.mean(laplace_kernel(a, b, scale), (1, 2))

        discrepancy = mean(a, a) + mean(b, b) - 2 * mean(a, b)
        weight = moment_weight(t, self.weight_power, self.weight_offset)
        loss = jnp.mean(weight * discrepancy)
        return loss, {"discrepancy": jnp.mean(discrepancy)}

    def motion(self, params: dict, null: Text | None = None) -> Callable[..., jax.Array]:
        """The flow map x - (t - s) net(x, t, t - s)."""
        del null
        return average_velocity_map(self.network, params["network"])
