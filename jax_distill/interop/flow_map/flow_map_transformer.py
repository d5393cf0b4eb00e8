"""FLUX's transformer with a second time embedder, which is told how far a step goes.

Source: T2I-Distill, arXiv:2512.13006, whose names these are.
"""

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding


class FlowMapTransformer2DModel(FluxTransformer2DModel):
    """A flow map's average velocity from t to s.

    It embeds t, t - s and the guidance scale in float32 whatever its own type is.

    Args:
      time_scale: multiplies t and t - s before they are embedded.
      guidance_factor: multiplies the guidance scale.
      time_max: where the schedule begins; at 1 such a network was not trained.
    """

    _keep_in_fp32_modules = ["time_text_embed", "timestep_embedder2"]

    step_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    """(t, t - s) of the schedule's step at a timestep; the pipeline sets it."""

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        time_scale: float = 1000.0,
        guidance_factor: float = 1000.0,
        time_max: float = 1.0,
    ):
        super().__init__(
            patch_size,
            in_channels,
            out_channels,
            num_layers,
            num_single_layers,
            attention_head_dim,
            num_attention_heads,
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds,
            axes_dims_rope,
        )
        self.timestep_embedder2 = TimestepEmbedding(256, self.inner_dim)

    def forward(self, hidden_states, *, timestep, guidance=None, **inputs):
        """As `FluxTransformer2DModel.forward`."""
        if self.step_of is None:
            raise ValueError("this transformer is told its steps by its own pipeline; use that")
        t, interval = (
            x.expand(len(timestep)).float() * self.config.time_scale
            for x in self.step_of(timestep[0])
        )

        def exact(embed, inputs):  # FLUX's own have been rounded to the type of the network
            scalars = [t]
            if guidance is not None:
                scalars.append(guidance.float() * self.config.guidance_factor)
            return *scalars, inputs[-1].float()

        def with_interval(embed, inputs, embedding):
            embedding = embedding + self.timestep_embedder2(embed.time_proj(interval))
            return embedding.to(hidden_states.dtype)

        hooks = [
            self.time_text_embed.register_forward_pre_hook(exact),
            self.time_text_embed.register_forward_hook(with_interval),
        ]
        try:
            return super().forward(hidden_states, timestep=timestep, guidance=guidance, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
