"""Errors that pass are no reason to make anything anew, whichever reader meets them."""

import errno
import os
import shutil
from types import SimpleNamespace

import jax
import made_records
import numpy as np
import pytest
import random_pipeline
import safetensors
import tensorstore as ts
from made_records import some
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save_file
from test_disks import of_rust, of_tensorflow, of_tensorstore, raised, wrapped
from test_sources import pack, table
from test_torch_files import archive, state, stored

from jax_distill.data import pictures, records, shards
from jax_distill.data.sources import tars
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.data.sources.parquet import open_parquet
from jax_distill.interop import diffusers_folder, orbax_tree, ported_folder, tensors
from jax_distill.interop.readers import safetensors_files, sources, torch_files
from jax_distill.runs import commands
from jax_distill.runs.porting import port
from jax_distill.storage import disks, files
from jax_distill.storage.files import FileError, unread
from jax_distill.worlds.flux import tokenizers
from jax_distill.worlds.shapes import bundled

NUMBERS = [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE]
DAMAGE = ("anew", "download", "port it", "restore", "remove", "reinstall", "take it away")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file or folder of each kind."""
    root = tmp_path_factory.mktemp("good")
    random_pipeline.save_random(root / "flux")
    port(root / "flux", root / "ported", text_length=16)
    save_file({"x": np.zeros(2, np.float32)}, root / "x.safetensors")
    archive(root / "x.pt", state(stored()), bytes(8))
    made_records.write(root / "records", some(2))
    pack(root / "x.tar", [("a.png", b"a"), ("a.txt", b"a")])
    parquet.write_table(table(), root / "x.parquet")
    (root / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(root / "pictures/x.png")
    (root / "pictures/metadata.jsonl").write_text('{"file_name": "x.png", "text": "x"}\n')
    return root


def failing(error):
    """Stands for a library's function."""

    def call(*arguments, **options):
        raise error

    return call


def failing_later(error):
    """Stands for one that returns a future."""
    return lambda *arguments, **options: SimpleNamespace(result=failing(error))


def safetensors_error(number):
    return safetensors.SafetensorError(str(of_rust(number)))


def zip_error(number):
    error = torch_files.zipfile.BadZipFile("File is not a zip file")
    error.__context__ = raised(number)
    return error


def read_part(root):
    like = diffusers_folder.shapes(random_pipeline.T5)
    ported_folder.load_part(root / "ported", "t5", like)


READERS = {  # what fails, with which kind of error, and who meets it
    "safetensors": (
        (safetensors_files, "safe_open"),
        safetensors_error,
        lambda root: safetensors_files.read_file(root / "x.safetensors"),
    ),
    "metadata": (
        (safetensors_files, "safe_open"),
        safetensors_error,
        lambda root: safetensors_files.read_metadata(root / "x.safetensors"),
    ),
    "embedded": ((bundled, "load_file"), safetensors_error, lambda root: bundled.load("teacher")),
    "torch": (
        (torch_files.zipfile, "ZipFile"),
        zip_error,
        lambda root: torch_files.read_file(root / "x.pt"),
    ),
    "orbax": (
        (ts, "open"),
        of_tensorstore,
        lambda root: orbax_tree.open_tree(root / "ported/clip"),
    ),
    "part": ((ported_folder.ocp.StandardCheckpointHandler, "restore"), wrapped, read_part),
    "shards": (
        (shards.grain.sources, "ArrayRecordDataSource"),
        of_tensorflow,
        lambda root: records.LatentRecords(root / "records"),
    ),
    "record": (
        (shards.grain.sources.ArrayRecordDataSource, "__getitem__"),
        of_tensorflow,
        lambda root: records.LatentRecords(root / "records")[0],
    ),
    "picture": (
        (pictures.Image, "open"),
        raised,
        lambda root: pictures.shown(root / "pictures/x.png"),
    ),
    "tar": (
        (tars.tarfile, "open"),
        raised,
        lambda root: tars.Tars([root / "x.tar"]),
    ),
    "parquet": (
        (parquet, "ParquetFile"),
        raised,
        lambda root: open_parquet([root / "x.parquet"]),
    ),
    "row group": (
        (parquet.ParquetFile, "read_row_group"),
        raised,
        lambda root: open_parquet([root / "x.parquet"])[0],
    ),
    "tokenizer": (
        (tokenizers.disks, "read_all"),
        raised,
        lambda root: tokenizers.FluxTokenizer.load(root / "flux", 16),
    ),
}


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("reader", READERS)
def test_a_passing_error_is_said_as_one(good, monkeypatch, reader, number):
    (module, name), kind, read = READERS[reader]
    read(good)
    error = kind(number)
    stand_in = failing_later if module is ts else failing
    monkeypatch.setattr(module, name, stand_in(error))
    with pytest.raises(ValueError) as found:
        read(good)
    said = str(found.value)
    reason = os.strerror(number)
    fix = "mend that and run the same command again"
    assert said.endswith(f"cannot be read for now ({reason}); {fix}")
    assert not any(word in said for word in DAMAGE) and found.value.__suppress_context__


def first_leaf(folder):
    return jax.tree.leaves(orbax_tree.open_tree(folder))[0]


def test_a_parameter_that_is_read_later_likewise(good, monkeypatch):
    leaf = first_leaf(good / "ported/clip")
    monkeypatch.setattr(ts.TensorStore, "read", failing_later(of_tensorstore(errno.EIO)))
    with pytest.raises(ValueError, match=r"clip' cannot be read for now \(Input/output error\);"):
        leaf.read()


def test_a_parameter_that_is_damaged_is_called_so(good, tmp_path):
    folder = shutil.copytree(good / "ported/clip", tmp_path / "clip")
    leaf = first_leaf(folder)
    for chunk in folder.glob("*/[0-9]*"):
        chunk.write_bytes(b"x")
    with pytest.raises(ValueError, match="^'.*clip' is damaged (.*)$"):
        leaf.read()


FAILING = "/proc/self/mem"  # a regular file whose first bytes are an error, EIO


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_errors_of_reads_name_the_file(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.symlink_to(FAILING)
    readers = [files.read_text, lambda path: list(files.read_lines(path)), sources.read]
    readers.append(lambda path: tensors.read_numbers(path, np.dtype(np.float32), 2, 0, "x"))
    for read in readers:
        with pytest.raises(OSError) as found:
            read(path)
        said = commands.explain(found.value)
        assert said == f"'{path}': Input/output error; mend that and run the same command again"


def test_what_a_decoder_keeps_to_itself_is_found(tmp_path, monkeypatch):
    path = tmp_path / "x.tif"
    path.symlink_to(FAILING)
    monkeypatch.setattr(pictures.Image, "open", failing(OSError("decoder error -2")))
    with pytest.raises(FileError, match="x.tif' cannot be read for now .Input/output error.;"):
        pictures.shown(path)


def test_a_decoders_own_error_is_one_of_the_picture(good, monkeypatch):
    for error in (OSError("image file is truncated"), ValueError("permission denied"), EOFError()):
        monkeypatch.setattr(pictures.Image, "open", failing(error))
        with pytest.raises(FileError, match="x.png' cannot be read as a picture: .*; save it anew"):
            pictures.shown(good / "pictures/x.png")


@pytest.mark.parametrize("name", ["x.png", "metadata.jsonl"])
def test_what_a_failing_disk_has_is_not_missing(good, monkeypatch, name):
    stat = os.stat

    def failing_stat(path, *arguments, **options):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", failing_stat)
    with pytest.raises(PermissionError):
        PictureFolder(good / "pictures")[0]


def test_memory_that_is_short_says_nothing_of_a_file(good, monkeypatch):
    for module, name, read in (
        (pictures.Image, "open", lambda: pictures.shown(good / "pictures/x.png")),
        (torch_files.pickles, "load", lambda: torch_files.read_file(good / "x.pt")),
    ):
        monkeypatch.setattr(module, name, failing(MemoryError()))
        with pytest.raises(FileError, match=r"cannot be read for now \(out of memory\)"):
            read()


def test_what_is_no_passing_error_is_left_to_the_caller():
    assert unread("x", ValueError("DATA_LOSS: checksum")) is None
    assert unread("x", OSError("truncated"), disks.raised) is None
    assert unread("x", raised(errno.ENOENT)) is None
    assert str(unread("x", wrapped(errno.EIO))).startswith("x cannot be read for now (Input/output")
