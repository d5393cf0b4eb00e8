"""Flow matching, caption dropout, and the two ways of asking a teacher for its velocity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill import flow
from jax_distill.flow import Batch, GaussianOracle, Network, Text
from jax_distill.objectives import teacher
from jax_distill.objectives.flow_matching import FlowMatching
from jax_distill.objectives.objective import View, drop_text

NULL = Text(jnp.full((1, 2, 3), -1.0), jnp.full((1, 4), -1.0))
TEXT = Text(jnp.ones((5, 2, 3)), jnp.arange(20.0).reshape(5, 4))


def reads_text() -> Network:
    """v = x * params + the caption's mean: shows which caption and which guidance came in."""

    def velocity(params, x, t, text, guidance=None, interval=None):
        shift = text.sequence.mean((1, 2)) + text.pooled.mean(1)
        shift = shift if guidance is None else shift + 100 * guidance
        return params * x + flow.per_sample(shift, x) + flow.per_sample(t, x)

    return Network(velocity, None)


def test_dropped_captions_become_the_null_caption():
    dropped = jnp.array([True, False, False, True, False])
    text = drop_text(TEXT, NULL, dropped)
    for full, empty, got in zip(TEXT, NULL, text, strict=True):
        for row in range(5):
            np.testing.assert_array_equal(got[row], empty[0] if dropped[row] else full[row])


def test_loss_is_the_mean_square_against_noise_minus_data():
    network = reads_text()
    objective = FlowMatching(network, teacher.classifier_free, drop_rate=0.5)
    batch = Batch(jax.random.normal(jax.random.key(0), (5, 4, 2)), TEXT)
    draws = objective.draw(jax.random.key(1), batch)
    assert 0 < draws.dropped.sum() < 5
    loss, _ = objective.loss({"network": 0.3}, View({"null": NULL}), batch, draws, 0)
    t = np.asarray(draws.t)[:, None, None]
    x_t = (1 - t) * batch.x + t * draws.noise
    caption = [NULL if drop else TEXT for drop in draws.dropped]
    shift = [
        float(c.sequence[i % len(c.sequence)].mean() + c.pooled[i % len(c.pooled)].mean())
        for i, c in enumerate(caption)
    ]
    error = 0.3 * x_t + np.array(shift)[:, None, None] + t - (draws.noise - batch.x)
    np.testing.assert_allclose(loss, np.mean(error**2), rtol=1e-5)


def test_the_marginal_velocity_minimises_the_loss():
    """On Gaussian data the oracle's parameters are a stationary point of the expected loss."""
    oracle = GaussianOracle(jnp.float32(0.4), jnp.float32(0.7))
    objective = FlowMatching(GaussianOracle.network(), teacher.classifier_free, drop_rate=0.0)
    key_x, key_draw = jax.random.split(jax.random.key(0))
    x = oracle.mean + oracle.std * jax.random.normal(key_x, (20_000, 4, 1))
    batch = Batch(x, Text(jnp.zeros((20_000, 1, 1)), jnp.zeros((20_000, 1))))
    draws = objective.draw(key_draw, batch)

    @jax.jit
    @jax.grad
    def slope(params):
        return objective.loss({"network": params}, View({"null": batch.text}), batch, draws, 0)[0]

    at, away = slope(oracle), slope(GaussianOracle(jnp.float32(0.6), jnp.float32(0.9)))
    assert abs(at.mean) < 0.03 < away.mean
    assert abs(at.std) < 0.03 < away.std


def test_times_follow_the_logit_normal():
    objective = FlowMatching(reads_text(), teacher.classifier_free, time_mean=0.5, time_std=1.0)
    draws = objective.draw(jax.random.key(0), Batch(jnp.zeros((20_000, 1, 1)), TEXT))
    quantiles = np.quantile(draws.t, [0.1587, 0.5, 0.8413])
    np.testing.assert_allclose(quantiles, jax.nn.sigmoid(jnp.array([-0.5, 0.5, 1.5])), atol=0.01)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_classifier_free_guidance_extrapolates_from_null_to_caption(scale):
    network = reads_text()
    x, t = jax.random.normal(jax.random.key(0), (5, 4, 2)), jnp.linspace(0, 1, 5)
    velocity = teacher.classifier_free(network)
    got = velocity({"teacher": 0.3, "null": NULL}, x, t, TEXT, jnp.full(5, scale))
    empty = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, TEXT)
    conditional, null = (network.velocity(0.3, x, t, text) for text in (TEXT, empty))
    np.testing.assert_allclose(got, null + scale * (conditional - null), rtol=1e-5, atol=1e-5)


def test_embedded_guidance_is_an_input_of_the_teacher():
    network = reads_text()
    x, t, scale = jnp.zeros((5, 4, 2)), jnp.zeros(5), jnp.arange(5.0)
    got = teacher.embedded_guidance(network)({"teacher": 0.3}, x, t, TEXT, scale)
    np.testing.assert_array_equal(got, network.velocity(0.3, x, t, TEXT, scale))


def test_sampling_integrates_the_guided_velocity_to_the_oracles_data():
    oracle = GaussianOracle(0.3, 0.8)
    objective = FlowMatching(
        GaussianOracle.network(), teacher.classifier_free(GaussianOracle.network()), solver="heun"
    )
    noise = jax.random.normal(jax.random.key(0), (5, 4, 2))
    data = objective.sample({"network": oracle}, noise, TEXT, NULL, jnp.full(5, 3.0), None, 40)
    want = oracle.flow_map(noise, jnp.ones(5), jnp.zeros(5))
    np.testing.assert_allclose(data, want, atol=2e-3)
