"""Captions embedded while training: the text encoders stay on the devices that take the steps.

A run with `data.embedding="training"` reads captions as token ids and embeds those of a batch on
its own mesh, after the step that is running. JAX starts programs in the order of their calls, so
that the devices go from one to the other without the host.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_distill.devices import sharding
from jax_distill.flow import Text
from jax_distill.interop import ported_folder
from jax_distill.models import clip, t5
from jax_distill.worlds.flux.stored import stored_shapes
from jax_distill.worlds.flux.text_encoders import encoding, joined, portions, shapes
from jax_distill.worlds.flux.tokenizers import TokenIds
from jax_distill.worlds.world import Embedding

STORED = jnp.bfloat16  # as prepared captions have it
Configs = tuple[clip.ClipConfig, t5.T5Config]
_PARTS = ("clip", "t5")


class BatchEmbedder:
    """Embeds the captions of batches on a run's own mesh, as `prepare` would have stored them.

    Args:
      configs: of the encoders.
      params: {"clip": .., "t5": ..}, on the mesh.
      dtype: type of the matrix multiplications.
      mesh: of the run.
    """

    def __init__(self, configs: Configs, params: dict, *, dtype: Any, mesh: Mesh):
        self._params, self._mesh = params, mesh
        self._encode = jit_embedding(configs, dtype, mesh)

    @classmethod
    def load(cls, folder: Path, configs: Configs, *, dtype: Any, mesh: Mesh) -> "BatchEmbedder":
        """Reads the encoders of a ported folder onto the mesh, sharded, no wider than `dtype`."""
        params = {}
        for name, config in zip(_PARTS, configs):
            like = narrowed(stored_shapes(folder, name, shapes(config)), dtype)
            params[name] = ported_folder.load_part(folder, name, like, mesh=mesh)
        return cls(configs, params, dtype=dtype, mesh=mesh)

    def __call__(self, ids: TokenIds) -> Text:
        """Token ids (B, ..), split over the mesh as batches are, to bfloat16, split likewise.

        It returns at once; what is computed follows the programs that were called before.
        """
        return self._encode(self._params, ids)

    def gathered(self, ids: TokenIds) -> Text:
        """The same of any number of captions, in the host memory of every process."""
        groups = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        place = NamedSharding(self._mesh, sharding.BATCH)
        parts = []
        for rows in portions(len(ids.t5), groups):
            split = sharding.put(TokenIds(*(array[rows] for array in ids)), place)
            parts.append(sharding.gather(self(split)))
        return joined(parts, len(ids.t5))


def jit_embedding(configs: Configs, dtype: Any, mesh: Mesh) -> Any:
    """`encoding`, jitted for batches that are split over a mesh; it makes bfloat16."""
    encode = encoding(*configs, dtype)

    def embed(params: dict, ids: TokenIds) -> Text:
        with sharding.activations_on(mesh):
            text = encode(params, ids)
        return jax.tree.map(lambda leaf: leaf.astype(STORED), text)

    return jax.jit(embed, out_shardings=NamedSharding(mesh, sharding.BATCH))


def narrowed(like: dict, dtype: Any) -> dict:
    """Shapes of an encoder's parameters as a run holds them: no wider than it computes."""

    def narrow(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        wider = leaf.dtype.itemsize > jnp.dtype(dtype).itemsize
        return jax.ShapeDtypeStruct(leaf.shape, dtype if wider else leaf.dtype)

    return jax.tree.map(narrow, like)


def planned(configs: Configs, count: int, text_length: int, *, dtype: Any, mesh: Any) -> Embedding:
    """The program of `BatchEmbedder` for plans, of shapes alone.

    Args:
      configs: of the encoders.
      count: captions of a batch.
      text_length: of T5's ids.
      dtype: type of the matrix multiplications, and the widest of parameters.
      mesh: of the run; an abstract one will do for everything but compiling.
    """
    lengths = TokenIds(configs[0].max_position_embeddings, text_length)
    return Embedding(
        encoding(*configs, dtype),
        jit_embedding(configs, dtype, mesh),
        {name: narrowed(shapes(config), dtype) for name, config in zip(_PARTS, configs)},
        TokenIds(*(jax.ShapeDtypeStruct((count, length), np.int32) for length in lengths)),
    )
