"""Files of `torch.save`, without PyTorch: state dicts read and written a tensor at a time.

Such a file is a zip archive, not compressed: `data.pkl` holds the objects, in which a tensor is a
call of `torch._utils._rebuild_tensor_v2` on a place in a storage, and `data/<key>` has a storage's
bytes; `_rebuild_tensor_v3` takes types for which there is no storage, such as float8. Unpickling
can run any code; here the objects may be dicts, lists, numbers, text and tensors, and whatever else
the pickle names is refused (see `pickles`).

Source: `torch.serialization`, version 3 of the format (PyTorch 1.6 and later).
"""

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jax_distill.interop.readers import pickles, unreadable
from jax_distill.interop.readers.pickles import STORAGES, View
from jax_distill.interop.tensors import Tensor, Tensors, read_numbers
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, check_regular, named, unread
from jax_distill.storage.quoting import one_line, shown

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_ARCHIVE = "archive"  # the folder in the zip; its name does not matter
_ALIGNMENT = 64  # of storages, for torch.load(mmap=True)
_MOST_AT_ONCE = pickles.MOST_BYTES  # of the pickle, and of the list of entries; FLUX has 0.1 MB


class _Archive(io.BufferedReader):
    """A file for `zipfile`, which reads the list of the entries at once, whatever its length."""

    def read(self, size: int = -1) -> bytes:
        content = super().read(min(size, _MOST_AT_ONCE + 1) if size >= 0 else _MOST_AT_ONCE + 1)
        if len(content) > _MOST_AT_ONCE:
            raise zipfile.BadZipFile("its list of entries is longer than that of any weights")
        return content


def read_file(path: Path, key: str = "module") -> Tensors:
    """The state dict in a file, the whole of it or under a key.

    Args:
      path: of the file.
      key: of a dict that has the state dict; T2I-Distill's have {"module": state_dict}.

    Raises:
      ValueError: it is cut short, of another format, of another kind than plain weights, or holds
        code or no state dict.
    """
    objects, places = _open(path)
    state = objects.get(key, objects) if isinstance(objects, dict) else None
    if not isinstance(state, dict) or not any(isinstance(x, View) for x in state.values()):
        raise ValueError(f"'{path}' holds no state dict, neither as it is nor under {key!r}")
    unreadable.check_names(str(path), [name for name in state if isinstance(name, str)])
    tensors = {}
    for name, view in state.items():
        if not (isinstance(name, str) and isinstance(view, View)):
            raise ValueError(
                f"'{path}': {shown(name)} is not a tensor; the file is not a student's"
            )
        tensors[name] = _tensor(path, name, view, places)
    return tensors


def has_key(path: Path, key: str = "module") -> bool:
    """Whether the state dict of a file that `read_file` can read is under a key."""
    objects = _open(path)[0]
    return isinstance(objects, dict) and isinstance(objects.get(key), dict)


def _open(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The objects in a file, and where in it each storage's bytes are: (offset, count)."""
    try:
        check_regular(path)
        with named(path), _Archive(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            places = _places(path, file, archive.infolist())
            if "byteorder" in places and _entry(file, places["byteorder"]) != b"little":
                raise FileError(f"'{path}' is big-endian, which cannot be read")
            return pickles.load(_entry(file, places["data.pkl"])), {
                name.removeprefix("data/"): place for name, place in places.items()
            }
    except FileNotFoundError:
        raise ValueError(f"no file '{path}'") from None
    except zipfile.BadZipFile as error:
        raise unread(f"'{path}'", error, disks.raised) or ValueError(
            f"'{path}' is cut short, or no file of torch.save ({error}); download it again"
        ) from None
    except pickles.Refused as error:
        raise ValueError(
            f"'{path}' asks for {one_line(str(error))}, which a file of weights does not; it was"
            " not run, and the file cannot be trusted"
        ) from None
    except (FileError, OSError):
        raise
    except Exception as error:  # a damaged pickle raises all kinds
        raise unread(f"'{path}'", error, disks.raised) or ValueError(
            f"'{path}' is damaged ({shown(error)}); download it again"
        ) from None


def _places(
    path: Path, file: io.BufferedReader, infos: list[zipfile.ZipInfo]
) -> dict[str, tuple[int, int]]:
    """Where in a file the bytes of each entry are: (offset, count)."""
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    for info in infos:
        name = info.filename.partition("/")[2]
        if info.compress_type != zipfile.ZIP_STORED:
            raise FileError(f"'{path}': '{one_line(name)}' is compressed; save it with PyTorch")
        if not 0 <= info.header_offset < size:
            raise zipfile.BadZipFile(f"'{one_line(name)}' is not in the file")
        # The local header repeats the name, and has a length of its own.
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise zipfile.BadZipFile(f"'{one_line(name)}' is not where it should be")
        named, extra = struct.unpack("<HH", header[26:])
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        if file.read(named) != info.orig_filename.encode(encoding, "replace"):
            raise zipfile.BadZipFile(f"'{one_line(name)}' has another name in another place")
        start = info.header_offset + 30 + named + extra
        if start + info.file_size > size or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"'{one_line(name)}' is longer than the file")
        if name in places:
            raise zipfile.BadZipFile(f"'{one_line(name)}' is in it twice")
        places[name] = start, info.file_size
    if "data.pkl" not in places:
        raise FileError(f"'{path}' is a zip archive, but none of torch.save")
    for name in places.keys() & {"data.pkl", "byteorder"}:
        if places[name][1] > pickles.MOST_BYTES:
            raise FileError(f"'{path}': its '{name}' is longer than that of any weights")
    end = 0
    for start, count in sorted(places.values()):
        if start < end:
            raise zipfile.BadZipFile("its entries overlap")
        end = start + count
    return places


def _entry(file: io.BufferedReader, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _tensor(path: Path, name: str, view: View, places: dict[str, tuple[int, int]]) -> Tensor:
    dtype, key, count = view.storage
    # A stride of 0 makes much of little; tensors of state dicts have each element once.
    once = math.prod(view.shape) <= count
    start, available = places.get(key, (0, 0))
    empty = 0 in view.shape
    last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides))
    if not empty and not (
        len(view.shape) == len(view.strides)
        and once
        and last < count
        and count * dtype.itemsize == available
    ):
        raise ValueError(f"'{path}' is damaged: tensor '{name}' is not in it; download it again")

    def read(first: int | None = None, stop: int | None = None) -> np.ndarray:
        if empty:
            return np.zeros(view.shape, dtype)
        wanted = last + 1 - view.offset
        begin = start + view.offset * dtype.itemsize
        flat = read_numbers(path, dtype, wanted, begin, name)
        steps = [step * dtype.itemsize for step in view.strides]
        array = np.lib.stride_tricks.as_strided(flat, view.shape, steps)
        return array if first is None else array[first:stop]

    return Tensor(view.shape, dtype, read)


def write_file(path: Path, tensors: Tensors, key: str = "module") -> None:
    """Writes {key: state dict} so that `torch.load` reads it, with `weights_only` too.

    Args:
      path: of the file.
      tensors: of the state dict; read one after another.
      key: of the state dict.
    """
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{_ARCHIVE}/data.pkl", _pickled(tensors, key))
        archive.writestr(f"{_ARCHIVE}/byteorder", "little")
        for index, tensor in enumerate(tensors.values()):
            info = zipfile.ZipInfo(f"{_ARCHIVE}/data/{index}")
            info.file_size = tensor.nbytes
            # A field that readers skip moves the bytes to where the alignment wants them.
            header = archive.fp.tell() + 30 + len(info.filename) + 4
            padding = -header % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            with archive.open(info, "w") as file:
                array = np.ascontiguousarray(tensor.read())
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
        archive.writestr(f"{_ARCHIVE}/version", "3\n")


def _pickled(tensors: Tensors, key: str) -> bytes:
    """The pickle of {key: {name: tensor}}, as PyTorch pickles tensors, in protocol 2."""

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def number(value: int) -> bytes:
        data = pickle.encode_long(value)
        return pickle.LONG1 + bytes([len(data)]) + data

    def group(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def tensor(index: int, value: Tensor) -> bytes:
        storage = group(
            text("storage"),
            name("torch", _STORAGE_NAMES[value.dtype]),
            text(str(index)),
            text("cpu"),
            number(math.prod(value.shape)),
        )
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        return (
            name("torch._utils", "_rebuild_tensor_v2")
            + group(
                storage + pickle.BINPERSID,
                number(0),
                group(*map(number, value.shape)),
                group(*map(number, strides)),
                pickle.NEWFALSE,
                name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
            )
            + pickle.REDUCE
        )

    items = (text(key) + tensor(i, value) for i, (key, value) in enumerate(tensors.items()))
    state = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    outer = pickle.EMPTY_DICT + text(key) + state + pickle.SETITEM
    return pickle.PROTO + b"\x02" + outer + pickle.STOP
