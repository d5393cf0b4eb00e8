"""A lease as an object of a bucket, which is taken, renewed and given back by its generation.

Who writes it anew asks for the version that was seen, so that of any number that find a dead
process' lease one takes it over. Signs of life are its writes, by the clock of the store.
"""

from collections.abc import Callable
from pathlib import Path

from jax_distill.storage import buckets


class Lease:
    """A lease of this process.

    Args:
      path: of the object.
      content: of it, which is this process' own.
    """

    def __init__(self, path: Path, content: bytes):
        self._path, self._content = path, content
        self._generation = ""

    def take(self, check_dead: Callable[[bytes, float], None]) -> bool:
        """Takes the lease, from a dead process if it must be.

        Args:
          check_dead: raises if the holder, which has written those bytes and been silent for so
            many seconds, may be alive.

        Returns:
          False if another process was faster.
        """
        known = buckets.NEW
        if (seen := buckets.look(self._path)) is not None:
            if seen.content != self._content:
                check_dead(seen.content, seen.silent)
            known = seen.generation
        return self._write(known)

    def renew(self) -> bool:
        """Gives a sign of life; False if another process has taken the lease."""
        if self._write(self._generation):
            return True
        seen = buckets.look(self._path)
        if seen is None:  # removed by hand
            return self._write(buckets.NEW)
        return seen.content == self._content and self._write(seen.generation)

    def give_back(self) -> None:
        """Removes the lease, unless another process has it."""
        buckets.remove(self._path, self._generation)

    def _write(self, known: str) -> bool:
        written = buckets.put(self._path, self._content, known)
        self._generation = written or self._generation
        return written is not None
