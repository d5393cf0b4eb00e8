"""Arrays of batches, whose memory is used again once nobody holds them.

Touching fresh memory takes about as long as reading what is written into it. And where most of an
array is the same in every batch, as the padding of captions is, only what differs is written.
"""

import contextlib
import ctypes
import functools
import itertools
import mmap
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


class Arrays:
    """A batch of arrays in memory that comes back to the pool when nobody holds an array any more.

    Attributes:
      batch: a tree of arrays with a leading axis.
      written: for each row, what the pool's user says that it holds; None in fresh memory.
    """

    def __init__(self, batch: Any, written: list[Any]):
        self.batch, self.written = batch, written


class Pool:
    """Gives out arrays for batches of one kind.

    Args:
      example: a tree of arrays, one row without the leading axis.
      rows: of a batch.
    """

    def __init__(self, example: Any, rows: int):
        _keep_freed()
        leaves, self._tree = jax.tree.flatten(example)
        self._kinds = [((rows, *leaf.shape), np.asarray(leaf).dtype) for leaf in leaves]
        self._rows = rows
        self._free: deque[tuple[Sequence[mmap.mmap], list[Any]]] = deque()

    def take(self) -> Arrays:
        """Arrays that nobody else holds, with what their rows held last."""
        try:
            memory, written = self._free.pop()
        except IndexError:
            memory, written = [_fresh(*kind) for kind in self._kinds], [None] * self._rows
        roots = [np.frombuffer(part, np.uint8) for part in memory]
        gone = itertools.count(1)

        def dropped() -> None:
            if next(gone) == len(memory):  # counted in one go, on whichever thread
                self._free.append((memory, written))

        for root in roots:
            # Views of it, of ours and of others such as JAX, keep it alive: its memory is no array.
            weakref.finalize(root, dropped).atexit = False
        leaves = [
            root[: _size(*kind)].view(kind[1]).reshape(kind[0])
            for root, kind in zip(roots, self._kinds)
        ]
        return Arrays(jax.tree.unflatten(self._tree, leaves), written)


@functools.cache
def _keep_freed() -> None:
    """Has glibc keep freed memory, such as that of a record's bytes, for the next one.

    Otherwise it may give the pages of each back to the system, and take them again for the next:
    that took up to four times as long as reading. Other allocators are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, threshold in ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**28)):
            mallopt(option, threshold)


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _fresh(shape: tuple[int, ...], dtype: np.dtype) -> mmap.mmap:
    memory = mmap.mmap(-1, max(_size(shape, dtype), 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def widen(half: np.ndarray, out: np.ndarray) -> bool:
    """Writes float16 as float32, exactly, in a sixth of the time that numpy takes.

    Exponent and fraction are moved to their places, and the exponent's bias is made up for. What is
    not finite becomes 65536 or more.

    Args:
      half: float16.
      out: float32 of the same shape.

    Returns:
      Whether all are finite; otherwise `out` is of no use.
    """
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))  # the sign stays the first bit
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x80000000 | 0x0FFFE000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)
    return bool(out.min() > -65536 and out.max() < 65536)
