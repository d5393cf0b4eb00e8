"""Laws of the samplers and solvers, on flows whose solutions are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill import flow, sampling

MEAN, STD = 0.3, 0.7
ORACLE = flow.GaussianOracle(MEAN, STD)
SHAPE = (6, 2, 3)
SOLVERS = [pytest.param(solver, id=name) for name, solver in sampling.SOLVERS.items()]
SCHEDULES = [
    pytest.param(sampling.uniform_times, id="uniform"),
    pytest.param(functools.partial(sampling.shifted_times, tokens=1024), id="shifted"),
    pytest.param(sampling.consistency_times, id="consistency"),
]


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def oracle_map(x, t, s, text, guidance):
    return ORACLE.flow_map(x, t, s)


def oracle_velocity(x, t, text, guidance):
    return ORACLE.velocity(x, t)


def mixture_velocity(x, t, text, guidance):
    """The marginal velocity of data 0.3 N(-1, 0.15^2) + 0.7 N(1, 0.15^2) in each coordinate."""
    centre, std, log_weight = jnp.array([-1.0, 1.0]), 0.15, jnp.log(jnp.array([0.3, 0.7]))
    x, t = x[..., None], flow.per_sample(t, x)[..., None]
    components = flow.GaussianOracle(centre, std)
    mean_t, std_t = components.marginal(t)
    posterior = jax.nn.softmax(
        log_weight - jnp.log(std_t) - ((x - mean_t) / std_t) ** 2 / 2, axis=-1
    )
    velocity = -centre + (t - (1 - t) * std**2) / std_t**2 * (x - mean_t)
    return (posterior * velocity).sum(-1)


@jax.jit
def sample(x, times, renoise_key=None):
    return sampling.sample(oracle_map, x, times, renoise_key=renoise_key)


@functools.partial(jax.jit, static_argnames=("velocity", "solver"))
def solve(velocity, x, times, solver):
    return sampling.solve(velocity, x, times, solver=solver)


def noise(dtype=None) -> jax.Array:
    return jax.random.normal(jax.random.key(0), SHAPE, dtype)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_schedules_decrease_from_one_to_zero_exactly(schedule, steps):
    times = schedule(steps)
    assert times.shape == (steps + 1,) and times.dtype == jnp.float32
    assert times[0] == 1 and times[-1] == 0
    assert (times[1:] < times[:-1]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_no_steps_are_refused(schedule):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        schedule(0)


@pytest.mark.parametrize("tokens, steps", [(256, 4), (1024, 50), (4096, 28)])
def test_shifted_times_match_diffusers(tokens, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1.0, 1 / steps, steps)  # what FluxPipeline passes
    scheduler.set_timesteps(sigmas=sigmas, mu=flow.flux_shift(tokens))
    np.testing.assert_allclose(
        sampling.shifted_times(steps, tokens), scheduler.sigmas.numpy(), atol=2e-7
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_angles_match_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    rounding = 1.57080 - np.pi / 2  # diffusers' pi/2
    angles = sampling.consistency_angles(steps)
    np.testing.assert_allclose(angles, scheduler.timesteps.numpy(), atol=rounding + 1e-7)
    np.testing.assert_allclose(
        flow.linear_to_trig_time(sampling.consistency_times(steps)), angles, atol=1e-6
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_push_forward_of_the_oracle_is_exact(double_precision, schedule, steps):
    x = noise()
    result = sample(x, schedule(steps))
    np.testing.assert_allclose(result, MEAN + STD * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_restart_of_the_oracle_keeps_every_marginal(double_precision, schedule, steps):
    """The sample is affine in all noise: its mean is its value at zero noise, and its variance the
    sum of its squared derivatives."""
    times, start, key = schedule(steps), noise(), jax.random.key(7)
    value, by_start, by_fresh = restarts_by_hand(times)
    assert value == pytest.approx(MEAN, abs=1e-12)
    assert by_start**2 + (by_fresh**2).sum() == pytest.approx(STD**2, abs=1e-12)

    fresh = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(steps)])
    expected = value + by_start * start + jnp.tensordot(by_fresh, fresh, 1)
    np.testing.assert_allclose(sample(start, times, key), expected, rtol=0, atol=1e-12)


@jax.jit
def restarts_by_hand(times):
    """The sample at zero noise, and its derivatives by the starting and by each fresh noise."""

    def sampled(start, fresh):  # (), (steps,)
        x = start
        for index in range(times.size - 1):
            data = ORACLE.flow_map(x, times[index], 0.0)
            x = flow.interpolate(data, fresh[index], times[index + 1])
        return x

    at = jnp.zeros(()), jnp.zeros(times.size - 1)
    return sampled(*at), *jax.grad(sampled, argnums=(0, 1))(*at)


@pytest.mark.parametrize("data_scale", [0.5, 1.0])
def test_restart_is_sampling_in_trigflow_coordinates(double_precision, data_scale):
    steps, key, x = 3, jax.random.key(3), noise()
    angles = sampling.consistency_angles(steps)
    y = data_scale * x
    for index, (a, next_a) in enumerate(zip(angles[:-1], angles[1:], strict=True)):
        t = flow.trig_to_linear_time(a)
        x_t = flow.trig_to_linear(y, a, data_scale)
        trig = flow.trig_velocity(x_t, t, ORACLE.average_velocity(x_t, t, 0.0))
        data = jnp.cos(a) * y - jnp.sin(a) * data_scale * trig
        fresh = jax.random.normal(jax.random.fold_in(key, index), SHAPE)
        y = jnp.cos(next_a) * data + jnp.sin(next_a) * data_scale * fresh
    result = sample(x, sampling.consistency_times(steps), key)
    np.testing.assert_allclose(result, y / data_scale, rtol=0, atol=1e-12)


def test_restart_asks_only_for_data_and_agrees_with_push_forward_in_one_step():
    def to_data_only(x, t, s, text, guidance):
        return jnp.where(flow.per_sample(s, x) == 0, ORACLE.flow_map(x, t, s), jnp.nan)

    @jax.jit
    def restart(x, times, key):
        return sampling.sample(to_data_only, x, times, renoise_key=key)

    x, (key, other_key) = noise(), jax.random.split(jax.random.key(0))
    times = sampling.uniform_times(4)
    samples = restart(x, times, key)
    assert jnp.isfinite(samples).all()
    assert (samples != restart(x, times, other_key)).all()
    times = sampling.uniform_times(1)
    np.testing.assert_allclose(restart(x, times, key), sample(x, times), rtol=0, atol=1e-6)


def test_text_and_guidance_reach_the_network_with_one_time_a_sample():
    text = flow.Text(jnp.ones((6, 2, 4)), jnp.ones((6, 5)))
    guidance = jnp.arange(6.0)

    def flow_map(x, t, s, text, guidance):
        assert t.shape == s.shape == (6,)
        velocity = flow.per_sample(guidance * text.pooled[:, 0], x) * jnp.ones_like(x)
        return flow.straight_step(x, t, s, velocity)

    result = sampling.sample(flow_map, noise(), sampling.uniform_times(2), text, guidance)
    np.testing.assert_allclose(noise() - result, jnp.ones(SHAPE) * guidance[:, None, None], 1e-5)
    result = sampling.solve(
        lambda x, t, text, guidance: flow.per_sample(guidance, x) * jnp.ones_like(x),
        noise(),
        sampling.uniform_times(2),
        text,
        guidance,
        solver=sampling.EULER,
    )
    np.testing.assert_allclose(noise() - result, jnp.ones(SHAPE) * guidance[:, None, None], 1e-5)


@pytest.mark.parametrize(
    "solver, order, tolerance",
    [
        (sampling.EULER, 1, 0.05),
        (sampling.HEUN, 2, 0.1),
        (sampling.ADAMS_BASHFORTH, 2, 0.1),
        (sampling.DPM_SOLVER, 2, 0.25),  # less a logarithm
        (sampling.PREDICTOR_CORRECTOR, 3, 0.1),
    ],
)
def test_solvers_converge_at_their_order(double_precision, solver, order, tolerance):
    x = noise()
    errors = [
        jnp.abs(solve(oracle_velocity, x, sampling.uniform_times(n), solver) - MEAN - STD * x).max()
        for n in (128, 256)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=tolerance)


def test_dpm_solver_is_of_second_order_away_from_the_ends(double_precision):
    x, errors = noise(), []
    for steps in (64, 128):
        times = jnp.linspace(0.9, 0.1, steps + 1)
        exact = ORACLE.flow_map(x, 0.9, 0.1)
        errors.append(jnp.abs(solve(oracle_velocity, x, times, sampling.DPM_SOLVER) - exact).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("steps", [4, 10])
def test_dpm_solver_matches_the_papers_update(double_precision, steps):
    """arXiv:2211.01095, algorithm 2, in its own variables, between finite log SNRs."""
    times = jnp.linspace(0.95, 0.05, steps + 1)
    alpha, sigma = 1 - times, times
    log_snr = jnp.log(alpha / sigma)
    x = start = noise()
    datas = []
    for i in range(steps):
        datas.append(x - times[i] * ORACLE.velocity(x, times[i]))
        h, estimate = log_snr[i + 1] - log_snr[i], datas[i]
        if i:
            r = (log_snr[i] - log_snr[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * datas[i] - 1 / (2 * r) * datas[i - 1]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * jnp.expm1(-h) * estimate
    result = solve(oracle_velocity, start, times, sampling.DPM_SOLVER)
    np.testing.assert_allclose(result, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_solvers_are_exact_on_straight_paths(double_precision, solver, steps):
    """Data at a point: the path to it is straight, its velocity is constant along it."""
    x = noise()
    result = sampling.solve(
        lambda x, t, text, guidance: (x - MEAN) / flow.per_sample(jnp.maximum(t, 1e-300), x),
        x,
        jnp.linspace(1.0, 1e-3, steps + 1),
        solver=solver,
    )
    np.testing.assert_allclose(result, MEAN + 1e-3 * (x - MEAN), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_finite_and_differentiable_on_the_whole_schedule(solver):
    def total(x, times):
        return sampling.solve(oracle_velocity, x, times, solver=solver).sum()

    slopes_of = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, slopes = slopes_of(noise(), sampling.shifted_times(3, 1024))
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(slope).all() for slope in slopes)
    assert jnp.isfinite(solve(oracle_velocity, noise(), sampling.uniform_times(1), solver)).all()


def test_multistep_solvers_beat_euler_and_heun_at_equal_cost_on_a_mixture(double_precision):
    x = jax.random.normal(jax.random.key(0), (64, 2, 2))
    exact = solve(mixture_velocity, x, sampling.uniform_times(1000), sampling.HEUN)

    def error(name, nfe=32):
        solver = sampling.SOLVERS[name]
        steps = nfe // solver.evaluations
        assert sampling.evaluations(solver, steps) == nfe
        times = sampling.shifted_times(steps, 1024)
        return jnp.abs(solve(mixture_velocity, x, times, solver) - exact).mean()

    errors = {name: float(error(name)) for name in sampling.SOLVERS}
    assert errors["predictor_corrector"] < 0.5 * errors["adams_bashforth"]
    assert errors["adams_bashforth"] < errors["heun"] < errors["euler"]
    assert errors["dpm_solver"] < errors["euler"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_spend_what_they_say(solver):
    calls = []

    def velocity(x, t, text, guidance):
        jax.debug.callback(lambda: calls.append(1))
        return x

    sampling.solve(velocity, noise(), sampling.uniform_times(5), solver=solver)
    jax.effects_barrier()
    assert len(calls) == sampling.evaluations(solver, 5)


def test_low_precision_noise_is_integrated_in_the_precision_of_the_times():
    times, x = sampling.uniform_times(200), noise(jnp.bfloat16)
    for result in (
        sampling.sample(oracle_map, x, times),
        sampling.solve(oracle_velocity, x, times, solver=sampling.HEUN),
    ):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            result.astype(jnp.float32), MEAN + STD * x.astype(jnp.float32), rtol=2**-8, atol=1e-3
        )


def test_samplers_take_traced_and_constant_schedules_under_jit():
    x, times = noise(), sampling.uniform_times(4)
    expected = sampling.sample(oracle_map, x, times)
    traced = jax.jit(lambda x, times: sampling.sample(oracle_map, x, times))(x, times)
    constant = jax.jit(lambda x: sampling.sample(oracle_map, x, np.asarray(times)))(x)
    closed = jax.jit(lambda x: sampling.sample(oracle_map, x, times))(x)
    for result in (traced, constant, closed):
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "times", [[0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.5, 0.0], [1.0, -0.1], [1.0, float("nan")]]
)
def test_schedules_that_do_not_decrease_are_refused(times):
    with pytest.raises(ValueError, match="decrease strictly"):
        sampling.sample(oracle_map, noise(), np.array(times))


@pytest.mark.parametrize("times", [1.0, [1.0], [[1.0, 0.0]]])
def test_times_that_are_no_schedule_are_refused(times):
    with pytest.raises(ValueError, match=r"shape \(steps \+ 1,\)"):
        sampling.sample(oracle_map, noise(), np.array(times))


ANGLES = (np.pi / 2, 1.5, 1.4, 1.0)  # rCM's


def test_listed_times_are_those_of_angles():
    schedule = sampling.Listed.of_angles(ANGLES)
    expected = flow.trig_to_linear_time(jnp.array(ANGLES))
    np.testing.assert_allclose(schedule.times(4, tokens=0)[:-1], expected, atol=1e-7)
    assert schedule.listed[0] == 1.0 and schedule.times(4, tokens=0)[-1] == 0
    with pytest.raises(ValueError, match="steps: 5 are more than the 4 times"):
        schedule.times(5, tokens=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        schedule.times(0, tokens=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_listed_steps_meet_what_the_rollouts_of_training_end_at(steps):
    schedule, key = sampling.Listed.of_angles(ANGLES), jax.random.key(3)
    fresh = [jax.random.normal(jax.random.fold_in(key, index), SHAPE) for index in range(3)]
    times = schedule.times(4, tokens=0)
    x, t = sampling.rollout(oracle_map, noise(), times, steps - 1, jnp.stack(fresh))
    drawn = sampling.draw(sampling.Restart(schedule), oracle_map, noise(), None, None, key, steps)
    np.testing.assert_allclose(drawn, ORACLE.flow_map(x, t, jnp.zeros_like(t)), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_rollout_is_the_first_steps_of_the_restart_sampler(double_precision, count):
    """And no gradient passes through it."""
    times = jnp.asarray(sampling.shifted_times(4, 1024), jnp.float64)
    noises = jax.random.normal(jax.random.key(3), (3, *SHAPE), jnp.float64)

    def jump(x, t, s, text, guidance):
        return ORACLE.flow_map(x, t, s)

    def walk(x, count):
        return sampling.rollout(jump, x, times, count, noises)

    x, t = jax.jit(walk)(noise(), count)
    expected = noise()
    for step in range(count):
        now, following = (jnp.full(SHAPE[0], times[step + ahead]) for ahead in (0, 1))
        data = ORACLE.flow_map(expected, now, jnp.zeros(SHAPE[0]))
        expected = flow.interpolate(data, noises[step], following)
    np.testing.assert_allclose(x, expected, atol=1e-12)
    np.testing.assert_array_equal(t, times[count])
    slope = jax.grad(lambda x: walk(x, count)[0].sum())(noise())
    np.testing.assert_array_equal(slope, 0)
