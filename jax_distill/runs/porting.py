"""Port: from PyTorch's weights to a ported folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.interop import diffusers_folder, flux_config, ported_folder
from jax_distill.interop.parts import Part, write_part
from jax_distill.interop.readers import sources
from jax_distill.interop.tensors import CHOICES
from jax_distill.runs import port_settings
from jax_distill.storage import paths
from jax_distill.storage.files import check_no_partial, write_json
from jax_distill.storage.outputs import made_whole

_GUIDANCE = {"scm": 4.5}  # of T2I-Distill's students, at two steps
_EMBEDDED_GUIDANCE = 3.5  # of FLUX.1-dev, and of T2I-Distill's MeanFlow students at four steps
_RESOLUTION = (512, 512)
_TEACHER_STEPS = 28


def port(
    source: str | Path,
    output: Path,
    *,
    dtype: str = "keep",
    base: str = "",
    variant: str = "",
    **flags: Any,
) -> None:
    """Makes a ported folder (see `ported_folder`), whole or not at all.

    Args:
      source: as for `sources.locate` and `sources.read`.
      output: must not exist.
      dtype: of the parameters on disk, a key of `CHOICES`.
      base: for a source that is a transformer alone, the ported folder with the other parts.
      variant: of the weights in a folder, such as "fp16".
      flags: facts that the source does not state, fields of `port_settings.Flags`.

    Raises:
      ValueError: the source cannot be read or does not fit together, it does not say enough, the
        output exists, or the disk is full.
    """
    facts = port_settings.Flags(**flags)
    check_no_partial(base, "--base")
    described = ported_folder.describe(paths.path(base)) if base else None
    with made_whole(output) as partial:
        network = described["parts"]["network"] if described else None
        path = sources.locate(source)
        weights = sources.read(path, network, dtype=CHOICES[dtype], variant=variant)
        if described and weights.folder is not None:
            raise ValueError(
                f"--base: '{source}' has text encoders and an autoencoder of its own; leave it out"
            )
        for part in weights.parts.values():
            part.check()
        scheduler = None
        if weights.folder is not None:
            scheduler = diffusers_folder.scheduler(weights.folder)
        settings = port_settings.settle(weights, facts, described, scheduler)
        part = weights.parts["network"]
        weights.parts["network"] = part._replace(config={**part.config, **settings.factors})
        for note in (*weights.notes, *(f"assumed: {words}" for words in settings.assumed)):
            logging.info("%s", note)
        if _rounds_embedders(weights.parts["network"], CHOICES[dtype], settings.factors):
            logging.warning(
                "--dtype=%s rounds embedders of t itself, which lose more to it than those of"
                " 1000 t; --dtype=keep leaves them as they are",
                dtype,
            )
        config = _configuration(weights, CHOICES[dtype], settings, base)
        _check_space(output, partial.parent, weights, dtype)
        if weights.folder is not None:
            for name in diffusers_folder.TOKENIZERS:
                diffusers_folder.copy_tokenizer(weights.folder / name, partial / name)
        for name, part in weights.parts.items():
            count = write_part(part, partial / name, CHOICES[dtype])
            logging.info("%s: %d tensors, %.2f GB", name, len(part.tensors), count / 1e9)
        configuration.save(config, partial)
        description = {
            "source": {"layout": weights.layout},
            "dtype": dtype,
            "parts": {name: part.config for name, part in weights.parts.items()},
            "names": {name: list(part.names) for name, part in weights.parts.items()},
            "scheduler": settings.scheduler,
            "text_length": settings.text_length,
            "assumed": settings.assumed,
        }
        write_json(partial / ported_folder.DESCRIPTION, description)


def _rounds_embedders(network: Part, dtype: np.dtype | None, factors: Mapping[str, float]) -> bool:
    """Whether a rescaled network's embedders are stored in a narrower type than the source's."""
    if dtype is None or factors["time_scale"] == flux_config.TIME_SCALE:
        return False
    return any(
        tensor.dtype.itemsize > dtype.itemsize
        for name, tensor in network.tensors.items()
        if name.startswith(("time_text_embed.", "timestep_embedder2."))
    )


def _check_space(output: Path, disk: Path, weights: sources.Source, dtype: str) -> None:
    """Raises ValueError when the disk has no room for the output."""
    kind = CHOICES[dtype]
    needed = sum(
        tensor.nbytes if kind is None else tensor.nbytes // tensor.dtype.itemsize * kind.itemsize
        for part in weights.parts.values()
        for tensor in part.tensors.values()
    )
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise ValueError(
            f"--output: '{output}' needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB"
            " free; make room or choose another"
        )


def _configuration(
    weights: sources.Source,
    dtype: np.dtype | None,
    settings: port_settings.Settings,
    base: str,
) -> ConfigDict:
    """The configuration of a ported network."""
    part = weights.parts["network"]
    interval = flux_config.has_interval(part.tensors)
    model = flux_config.from_diffusers(part.config, interval_embeds=interval)
    stored = {dtype or tensor.dtype for tensor in part.tensors.values()}
    config = configuration.base()
    with config.unlocked():
        config.name = "flux"
        config.dtype = "bfloat16" if np.dtype(ml_dtypes.bfloat16) in stored else "float32"
        config.world = "flux"
        config.objective = settings.objective
        config.teacher.checkpoint = str(paths.absolute(base)) if base else ""
        for key in config.model:
            config.model[key] = getattr(model, key)
        config.teacher.guidance = settings.guidance
        config.data.text_length = settings.text_length
        resolution = configuration.load(paths.path(base)).data.resolution if base else _RESOLUTION
        config.data.resolution = tuple(resolution)
        config.samples.teacher_steps = _TEACHER_STEPS
        config.evaluation.guidance = _GUIDANCE.get(config.objective.name, _EMBEDDED_GUIDANCE)
    return config
