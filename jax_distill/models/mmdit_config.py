"""The shape of an MMDiT, and how its blocks are rematerialised."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jax_distill.models.sizes import (
    DEEPEST,
    check_flags,
    check_positive,
    check_size,
    check_sizes,
    checked_sequence,
)
from jax_distill.ops.attention.attention import IMPLEMENTATIONS

REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_WIDTHS = (
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the network; fields shared with diffusers have diffusers' names.

    `time_scale` multiplies t and the interval t - s before they are embedded: 1000 for FLUX, 1
    for networks with rescaled time (see `objectives/time_rescale.py`) and for T2I-Distill's.
    `guidance_factor` does the same to the guidance scale w: 1000 for FLUX, 1 for T2I-Distill's.
    `interval_embeds` adds the second time embedder, which MeanFlow and IMM feed with t - s.
    `remat` is one of `REMAT_POLICIES`, `attention` one of the implementations in `ops.attention`.
    """

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 10000.0
    time_scale: float = 1000.0
    guidance_factor: float = 1000.0
    interval_embeds: bool = False
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        axes = checked_sequence("axes_dims_rope", self.axes_dims_rope, longest=3)
        object.__setattr__(self, "axes_dims_rope", axes)
        check_sizes(self, _WIDTHS)
        for name in ("num_layers", "num_single_layers"):
            check_size(name, getattr(self, name), least=0, most=DEEPEST)
        for width in axes:
            check_size("axes_dims_rope", width, least=0)
        check_flags(self, ("guidance_embeds", "interval_embeds"))
        check_positive(self, ("time_scale", "guidance_factor", "rope_theta"))
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope: {self.axes_dims_rope} must add up to attention_head_dim, "
                f"which is {self.attention_head_dim}"
            )
        if any(width % 2 for width in self.axes_dims_rope):
            raise ValueError(f"axes_dims_rope: {self.axes_dims_rope} must all be even")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat: {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention: {self.attention!r} is not one of {known}")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim
