"""Time rescale: the refit follows the old embedder, and the comparison measures what it says."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill import flow
from jax_distill.flow import Batch, GaussianOracle, Network, Text
from jax_distill.models import mmdit
from jax_distill.objectives import teacher
from jax_distill.objectives.objective import View
from jax_distill.objectives.time_rescale import TimeRescale, compare, refit_time_embedder

CONFIG = mmdit.MMDiTConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=4,
    axes_dims_rope=(4, 6, 6),
    time_scale=1.0,
)


def smooth_embedding(t: np.ndarray) -> np.ndarray:
    """(M, 64): curves that bend over distances of a tenth or more."""
    rng = np.random.default_rng(0)
    frequency, phase = rng.uniform(0.5, 6, 64), rng.uniform(0, 6, 64)
    return np.sin(np.asarray(t)[:, None] * frequency + phase)


def test_refit_follows_a_smooth_embedder_and_its_slope():
    params = refit_time_embedder(smooth_embedding, CONFIG.hidden_size)
    t = jnp.asarray(np.random.default_rng(1).uniform(0, 1, 500), jnp.float32)

    def refitted(t):
        return mmdit.time_embedding(CONFIG, params, t)

    value, slope = jax.jvp(refitted, (t,), (jnp.ones_like(t),))
    with jax.enable_x64(True):
        t64 = np.asarray(t, np.float64)
        want = smooth_embedding(t64)
        want_slope = (smooth_embedding(t64 + 1e-5) - smooth_embedding(t64 - 1e-5)) / 2e-5
    np.testing.assert_allclose(value, want, atol=5e-3)
    interior = (t > 0.05) & (t < 0.95)
    np.testing.assert_allclose(slope[interior], want_slope[interior], atol=0.3)


def test_refit_leaves_out_what_wiggles_faster_than_its_ramps_bend():
    """A fast ripple on a smooth embedder costs the old one a large slope, and the new one none."""

    def rippled(t):
        return smooth_embedding(t) + 0.05 * np.sin(1000 * np.asarray(t))[:, None]

    params = refit_time_embedder(rippled, CONFIG.hidden_size)
    t = jnp.linspace(0.05, 0.95, 400)
    value, slope = jax.jvp(
        lambda t: mmdit.time_embedding(CONFIG, params, t), (t,), (jnp.ones_like(t),)
    )
    np.testing.assert_allclose(value, smooth_embedding(t), atol=0.03)
    assert float(jnp.abs(slope).max()) < 12  # the ripple's own slope is 50, the curves' at most 6


def test_velocity_matching_is_zero_exactly_at_the_teacher():
    network = GaussianOracle.network()
    objective = TimeRescale(network, teacher.embedded_guidance(network))
    batch = Batch(jax.random.normal(jax.random.key(0), (4, 3, 2)), Text(None, None))
    draws = objective.draw(jax.random.key(1), batch)
    same, other = GaussianOracle(0.1, 0.9), GaussianOracle(0.4, 0.9)

    def loss(student):
        return objective.loss({"network": student}, View({"teacher": same}), batch, draws, 0)

    assert loss(same)[0] == 0
    value, metrics = loss(other)
    assert value > 0
    x_t = flow.interpolate(batch.x, draws.noise, draws.t)
    old, new = same.velocity(x_t, draws.t), other.velocity(x_t, draws.t)
    want = jnp.sqrt(jnp.mean((new - old) ** 2) / jnp.mean(old**2))
    np.testing.assert_allclose(metrics["relative_velocity_error"], want, rtol=1e-6)


def test_draws_are_guidance_scales_and_times_of_the_whole_interval():
    objective = TimeRescale(Network(None, None), None, guidance_scales=(2.0, 3.0))
    draws = objective.draw(jax.random.key(0), Batch(jnp.zeros((4000, 1, 1))))
    assert set(np.unique(draws.guidance)) == {2.0, 3.0}
    np.testing.assert_allclose(np.quantile(draws.t, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_compare_measures_error_and_time_derivatives():
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    t = jnp.linspace(0.1, 0.9, 5)

    def old(x, t):
        return 2 * x + 0 * flow.per_sample(t, x)

    def new(x, t):
        return 2 * x + 3 * flow.per_sample(t, x)

    result = compare(new, old, x, t)
    np.testing.assert_allclose(result.time_derivative, 3, rtol=1e-6)
    np.testing.assert_allclose(result.old_time_derivative, 0, atol=1e-7)
    want = jnp.sqrt(jnp.mean((3 * t) ** 2) / jnp.mean((2 * x) ** 2))
    np.testing.assert_allclose(result.velocity_error, want, rtol=1e-6)
