"""From PyTorch's weights to a ported folder."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import ported
from jax_distill.files import made_whole, write_json
from jax_distill.interop import diffusers_folder, flux_config, sources
from jax_distill.interop.parts import write_part

DTYPES = {"keep": None, "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_GUIDANCE = {"scm": 4.5}  # of T2I-Distill's students, at two steps
_EMBEDDED_GUIDANCE = 3.5  # of FLUX.1-dev, and of T2I-Distill's MeanFlow students at four steps
_RESOLUTION = (512, 512)
_TEACHER_STEPS = 28


def port(
    source: str | Path,
    output: Path,
    *,
    dtype: str = "keep",
    text_length: int = 256,
    base: str = "",
    objective: str = "",
) -> None:
    """Makes a ported folder (see `ported`), whole or not at all.

    Args:
      source: as `sources.locate` and `sources.read` take it.
      output: must not exist.
      dtype: "keep", "bfloat16" or "float32".
      text_length: of T5's sequences.
      base: for a source that is a transformer alone, the ported folder with the other parts.
      objective: what the network was trained for, a key of `build.OBJECTIVES`; by default
        "flow_matching" (a teacher), "meanflow" if it has the second time embedder, and "scm" for
        T2I-Distill's other students.

    Raises:
      ValueError: the source cannot be read or does not fit together, the output exists, or the disk
        is full.
    """
    described = ported.describe(Path(base)) if base else None
    with made_whole(output) as partial:
        network = described["parts"]["network"] if described else None
        weights = sources.read(sources.locate(source), network)
        if described and weights.folder is not None:
            raise ValueError(
                f"--base: '{source}' has text encoders and an autoencoder of its own; leave it out"
            )
        for part in weights.parts.values():
            part.check()
        _check_space(output, weights, dtype)
        scheduler = described["scheduler"] if described else None
        if weights.folder is not None:
            scheduler = diffusers_folder.scheduler(weights.folder)
            for name in diffusers_folder.TOKENIZERS:
                diffusers_folder.copy(weights.folder / name, partial / name)
        for name, part in weights.parts.items():
            count = write_part(part, partial / name, DTYPES[dtype])
            logging.info("%s: %d tensors, %.2f GB", name, len(part.tensors), count / 1e9)
        text_length = described["text_length"] if described else text_length
        config = _configuration(weights, DTYPES[dtype], text_length, base, objective)
        configuration.save(config, partial)
        description = {
            "source": {"layout": weights.layout},
            "dtype": dtype,
            "parts": {name: part.config for name, part in weights.parts.items()},
            "names": {name: list(part.names) for name, part in weights.parts.items()},
            "scheduler": scheduler,
            "text_length": text_length,
        }
        write_json(partial / ported.DESCRIPTION, description)


def _check_space(output: Path, weights: sources.Source, dtype: str) -> None:
    """Raises ValueError when the disk has no room for the output."""
    kind = DTYPES[dtype]
    needed = sum(
        tensor.nbytes if kind is None else tensor.nbytes // tensor.dtype.itemsize * kind.itemsize
        for part in weights.parts.values()
        for tensor in part.tensors.values()
    )
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise ValueError(
            f"--output: '{output}' needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB"
            " free; make room or choose another"
        )


def _configuration(
    weights: sources.Source,
    dtype: np.dtype | None,
    text_length: int,
    base: str,
    objective: str,
) -> ConfigDict:
    """The configuration of a ported network."""
    part = weights.parts["network"]
    interval = flux_config.has_interval(part.tensors)
    model = flux_config.from_diffusers(part.config, interval_embeds=interval)
    if not objective:
        student = "scm" if weights.layout == "t2i_distill" else "flow_matching"
        objective = "meanflow" if interval else student
    stored = {dtype or tensor.dtype for tensor in part.tensors.values()}
    config = configuration.base()
    with config.unlocked():
        config.name = "flux"
        config.dtype = "bfloat16" if np.dtype(ml_dtypes.bfloat16) in stored else "float32"
        config.world = "flux"
        config.objective.name = objective
        config.teacher.checkpoint = str(Path(base).resolve()) if base else ""
        for key in config.model:
            config.model[key] = getattr(model, key)
        config.data.text_length = text_length
        resolution = configuration.load(Path(base)).data.resolution if base else _RESOLUTION
        config.data.resolution = tuple(resolution)
        config.samples.teacher_steps = _TEACHER_STEPS
        config.evaluation.guidance = _GUIDANCE.get(objective, _EMBEDDED_GUIDANCE)
    return config
