"""Ported weights are the source's, bit for bit, and a source that is not whole makes nothing."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import random_files
import random_pipeline
import torch
from random_files import NETWORK
from safetensors.numpy import load_file, save_file

from jax_distill import config
from jax_distill.interop import diffusers_folder, orbax_tree, ported_folder
from jax_distill.interop.readers import sources
from jax_distill.runs.porting import port


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


@pytest.mark.parametrize("name", ported_folder.PARTS)
def test_parts_are_the_sources(source, folder, name):
    part = diffusers_folder.parts(source)[name]
    theirs = _tensors(source / diffusers_folder.SUBFOLDERS[name])
    assert part.tensors.keys() == theirs.keys()
    loaded = ported_folder.load_part(folder, name, part.like)
    jax.tree.map(np.testing.assert_array_equal, loaded, part.table.to_jax(theirs, part.like))


def test_the_folder_says_what_it_holds(source, folder):
    settings = config.load(folder)
    assert settings.world == "flux" and settings.objective.name == "flow_matching"
    assert settings.model.num_single_layers == 3 and settings.model.time_scale == 1000
    description = ported_folder.describe(folder)
    assert list(description["parts"]) == list(ported_folder.PARTS)
    assert description["parts"]["clip"] == json.loads(
        (source / "text_encoder/config.json").read_text()
    )
    assert description["scheduler"]["use_dynamic_shifting"]
    for path in (source / "tokenizer_2").iterdir():
        assert (folder / "tokenizer_2" / path.name).read_bytes() == path.read_bytes()
    assert ported_folder.is_ported(folder) and not ported_folder.is_ported(source)


def test_parts_are_restored_onto_a_mesh(source, folder):
    part = diffusers_folder.parts(source)["network"]
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    loaded = ported_folder.load_part(folder, "network", part.like, mesh=mesh)
    kernel = loaded["single_blocks"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_a_part_of_other_shapes_is_refused(source, folder):
    parts = diffusers_folder.parts(source)
    with pytest.raises(ValueError, match="clip': parameter '.*' is (missing|not expected)"):
        ported_folder.load_part(folder, "clip", parts["t5"].like)
    wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), parts["t5"].like)
    with pytest.raises(ValueError, match=r"'norm_out/scale' has shape \(24,\) where \(24, 2\)"):
        ported_folder.load_part(folder, "t5", {**parts["t5"].like, "norm_out": wider["norm_out"]})


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
        (_change("vae", random_files.pop), "vae: tensor '.*' is missing"),
        (_change("vae", random_files.infinite), "vae: tensor '.*' holds NaN or infinity"),
        (
            _change("text_encoder", random_files.widen),
            r"text_encoder: tensor '.*' has shape \(2, .* expected",
        ),
        (_change("text_encoder_2", _extra), "text_encoder_2: tensor 'lora' is not expected"),
    ],
)
def test_a_damaged_source_makes_nothing(source, tmp_path, damage, message):
    shutil.copytree(source, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(ValueError, match=message):
        port(str(tmp_path / "damaged"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_whole_pipeline_takes_no_base(source, folder, tmp_path):
    with pytest.raises(ValueError, match="an autoencoder of its own; leave it out"):
        port(source, tmp_path / "out", base=str(folder))


def test_positions_that_older_folders_hold_are_passed_over(source, folder, tmp_path):
    shutil.copytree(source, tmp_path / "older")
    path = tmp_path / "older/text_encoder/model.safetensors"

    def add(tensors):
        [name] = [name for name in tensors if name.endswith("position_embedding.weight")]
        tensors[name.replace("embedding.weight", "ids")] = np.arange(77)[None]

    _edit(path, add)
    port(tmp_path / "older", tmp_path / "out")
    trees = (orbax_tree.open_tree(home / "clip") for home in (tmp_path / "out", folder))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.read(), y.read()), *trees)


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
    with pytest.raises(ValueError, match="out': no space left; make room"):
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
        files = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        wanted = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns)
        assert sorted(wanted) == sorted(files)
        more = ["transformer/diffusion_pytorch_model.bin", "x.fp16.safetensors", "vae/x.msgpack"]
        half = "text_encoder/model.fp16-00001-of-00002.safetensors"
        wanted = huggingface_hub.utils.filter_repo_objects(
            [*more, half], allow_patterns=allow_patterns
        )
        assert list(wanted) == [half]
        asked.append(name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sources.locate("owner/name") == source and asked == ["owner/name"]

    def fail(name, allow_patterns):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="cannot be had from the hub .*no route to host.; down"):
        port("owner/name", tmp_path / "out")
    with pytest.raises(ValueError, match="no file or folder '/no/such/folder'"):
        port("/no/such/folder", tmp_path / "out")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "jax_distill.port", f"--source={tmp_path}"]
    ran = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == f"error: --output: '{tmp_path}' exists; remove it or choose another\n"
    command += [f"--output={tmp_path / 'new'}", "--base=x"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.startswith(
        "error: 'x' is not a ported folder: it has no ported.json; make one"
    )
