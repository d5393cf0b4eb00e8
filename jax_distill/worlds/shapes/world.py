"""The world of captioned shapes, which ships with the package."""

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from jax_distill.config import ConfigError
from jax_distill.data.encoding import encode_shapes
from jax_distill.data.loader import CaptionedLatents
from jax_distill.data.records import DESCRIPTION, LatentRecords
from jax_distill.flow import Text
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.latents import LatentCodec
from jax_distill.storage.files import FileError
from jax_distill.worlds.shapes import bundled, renderer
from jax_distill.worlds.shapes.captions import POOLED_DIM, SEQUENCE_DIM, CaptionEncoder

CAPTIONS_CHECKED = 1000  # of the stream; of a folder, all


class Shapes:
    """Pictures that are rendered, captions that a fixed encoder reads; see `World`."""

    resolution = (renderer.IMAGE_SIZE, renderer.IMAGE_SIZE)
    batch_size = 60
    scored = True
    plain_guidance = "cfg"
    text_widths = (SEQUENCE_DIM, POOLED_DIM)

    def __init__(self, config: ConfigDict):
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

    def time_shift(self, tokens: int) -> None:
        return None

    def source(self, workdir: Path) -> CaptionedLatents:
        """`data.path`, or the stream of `data.seed`, encoded once into the workdir."""
        data = self._config.data
        path = Path(data.path or workdir / "data")
        if not data.path and not (path / DESCRIPTION).exists():
            logging.info("encoding %d pictures into %s", data.examples, path)
            encode_shapes(path, data.examples, data.seed, self.codec.encode)
        return CaptionedLatents(LatentRecords(path), self._encoder)

    def preview(self, source: CaptionedLatents, count: int) -> tuple[list[str], Text]:
        """Held-out captions, taken evenly from first to last."""
        captions = preview_captions(count)
        return captions, self.encode(captions)

    def check(self, records: LatentRecords | None) -> None:
        limit = len(renderer.held_out_prompts())
        if self._config.samples.prompts > limit:
            raise ConfigError(
                f"samples.prompts: {self._config.samples.prompts} is more than {limit}"
            )
        data = self._config.data
        if records is not None:
            captions = (records[index].caption for index in range(len(records)))
        else:
            checked = range(min(data.examples, CAPTIONS_CHECKED))
            captions = (renderer.sample(data.seed, index).caption for index in checked)
        try:
            for caption in captions:
                self._encoder.concepts(caption)
        except FileError:
            raise
        except ValueError as error:
            raise ConfigError(f"data.text_length: {error}") from None


def preview_captions(count: int) -> list[str]:
    """`count` of the held-out captions, taken evenly from first to last."""
    prompts = renderer.held_out_prompts()
    return [prompts[index * len(prompts) // count].caption for index in range(count)]


def embedded_codec() -> LatentCodec:
    """The autoencoder that ships with the package."""
    params, description = bundled.load("autoencoder")
    return LatentCodec(AutoencoderConfig.from_dict(description), params)
