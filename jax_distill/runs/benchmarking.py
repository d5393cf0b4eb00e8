"""The field's benchmarks for a trained network: draws their pictures, and judges what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jax_distill import pipeline, worlds
from jax_distill.assembly import draw_settings
from jax_distill.devices import processes, sharding
from jax_distill.evaluation.benchmarks import drawn, generation
from jax_distill.evaluation.benchmarks.drawn import Asked
from jax_distill.runs.stored_network import weights_of
from jax_distill.storage import paths
from jax_distill.storage.files import FileError

BUNDLED = "bundled"


class Asking(NamedTuple):
    """How pictures are to be drawn, as it was asked for; None is the network's own."""

    pictures: int
    steps: int
    seed: int
    guidance: float | None
    height: int | None
    width: int | None
    tile: int | None


def read_asked(benchmark: str, name: str) -> Asked:
    """The prompts of a benchmark, of a file or the bundled ones.

    Raises:
      ValueError: there is no such file, or it has no such prompts.
    """
    path = drawn.bundled(benchmark) if name == BUNDLED else paths.path(name)
    try:
        return drawn.read_asked(benchmark, path)
    except FileNotFoundError:
        raise ValueError(f"--prompts_file: '{path}' is missing") from None
    except FileError as error:
        raise ValueError(f"--prompts_file: {error}") from None


def draw(source: str, asked: Asked, folder: Path, asking: Asking) -> int:
    """Draws the pictures that a folder lacks, by all processes that have joined.

    Args:
      source: a workdir, a ported folder, or "embedded".
      asked: the prompts.
      folder: of the pictures.
      asking: how.

    Returns:
      The number of pictures that are there then.

    Raises:
      ValueError: there is no such network, or as `generation.draw`.
    """
    pipe = pipeline.load(source, mesh=sharding.local_mesh())
    draw_settings.guidance(asking.guidance, pipe.config)
    settings = generation.Settings(
        asking.pictures,
        draw_settings.steps(asking.steps, pipe.config),
        asking.seed,
        asking.guidance,
        draw_settings.resolution(asking.height, asking.width, pipe.world.resolution),
        asking.tile,
    )
    facts = {"world": worlds.name(pipe.config), "network": weights_of(source)}
    if (text := pipe.world.stored_text()) is not None:
        facts["encoders"] = text.encoders
    return generation.draw(pipe, asked, folder, settings, facts, processes.share()).there
