"""T5's state dict and our parameters hold the same numbers, whichever name the table is under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_text
import torch
from safetensors.torch import save_file
from transformers import T5EncoderModel

from jax_distill.interop.keys.t5 import EMBEDDING_NAMES, T5_KEYS, t5_keys
from jax_distill.models.t5 import T5Config

CONFIG = T5Config(vocab_size=40, d_model=24, d_kv=4, d_ff=40, num_layers=11, num_heads=3)
SHARED, TIED = EMBEDDING_NAMES


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def folder(request, tmp_path_factory):
    """A folder as transformers writes it, in many shards, and its tensors."""
    path = tmp_path_factory.mktemp("text_encoder_2")
    model = random_text.t5_reference(CONFIG).to(request.param)
    return path, random_text.saved(model, path, "20KB")


def test_from_transformers_and_back_is_exact(folder):
    _, theirs = folder
    table = t5_keys(theirs)
    back = table.from_jax(table.to_jax(theirs, random_text.shapes(CONFIG)))
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert back[name].dtype == array.dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name].view(np.uint8), array.view(np.uint8), name)


def test_transformers_reads_what_we_write(folder, tmp_path):
    path, theirs = folder
    ours = T5_KEYS.to_jax(theirs, random_text.shapes(CONFIG))
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).bfloat16()
        if array.dtype != np.float32
        else torch.from_numpy(array)
        for name, array in T5_KEYS.from_jax(ours).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected = T5EncoderModel.from_pretrained(path).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("names", [(SHARED,), (TIED,), (SHARED, TIED)])
def test_the_embedding_may_be_under_either_name_or_both(folder, names):
    _, theirs = folder
    rest = {name: array for name, array in theirs.items() if name != SHARED}
    saved = rest | dict.fromkeys(names, theirs[SHARED])
    table = t5_keys(saved)
    ours = table.to_jax(saved, random_text.shapes(CONFIG))
    np.testing.assert_array_equal(ours["token_embedding"], theirs[SHARED])
    back = table.from_jax(ours)
    assert back.keys() == saved.keys()
    jax.tree.map(np.testing.assert_array_equal, back, saved)


def test_two_embeddings_that_differ_are_refused(folder):
    _, theirs = folder
    both = theirs | {TIED: theirs[SHARED] + 1}
    with pytest.raises(ValueError, match=f"'{TIED}' differs from the one it is tied to"):
        t5_keys(both).to_jax(both, random_text.shapes(CONFIG))


def test_what_does_not_fit_is_named(folder):
    _, theirs = folder
    shapes = random_text.shapes(CONFIG)
    without = {name: array for name, array in theirs.items() if name != SHARED}
    with pytest.raises(ValueError, match=f"'{SHARED}' is missing"):
        t5_keys(without).to_jax(without, shapes)
    with pytest.raises(ValueError, match=r"'decoder\.final_layer_norm\.weight' is not expected"):
        T5_KEYS.to_jax(theirs | {"decoder.final_layer_norm.weight": np.ones(24)}, shapes)


def test_layers_are_stacked_in_order(folder):
    _, theirs = folder
    ours = T5_KEYS.to_jax(theirs, random_text.shapes(CONFIG))
    for layer in range(CONFIG.num_layers):
        np.testing.assert_array_equal(
            ours["blocks"]["mlp_out"]["kernel"][layer],
            theirs[f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight"].T,
        )
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, random_text.shapes(CONFIG))
