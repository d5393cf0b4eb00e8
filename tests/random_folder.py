"""A small random FLUX folder, sharded as diffusers and transformers save it."""

import json
from pathlib import Path

import random_flux
import random_text
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from jax_distill.models import clip, t5
from jax_distill.models.mmdit import MMDiTConfig

NETWORK = MMDiTConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
CLIP = clip.ClipConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
)
T5 = t5.T5Config(vocab_size=50, d_model=24, d_kv=4, d_ff=32, num_layers=2, num_heads=4)


def autoencoder(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def make(folder: Path, network: MMDiTConfig = NETWORK, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a pipeline's folder; its tokenizers are empty files."""
    transformer = random_flux.reference(network).to(dtype)
    transformer.save_pretrained(folder / "transformer", max_shard_size="40KB")
    autoencoder().to(dtype).save_pretrained(folder / "vae", max_shard_size="10KB")
    text = random_text.clip_reference(CLIP).to(dtype)
    text.save_pretrained(folder / "text_encoder", max_shard_size="10KB")
    text = random_text.t5_reference(T5).to(dtype)
    text.save_pretrained(folder / "text_encoder_2", max_shard_size="10KB")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatch"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
