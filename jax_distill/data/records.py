"""Latents with captions on disk: random access to a folder of records, see `data.manifest`."""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_distill.data import manifest
from jax_distill.data.arrays import widen
from jax_distill.data.damaged import check_lost, good
from jax_distill.data.manifest import CAPTIONS, LATENTS, NULL, Description
from jax_distill.data.record_fields import RECORD_BYTES, Array, check_finite, finite, parse, unpack
from jax_distill.data.shards import open_shards, unreadable
from jax_distill.flow import Text
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, PassingError, check_regular, named


class LatentRecord(NamedTuple):
    """One picture and its caption, stored embedded where that takes large networks."""

    latents: np.ndarray  # (N, C) packed, float16
    caption: str
    key: str = ""  # of the example in its source
    sequence: np.ndarray | None = None  # (L, D) bfloat16
    pooled: np.ndarray | None = None  # (P,) bfloat16


class LatentRecords:
    """Random access to a folder that `python -m jax_distill.prepare` made.

    Args:
      path: of the folder.
      damaged_share: the largest share of its examples that may be damaged; with 0 every shard has
        to be there, and whole.

    Attributes:
      description: its manifest.
      lost: examples of shards that are missing or damaged as a whole.

    Raises:
      ValueError: the folder is missing, unfinished, damaged, or of an earlier version.
    """

    def __init__(self, path: Path, damaged_share: float = 0.0):
        self._path, self._share = paths.path(path), damaged_share
        self.description = manifest.read(self._path, whole=False)
        latents = self.description["latents"]
        kinds = {"key": str, "caption": int}
        kinds["latents"] = Array(tuple(latents["shape"]), latents["type"])
        skip = damaged_share > 0
        self._examples = Shards(self._path, self.description, LATENTS, kinds, skip=skip)
        self._captions = Captions(self._path, self.description, skip=skip)
        self.lost = self._examples.lost
        check_lost(self.lost, len(self), damaged_share)
        if "null" in self.description:
            null = self.description["null"]
            manifest.check_size(self._path / null["name"], null["bytes"])

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> LatentRecord:
        """One example.

        Raises:
          FileError: it, or its caption, is damaged or out of its place.
        """
        found, number = self._found(index)
        words, text = self._captions[number]
        return LatentRecord(found["latents"], words, found["key"], *(text or ()))

    def good(self, index: int) -> LatentRecord:
        """One example; in the place of a damaged one, where some may be, the next good one."""
        return good(self, index, self._share)

    def key(self, index: int) -> str:
        """The key of an example that cannot be read; "" where its key cannot be read either."""
        return self._examples.key(index)

    def _found(self, index: int, *, check: bool = True) -> tuple[dict[str, Any], int]:
        """The fields of an example, and the number of its caption."""
        found = self._examples.read(index, check=check)
        number = found["caption"]
        if not 0 <= number < len(self._captions):
            error = ValueError(f"there is no caption {number}")
            raise self._examples.unreadable(index, error)
        return found, number

    def fill(
        self, index: int, x: np.ndarray, text: Text, held: int | None = None, *, bare: bool = False
    ) -> int:
        """Writes an example into arrays: what its caption has not of its own, only where it must.

        Args:
          index: of the example.
          x: (N, C) float32, its latents.
          text: its caption, a sequence (L, D) and pooled (P,).
          held: how many rows of the sequence were a caption's own when this was called for these
            arrays last, if nothing else has been written to them since.
          bare: whether the empty caption is written in the place of its own.

        Returns:
          How many rows of the sequence are the caption's own.

        Raises:
          FileError: as for reading it.
        """
        found, number = self._found(index, check=False)
        if found["latents"].dtype == np.float16:
            good = widen(found["latents"], x)
        else:
            x[...] = found["latents"]
            good = finite(found["latents"])
        if not good:
            raise self._examples.unreadable(index, ValueError("its latents are not finite"))
        empty, held = self._captions.null, len(text.sequence) if held is None else held
        own = 0 if bare else self._captions.fill(number, text)
        text.sequence[own:held] = empty.sequence[0, own:held]
        if bare:
            text.pooled[...] = empty.pooled[0]
        return own

    @property
    def latents_shape(self) -> tuple[int, int]:
        """Tokens and channels of a picture, (N, C)."""
        return tuple(self.description["latents"]["shape"])

    def captions(self) -> Iterator[str]:
        """The distinct captions, but for damaged ones where some may be; latents are not read."""
        for number in range(len(self._captions)):
            try:
                words, _ = self._captions[number]
            except PassingError:
                raise
            except FileError:
                if not self._share:
                    raise
            else:
                yield words

    @property
    def has_null(self) -> bool:
        """Whether captions are embedded, the empty one among them."""
        return "text" in self.description

    @property
    def null(self) -> Text:
        """The empty caption, embedded, with a leading axis of length one.

        Raises:
          FileError: it is missing or damaged.
        """
        return self._captions.null


class Captions:
    """The distinct captions of a folder, by their numbers.

    Args:
      folder: of the records.
      description: what `data.manifest` says of it, or as much as is known while it is made:
        `mark`, `text` and `shards`.
      skip: see `Shards`.
    """

    def __init__(
        self, folder: Path, description: Description | Mapping[str, Any], *, skip: bool = False
    ):
        self._folder, self._text = folder, description.get("text")
        self._null = description.get("null")
        kinds: dict[str, Any] = {"caption": str}
        if self._text is not None:
            (length, width), kind = self._text["sequence"], self._text["type"]
            own = None if self._text["padding"] == "shared" else length
            kinds["sequence"] = Array((own, width), kind)
            kinds["pooled"] = Array((self._text["pooled"],), kind)
        self._shards = Shards(folder, description, CAPTIONS, kinds, skip=skip)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> tuple[str, Text | None]:
        """The words; and their `Text`, (L, D) and (P,), where captions are embedded.

        Raises:
          FileError: it is damaged or out of its place.
        """
        found = self._found(number)
        if self._text is None:
            return found["caption"], None
        sequence, length = found["sequence"], self._text["sequence"][0]
        if len(sequence) < length:
            sequence = np.concatenate([sequence, self.null.sequence[0, len(sequence) :]])
        return found["caption"], Text(sequence, found["pooled"])

    def fill(self, number: int, text: Text) -> int:
        """Writes a caption's own rows, and its pooled features; returns how many rows those are.

        Raises:
          FileError: it is damaged or out of its place.
        """
        found = self._found(number, check=False)
        own = len(found["sequence"])
        text.sequence[:own], text.pooled[...] = found["sequence"], found["pooled"]
        try:
            check_finite("sequence", text.sequence[:own])
            check_finite("pooled", text.pooled)
        except ValueError as error:
            raise self._shards.unreadable(number, error) from None
        return own

    def _found(self, number: int, *, check: bool = True) -> dict[str, Any]:
        """The fields of a caption; its sequence may have fewer rows than L, not more."""
        found = self._shards.read(number, check=check)
        if self._text is not None and (own := len(found["sequence"])) > self._text["sequence"][0]:
            error = ValueError(
                f"its sequence has {own} rows, more than {self._text['sequence'][0]}"
            )
            raise self._shards.unreadable(number, error)
        return found

    @functools.cached_property
    def null(self) -> Text:
        """See `LatentRecords.null`."""
        path = self._folder / NULL
        try:
            check_regular(path)
            with named(path), path.open("rb") as file:
                content = file.read(RECORD_BYTES + 1)
            if self._null and hashlib.sha256(content).hexdigest() != self._null["sha256"]:
                raise ValueError("its checksum is another than was written")
            (length, width), kind = self._text["sequence"], self._text["type"]
            kinds = {"sequence": Array((1, length, width), kind)}
            kinds["pooled"] = Array((1, self._text["pooled"]), kind)
            return Text(**unpack(content, kinds))
        except (FileNotFoundError, ValueError) as error:
            raise unreadable(f"'{path}'", error) from None


class Shards:
    """The records of one kind by their numbers, each checked to be the one that is asked for.

    Args:
      folder: of the shards.
      description: as of `Captions`.
      kind: `LATENTS` or `CAPTIONS`.
      kinds: of the fields, but for `at` and `of`.
      skip: whether shards that cannot be opened are listed in `lost`, unless all are.

    Attributes:
      lost: the records of shards that are missing, or damaged as a whole.

    Raises:
      FileError: a shard cannot be opened, or has not the records that it should.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        kind: str,
        kinds: Mapping[str, Any],
        *,
        skip: bool = False,
    ):
        files = description["shards"][kind]
        self._paths = [folder / file["name"] for file in files]
        self._ends = list(itertools.accumulate(file["records"] for file in files))
        self._mark, self._kind = bytes.fromhex(description["mark"]), kind
        self._kinds = {"at": int, "of": bytes, **kinds}
        self._source, self.lost = open_shards(folder, files, skip=skip)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, *, check: bool = True) -> dict[str, Any]:
        """The fields of a record.

        Args:
          index: its number.
          check: whether its numbers are checked to be finite.

        Raises:
          FileError: it is damaged, or is not the one with that number.
        """
        if self.lost and (reason := self._lost(index)):
            raise FileError(reason)
        try:
            found = unpack(self._source[index], self._kinds, check=check)
            if found["at"] != index:
                raise ValueError(f"the record with number {found['at']} lies in its place")
            if found["of"] != self._mark:
                raise ValueError("the record of another folder lies in its place")
        except (RuntimeError, ValueError, OverflowError) as error:
            raise self.unreadable(index, error) from None
        return found

    def key(self, index: int) -> str:
        """See `LatentRecords.key`."""
        if self._lost(index):
            return ""
        try:
            found = parse(self._source[index])
        except (RuntimeError, ValueError, OverflowError):
            return ""
        key = found.get("key")
        mine = found.get("at") == index and found.get("of") == self._mark
        return key if mine and isinstance(key, str) else ""

    def _lost(self, index: int) -> str:
        """Why a record is lost with its shard; "" unless it is."""
        return next((each.reason for each in self.lost if index in each.examples), "")

    def unreadable(self, index: int, error: Exception) -> FileError:
        """The error to raise for a record."""
        shard = self._paths[min(bisect.bisect(self._ends, index), len(self._paths) - 1)]
        what = "example" if self._kind == LATENTS else "caption"
        return unreadable(f"{what} {index} in '{shard}'", error)
