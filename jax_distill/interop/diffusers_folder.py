"""The layout of diffusers' FLUX folders."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jax_distill.interop import flux_config, unreadable, variants
from jax_distill.interop.autoencoder_keys import AUTOENCODER_KEYS
from jax_distill.interop.clip_keys import clip_keys
from jax_distill.interop.key_table import KeyTable
from jax_distill.interop.parts import Part
from jax_distill.interop.safetensors_files import read_file, read_folder, read_metadata
from jax_distill.interop.t5_keys import EMBEDDING_NAMES, t5_keys
from jax_distill.interop.tensors import Tensors
from jax_distill.interop.transformer_keys import TRANSFORMER_KEYS
from jax_distill.models import clip, mmdit, t5
from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig
from jax_distill.models.binding import parameters

INDEX = "model_index.json"
SUBFOLDERS = {
    "network": "transformer",
    "autoencoder": "vae",
    "clip": "text_encoder",
    "t5": "text_encoder_2",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULER = "scheduler"
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
OWN_EMBEDDERS = "own_embedders.safetensors"  # of a network that was refitted for stock diffusers
FLOW_MAP_CLASS = "FlowMapTransformer2DModel"  # of exported networks with two time embedders


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file; raises ValueError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing; give a whole diffusers folder of FLUX") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); download it again") from None


def _config(folder: Path) -> dict[str, Any]:
    """A model's config.json; raises ValueError when its weights are quantised."""
    values = read_json(folder / "config.json")
    unreadable.check_config(folder / "config.json", values)
    return values


def parts(folder: Path, variant: str = variants.PLAIN) -> dict[str, Part]:
    """The four parts of a pipeline's folder, under their names in `ported.PARTS`.

    Args:
      folder: of the pipeline.
      variant: of the weights, such as "fp16"; parts without it have their plain ones read.

    Raises:
      ValueError: a part is missing, cut short, of another class, its tensors do not fit, or no part
        has the variant.
    """
    readers: dict[str, Callable[[Path, str], Part]] = {
        "network": transformer,
        "autoencoder": autoencoder,
        "clip": clip_text,
        "t5": t5_encoder,
    }
    for subfolder in SUBFOLDERS.values():
        if not (folder / subfolder).is_dir():
            raise ValueError(
                f"'{folder}' has no {subfolder}/; give a whole diffusers folder of FLUX"
            )
    check_variant(folder, [folder / name for name in SUBFOLDERS.values()], variant)
    return {name: read(folder / SUBFOLDERS[name], variant) for name, read in readers.items()}


def check_variant(where: Path, folders: Sequence[Path], variant: str) -> None:
    """Raises ValueError when none of the folders has weights of a variant."""
    found = {
        key
        for folder in folders
        for stem in (DIFFUSERS_STEM, TRANSFORMERS_STEM)
        for key in variants.files([path.name for path in folder.iterdir()], stem)
    }
    if variant and variant not in found:
        raise ValueError(f"--variant: '{where}' has no weights of variant {variant}; leave it out")


def transformer(folder: Path, variant: str = variants.PLAIN) -> Part:
    """FLUX's transformer, or a student's with the second time embedder, embedders as they were."""
    values = _config(folder)
    tensors = read_folder(folder, DIFFUSERS_STEM, variant)
    if values.get("_class_name") == FLOW_MAP_CLASS:
        values["_class_name"] = flux_config.CLASS
    own = folder / OWN_EMBEDDERS
    if own.exists():
        tensors |= read_file(own)
        metadata = read_metadata(own)
        values |= {name: metadata[name] for name in flux_config.OWN_KEYS if name in metadata}
    return transformer_part(str(folder), values, tensors)


def transformer_part(
    where: str, config: dict[str, Any], tensors: Tensors, table: KeyTable = TRANSFORMER_KEYS
) -> Part:
    """The part that a transformer's tensors under diffusers' names make.

    Args:
      where: for messages.
      config: diffusers'.
      tensors: of the transformer.
      table: `TRANSFORMER_KEYS`, or one that ignores some names.
    """
    interval = flux_config.has_interval(tensors)
    ours = flux_config.from_diffusers(config, interval_embeds=interval)
    return Part(where, config, tensors, table, _shapes(ours))


@functools.cache
def _shapes(config: Any) -> dict[str, Any]:
    """The parameters' shapes of the network that has this config."""
    match config:
        case mmdit.MMDiTConfig():
            return jax.eval_shape(lambda: mmdit.initial_parameters(config, nnx.Rngs(0)))
        case AutoencoderConfig():
            return parameters(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
        case clip.ClipConfig():
            return jax.eval_shape(lambda: clip.initial_parameters(config, nnx.Rngs(0)))
        case t5.T5Config():
            return jax.eval_shape(lambda: t5.initial_parameters(config, nnx.Rngs(0)))


def autoencoder(folder: Path, variant: str = variants.PLAIN) -> Part:
    values = _config(folder)
    config = AutoencoderConfig.from_dict(values)
    tensors = read_folder(folder, DIFFUSERS_STEM, variant)
    return Part(str(folder), values, tensors, AUTOENCODER_KEYS, _shapes(config))


def clip_text(folder: Path, variant: str = variants.PLAIN) -> Part:
    values = _config(folder)
    config = clip.ClipConfig.from_dict(values)
    tensors = read_folder(folder, TRANSFORMERS_STEM, variant)
    return Part(str(folder), values, tensors, clip_keys(tensors), _shapes(config), (min(tensors),))


def t5_encoder(folder: Path, variant: str = variants.PLAIN) -> Part:
    values = _config(folder)
    config = t5.T5Config.from_dict(values)
    tensors = read_folder(folder, TRANSFORMERS_STEM, variant)
    names = tuple(name for name in EMBEDDING_NAMES if name in tensors)
    return Part(str(folder), values, tensors, t5_keys(tensors), _shapes(config), names)


def scheduler(folder: Path) -> dict[str, Any]:
    """The config of a pipeline's scheduler."""
    return read_json(folder / SCHEDULER / "scheduler_config.json")


def copy(source: Path, target: Path) -> None:
    """Copies a folder of small files, such as a tokenizer's.

    Raises:
      ValueError: it is missing.
    """
    if not source.is_dir():
        raise ValueError(f"'{source}' is missing; give a whole diffusers folder of FLUX")
    shutil.copytree(source, target)
