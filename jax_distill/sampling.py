"""Samplers over flow maps (students), and solvers of a velocity's ODE (teachers).

Both walk a schedule: times (steps + 1,), from 1 (noise) down to 0 (data). They may be jitted; the
loop is a scan, so that fifty steps compile as one. Parameters are already bound in the callables
they take: ``flow_map(x, t, s, text, guidance) -> x_s`` and ``velocity(x, t, text, guidance) -> v``,
with times (B,).

A method names its sampler as data, `PushForward`, `Restart` or `Solve` of a schedule: `draw` draws
with it, and exports and cards read it.

A sample costs one evaluation of the network a step; with `solve` those of its `Solver`, and twice
that if the velocity is guided by two evaluations.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_distill import flow

FlowMap = Callable[..., jax.Array]
Velocity = Callable[..., jax.Array]

# Schedules: (steps + 1,) times from 1 to 0.


def uniform_times(steps: int) -> jax.Array:
    """Evenly spaced times, (steps + 1,)."""
    return jnp.linspace(1.0, 0.0, _positive(steps) + 1)


def shifted_times(
    steps: int, tokens: int, base_shift: float = 0.5, max_shift: float = 1.15
) -> jax.Array:
    """FLUX's schedule for a number of image tokens, (steps + 1,); see `flow.flux_shift`."""
    return flow.shift_time(uniform_times(steps), flow.flux_shift(tokens, base_shift, max_shift))


def consistency_angles(steps: int, middle: float = 1.3) -> jax.Array:
    """sCM's TrigFlow angles, (steps + 1,): [pi/2, middle, 0] for two steps, else evenly spaced.

    Source: SANA-Sprint (arXiv:2503.09641) and its scheduler in diffusers, which begins at 1.57080,
    a rounding of pi/2.
    """
    if steps == 2:
        return jnp.array([jnp.pi / 2, middle, 0.0])
    return jnp.linspace(jnp.pi / 2, 0.0, _positive(steps) + 1)


def consistency_times(steps: int, middle: float = 1.3) -> jax.Array:
    """The linear times of `consistency_angles`, (steps + 1,)."""
    return flow.trig_to_linear_time(consistency_angles(steps, middle)).at[0].set(1.0)


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


class Shifted(NamedTuple):
    """A schedule of even times, moved by FLUX's shift.

    Attributes:
      shift: mu of `flow.shift_time`; None for FLUX's own at the number of tokens.
      start: the first time.
    """

    shift: float | None = 0.0
    start: float = 1.0
    most_steps = math.inf

    def at(self, tokens: int) -> "Shifted":
        """The schedule for so many tokens, whose shift is a number."""
        return self if self.shift is not None else self._replace(shift=flow.flux_shift(tokens))

    def times(self, steps: int, tokens: int) -> jax.Array:
        """(steps + 1,)."""
        return self.start * flow.shift_time(uniform_times(steps), self.at(tokens).shift)


class Angles(NamedTuple):
    """The schedule of `consistency_times`.

    Attributes:
      middle: the angle between pi/2 and 0 of the two-step schedule.
    """

    middle: float = 1.3
    most_steps = math.inf

    def at(self, tokens: int) -> "Angles":
        """The schedule for so many tokens: the same for any number."""
        del tokens
        return self

    def times(self, steps: int, tokens: int) -> jax.Array:
        """(steps + 1,)."""
        del tokens
        return consistency_times(steps, self.middle)


class Listed(NamedTuple):
    """A schedule of listed times, of which a sampler of fewer steps walks the first ones, to 0.

    So a student that was trained on what its own sampler comes to at each of them meets nothing
    else, in any number of steps.

    Attributes:
      listed: times in (0, 1], decreasing; so many are the most steps.
    """

    listed: tuple[float, ...]

    @classmethod
    def of_angles(cls, angles: Iterable[float]) -> "Listed":
        """The linear times of TrigFlow's angles, in (0, pi/2], see `flow.trig_to_linear_time`."""
        return cls(tuple(math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles))

    @property
    def most_steps(self) -> int:
        return len(self.listed)

    def at(self, tokens: int) -> "Listed":
        """The schedule for so many tokens: the same for any number."""
        del tokens
        return self

    def times(self, steps: int, tokens: int) -> jax.Array:
        """(steps + 1,).

        Raises:
          ValueError: there are not so many.
        """
        del tokens
        check_steps(self, steps)
        return jnp.array([*self.listed[: _positive(steps)], 0.0])


Schedule = Shifted | Angles | Listed
"""All have `most_steps`, `at` and `times`."""


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raises ValueError when a schedule has fewer steps than are asked for."""
    if steps > schedule.most_steps:
        raise ValueError(
            f"steps: {steps} are more than the {schedule.most_steps} times that the network is"
            f" sampled at; ask for {schedule.most_steps} or fewer"
        )


class PushForward(NamedTuple):
    """Draws by ``x_s = X(x_t, t -> s)`` along a schedule."""

    schedule: Schedule


class Restart(NamedTuple):
    """Draws by a jump to data and fresh noise, ``x_s = (1 - s) X(x_t, t -> 0) + s e'``."""

    schedule: Schedule


class Solve(NamedTuple):
    """Integrates a velocity along a schedule.

    Attributes:
      schedule: the times.
      solver: a key of `SOLVERS`.
    """

    schedule: Shifted
    solver: str = "euler"


Sampler = PushForward | Restart | Solve


def draw(
    sampler: Sampler,
    motion: Callable[..., jax.Array],
    noise: jax.Array,
    text: flow.Text | None,
    guidance: jax.Array | None,
    key: jax.Array,
    steps: int,
) -> jax.Array:
    """Draws data from noise.

    Args:
      sampler: how.
      motion: a flow map (x, t, s, text, guidance); for `Solve` a velocity (x, t, text, guidance).
      noise: (B, N, C).
      text: captions (B, ..).
      guidance: (B,).
      key: of fresh noise, one or (B,).
      steps: of the schedule.

    Returns:
      (B, N, C).
    """
    times = sampler.schedule.times(steps, noise.shape[1])
    if isinstance(sampler, Solve):
        return solve(motion, noise, times, text, guidance, solver=SOLVERS[sampler.solver])
    key = key if isinstance(sampler, Restart) else None
    return sample(motion, noise, times, text, guidance, renoise_key=key)


# Students.


def sample(
    flow_map: FlowMap,
    noise: jax.Array,
    times: ArrayLike,
    text: flow.Text | None = None,
    guidance: jax.Array | None = None,
    *,
    renoise_key: jax.Array | None = None,
) -> jax.Array:
    """Draws samples with a flow map, one evaluation a step.

    Without a key, x is pushed forward along the schedule, ``x_s = X(x_t, t -> s)`` (MeanFlow, IMM).
    With one, each step jumps to data and restarts from there with fresh noise,
    ``x_s = (1 - s) X(x_t, t -> 0) + s e'`` (sCM), which asks only for the map to 0. That is
    TrigFlow's ``y = cos(a') f + sin(a') s_d e'`` in linear coordinates; the data scale cancels.
    With an exact flow map both keep the marginals, and in one step to 0 they agree.

    Args:
      flow_map: ``(x, t, s, text, guidance) -> x_s``; x (B, ...), t and s (B,).
      noise: (B, ...), the sample at times[0].
      times: (steps + 1,), strictly decreasing in [0, 1].
      text: passed to the flow map.
      guidance: (B,), passed to the flow map.
      renoise_key: key of the fresh noise, one for all or (B,), one a sample; given, it selects
        restarts.

    Returns:
      (B, ...), the sample at times[-1], in noise's dtype.

    Raises:
      ValueError: times is not such a schedule.

    Source: arXiv:2303.01469, algorithm 1 (restart); arXiv:2505.13447, eq. 12 (push-forward).
    """

    def push_forward(x, step):
        t, s, _ = step
        return flow_map(x, t, s, text, guidance)

    def restart(x, step):
        t, s, index = step
        data = flow_map(x, t, jnp.zeros_like(s), text, guidance)
        return flow.interpolate(data, _fresh_noise(renoise_key, index, x), s)

    advance = push_forward if renoise_key is None else restart
    return _walk(lambda x, step, memory: (advance(x, step), memory), noise, times, ())


def rollout(
    flow_map: FlowMap,
    noise: jax.Array,
    times: jax.Array,
    count: jax.Array,
    noises: jax.Array,
    text: flow.Text | None = None,
    guidance: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Walks the first steps of a restart sampler, a number of them that may be traced.

    No gradient passes: a loss takes the last step itself, with one backward pass whatever the
    number, and all shapes are static.

    Args:
      flow_map: as in `sample`.
      noise: (B, ...).
      times: (steps + 1,), decreasing, or (steps + 1, B), a schedule a sample.
      count: (), integer, from 0 to steps - 1: the steps that are taken.
      noises: (steps - 1, B, ...), the fresh noise of each.
      text: captions.
      guidance: (B,).

    Returns:
      The input (B, ...) of the step that would follow, and its time (B,).
    """

    def advance(x, t, s, fresh):
        t, s = (jnp.broadcast_to(time, noise.shape[:1]) for time in (t, s))
        data = flow_map(x, t, jnp.zeros_like(s), text, guidance)
        return flow.interpolate(data, fresh, s).astype(x.dtype)

    def step(x, inputs):
        index, *rest = inputs
        return jax.lax.cond(index < count, advance, lambda x, *_: x, x, *rest), None

    # A scan of fixed length, not a while loop: its arithmetic can be counted, at its most.
    steps = jnp.arange(len(noises)), times[:-2], times[1:-1], noises
    x, _ = jax.lax.scan(step, jax.lax.stop_gradient(noise), steps)
    return jax.lax.stop_gradient((x, jnp.broadcast_to(times[count], noise.shape[:1])))


def _fresh_noise(key: jax.Array, index: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise like x (B, ...), from one key or one a sample (B,)."""
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)

    def draw(sample_key):
        return jax.random.normal(jax.random.fold_in(sample_key, index), x.shape[1:], x.dtype)

    return jax.vmap(draw)(key)


# Teachers.


class Solver(NamedTuple):
    """A method for ``dx/dt = v(x, t)``, from noise to data.

    Attributes:
      start: ``(x, t) -> memory``, what it keeps between steps, before the first one.
      step: ``(velocity, x, t, s, memory) -> (x_s, memory)`` with velocity (x, t) -> v, times (B,).
      evaluations: of the velocity, a step.
    """

    start: Callable
    step: Callable
    evaluations: int


def solve(
    velocity: Velocity,
    noise: jax.Array,
    times: ArrayLike,
    text: flow.Text | None = None,
    guidance: jax.Array | None = None,
    *,
    solver: Solver,
) -> jax.Array:
    """Integrates a velocity along a schedule.

    Args:
      velocity: ``(x, t, text, guidance) -> v``; x and v (B, ...), t (B,).
      noise: (B, ...), the sample at times[0].
      times: (steps + 1,), strictly decreasing in [0, 1].
      text: passed to the velocity.
      guidance: (B,), passed to the velocity.
      solver: one of `SOLVERS`.

    Returns:
      (B, ...), the sample at times[-1], in noise's dtype.

    Raises:
      ValueError: times is not such a schedule.
    """

    def at(x, t):
        return velocity(x, t, text, guidance)

    def advance(x, step, memory):
        t, s, _ = step
        return solver.step(at, x, t, s, memory)

    dtype = jnp.promote_types(noise.dtype, jnp.asarray(times).dtype)
    start = solver.start(noise.astype(dtype), jnp.full(noise.shape[:1], 1, dtype))
    return _walk(advance, noise, times, start)


def evaluations(solver: Solver, steps: int) -> int:
    """Evaluations of the velocity (NFE) that a solver spends in this many steps."""
    return solver.evaluations * steps


def _walk(advance: Callable, noise: jax.Array, times: ArrayLike, memory) -> jax.Array:
    """Scans ``advance(x, (t, s, index), memory) -> (x, memory)`` over neighbouring times.

    Between evaluations the sample is held at least in the precision of the times: what a fiftieth
    of a velocity adds would be lost in bfloat16.
    """
    if jnp.ndim(times) != 1 or jnp.size(times) < 2:
        raise ValueError(
            f"times must be a schedule of shape (steps + 1,), got shape {jnp.shape(times)}"
        )
    if not isinstance(times, jax.core.Tracer):
        known = np.asarray(times)
        if not (np.all(known[1:] < known[:-1]) and known[0] <= 1 and known[-1] >= 0):
            raise ValueError(f"times must decrease strictly within [0, 1], got {known}")
    times = jnp.asarray(times)
    dtype = jnp.promote_types(noise.dtype, times.dtype)
    batch = noise.shape[:1]

    def body(carry, step):
        x, memory = carry
        t, s, index = step
        x, memory = advance(x, (jnp.full(batch, t), jnp.full(batch, s), index), memory)
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), memory, carry[1])
        return (x.astype(dtype), memory), None

    steps = (times[:-1], times[1:], jnp.arange(times.size - 1))
    (x, _), _ = jax.lax.scan(body, (noise.astype(dtype), memory), steps)
    return x.astype(noise.dtype)


# The solvers. Multistep ones know their last step's time, infinite before the first one.


def _no_memory(x, t):
    return ()


def _euler_step(velocity, x, t, s, memory):
    return flow.straight_step(x, t, s, velocity(x, t)), memory


EULER = Solver(_no_memory, _euler_step, evaluations=1)
"""Order 1: what FLUX and diffusers use."""


def _heun_step(velocity, x, t, s, memory):
    first = velocity(x, t)
    second = velocity(flow.straight_step(x, t, s, first), s)
    return flow.straight_step(x, t, s, (first + second) / 2), memory


HEUN = Solver(_no_memory, _heun_step, evaluations=2)
"""Order 2, without memory: the mean of the velocities at the two ends of an Euler step."""


def _last_step(x, t):
    return jnp.zeros_like(x), jnp.full_like(t, jnp.inf)


def _adams_bashforth_step(velocity, x, t, s, memory):
    v_last, t_last = memory
    v = velocity(x, t)
    weight = flow.per_sample((t - s) / (2 * (t_last - t)), x)
    return flow.straight_step(x, t, s, v + weight * (v - v_last)), (v, t)


ADAMS_BASHFORTH = Solver(_last_step, _adams_bashforth_step, evaluations=1)
"""Order 2 at Euler's price: extrapolates the velocity, linear in t, through the last two."""


def _dpm_solver_step(velocity, x, t, s, memory):
    data_last, t_last = memory
    data = flow.straight_step(x, t, jnp.zeros_like(t), velocity(x, t))
    # Where a half log SNR is infinite (at 1, and at 0) the step is of first order; the logarithms
    # are taken elsewhere, at times that keep derivatives finite.
    finite = (t_last < 1) & (s > 0)
    log_snr = [
        jnp.log((1 - time) / time)
        for time in (
            jnp.where(finite, t_last, 0.75),
            jnp.where(finite, t, 0.5),
            jnp.where(finite, s, 0.25),
        )
    ]
    slope = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
    weight = flow.per_sample(jnp.where(finite, slope, 0), x)
    ratio = flow.per_sample(s / t, x)
    return ratio * x + (1 - ratio) * (data + weight * (data - data_last)), (data, t)


DPM_SOLVER = Solver(_last_step, _dpm_solver_step, evaluations=1)
"""DPM-Solver++(2M), order 2: extrapolates the predicted data, linear in log SNR.

Source: arXiv:2211.01095, algorithm 2, with alpha = 1 - t and sigma = t, where its update
``(sigma_s / sigma_t) x - alpha_s (e^-h - 1) D`` becomes ``(s/t) x + (1 - s/t) D``. The first step
and the one to 0 are of first order, and so is the second after a first from t = 1, where log SNR
is infinite; over the whole of [0, 1] the error falls by a logarithm less than steps^-2.
"""


def _two_last_steps(x, t):
    return x, (jnp.zeros_like(x), jnp.full_like(t, jnp.inf)), _last_step(x, t)


def _predictor_corrector_step(velocity, x, t, s, memory):
    x_last, (v_last, t_last), (v_before, t_before) = memory
    v = velocity(x, t)
    first = jnp.isinf(t_last)
    h = jnp.where(first, 1, t_last - t)
    slope = (v_last - v) / flow.per_sample(h, x)
    slope_before = (v_before - v_last) / flow.per_sample(t_before - (t + h), x)
    curvature = (slope_before - slope) / flow.per_sample(t_before - t, x)
    h_x = flow.per_sample(h, x)
    corrected = x_last - h_x * (v + v_last) / 2 + h_x**3 / 6 * curvature
    x = jnp.where(flow.per_sample(first, x), x, corrected)
    x_s, _ = _adams_bashforth_step(lambda *_: v, x, t, s, (v_last, t_last))
    return x_s, (x, (v, t), (v_last, t_last))


PREDICTOR_CORRECTOR = Solver(_two_last_steps, _predictor_corrector_step, evaluations=1)
"""Order 3 at Euler's price, the most exact of these from 16 to 32 steps on.

The sample at t is a prediction (Adams-Bashforth's); its velocity first corrects it, by the parabola
through the last three velocities, and then predicts the next. Evaluating once for both is the idea
of UniPC (arXiv:2302.04867), here with the linear path's velocity in place of the predicted noise.
"""

SOLVERS = {
    "euler": EULER,
    "heun": HEUN,
    "adams_bashforth": ADAMS_BASHFORTH,
    "dpm_solver": DPM_SOLVER,
    "predictor_corrector": PREDICTOR_CORRECTOR,
}
