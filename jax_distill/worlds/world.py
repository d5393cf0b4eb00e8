"""The interface between the program and one kind of pictures and captions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from jax_distill.data.encoding import StoredText, Work
from jax_distill.data.mixture import Mixture
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.source import CaptionedSource
from jax_distill.flow import Batch, Text
from jax_distill.interop.parts import StoredPart
from jax_distill.models.latents import LatentCodec
from jax_distill.training.feed import Embedder


class Source(Protocol):
    """Training data: random access to single examples, `Batch`es without the leading axis."""

    null: Text
    """The empty caption, with a leading axis of length one."""

    empty: Any
    """The empty caption as examples have theirs: embedded, or as token ids."""

    embedder: Embedder | None
    """Embeds captions that come as token ids; None where they come embedded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class Embedding(NamedTuple):
    """The program that embeds captions between steps, from shapes alone.

    Attributes:
      function: (parameters, batches of token ids) to a `Text` for each.
      jitted: the same, placed on a mesh.
      parameters: shapes of the text encoders' parameters, as a run holds them.
      tokens: shapes of the token ids, a tree for each of the batches that are embedded at a time.
    """

    function: Callable[[Any, Any], list[Text]]
    jitted: Any
    parameters: Any
    tokens: list[Any]


class World(Protocol):
    """Captions in, tokens in, pictures out; made from a configuration, and a mesh or None.

    Attributes:
      resolution: height and width of its pictures in pixels.
      batch_size: pictures drawn at a time by default.
      scored: whether pictures can be judged: `scoring` knows this world's prompts.
      plain_guidance: "cfg" or "none": the guidance of networks without an input for the scale,
        where `teacher.guidance` does not say.
      distributed: whether a network is read onto all devices where no mesh is given.
      stores_text: whether captions are embedded when data is prepared, and stored in bfloat16;
        otherwise they are embedded in float32 as they are read.
    """

    resolution: tuple[int, int]
    batch_size: int
    scored: bool
    plain_guidance: str
    distributed: bool
    stores_text: bool

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

    def encoder(self) -> Callable[[Sequence[str]], Text]:
        """A function like `encode` for many batches; it keeps the text encoders in memory."""

    def time_shift(self, tokens: int) -> float | None:
        """The shift mu of the sampling schedule; None where objectives keep their own."""

    @property
    def scheduler(self) -> Mapping[str, Any] | None:
        """diffusers' config of that schedule; None where objectives keep their own."""

    @property
    def assumed(self) -> Sequence[str]:
        """Sentences about facts that the source of the world's networks did not state."""

    def default_teacher(self) -> ConfigDict:
        """The configuration of the teacher of runs whose `teacher.checkpoint` is empty.

        Raises:
          ConfigError: the world has none.
        """

    def planned_teacher(self) -> ConfigDict:
        """Like `default_teacher`, for plans, which need no more than the sizes of its network."""

    def planned_embedding(self, count: int, mesh: Any) -> Embedding | None:
        """How a run embeds its batches of `count` captions; None where they come embedded."""

    def part(self, name: str) -> StoredPart | None:
        """The "autoencoder", "clip" or "t5" of an exported network's pipeline, if there is one."""

    def examples(self, count: int) -> list[str]:
        """Captions to be exported as embeddings; none where text encoders of PyTorch make them."""

    def source(self, workdir: Path) -> Mixture:
        """The data of a run, of the folders of `data.path`; may be made, below `workdir`."""

    def pictures(self) -> Sequence[Batch] | None:
        """Pictures to train an autoencoder on; None in a world that comes with its own."""

    def captions(self, count: int, seed: int) -> list[str] | None:
        """The first captions of the world's stream `seed`; None where the user must give them."""

    def stored_text(self, padding: str = "shared") -> StoredText | None:
        """How captions are embedded to be stored; None where they are embedded as they are read.

        Args:
          padding: see `manifest.TextFacts`.
        """

    def work(
        self,
        source: CaptionedSource | None = None,
        *,
        seed: int | None = None,
        damaged_share: float = 0.0,
        padding: str = "shared",
        embed: bool = True,
    ) -> Work:
        """Pictures and captions that are to be encoded into a folder of records.

        Args:
          source: captioned pictures; None in a world that renders its own, by `data.examples` and
            `data.seed`.
          seed: of latents drawn from the autoencoder's posterior; None takes its mean.
          damaged_share: the largest share of examples that may be left out, see
            `sources.checking`.
          padding: see `manifest.TextFacts`.
          embed: whether captions are stored embedded, in a world that `stores_text`.

        Raises:
          ValueError: the encoders are missing.
        """

    def preview(self, source: Source, count: int) -> tuple[list[str], Text]:
        """Captions for sample grids, always the same `count`, as words and embedded."""

    def check(self, records: LatentRecords | None, folder: str = "") -> None:
        """Checks this world's own requirements before a run begins.

        Args:
          records: of a folder of `data.path`; None where the world makes its data itself.
          folder: that they lie in.

        Raises:
          ConfigError: naming the key and the fix.
        """
