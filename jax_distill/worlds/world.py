"""What a world is: the interface between the program and the pictures and captions of a kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jax_distill.data.records import LatentRecords
from jax_distill.flow import Batch, Text
from jax_distill.models.latents import LatentCodec


class Source(Protocol):
    """Training data: random access to single examples, `Batch`es without the leading axis."""

    null: Text
    """The empty caption, with a leading axis of length one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class World(Protocol):
    """Captions in, tokens in, pictures out; made from a configuration.

    Attributes:
      resolution: height and width of its pictures in pixels.
      batch_size: pictures that are drawn at a time, where nothing else is said.
      scored: whether pictures can be judged: `scoring` knows this world's prompts.
      plain_guidance: "cfg" or "none": what networks that take no guidance scale are taken to be
        made for, where `teacher.guidance` does not say.
    """

    resolution: tuple[int, int]
    batch_size: int
    scored: bool
    plain_guidance: str

    @property
    def null(self) -> Text:
        """The empty caption that networks are guided away from, with a leading axis of one."""

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder."""

    @property
    def latent_channels(self) -> int:
        """Channels of one packed token."""

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of an embedded caption: of its sequence, and pooled."""

    def encode(self, captions: Sequence[str]) -> Text:
        """Embeds captions (B,), in host memory.

        Raises:
          ValueError: one of them cannot be embedded.
        """

    def time_shift(self, tokens: int) -> float | None:
        """The shift mu of the sampling schedule; None where objectives are to keep their own."""

    def source(self, workdir: Path) -> Source:
        """The data of a run; may be made, below `workdir`."""

    def preview(self, source: Source, count: int) -> tuple[list[str], Text]:
        """`count` captions, always the same, for sample grids, and how they are embedded."""

    def check(self, records: LatentRecords | None) -> None:
        """Checks what is special about this world before a run begins.

        Args:
          records: of `data.path`; None where the world makes its data itself.

        Raises:
          ConfigError: naming the key and the fix.
        """
