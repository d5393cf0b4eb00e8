"""Safetensors files and folders of shards, read and written a tensor at a time."""

import concurrent.futures
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from jax_distill.interop import unreadable, variants
from jax_distill.interop.tensors import (
    CODES,
    DTYPES,
    FLOAT8,
    OTHER_DTYPES,
    THREADS,
    Tensor,
    Tensors,
    merged,
)

_READABLE = {**DTYPES, **FLOAT8, **OTHER_DTYPES}
SHARD_BYTES = 10 * 10**9  # diffusers' max_shard_size
_ALIGNMENT = 8  # of the first tensor


def read_file(path: Path) -> Tensors:
    """The tensors of one file.

    Raises:
      ValueError: it is missing, cut short, damaged, of another kind than plain weights, or has a
        type that weights do not come in.
    """

    def reader(name: str, dtype: np.dtype, shape: list[int]) -> Callable[..., np.ndarray]:
        if dtype in FLOAT8.values():
            return _raw_reader(path, name, dtype, shape)

        def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
            # Opened for each tensor: mapped pages of a whole file would count as memory.
            with safe_open(path, "np", backend="pread") as file:
                if start is None:
                    return file.get_tensor(name)
                return file.get_slice(name)[start:stop]

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
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing; download the folder again") from None
    except SafetensorError as error:
        raise ValueError(f"'{path}' is cut short or damaged ({error}); download it again") from None
    return tensors


def _raw_reader(
    path: Path, name: str, dtype: np.dtype, shape: list[int]
) -> Callable[..., np.ndarray]:
    """Reads the bytes of a type that numpy does not have and the library cannot give it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(start: int | None = None, stop: int | None = None) -> np.ndarray:
        if start is None:
            return np.fromfile(path, dtype, math.prod(shape), offset=begin).reshape(shape)
        flat = np.fromfile(path, dtype, (stop - start) * row, offset=begin + start * row)
        return flat.reshape(stop - start, *shape[1:])

    return read


def _dtype(path: Path, name: str, code: str) -> np.dtype:
    if code not in _READABLE:
        known = ", ".join([*DTYPES, *FLOAT8])
        raise ValueError(f"'{path}': tensor '{name}' is of type {code}; only {known} can be read")
    return _READABLE[code]


def read_metadata(path: Path) -> dict[str, str]:
    """The text in the header of a file that `read_file` can read."""
    with safe_open(path, "np", backend="pread") as file:
        return file.metadata() or {}


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
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"'{path}' is no index of shards ({error!r}); download it again") from None
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
