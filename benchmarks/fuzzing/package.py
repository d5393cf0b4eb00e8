"""The calls of the package that are fuzzed, each reading one input's folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import made_records
import numpy as np
from ml_collections import ConfigDict

import jax_distill
from jax_distill import config, prepare
from jax_distill.assembly import build
from jax_distill.assembly.resolution import validate
from jax_distill.data import pictures, records
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.data.sources.opening import open_source
from jax_distill.evaluation.metrics import Metrics, read_metrics
from jax_distill.evaluation.report import write_report
from jax_distill.evaluation.results import Results, read_results
from jax_distill.interop.readers import single_file, sources
from jax_distill.interop.tensors import Tensor, check_finite
from jax_distill.runs import checks, exporting, porting
from jax_distill.worlds.flux.tokenizers import FluxTokenizer, TokenIds

ROOT = Path(jax_distill.__file__).parents[1]
"""Of the tree whose package is fuzzed; its tests make the small networks."""
AXES = (4, 6, 6)
"""`axes_dims_rope` of those networks, which a single file does not say."""
CAPTIONS = ("a red circle and a crimson disc", "", "two Ω, 3!")
T5_LENGTH = 24


class Found(NamedTuple):
    path: Path
    caption: str


class Records(NamedTuple):
    found: list[records.LatentRecord]
    null: Any


def read_records(folder: Path) -> Records:
    source = records.LatentRecords(folder)
    found = [source[index] for index in range(min(len(source), 64))]
    return Records(found, source.null if source.has_null else None)


def read_config(workdir: Path) -> ConfigDict:
    """A run's configuration, checked as far as that needs nothing else than itself."""
    settings = config.load(workdir)
    validate(settings)
    if settings.objective.name not in {"autoencoder", *build.OBJECTIVES}:
        raise config.ConfigError(f"objective.name: {settings.objective.name!r} is unknown")
    checks.check_objective(settings)
    return settings


def read_scores(folder: Path) -> Results | None:
    results = read_results(folder / "results.json")
    if results is not None:
        results.rows()
    return results


def report(folder: Path) -> Path:
    return write_report(folder)


def read_log(folder: Path) -> Metrics | None:
    metrics = read_metrics(folder / "metrics.jsonl")
    if metrics is not None:
        for name in metrics.names():
            metrics.series(name)
        _ = metrics.last_step, metrics.seconds
    return metrics


def find_pictures(folder: Path) -> list[Found]:
    source = checked(PictureFolder(folder), (1, 1))
    examples = [source[index] for index in range(len(source))]
    return [Found(folder / re.sub(r"#\d+$", "", x.key), x.caption) for x in examples]


def read_packed(path: Path) -> list[tuple[str, bytes]]:
    """The first examples of a source in one file."""
    source = open_source([str(path)])
    examples = (source[index] for index in range(min(len(source), 64)))
    return [(example.caption, example.picture.content) for example in examples]


def read_picture(path: Path, height: int, width: int) -> np.ndarray:
    return pictures.read(path, height, width)


def read_captions(path: Path) -> list[str]:
    return prepare.read_captions(path)[1]


class Weights(NamedTuple):
    told: dict[str, Any]
    parts: dict[str, dict[str, np.ndarray]]
    configs: dict[str, dict[str, Any]]


def read_weights(path: Path) -> Weights:
    """All tensors of a source, checked and read as `port` does."""
    source = sources.read(path, {"axes_dims_rope": list(AXES)} if path.is_file() else None)
    for part in source.parts.values():
        part.check()
    arrays = {}
    for name, part in source.parts.items():
        arrays[name] = {}
        for place in part.table.places(part.like):
            array = part.tensors[place.name].read()
            check_finite(part.where, place.name, array)
            arrays[name][place.name] = array
    configs = {name: dict(part.config) for name, part in source.parts.items()}
    return Weights(dict(source.told), arrays, configs)


def under_diffusers_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a whole file as `read_weights` names them."""

    def reader(array: np.ndarray) -> Callable[..., np.ndarray]:
        return lambda *rows: array[slice(*rows)] if rows else array

    tensors = {k: Tensor(x.shape, x.dtype, reader(x)) for k, x in arrays.items()}
    found = single_file.transformer("reference", tensors).tensors
    return {name: tensor.read() for name, tensor in found.items()}


def port(source: Path, output: Path, **flags: Any) -> None:
    porting.port(source, output, **flags)


def export(source: Path, output: Path, **flags: Any) -> None:
    exporting.export(str(source), output, **flags)


def tokenize(folder: Path) -> TokenIds:
    return FluxTokenizer.load(folder, T5_LENGTH).encode(CAPTIONS)


def save_config(settings: ConfigDict, folder: Path) -> None:
    """Saves a configuration as a run does, its network's settings completed."""
    model = {name: x for name, x in settings.model.to_dict().items() if x is not None}
    with settings.unlocked():
        settings.model = config.base().model.to_dict() | model
    config.save(settings, folder)


def default_settings() -> dict[str, Any]:
    return config.base().to_dict()


write_records = made_records.write


def objective_settings(name: str, **settings: Any) -> dict[str, Any]:
    return build.objective_settings(name, **settings)


def is_ours(path: str) -> bool:
    """Whether a frame's file is one of the package, or of its calls here."""
    return path.startswith(str(ROOT / "jax_distill")) or path == __file__
