"""Runs of a small objective that reads latents and captions; they import no PyTorch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from regression import small_config

from jax_distill.objectives.objective import Method
from jax_distill.training import loop
from jax_distill.worlds.flux.world import Flux, ported_config

SIZE = (32, 48)  # pixels of the pictures


@dataclasses.dataclass(frozen=True)
class Reading(Method):
    """mean |x - sequence W - pooled V - noise|^2, of captions less the empty one."""

    def init_student(self, key, params):
        return {"network": params}

    def draw(self, key, batch):
        return jax.random.normal(key, batch.x.shape)

    def loss(self, params, view, batch, draws, step):
        network, text = params["network"], batch.text
        read = text.sequence.mean(1) @ network["sequence"] + text.pooled @ network["pooled"]
        absent = view.frozen["null"].pooled @ network["pooled"]
        return jnp.mean(jnp.square(batch.x - (read - absent)[:, None] - 0.1 * draws)), {}


def world_of(ported, **data):
    """FLUX's world of a ported folder, with settings of the section `data`."""
    config = ported_config(ported)
    with config.unlocked():
        config.data.update({"resolution": SIZE, **data})
        config.teacher.checkpoint = str(ported)
    return Flux(config)


def fit(source, workdir, **changes):
    """Trains on latents of 16 channels and captions; the parameters, and the losses."""
    kernels = {"sequence": jnp.ones((24, 16)) / 9, "pooled": jnp.ones((16, 16)) / 9}
    given = {"optimizer__schedule": "constant", "log_every": 1, "checkpoint__every": 3}
    config = small_config(**(given | {"total_steps": 6} | changes))
    extra = {"null": source.null}, source
    found = loop.fit(config, workdir, Reading(), kernels, *extra, embedder=source.embedder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)], losses(workdir)


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]
