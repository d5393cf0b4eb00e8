"""Weights stored in float8, with or without a scale for each tensor, made wide again.

A scale stands beside its weight as `<layer>.weight_scale`, or `<layer>.scale_weight` in the files
of ComfyUI, which have a tensor `scaled_fp8` as a mark; the weight is their product. Scales of
activations are for arithmetic in float8 and have no part in it.
"""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jax_distill.interop.tensors import FLOAT8, Tensor, Tensors

_LEFT_ASIDE = re.compile(r"(.*\.)?(input_scale|scale_input|scaled_fp8)")
KEPT = np.dtype(ml_dtypes.bfloat16)  # what float8 becomes where types are to be kept


def widened(
    where: str, tensors: Tensors, dtype: np.dtype | None = None
) -> tuple[Tensors, list[str]]:
    """The tensors with those in float8 in a type that parameters may have.

    Args:
      where: for messages.
      tensors: of one network, under any names.
      dtype: that float8 becomes; bfloat16 by default.

    Returns:
      The tensors, scales no longer among them, and sentences about what was done.

    Raises:
      ValueError: a scale is not one number.
    """
    small = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8.values()]
    small = [name for name in small if not _LEFT_ASIDE.fullmatch(name)]
    if not small:
        return tensors, []
    scales = {name: scale for name in small if (scale := _scale_of(name, tensors))}
    aside = {name for name in tensors if _LEFT_ASIDE.fullmatch(name)}
    result = {}
    for name, tensor in tensors.items():
        if name in aside or name in scales.values():
            continue
        if name in small:
            scale = _number(where, scales[name], tensors) if name in scales else None
            tensor = _wide(tensor, scale, dtype or KEPT)
        result[name] = tensor
    notes = [
        f"'{where}': {len(small)} tensors in float8, {len(scales)} of them with a scale, become"
        f" {dtype or KEPT}"
    ]
    if unused := [name for name in aside if not name.endswith("scaled_fp8")]:
        notes.append(f"'{where}': {len(unused)} scales of activations are left aside")
    return result, notes


def _scale_of(name: str, tensors: Tensors) -> str | None:
    stem, _, last = name.rpartition(".")
    found = (f"{stem}.{other}" for other in (f"{last}_scale", f"scale_{last}"))
    return next((other for other in found if other in tensors), None)


def _number(where: str, name: str, tensors: Tensors) -> Callable[[], np.float32]:
    """Reads a scale."""
    scale = tensors[name]
    if scale.shape not in ((), (1,)) or scale.dtype in FLOAT8.values():
        raise ValueError(
            f"{where}: tensor '{name}' of shape {scale.shape} is not one scale for its weight; only"
            " that is read; give the network in bfloat16 instead"
        )
    return lambda: scale.read().astype(np.float32).reshape(())


def _wide(tensor: Tensor, scale: Callable[[], np.float32] | None, dtype: np.dtype) -> Tensor:
    def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
        array = tensor.read(start, stop).astype(np.float32)
        if scale is not None:
            with np.errstate(invalid="ignore"):  # what is not finite is found where it is written
                array *= scale()
        return array.astype(dtype)

    return Tensor(tensor.shape, dtype, read)
