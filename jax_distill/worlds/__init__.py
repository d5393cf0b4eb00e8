"""Worlds: kinds of pictures and captions, with the networks that encode and decode them.

shapes/   captioned shapes; everything it needs is bundled with the package
flux/     FLUX: text encoders and autoencoder of a folder that `jax_distill.port` made

`world.py` is their interface. A configuration names its own as `world`, which only this file reads.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill.worlds.flux.world import Flux
from jax_distill.worlds.shapes.world import Shapes
from jax_distill.worlds.world import Source, World

__all__ = ["WORLDS", "Source", "World", "name", "of"]

WORLDS = {"shapes": Shapes, "flux": Flux}


def name(config: ConfigDict) -> str:
    """The name of a run's world; the first versions did not write it down."""
    return config.get("world", "shapes")


def of(config: ConfigDict, mesh: Mesh | None = None) -> World:
    """The world of a run; nothing is read from disk until it is needed.

    Args:
      config: of the run.
      mesh: where text encoders are placed that captions are drawn with; all devices by default.
    """
    return WORLDS[name(config)](config, mesh)
