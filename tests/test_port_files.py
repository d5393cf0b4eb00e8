"""A transformer in one file is the same network under whichever names and prefixes it comes."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import random_files
import torch
from absl import logging
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from random_files import assert_same_tensors
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from jax_distill import config
from jax_distill.interop import ported_folder
from jax_distill.interop.keys import bfl
from jax_distill.interop.readers import safetensors_files, single_file, torch_files
from jax_distill.interop.tensors import Tensor
from jax_distill.runs.porting import port

SAME = {"shift": "base", "text_length": 24}
BLOCK = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_files.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def notes(caplog):
    caplog.set_level("INFO", logger="absl")
    logging.set_verbosity(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_bfls_names_are_those_of_diffusers_converter(tmp_path):
    shapes = random_files.bfl_shapes(width=3072, head=128, inner=1)  # the width that it knows
    theirs = random_files.random_arrays(shapes)
    save_file(theirs, tmp_path / "flux1.safetensors")
    ours = bfl.to_diffusers("", safetensors_files.read_file(tmp_path / "flux1.safetensors"))
    tensors = {name: torch.from_numpy(array) for name, array in theirs.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(tensors)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name].read(), tensor.numpy(), name)
        assert ours[name].shape == tensor.shape


@pytest.mark.parametrize("prefix", single_file.PREFIXES)
@pytest.mark.parametrize(
    ("names", "ending"), [("bfl", "safetensors"), ("diffusers", "safetensors"), ("bfl", "pt")]
)
def test_every_prefix_leads_to_the_same_network(folder, tmp_path, names, prefix, ending):
    if names == "bfl":
        arrays = random_files.random_arrays(random_files.bfl_shapes())
        plain = {
            k: Tensor(x.shape, x.dtype, lambda *at, x=x: x[slice(*at)] if at else x)
            for k, x in arrays.items()
        }
        expected = {k: x.read() for k, x in bfl.to_diffusers("", plain).items()}
    else:
        arrays = expected = random_files.arrays(random_files.state_dict())
    path, more = tmp_path / f"flux1.{ending}", {}
    if ending == "pt":
        torch.save({prefix + k: torch.from_numpy(x) for k, x in arrays.items()}, path)
        more = {"time_scale": 1000.0, "guidance_factor": 1000.0}
    else:
        save_file({prefix + k: x for k, x in arrays.items()}, path)
    port(str(path), tmp_path / "out", base=str(folder), **more)
    settings = config.load(tmp_path / "out")
    assert settings.model == config.load(folder).model
    assert settings.teacher.checkpoint == str(folder)
    assert ported_folder.describe(tmp_path / "out")["source"]["layout"] == names
    assert_same_tensors(tmp_path / "out", expected)


def test_the_transformer_is_taken_out_of_a_file_with_all_parts(folder, tmp_path, notes):
    expected = random_files.arrays(random_files.state_dict())
    whole = {f"model.diffusion_model.{k}": x for k, x in expected.items()}
    whole["vae.encoder.conv_in.weight"] = np.ones((2, 2), np.float32)
    whole["vae.encoder.conv_in.bias"] = np.full(2, np.nan, np.float32)  # is not looked at
    name = "text_encoders.clip_l.transformer.text_model.embeddings.position_ids"
    whole[name] = np.arange(3)
    save_file(whole, tmp_path / "flux1.safetensors")
    port(tmp_path / "flux1.safetensors", tmp_path / "out", base=str(folder))
    assert_same_tensors(tmp_path / "out", expected)
    [note] = [note for note in notes() if "left aside" in note]
    assert note.endswith(
        "tensors of other parts are left aside: 1 under text_encoders, 2 under vae"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("timestep_embedder2.linear_1.weight", "is not expected beside the transformer under"),
        ("transformer.transformer_blocks.0.attn.to_q.weight", "two transformers, under 'model.*'"),
    ],
)
def test_what_belongs_to_nothing_known_is_not_left_aside(folder, tmp_path, extra, message):
    state = random_files.arrays(random_files.state_dict())
    whole = {f"model.diffusion_model.{k}": x for k, x in state.items()}
    save_file(whole | {extra: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        port(tmp_path / "x.safetensors", tmp_path / "out", base=str(folder))


E8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _in_float8(state, kind, convention, prefix=""):
    """A state dict whose matrices are in float8, as it is stored, and what it stands for."""
    stored, meant = {}, {}
    for index, (name, tensor) in enumerate(state.items()):
        if tensor.ndim < 2:
            stored[prefix + name], meant[name] = tensor, tensor
            continue
        stem = name.removesuffix(".weight")
        scale = torch.tensor(1.0 if convention == "none" else 0.25 + index / 64)
        small = (tensor / scale).to(E8[kind])
        stored[prefix + name], meant[name] = small, small.float() * scale
        if convention != "none":
            stored[f"{prefix}{stem}.{convention}"] = scale.reshape(() if index % 2 else (1,))
            other = {"weight_scale": "input_scale", "scale_weight": "scale_input"}[convention]
            stored[f"{prefix}{stem}.{other}"] = torch.tensor(3.0)
    if convention == "scale_weight":
        stored[prefix + "scaled_fp8"] = torch.zeros(2).to(E8[kind])
    return stored, meant


@pytest.mark.parametrize(("kind", "dtype"), [("e4m3", "keep"), ("e5m2", "float32")])
@pytest.mark.parametrize("convention", ["none", "weight_scale", "scale_weight"])
def test_float8_is_the_product_with_its_scale(folder, tmp_path, kind, convention, dtype, notes):
    if dtype == "keep":  # of BFL, where one scale is that of several of diffusers' tensors
        arrays = random_files.random_arrays(random_files.bfl_shapes())
        state = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    else:
        state = random_files.state_dict()
    stored, meant = _in_float8(state, kind, convention, "model.diffusion_model.")
    save_torch_file(stored, tmp_path / "small.safetensors")
    wide = {"keep": torch.bfloat16, "float32": torch.float32}[dtype]
    save_torch_file({k: x.to(wide) for k, x in meant.items()}, tmp_path / "plain.safetensors")
    for name in ("small", "plain"):
        port(tmp_path / f"{name}.safetensors", tmp_path / name, base=str(folder), dtype=dtype)
    assert_same_tensors(tmp_path / "small", random_files.network_of(tmp_path / "plain"))
    assert config.load(tmp_path / "small").dtype == {"keep": "bfloat16"}.get(dtype, dtype)
    count = sum(x.ndim == 2 for x in state.values())
    scaled = 0 if convention == "none" else count
    kept = {"keep": "bfloat16"}.get(dtype, dtype)
    said = " ".join(notes())
    assert f"{count} tensors in float8, {scaled} of them with a scale, become {kept}" in said
    assert (f"{scaled} scales of activations are left aside" in said) == bool(scaled)


def test_float8_of_torch_files_and_folders_is_read_too(folder, tmp_path):
    stored, meant = _in_float8(random_files.state_dict(), "e4m3", "weight_scale")
    torch.save(stored, tmp_path / "x.pt")
    both = {"time_scale": 1000.0, "guidance_factor": 1000.0}
    port(tmp_path / "x.pt", tmp_path / "file", base=str(folder), dtype="float32", **both)
    inner = tmp_path / "transformer"
    random_files.save_transformer(inner, stored)
    port(inner, tmp_path / "folder", base=str(folder), dtype="float32")
    for name in ("file", "folder"):
        assert_same_tensors(tmp_path / name, random_files.arrays(meant))


@pytest.mark.parametrize("kind", E8)
@pytest.mark.parametrize("where", ["weight", "scale"])
def test_float8_that_is_not_finite_is_refused(folder, tmp_path, kind, where):
    stored, _ = _in_float8(random_files.state_dict(), kind, "weight_scale")
    if where == "weight":
        broken = stored[BLOCK].float()
        broken[0, 0] = torch.nan
        stored[BLOCK] = broken.to(E8[kind])
    else:
        stored[f"{BLOCK}_scale"] = torch.tensor(torch.inf)
    save_torch_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"tensor '{BLOCK}' holds NaN or infinity"):
        port(tmp_path / "x.safetensors", tmp_path / "out", base=str(folder))
    stored[f"{BLOCK}_scale"] = torch.ones(32, 1)
    save_torch_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"_scale' of shape \(32, 1\) is not one scale"):
        port(tmp_path / "x.safetensors", tmp_path / "out", base=str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("method", ["scm", "meanflow"])
def test_t2i_distills_students_are_ported(folder, tmp_path, method):
    state = random_files.state_dict(interval=method == "meanflow")
    more = random_files.loss_head() if method == "scm" else {}
    torch.save({"module": state | more}, tmp_path / "student.pt")
    port(str(tmp_path / "student.pt"), tmp_path / "out", base=str(folder))
    settings = config.load(tmp_path / "out")
    assert settings.objective.name == method
    assert random_files.factors(tmp_path / "out") == (1.0, 1.0)
    assert settings.model.interval_embeds == (method == "meanflow")
    assert ported_folder.describe(tmp_path / "out")["source"]["layout"] == "t2i_distill"
    assert_same_tensors(tmp_path / "out", random_files.arrays(state))


def test_tensors_of_torch_files_are_what_torch_loads(tmp_path):
    storage = torch.arange(24, dtype=torch.float32)
    state = {
        "turned": storage.view(4, 6).T,
        "part": storage[5:11].view(2, 3),
        "half": torch.randn(3).half(),
        "brain": torch.nn.Parameter(torch.randn(2, 2).bfloat16()),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    torch.save(state, tmp_path / "x.pt")
    tensors = torch_files.read_file(tmp_path / "x.pt")
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        array = tensors[name].read()
        assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float32), tensor.detach().float(), name)
    np.testing.assert_array_equal(tensors["turned"].read(2, 4), state["turned"][2:4])


def test_torch_loads_what_is_written_for_it(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5), np.float32),
        "b.c": rng.standard_normal(300).astype(ml_dtypes.bfloat16),
        "d": np.float16(2.5).reshape(()),
        "e": rng.standard_normal((2, 1, 4), np.float32).T,
    }
    tensors = {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}
    torch_files.write_file(tmp_path / "x.pt", tensors)
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)["module"]
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert str(array.dtype) == str(loaded[name].dtype).removeprefix("torch.")
            np.testing.assert_array_equal(loaded[name].float(), array.astype(np.float32), name)


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_pickle_is_refused_and_not_run(folder, tmp_path):
    state = random_files.state_dict()
    torch.save({"module": state, "code": _Code(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="asks for posix.mkdir, .*; it was not run"):
        port(str(tmp_path / "x.pt"), tmp_path / "out", base=str(folder))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    with pytest.raises(ValueError, match="no file of torch.save"):
        port(str(tmp_path / "bare.pt"), tmp_path / "out", base=str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pt", "x.pt"]


def _whole_numbers(tensors, name):
    tensors[name] = np.ones(tensors[name].shape, np.int64)


def _extra(tensors, name):
    tensors["lora"] = tensors[name]


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (random_files.pop, "tensor '.*' is missing"),
        (random_files.widen, "has shape .* where .* is expected"),
        (random_files.infinite, "holds NaN or infinity"),
        (_whole_numbers, "is of type int64; only bfloat16, float16, float32 can be read"),
        (_extra, "tensor 'lora' is not expected"),
    ],
)
def test_a_damaged_transformer_alone_makes_nothing(folder, tmp_path, layout, change, message):
    tensors = random_files.arrays(random_files.state_dict())
    change(tensors, "proj_out.bias")
    path = tmp_path / f"x.{layout}"
    if layout == "pt":
        torch.save({"module": {k: torch.from_numpy(v) for k, v in tensors.items()}}, path)
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        port(str(path), tmp_path / "out", base=str(folder))
    assert list(tmp_path.iterdir()) == [path]


def test_a_student_cut_short_is_refused(folder, tmp_path):
    torch.save({"module": random_files.state_dict()}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        port(str(tmp_path / "x.pt"), tmp_path / "out", base=str(folder))
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ValueError, match="is a zip archive, but none of torch.save"):
        port(str(tmp_path / "y.pt"), tmp_path / "out", base=str(folder))


def test_without_a_base_only_flux_heads_are_known(tmp_path):
    torch.save({"module": random_files.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="heads are 16 wide .* give --base"):
        port(str(tmp_path / "x.pt"), tmp_path / "out")
