"""Files of torch.save made to do harm: refused, with nothing run, changed or read past."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from jax_distill.interop.readers import torch_files
from jax_distill.interop.tensors import Tensor

GLOBAL = {
    "storage": b"ctorch\nBFloat16Storage\n",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n",
    "dict": b"ccollections\nOrderedDict\n",
}


def archive(path, objects, data=b"", size=None):
    """A file of torch.save with a pickle of our own and one storage."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", objects)
        file.writestr("archive/data/0", data)
        if size is not None:
            file.filelist[-1].file_size = file.filelist[-1].compress_size = size
    return path


def stored(key=b"V0\n", count=b"I4\n", name=GLOBAL["storage"]):
    return b"(Vstorage\n" + name + key + b"Vcpu\n" + count + b"tQ"


def state(storage, offset=b"I0\n", shape=b"(I4\nt", strides=b"(I1\nt"):
    """{"module": {"x": tensor}}, written out."""
    tensor = GLOBAL["rebuild"] + b"(" + storage + offset + shape + strides + b"I00\n}tR"
    return b"(dVmodule\n(dVx\n" + tensor + b"ss."


def test_the_files_made_here_can_be_read(tmp_path):
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    path = archive(tmp_path / "x.pt", state(stored()), values.tobytes())
    np.testing.assert_array_equal(torch_files.read_file(path)["x"].read(), values)


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("change", [{"itemsize": 64}, (3, "|", None, None, None, 64, 1, 63)])
def test_nothing_that_a_pickle_names_can_be_changed(tmp_path, name, change):
    body = pickle.dumps(change, protocol=0)[:-1]
    path = archive(tmp_path / "x.pt", GLOBAL[name] + body + b"b.")
    with pytest.raises(ValueError, match="damaged|holds no state dict"):
        torch_files.read_file(path)
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2
    good = archive(tmp_path / "y.pt", state(stored()), bytes(8))
    assert torch_files.read_file(good)["x"].read().shape == (4,)


@pytest.mark.parametrize(
    "objects",
    [
        state(stored(key=b"I0\n")),
        state(stored(count=b"Vmany\n")),
        state(stored(count=b"I-4\n")),
        state(stored(name=b"VFloatStorages\n")),
        state(b"Vstorage\n"),
        state(stored(), offset=b"Vnone\n"),
        state(stored(), offset=b"I-1\n"),
        state(stored(), shape=b"(I-4\nt"),
        state(stored(), strides=b"(F1.5\nt"),
    ],
)
def test_a_tensor_that_is_none_is_refused(tmp_path, objects):
    with pytest.raises(ValueError, match="asks for a (tensor|storage) that is none"):
        torch_files.read_file(archive(tmp_path / "x.pt", objects, bytes(8)))


@pytest.mark.parametrize(
    "objects",
    [
        state(stored(), shape=b"(I5\nt"),
        state(stored(), offset=b"I1\n"),
        state(stored(), strides=b"(I2\nt"),
        state(stored(), strides=b"(t"),
        state(stored(count=b"I64\n"), shape=b"(I64\nt"),
        state(stored(key=b"V7\n")),
    ],
)
def test_no_byte_outside_of_a_storage_is_read(tmp_path, objects):
    with pytest.raises(ValueError, match="tensor 'x' is not in it"):
        torch_files.read_file(archive(tmp_path / "x.pt", objects, bytes(8)))


def test_an_archive_that_claims_more_than_the_file_has_is_refused(tmp_path):
    large = state(stored(count=b"I65536\n"), shape=b"(I65536\nt")
    with pytest.raises(ValueError, match="longer than the file"):
        torch_files.read_file(archive(tmp_path / "x.pt", large, bytes(8), size=2**17))


def test_a_file_that_shrinks_while_it_is_read_gives_no_other_bytes(tmp_path):
    path = archive(tmp_path / "x.pt", state(stored()), bytes(8))
    tensor = torch_files.read_file(path)["x"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut short while tensor 'x' was read"):
        tensor.read()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_written_files_are_bit_identical_in_torch_and_read_back(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    tensors = {"a": Tensor(values.shape, values.dtype, lambda first=None, stop=None: values)}
    torch_files.write_file(tmp_path / "x.pt", tensors)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)["module"]["a"]
    assert loaded.view(torch.uint8).numpy().tobytes() == values.tobytes()
    again = torch_files.read_file(tmp_path / "x.pt")["a"].read()
    assert again.dtype == values.dtype and again.tobytes() == values.tobytes()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", state(stored()))
        file.writestr("archive/byteorder", b"little" * struct.calcsize("d"))
    with pytest.raises(ValueError, match="is compressed"):
        torch_files.read_file(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["archive", "größer"])
def test_members_that_moved_are_not_read_from_elsewhere(tmp_path, name):
    """Bytes missing in one member move those after it, which the list of entries does not know."""
    path = tmp_path / f"{name}.pt"
    tensors = {"a": torch.arange(64.0), "b": torch.arange(64.0, 128.0)}
    torch.save({"module": tensors}, path)
    read = torch_files.read_file(path)
    assert all(np.array_equal(read[x].read(), tensors[x].numpy()) for x in tensors)
    content = path.read_bytes()
    first = content.index(np.arange(64, dtype=np.float32).tobytes())
    path.write_bytes(content[: first + 8] + content[first + 16 :])
    with pytest.raises(ValueError, match="cut short, or no file of torch.save"):
        torch_files.read_file(path)
