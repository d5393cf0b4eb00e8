"""Data of the shapes world: rendered as it is read, or encoded once into records."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jax_distill.data.encoding import Listed, stored_latents
from jax_distill.data.loader import OfRecords
from jax_distill.data.making import Encode
from jax_distill.data.records import LatentRecords
from jax_distill.devices.processes import ALONE
from jax_distill.flow import Batch, Text
from jax_distill.worlds.shapes import renderer
from jax_distill.worlds.shapes.captions import CaptionEncoder

BATCH = 64


class Pictures:
    """Pictures rendered as they are read: (64, 64, 3) float32 in [-1, 1]."""

    def __init__(self, examples: int, seed: int):
        self._examples, self._seed = examples, seed

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Batch:
        image = renderer.sample(self._seed, int(index)).image
        return Batch(image.astype(np.float32) / 127.5 - 1)


class CaptionedLatents(OfRecords):
    """Latents with captions that are embedded as they are read."""

    embedder = None

    def __init__(self, records: LatentRecords, encoder: CaptionEncoder):
        super().__init__(records)
        self._encoder = encoder
        self.null = Text(*encoder.encode([""]))
        self.empty = Text(*(leaf[0] for leaf in self.null))

    def __getitem__(self, index: int) -> Batch:
        record = self._records[int(index)]
        try:
            sequence, pooled = self._encoder.encode([record.caption])
        except ValueError as error:
            raise ValueError(f"data.text_length, example {int(index)}: {error}") from None
        return Batch(record.latents.astype(np.float32), Text(sequence[0], pooled[0]))


@dataclass(frozen=True)
class RenderedPictures:
    """The work of encoding the first pictures of a stream; see `encoding.Work`.

    Attributes:
      count: of pictures.
      seed: of the stream.
      encode: pictures (`BATCH`, H, W, 3) uint8 to packed latents (`BATCH`, N, C).
      shape: of a picture's latents, (N, C).
    """

    count: int
    seed: int
    encode: Callable[[np.ndarray], Any]
    shape: tuple[int, int]
    text: None = field(default=None, init=False)
    batch: int = field(default=BATCH, init=False)
    workers: int = field(default=1, init=False)

    @property
    def facts(self) -> dict[str, Any]:
        latents = {"shape": self.shape, "type": "float16", "taken": "mean"}
        size = [renderer.IMAGE_SIZE, renderer.IMAGE_SIZE]
        return {"world": "shapes", "seed": self.seed, "resolution": size, "latents": latents}

    def look(self, *, most=None, journal=None, share=ALONE) -> Listed:
        del journal, share
        return Listed(self.words(self.count if most is None else most))

    def words(self, most: int) -> list[str]:
        return [renderer.caption(self.seed, index) for index in range(min(most, self.count))]

    def begin(self, found: Listed, texts: Callable[[range], Text]) -> Encode:
        del found, texts

        def encode(span: range) -> list[dict[str, Any]]:
            images = np.stack([renderer.sample(self.seed, index).image for index in span])
            padding = self.batch - len(span)  # one shape compiles
            padded = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
            names = [f"picture {index} of the shapes world" for index in span]
            stored = stored_latents(self.encode(padded), names)
            return [
                {"key": f"{self.seed}:{index}", "latents": one} for index, one in zip(span, stored)
            ]

        return encode
