"""IMM: the kernel, the discrepancy, the limit of short intervals, and its scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smooth import SHAPE, TEXT, smooth_network, smooth_params

from jax_distill import flow
from jax_distill.data import loader
from jax_distill.flow import Batch, GaussianOracle
from jax_distill.objectives import teacher
from jax_distill.objectives.imm import IMM, laplace_kernel, moment_weight
from jax_distill.objectives.objective import View

AVERAGE = {"network": smooth_params(6)}
VIEW = View({"teacher": smooth_params(5)}, averages={"student": AVERAGE})


def imm(**settings) -> IMM:
    network = smooth_network()
    return IMM(network, teacher.embedded_guidance(network), **settings)


def batch_for(dtype=np.float32) -> Batch:
    return Batch(jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), dtype), TEXT)


def particles(seed, shape=(3, 4, 5)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def discrepancy(a, b, scale):
    def mean(a, b):
        return laplace_kernel(a, b, scale).mean((1, 2))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


# The kernel.


def test_kernel_is_symmetric_one_on_itself_and_laplaces():
    with jax.enable_x64(True):
        a, b, scale = particles(0), particles(1), jnp.array([0.5, 1.0, 2.0])
        k = laplace_kernel(a, b, scale)
        np.testing.assert_allclose(k, jnp.swapaxes(laplace_kernel(b, a, scale), 1, 2), atol=1e-15)
        for g, i, j in ((0, 1, 2), (2, 3, 0)):
            want = np.exp(-np.linalg.norm(a[g, i] - b[g, j]) / (5 * scale[g]))
            np.testing.assert_allclose(k[g, i, j], want, rtol=1e-12)
        own = jnp.diagonal(laplace_kernel(a, a, scale), axis1=1, axis2=2)
        np.testing.assert_allclose(own, 1, atol=1e-7)


def test_discrepancy_is_zero_only_where_the_groups_agree():
    with jax.enable_x64(True):
        a, scale = particles(0), jnp.ones(3)
        np.testing.assert_allclose(discrepancy(a, a, scale), 0, atol=1e-15)
        np.testing.assert_allclose(discrepancy(a, a[:, ::-1], scale), 0, atol=1e-15)  # as sets
        moved = [float(discrepancy(a, a + shift, scale).min()) for shift in (0.1, 0.3, 1.0)]
        assert 0 < moved[0] < moved[1] < moved[2]
        spread = a.mean(1, keepdims=True) + 1.5 * (a - a.mean(1, keepdims=True))
        assert float(discrepancy(a, spread, scale).min()) > 1e-4  # equal means, other moments


def test_gradient_is_finite_where_particles_agree():
    a, scale = particles(0), jnp.ones(3)
    gradient = jax.grad(lambda a: discrepancy(a, a[:, ::-1] * 1.0, scale).sum())(a)
    assert bool(jnp.isfinite(gradient).all())
    same = jnp.broadcast_to(a[:, :1], a.shape)
    assert bool(jnp.isfinite(jax.grad(lambda x: discrepancy(x, same, scale).sum())(same)).all())


def test_a_particle_is_pulled_to_the_others_group_and_away_from_its_own():
    scale = jnp.ones(1)
    a, b = jnp.zeros((1, 1, 5)), jnp.full((1, 1, 5), 2.0)
    pull = -jax.grad(lambda a: discrepancy(a, b, scale).sum())(a)
    assert bool((pull > 0).all())
    pair = jnp.stack([jnp.zeros(5), jnp.full(5, 0.1)])[None]
    far = jnp.stack([jnp.full(5, -50.0), jnp.full(5, 50.0)])[None]
    push = -jax.grad(lambda a: discrepancy(a, far, scale).sum())(pair)
    assert bool((push[0, 0] < 0).all()) and bool((push[0, 1] > 0).all())


# The weight.


def test_weight_is_the_published_one():
    with jax.enable_x64(True):
        t = jnp.linspace(0.05, 0.95, 7)

        def log_snr(t):
            return jnp.log((1 - t) ** 2 / t**2)

        slope = jax.vmap(jax.grad(log_snr))(t)
        for power, offset in ((1.0, 4.0), (2.0, 5.0)):
            want = 0.5 * jax.nn.sigmoid(offset - log_snr(t)) * -slope
            want = want * (1 - t) ** power / ((1 - t) ** 2 + t**2)
            np.testing.assert_allclose(moment_weight(t, power, offset), want, rtol=1e-10)
    ends = moment_weight(jnp.array([0.0, 1e-6, 0.994]), 1.0, 4.0)
    assert bool(jnp.isfinite(ends).all()) and ends[0] == 0


# Theory.


def test_at_equal_times_the_map_is_the_identity_and_nearby_the_velocity():
    with jax.enable_x64(True):
        params, x = smooth_params(dtype=np.float64), batch_for(np.float64).x
        jump = flow.average_velocity_map(smooth_network(), params)
        t = jnp.linspace(0.2, 0.9, SHAPE[0])
        w = jnp.full(SHAPE[0], 4.5)
        np.testing.assert_array_equal(jump(x, t, t, TEXT, w), x)
        h = 1e-6
        slope = (x - jump(x, t, t - h, TEXT, w)) / h
        velocity = smooth_network().velocity(params, x, t, TEXT, w)
        np.testing.assert_allclose(slope, velocity, atol=1e-5)


def test_the_oracles_groups_agree_pathwise():
    """Up to the teacher's straight step from t to r, whose error is of second order in t - r."""
    with jax.enable_x64(True):
        oracle = GaussianOracle(np.array([0.3, -0.5, 1.0]), np.array([0.5, 1.2, 0.8]))
        network = GaussianOracle.network()
        errors = {}
        for gap in (12, 13, 20):
            objective = IMM(network, teacher.embedded_guidance(network), gap=gap)
            batch = batch_for(np.float64)
            draws = objective.draw(jax.random.key(0), batch)
            state = {"network": oracle}, View({"teacher": oracle})
            a, b = objective.groups(*state, batch, draws)
            errors[gap] = float(jnp.abs(a - b).max())
            loss, _ = objective.loss(*state, batch, draws, 0)
            assert abs(float(loss)) < 10 * errors[gap]
        assert errors[13] < 0.3 * errors[12] < 1e-3
        assert errors[20] < 1e-7


def test_an_exact_step_makes_the_oracles_groups_equal():
    """With the flow map itself for the step from t to r, to rounding."""
    with jax.enable_x64(True):
        oracle = GaussianOracle(0.3, np.array([0.5, 1.2, 0.8]))
        network = GaussianOracle.network()
        objective = IMM(network, None, gap=1)
        batch = batch_for(np.float64)
        draws = objective.draw(jax.random.key(0), batch)
        assert float((draws.t - draws.r).max()) > 0.1

        def exact(frozen, x, t, text, guidance):
            return oracle.average_velocity(x, t, draws.r)

        objective = dataclasses.replace(objective, teacher=exact)
        a, b = objective.groups({"network": oracle}, View({}), batch, draws)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        loss, _ = objective.loss({"network": oracle}, View({}), batch, draws, 0)
        assert abs(float(loss)) < 1e-10


# The loss.


def test_loss_written_out_again():
    objective, batch, params = imm(gap=4), batch_for(), {"network": smooth_params()}
    draws = objective.draw(jax.random.key(3), batch)
    loss, metrics = objective.loss(params, VIEW, batch, draws, 0)
    network, jump = smooth_network(), flow.average_velocity_map(smooth_network(), smooth_params())
    total = []
    for group in range(2):
        a, b = [], []
        for i in range(4 * group, 4 * group + 4):
            one = slice(i, i + 1)
            text = jax.tree.map(lambda leaf, g=group: leaf[4 * g : 4 * g + 1], TEXT)
            t, s, r, w = draws.t[one], draws.s[one], draws.r[one], draws.guidance[one]
            x_t = (1 - t) * batch.x[4 * group] + t * draws.noise[one]
            v = network.velocity(VIEW.frozen["teacher"], x_t, t, text, w)
            a.append(np.asarray(jump(x_t, t, s, text, w)).ravel())
            b.append(np.asarray(jump(x_t - (t - r) * v, r, s, text, w)).ravel())
        width = 12 * float(t[0] - s[0])

        def mean(p, q, width=width):
            return np.mean([[np.exp(-np.linalg.norm(x - y) / width) for y in q] for x in p])

        value = mean(a, a) + mean(b, b) - 2 * mean(a, b)
        total.append(float(moment_weight(t[0], 1.0, 4.0)) * value)
    np.testing.assert_allclose(loss, np.mean(total), rtol=2e-4)


def test_only_the_first_group_is_differentiated_and_the_average_can_be_the_target():
    batch, params = batch_for(), {"network": smooth_params()}
    draws = imm(gap=4).draw(jax.random.key(3), batch)
    for weights in ("current", "average"):
        objective = imm(gap=4, target_weights=weights)
        source = AVERAGE if weights == "average" else params
        _, b = objective.groups(params, VIEW, batch, draws)
        _, want = imm(gap=4).groups(source, VIEW, batch, draws)
        np.testing.assert_array_equal(b, want)
        gradient = jax.grad(lambda p, o=objective: o.groups(p, VIEW, batch, draws)[1].sum())(params)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_particles_of_a_group_share_times_guidance_and_picture():
    objective = imm(particles=2)
    draws = objective.draw(jax.random.key(0), batch_for())
    for name in ("t", "s", "r", "guidance"):
        value = np.asarray(getattr(draws, name)).reshape(-1, 2)
        np.testing.assert_array_equal(value[:, 0], value[:, 1])
    assert bool(jnp.all((draws.s <= draws.r) & (draws.r <= draws.t)))
    batch, params = batch_for(), {"network": smooth_params()}
    other = batch._replace(x=batch.x.at[1::2].add(1.0))  # pictures that are not used
    a, _ = objective.groups(params, VIEW, batch, draws)
    np.testing.assert_array_equal(a, objective.groups(params, VIEW, other, draws)[0])


def test_pictures_come_as_often_as_there_are_particles():
    """Of what the loader makes for it, IMM uses all."""
    x = batch_for().x
    for particles, accumulate in ((2, 1), (2, 2), (4, 2)):
        objective = imm(particles=particles)
        layout = loader.example_of_row(8, accumulate, objective.rows_per_example)
        used = [layout[turn::accumulate][::particles] for turn in range(accumulate)]
        assert sorted(np.concatenate(used)) == list(range(8 // particles))
    batch = Batch(x[layout], jax.tree.map(lambda leaf: leaf[layout], TEXT))
    micro = jax.tree.map(lambda leaf: leaf[1::2], batch)
    draws, params = objective.draw(jax.random.key(0), micro), {"network": smooth_params()}
    a, b = objective.groups(params, VIEW, micro, draws)
    single = Batch(jnp.repeat(x[1:2], 4, 0), jax.tree.map(lambda t: jnp.repeat(t[1:2], 4, 0), TEXT))
    for found, expected in zip((a, b), objective.groups(params, VIEW, single, draws)):
        np.testing.assert_array_equal(found, expected)


def test_r_is_a_constant_step_in_eta_before_t():
    with jax.enable_x64(True):
        objective = imm(gap=6)
        t, s = jnp.array([0.9, 0.9, 0.5]), jnp.array([0.1, 0.899, 0.0])
        r = objective.earlier(t, s)
        step = (0.994 / 0.006) / 2**6
        np.testing.assert_allclose(r[0] / (1 - r[0]), 9 - step, rtol=1e-12)
        np.testing.assert_allclose(r[1:], s[1:], atol=1e-15)


def test_the_papers_step_uses_the_data_sample():
    objective, batch, params = imm(ddim_velocity="sample", gap=4), batch_for(), {}
    draws = objective.draw(jax.random.key(0), batch)
    params = {"network": smooth_params()}
    jump = flow.average_velocity_map(smooth_network(), smooth_params())
    x = jnp.repeat(batch.x[::4], 4, 0)
    text = jax.tree.map(lambda leaf: jnp.repeat(leaf[::4], 4, 0), TEXT)
    want = jump(flow.interpolate(x, draws.noise, draws.r), draws.r, draws.s, text, draws.guidance)
    _, b = objective.groups(params, VIEW, batch, draws)
    np.testing.assert_allclose(b.reshape(SHAPE), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["push_forward", "restart"])
def test_samples_of_the_oracle_follow_its_law(steps, sampler):
    with jax.enable_x64(True):
        oracle = GaussianOracle(0.3, 0.6)
        objective = IMM(GaussianOracle.network(), None, sampler=sampler, time_max=0.99)
        start = 0.01 * 0.3 + np.sqrt((0.01 * 0.6) ** 2 + 0.99**2) * jax.random.normal(
            jax.random.key(0), (2000, 2, 3), jnp.float64
        )
        key = jax.random.key(1)
        got = objective.sample({"network": oracle}, start, None, None, None, key, steps)
        if sampler == "push_forward" or steps == 1:
            ones = jnp.ones(2000)
            want = oracle.flow_map(start, 0.99 * ones, 0 * ones)
            np.testing.assert_allclose(got, want, atol=1e-10)
        np.testing.assert_allclose([got.mean(), got.std()], [0.3, 0.6], atol=0.02)


def test_what_cannot_be_is_named():
    for field in ("ddim_velocity", "target_weights", "sampler"):
        with pytest.raises(ValueError, match=f"objective.{field}: 'x' is not one of"):
            imm(**{field: "x"})
    with pytest.raises(ValueError, match="objective.time_max: 1.0 must be above time_min 0.0"):
        imm(time_max=1.0)
    with pytest.raises(ValueError, match="objective.particles: groups of 3 do not divide"):
        imm(particles=3).draw(jax.random.key(0), batch_for())
