"""Worlds: what pictures and captions are, and what reads and draws them.

shapes.py   captioned shapes; all that it needs ships with the package
flux.py     FLUX: text encoders and autoencoder of a folder that `jax_distill.port` made

`world.py` says what a world is. A configuration names its own as `world`.
"""

from ml_collections import ConfigDict

from jax_distill.worlds.flux.world import Flux
from jax_distill.worlds.shapes.world import Shapes
from jax_distill.worlds.world import Source, World

__all__ = ["WORLDS", "Source", "World", "of"]

WORLDS = {"shapes": Shapes, "flux": Flux}


def of(config: ConfigDict) -> World:
    """The world that a run lives in; nothing is read before it is asked for."""
    return WORLDS[config.get("world", "shapes")](config)  # the first versions had no such key
