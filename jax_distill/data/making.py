"""Makes folders of records: by one process or several, and in any number of tries.

While a folder is made it has a subfolder `journal/` with the facts that it is made from and a note
of each shard that is done. A process that comes later does what is missing; the manifest is written
once nothing is, and then the journal is removed.
"""

import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from jax_distill import streams
from jax_distill.data import manifest, shards
from jax_distill.data.manifest import CAPTIONS, DESCRIPTION, LATENTS, NULL, shard_name
from jax_distill.data.record_fields import pack
from jax_distill.devices.processes import ALONE, Share
from jax_distill.flow import Text
from jax_distill.storage import contents, paths
from jax_distill.storage.files import UNFINISHED, FileError, read_json, write_atomically, write_json
from jax_distill.storage.quoting import shown

JOURNAL, FACTS = "journal", "facts.json"
LOGGED_EVERY = 10.0  # seconds

T = TypeVar("T")
Encode = Callable[[range], Sequence[Mapping[str, Any]]]
"""The fields of some records, by their numbers; at most as many at a time as a batch has."""


class Making:
    """A folder of records that is being made.

    Attributes:
      journal: its subfolder, which others may put files into as well.
      done: whether it has all records; then nothing is left but to use it.

    Args:
      folder: of the records; may hold those that an earlier process made of the same facts.
      facts: JSON-able, what tells these records from others; they are kept in `dataset.json`.
      share: of this process.

    Raises:
      FileError: the folder holds some records that are made of other facts; in all processes.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], share: Share = ALONE):
        self.folder, self.facts, self._share = folder, dict(facts), share
        self.journal = folder / JOURNAL
        self.mark = manifest.mark_of(facts)
        self._files: dict[str, list[manifest.File]] = {}
        share.first(self._begin, f"'{folder}'")
        self.done = (folder / DESCRIPTION).exists()  # looked at once all know that it is theirs

    def _begin(self) -> None:
        """Writes down the facts, or compares them with those that were written down."""
        whole, begun = self.folder / DESCRIPTION, self.journal / FACTS
        for path in (whole, begun):
            if path.exists():
                if (other := difference(read_json(path), self.facts)) is None:
                    return
                if path == whole or self.has_shards():
                    raise FileError(
                        f"'{self.folder}' was begun with {other}; go on with what it was begun"
                        " with, or remove it to begin anew"
                    )
        paths.make_folder(self.folder)
        contents.remove(self.folder, keep=[UNFINISHED])  # what others left, who came to no shard
        write_json(begun, self.facts)

    def has_shards(self) -> bool:
        """Whether some are there, in the folder or below."""
        return any(file.suffix == ".array_record" for file in contents.files(self.folder))

    def settle(self, content: str) -> None:
        """Adds to the facts what is known only once the source was looked at.

        Args:
          content: a digest of its examples, or nothing.
        """
        self.facts |= {"content": content} if content else {}
        self.mark = manifest.mark_of(self.facts)

    def forget(self) -> None:
        """Removes the journal, such as where the source cannot be used."""
        contents.remove(self.journal)

    def write(
        self,
        kind: str,
        count: int,
        batch: int,
        record_bytes: int,
        begin: Callable[[], Encode],
        *,
        workers: int = 1,
    ) -> None:
        """Writes the shards of one kind that are not there yet; returns once all of them are.

        Args:
          kind: `LATENTS` or `CAPTIONS`.
          count: of their records.
          batch: of them that are encoded at a time.
          record_bytes: about the size of one.
          begin: makes the function that encodes. It is called by all processes or by none: reading
            networks is something that they do together.
          workers: threads that encode, a batch each.

        Raises:
          FileError: a shard that was written is not there.
        """
        size = shards.records_a_shard(count, record_bytes, batch)
        spans = [range(start, min(start + size, count)) for start in range(0, count, size)]
        paths = [self.folder / shard_name(kind, number) for number in range(len(spans))]
        mine = [
            number
            for number in range(len(spans))[self._share.index :: self._share.count]
            if shards.written(paths[number], self.journal) is None
        ]
        if self._share.any(bool(mine)):
            encode = begin()
            pace = Pace(kind, sum(len(spans[number]) for number in mine))
            for number in mine:
                batches = [
                    spans[number][start : start + batch]
                    for start in range(0, len(spans[number]), batch)
                ]
                found = in_order(encode, batches, workers)
                shards.write_shard(paths[number], self.journal, self._packed(batches, found, pace))
            self._share.wait(f"{kind} of '{self.folder}'")
        files = [shards.written(path, self.journal) for path in paths]
        if None in files:
            path = paths[files.index(None)]
            raise FileError(f"'{path}' is not there any more; run the same command again")
        self._files[kind] = files

    def _packed(
        self, batches: Sequence[range], found: Iterable[Sequence[Mapping[str, Any]]], pace: "Pace"
    ) -> Iterator[bytes]:
        """Records of the fields of each batch."""
        for span, batch in zip(batches, found, strict=True):
            for number, fields in zip(span, batch, strict=True):
                yield pack({"at": number, "of": self.mark, **fields})
            pace.add(len(span))

    def write_null(self, embed: Callable[[], Text]) -> None:
        """Writes the empty caption, unless it is there."""
        path = self.folder / NULL
        if self._share.leads and not path.exists():
            write_atomically(path, pack(embed()._asdict()))

    @property
    def examples(self) -> int:
        """The number of examples, once it is done."""
        return read_json(self.folder / DESCRIPTION)["examples"]

    @property
    def begun(self) -> dict[str, Any]:
        """As much of the description as is known so far."""
        return {**self.facts, "mark": self.mark.hex(), "shards": self._files}

    def finish(self, results: Mapping[str, Any], others: Mapping[str, str]) -> None:
        """Writes the manifest, once all shards are there, and other files before it.

        Args:
          results: JSON-able, kept in `dataset.json` as the facts are.
          others: texts by the names of their files.
        """

        def finish() -> None:
            description = {"format": manifest.FORMAT, **self.begun, **results}
            for name, kind in (("examples", LATENTS), ("distinct_captions", CAPTIONS)):
                description[name] = sum(file["records"] for file in self._files[kind])
            if (self.folder / NULL).exists():
                description["null"] = manifest.file_of(self.folder / NULL, 1)
            for name, text in others.items():
                write_atomically(self.folder / name, text)
            for left in contents.files(self.folder):
                if left.suffix == ".partial":  # of processes of other hosts, killed
                    left.unlink()
            write_json(self.folder / DESCRIPTION, description)

        self._share.first(finish, f"'{self.folder}'")
        self.done = True


def difference(known: Mapping[str, Any], facts: Mapping[str, Any], name: str = "") -> str | None:
    """The first of some facts that differs from what is known, in words; None where none does."""
    facts = json.loads(json.dumps(facts))
    for key in facts:
        old, new = known.get(key), facts[key]
        if isinstance(old, dict) and isinstance(new, dict):
            if (found := difference(old, new, f"{name}{key}.")) is not None:
                return found
        elif old != new:
            return f"{name}{key}={shown(old)} and not {shown(new)}"
    return None


def in_order(work: Callable[[range], T], spans: Sequence[range], workers: int) -> Iterator[T]:
    """What `work` makes of each span, in their order; threads work ahead, a few spans each."""
    if workers == 1:
        yield from map(work, spans)
        return

    def inside(span: range) -> T:
        with streams.default_settings():  # which are a thread's own
            return work(span)

    ahead: collections.deque = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for span in spans:
            ahead.append(pool.submit(inside, span))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Pace:
    """Tells in the log how far work is, how fast it goes and how long it will take.

    Args:
      what: is counted, such as "captions".
      total: how many there are.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total, self._count = what, total, 0
        self._begun = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Counts so many more; now and then there is a line."""
        self._count += count
        now = time.monotonic()
        if self._count < self._total and now < self._told + LOGGED_EVERY:
            return
        self._told = now
        rate = self._count / max(now - self._begun, 1e-9)
        left = duration((self._total - self._count) / rate)
        done = f"{self._count} of {self._total} {self._what}"
        logging.info("%s, %.3g/s%s", done, rate, f", {left} left" * (self._count < self._total))


def duration(seconds: float) -> str:
    """A length of time in words, such as "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
