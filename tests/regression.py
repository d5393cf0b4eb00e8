"""A training objective of one small matrix, its data and its configuration: compiles in no time."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill import config as configuration
from jax_distill.flow import Batch
from jax_distill.objectives.objective import STUDENT, Method

SHAPE = (4, 8)  # of one example


class Draws(NamedTuple):
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class Regression(Method):
    """mean |x W + b - noise_scale noise|^2; infinite at the steps in frozen["bad"]."""

    noise_scale: float = 1.0

    def init_student(self, key, params):
        return {"network": params, "head": 0.1 * jax.random.normal(key, (8,))}

    def draw(self, key, batch):
        return Draws(jax.random.normal(key, batch.x.shape))

    def loss(self, params, view, batch, draws, step):
        network = params["network"]
        out = batch.x @ network["kernel"] * params["head"] + network["bias"]
        factor = jnp.where(jnp.any(view.frozen["bad"] == step + 1), jnp.inf, 1.0)
        loss = factor * jnp.mean(jnp.square(out - self.noise_scale * draws.noise))
        return loss, {"noise_mean": jnp.mean(draws.noise)}


class Source:
    """Normal numbers, given by their index."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        rng = np.random.default_rng(int(index))
        return Batch(rng.standard_normal(SHAPE).astype(np.float32))


def parameters():
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((8, 8)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(8)}


def student(state):
    return state.players[STUDENT]


def frozen(*bad):
    return {"bad": jnp.array([*bad, *[0] * (4 - len(bad))])}


def small_config(**changes):
    """Twelve steps, logged every third, saved every fourth; keys of changes have __ for dots."""
    config = configuration.base()
    config.name = "regression"
    config.total_steps, config.batch_size, config.log_every = 12, 4, 3
    config.checkpoint.every, config.checkpoint.keep = 4, 2
    config.optimizer.schedule, config.optimizer.warmup_steps = "cosine", 2
    config.optimizer.weight_decay = 0.01
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(changes)
    return config.lock()
