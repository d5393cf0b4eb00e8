"""The parts of a pipeline: their tensors on disk, and the table that makes them ours."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_distill.interop.keys.table import KeyTable, Place
from jax_distill.interop.orbax_tree import Leaf, StoredLeaf, TreeWriter
from jax_distill.interop.tensors import THREADS, Tensor, Tensors, check_finite, check_types


class Part(NamedTuple):
    """One network of a pipeline, not read yet.

    Attributes:
      where: its files, for messages.
      config: its part of `ported_folder.describe`.
      tensors: under PyTorch's names.
      table: which of them is which parameter.
      like: our parameters' shapes, nested.
      names: of tensors that say under which of several names the source has its tensors; its module
        of keys makes the table of them.
    """

    where: str
    config: dict[str, Any]
    tensors: Tensors
    table: KeyTable
    like: Mapping[str, Any]
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError when a tensor is missing, not expected or of another shape or type."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.table.check(shapes, self.like, self.where)
        used = {k: x for k, x in self.tensors.items() if k not in self.table.ignored}
        check_types(self.where, used)


class StoredPart(NamedTuple):
    """One network of a pipeline with our parameters, not read yet.

    Attributes:
      config: under its library's names.
      tree: nested `StoredLeaf`s.
      names: as in `Part`.
      tokenizer: the folder of a text encoder's tokenizer.
    """

    config: Mapping[str, Any]
    tree: Mapping[str, Any]
    names: Sequence[str] = ()
    tokenizer: Path | None = None


def write_part(part: Part, folder: Path, dtype: np.dtype | None) -> int:
    """Writes a part as an Orbax tree, tensor by tensor.

    Args:
      part: that `check` has passed.
      folder: made.
      dtype: of all parameters; None keeps what each of them has.

    Returns:
      Bytes written.

    Raises:
      ValueError: a tensor is not finite, tied ones differ, or layers of one parameter have several
        types and are to keep them.
      OSError: the disk is full.
    """
    writer = TreeWriter(folder)
    first: dict[tuple, Place] = {}
    twins: list[tuple[Place, Place]] = []
    for place in part.table.places(part.like):
        other = first.setdefault((place.path, place.index), place)
        if other is not place:
            twins.append((other, place))
    order = {name: index for index, name in enumerate(part.tensors)}  # of the bytes on disk
    for path, leaf in _leaves(part, list(first.values()), dtype).items():
        writer.create(path, leaf, stacked=(path, 0) in first)

    ordered = sorted(first.values(), key=lambda place: order[place.name])

    def read(place: Place) -> np.ndarray:
        array = part.tensors[place.name].read()
        check_finite(part.where, place.name, array)
        return array

    def move(place: Place) -> int:
        array = read(place)
        array = array if dtype is None else array.astype(dtype, copy=False)
        writer.write(place.path, place.index, place.layout.to_jax(array))
        return array.nbytes

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(move, place) for place in ordered]
        try:
            written = sum(future.result() for future in futures)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for place, twin in twins:
        if not np.array_equal(read(place), read(twin)):
            raise ValueError(
                f"{part.where}: tensor '{twin.name}' differs from '{place.name}', which it is tied"
                " to."
            )
    writer.finish()
    return written


def _leaves(part: Part, places: list[Place], dtype: np.dtype | None) -> dict[tuple[str, ...], Leaf]:
    """The shape and type of every parameter."""
    types: dict[tuple[str, ...], dict[np.dtype, str]] = {}
    for place in places:
        kind = part.tensors[place.name].dtype if dtype is None else dtype
        types.setdefault(place.path, {}).setdefault(kind, place.name)
    leaves = {}
    for path, kinds in types.items():
        if len(kinds) > 1:
            (one, name), (other, twin) = list(kinds.items())[:2]
            raise ValueError(
                f"{part.where}: tensors '{name}' ({one}) and '{twin}' ({other}) are layers of one"
                " parameter; give --dtype=bfloat16 or --dtype=float32"
            )
        leaf: Any = part.like
        for key in path:
            leaf = leaf[key]
        leaves[path] = Leaf(tuple(leaf.shape), next(iter(kinds)))
    return leaves


def tensors_of(tree: Mapping[str, Any], table: KeyTable) -> Tensors:
    """A tree's tensors under PyTorch's names, in the types that they have.

    Args:
      tree: nested `StoredLeaf`s.
      table: which parameter is which of them.

    Raises:
      ValueError: the table has no rule for a parameter.
    """
    tensors = {}
    for place in table.places(tree):
        leaf = tree
        for key in place.path:
            leaf = leaf[key]
        tensors[place.name] = Tensor(place.shape, leaf.dtype, _reader(leaf, place))
    return tensors


def _reader(leaf: StoredLeaf, place: Place) -> Callable[[], np.ndarray]:
    return lambda: place.layout.from_jax(leaf.read(place.index))
