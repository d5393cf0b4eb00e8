"""How near a rescaled network is to its teacher, and how smooth in time."""

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from jax_distill import flow, streams
from jax_distill.assembly import build
from jax_distill.data.damaged import good, share_of
from jax_distill.devices import sharding
from jax_distill.objectives import time_rescale
from jax_distill.pipeline import Pipeline
from jax_distill.worlds import Source


def compare(
    config: ConfigDict,
    teacher: Pipeline,
    networks: dict[str, dict],
    source: Source,
) -> dict[str, dict[str, float]]:
    """Compares networks with their teacher on noised data, see `time_rescale.compare`.

    Args:
      config: of the stage that rescales.
      teacher: whose velocity they are to have.
      networks: parameters by name, such as "refitted".
      source: the data, of which about 64 examples are taken.
    """
    # About 64 pictures, no more on a device than a step of training has there.
    mesh = sharding.make_mesh(config.mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    most = config.batch_size // config.accumulate
    count = min(most, len(source) // devices * devices, max(devices, 64 // devices * devices))
    share = share_of(config.data)
    rows = [good(source, index, share) for index in range(count)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    t = jnp.linspace(0.01, 0.99, count)
    noise = jax.random.normal(streams.key(config.seed), batch.x.shape)
    guidance = jnp.full(count, config.evaluation.guidance)
    split = NamedSharding(mesh, sharding.BATCH)
    batch, *points = sharding.put((batch, noise, t, guidance), split)
    if source.embedder is not None:
        (batch,) = source.embedder.embed([batch])
    held = {"teacher": teacher.params["network"], "null": source.null}
    old = build.teacher_velocity(teacher.config, teacher.world.resolution)
    network = build.network(config)

    @jax.jit
    def measure(params, frozen, batch, noise, t, guidance):
        return time_rescale.compare(
            lambda x, t: network.velocity(params, x, t, batch.text, guidance),
            lambda x, t: old(frozen, x, t, batch.text, guidance),
            flow.interpolate(batch.x, noise, t),
            t,
        )

    stage_values = {}
    for name, params in networks.items():
        measured = measure(params, held, batch, *points)
        values = {key: float(value) for key, value in measured._asdict().items()}
        stage_values[name] = values
        logging.info(
            "time rescale, %s: relative velocity error %.3f, rms d(net)/dt %.3g (teacher's %.3g)",
            name,
            values["velocity_error"],
            values["time_derivative"],
            values["old_time_derivative"],
        )
    return stage_values
