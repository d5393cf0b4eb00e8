"""Averages and moments in bfloat16: the rounding, and that training follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import Regression, Source, frozen, parameters, small_config, student

from jax_distill import config as configuration
from jax_distill.training import loop, rounding
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.optimizer import make_optimizer
from jax_distill.training.step import init_state, make_optimizers

KEYS = jax.random.split(jax.random.key(0), 4096)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2.7e-20, 1e30, 1.0 + 2**-9])
def test_rounding_goes_to_a_neighbour_and_keeps_the_expected_value(value):
    value = jnp.float32(value)
    rounded = jax.vmap(lambda key: rounding.stochastic_round(key, value))(KEYS)
    found = np.unique(np.asarray(rounded, np.float64))
    step = 2.0 ** (np.floor(np.log2(abs(float(value)))) - 7)
    assert len(found) == 2 and np.isclose(found[1] - found[0], step)
    assert found[0] < float(value) < found[1]
    error = np.asarray(rounded, np.float64).mean() - float(value)
    assert abs(error) < 4 * 0.5 * step / np.sqrt(len(KEYS))


@pytest.mark.parametrize("value", [0.0, -1.0, 0.5, 3.0, np.inf, -np.inf, np.nan])
def test_what_bfloat16_has_stays(value):
    rounded = jax.vmap(lambda key: rounding.stochastic_round(key, jnp.float32(value)))(KEYS[:64])
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.float32(value))


def test_a_slow_average_follows_in_bfloat16_and_would_stand_still_rounded_to_nearest():
    target, decay, steps = jnp.ones(256), 0.999, 2000

    def move(average, key):
        moved = decay * rounding.widen(average) + (1 - decay) * target
        return rounding.narrow_as(key, moved, average), None

    def move_to_nearest(average, _):
        moved = decay * rounding.widen(average) + (1 - decay) * target
        return rounding.narrow(moved, "bfloat16"), None

    start = rounding.narrow(jnp.full(256, 0.5), "bfloat16")
    keys = jax.random.split(jax.random.key(1), steps)
    average = jax.lax.scan(move, start, keys)[0].astype(jnp.float32)
    expected = 1 - 0.5 * decay**steps
    assert abs(float(average.mean()) - expected) < 2e-3
    assert float(average.std()) < 0.02
    assert np.all(jax.lax.scan(move_to_nearest, start, keys)[0] == start)


def stacked():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    query = {"kernel": normal(3, 8, 8), "bias": normal(3, 8)}
    return {"blocks": {"query": query}, "image_in": {"kernel": normal(8, 8)}}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_take_half_the_memory_and_lead_as_far(name):
    """A quadratic: both precisions bring it down alike."""
    target, start = stacked(), jax.tree.map(jnp.zeros_like, stacked())

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target))))

    ends, sizes = {}, {}
    for moments in rounding.DTYPES:
        settings = configuration.base().optimizer
        with settings.unlocked():
            settings.update({"name": name, "learning_rate": 0.05, "moments": moments})
            settings.clip_norm = 1e9
        optimizer = make_optimizer(settings, 300)

        def advance(carry, _, optimizer=optimizer):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        state = optimizer.init(start)
        sizes[moments] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > 20)
        (params, state), _ = jax.jit(lambda c: jax.lax.scan(advance, c, None, 200))((start, state))  # noqa: B023
        ends[moments] = float(loss(params) / loss(start))
        if moments == "bfloat16" and name == "muon":
            coefficients = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
            assert [leaf.dtype for leaf in coefficients] == ["float32"]
    assert sizes["float32"] == 2 * sizes["bfloat16"] > 0
    assert ends["float32"] < 0.05 and ends["bfloat16"] < 2 * ends["float32"] + 0.01


NARROW = {"ema_dtype": "bfloat16", "optimizer__moments": "bfloat16"}


def fit(workdir, **changes):
    config = small_config(**NARROW, **changes)
    loop.fit(config, workdir, Regression(), parameters(), frozen(), Source())
    optimizers = make_optimizers(Regression(), config)
    like = init_state(Regression(), optimizers, parameters(), config.seed, config.ema_dtype)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore_latest(like)[1].state


def test_a_run_in_bfloat16_goes_on_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole")
    assert {leaf.dtype for leaf in jax.tree.leaves(student(whole).ema)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(student(whole).params)} == {jnp.dtype("float32")}
    half = fit(tmp_path / "half", total_steps=8, optimizer__schedule="constant")
    again = fit(tmp_path / "half", optimizer__schedule="constant")
    straight = fit(tmp_path / "straight", optimizer__schedule="constant")
    assert int(half.step) == 8 and int(again.step) == 12
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(straight), strict=True):
        assert a.dtype == b.dtype and bool(jnp.array_equal(a, b))
