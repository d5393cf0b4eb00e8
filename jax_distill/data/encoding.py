"""Encodes pictures and captions into folders of latents, so that training never encodes."""

import json
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_distill import streams
from jax_distill.data import pictures
from jax_distill.data.making import Encode, Making
from jax_distill.data.manifest import CAPTIONS, DAMAGED, LATENTS
from jax_distill.data.records import Captions
from jax_distill.data.sources.checking import CheckedSource, Damaged, checked
from jax_distill.data.sources.source import CaptionedSource
from jax_distill.devices.processes import ALONE, Share
from jax_distill.flow import Text
from jax_distill.storage.files import FileError, PassingError

EMBEDDED_BATCH = 8  # pictures, or captions, at a time through large networks
STRETCHES = 16  # of a source, that stand for all of it
NULL_CAPTION = " "  # replaces dropped captions in T2I-Distill (arXiv:2512.13006)

Embed = Callable[[Sequence[str]], Text]


class StoredText(NamedTuple):
    """How captions are embedded to be stored.

    Attributes:
      facts: a `manifest.TextFacts`.
      read: reads the text encoders; returns the function that embeds captions (B,).
      rows: counts the rows of each caption's sequence that are its own, not padding's.
      encoders: digests of their weights, by their names.
    """

    facts: dict[str, Any]
    read: Callable[[], Embed]
    rows: Callable[[Sequence[str]], Sequence[int]]
    encoders: Mapping[str, str]


class Found(Protocol):
    """The examples of a data set that can be used.

    Attributes:
      captions: one an example.
      damaged: those that are left out.
      content: a digest of the examples, by which shards of other ones are told from theirs; empty
        where the facts tell.
    """

    captions: Sequence[str]
    damaged: Sequence[Damaged]
    content: str


class Listed(NamedTuple):
    """Examples none of which can be damaged; see `Found`."""

    captions: Sequence[str]
    damaged: Sequence[Damaged] = ()
    content: str = ""


class Work(Protocol):
    """A data set that can be made: all of it by `make`, a little of it by `estimate`.

    Attributes:
      facts: JSON-able; they tell it from others. Among them are `latents`, as
        `manifest.LatentFacts`, and `text`, where captions are stored embedded.
      count: of its examples, damaged ones among them.
      batch: examples that are encoded at a time.
      workers: threads that encode.
      text: how captions are stored embedded, if they are.
    """

    facts: Mapping[str, Any]
    count: int
    batch: int
    workers: int
    text: StoredText | None

    def look(
        self, *, most: int | None = None, journal: Path | None = None, share: Share = ALONE
    ) -> Found:
        """Finds the examples that can be used; arguments and errors as of `checking.checked`."""

    def words(self, most: int) -> Sequence[str]:
        """The captions of at most so many examples, without looking further."""

    def begin(self, found: Found, texts: Callable[[range], Text]) -> Encode:
        """Reads networks; returns what encodes examples: `key` and `latents` of each.

        Args:
          found: by `look`.
          texts: the embedded captions (B, ..) of some examples, as they are stored.
        """


def make(folder: Path, work: Work, share: Share = ALONE) -> int:
    """Makes a folder of records, or what earlier tries have left to do of it.

    Args:
      folder: of the records.
      work: what they are.
      share: of this process.

    Returns:
      The number of examples.

    Raises:
      FileError: as `Making`, or pictures or captions cannot be used.
      ValueError: latents or embeddings are not finite.
    """
    making = Making(folder, work.facts, share)
    if not making.done:
        found = look(work, making, share)
        making.settle(found.content)
        numbers, captions = distinct(found.captions)
        _write_captions(making, work.text, captions)
        _write_latents(making, work, found, numbers)
        lines = "".join(json.dumps(damaged._asdict()) + "\n" for damaged in found.damaged)
        results = {"damaged": len(found.damaged)}
        making.finish(results, {DAMAGED: lines} if lines else {})
    share.first(making.forget, f"'{folder}'")
    return making.examples


def look(work: Work, making: Making, share: Share) -> Any:
    """Looks at all examples; what was found of a source that cannot be used is not kept.

    Returns:
      As `Work.look`.

    Raises:
      FileError: as `Work.look`, in all processes.
    """
    found, refused = None, None
    try:
        found = work.look(journal=making.journal, share=share)
    except PassingError:
        raise
    except FileError as error:
        refused = error
    if share.any(refused is not None):
        if share.leads and not making.has_shards():  # which were made of what it was then
            making.forget()
        raise refused or FileError("another process refuses the source, see there")
    return found


def distinct(captions: Sequence[str]) -> tuple[list[int], list[str]]:
    """The number of each caption among those that differ, by first appearance; and these."""
    seen: dict[str, int] = {}
    numbers = [seen.setdefault(caption, len(seen)) for caption in captions]
    return numbers, list(seen)


def _write_captions(making: Making, text: StoredText | None, captions: Sequence[str]) -> None:
    if text is None:
        plain = lambda span: [{"caption": captions[number]} for number in span]  # noqa: E731
        making.write(CAPTIONS, len(captions), 1024, 256, lambda: plain)
        return
    (length, width), padding = text.facts["sequence"], text.facts["padding"]

    def begin() -> Encode:
        embed = text.read()
        making.write_null(lambda: null_of(embed))

        def encode(span: range) -> list[dict[str, Any]]:
            words = [captions[number] for number in span]
            embedded = embedded_half(embed, words)
            own = text.rows(words) if padding == "shared" else [length] * len(words)
            return [
                {"caption": caption, "sequence": sequence[:rows], "pooled": pooled}
                for caption, sequence, pooled, rows in zip(words, *embedded, own)
            ]

        return encode

    part = 4 if padding == "shared" else 1  # captions of people fill a quarter, or less
    making.write(CAPTIONS, len(captions), EMBEDDED_BATCH, 2 * length * width // part, begin)


def _write_latents(making: Making, work: Work, found: Found, numbers: Sequence[int]) -> None:
    def begin() -> Encode:
        stored = Captions(making.folder, making.begun)

        def texts(span: range) -> Text:
            rows = [stored[numbers[index]][1] for index in span]
            return Text(*(np.stack(leaves) for leaves in zip(*rows)))

        encode = work.begin(found, texts)
        return lambda span: [
            {**fields, "caption": numbers[index]} for index, fields in zip(span, encode(span))
        ]

    tokens, channels = work.facts["latents"]["shape"]
    size = 2 * tokens * channels
    making.write(LATENTS, len(numbers), work.batch, size, begin, workers=work.workers)


def null_of(embed: Embed) -> Text:
    """The empty caption, embedded as it is stored, with a leading axis of one."""
    text = embed([NULL_CAPTION] * EMBEDDED_BATCH)
    return _half(jax.tree.map(lambda leaf: leaf[:1], text), [NULL_CAPTION])


def embedded_half(embed: Embed, captions: Sequence[str]) -> Text:
    """Captions (B,), at most `EMBEDDED_BATCH`, embedded as they are stored.

    Raises:
      ValueError: some are not finite.
    """
    filled = [*captions, *captions[:1] * (EMBEDDED_BATCH - len(captions))]  # one shape compiles
    return _half(jax.tree.map(lambda leaf: leaf[: len(captions)], embed(filled)), captions)


@dataclass(frozen=True)
class EncodedPictures:
    """The work of encoding captioned pictures; see `Work`.

    Attributes:
      source: of the pictures.
      resolution: height and width in pixels to fit them to.
      encoders: reads the autoencoder; returns a function for each device: pictures (B, H, W, 3)
        uint8, `key=` optional, to packed latents (B, N, C).
      text: how their captions are embedded; None where they are stored as words alone.
      facts: about all that.
      seed: of latents drawn from the autoencoder's posterior; None takes its mean.
      damaged_share: the largest share of examples that may be left out.
      workers: the number of devices.
      others: more sizes, see `checking.checked`.
      found: by `look`, where that was done before.
    """

    source: CaptionedSource
    resolution: tuple[int, int]
    encoders: Callable[[], Sequence[Callable[..., Any]]]
    text: StoredText | None
    facts: Mapping[str, Any]
    seed: int | None = None
    damaged_share: float = 0.0
    workers: int = 1
    others: tuple[tuple[int, int], ...] = ()
    found: CheckedSource | None = None
    batch: int = field(default=EMBEDDED_BATCH, init=False)

    @property
    def count(self) -> int:
        return len(self.source)

    def look(self, *, most=None, journal=None, share=ALONE) -> CheckedSource:
        if self.found is not None:
            return self.found
        return checked(
            self.source,
            self.resolution,
            self.others,
            damaged_share=self.damaged_share if most is None else 1.0,
            most=most,
            journal=journal,
            share=share,
        )

    def words(self, most: int) -> list[str]:
        """As `Work`: those of stretches in all parts of the source, whose pictures are read too."""
        found = []
        for index in _spread(self.count, most):
            try:
                found.append(self.source[index].caption)
            except PassingError:
                raise
            except FileError:  # which `look` counts
                continue
        return found

    def begin(self, found: CheckedSource, texts: Callable[[range], Text]) -> Encode:
        del texts
        free: queue.SimpleQueue = queue.SimpleQueue()
        for encoder in self.encoders():
            free.put(encoder)

        def encode(span: range) -> list[dict[str, Any]]:
            rows = [found[index] for index in span]
            images = [pictures.read(row.picture, *self.resolution) for row in rows]
            padding = self.batch - len(rows)  # one shape compiles
            key = None if self.seed is None else jax.random.fold_in(streams.key(self.seed), span[0])
            encoder = free.get()
            try:
                latents = encoder(np.stack([*images, *images[:1] * padding]), key=key)
            finally:
                free.put(encoder)
            stored = stored_latents(latents, [row.picture.where for row in rows])
            return [{"key": row.key, "latents": one} for row, one in zip(rows, stored)]

        return encode


def _spread(count: int, most: int) -> list[int]:
    """Indices of so many at most, in stretches from all parts of what has `count`.

    Examples of a stretch often lie in one file, or a group of its rows, which is read once.
    """
    if count <= most:
        return list(range(count))
    starts = np.linspace(0, count - most // STRETCHES, STRETCHES).astype(int).tolist()
    return [start + step for start in starts for step in range(most // STRETCHES)]


def stored_latents(latents: Any, names: Sequence[str]) -> np.ndarray:
    """Converts latents to float16, as they are stored: the first of a batch, one for each name.

    Raises:
      ValueError: some are not finite, before or after.
    """
    with np.errstate(over="ignore"):
        stored = np.asarray(latents, np.float16)[: len(names)]
    _check_finite(stored, names, "latents")
    return stored


def _half(text: Text, captions: Sequence[str]) -> Text:
    """Converts embedded captions to bfloat16, as they are stored.

    Raises:
      ValueError: some are not finite.
    """
    half = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), text)
    for leaf in half:
        _check_finite(leaf, [f"caption {c!r:.80}" for c in captions], "embeddings")
    return half


def _check_finite(values: np.ndarray, names: Sequence[str], what: str) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise ValueError(
            f"{names[int(np.argmin(finite))]} has {what} that are not finite in {values.dtype};"
            " check the weights that make them"
        )
