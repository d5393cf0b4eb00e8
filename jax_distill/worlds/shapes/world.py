"""The world of captioned shapes, bundled with the package."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from jax_distill.config import ConfigError
from jax_distill.data.damaged import share_of
from jax_distill.data.encoding import make
from jax_distill.data.folders import weighed
from jax_distill.data.manifest import DESCRIPTION
from jax_distill.data.mixture import Mixture, Part
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Text
from jax_distill.interop.orbax_tree import StoredLeaf
from jax_distill.interop.parts import StoredPart
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.latents import LatentCodec
from jax_distill.storage import outputs, paths
from jax_distill.storage.files import FileError
from jax_distill.worlds.shapes import bundled, renderer
from jax_distill.worlds.shapes.captions import POOLED_DIM, SEQUENCE_DIM, CaptionEncoder
from jax_distill.worlds.shapes.sources import CaptionedLatents, Pictures, RenderedPictures

CAPTIONS_CHECKED = 1000  # of the stream; in a folder, all


class Shapes:
    """Rendered pictures, with captions that a fixed encoder reads; see `World`."""

    resolution = (renderer.IMAGE_SIZE, renderer.IMAGE_SIZE)
    batch_size = 60
    scored = True
    plain_guidance = "cfg"
    distributed = False
    stores_text = False
    text_widths = (SEQUENCE_DIM, POOLED_DIM)
    scheduler = None
    assumed = ()

    def __init__(self, config: ConfigDict, mesh: Any = None):
        del mesh  # the caption encoder has no parameters
        self._config = config
        self._encoder = CaptionEncoder(config.data.text_length)
        self.null = self.encode([""])

    @functools.cached_property
    def codec(self) -> LatentCodec:
        return embedded_codec()

    @property
    def latent_channels(self) -> int:
        return 4 * bundled.load("autoencoder")[1]["latent_channels"]

    def encode(self, captions: Sequence[str]) -> Text:
        return Text(*self._encoder.encode(captions))

    def encoder(self) -> Callable[[Sequence[str]], Text]:
        return self.encode

    def time_shift(self, tokens: int) -> None:
        return None

    def part(self, name: str) -> StoredPart | None:
        if name != "autoencoder":
            return None
        params, description = bundled.load(name)
        config = AutoencoderConfig.from_dict(description).to_dict()
        return StoredPart(config, jax.tree.map(StoredLeaf, params))

    def examples(self, count: int) -> list[str]:
        return preview_captions(count)

    def default_teacher(self) -> ConfigDict:
        return bundled.teacher_config()

    planned_teacher = default_teacher

    def planned_embedding(self, count: int, mesh: Any) -> None:
        return None

    def source(self, workdir: Path) -> Mixture:
        """`data.path`, or the stream of `data.seed`, encoded once into the workdir."""
        data = self._config.data
        if data.path:
            parts = weighed(data.path, data.weights)
            return Mixture([Part(self._opened(folder), weight) for folder, weight in parts])
        path = workdir / "data"
        if not (path / DESCRIPTION).exists():
            logging.info("encoding %d pictures into %s", data.examples, path)
            with outputs.made_whole(path) if paths.is_bucket(path) else nullcontext(path) as folder:
                make(folder, self.work())
        return Mixture([Part(self._opened(path))])

    def _opened(self, folder: str | Path) -> CaptionedLatents:
        records = LatentRecords(paths.path(folder), share_of(self._config.data))
        return CaptionedLatents(records, self._encoder)

    def pictures(self) -> Pictures:
        return Pictures(self._config.data.examples, self._config.data.seed)

    def captions(self, count: int, seed: int) -> list[str]:
        return [renderer.caption(seed, index) for index in range(count)]

    def stored_text(self, padding: str = "shared") -> None:
        return None

    def work(
        self,
        source: None = None,
        *,
        seed: None = None,
        damaged_share: float = 0.0,
        padding: str = "shared",
        embed: bool = False,
    ) -> RenderedPictures:
        """Of the first `data.examples` of the stream `data.seed`."""
        data, codec = self._config.data, self.codec
        shape = codec.token_shape(*self.resolution)
        return RenderedPictures(data.examples, data.seed, codec.encode, shape)

    def preview(self, source: CaptionedLatents, count: int) -> tuple[list[str], Text]:
        """Held-out captions, evenly spaced from first to last."""
        captions = preview_captions(count)
        return captions, self.encode(captions)

    def check(self, records: LatentRecords | None, folder: str = "") -> None:
        del folder
        limit = len(renderer.held_out_prompts())
        if self._config.samples.prompts > limit:
            raise ConfigError(
                f"samples.prompts: {self._config.samples.prompts} is more than {limit}"
            )
        data = self._config.data
        if records is not None:
            captions = records.captions()
        else:
            captions = self.captions(min(data.examples, CAPTIONS_CHECKED), data.seed)
        try:
            for caption in captions:
                self._encoder.concepts(caption)
        except FileError:
            raise
        except ValueError as error:
            raise ConfigError(f"data.text_length: {error}") from None


def preview_captions(count: int) -> list[str]:
    """Held-out captions, `count` of them, evenly spaced from first to last."""
    prompts = renderer.held_out_prompts()
    return [prompts[index * len(prompts) // count].caption for index in range(count)]


def embedded_codec() -> LatentCodec:
    """The bundled autoencoder."""
    params, description = bundled.load("autoencoder")
    return LatentCodec(AutoencoderConfig.from_dict(description), params)
