"""Adapters as diffusers and PEFT have them, and merged into the weights that they are beside.

Layout: diffusers' `FluxPipeline.save_lora_weights`, tensors `transformer.<module>.lora_A.weight`
(r, in) and `.lora_B.weight` (out, r). Our alpha / r is multiplied into B, so that every reader's
default, a scale of one, is right.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.orbax_tree import StoredLeaf
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.tensors import Tensor, Tensors
from jax_distill.models import lora

WEIGHTS = "pytorch_lora_weights.safetensors"
EMBEDDERS = "embedders.safetensors"
PEFT_CONFIG = "adapter_config.json"
_PREFIX = "transformer."


class MergedLeaf:
    """A kernel with its adapter merged, read a layer at a time; see `StoredLeaf`.

    Args:
      kernel: of `StoredLeaf`s.
      int8: whether the adapter was trained beside the kernel in int8.
    """

    def __init__(self, kernel: lora.Adapted, int8: bool):
        self._kernel, self._int8 = kernel, int8
        self.shape, self.dtype = kernel.base.shape, kernel.base.dtype

    def read(self, index: int | None = None) -> np.ndarray:
        """A layer of a stacked kernel, or with an index of None the whole."""
        base = self._kernel.base.read(index)
        if self._int8:
            base = np.asarray(lora.quantize(jnp.asarray(base)).dequantized())
        a, b = (leaf.read(index) for leaf in (self._kernel.lora_a, self._kernel.lora_b))
        change = self._kernel.scale * (a.astype(np.float32) @ b.astype(np.float32))
        return (base.astype(np.float32) + change).astype(self.dtype)


def merged(tree: Mapping[str, Any], int8: bool) -> dict[str, Any]:
    """A network of plain kernels.

    Args:
      tree: nested `StoredLeaf`s, or `Adapted` of them.
      int8: as `MergedLeaf` takes it.
    """
    return {
        key: merged(leaf, int8)
        if isinstance(leaf, Mapping)
        else MergedLeaf(leaf, int8)
        if isinstance(leaf, lora.Adapted)
        else leaf
        for key, leaf in tree.items()
    }


def adapter_tensors(tree: Mapping[str, Any]) -> Tensors:
    """The adapters of a network under diffusers' names, float32.

    Args:
      tree: nested `StoredLeaf`s, or `Adapted` of them.
    """
    tensors = {}
    for place in TRANSFORMER_KEYS.places(tree):
        kernel: Any = tree
        for key in place.path:
            kernel = kernel[key]
        if isinstance(kernel, lora.Adapted):
            module = _PREFIX + place.name.removesuffix(".weight")
            for name, leaf, scale in (
                ("lora_A", kernel.lora_a, 1.0),
                ("lora_B", kernel.lora_b, kernel.scale),
            ):
                shape = leaf.shape[:-3:-1]
                read = _reader(leaf, place.index, scale)
                tensors[f"{module}.{name}.weight"] = Tensor(shape, np.dtype(np.float32), read)
    return tensors


def _reader(leaf: StoredLeaf, index: int | None, scale: float):
    return lambda: (scale * leaf.read(index).astype(np.float32)).T


def embedder_tensors(tree: Mapping[str, Any]) -> Tensors:
    """The student's own embedders, whole, under diffusers' names."""
    own = {name: leaves for name, leaves in tree.items() if name in lora.EMBEDDERS}
    return tensors_of(own, TRANSFORMER_KEYS)


def peft_config(tensors: Tensors, rank: int) -> dict[str, Any]:
    """PEFT's adapter_config.json for the tensors of `adapter_tensors`."""
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
