"""A variant of the weights is the network of the plain folder, in another type."""

import shutil

import jax
import numpy as np
import pytest
import random_pipeline
import torch
from absl import logging
from random_files import NETWORK

from jax_distill.interop import orbax_tree, ported_folder
from jax_distill.interop.readers import variants
from jax_distill.runs.porting import port

INDEX = "diffusion_pytorch_model.safetensors.index"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The plain folder of a pipeline, its half as variant alone, and the plain one ported."""
    root = tmp_path_factory.mktemp("variants")
    pipe = random_pipeline.save_random(root / "plain", random_pipeline.Sizes(NETWORK))
    pipe.to(torch.float16).save_pretrained(root / "half", variant="fp16", max_shard_size="20KB")
    port(root / "plain", root / "ported", text_length=9)
    return root


def _both(folders, target):
    """A folder of the plain weights and the variant; it has the autoencoder's plain ones alone."""
    shutil.copytree(folders / "plain", target)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        shutil.copytree(folders / "half" / name, target / name, dirs_exist_ok=True)
    return target


def _assert_same(actual, expected, half):
    for name in ported_folder.PARTS:
        trees = [orbax_tree.open_tree(folder / name) for folder in (actual, expected)]
        dtype = np.dtype(np.float16 if name in half else np.float32)
        for ours, plain in zip(*map(jax.tree.leaves, trees), strict=True):
            assert ours.dtype == dtype
            np.testing.assert_array_equal(ours.read(), plain.read().astype(dtype))


def test_the_only_variant_is_taken_and_said(folders, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    logging.set_verbosity(logging.INFO)
    assert (folders / f"half/transformer/{INDEX}.fp16.json").is_file()  # as diffusers writes it
    port(folders / "half", tmp_path / "out", text_length=9)
    _assert_same(tmp_path / "out", folders / "ported", ported_folder.PARTS)
    said = [x.getMessage() for x in caplog.records if "as variant fp16 alone" in x.getMessage()]
    assert len(said) == len(ported_folder.PARTS)


def test_plain_weights_come_first_and_a_variant_where_it_is_asked_for(folders, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    logging.set_verbosity(logging.INFO)
    both = _both(folders, tmp_path / "both")
    port(both, tmp_path / "plain", text_length=9)
    _assert_same(tmp_path / "plain", folders / "ported", ())
    port(both, tmp_path / "half", text_length=9, variant="fp16")
    _assert_same(tmp_path / "half", folders / "ported", ("network", "clip", "t5"))
    [said] = [x.getMessage() for x in caplog.records if "has no variant fp16" in x.getMessage()]
    assert said.endswith("both/vae' has no variant fp16; its plain weights are taken")


def test_several_variants_without_a_plain_one_are_asked_for(folders, tmp_path):
    shutil.copytree(folders / "half", tmp_path / "two")
    inner = tmp_path / "two/transformer"
    shutil.copy(inner / f"{INDEX}.fp16.json", inner / f"{INDEX}.bf16.json")
    with pytest.raises(ValueError, match="give --variant=bf16 or --variant=fp16$"):
        port(tmp_path / "two", tmp_path / "out")
    with pytest.raises(ValueError, match="--variant: .* has no weights of variant fp32; leave it"):
        port(tmp_path / "two", tmp_path / "out", variant="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors"], {"": "model.safetensors"}),
        (["model.fp16.safetensors"], {"fp16": "model.fp16.safetensors"}),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
            {"fp16": "model.safetensors.index.fp16.json"},
        ),
        (
            ["model-00001-of-00002.bf16.safetensors", "model.safetensors.bf16.index.json"],
            {"bf16": "model.safetensors.bf16.index.json"},
        ),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"],
            {"": "model.safetensors.index.json"},
        ),
        (["pytorch_model.bin", "model.onnx", "other.safetensors"], {}),
    ],
)
def test_names_of_files_tell_the_variant(names, expected):
    assert variants.files(names, "model") == expected
