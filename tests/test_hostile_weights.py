"""Weights and folders made to do harm: refused in one sentence, in little memory and time."""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import random_files
import random_pipeline
import safetensors.numpy
from test_torch_files import archive, state, stored

from jax_distill.interop import diffusers_folder, flux_config, orbax_tree, ported_folder
from jax_distill.interop.keys import bfl
from jax_distill.interop.readers import safetensors_files, sources, torch_files
from jax_distill.interop.tensors import Tensor
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.clip import ClipConfig
from jax_distill.models.t5 import T5Config
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port
from jax_distill.worlds.flux.world import schedule_shift

NOTHING = b"}."


@contextlib.contextmanager
def cheap(megabytes=100, seconds=10):
    """Checks that what is done inside takes little."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
        assert time.monotonic() - begin < seconds
    finally:
        tracemalloc.stop()


def refused(match, read, *arguments, **options):
    """The one sentence that something is refused with."""
    with cheap(), pytest.raises(ValueError, match=match) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 1500 and message.isprintable()
    return message


# Files of PyTorch.


@pytest.mark.parametrize("index", [2**31 - 1, 2**32 - 2])
def test_a_memo_has_no_more_room_than_what_is_in_it(tmp_path, index):
    objects = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT
    objects += pickle.LONG_BINPUT + struct.pack("<I", index) + pickle.STOP
    path = archive(tmp_path / "x.pt", objects)
    refused("holds no state dict", torch_files.read_file, path)


@pytest.mark.parametrize(
    "objects",
    [
        pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"abc.",
        pickle.FRAME + b"\xff" * 7 + b"\x7f" + NOTHING,
        pickle.LONG4 + b"\xff\xff\xff\x7f" + NOTHING,
        pickle.BINBYTES8 + b"\xff\xff\xff\xff\xff\0\0\0" + NOTHING,
        pickle.INT + b"9" * 5000 + b"\n.",
        pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999 + pickle.STOP,
        pickle.MARK * 1000 + pickle.STOP,
        b"",
    ],
)
def test_sizes_that_a_pickle_claims_are_not_believed(tmp_path, objects):
    refused("x.pt'", torch_files.read_file, archive(tmp_path / "x.pt", objects))


def test_a_pickle_is_not_read_past_what_weights_have(tmp_path):
    path = archive(tmp_path / "x.pt", pickle.EMPTY_DICT * (5 << 20))
    refused("its 'data.pkl' is longer", torch_files.read_file, path)


def test_no_key_is_compared_or_hashed_that_takes_for_ever(tmp_path):
    body = pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0"
    for index in range(60):
        get = pickle.BINGET + bytes([index])
        body += get + get + pickle.TUPLE2 + pickle.BINPUT + bytes([index + 1])
    objects = pickle.PROTO + b"\x02" + body + pickle.EMPTY_DICT + pickle.BINGET + bytes([60])
    path = archive(tmp_path / "x.pt", objects + pickle.NONE + pickle.SETITEM + pickle.STOP)
    refused("a key that is neither text nor a number", torch_files.read_file, path)


@pytest.mark.parametrize(
    "objects",
    [
        b"cos\nsystem\n(Vtrue\ntR.",
        b"(Vtrue\nios\nsystem\n.",
        b"cbuiltins\neval\n(V1\ntR.",
        pickle.SHORT_BINUNICODE + b"\x05posix" + pickle.SHORT_BINUNICODE + b"\x06system\x93.",
        b"Vsystem\n(Vtrue\ntR.",
        b"ctorch\nFloatStorage\n(V1\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
    ],
)
def test_nothing_is_called_but_what_makes_tensors(tmp_path, objects):
    path = archive(tmp_path / "x.pt", objects)
    refused("was not run, and the file cannot be trusted", torch_files.read_file, path)


def test_a_small_storage_makes_no_large_tensor(tmp_path):
    large = state(stored(), shape=b"(I100000\nI100000\nt", strides=b"(I0\nI0\nt")
    path = archive(tmp_path / "x.pt", large, bytes(8))
    refused("tensor 'x' is not in it", torch_files.read_file, path)
    many = state(stored(), shape=b"(" + b"I1\n" * 9 + b"t", strides=b"(" + b"I1\n" * 9 + b"t")
    path = archive(tmp_path / "y.pt", many, bytes(8))
    refused("a tensor that is none", torch_files.read_file, path)


def test_entries_of_an_archive_are_each_there_once(tmp_path):
    path = archive(tmp_path / "x.pt", state(stored()), bytes(8))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data/0", b"\xff" * 8)
    refused("'data/0' is in it twice", torch_files.read_file, path)


def test_an_archive_of_many_entries_is_not_listed(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("a/data.pkl", NOTHING)
        for index in range(60_000):
            file.writestr(f"a/data/{index:040}", b"")
    refused("list of entries is longer", torch_files.read_file, tmp_path / "x.pt")


# Safetensors.


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    "header, data",
    [
        ({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4)),
        ({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, bytes(4)),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}, bytes(4)),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        ({"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, bytes(4)),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, bytes(4)),
        ({"x\nimport os": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        ({"x" * 5000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        (b"[" * 100_000, b""),
        (b"{}", b"1234"),
        (b"\xff\xfe", b""),
    ],
)
def test_headers_that_no_weights_have_are_refused(tmp_path, header, data):
    path = raw(tmp_path / "x.safetensors", header, data)
    refused("x.safetensors'", safetensors_files.read_file, path)


def test_the_length_of_a_header_is_looked_at_first(tmp_path):
    for length in (2**63, 2**40, 50_000_000):
        path = raw(tmp_path / "x.safetensors", {}, length=length)
        refused(f"its header would be of {length} bytes", safetensors_files.read_file, path)


@pytest.mark.parametrize(
    "file",
    [
        *("../x.safetensors", "/etc/passwd", "a/x.safetensors", "..", "", "x.bin"),
        *("x.safetensors\n", ".x.safetensors", "\\\\host\\x.safetensors", "a\0.safetensors"),
    ],
)
def test_names_of_shards_lead_nowhere(tmp_path, file):
    inner = tmp_path / "model"
    inner.mkdir()
    safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"x": file}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("which is not a file beside it", safetensors_files.read_folder, inner, "model")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"x": 1}}, "x", None])
def test_an_index_of_something_else_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"index\.json'", safetensors_files.read_folder, tmp_path, "model")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused("is no regular file", sources.read, tmp_path / name)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/config.json")
    refused("is no regular file", sources.read, tmp_path / "b")


@pytest.mark.parametrize("name", ["../flux", "a/..", "-x/y", "a/b/c", "a/\u00e9", "a/b\n", ""])
def test_ids_of_the_hub_are_plain(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    if name in ("a/..", ""):
        return  # folders that are there
    refused("no file or folder", lambda: sources.locate(name.replace("\n", "?")))


# Counts.


def shapes_of(network=random_files.NETWORK):
    return {name: tuple(x.shape) for name, x in random_files.state_dict(network).items()}


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
@pytest.mark.parametrize("number", ["99999999", "7", "9" * 200])
def test_blocks_are_counted_not_believed(kind, number):
    shapes = shapes_of() | {f"{kind}.{number}.norm.linear.weight": (4, 4)}
    read = functools.partial(flux_config.from_shapes, axes_dims_rope=(4, 6, 6))
    refused(rf"tensors of '{kind}\.[23]' are missing", read, "x", shapes)


def test_blocks_of_bfls_names_are_counted_too():
    tensors = {
        name: Tensor(shape, np.dtype(np.float32), lambda *_: None)
        for name, shape in random_files.bfl_shapes(width=256, head=128).items()
    }
    tensors["double_blocks.88888888.img_mod.lin.bias"] = tensors["double_blocks.0.img_mod.lin.bias"]
    found = bfl.to_diffusers("x", tensors)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    refused("tensors of 'transformer_blocks.2' are missing", flux_config.from_shapes, "x", shapes)


WRONG = [10**8, 10**400, 0, -1, 1.5, "4", None, True, [2], {"a": 1}, float("nan")]
CONFIGS = {
    "transformer": (
        flux_config.from_diffusers,
        flux_config.to_diffusers(random_pipeline.TRANSFORMER),
        ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim"),
    ),
    "clip": (
        ClipConfig.from_dict,
        random_pipeline.CLIP.to_dict(),
        ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    ),
    "t5": (
        T5Config.from_dict,
        random_pipeline.T5.to_dict(),
        ("vocab_size", "d_model", "d_ff", "num_layers", "relative_attention_num_buckets"),
    ),
    "autoencoder": (
        AutoencoderConfig.from_dict,
        random_pipeline.AUTOENCODER.to_dict(),
        ("layers_per_block", "norm_num_groups", "latent_channels", "block_out_channels"),
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("value", WRONG)
def test_sizes_in_configs_are_sizes(kind, value):
    read, good, names = CONFIGS[kind]
    read(good)
    for name in names:
        if name == "num_layers" and value == 0 and kind == "transformer":
            continue  # a transformer of single blocks alone
        refused(name, read, good | {name: value})


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("transformer", {"guidance_embeds": "false"}),
        ("transformer", {"guidance_embeds": 1}),
        ("transformer", {"axes_dims_rope": "abc"}),
        ("transformer", {"axes_dims_rope": [4, 6, "6"]}),
        ("transformer", {"axes_dims_rope": [16] * 10}),
        ("transformer", {"time_scale": "a lot"}),
        ("transformer", {"guidance_factor": True}),
        ("transformer", {"_class_name": ["FluxTransformer2DModel"]}),
        ("transformer", {"patch_size": {"a": 2}}),
        ("clip", {"hidden_act": ["gelu"]}),
        ("clip", {"hidden_act": "x" * 10_000}),
        ("clip", {"layer_norm_eps": "1e-5"}),
        ("clip", {"num_attention_heads": 3}),
        ("clip", {"eos_token_id": [2]}),
        ("t5", {"layer_norm_epsilon": float("inf")}),
        ("t5", {"feed_forward_proj": {"a": "b"}}),
        ("autoencoder", {"block_out_channels": [8] * 1000}),
        ("autoencoder", {"block_out_channels": []}),
        ("autoencoder", {"scaling_factor": None}),
        ("autoencoder", {"shift_factor": "0"}),
        ("autoencoder", {"shift_factor": False}),
    ],
)
def test_values_in_configs_are_of_their_types(kind, changes):
    read, good, _ = CONFIGS[kind]
    [name] = changes
    refused("is not supported" if name == "_class_name" else name, read, good | changes)


# Folders.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "flux"
    random_pipeline.save_random(folder)
    return folder


@pytest.fixture(scope="module")
def good(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("ported") / "flux"
    port(source, output, text_length=16)
    return output


@pytest.fixture
def copied(source, tmp_path):
    return shutil.copytree(source, tmp_path / "flux")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "ported")


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


def test_only_what_a_tokenizer_is_read_from_is_copied(copied, tmp_path):
    for name in ("evil.py", "chat_template.jinja", "model.safetensors", ".hidden"):
        (copied / "tokenizer" / name).write_text("x")
    (copied / "tokenizer/more").mkdir()
    (copied / "tokenizer/more/vocab.json").write_text("{}")
    port(copied, tmp_path / "out", text_length=16)
    for name in diffusers_folder.TOKENIZERS:
        for path in (tmp_path / "out" / name).iterdir():
            assert path.name in diffusers_folder.TOKENIZER_FILES and not path.is_symlink()
            assert path.read_bytes() == (copied / name / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["file", "relative", "folder", "nothing"])
def test_no_link_carries_another_file_along(copied, tmp_path, kind):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/vocab.json").write_text('{"secret": 1}')
    path = copied / "tokenizer/vocab.json"
    path.unlink(missing_ok=True)
    match kind:
        case "file":
            path.symlink_to(tmp_path / "secret/vocab.json")
        case "relative":
            path.symlink_to("../../secret/vocab.json")
        case "folder":
            shutil.rmtree(copied / "tokenizer")
            (copied / "tokenizer").symlink_to(tmp_path / "secret")
        case "nothing":
            path.symlink_to("gone")
    match = "leads to no file" if kind == "nothing" else "is a link to .*, outside of"
    with pytest.raises(ValueError, match=match):
        port(copied, tmp_path / "out", text_length=16)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_is_read_with_its_links(source, good, tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(x for x in source.rglob("*") if x.is_file())):
        blob = cache / f"blobs/{number}"
        shutil.copyfile(path, blob)
        link = cache / "snapshots/1" / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    port(cache / "snapshots/1", tmp_path / "out", text_length=16)
    for name in diffusers_folder.TOKENIZERS:
        for path in (good / name).iterdir():
            assert (tmp_path / "out" / name / path.name).read_bytes() == path.read_bytes()
    assert ported_folder.describe(tmp_path / "out") == ported_folder.describe(good)


def test_configs_of_a_folder_are_refused_by_file_and_key(copied, tmp_path):
    for name, changes in (
        ("transformer", {"num_layers": 10**8}),
        ("text_encoder_2", {"num_layers": 10**8}),
        ("text_encoder", {"num_hidden_layers": "many"}),
        ("vae", {"layers_per_block": 10**6}),
    ):
        path = copied / name / "config.json"
        kept = path.read_text()
        edit(path, **changes)
        key = next(iter(changes))
        refused(f"{name}.*{key}", diffusers_folder.parts, copied)
        path.write_text(kept)
    diffusers_folder.parts(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "Flow\nimport os"},
        {"_class_name": ["x"]},
        {"shift": "3.0"},
        {"shift": 0},
        {"shift": float("nan")},
        {"shift": -1.0},
        {"base_shift": [0.5]},
        {"max_shift": 1e9},
        {"base_image_seq_len": 4096},
        {"max_image_seq_len": 0},
        {"use_dynamic_shifting": "yes"},
        {"num_train_timesteps": 1e3 + 0.5},
        {"sigma_min": float("inf")},
    ],
)
def test_a_scheduler_says_numbers_within_bounds(copied, folder, changes):
    edit(copied / "scheduler/scheduler_config.json", **changes)
    refused(r"scheduler_config\.json'.*download it again", diffusers_folder.scheduler, copied)
    scheduler = json.loads((folder / "ported.json").read_text())["scheduler"]
    edit(folder / "ported.json", scheduler=scheduler | changes)
    refused("the scheduler.*port it again", ported_folder.describe, folder)


def test_a_schedule_that_means_another_time_is_refused():
    steep = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 257}
    refused("which leaves no time but one", schedule_shift, steep, 4096)
    refused("num_train_timesteps=500", schedule_shift, {"num_train_timesteps": 500}, 256)


DAMAGES = [
    {"text_length": 10**9},
    {"text_length": "24"},
    {"text_length": None},
    {"text_length": 0},
    {"parts": []},
    {"parts": {}},
    {"parts": {"network": 1}},
    {"parts": {"../x": {}}},
    {"names": {"network": "x"}},
    {"names": {}},
    {"scheduler": "dynamic"},
    {"assumed": "a sentence"},
    {"assumed": [1]},
    {"source": {"layout": "gguf"}},
    {"source": "diffusers"},
    {"dtype": 3},
]


@pytest.mark.parametrize("changes", DAMAGES, ids=str)
def test_a_description_is_of_its_types(folder, changes):
    edit(folder / "ported.json", **changes)
    refused(r"ported\.json'.*port it again", ported_folder.describe, folder)


@pytest.mark.parametrize("key", ["source", "dtype", "parts", "names", "scheduler", "text_length"])
def test_a_description_without_a_key_is_refused(folder, key):
    values = json.loads((folder / "ported.json").read_text())
    del values[key]
    (folder / "ported.json").write_text(json.dumps(values))
    refused(f"{key}.*port it again", ported_folder.describe, folder)


def test_parts_of_a_description_are_read_as_those_of_a_folder(folder):
    values = json.loads((folder / "ported.json").read_text())
    for name in ported_folder.PARTS:
        parts = {**values["parts"], name: {**values["parts"][name], "num_layers": 10**8}}
        parts[name] |= {"num_hidden_layers": 10**8, "layers_per_block": 10**8}
        edit(folder / "ported.json", parts=parts)
        refused(rf"parts\.{name}: .*port it again", ported_folder.describe, folder)


@pytest.mark.parametrize("length", [10**9, 8193, 1, -5])
def test_lengths_of_captions_are_bounded_by_flag_too(source, tmp_path, length):
    with pytest.raises(ValueError, match=f"--text_length: {length} is not between 2 and 8192"):
        port(source, tmp_path / "out", text_length=length)
    assert not (tmp_path / "out").exists()


# Trees of Orbax.


def test_stored_shapes_are_compared_before_they_are_expanded(folder, tmp_path):
    array = min((folder / "network").glob("*blocks.*kernel/.zarray"))
    zarr = json.loads(array.read_text())
    edit(array, shape=[10**9, *zarr["shape"][1:]])
    refused("has shape .1000000000.* is expected", export, str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit(array, shape=zarr["shape"], chunks=[10**9, *zarr["chunks"][1:]])
    refused("is damaged .chunks of shape", orbax_tree.open_tree, folder / "network")


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("tree_metadata"),
        lambda tree: tree.update(tree_metadata=[]),
        lambda tree: tree.update(use_ocdbt="yes"),
        lambda tree: next(iter(tree["tree_metadata"].values())).update(key_metadata=[]),
        lambda tree: next(iter(tree["tree_metadata"].values())).update(
            key_metadata=[{"key": None}]
        ),
        lambda tree: next(iter(tree["tree_metadata"].values())).update(
            key_metadata=[{"key": "../../x"}]
        ),
        lambda tree: tree["tree_metadata"].update(
            x={"key_metadata": [{"key": "image_in"}, {"key": "kernel"}, {"key": "more"}]}
        ),
    ],
)
def test_a_damaged_description_of_a_tree_is_refused(folder, change):
    path = folder / "network" / orbax_tree.METADATA
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    refused("network", orbax_tree.open_tree, folder / "network")


def test_networks_are_still_those_of_their_files(source, good):
    """What the bounds are for leaves what is good as it is."""
    config = flux_config.from_diffusers(ported_folder.describe(good)["parts"]["network"])
    assert config == dataclasses.replace(random_pipeline.TRANSFORMER)
    assert diffusers_folder.scheduler(source) == ported_folder.describe(good)["scheduler"]
