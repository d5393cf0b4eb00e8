"""Frozen networks: how a run holds the parameters that it does not train."""

from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill.assembly import adapters
from jax_distill.devices import sharding
from jax_distill.models import lora


def hold(config: ConfigDict, network: dict) -> dict:
    """A network's parameters as a run of `config` keeps them beside what it trains.

    No wider than the computation, which would narrow them anyway; embedders, which compute in
    float32, stay as they are. In int8 where adapters are trained beside them and `lora.base` says
    so. Adapters of its own are kept as such. It can be traced: `plan` calls it with shapes.

    One after another, so that of a network that nobody else holds no more than one parameter is
    there twice.
    """
    int8 = adapters.settings(config) is not None and config.lora.base == "int8"
    flat = traverse_util.flatten_dict(network)
    del network
    for path in list(flat):
        held = narrowed(traverse_util.unflatten_dict({path: flat.pop(path)}), config.dtype)
        held = lora.quantized(held) if int8 else held
        flat |= traverse_util.flatten_dict(held)
    return traverse_util.unflatten_dict(flat)


def narrowed(network: dict, dtype: str) -> dict:
    """Parameters no wider than `dtype`, but for embedders and what is quantised."""
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


def place(network: dict, mesh: Mesh) -> dict:
    """Parameters on the mesh of a run; arrays that lie there already are not copied."""
    return sharding.put(network, sharding.shard_state(network, mesh))
