"""Captions embedded while training: the text encoders stay on the devices that take the steps.

A run with `data.embedding="training"` reads captions as token ids and embeds them on its own mesh,
after the step that is running. JAX starts programs in the order of their calls, so that the devices
go from one to the other without the host. Small batches are embedded several at a time: each device
gathers all weights, once for all of them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_distill.devices import sharding
from jax_distill.flow import Batch, Text
from jax_distill.interop import ported_folder
from jax_distill.models import clip, t5
from jax_distill.worlds.flux.stored import stored_shapes
from jax_distill.worlds.flux.text_encoders import encoding, joined, portions, shapes
from jax_distill.worlds.flux.tokenizers import TokenIds
from jax_distill.worlds.world import Embedding

STORED = jnp.bfloat16  # as prepared captions have it
AT_A_TIME = 8  # captions on a device, where batches have fewer
Configs = tuple[clip.ClipConfig, t5.T5Config]
_PARTS = ("clip", "t5")


class BatchEmbedder:
    """Embeds the captions of batches on a run's own mesh, as `prepare --padding=kept` stores them.

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

    def together(self, batch_size: int) -> int:
        """Of how many batches the captions are embedded at a time."""
        return together(batch_size, self._mesh)

    def embed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches of token ids, split over the mesh, to batches of `Text` in bfloat16.

        It returns at once; what is computed follows the programs that were called before.
        """
        texts = self._encode(self._params, [batch.text for batch in batches])
        return [batch._replace(text=text) for batch, text in zip(batches, texts)]

    def gathered(self, ids: TokenIds) -> Text:
        """Embeds any number of captions, into the host memory of every process."""
        place = NamedSharding(self._mesh, sharding.BATCH)
        parts = []
        for rows in portions(len(ids.t5), _groups(self._mesh)):
            split = sharding.put(TokenIds(*(array[rows] for array in ids)), place)
            parts.append(sharding.gather(self._encode(self._params, [split])[0]))
        return joined(parts, len(ids.t5))


def jit_embedding(configs: Configs, dtype: Any, mesh: Mesh) -> Any:
    """`embedding`, jitted for batches that are split over a mesh."""
    embed = embedding(configs, dtype)

    def placed(params: dict, batches: Sequence[TokenIds]) -> list[Text]:
        with sharding.activations_on(mesh):
            return embed(params, batches)

    return jax.jit(placed, out_shardings=NamedSharding(mesh, sharding.BATCH))


def embedding(configs: Configs, dtype: Any) -> Callable[[dict, Sequence[TokenIds]], list[Text]]:
    """Batches of token ids (B, ..) as one of them all, to their `Text` in bfloat16."""
    encode = encoding(*configs, dtype)

    def embed(params: dict, batches: Sequence[TokenIds]) -> list[Text]:
        count = len(batches)
        # Rows in turns: each device has those that it had.
        rows = jax.tree.map(lambda *ids: jnp.stack(ids, 1).reshape(-1, ids[0].shape[1]), *batches)
        text = jax.tree.map(lambda leaf: leaf.astype(STORED), encode(params, rows))
        split = jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), text)
        return [jax.tree.map(lambda leaf, n=n: leaf[:, n], split) for n in range(count)]

    return embed


def together(batch_size: int, mesh: Any) -> int:
    """How many batches have `AT_A_TIME` captions on a device; at least one."""
    return max(1, AT_A_TIME * _groups(mesh) // batch_size)


def _groups(mesh: Any) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


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
      count: captions of a batch, of which `together` says how many there are.
      text_length: of T5's ids.
      dtype: type of the matrix multiplications, and the widest of parameters.
      mesh: of the run; an abstract one will do for everything but compiling.
    """
    lengths = TokenIds(configs[0].max_position_embeddings, text_length)
    tokens = TokenIds(*(jax.ShapeDtypeStruct((count, length), np.int32) for length in lengths))
    return Embedding(
        embedding(configs, dtype),
        jit_embedding(configs, dtype, mesh),
        {name: narrowed(shapes(config), dtype) for name, config in zip(_PARTS, configs)},
        [tokens] * together(count, mesh),
    )
