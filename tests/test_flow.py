"""Laws of the paths, coordinates, time distributions and of the Gaussian oracle, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill import flow

ORACLES = [(0.3, 0.7), (-0.5, 1.5), (0.2, 0.05)]
DATA_SCALE = 0.5


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def points(batch: int = 64) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (B, 2, 3), and times t and s (B,) with s <= t."""
    key_x, key_t = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (batch, 2, 3))
    s, t = jnp.sort(jax.random.uniform(key_t, (2, batch)), axis=0)
    return x, t, s


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_path_joins_data_and_noise_at_its_velocity():
    x, t, _ = points()
    noise = jax.random.normal(jax.random.key(1), x.shape)
    x_t, dx_dt = jax.jvp(lambda t: flow.interpolate(x, noise, t), (t,), (jnp.ones_like(t),))
    assert_close(flow.interpolate(x, noise, 0.0), x)
    assert_close(flow.interpolate(x, noise, 1.0), noise)
    assert_close(dx_dt, flow.path_velocity(x, noise))
    assert_close(flow.straight_step(x_t, t, 0.0, dx_dt), x)
    assert_close(flow.straight_step(x_t, t, 1.0, dx_dt), noise)


def test_guidance_interpolates_and_extrapolates_per_sample():
    null, conditional = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    guided = flow.guided_velocity(conditional, null, jnp.array([0.0, 1.0, 4.5]))
    assert_close(guided[0], null[0])
    assert_close(guided[1], conditional[1])
    assert_close(guided[2], 4.5 * conditional[2] - 3.5 * null[2])


def test_times_that_do_not_match_the_batch_are_refused():
    x, _, _ = points(batch=3)
    with pytest.raises(ValueError, match=r"shape \(2,\) for samples of shape \(3, 2, 3\)"):
        flow.per_sample(jnp.zeros(2), x)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_times_and_angles_round_trip(end):
    t = jnp.concatenate([points()[1], jnp.array([end])])
    angle = flow.linear_to_trig_time(t)
    assert_close(flow.trig_to_linear_time(angle), t)
    assert_close(angle[-1], end * jnp.pi / 2)
    assert_close(jnp.tan(angle[:-1]), (t / (1 - t))[:-1])


def test_points_and_velocities_round_trip_between_coordinates():
    x_t, t, _ = points()
    y = flow.linear_to_trig(x_t, t, DATA_SCALE)
    assert_close(flow.trig_to_linear(y, flow.linear_to_trig_time(t), DATA_SCALE), x_t)
    velocity = jax.random.normal(jax.random.key(2), x_t.shape)
    trig = flow.trig_velocity(x_t, t, velocity)
    assert_close(flow.velocity_from_trig(x_t, t, trig), velocity)


def test_trigflow_point_is_the_linear_point_of_the_same_data_and_noise():
    x, t, _ = points()
    noise = jax.random.normal(jax.random.key(1), x.shape)
    angle = flow.linear_to_trig_time(t)
    a = flow.per_sample(angle, x)
    y = DATA_SCALE * (jnp.cos(a) * x + jnp.sin(a) * noise)
    x_t = flow.interpolate(x, noise, t)
    assert_close(flow.trig_to_linear(y, angle, DATA_SCALE), x_t)
    trig = flow.trig_velocity(x_t, t, flow.path_velocity(x, noise))
    assert_close(trig, jnp.cos(a) * noise - jnp.sin(a) * x)
    assert_close(jnp.cos(a) * y - jnp.sin(a) * DATA_SCALE * trig, DATA_SCALE * x)


@pytest.mark.parametrize("mean, std", ORACLES)
def test_trig_velocity_is_the_derivative_along_the_oracles_path(mean, std):
    oracle = flow.GaussianOracle(mean, std)
    start, t, _ = points()
    angle = flow.linear_to_trig_time(t)

    def path(angle):
        t = flow.trig_to_linear_time(angle)
        return flow.linear_to_trig(oracle.flow_map(start, 1.0, t), t, DATA_SCALE)

    _, dy_da = jax.jvp(path, (angle,), (jnp.ones_like(angle),))
    x_t = oracle.flow_map(start, 1.0, t)
    trig = flow.trig_velocity(x_t, t, oracle.velocity(x_t, t))
    assert_close(trig, dy_da / DATA_SCALE, 1e-9)


@pytest.mark.parametrize("mean, std", ORACLES)
def test_oracles_flow_map_solves_its_velocity(mean, std):
    oracle = flow.GaussianOracle(mean, std)
    x, t, s = points()
    x_s, dx_ds = jax.jvp(lambda s: oracle.flow_map(x, t, s), (s,), (jnp.ones_like(s),))
    assert_close(dx_ds, oracle.velocity(x_s, s), 1e-10)
    assert_close(oracle.flow_map(x, t, t), x)
    assert_close(oracle.flow_map(x_s, s, 0.0), oracle.flow_map(x, t, 0.0), 1e-10)
    assert_close(oracle.flow_map(x_s, s, t), x, 1e-10)
    assert_close(oracle.flow_map(x, 1.0, 0.0), mean + std * x)


@pytest.mark.parametrize("mean, std", ORACLES)
def test_oracles_velocity_is_the_regression_of_noise_minus_data(mean, std):
    """E[e - x_0 | x_t] for jointly Gaussian variables: mean + Cov(e - x_0, x_t) / Var(x_t)."""
    oracle = flow.GaussianOracle(mean, std)
    x, t, _ = points()
    times = flow.per_sample(t, x)
    covariance = times - (1 - times) * std**2
    mean_t, std_t = oracle.marginal(times)
    assert_close(oracle.velocity(x, t), -mean + covariance / std_t**2 * (x - mean_t))


@pytest.mark.parametrize("mean, std", ORACLES)
def test_oracles_networks_stand_for_teacher_and_students(mean, std):
    oracle = flow.GaussianOracle(mean, std)
    x, t, s = points()
    exact, consistency = oracle.network(), oracle.consistency_network()
    assert_close(exact.velocity(oracle, x, t, None), oracle.velocity(x, t))
    assert_close(
        exact.velocity(oracle, x, t, None, interval=jnp.zeros_like(t)), oracle.velocity(x, t)
    )
    average = exact.velocity(oracle, x, t, None, interval=t - s)
    assert_close(flow.straight_step(x, t, s, average), oracle.flow_map(x, t, s))
    to_data = consistency.velocity(oracle, x, t, None)
    assert_close(flow.straight_step(x, t, 0.0, to_data), oracle.flow_map(x, t, 0.0))
    assert exact.embedding(oracle, t, None).shape == (len(t), 1)


def test_oracle_takes_a_mean_and_std_a_channel_and_is_differentiable_by_them():
    x, t, _ = points()
    oracle = flow.GaussianOracle(jnp.array([0.1, 0.2, 0.3]), jnp.array([0.5, 1.0, 2.0]))
    channel = flow.GaussianOracle(0.3, 2.0)
    assert_close(oracle.velocity(x, t)[..., 2], channel.velocity(x[..., 2], t))
    slope = jax.grad(lambda oracle: oracle.flow_map(x, 1.0, 0.0).sum())(oracle)
    assert_close(slope.mean, jnp.full(3, x.shape[0] * x.shape[1]))
    assert_close(slope.std, x.sum((0, 1)))


def test_logit_normal_and_uniform_times_have_their_moments():
    t = flow.logit_normal(jax.random.key(0), (20_000,), mean=-0.4, std=1.3)
    logit = jnp.log(t / (1 - t))
    assert_close(jnp.array([logit.mean(), logit.std()]), jnp.array([-0.4, 1.3]), 0.03)
    t = flow.uniform(jax.random.key(0), (20_000,), 0.2, 0.6)
    assert 0.2 <= t.min() and t.max() < 0.6
    assert_close(jnp.array([t.mean(), t.std()]), jnp.array([0.4, 0.4 / 12**0.5]), 0.005)


def test_meanflow_pair_is_sorted_equal_by_share_and_keeps_both_draws():
    t, r = flow.sorted_logit_normal(jax.random.key(0), (20_000,), equal_share=0.25)
    assert (r <= t).all()
    assert_close((r == t).mean(), 0.25, 0.02)
    t, r = flow.sorted_logit_normal(jax.random.key(0), (20_000,), mean=-0.4, equal_share=0.0)
    draws = jnp.concatenate([t, r])
    logit = jnp.log(draws / (1 - draws))
    assert_close(jnp.array([logit.mean(), logit.std()]), jnp.array([-0.4, 1.0]), 0.03)
    t, r = flow.sorted_logit_normal(jax.random.key(0), (100,), equal_share=1.0)
    assert (r == t).all()


def test_consistency_angles_have_log_normal_noise_to_signal():
    angle = flow.log_normal_angle(jax.random.key(0), (20_000,), data_scale=DATA_SCALE)
    log_sigma = jnp.log(DATA_SCALE * jnp.tan(angle))
    assert angle.min() > 0 and angle.max() < jnp.pi / 2
    assert_close(jnp.array([log_sigma.mean(), log_sigma.std()]), jnp.array([0.2, 1.6]), 0.03)


def test_shift_adds_to_the_logit_keeps_the_ends_and_composes():
    _, t, _ = points()
    shifted = flow.shift_time(t, 0.7)
    assert_close(jnp.log(shifted / (1 - shifted)), jnp.log(t / (1 - t)) + 0.7)
    assert_close(flow.shift_time(shifted, -0.7), t)
    assert flow.shift_time(0.0, 0.7) == 0 and flow.shift_time(1.0, 0.7) == 1


def test_flux_shift_is_linear_through_its_two_ends():
    assert flow.flux_shift(256) == 0.5
    assert flow.flux_shift(4096) == pytest.approx(1.15, abs=1e-12)
    assert flow.flux_shift(1024) == pytest.approx(0.63, abs=1e-12)  # 512 px; diffusers' value
    assert flow.flux_shift(100, 0.4, 1.16, 100, 300) == 0.4
    assert flow.flux_shift(300, 0.4, 1.16, 100, 300) == pytest.approx(1.16, abs=1e-12)
