"""Small random networks of diffusers' FLUX class and their weights as ours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import torch
from diffusers import FluxTransformer2DModel
from flax import nnx

from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.models.binding import parameters
from jax_distill.models.mmdit import MMDiT, MMDiTConfig

OURS_ONLY = ("rope_theta", "time_scale", "guidance_factor", "interval_embeds", "remat", "attention")


@functools.cache
def shapes(config: MMDiTConfig) -> dict:
    """The shapes of our parameters, as a nested dict."""
    return parameters(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))


def reference(config: MMDiTConfig, seed: int = 0) -> FluxTransformer2DModel:
    """diffusers' network with all weights random, also those that start as zeros or ones."""
    fields = dataclasses.asdict(config)
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**{k: v for k, v in fields.items() if k not in OURS_ONLY}).eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(1.0 if ".norm_" in name else 0.0, 0.3)
    return model


def state_dict(model: FluxTransformer2DModel) -> dict:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def ported(config: MMDiTConfig, model: FluxTransformer2DModel) -> dict:
    """The same weights as our parameters."""
    tree = TRANSFORMER_KEYS.to_jax(state_dict(model), shapes(config))
    return jax.tree.map(jnp.asarray, tree)
