"""What `port` can read, told apart by what is there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_distill.interop import (
    bfl_keys,
    diffusers_folder,
    flux_config,
    safetensors_files,
    torch_files,
)
from jax_distill.interop.key_table import KeyTable
from jax_distill.interop.parts import Part
from jax_distill.interop.transformer_keys import TRANSFORMER_KEYS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    diffusers_folder.INDEX,
    *(f"{folder}/*" for folder in diffusers_folder.SUBFOLDERS.values()),
    *(f"{folder}/*" for folder in diffusers_folder.TOKENIZERS),
    f"{diffusers_folder.SCHEDULER}/*",
]

# T2I-Distill's sCM students may hold the head of the loss's weight, which only training uses.
_STUDENT_KEYS = KeyTable(
    TRANSFORMER_KEYS.rules, ignored=("logvar_linear.weight", "logvar_linear.bias")
)
# Its networks embed t and the guidance scale w as they are.
_STUDENT_FACTORS = {"time_scale": 1.0, "guidance_factor": 1.0}


class Source(NamedTuple):
    """Weights that can be ported.

    Attributes:
      layout: "diffusers", "t2i_distill" or "bfl".
      parts: under their names in `ported.PARTS`; "network" alone, or all.
      folder: of the pipeline that has all parts; None where there is the network alone.
    """

    layout: str
    parts: dict[str, Part]
    folder: Path | None = None


def locate(source: str | Path) -> Path:
    """The path that --source names: a file, a folder, or a repository of the hub, downloaded.

    Raises:
      ValueError: it is none of them, or the hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(source)):
        raise ValueError(f"--source: there is no file or folder '{source}'")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"--source: there is no folder '{source}', and to download it from the hub needs"
            " huggingface_hub; pip install 'jax-distill[flux]'"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # of the hub, of the network, and of HTTP
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"--source: there is no folder '{source}', and it cannot be had from the hub"
            f" ({type(error).__name__}: {reason}); download it and give the folder"
        ) from None


def read(path: Path, base: Mapping[str, Any] | None = None) -> Source:
    """The parts of a source; headers are read, no tensors.

    Args:
      path: a diffusers folder, of a pipeline or of its transformer; a file of T2I-Distill; a
        safetensors file with BFL's or diffusers' names.
      base: diffusers' config of a network like it, for what a single file does not say.

    Raises:
      ValueError: it cannot be read, or is none of these.
    """
    if path.is_dir():
        if (path / diffusers_folder.INDEX).exists():
            return Source("diffusers", diffusers_folder.parts(path), path)
        if (path / "config.json").exists():
            return Source("diffusers", {"network": diffusers_folder.transformer(path)})
        raise ValueError(
            f"'{path}' is no diffusers folder: it has no {diffusers_folder.INDEX} (of a pipeline)"
            " and no config.json (of a transformer)"
        )
    axes = base["axes_dims_rope"] if base else None
    table = TRANSFORMER_KEYS
    if path.suffix == ".safetensors":
        layout, tensors = "diffusers", safetensors_files.read_file(path)
        metadata = safetensors_files.read_metadata(path)
        factors = {
            name: float(metadata.get(name, stock)) for name, stock in flux_config.FACTORS.items()
        }
        if bfl_keys.is_bfl(tensors):
            layout, tensors = "bfl", bfl_keys.to_diffusers(str(path), tensors)
    else:
        layout, tensors = "t2i_distill", torch_files.read_file(path)
        table, factors = _STUDENT_KEYS, _STUDENT_FACTORS
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = flux_config.from_shapes(str(path), shapes, factors=factors, axes_dims_rope=axes)
    part = diffusers_folder.transformer_part(str(path), config, tensors, table)
    return Source(layout, {"network": part})
