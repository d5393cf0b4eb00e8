"""Safetensors files and folders of shards, read and written a tensor at a time."""

import concurrent.futures
import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from jax_distill.interop.readers import unreadable, variants
from jax_distill.interop.tensors import (
    CODES,
    DTYPES,
    FLOAT8,
    OTHER_DTYPES,
    THREADS,
    Tensor,
    Tensors,
    merged,
    read_numbers,
)
from jax_distill.storage.files import check_regular, named, read_json, unread
from jax_distill.storage.quoting import one_line, shown

_READABLE = {**DTYPES, **FLOAT8, **OTHER_DTYPES}
SHARD_BYTES = 10 * 10**9  # diffusers' max_shard_size
_ALIGNMENT = 8  # of the first tensor
_HEADER_BYTES = 4 << 20  # of a file; those of FLUX's transformer have 0.1 MB
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")  # no folder in it


class _Index(TypedDict):
    """The keys of `<stem>.safetensors.index.json` that are read."""

    weight_map: dict[str, str]


def read_file(path: Path) -> Tensors:
    """The tensors of one file.

    Raises:
      ValueError: it is missing, cut short, damaged, of another kind than plain weights, or has a
        type that weights do not come in.
    """
    _check_header(path)
    begins = functools.cache(lambda: _begins(path))

    def reader(name: str, dtype: np.dtype, shape: list[int]) -> Callable[..., np.ndarray]:
        if dtype in FLOAT8.values():
            return _raw_reader(path, name, dtype, shape, begins()[name])

        def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
            # Opened for each tensor: mapped pages of a whole file would count as memory.
            try:
                with safe_open(path, "np", backend="pread") as file:
                    if start is None:
                        return file.get_tensor(name)
                    return file.get_slice(name)[start:stop]
            except SafetensorError as error:
                raise _damaged(path, error) from None

        return read

    tensors = {}
    try:
        with safe_open(path, "np", backend="pread") as file:
            names = file.offset_keys()  # in the order of their bytes
            unreadable.check_names(str(path), names)
            for name in names:
                piece = file.get_slice(name)
                shape, dtype = piece.get_shape(), _dtype(path, name, piece.get_dtype())
                tensors[name] = Tensor(tuple(shape), dtype, reader(name, dtype, shape))
    except SafetensorError as error:
        raise _damaged(path, error) from None
    return tensors


def _check_header(path: Path) -> None:
    """Raises ValueError when a file is none, or begins with a header that no weights have."""
    try:
        check_regular(path)
        with named(path), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing; download the folder again") from None
    if length > _HEADER_BYTES:
        raise ValueError(
            f"'{path}' is cut short or damaged (its header would be of {length} bytes); download it"
            " again"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return unread(f"'{path}'", error) or ValueError(
        f"'{path}' is cut short or damaged ({one_line(str(error))}); download it again"
    )


def _begins(path: Path) -> dict[str, int]:
    """Where in a file that the library has read each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _raw_reader(
    path: Path, name: str, dtype: np.dtype, shape: list[int], begin: int
) -> Callable[..., np.ndarray]:
    """Reads the bytes of a type that numpy does not have and the library cannot give it."""
    row = math.prod(shape[1:])

    def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
        if start is None:
            first, wanted = 0, tuple(shape)
        else:
            first, wanted = start, (stop - start, *shape[1:])
        begins_at = begin + first * row * dtype.itemsize
        flat = read_numbers(path, dtype, math.prod(wanted), begins_at, name)
        return flat.reshape(wanted)

    return read


def _dtype(path: Path, name: str, code: str) -> np.dtype:
    if code not in _READABLE:
        known = ", ".join([*DTYPES, *FLOAT8])
        code = one_line(str(code))
        raise ValueError(f"'{path}': tensor '{name}' is of type {code}; only {known} can be read")
    return _READABLE[code]


def read_metadata(path: Path) -> dict[str, str]:
    """The text in the header of a file that `read_file` can read."""
    try:
        with safe_open(path, "np", backend="pread") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from None


def read_folder(folder: Path, stem: str, variant: str = variants.PLAIN) -> Tensors:
    """The tensors of `<stem>.safetensors`, or of the shards that its index names.

    Args:
      folder: of one model.
      stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).
      variant: such as "fp16", see `variants.choose`.

    Raises:
      ValueError: neither is there, or as `read_file` and `variants.choose`.
    """
    found = variants.files([path.name for path in folder.iterdir()], stem)
    if not found:
        whole = f"{stem}.safetensors"
        raise ValueError(f"'{folder}' has neither {whole} nor {whole}.index.json")
    chosen, note = variants.choose(str(folder), found, variant)
    if note:
        logging.info("%s", note)
    path = folder / found[chosen]
    if path.suffix == ".safetensors":
        return read_file(path)
    files = sorted(set(read_json(path, _Index, fix="download it again")["weight_map"].values()))
    for file in files:
        if not _SHARD.fullmatch(file):
            raise ValueError(
                f"'{path}' names {shown(file)}, which is not a file beside it; download it again"
            )
    return merged((folder / file, read_file(folder / file)) for file in files)


def write_folder(folder: Path, stem: str, tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `<stem>.safetensors`, or shards and their index, as `save_pretrained` names them.

    Args:
      folder: of one model.
      stem: as `read_folder` takes it.
      tensors: of the model.
      shard_bytes: that a shard may have, unless one tensor has more.
    """
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Writes one file; the tensors are read one after another, not all at once.

    The format is a header of names, shapes and places, its length before it, and the bytes of the
    tensors: github.com/huggingface/safetensors, whose own writer takes all of them at once.

    Args:
      path: of the file.
      tensors: of the model.
      metadata: more text for the header.
    """
    # Wide types first, so that all are aligned, as safetensors does.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    places, end = {}, 0
    for name in order:
        tensor, places[name] = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        descriptor = file.fileno()

        def move(name: str) -> None:
            array = np.ascontiguousarray(tensors[name].read())
            rest, offset = memoryview(array.reshape(-1).view(np.uint8)), start + places[name]
            while rest:
                count = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[count:], offset + count

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(move, name) for name in order]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
