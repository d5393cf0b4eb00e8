"""Optimizers: schedules at their corners, clipping, and what muon touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_distill import config as configuration
from jax_distill.config import ConfigError
from jax_distill.training.optimizer import learning_rate, make_optimizer

PEAK = 0.5


def settings(**changes):
    config = configuration.base().optimizer
    config.update(
        {
            "learning_rate": PEAK,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "clip_norm": 1e9,
            **changes,
        }
    )
    return config


def rates(total=100, **changes):
    schedule = learning_rate(settings(**changes), total)
    return np.array([schedule(step) for step in range(total + 1)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "trapezoid"])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    np.testing.assert_allclose(
        rates(schedule=schedule)[:11], PEAK * np.arange(11) / 10, rtol=1e-6, atol=1e-9
    )


def test_what_follows_the_warm_up():
    np.testing.assert_allclose(rates(schedule="constant")[10:], PEAK)
    cosine = PEAK * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(rates(schedule="cosine")[10:], cosine, atol=1e-7)
    trapezoid = rates(schedule="trapezoid", decay_share=0.3)
    np.testing.assert_allclose(trapezoid[10:71], PEAK, rtol=1e-6)
    np.testing.assert_allclose(trapezoid[70:], PEAK * np.arange(30, -1, -1) / 30, atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
@pytest.mark.parametrize(
    ("total", "warmup", "share"), [(1, 0, 0.3), (5, 200, 0.3), (20, 15, 1.0), (20, 0, 0.0)]
)
def test_short_runs_have_finite_rates_that_end_in_zero(schedule, total, warmup, share):
    found = rates(total, schedule=schedule, warmup_steps=warmup, decay_share=share)
    assert np.all(np.isfinite(found)) and np.all(found >= -1e-9) and np.all(found <= PEAK + 1e-7)
    if warmup < total:
        assert abs(found[total]) < 1e-7


def test_a_trapezoid_can_be_made_longer_before_it_falls():
    """Two lengths agree, step for step, until the shorter one falls."""
    short, long = rates(100, schedule="trapezoid"), rates(200, schedule="trapezoid")
    np.testing.assert_array_equal(short[:70], long[:70])


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="optimizer.schedule: 'step' is not one of constant"):
        learning_rate(settings(schedule="step"), 10)
    with pytest.raises(ConfigError, match="optimizer.name: 'sgd' is not one of adamw, muon"):
        make_optimizer(settings(name="sgd"), 10)


def tree():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    return {
        "image_in": {"kernel": normal(6, 4), "bias": normal(4)},
        "blocks": {
            "query": {"kernel": normal(3, 8, 6), "bias": normal(3, 6)},
            "scale": normal(3, 4),
        },
        "stacked_bias_of_rank_three": {"bias": normal(3, 8, 6)},
    }


def updates(gradient, **changes):
    optimizer = make_optimizer(settings(warmup_steps=0, schedule="constant", **changes), 10)
    return optimizer.update(gradient, optimizer.init(tree()), tree())[0]


def test_muon_orthogonalises_stacked_kernels_and_nothing_else():
    gradient = tree()
    muon = updates(gradient, name="muon", adam_share=0.4)
    nadam = optax.nadamw(0.4 * PEAK, weight_decay=0.0)
    adam = nadam.update(gradient, nadam.init(tree()), tree())[0]
    changed = muon["blocks"]["query"].pop("kernel")
    adam["blocks"]["query"].pop("kernel")
    for ours, theirs in zip(jax.tree.leaves(muon), jax.tree.leaves(adam)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # Each layer's update is near orthogonal, with the root mean square 0.2 of an AdamW step.
    for layer in changed:
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2
        assert 0.15 * PEAK < np.sqrt(np.mean(np.square(layer))) < 0.25 * PEAK


def test_muon_treats_layers_one_by_one():
    gradient = tree()
    alone = updates(gradient, name="muon")["blocks"]["query"]["kernel"]
    kernel = gradient["blocks"]["query"]["kernel"]
    gradient["blocks"]["query"]["kernel"] = kernel.at[1].multiply(-1)
    flipped = updates(gradient, name="muon")["blocks"]["query"]["kernel"]
    np.testing.assert_allclose(flipped[jnp.array([0, 2])], alone[jnp.array([0, 2])], atol=1e-5)
    np.testing.assert_allclose(flipped[1], -alone[1], atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_global_norm(name):
    """Beyond the limit, the scale of the gradient does not matter; below, clipping does nothing."""
    options = {"name": name, "epsilon": 1.0}  # with which the update knows the scale
    gradient = tree()
    scaled = jax.tree.map(lambda leaf: 100 * leaf, gradient)
    for a, b in zip(
        jax.tree.leaves(updates(gradient, clip_norm=0.1, **options)),
        jax.tree.leaves(updates(scaled, clip_norm=0.1, **options)),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    kept, free = (updates(gradient, clip_norm=norm, **options) for norm in (1e3, 1e9))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(free)))
    clipped = updates(gradient, clip_norm=0.1, **options)["image_in"]["kernel"]
    assert not np.allclose(clipped, free["image_in"]["kernel"], rtol=1e-2)


def test_weight_decay_pulls_towards_zero():
    zero = jax.tree.map(jnp.zeros_like, tree())
    for leaf, update in zip(
        jax.tree.leaves(tree()), jax.tree.leaves(updates(zero, weight_decay=0.1))
    ):
        np.testing.assert_allclose(update, -PEAK * 0.1 * leaf, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_and_the_others_do_not_notice(name):
    gradient = tree()
    options = {"name": name, "weight_decay": 0.1, "clip_norm": 1e9}
    free, some = updates(gradient, **options), updates(gradient, frozen="query|scale", **options)
    assert not any(map(np.any, jax.tree.leaves(some.pop("blocks"))))
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves({k: free[k] for k in some})):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_of_frozen_parameters_does_not_count_in_the_clip():
    gradient = tree()
    large = {**gradient, "image_in": jax.tree.map(lambda leaf: 1e6 * leaf, gradient["image_in"])}
    options = {"frozen": "image_in", "clip_norm": 0.1, "epsilon": 1.0}
    a, b = (updates(g, **options)["blocks"] for g in (gradient, large))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_wrong_pattern_is_named():
    with pytest.raises(ConfigError, match="optimizer.frozen: '\\[' is no pattern"):
        make_optimizer(settings(frozen="["), 10)
    with pytest.raises(ConfigError, match="optimizer.frozen: 'tmie' matches no parameter"):
        updates(tree(), frozen="tmie")
