"""Small random text encoders of transformers' classes and their weights as ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as TransformersT5Config

from jax_distill.interop.clip_keys import clip_keys
from jax_distill.interop.t5_keys import T5_KEYS
from jax_distill.models import clip, t5

# Compiling is most of what these tests do: with these options it takes a fifth of the time.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)


@functools.cache
def shapes(config: t5.T5Config | clip.ClipConfig) -> dict:
    """The shapes of our parameters, as a nested dict."""
    module = t5 if isinstance(config, t5.T5Config) else clip
    return jax.eval_shape(lambda: module.initial_parameters(config, nnx.Rngs(0)))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """All weights random, also those that start as zeros or ones; activations are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
        elif "embed" in name or "shared" in name or "relative" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        if name.endswith("SelfAttention.q.weight"):  # T5 does not divide its scores
            parameter.mul_(model.config.d_kv**-0.5)


def t5_reference(config: t5.T5Config, seed: int = 0) -> T5EncoderModel:
    model = T5EncoderModel(TransformersT5Config.from_dict(config.to_dict())).eval()
    randomise(model, seed)
    return model


def clip_reference(config: clip.ClipConfig, seed: int = 0) -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig.from_dict(config.to_dict())).eval()
    randomise(model, seed)
    return model


def ported(config: t5.T5Config | clip.ClipConfig, model: torch.nn.Module) -> dict:
    """The same weights as our parameters."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if isinstance(config, t5.T5Config):
        del tensors["encoder.embed_tokens.weight"]
        table = T5_KEYS
    else:
        table = clip_keys(tensors)
    return jax.tree.map(jnp.asarray, table.to_jax(tensors, shapes(config)))


def saved(model: torch.nn.Module, folder: Path, max_shard_size: str) -> dict[str, np.ndarray]:
    """The tensors of the folder that `save_pretrained` writes; checks that it has several files."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert len(files) > 2
    return {name: array for file in files for name, array in load_file(folder / file).items()}


def relative_error(actual, expected) -> float:
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()
