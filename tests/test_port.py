"""Ported weights are the source's, bit for bit, and a source that is not whole makes nothing."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import random_flux
import random_pipeline
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.numpy import load_file, save_file

from jax_distill import config, ported
from jax_distill.interop import (
    bfl_keys,
    diffusers_folder,
    orbax_tree,
    safetensors_files,
    sources,
    torch_files,
)
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.tensors import Tensor
from jax_distill.interop.transformer_keys import TRANSFORMER_KEYS
from jax_distill.porting import port

NETWORK = dataclasses.replace(random_pipeline.TRANSFORMER, num_layers=2, num_single_layers=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "flux"
    random_pipeline.save_random(folder, random_pipeline.Sizes(NETWORK))
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("ported") / "flux"
    port(source, output)
    return output


def _tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > (folder.name != "text_encoder")  # that is in one file
    return {name: array for file in files for name, array in load_file(file).items()}


@pytest.mark.parametrize("name", ported.PARTS)
def test_parts_are_the_sources(source, folder, name):
    part = diffusers_folder.parts(source)[name]
    theirs = _tensors(source / diffusers_folder.SUBFOLDERS[name])
    assert part.tensors.keys() == theirs.keys()
    loaded = ported.load_part(folder, name, part.like)
    jax.tree.map(np.testing.assert_array_equal, loaded, part.table.to_jax(theirs, part.like))


def test_the_folder_says_what_it_holds(source, folder):
    settings = config.load(folder)
    assert settings.world == "flux" and settings.objective.name == "flow_matching"
    assert settings.model.num_single_layers == 3 and settings.model.time_scale == 1000
    description = ported.describe(folder)
    assert list(description["parts"]) == list(ported.PARTS)
    assert description["parts"]["clip"] == json.loads(
        (source / "text_encoder/config.json").read_text()
    )
    assert description["scheduler"]["use_dynamic_shifting"]
    for path in (source / "tokenizer_2").iterdir():
        assert (folder / "tokenizer_2" / path.name).read_bytes() == path.read_bytes()
    assert ported.is_ported(folder) and not ported.is_ported(source)


def test_parts_are_restored_onto_a_mesh(source, folder):
    part = diffusers_folder.parts(source)["network"]
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    loaded = ported.load_part(folder, "network", part.like, mesh=mesh)
    kernel = loaded["single_blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_a_part_of_other_shapes_is_refused(source, folder):
    parts = diffusers_folder.parts(source)
    with pytest.raises(ValueError, match="clip': parameter '.*' is (missing|not expected)"):
        ported.load_part(folder, "clip", parts["t5"].like)
    wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), parts["t5"].like)
    with pytest.raises(ValueError, match=r"'norm_out/scale' has shape \(24,\) where \(24, 2\)"):
        ported.load_part(folder, "t5", {**parts["t5"].like, "norm_out": wider["norm_out"]})


def test_types_are_kept_or_chosen(tmp_path):
    source = tmp_path / "flux"
    pipe = random_pipeline.save_random(source)
    pipe.to(torch.bfloat16).save_pretrained(source, max_shard_size="15KB")
    part = diffusers_folder.parts(source)["t5"]
    for dtype, expected in (("keep", ml_dtypes.bfloat16), ("float32", np.float32)):
        port(source, tmp_path / dtype, dtype=dtype)
        assert config.load(tmp_path / dtype).dtype == np.dtype(expected).name
        tree = orbax_tree.open_tree(tmp_path / dtype / "t5")
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(expected)}
        theirs = part.table.to_jax(_tensors(source / "text_encoder_2"), part.like)
        theirs = jax.tree.map(lambda x, dtype=expected: x.astype(dtype), theirs)
        jax.tree.map(lambda x, leaf: np.testing.assert_array_equal(leaf.read(), x), theirs, tree)


def _bfl_shapes(width=32, head=16, inner=None):
    """Names and shapes of `flux1-*.safetensors`; `inner` in the place of all inputs' widths."""
    shapes = {}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inner or inputs), (outputs,)

    linear("img_in", width, 16)
    linear("txt_in", width, 24)
    for name, inputs in (("time_in", 256), ("guidance_in", 256), ("vector_in", 16)):
        linear(f"{name}.in_layer", width, inputs)
        linear(f"{name}.out_layer", width, width)
    for block in (f"double_blocks.{i}.{stream}" for i in range(2) for stream in ("img", "txt")):
        linear(f"{block}_mod.lin", 6 * width, width)
        linear(f"{block}_attn.qkv", 3 * width, width)
        linear(f"{block}_attn.proj", width, width)
        linear(f"{block}_mlp.0", 4 * width, width)
        linear(f"{block}_mlp.2", width, 4 * width)
        shapes[f"{block}_attn.norm.query_norm.scale"] = (head,)
        shapes[f"{block}_attn.norm.key_norm.scale"] = (head,)
    for block in (f"single_blocks.{i}" for i in range(3)):
        linear(f"{block}.modulation.lin", 3 * width, width)
        linear(f"{block}.linear1", 7 * width, width)
        linear(f"{block}.linear2", width, 5 * width)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (head,)
    linear("final_layer.linear", 16, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def _random(shapes):
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(v, np.float32) for k, v in shapes.items()}


def test_bfls_names_are_those_of_diffusers_converter(tmp_path):
    theirs = _random(_bfl_shapes(width=3072, head=128, inner=1))  # the width that it knows
    save_file(theirs, tmp_path / "flux1.safetensors")
    ours = bfl_keys.to_diffusers("", safetensors_files.read_file(tmp_path / "flux1.safetensors"))
    tensors = {name: torch.from_numpy(array) for name, array in theirs.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(tensors)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name].read(), tensor.numpy(), name)
        assert ours[name].shape == tensor.shape


@pytest.mark.parametrize("prefix", ["", bfl_keys.PREFIX])
def test_bfls_layout_is_ported(folder, tmp_path, prefix):
    path = tmp_path / "flux1-lite.safetensors"
    save_file({prefix + k: v for k, v in _random(_bfl_shapes()).items()}, path)
    port(str(path), tmp_path / "out", base=str(folder))
    settings = config.load(tmp_path / "out")
    assert settings.model == config.load(folder).model
    assert settings.teacher.checkpoint == str(folder)
    assert ported.describe(tmp_path / "out")["source"]["layout"] == "bfl"
    expected = bfl_keys.to_diffusers("", safetensors_files.read_file(path))
    _assert_same_tensors(tmp_path / "out", {k: x.read() for k, x in expected.items()})


def _assert_same_tensors(folder, expected):
    tree = orbax_tree.open_tree(folder / "network")
    tensors = tensors_of(tree, TRANSFORMER_KEYS)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name].read(), array, name)


def _student(path, method, dtype=torch.float32):
    """Writes a student as T2I-Distill does; returns its tensors."""
    state = random_flux.reference(NETWORK).to(dtype).state_dict()
    width = NETWORK.hidden_size
    if method == "meanflow":
        second = {
            "linear_1.weight": (width, 256),
            "linear_1.bias": (width,),
            "linear_2.weight": (width, width),
            "linear_2.bias": (width,),
        }
        added = {f"timestep_embedder2.{k}": torch.randn(v).to(dtype) for k, v in second.items()}
        state.update(added)
    head = {"logvar_linear.weight": torch.randn(1, width), "logvar_linear.bias": torch.zeros(1)}
    torch.save({"module": state | (head if method == "scm" else {})}, path)
    return state


@pytest.mark.parametrize("method", ["scm", "meanflow"])
def test_t2i_distills_students_are_ported(folder, tmp_path, method):
    state = _student(tmp_path / "student.pt", method)
    port(str(tmp_path / "student.pt"), tmp_path / "out", base=str(folder))
    settings = config.load(tmp_path / "out")
    assert settings.objective.name == method
    assert settings.model.time_scale == 1.0
    assert settings.model.interval_embeds == (method == "meanflow")
    _assert_same_tensors(tmp_path / "out", {k: v.numpy() for k, v in state.items()})


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


def _edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _cut(source):
    path = sorted((source / "transformer").glob("*.safetensors"))[3]
    path.write_bytes(path.read_bytes()[:-100])


def _lose_shard(source):
    sorted((source / "text_encoder_2").glob("*.safetensors"))[1].unlink()


def _miss(source):
    _edit(_shard(source), lambda tensors: tensors.pop("proj_out.bias"))


def _add(source):
    _edit(_shard(source), lambda tensors: tensors.update(lora=np.zeros(3, np.float32)))


def _reshape(source):
    _edit(
        _shard(source),
        lambda tensors: tensors.update({"proj_out.bias": np.zeros((4, 4), np.float32)}),
    )


def _spoil(source):
    bad = np.full(16, np.nan, np.float32)
    _edit(_shard(source), lambda tensors: tensors.update({"proj_out.bias": bad}))


def _shard(source):
    index = source / "transformer/diffusion_pytorch_model.safetensors.index.json"
    return index.parent / json.loads(index.read_text())["weight_map"]["proj_out.bias"]


def _change(part, change):
    """Changes the first tensor of another part."""

    def damage(source):
        path = sorted((source / part).glob("*.safetensors"))[0]
        name = sorted(load_file(path))[0]
        _edit(path, lambda tensors: change(tensors, name))

    return damage


def _pop(tensors, name):
    del tensors[name]


def _widen(tensors, name):
    tensors[name] = np.zeros((2, *tensors[name].shape), tensors[name].dtype)


def _infinite(tensors, name):
    tensors[name] = np.full_like(tensors[name], np.inf)


def _extra(tensors, name):
    tensors["lora"] = tensors[name]


def _no_config(source):
    (source / "vae/config.json").unlink()


def _no_part(source):
    shutil.rmtree(source / "text_encoder")


def _no_tokenizer(source):
    shutil.rmtree(source / "tokenizer_2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"00004-of-.*' is cut short or damaged \(.*\); download it again$"),
        (_lose_shard, "model-00002-of-.*' is missing; download"),
        (_miss, "transformer: tensor 'proj_out.bias' is missing"),
        (_add, "transformer: tensor 'lora' is not expected"),
        (_reshape, r"'proj_out.bias' has shape \(4, 4\) where \(16,\) is expected"),
        (_spoil, "transformer: tensor 'proj_out.bias' holds NaN or infinity"),
        (_no_config, "vae/config.json' is missing"),
        (_no_part, "has no text_encoder/"),
        (_no_tokenizer, "tokenizer_2' is missing"),
        (_change("vae", _pop), "vae: tensor '.*' is missing"),
        (_change("vae", _infinite), "vae: tensor '.*' holds NaN or infinity"),
        (_change("text_encoder", _widen), r"text_encoder: tensor '.*' has shape \(2, .* expected"),
        (_change("text_encoder_2", _extra), "text_encoder_2: tensor 'lora' is not expected"),
    ],
)
def test_a_damaged_source_makes_nothing(source, tmp_path, damage, message):
    shutil.copytree(source, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(ValueError, match=message):
        port(str(tmp_path / "damaged"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_pickle_is_refused_and_not_run(folder, tmp_path):
    state = random_flux.reference(NETWORK).state_dict()
    torch.save({"module": state, "code": _Code(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="asks for posix.mkdir, .*; it was not run"):
        port(str(tmp_path / "x.pt"), tmp_path / "out", base=str(folder))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Code(tmp_path / "ran")))
    with pytest.raises(ValueError, match="no file of torch.save"):
        port(str(tmp_path / "bare.pt"), tmp_path / "out", base=str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pt", "x.pt"]


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pop, "tensor '.*' is missing"),
        (_widen, "has shape .* where .* is expected"),
        (_infinite, "holds NaN or infinity"),
        (_extra, "tensor 'lora' is not expected"),
    ],
)
def test_a_damaged_transformer_alone_makes_nothing(folder, tmp_path, layout, change, message):
    tensors = {k: v.numpy() for k, v in random_flux.reference(NETWORK).state_dict().items()}
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
    _student(tmp_path / "x.pt", "scm")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short"):
        port(str(tmp_path / "x.pt"), tmp_path / "out", base=str(folder))
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(ValueError, match="is a zip archive, but none of torch.save"):
        port(str(tmp_path / "y.pt"), tmp_path / "out", base=str(folder))


def test_without_a_base_only_flux_heads_are_known(tmp_path):
    _student(tmp_path / "x.pt", "scm")
    with pytest.raises(ValueError, match="heads are 16 wide .* give --base"):
        port(str(tmp_path / "x.pt"), tmp_path / "out")


def test_a_whole_pipeline_takes_no_base(source, folder, tmp_path):
    with pytest.raises(ValueError, match="an autoencoder of its own; leave it out"):
        port(source, tmp_path / "out", base=str(folder))


def test_a_full_disk_makes_nothing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ValueError, match="needs .* GB and its disk has 0.0 GB free"):
            port(source, tmp_path / "out")

    class Full:
        """TensorStore on a full disk: what it opens, and what it writes."""

        def write(self, _):
            return self

        def result(self):
            if opened:
                raise ValueError(
                    "RESOURCE_EXHAUSTED: Error writing local file: Failed to write 4096 bytes:"
                    " No space left on device [os_error_code='28']"
                )
            opened.append(True)
            return self

    opened = []
    monkeypatch.setattr(orbax_tree.ts, "open", lambda *_, **__: Full())
    with pytest.raises(ValueError, match="no space left for '.*out'; make room"):
        port(source, tmp_path / "out")
    assert opened and not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_as_it_is(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(ValueError, match="out' exists; remove it or choose another"):
        port(source, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_layers_of_several_types_need_one(source, tmp_path):
    shutil.copytree(source, tmp_path / "mixed")
    path = tmp_path / "mixed/transformer/diffusion_pytorch_model.safetensors.index.json"
    name = "transformer_blocks.1.attn.norm_q.weight"
    shard = path.parent / json.loads(path.read_text())["weight_map"][name]
    _edit(shard, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    with pytest.raises(ValueError, match="layers of one parameter; give --dtype"):
        port(str(tmp_path / "mixed"), tmp_path / "out")
    port(str(tmp_path / "mixed"), tmp_path / "out", dtype="float32")


def test_a_source_from_the_hub(source, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sources.locate("owner/name") == source and asked == ["owner/name"]

    def fail(name, allow_patterns):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="cannot be had from the hub .*no route to host.; down"):
        port("owner/name", tmp_path / "out")
    with pytest.raises(ValueError, match="there is no file or folder '/no/such/folder'"):
        port("/no/such/folder", tmp_path / "out")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "jax_distill.port", f"--source={tmp_path}"]
    ran = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == f"error: --output: '{tmp_path}' exists; remove it or choose another\n"
    command += [f"--output={tmp_path / 'new'}", "--base=x", "--text_length=77"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "error: --text_length: it is that of --base; leave it out\n"
