"""CLIP's state dict and our parameters hold the same numbers, prefixed names or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_text
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from jax_distill.interop.keys.clip import CLIP_KEYS, PREFIX, clip_keys
from jax_distill.models.clip import ClipConfig

CONFIG = ClipConfig(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=11,
    num_attention_heads=3,
    max_position_embeddings=10,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def folder(request, tmp_path_factory):
    """A folder as transformers writes it, in many shards, and its tensors."""
    path = tmp_path_factory.mktemp("text_encoder")
    model = random_text.clip_reference(CONFIG).to(request.param)
    return path, random_text.saved(model, path, "20KB")


def with_prefix(tensors):
    return {PREFIX + name.removeprefix(PREFIX): array for name, array in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix(PREFIX): array for name, array in tensors.items()}


@pytest.mark.parametrize("named", [with_prefix, without_prefix])
def test_from_transformers_and_back_is_exact(folder, named):
    theirs = named(folder[1])
    table = clip_keys(theirs)
    back = table.from_jax(table.to_jax(theirs, random_text.shapes(CONFIG)))
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert back[name].dtype == array.dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name].view(np.uint8), array.view(np.uint8), name)


def test_transformers_reads_what_we_write(folder, tmp_path):
    path, theirs = folder
    ours = clip_keys(theirs).to_jax(theirs, random_text.shapes(CONFIG))
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).bfloat16()
        if array.dtype != np.float32
        else torch.from_numpy(array)
        for name, array in CLIP_KEYS.from_jax(ours).items()
    }
    assert all(name.startswith(PREFIX) for name in tensors)  # transformers 4 knows no other
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected = CLIPTextModel.from_pretrained(path).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("named", [with_prefix, without_prefix])
def test_a_saved_position_buffer_is_passed_over(folder, named):
    theirs = named(folder[1])
    buffer = named({"embeddings.position_ids": np.arange(10)[None]})
    table, shapes = clip_keys(theirs), random_text.shapes(CONFIG)
    ours = table.to_jax(theirs | buffer, shapes)
    jax.tree.map(np.testing.assert_array_equal, ours, table.to_jax(theirs, shapes))


def test_what_does_not_fit_is_named(folder):
    theirs, shapes = with_prefix(folder[1]), random_text.shapes(CONFIG)
    name = "text_model.encoder.layers.10.mlp.fc2.bias"
    without = {key: array for key, array in theirs.items() if key != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        CLIP_KEYS.to_jax(without, shapes)
    with pytest.raises(ValueError, match=r"'text_projection\.weight' is not expected"):
        CLIP_KEYS.to_jax(theirs | {"text_projection.weight": np.ones((24, 24))}, shapes)


def test_layers_are_stacked_in_order(folder):
    theirs = with_prefix(folder[1])
    ours = CLIP_KEYS.to_jax(theirs, random_text.shapes(CONFIG))
    for layer in range(CONFIG.num_hidden_layers):
        np.testing.assert_array_equal(
            ours["blocks"]["attention_out"]["kernel"][layer],
            theirs[f"text_model.encoder.layers.{layer}.self_attn.out_proj.weight"].T,
        )
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, random_text.shapes(CONFIG))
