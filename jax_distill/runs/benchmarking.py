"""The field's benchmarks for a trained network: draws their pictures, and judges what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_distill import pipeline, worlds
from jax_distill.assembly import draw_settings
from jax_distill.devices import processes, sharding
from jax_distill.evaluation import report
from jax_distill.evaluation.benchmarks import (
    clip,
    detectors,
    drawn,
    findings,
    generation,
    judging,
    runners,
)
from jax_distill.evaluation.benchmarks.drawn import Asked, Drawn
from jax_distill.runs.stored_network import weights_of
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, write_json

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

    def check() -> None:
        """Captions are embedded before the network is read, which a run may have saved again."""
        if weights_of(source) != facts["network"]:
            raise FileError(
                f"--checkpoint: '{source}' was saved again meanwhile; run the same command once its"
                " run has ended"
            )

    return generation.draw(pipe, asked, folder, settings, facts, processes.share(), check).there


class Findings(NamedTuple):
    """What judges pictures: files, or networks that make them; folders of networks are on a disk.

    Attributes:
      detections: one for each folder; none: those in the folders.
      answers: likewise.
      detector: of objects.
      clip: of colours, and for CLIP scores.
      real: folder of real pictures for CMMD, which needs `clip`.
    """

    detections: tuple[Path, ...] = ()
    answers: tuple[Path, ...] = ()
    detector: Path | None = None
    clip: Path | None = None
    real: Path | None = None


def judge(folders: Sequence[Path], given: Findings) -> dict[str, Any]:
    """Scores of drawn folders, as `judging.layout` has them.

    Raises:
      ValueError: folders or findings are missing, or do not fit together.
    """
    found = [drawn.read_drawn(folder) for folder in folders]
    benchmark = found[0].asked.benchmark
    files = _files(found, given)
    seeing = None if given.clip is None else clip.load(given.clip)
    if given.detector is not None:
        if benchmark != "geneval":
            raise FileError(f"--detector: pictures of {benchmark} are not judged by detections")
        detector = detectors.load(given.detector)
        networks = {"detector": runners.digest(given.detector)}
        if given.clip is not None:
            networks["clip"] = runners.digest(given.clip)
        files = [findings.detect(each, detector, seeing, networks) for each in found]
    real = None if given.real is None else findings.embed_folder(given.real, seeing)
    judged = []
    for each, file in zip(found, files):
        embedded = None if seeing is None else findings.embed(each, seeing)
        judged.append(judging.judge(each, file, embedded, real))
    return judging.layout(judged)


def _files(found: Sequence[Drawn], given: Findings) -> list[Path]:
    """The file of findings for each folder."""
    kind = "answers" if found[0].asked.benchmark == "dpg" else "detections"
    other = "detections" if kind == "answers" else "answers"
    if getattr(given, other):
        raise FileError(
            f"--{other}: pictures of {found[0].asked.benchmark} are not judged by {other}"
        )
    files = getattr(given, kind)
    if files and given.detector is not None:
        raise FileError("--detections, --detector: give one of them")
    if files and len(files) != len(found):
        raise FileError(
            f"--{kind}: {len(files)} files for {len(found)} folders; give one for each, in order"
        )
    name = findings.ANSWERS if kind == "answers" else findings.DETECTIONS
    return list(files) or [each.folder / name for each in found]


def write(path: Path, layout: dict[str, Any]) -> list[str]:
    """Writes results.json, and the report of the workdir that it lies in, if it does.

    Returns:
      Lines that say what was written.
    """
    write_json(path, layout)
    if not (path.parent / "config.json").exists():
        return [f"wrote {path}"]
    return [f"wrote {path}", f"report: {report.write_report(path.parent)}"]
