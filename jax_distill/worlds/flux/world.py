"""FLUX's world: the text encoders and the autoencoder of a ported folder."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill import flow
from jax_distill.config import ConfigError, load
from jax_distill.data import manifest, mixture
from jax_distill.data.damaged import share_of
from jax_distill.data.encoding import NULL_CAPTION, Embed, EncodedPictures, StoredText
from jax_distill.data.folders import folders, resolution_of, weighed
from jax_distill.data.identity import of_weights
from jax_distill.data.loader import EmbeddedLatents, TokenizedLatents
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.source import CaptionedSource
from jax_distill.devices import sharding
from jax_distill.flow import Text
from jax_distill.interop import ported_folder, scheduler_config
from jax_distill.interop.parts import StoredPart
from jax_distill.models import clip, t5
from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig
from jax_distill.models.binding import parameters
from jax_distill.models.latents import LatentCodec
from jax_distill.storage import paths
from jax_distill.storage.quoting import shown
from jax_distill.worlds.flux import embedding
from jax_distill.worlds.flux.embedding import BatchEmbedder
from jax_distill.worlds.flux.flux_lite import flux_lite
from jax_distill.worlds.flux.stored import load_stored
from jax_distill.worlds.flux.text_encoders import Part, TextEncoders, shapes
from jax_distill.worlds.flux.tokenizers import FluxTokenizer
from jax_distill.worlds.world import Embedding

_LARGEST_SHIFT = 50.0  # of mu: times are shifted by e^mu
_TEXT_ENCODERS = ("clip", "t5", "tokenizer", "tokenizer_2")
# Other settings of diffusers' FlowMatchEulerDiscreteScheduler, each with the supported value.
_FIXED = {
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


class Flux:
    """Pictures and captions as FLUX has them; see `World`.

    The parts come from the ported folder that `teacher.checkpoint` leads to, through any number of
    runs. Parameters are read when they are needed, in the type they are stored in; the text
    encoders are released again, but where `data.embedding` is "training".
    """

    batch_size = 4
    scored = False
    plain_guidance = "none"  # as FLUX.1-schnell
    distributed = True
    stores_text = True

    def __init__(self, config: ConfigDict, mesh: Mesh | None = None):
        self._config, self._mesh = config, mesh
        self.resolution = tuple(config.data.resolution)

    @functools.cached_property
    def folder(self) -> Path:
        """The ported folder.

        Raises:
          ConfigError: `teacher.checkpoint` leads to no such folder.
        """
        return parts_folder(self._config.teacher.checkpoint)

    @functools.cached_property
    def _described(self) -> dict[str, Any]:
        return ported_folder.describe(self.folder)

    @functools.cached_property
    def codec(self) -> LatentCodec:
        config = AutoencoderConfig.from_dict(self._described["parts"]["autoencoder"])
        like = jax.eval_shape(lambda: parameters(Autoencoder(config, rngs=nnx.Rngs(0))))
        params = load_stored(self.folder, "autoencoder", like)
        return LatentCodec(config, params, sliced=True)

    @property
    def latent_channels(self) -> int:
        return 4 * self._described["parts"]["autoencoder"]["latent_channels"]

    @property
    def text_widths(self) -> tuple[int, int]:
        parts = self._described["parts"]
        return parts["t5"]["d_model"], parts["clip"]["hidden_size"]

    @functools.cached_property
    def tokenizer(self) -> FluxTokenizer:
        return FluxTokenizer.load(self.folder, self._config.data.text_length)

    def text_encoders(self, mesh: Mesh | None = None) -> TextEncoders:
        """The text encoders, by default on the world's mesh; they take memory until released."""
        mesh = mesh or self._mesh or sharding.make_mesh(sharding.ALL_FSDP)
        parts = [
            Part(config, load_stored(self.folder, name, shapes(config), mesh))
            for name, config in zip(("clip", "t5"), self._text_configs())
        ]
        return TextEncoders(self.tokenizer.encode, *parts, dtype=self._config.dtype, mesh=mesh)

    def batch_embedder(self) -> BatchEmbedder:
        """The text encoders on the mesh of the run, where they stay."""
        mesh, configs = sharding.make_mesh(self._config.mesh), self._text_configs()
        return BatchEmbedder.load(self.folder, configs, dtype=self._config.dtype, mesh=mesh)

    def planned_embedding(self, count: int, mesh: Any) -> Embedding | None:
        """With the sizes of FLUX's encoders where no folder says others."""
        config = self._config
        if config.data.embedding != "training":
            return None
        configs = clip.ClipConfig(), t5.T5Config()
        if config.teacher.checkpoint:
            configs = self._text_configs()
        length = config.data.text_length
        return embedding.planned(configs, count, length, dtype=config.dtype, mesh=mesh)

    def _text_configs(self) -> tuple[clip.ClipConfig, t5.T5Config]:
        parts = self._described["parts"]
        return clip.ClipConfig.from_dict(parts["clip"]), t5.T5Config.from_dict(parts["t5"])

    def encode(self, captions: Sequence[str]) -> Text:
        """Reads the text encoders, embeds, and releases them: 10 GB in FLUX's size."""
        return self.encoder()(captions)

    def encoder(self) -> Callable[[Sequence[str]], Text]:
        return self.text_encoders().encode

    @functools.cached_property
    def null(self) -> Text:
        """The empty caption, from `data.path` if it is embedded there, otherwise embedded anew."""
        if self._config.data.path and self._config.data.embedding == "prepared":
            return self._records(folders(self._config.data.path)[0]).null
        return self.encode([NULL_CAPTION])

    def time_shift(self, tokens: int) -> float:
        """The teacher's scheduler's: by the number of tokens, or constant (schnell)."""
        return schedule_shift(self.scheduler, tokens)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """That of the first ported folder that `teacher.checkpoint` leads to."""
        folder = next(ported_folders(self._config.teacher.checkpoint), None) or self.folder
        return scheduler_config.followed(ported_folder.describe(folder)["scheduler"])

    @property
    def assumed(self) -> list[str]:
        """Those of the first ported folder that `teacher.checkpoint` leads to, if it is there."""
        with contextlib.suppress(ConfigError):
            for folder in ported_folders(self._config.teacher.checkpoint):
                return ported_folder.describe(folder).get("assumed", [])
        return []

    def part(self, name: str) -> StoredPart | None:
        try:
            folder = self.folder
        except ConfigError:  # a transformer alone
            return None
        if name not in self._described["parts"]:
            return None
        config, names = (self._described[key][name] for key in ("parts", "names"))
        tree = ported_folder.open_part(folder, name, config)
        tokenizer = {"clip": folder / "tokenizer", "t5": folder / "tokenizer_2"}.get(name)
        return StoredPart(config, tree, names, tokenizer)

    def examples(self, count: int) -> list[str]:
        return []

    def default_teacher(self) -> ConfigDict:
        raise ConfigError(
            "teacher.checkpoint: missing; world='flux' needs a folder that python -m"
            " jax_distill.port made, or a run that began with one"
        )

    def planned_teacher(self) -> ConfigDict:
        """FLUX.1-lite-8B."""
        return flux_lite(self._config.model.get("remat", "none"), self.resolution)

    def source(self, workdir: Path) -> mixture.Mixture:
        """The folders of `data.path`, as `jax_distill.prepare` made them."""
        del workdir
        parts = []
        for folder, weight in weighed(self._config.data.path, self._config.data.weights):
            records = self._records(folder)
            resolution = resolution_of(records.description)
            parts.append(mixture.Part(self._opened(records), weight, resolution))
        return mixture.Mixture(parts)

    def _records(self, folder: str) -> LatentRecords:
        return LatentRecords(paths.path(folder), share_of(self._config.data))

    def _opened(self, records: LatentRecords) -> EmbeddedLatents | TokenizedLatents:
        if self._config.data.embedding == "prepared":
            return EmbeddedLatents(records)
        return TokenizedLatents(records, self.tokenizer.encode, self.batch_embedder)

    def preview(
        self, source: EmbeddedLatents | TokenizedLatents, count: int
    ) -> tuple[list[str], Text]:
        """Captions of the data, taken evenly, embedded as in training."""
        return source.captions([index * len(source) // count for index in range(count)])

    def pictures(self) -> None:
        return None

    def captions(self, count: int, seed: int) -> None:
        return None

    def stored_text(self, padding: str = "shared") -> StoredText:
        length, (width, pooled) = self._config.data.text_length, self.text_widths
        facts = {"sequence": [length, width], "pooled": pooled, "type": "bfloat16"}

        def read() -> Embed:
            return self.text_encoders(sharding.local_mesh()).encode

        facts |= {"padding": padding}
        return StoredText(facts, read, self.tokenizer.rows, self._digests(_TEXT_ENCODERS))

    def _digests(self, names: Sequence[str]) -> dict[str, str]:
        return {name: of_weights(self.folder / name) for name in names}

    def work(
        self,
        source: CaptionedSource,
        *,
        seed: int | None = None,
        damaged_share: float = 0.0,
        padding: str = "shared",
        embed: bool = True,
    ) -> EncodedPictures:
        """Of captioned pictures, fitted to the world's height and width."""
        text, devices = self.stored_text(padding) if embed else None, jax.local_devices()
        rows, columns = (size // 16 for size in self.resolution)
        latents = {"shape": [rows * columns, self.latent_channels], "type": "float16"}
        latents |= {"taken": "mean"} if seed is None else {"taken": "sample", "seed": seed}
        facts = {
            "world": "flux",
            "source": source.name,
            "looked_at": len(source),
            "resolution": list(self.resolution),
            "latents": latents,
            "encoders": self._digests(["autoencoder"]),
        }
        if text is not None:
            facts["text"] = text.facts
            facts["encoders"] |= text.encoders

        def encoders() -> list[Callable[..., Any]]:
            return [self.codec.on(device).encode for device in devices]

        return EncodedPictures(
            source, self.resolution, encoders, text, facts, seed, damaged_share, len(devices)
        )

    def check(self, records: LatentRecords | None, folder: str = "") -> None:
        config = self._config
        if records is None:
            raise ConfigError(
                "data.path: missing; make the folder with python -m jax_distill.prepare"
                f" --checkpoint={self.folder} --source=PICTURES --output=DIR"
            )
        first = folder == folders(config.data.path)[0]  # grids have its captions
        if first and config.samples.prompts > len(records):
            raise ConfigError(
                f"samples.prompts: {config.samples.prompts} is more than the {len(records)}"
                " examples there are"
            )
        made_for = resolution_of(records.description)
        if first and made_for != self.resolution:
            raise ConfigError(
                f"data.path: the pictures in '{folder}' are of {made_for} pixels, data.resolution"
                f" is {self.resolution}; they must be equal"
            )
        if config.data.embedding == "prepared":
            self._check_embedded(records, folder)
        elif not (caption := records.good(0).caption).strip():
            raise ConfigError(
                f"data.path: '{folder}' has no captions to embed (the first is {caption!r});"
                " prepare pictures that have some, with python -m jax_distill.prepare"
                f" --checkpoint={self.folder}"
            )
        self._tell_other_encoders(records, folder)

    def _tell_other_encoders(self, records: LatentRecords, folder: str) -> None:
        """Warns where a folder's encoders are not the teacher's, or were ported another time."""
        names = ["autoencoder"]
        names += _TEXT_ENCODERS if self._config.data.embedding == "prepared" else []
        known = records.description.get("encoders", {})
        ours = self._digests([name for name in names if name in known])
        if other := [name for name in ours if ours[name] != known[name]]:
            logging.warning(
                "data.path: '%s' was prepared with the %s of another folder than '%s'; if that is"
                " not another port of the same weights, prepare it again",
                *(folder, " and ".join(other), self.folder),
            )

    def _check_embedded(self, records: LatentRecords, folder: str) -> None:
        config, description = self._config, records.description
        if not records.has_null:
            raise ConfigError(
                f"data.path: '{folder}' has no embedded captions; embed them while"
                " training with --config.data.embedding=training, or make the folder with"
                f" python -m jax_distill.prepare --checkpoint={self.folder}, without --embed=false"
            )
        found = tuple(description["text"]["sequence"])
        wanted = (config.data.text_length, self.text_widths[0])
        if found != wanted:
            raise ConfigError(
                f"data.path: the captions in '{folder}' are of shape {found}, the teacher's text"
                f" encoders make {wanted}; prepare the folder with its text encoders"
            )
        first = folders(config.data.path)[0]
        if _encoders(manifest.read(paths.path(first), whole=False)) != _encoders(description):
            raise ConfigError(
                f"data.path: the captions in '{folder}' were embedded by other text encoders than"
                f" those in '{first}'; prepare both with the same"
            )


def _encoders(description: Mapping[str, Any]) -> dict[str, str | None]:
    """The digests of the text encoders that a folder's captions were embedded by."""
    known = description.get("encoders", {})
    return {name: known.get(name) for name in _TEXT_ENCODERS}


def ported_config(folder: Path) -> ConfigDict:
    """The configuration of a ported folder; its `teacher.checkpoint`, itself, leads to the parts.

    Raises:
      ValueError: it is no ported folder, or an early one that lacks required facts.
    """
    described = ported_folder.describe(folder)
    config = load(folder).copy_and_resolve_references()
    student = described["source"]["layout"] == "t2i_distill"
    if student and config.model.guidance_embeds and "guidance_factor" not in config.model:
        raise ValueError(
            f"'{folder}' was ported before the guidance factor was kept; port it again"
        )
    with config.unlocked():
        # A folder without the parts names the one that has them, but its schedule is its own.
        config.teacher.checkpoint = str(folder)
    return config


def parts_folder(checkpoint: str) -> Path:
    """The ported folder with text encoders and autoencoder that a teacher leads to.

    Args:
      checkpoint: a `teacher.checkpoint`: such a folder, or a run whose own teacher leads to one.

    Raises:
      ConfigError: it leads to no such folder.
    """
    for folder in ported_folders(checkpoint):
        if "autoencoder" in ported_folder.describe(folder)["parts"]:
            return folder
    if not checkpoint:
        raise ConfigError(
            "teacher.checkpoint: missing; give a folder that python -m jax_distill.port made, or a"
            " run that began with one"
        )
    raise ConfigError(
        f"teacher.checkpoint: '{checkpoint}' leads to no ported folder with text encoders and"
        " autoencoder; make one of a whole diffusers folder with python -m jax_distill.port"
    )


def ported_folders(checkpoint: str) -> Iterator[Path]:
    """The ported folders that a teacher leads to, its own first."""
    passed: list[str] = []
    while checkpoint and checkpoint not in passed:
        if ported_folder.is_ported(folder := paths.path(checkpoint)):
            yield folder
        passed.append(checkpoint)
        try:
            checkpoint = load(folder).teacher.checkpoint
        except ConfigError as error:
            raise ConfigError(f"teacher.checkpoint: {error}") from None


def schedule_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift mu of a scheduler's sampling schedule, for `flow.shift_time`.

    Args:
      scheduler: config of diffusers' `FlowMatchEulerDiscreteScheduler`.
      tokens: image tokens of a picture.

    Raises:
      ValueError: the scheduler changes its schedule in an unsupported way.
    """
    for key, expected in _FIXED.items():
        if (found := scheduler.get(key, expected)) != expected:
            raise ValueError(
                f"scheduler: {key}={shown(found)} is not supported; only {expected!r} is"
            )
    if not scheduler.get("use_dynamic_shifting", False):
        return math.log(scheduler.get("shift", 1.0))
    shift = flow.flux_shift(
        tokens,
        scheduler.get("base_shift", 0.5),
        scheduler.get("max_shift", 1.15),
        scheduler.get("base_image_seq_len", 256),
        scheduler.get("max_image_seq_len", 4096),
    )
    if abs(shift) > _LARGEST_SHIFT:
        raise ValueError(
            f"scheduler: at {tokens} tokens its shift is {shift:.3g}, which leaves no time but one;"
            " mend scheduler_config.json and port it again"
        )
    return shift
