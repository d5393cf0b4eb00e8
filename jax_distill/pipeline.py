"""Text to pictures with a trained network: what `jax_distill.load` returns."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_distill import sampling, streams, worlds
from jax_distill.assembly import adapters, build, draw_settings
from jax_distill.assembly.frozen import frozen_network
from jax_distill.assembly.resolution import EMBEDDED, trained_config
from jax_distill.devices import processes, sharding
from jax_distill.flow import Text
from jax_distill.interop import ported_folder
from jax_distill.models import finite
from jax_distill.storage import paths
from jax_distill.storage.files import check_no_partial
from jax_distill.training import checkpoint
from jax_distill.worlds import World
from jax_distill.worlds.flux.stored import load_stored
from jax_distill.worlds.shapes import bundled


class Pipeline:
    """A network, its sampler, and the world that it draws in.

    What it draws does not depend on the user's settings of JAX, see `streams.default_settings`.

    Args:
      config: of the run that trained the network.
      params: what its objective trained (averaged), {"network": ...}, or a function that reads it,
        which is called when it is first needed: after captions are embedded.
      world: of the configuration; made from it by default.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: dict | Callable[[], dict],
        world: World | None = None,
    ):
        self.config, self._params, self._read = config, params, params
        self.world = world or worlds.of(config)
        self._samplers: dict[tuple, Callable] = {}
        self._embed = functools.lru_cache(maxsize=1)(self.world.encode)

    @property
    def params(self) -> dict:
        if callable(self._params):
            with streams.default_settings():
                self._params = self._params()
        return self._params

    def taken(self) -> dict:
        """The network's parameters, which the pipeline does not keep where it can read them."""
        network = self.params["network"]
        self.release()
        return network

    def release(self) -> None:
        """Lets go of parameters that can be read again: the function that reads them was given."""
        if callable(self._read):
            self._params = self._read

    @params.setter
    def params(self, params: dict) -> None:
        self._params = params

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 2,
        seed: int = 0,
        guidance: float | None = None,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        noise: np.ndarray | None = None,
        tile: int | None = None,
    ) -> np.ndarray:
        """Draws one picture a prompt.

        Args:
          prompts: one caption or several.
          steps: of the sampler; 1, 2 or 4 for a student, 28 to 50 for a teacher.
          seed: of the noise, from 0 to 2^32 - 1. The i-th picture depends on (prompt, seed, i)
            alone.
          guidance: scale; the configuration's by default.
          batch_size: pictures drawn at a time; the world's by default.
          height: in pixels, a multiple of 16; the world's by default.
          width: likewise.
          noise: (B, N, C), packed as FLUX packs latents, in the place of the seed's.
          tile: pixels along a side that are decoded at a time, see `models.tiling`.

        Returns:
          (B, height, width, 3) uint8.

        Raises:
          ValueError: a caption is longer than the encoder takes; a number or the noise is out of
            its range, or not finite; sizes do not fit; or guidance is given to a network that
            takes none.
          NotFinite: what was drawn holds NaN or infinity.
        """
        prompts = draw_settings.captions(prompts)
        resolution = draw_settings.resolution(height, width, self.world.resolution)
        settings = self._settings(
            len(prompts), steps, seed, guidance, batch_size, resolution, noise
        )
        self._check_tile(tile)
        with streams.default_settings():
            return self._drawn(self._embed(prompts), settings, tile, finite.name_pictures(prompts))

    def draw(
        self,
        text: Text,
        *,
        steps: int,
        seed: int = 0,
        guidance: float | None = None,
        batch_size: int | None = None,
        resolution: tuple[int, int] | None = None,
        noise: np.ndarray | None = None,
        tile: int | None = None,
    ) -> np.ndarray:
        """As calling the pipeline, for captions that are embedded: text (B, ..)."""
        count = len(text.pooled)
        settings = self._settings(count, steps, seed, guidance, batch_size, resolution, noise)
        self._check_tile(tile)
        with streams.default_settings():
            return self._drawn(text, settings, tile, finite.name_pictures(count))

    def draw_each(
        self,
        text: Text,
        *,
        steps: int,
        seeds: Sequence[int],
        guidance: Sequence[float | None],
        batch_size: int,
        numbers: Sequence[int] | None = None,
        resolution: tuple[int, int] | None = None,
        tile: int | None = None,
    ) -> np.ndarray:
        """Draws pictures of several seeds, each the one that `draw` draws of it alone.

        One call of one program draws them one after another, any number up to the batch's size, so
        that numbers are rounded alike whatever is drawn beside a picture.

        Args:
          text: captions that are embedded, (B, ..).
          steps: of the sampler.
          seeds: (B,).
          guidance: scales (B,); None for the configuration's.
          batch_size: at least B.
          numbers: (B,), from 0 to 2^31 - 1: a picture depends on its prompt, its seed and its
            number; 0 by default.
          resolution: height and width in pixels; the world's by default.
          tile: as of calling the pipeline.

        Returns:
          (B, height, width, 3) uint8.

        Raises:
          ValueError: as `draw`.
        """
        count = len(seeds)
        every = [
            self._settings(1, steps, seed, scale, None, resolution, None)
            for seed, scale in zip(seeds, guidance, strict=True)
        ]
        self._check_tile(tile)
        rows = np.minimum(np.arange(batch_size), count - 1)
        each_seed = np.array([every[row].seed for row in rows], np.uint32)
        each_scale = np.array([every[row].guidance for row in rows], np.float32)
        each_number = np.zeros(count, np.int32) if numbers is None else np.array(numbers, np.int32)
        names, size = finite.name_pictures(count), every[0].resolution
        _check_text(text, names)
        with streams.default_settings():
            filled = jax.tree.map(lambda leaf: leaf[rows], text)
            sample = self._sampler(size, every[0].steps, each=True)
            tokens = sample(
                self.params, filled, each_number[rows], each_scale, each_seed, np.int32(count)
            )
            tokens = np.asarray(tokens)[:count]
            if bad := finite.bad_rows(tokens):
                finite.check_rows(tokens, names, "its latents are", self._cause(every[bad[0]]))
            decode = functools.partial(self.world.codec.decode, tile=tile)
            singly = [
                decode(tokens[row : row + 1], *size, names=names[row:]) for row in range(count)
            ]
        return np.concatenate(singly)

    def forget(self, steps: int, resolution: tuple[int, int]) -> None:
        """Lets go of the program by which `draw_each` draws in so many steps at a size."""
        self._samplers.pop((resolution, steps, True), None)
        if not any(known == resolution for known, *_ in list(self._samplers)):  # threads add
            self.world.codec.forget()

    def latents(
        self,
        text: Text,
        *,
        steps: int,
        seed: int = 0,
        guidance: float | None = None,
        batch_size: int | None = None,
        resolution: tuple[int, int] | None = None,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draws the packed latents (B, N, C) float32 that `draw` decodes."""
        count = len(text.pooled)
        settings = self._settings(count, steps, seed, guidance, batch_size, resolution, noise)
        with streams.default_settings():
            names = finite.name_pictures(count)
            return np.concatenate(list(self._sampled(text, settings, names)))[:count]

    def evaluations(self, steps: int) -> int:
        """The network's evaluations for a picture, of which classifier-free guidance takes two."""
        sampler = build.without_networks(self.config).sampled_by
        if isinstance(sampler, sampling.Solve):
            steps = sampling.evaluations(sampling.SOLVERS[sampler.solver], steps)
        return 2 * steps if build.needs_null(self.config) else steps

    def _settings(self, count, steps, seed, guidance, batch_size, resolution, noise) -> "_Settings":
        """The settings of drawing so many pictures, checked."""
        resolution = resolution or self.world.resolution
        size = self.world.batch_size
        if batch_size is not None:
            size = streams.whole_number("batch_size", batch_size, 1)
        shape = (count, *build.token_shape(self.config, resolution))
        return _Settings(
            draw_settings.steps(steps, self.config),
            streams.check_seed(seed),
            draw_settings.guidance(guidance, self.config),
            min(size, count),
            resolution,
            None if noise is None else draw_settings.noise(noise, shape),
        )

    def _check_tile(self, tile: int | None) -> None:
        if tile is not None:
            self.world.codec.check_tile(streams.whole_number("tile", tile, 1))

    def _drawn(
        self, text: Text, settings: "_Settings", tile: int | None, names: list[str]
    ) -> np.ndarray:
        filled = names + names[-1:] * settings.batch_size  # up to the end of the last batch
        pictures = []
        for index, tokens in enumerate(self._sampled(text, settings, names)):
            named = filled[index * settings.batch_size :]
            decode = self.world.codec.decode
            pictures.append(decode(tokens, *settings.resolution, tile=tile, names=named))
        return np.concatenate(pictures)[: len(text.pooled)]

    def _sampled(self, text: Text, settings: "_Settings", names: list[str]) -> Iterator[np.ndarray]:
        """Tokens, a batch at a time; the last batch is filled up, so that one shape compiles."""
        count, size, noise = len(text.pooled), settings.batch_size, settings.noise
        _check_text(text, names)
        sample = self._sampler(settings.resolution, settings.steps)
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            part = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), text)
            given = None if noise is None else jnp.asarray(noise[rows])
            seed = np.uint32(settings.seed)
            tokens = sample(self.params, part, jnp.asarray(rows), settings.guidance, seed, given)
            tokens = np.asarray(tokens)
            drawn = tokens[: count - start]
            if finite.bad_rows(drawn):
                finite.check_rows(drawn, names[start:], "its latents are", self._cause(settings))
            yield tokens

    def _cause(self, settings: "_Settings") -> str:
        """Why latents are not finite, as far as can be told, and what to do."""
        if bad := finite.first_bad_array(self.params["network"]):
            return f"the network's weights are not, in '{bad}'; load a checkpoint that is whole"
        return (
            f"the network overflows in dtype={self.config.dtype} with guidance"
            f" {settings.guidance:g}; lower the guidance, or use another checkpoint"
        )

    def _sampler(self, resolution: tuple[int, int], steps: int, each: bool = False) -> Callable:
        """(params, text, numbers, scale, seed, noise or None) -> tokens, compiled.

        With `each`, that of `_one_by_one`.
        """
        if (resolution, steps, each) not in self._samplers:
            objective = build.objective(self.config, resolution=resolution)
            shape = build.token_shape(self.config, resolution)
            null = self.world.null if build.needs_null(self.config) else None

            def sample(params, text, numbers, scale, seed, noise):
                def one_row(number):
                    key = jax.random.fold_in(streams.key(seed), number)
                    key_noise, key_restart = jax.random.split(key)
                    return jax.random.normal(key_noise, shape), key_restart

                drawn, keys = jax.vmap(one_row)(numbers)
                noise = drawn if noise is None else noise
                guidance = jnp.full(numbers.shape, scale, jnp.float32)
                return objective.sample(params, noise, text, null, guidance, keys, steps)

            self._samplers[resolution, steps, each] = jax.jit(
                _one_by_one(sample) if each else sample, out_shardings=_everywhere(self.params)
            )
        return self._samplers[resolution, steps, each]


class _Settings(NamedTuple):
    """Checked, of one call of a pipeline."""

    steps: int
    seed: int
    guidance: float
    batch_size: int  # at most as many as there are pictures
    resolution: tuple[int, int]
    noise: np.ndarray | None


def _check_text(text: Text, names: list[str]) -> None:
    for leaf in text:
        cause = "the text encoder overflows in its type, or its weights are damaged"
        finite.check_rows(leaf, names, "its embedded caption is", cause)


def _one_by_one(sample: Callable) -> Callable:
    """(params, text, numbers, scales, seeds, count) -> tokens: each row as if it were alone.

    Rows after the first `count` are zeros.
    """

    def each(params, text, numbers, scales, seeds, count):
        def one(row):
            alone = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), text)
            number = jax.lax.dynamic_slice_in_dim(numbers, row, 1)
            return sample(params, alone, number, scales[row], seeds[row], None)

        like = jax.eval_shape(one, 0)
        return jax.lax.fori_loop(
            0,
            count,
            lambda row, drawn: jax.lax.dynamic_update_slice_in_dim(drawn, one(row), row, 0),
            jnp.zeros((len(seeds), *like.shape[1:]), like.dtype),
        )

    return each


def _everywhere(params: dict) -> NamedSharding | None:
    """A copy on each device of the mesh that the parameters lie on, if they lie on one."""
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else None


def load(source: str | Path = EMBEDDED, *, mesh: jax.sharding.Mesh | None = None) -> Pipeline:
    """The pipeline of a training run, of a ported folder, or of the bundled teacher.

    Args:
      source: a workdir of `jax_distill.main`, a folder of `jax_distill.port`, or "embedded".
      mesh: where parameters of FLUX's world are placed, those of its text encoders too, and of any
        in a run of several processes; over all devices by default.

    Raises:
      ValueError: there is no such run, or it has no checkpoint yet.
    """
    with streams.default_settings():
        return _load(source, mesh)


def _load(source: str | Path, mesh: jax.sharding.Mesh | None) -> Pipeline:
    if str(source) == EMBEDDED:
        config = trained_config(EMBEDDED).lock()
        return Pipeline(config, lambda: {"network": bundled.load("teacher")[0]})
    check_no_partial(source, "checkpoint")
    workdir, config = paths.path(source), trained_config(source)
    world = worlds.of(config, mesh)
    if world.distributed or processes.joined():
        mesh = mesh or sharding.make_mesh(sharding.ALL_FSDP)

    def read() -> dict:
        if ported_folder.is_ported(workdir):
            like = jax.eval_shape(lambda: build.initial_parameters(config))
            return {"network": load_stored(workdir, "network", like, mesh)}
        params = checkpoint.load_averaged(workdir, mesh)
        if adapters.settings(config) is None:
            return params
        beside = load(config.teacher.checkpoint or EMBEDDED, mesh=mesh)
        place = mesh or sharding.make_mesh(config.mesh)
        teacher = frozen_network(config, beside.taken(), place)
        adapters.check_teacher(config, workdir, teacher)
        return adapters.whole(config, teacher, params)

    return Pipeline(config, read, world)
