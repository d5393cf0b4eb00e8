"""An embedder of a scalar, and the one of the scalar times another factor, are one function."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_distill.interop import time_scale
from jax_distill.models.mmdit import scalar_embedding
from jax_distill.objectives.time_rescale import refit_time_embedder

X = np.random.default_rng(1).uniform(size=64).astype(np.float32)


def random_embedder(dtype=np.float32, hidden=32):
    rng = np.random.default_rng(0)
    return {
        f"linear_{number}": {
            "kernel": (rng.standard_normal((inputs, hidden)) * inputs**-0.5).astype(dtype),
            "bias": rng.standard_normal(hidden).astype(dtype),
        }
        for number, inputs in ((1, 256), (2, hidden))
    }


def embed(embedder, factor, x):
    embedder = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), embedder)
    return np.asarray(scalar_embedding(embedder, jnp.asarray(factor * x, jnp.float32)))


def difference(first, factor, second, other, x):
    """The largest, relative to the variation of the first."""
    values = embed(first, factor, x), embed(second, other, x)
    return np.abs(values[0] - values[1]).max() / values[0].std(axis=0).mean()


@pytest.mark.parametrize("upper", [1.0, 10.0])  # of times, and of guidance scales
def test_any_embedder_of_x_is_one_of_1000_x(upper):
    old = random_embedder()
    new = time_scale.refit(old, 1.0, 1000.0, upper)
    assert difference(old, 1.0, new.embedder, 1000.0, upper * X) < 2e-4
    assert new.residual < 2e-4
    np.testing.assert_array_equal(
        new.embedder["linear_2"]["kernel"], old["linear_2"]["kernel"]
    )  # the first layer alone changes


def test_what_the_rescale_refits_comes_back():
    """Its ramps are steep: they show the rounding of the time, and are made no steeper."""
    old = random_embedder()
    rescaled = refit_time_embedder(lambda t: scalar_embedding(old, 1000.0 * t), 32)
    new = time_scale.refit(rescaled, 1.0, 1000.0)
    assert difference(rescaled, 1.0, new.embedder, 1000.0, X) < 2e-3
    assert np.abs(new.embedder["linear_1"]["kernel"]).max() <= 20 * (1 + 1e-6)


def test_the_residual_tells_what_is_lost():
    old = random_embedder()
    new = time_scale.refit(old, 1000.0, 1.0)  # t has no features that fast
    assert new.residual > 0.1
    assert new.residual >= difference(old, 1000.0, new.embedder, 1.0, X) * 0.5


def test_narrow_parameters_lose_nothing():
    old = random_embedder(ml_dtypes.bfloat16)
    new = time_scale.refit(old, 1.0, 1000.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.embedder)} == {np.dtype(np.float32)}
    assert difference(old, 1.0, new.embedder, 1000.0, X) < 2e-4


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_the_same_factor_changes_nothing(factor):
    old = random_embedder()
    assert time_scale.refit(old, factor, factor).residual < 1e-5


@pytest.mark.parametrize(("hidden", "step"), [(32, 0.5), (256, 0.05)])
def test_an_embedder_of_w_is_any_of_1000_w_at_round_values(hidden, step):
    old = random_embedder(hidden=hidden)
    new = time_scale.interpolate(old, 1000.0, 1.0, 10.0)
    assert new.step == pytest.approx(step)
    scales = np.arange(round(10 / step) + 1, dtype=np.float32) * step
    found = difference(old, 1000.0, new.embedder, 1.0, scales)
    print(f"{hidden} units: {found:.1e} at multiples of {step}, {new.between:.1e} in between")
    assert found < 2e-3 and new.residual < 2e-3
    # In between it goes straight, or nearly: it is no further away than its neighbours are.
    middle = embed(new.embedder, 1.0, scales[:-1] + step / 2)
    ends = embed(new.embedder, 1.0, scales)
    straight, jump = (ends[1:] + ends[:-1]) / 2, np.abs(np.diff(ends, axis=0))
    assert np.abs(middle - straight).max() < jump.max()
    assert new.between > 1  # a random one turns a thousand times as fast


def test_a_smooth_embedder_is_kept_in_between_too():
    old = random_embedder()
    slow = np.tile(np.arange(128) > 112, 2)[:, None]  # which turn by 3 or less over [0, 10]
    old["linear_1"]["kernel"] = np.where(slow, old["linear_1"]["kernel"], 0)
    new = time_scale.interpolate(old, 1000.0, 1.0, 10.0)
    assert new.residual < 1e-3 and new.between < 0.15


def test_an_embedder_that_adds_nothing_stays_so():
    old = random_embedder()
    old["linear_2"] = jax.tree.map(np.zeros_like, old["linear_2"])
    new = time_scale.interpolate(old, 1000.0, 1.0, 10.0)
    assert not embed(new.embedder, 1.0, 10 * X).any() and new.residual == new.between == 0
