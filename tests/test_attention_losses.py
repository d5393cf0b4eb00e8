"""The gradient of a whole loss is that of plain attention, whichever implementation computes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_distill.flow import Batch, Text
from jax_distill.models import mmdit
from jax_distill.objectives.objective import View
from jax_distill.objectives.scm import SCM
from jax_distill.objectives.teacher import embedded_guidance

CONFIG = mmdit.MMDiTConfig(
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=64,
    num_attention_heads=1,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    guidance_embeds=True,
    interval_embeds=True,
    axes_dims_rope=(16, 24, 24),
    time_scale=1.0,
    remat="full",
    attention="xla",
)


def random_parameters():
    """No zeros, so that every layer matters."""
    params = mmdit.initial_parameters(CONFIG, nnx.Rngs(0))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(structure, moved)


def gradients(attention, params):
    """Of sCM's loss, and of MeanFlow's (Geng et al., arXiv:2505.13447, eq. 9 and 10)."""
    network = mmdit.as_network(dataclasses.replace(CONFIG, attention=attention))
    rng = np.random.default_rng(1)
    x, noise = (jnp.asarray(rng.standard_normal((2, 4, 4)), jnp.float32) for _ in "xe")
    text = Text(
        jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32),
        jnp.asarray(rng.standard_normal((2, 5)), jnp.float32),
    )
    objective = SCM(network, embedded_guidance(network), weighting="sum", tangent_warmup=0)
    batch = Batch(x, text)
    draws = objective.draw(jax.random.key(0), batch)

    def scm(params):
        view = View({"teacher": params})
        return objective.loss({"network": params}, view, batch, draws, jnp.asarray(5))[0]

    def mean_flow(params):
        t, s = jnp.asarray([0.9, 0.5]), jnp.asarray([0.2, 0.1])
        x_t = (1 - t[:, None, None]) * x + t[:, None, None] * noise

        def average_velocity(x_t, t, s):
            return network.velocity(params, x_t, t, text, draws.guidance, t - s)

        tangents = (noise - x, jnp.ones_like(t), jnp.zeros_like(s))
        velocity, along = jax.jvp(average_velocity, (x_t, t, s), tangents)
        target = noise - x - (t - s)[:, None, None] * along
        return jnp.mean(jnp.square(velocity - jax.lax.stop_gradient(target)))

    return jax.jit(lambda p: (jax.grad(scm)(p), jax.grad(mean_flow)(p)))(params)


@pytest.fixture(scope="module")
def params():
    return random_parameters()


@pytest.fixture(scope="module")
def expected(params):
    return gradients("xla", params)


@pytest.mark.parametrize("attention", ["blocked", "pallas_tpu", "pallas_gpu"])
def test_gradients_are_those_of_plain_attention(attention, params, expected):
    for found, reference in zip(gradients(attention, params), expected):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(reference))
        error = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), found, reference)
        assert size > 0 and max(jax.tree.leaves(error)) <= 1e-5 * size


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="attention: 'flash' is not one of auto, xla, blocked"):
        dataclasses.replace(CONFIG, attention="flash")
