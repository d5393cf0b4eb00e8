"""A small nonlinear network of average velocities, whose derivatives are easy to trust."""

import jax.numpy as jnp
import numpy as np

from jax_distill import flow
from jax_distill.flow import Network, Text

SHAPE = (8, 4, 3)
TEXT = Text(jnp.linspace(-1, 1, 8 * 2 * 5).reshape(8, 2, 5), jnp.zeros((8, 4)))
NULL = Text(jnp.full((1, 2, 5), 0.3), jnp.zeros((1, 4)))


def smooth_network() -> Network:
    """tanh(x W) cos 3t + gain x t + interval x / 2 + the caption's mean + guidance / 10."""

    def velocity(params, x, t, text=None, guidance=None, interval=None):
        out = jnp.tanh(x @ params["mix"]) * jnp.cos(3 * flow.per_sample(t, x))
        out = out + params["gain"] * x * flow.per_sample(t, x)
        if interval is not None:
            out = out + jnp.sin(flow.per_sample(interval, x)) * x / 2
        if text is not None:
            out = out + flow.per_sample(text.sequence.mean((1, 2)), x)
        if guidance is not None:
            out = out + flow.per_sample(guidance, x) / 10
        return out

    def embedding(params, t, text=None, guidance=None):
        return jnp.stack([t, t**2, jnp.ones_like(t)], -1) * params["gain"]

    return Network(velocity, embedding)


def smooth_params(seed: int = 2, dtype=np.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "mix": jnp.asarray(rng.standard_normal((3, 3)), dtype),
        "gain": jnp.asarray(0.7, dtype),
    }
