"""Frozen networks: the parameters that a run reads and does not train."""

from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill.assembly import adapters
from jax_distill.devices import sharding
from jax_distill.models import lora


def frozen_network(
    config: ConfigDict, network: dict, mesh: Mesh | None = None, *, adapted: bool = False
) -> dict:
    """The parameters that a run of `config` reads beside those that it trains.

    No wider than the computation, which would narrow them anyway; embedders, which compute in
    float32, stay as they are. In int8 where adapters are trained beside them and `lora.base` says
    so. Runs and plans both call it, with arrays or while tracing. Parameters are converted one
    after another, so that no more than one is held twice if nobody else holds the network.

    Args:
      config: of the run.
      network: parameters of the frozen network.
      mesh: of the run, on which they are placed; arrays that lie there already are not copied.
      adapted: keeps adapters that the network has from the stage before; by default a network's
        adapters are merged into it.
    """
    int8 = adapters.settings(config) is not None and config.lora.base == "int8"
    flat = traverse_util.flatten_dict(network if adapted else lora.merged(network))
    del network
    for path in list(flat):
        one = narrowed(traverse_util.unflatten_dict({path: flat.pop(path)}), config.dtype)
        flat |= traverse_util.flatten_dict(lora.quantized(one) if int8 else one)
    held = traverse_util.unflatten_dict(flat)
    return held if mesh is None else sharding.put(held, sharding.shard_state(held, mesh))


def narrowed(network: dict, dtype: str) -> dict:
    """Parameters no wider than `dtype`, except embedders and quantised kernels."""
    width = jnp.dtype(dtype).itemsize

    def narrow(leaf: Any) -> Any:
        if isinstance(leaf, lora.Quantized):
            return leaf
        if isinstance(leaf, lora.Adapted):
            return lora.Adapted(*map(narrow, (leaf.base, leaf.lora_a, leaf.lora_b)), leaf.scale)
        return leaf.astype(dtype) if leaf.dtype.itemsize > width else leaf

    flat = traverse_util.flatten_dict(network)
    return traverse_util.unflatten_dict(
        {
            path: leaf if path[0].endswith("_embedder") else narrow(leaf)
            for path, leaf in flat.items()
        }
    )
