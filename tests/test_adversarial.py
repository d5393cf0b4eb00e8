"""Heads read grids; GAN losses, their penalty and f-distill's weights are their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_distill.devices import sharding
from jax_distill.models import heads
from jax_distill.objectives import adversarial

HIDDEN, POOLED, BLOCKS = 16, 5, (0, 2)


def head_inputs(grid, rows=4):
    keys = jax.random.split(jax.random.key(1), 3)
    features = tuple(
        jax.random.normal(key, (rows, grid[0] * grid[1], HIDDEN)) for key in keys[: len(BLOCKS)]
    )
    return (
        features,
        BLOCKS,
        grid,
        jnp.linspace(0.1, 0.9, rows),
        jax.random.normal(keys[2], (rows, POOLED)),
    )


@pytest.fixture(scope="module", params=["conv", "projected"])
def made(request):
    pooled = POOLED if request.param == "projected" else None
    return request.param, heads.init_heads(jax.random.key(0), BLOCKS, HIDDEN, 8, pooled)


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (1, 1), (3, 5)])
def test_heads_take_grids_of_any_shape(made, grid):
    kind, params = made
    found = heads.logits(params, *head_inputs(grid))
    assert found.shape == (4, len(BLOCKS) * (1 if kind == "conv" else grid[0] * grid[1]))
    assert np.all(np.isfinite(found)) and np.std(found) > 0


def test_a_grid_that_is_not_the_tokens_is_refused(made):
    features, blocks, _, *rest = head_inputs((4, 4))
    for grid in ((3, 5), None):
        with pytest.raises(ValueError, match="^grid: 16 tokens do not lie on a grid of"):
            heads.logits(made[1], features, blocks, grid, *rest)


def test_heads_know_rows_from_columns(made):
    """The same tokens look otherwise on another grid, and in another order."""
    features, blocks, grid, *rest = head_inputs((2, 6))
    logits = heads.logits(made[1], features, blocks, grid, *rest)
    other = heads.logits(made[1], features, blocks, (6, 2), *rest)
    assert np.abs(logits - other).max() > 1e-3
    mixed = tuple(jnp.roll(f, 1, 1) for f in features)
    assert abs(jnp.mean(logits - heads.logits(made[1], mixed, blocks, grid, *rest))) > 1e-5


def test_heads_are_independent_of_each_other(made):
    """Each reads its own block; which others there are does not matter to it."""
    kind, params = made
    features, blocks, grid, *rest = head_inputs((4, 4))
    both = heads.logits(params, features, blocks, grid, *rest)
    one = heads.logits({"block_2": params["block_2"]}, features[1:], (2,), grid, *rest)
    np.testing.assert_allclose(both[:, -one.shape[1] :], one, rtol=1e-6)
    alone = heads.init_heads(
        jax.random.key(0), (2,), HIDDEN, 8, POOLED if kind == "projected" else None
    )
    jax.tree.map(np.testing.assert_array_equal, alone["block_2"], params["block_2"])


def test_projected_heads_alone_see_time_and_caption(made):
    kind, params = made
    features, blocks, grid, t, pooled = head_inputs((4, 4))
    logits = heads.logits(params, features, blocks, grid, t, pooled)
    for changed in ((t + 0.05, pooled), (t, pooled + 0.5)):
        other = heads.logits(params, features, blocks, grid, *changed)
        assert np.array_equal(logits, other) == (kind == "conv")


@pytest.mark.parametrize("kind", ["conv", "projected"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_heads_are_divided_over_any_mesh(kind, sizes):
    """Kernels along what they read over fsdp, along what they make over tensor."""
    mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    shapes = jax.eval_shape(
        lambda: heads.init_heads(
            jax.random.key(0), BLOCKS, 64, 32, 16 if kind == "projected" else None
        )
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path({"heads": shapes}):
        name = "/".join(key.key for key in path)
        spec = sharding.parameter_spec(name, leaf.shape, mesh)
        if name.endswith("conv/kernel"):
            assert tuple(spec) == (None, None, "fsdp", "tensor")
        if not name.endswith("kernel"):
            assert not any(spec)


# Losses.

LOGITS = jnp.array([[-3.0, 0.5], [0.0, 2.0]])


def test_losses_are_their_formulas():
    real, fake = LOGITS, 1 - LOGITS.T

    def log1p(x):
        return np.log1p(np.exp(x)).mean()

    np.testing.assert_allclose(adversarial.generator_loss(fake), log1p(-fake), rtol=1e-6)
    np.testing.assert_allclose(
        adversarial.discriminator_loss(real, fake), log1p(-real) + log1p(fake), rtol=1e-6
    )
    assert adversarial.generator_loss(fake, "hinge") == -jnp.mean(fake)
    # max(1 - real, 0): 4, 0.5, 1, 0; max(1 + fake, 0): 5, 2, 1.5, 0.
    assert adversarial.discriminator_loss(real, fake, "hinge") == pytest.approx((5.5 + 8.5) / 4)


@pytest.mark.parametrize("kind", adversarial.GAN_LOSSES)
def test_gradients_pull_real_up_and_fake_down_and_the_student_against_them(kind):
    real, fake = 0.4 * LOGITS, -0.3 * LOGITS
    of_real, of_fake = jax.grad(adversarial.discriminator_loss, (0, 1))(real, fake, kind)
    of_student = jax.grad(adversarial.generator_loss)(fake, kind)
    if kind == "softplus":
        np.testing.assert_allclose(of_real, -jax.nn.sigmoid(-real) / 4, rtol=1e-5)
        np.testing.assert_allclose(of_fake, jax.nn.sigmoid(fake) / 4, rtol=1e-5)
        np.testing.assert_allclose(of_student, -jax.nn.sigmoid(-fake) / 4, rtol=1e-5)
    else:
        np.testing.assert_allclose(of_real, (real < 1) / -4)
        np.testing.assert_allclose(of_fake, (fake > -1) / 4)
        np.testing.assert_allclose(of_student, -0.25)


def test_the_penalty_is_the_square_of_the_gradient():
    """Zero for constant logits; a^2 |w|^2 in the mean for l = x w."""
    x, a = jax.random.normal(jax.random.key(0), (200_000, 3)), 0.1
    noise = jax.random.normal(jax.random.key(1), x.shape)
    w = jnp.array([[1.0], [-2.0], [0.5]])
    moved = adversarial.perturbed_input(jnp.zeros_like(x), x, noise, a)
    found = adversarial.approximate_r1(x @ w, moved @ w)
    assert found == pytest.approx(a**2 * float(jnp.sum(w**2)), rel=0.02)
    assert adversarial.approximate_r1(jnp.ones((4, 2)), jnp.ones((4, 2))) == 0


def test_what_is_perturbed_is_the_noised_input_or_in_fastgens_form_the_data():
    x, x_t, noise = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([[1.0, -1.0]])
    noised, clean = (
        adversarial.perturbed_input(x, x_t, noise, 0.5, w) for w in ("noised", "clean")
    )
    np.testing.assert_array_equal(noised, [[0.5, -0.5]])
    np.testing.assert_array_equal(clean, [[1.5, 0.5]])


# f-distill.

F = {
    "js": lambda r: r * jnp.log(r) - (r + 1) * jnp.log((r + 1) / 2),
    "reverse_kl": lambda r: -jnp.log(r),
    "forward_kl": lambda r: r * jnp.log(r),
    "softened_reverse_kl": lambda r: (r + 1) * jnp.log((1 + 1 / r) / 2),
    "neyman": lambda r: (1 - r) ** 2 / (2 * r),
    "squared_hellinger": lambda r: 2 * (1 - jnp.sqrt(r)) ** 2,
    "jeffreys": lambda r: (r - 1) * jnp.log(r),
}
"""The generators of the divergences, as integrals of fake f(real / fake)."""


@pytest.mark.parametrize("name", adversarial.DIVERGENCES)
def test_weights_follow_from_their_divergence(name):
    with jax.enable_x64(True):
        r = jnp.exp(jnp.linspace(-2.3, 3.0, 50))
        expected = r**2 * jax.vmap(jax.grad(jax.grad(F[name])))(r)
        found = adversarial.DIVERGENCES[name](r)
        np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_ratio_is_bounded():
    logits = jnp.array([[-50.0, -50.0], [0.2, 0.6], [50.0, 50.0]])
    np.testing.assert_allclose(
        adversarial.density_ratio(logits), [0.1, math.exp(0.4), 20.0], rtol=1e-6
    )
    unbounded = adversarial.density_ratio(logits, 0.0, 1e9)
    np.testing.assert_allclose(unbounded, np.exp([-10, 0.4, 10]), rtol=1e-5)


def test_weights_are_by_ratios_relative_to_their_time_bin():
    t = jnp.array([0.0, 0.05, 0.51, 0.55, 0.95, 1.0])
    logits = jnp.log(jnp.array([1.0, 3.0, 0.5, 0.5, 2.0, 8.0]))[:, None]
    relative = jnp.array([0.5, 1.5, 1.0, 1.0, 0.4, 1.6])
    found = adversarial.divergence_weights(logits, t, "forward_kl", time_min=0.0, time_max=1.0)
    np.testing.assert_allclose(found, relative / relative.mean(), rtol=1e-5)
    plain = adversarial.divergence_weights(logits, t, "forward_kl", bins=0)
    np.testing.assert_allclose(plain, jnp.exp(logits[:, 0]) / 2.5, rtol=1e-5)
    assert jnp.mean(found) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        adversarial.divergence_weights(logits, t, "reverse_kl"), 1, rtol=1e-5
    )
    gradient = jax.grad(lambda x: jnp.sum(adversarial.divergence_weights(x, t)))(logits)
    assert not np.any(gradient)
