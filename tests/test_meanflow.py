"""MeanFlow: its identity, its relations to flow matching and sCM, and its switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smooth import NULL, SHAPE, TEXT, smooth_network, smooth_params

from jax_distill import flow
from jax_distill.flow import Batch, GaussianOracle, Network
from jax_distill.objectives import teacher
from jax_distill.objectives.meanflow import MeanFlow, MeanFlowDraws
from jax_distill.objectives.objective import View
from jax_distill.objectives.scm import SCM, SCMDraws

COUNT = SHAPE[:1]
VIEW = View({"teacher": smooth_params(5), "null": NULL})


def meanflow(**settings) -> MeanFlow:
    network = smooth_network()
    return MeanFlow(network, teacher.embedded_guidance(network), **settings)


def batch_for(dtype=np.float32) -> Batch:
    return Batch(jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), dtype), TEXT)


def draws_for(dtype=np.float32, **changes) -> MeanFlowDraws:
    rng = np.random.default_rng(0)
    t = rng.uniform(0.3, 0.95, COUNT)
    draws = MeanFlowDraws(
        jnp.asarray(t, dtype),
        jnp.asarray(t * rng.uniform(0.1, 0.9, COUNT), dtype),
        jnp.asarray(rng.standard_normal(SHAPE), dtype),
        jnp.full(COUNT, 4.5, dtype),
        jnp.arange(SHAPE[0]) == 3,
    )
    return draws._replace(**changes)


def squares(x):
    return jnp.sum(jnp.square(x), (1, 2))


# Theory.


@pytest.mark.parametrize("warmup, step", [(0, 0), (100, 100), (100, 40), (100, 90)])
def test_the_oracles_average_velocity_is_its_own_target(warmup, step):
    """By the derivative, and over finite intervals, walked there exactly."""
    with jax.enable_x64(True):
        oracle = GaussianOracle(np.array([0.3, -0.5, 1.0]), np.array([0.5, 1.2, 0.8]))
        network, velocity = GaussianOracle.network(), None
        if step < warmup:
            draws = draws_for(np.float64)
            middle = draws.t - (1 - step / warmup) * (draws.t - draws.r)
            velocity = lambda frozen, x, t, text, w: oracle.average_velocity(x, t, middle)  # noqa: E731
        velocity = velocity or teacher.embedded_guidance(network)
        objective = MeanFlow(network, velocity, discrete_warmup=warmup)
        u, target = objective.target(
            {"network": oracle},
            View({"teacher": oracle, "null": NULL}),
            batch_for(np.float64),
            draws_for(np.float64),
            jnp.asarray(step),
        )
        assert float(jnp.abs(u).max()) > 0.1
        np.testing.assert_allclose(u, target, rtol=0, atol=1e-12)


def test_at_equal_times_it_is_flow_matching_on_the_teachers_velocity():
    with jax.enable_x64(True):
        draws = draws_for(np.float64)
        draws = draws._replace(r=draws.t)
        objective, batch = meanflow(loss_power=0.0), batch_for(np.float64)
        params = {"network": smooth_params(dtype=np.float64)}
        network, x_t = smooth_network(), flow.interpolate(batch.x, draws.noise, draws.t)
        text = jax.tree.map(
            lambda c, n: jnp.where(jnp.reshape(draws.dropped, (-1,) + (1,) * (c.ndim - 1)), n, c),
            TEXT,
            NULL,
        )

        def matching(params):
            u, v = (
                network.velocity(p, x_t, draws.t, text, draws.guidance)
                for p in (params["network"], VIEW.frozen["teacher"])
            )
            return jnp.mean(squares(u - v))

        def ours(params):
            return objective.loss(params, VIEW, batch, draws, jnp.asarray(0))[0]

        (a, da), (b, db) = jax.value_and_grad(ours)(params), jax.value_and_grad(matching)(params)
        np.testing.assert_allclose(a, b, rtol=1e-12)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8), da, db)


def test_scms_tangent_vanishes_on_its_exact_map_to_data():
    """The average velocity over [0, t] is a consistency function."""
    with jax.enable_x64(True):
        oracle = GaussianOracle(0.3, np.array([0.5, 1.2, 0.8]))
        average = GaussianOracle.network()

        def to_data(params, x, t, text=None, guidance=None, interval=None):
            return average.velocity(params, x, t, text, guidance, interval=t)

        objective = SCM(
            Network(to_data, None), teacher.embedded_guidance(average), tangent_warmup=0
        )
        draws = draws_for(np.float64)
        angles = SCMDraws(flow.linear_to_trig_time(draws.t), draws.noise, draws.guidance)
        state = {"network": oracle}, View({"teacher": oracle})
        tangent = objective.tangent(*state, batch_for(np.float64), angles, 0).tangent
        assert float(jnp.abs(tangent).max()) <= 1e-10


# The equations.


def test_target_is_the_finite_difference_of_the_network_along_the_flow():
    """v - (t - r) du/dt, the derivative by central differences in float64."""
    with jax.enable_x64(True):
        batch, draws, params = batch_for(np.float64), draws_for(np.float64), smooth_params(2, float)
        draws = draws._replace(dropped=jnp.zeros(COUNT, bool))
        _, target = meanflow().target({"network": params}, VIEW, batch, draws, 0)
        network, x_t = smooth_network(), flow.interpolate(batch.x, draws.noise, draws.t)
        v = network.velocity(VIEW.frozen["teacher"], x_t, draws.t, TEXT, draws.guidance)

        def u(change):
            t = draws.t + change
            return network.velocity(params, x_t + change * v, t, TEXT, draws.guidance, t - draws.r)

        du = (8 * (u(1e-3) - u(-1e-3)) - (u(2e-3) - u(-2e-3))) / 12e-3
        want = v - flow.per_sample(draws.t - draws.r, v) * du
        np.testing.assert_allclose(target, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_loss_weights_samples_by_a_power_of_their_own_error(power):
    params, batch, draws = {"network": smooth_params()}, batch_for(), draws_for()
    objective = meanflow(loss_power=power)
    u, target = objective.target(params, VIEW, batch, draws, 0)
    error = squares(u - target)
    loss, metrics = objective.loss(params, VIEW, batch, draws, 0)
    np.testing.assert_allclose(loss, jnp.mean(error / (error + 1e-3) ** power), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], jnp.mean(jnp.square(u - target)), rtol=1e-5)


def test_no_gradient_reaches_the_target_or_the_weight():
    """With p = 1 the gradient is that of |u - const|^2 / const, one forward's."""
    params, batch, draws = {"network": smooth_params()}, batch_for(), draws_for()
    objective = meanflow(kappa=0.3, omega=0.6)
    u, target = objective.target(params, VIEW, batch, draws, 0)
    weight = 1 / (squares(u - target) + 1e-3)
    network, x_t = smooth_network(), flow.interpolate(batch.x, draws.noise, draws.t)
    text = jax.tree.map(lambda c, n: c.at[3].set(n[0]), TEXT, NULL)

    def regression(params):
        h = draws.t - draws.r
        u = network.velocity(params["network"], x_t, draws.t, text, draws.guidance, h)
        return jnp.mean(weight * squares(u - target))

    got = jax.grad(lambda p: objective.loss(p, VIEW, batch, draws, 0)[0])(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got,
        jax.grad(regression)(params),
    )


@pytest.mark.parametrize("at_interval", [False, True])
def test_mixture_of_velocities(at_interval):
    """Inside the window and where the caption is kept; elsewhere the teacher's."""
    params, batch = {"network": smooth_params()}, batch_for()
    lost = jnp.asarray([0, 3])  # captions; t of the first is inside
    draws = draws_for(dropped=jnp.zeros(COUNT, bool).at[lost].set(True))
    objective = meanflow(
        omega=0.6, kappa=0.3, mix_from=0.4, mix_to=0.8, mix_interval=at_interval,
        jvp_velocity="sample",
    )  # fmt: skip
    target, direction = objective.velocities(params, VIEW, batch, draws)
    network, x_t = smooth_network(), flow.interpolate(batch.x, draws.noise, draws.t)
    h = draws.t - draws.r if at_interval else jnp.zeros_like(draws.t)
    null = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, TEXT)
    text = jax.tree.map(lambda c, n: c.at[lost].set(n[0]), TEXT, NULL)
    w = draws.guidance
    v = network.velocity(VIEW.frozen["teacher"], x_t, draws.t, text, w)
    with_caption = network.velocity(params["network"], x_t, draws.t, TEXT, w, h)
    without = network.velocity(params["network"], x_t, draws.t, null, w, h)
    mixed = 0.6 * v + 0.3 * with_caption + 0.1 * without
    inside = np.asarray((draws.t >= 0.4) & (draws.t <= 0.8) & ~draws.dropped)
    assert 0.4 <= draws.t[0] <= 0.8 and 0 < inside.sum() < SHAPE[0] - 1
    for row in range(SHAPE[0]):
        want = mixed[row] if inside[row] else v[row]
        np.testing.assert_allclose(target[row], want, rtol=1e-5, atol=1e-6)
        want = mixed[row] if inside[row] else draws.noise[row] - batch.x[row]
        np.testing.assert_allclose(direction[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target, jvp", [("sample", "sample"), ("teacher", "sample")])
def test_velocities_come_from_teacher_or_sample(target, jvp):
    batch, draws = batch_for(), draws_for(dropped=jnp.zeros(COUNT, bool))
    objective = meanflow(target_velocity=target, jvp_velocity=jvp)
    got = objective.velocities({"network": smooth_params()}, VIEW, batch, draws)
    x_t = flow.interpolate(batch.x, draws.noise, draws.t)
    v = smooth_network().velocity(VIEW.frozen["teacher"], x_t, draws.t, TEXT, draws.guidance)
    known = {"sample": draws.noise - batch.x, "teacher": v}
    for value, name in zip(got, (target, jvp)):
        np.testing.assert_allclose(value, known[name], rtol=1e-6, atol=1e-6)


# The finite-interval warm-up.


def test_finite_intervals_begin_with_the_velocity_and_tend_to_the_differential_target():
    with jax.enable_x64(True):
        batch, draws = batch_for(np.float64), draws_for(np.float64)
        params = {"network": smooth_params(dtype=np.float64)}
        objective = meanflow(discrete_warmup=1_000_000)
        velocity, _ = objective.velocities(params, VIEW, batch, draws)

        def target(step, objective=objective):
            return objective.target(params, VIEW, batch, draws, jnp.asarray(step))

        np.testing.assert_allclose(target(0)[1], velocity, atol=1e-12)
        u, differential = target(0, meanflow())
        far, near = (
            float(jnp.abs(target(step)[1] - differential).max()) for step in (980_000, 990_000)
        )
        assert 0 < near < 0.6 * far < 1
        np.testing.assert_allclose(target(980_000)[0], u, atol=1e-12)
        np.testing.assert_allclose(target(1_000_000)[1], differential, atol=1e-12)


def test_finite_intervals_go_where_the_derivative_would():
    """Along the jvp's direction, however the target velocity is made; as short as SHORTEST."""
    with jax.enable_x64(True):
        batch, draws = batch_for(np.float64), draws_for(np.float64)
        params = {"network": smooth_params(dtype=np.float64)}
        for velocity in ("teacher", "sample"):
            kinds = {"jvp_velocity": velocity, "target_velocity": "teacher"}
            last = meanflow(discrete_warmup=10_000, **kinds)
            found = last.target(params, VIEW, batch, draws, jnp.asarray(9_999))[1]
            shortest = last.target(params, VIEW, batch, draws, jnp.asarray(9_960))[1]
            want = meanflow(**kinds).target(params, VIEW, batch, draws, jnp.asarray(0))[1]
            np.testing.assert_array_equal(found, shortest)
            assert float(jnp.abs(found - want).max()) < 0.02 * float(jnp.abs(want).max())


def test_at_equal_times_a_finite_interval_is_the_velocity():
    draws = draws_for()
    draws = draws._replace(r=draws.t)
    objective, params = meanflow(discrete_warmup=100), {"network": smooth_params()}
    _, target = objective.target(params, VIEW, batch_for(), draws, jnp.asarray(90))
    velocity, _ = objective.velocities(params, VIEW, batch_for(), draws)
    np.testing.assert_allclose(target, velocity, rtol=1e-6)


# Starts, draws, sampling.


def test_the_second_embedder_starts_as_asked():
    params = {"time_embedder": {"a": jnp.ones(2)}, "interval_embedder": {"a": jnp.zeros(2)}}
    for start, value in (("zeros", 0), ("copy", 1)):
        made = meanflow(interval_start=start).init_student(jax.random.key(0), params)["network"]
        np.testing.assert_array_equal(made["interval_embedder"]["a"], jnp.full(2, value))
        np.testing.assert_array_equal(made["time_embedder"]["a"], jnp.ones(2))


def test_draws_are_sorted_and_equal_as_often_as_asked():
    batch = Batch(jnp.zeros((4096, 1, 1)), TEXT)
    draws = meanflow(equal_share=0.25).draw(jax.random.key(0), batch)
    assert bool(jnp.all(draws.r <= draws.t))
    assert abs(float(jnp.mean(draws.r == draws.t)) - 0.25) < 0.03
    assert abs(float(jnp.mean(draws.dropped)) - 0.1) < 0.02
    assert set(np.unique(draws.guidance)) == {4.0, 4.5, 5.0}
    both = jnp.concatenate([jax.scipy.special.logit(draws.t), jax.scipy.special.logit(draws.r)])
    free = jnp.where(jnp.tile(draws.r == draws.t, 2), jnp.nan, both)
    assert abs(float(jnp.nanmean(free)) + 0.4) < 0.06 and abs(float(jnp.nanstd(free)) - 1) < 0.06


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_the_oracle_is_exact_in_any_number_of_steps(steps):
    with jax.enable_x64(True):
        oracle = GaussianOracle(0.3, 0.6)
        objective = MeanFlow(GaussianOracle.network(), None)
        noise = jax.random.normal(jax.random.key(0), (5, 4, 3), jnp.float64)
        got = objective.sample({"network": oracle}, noise, None, None, None, None, steps)
        want = oracle.flow_map(noise, jnp.ones(5), jnp.zeros(5))
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("shift", [None, 0.0])
def test_sampling_goes_along_fluxs_shifted_schedule(shift):
    times = []

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        jax.debug.callback(lambda t, h: times.append((float(t), float(t - h))), t[0], interval[0])
        return x

    objective = MeanFlow(Network(velocity, None), None, time_shift=shift)
    objective.sample({"network": {}}, jnp.zeros((2, 256, 4)), None, None, None, None, 4)
    jax.effects_barrier()
    mu = 0.5 if shift is None else shift  # FLUX's at 256 tokens
    want = flow.shift_time(jnp.linspace(1, 0, 5), mu)
    np.testing.assert_allclose(sorted(times, reverse=True), list(zip(want, want[1:])), atol=1e-6)


@pytest.mark.parametrize("field", ["interval_start", "target_velocity", "jvp_velocity"])
def test_unknown_option_is_named(field):
    with pytest.raises(ValueError, match=f"objective.{field}: 'x' is not one of"):
        meanflow(**{field: "x"})
