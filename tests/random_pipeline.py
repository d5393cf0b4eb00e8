"""Small random FLUX pipelines of diffusers, saved as they are on the hub."""

import dataclasses
from pathlib import Path

import random_flux
import random_text
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.clip import ClipConfig
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.models.t5 import T5Config

TRANSFORMER = MMDiTConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
AUTOENCODER = AutoencoderConfig(3, 4, (8, 8, 12, 16), 1, 4, 0.4, 0.1)
CLIP = ClipConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
)
T5 = T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
"""FLUX.1-dev's scheduler, and lite's."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a pipeline is made of."""

    transformer: MMDiTConfig = TRANSFORMER
    autoencoder: AutoencoderConfig = AUTOENCODER
    clip: ClipConfig = CLIP
    t5: T5Config = T5
    scheduler: tuple[tuple[str, object], ...] = tuple(DYNAMIC.items())


def save_random(folder: Path, sizes: Sizes = Sizes(), seed: int = 0) -> FluxPipeline:
    """Writes a pipeline of random weights into a folder, in several shards, and returns it."""
    random_text.write_tokenizers(folder)
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(sizes.autoencoder.to_dict()).eval()
    vae.requires_grad_(False)
    for parameter in vae.parameters():  # biases and norms away from their initial constants
        parameter.add_(0.1 * torch.randn_like(parameter))
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(**dict(sizes.scheduler)),
        vae,
        random_text.clip_reference(sizes.clip, seed),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        random_text.t5_reference(sizes.t5, seed),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        random_flux.reference(sizes.transformer, seed),
    )
    pipe.save_pretrained(folder, max_shard_size="20KB")
    pipe.set_progress_bar_config(disable=True)
    return pipe
