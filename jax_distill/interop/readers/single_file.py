"""The transformer in one file, which may hold more: under whose names, and under which prefix."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from jax_distill.interop.keys import bfl
from jax_distill.interop.readers import float8, unreadable
from jax_distill.interop.tensors import Tensors

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
OTHER_PARTS = (
    *("vae.", "first_stage_model.", "model_ema.", "conditioner.", "cond_stage_model."),
    *("text_encoders.", "text_encoder.", "text_encoder_2.", "clip_l.", "t5xxl."),
)
"""Where checkpoints with all parts keep the others."""
_BLOCKS = ("double_blocks.", "transformer_blocks.")  # BFL's names, and diffusers'


class Found(NamedTuple):
    """The transformer of a file.

    Attributes:
      layout: "bfl" or "diffusers", whose names it had.
      tensors: under diffusers' names.
      notes: sentences about what was done to them.
    """

    layout: str
    tensors: Tensors
    notes: list[str]


def transformer(where: str, tensors: Tensors, dtype: np.dtype | None = None) -> Found:
    """Takes the transformer out of a file's tensors.

    Args:
      where: the file, for messages.
      tensors: all of them.
      dtype: that those in float8 become, see `float8.widened`.

    Raises:
      ValueError: there is no transformer, or two, or tensors that belong to nothing known.
    """
    prefixes = [prefix for prefix in PREFIXES if any(_is_block(prefix, name) for name in tensors)]
    if not prefixes:
        seems = unreadable.looks_like(tensors)
        raise ValueError(f"'{where}' holds no transformer of FLUX ({seems}); give one that does")
    if len(prefixes) > 1:
        raise ValueError(
            f"'{where}' holds two transformers, under '{prefixes[0]}' and '{prefixes[1]}'; give a"
            " file of one"
        )
    [prefix] = prefixes
    aside = [name for name in tensors if name.startswith(OTHER_PARTS)]
    inner = {name: x for name, x in tensors.items() if not name.startswith(OTHER_PARTS)}
    if strange := [name for name in inner if not name.startswith(prefix)]:
        raise ValueError(
            f"{where}: tensor '{min(strange)}' is not expected beside the transformer under"
            f" '{prefix}'"
        )
    bare = {name.removeprefix(prefix): x for name, x in inner.items()}
    bare, notes = float8.widened(where, bare, dtype)
    if aside:
        heads = Counter(name.partition(".")[0] for name in aside)
        counts = ", ".join(f"{count} under {head}" for head, count in sorted(heads.items()))
        notes = [f"'{where}': tensors of other parts are left aside: {counts}", *notes]
    if any(name.startswith("double_blocks.") for name in bare):
        return Found("bfl", bfl.to_diffusers(where, bare), notes)
    return Found("diffusers", bare, notes)


def _is_block(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and name.removeprefix(prefix).startswith(_BLOCKS)
