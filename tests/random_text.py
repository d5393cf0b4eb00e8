"""Small random text encoders of transformers' classes and their weights as ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers import T5Config as TransformersT5Config

from jax_distill.interop.keys.clip import clip_keys
from jax_distill.interop.keys.t5 import T5_KEYS
from jax_distill.models import clip, t5


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


def write_tokenizers(path: Path, clip_length: int = 77) -> None:
    """The files of FLUX's `tokenizer/` and `tokenizer_2/`, with the vocabulary of a few words."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,!"

    merges = ["r e", "re d</w>", "a n", "an d</w>", "c i", "c r"]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    clip = path / "tokenizer"
    clip.mkdir(parents=True)
    (clip / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip_length}
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    ends |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (clip / "tokenizer_config.json").write_text(json.dumps(config | ends))

    pieces = ["▁a", "▁red", "▁circle", "▁and", "▁", *letters]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [(piece, -1.0 - 0.1 * i) for i, piece in enumerate(pieces)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    t5 = path / "tokenizer_2"
    t5.mkdir()
    made.save(str(t5 / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    ends = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (t5 / "tokenizer_config.json").write_text(json.dumps(config | ends))
