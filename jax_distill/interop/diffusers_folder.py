"""The layout of diffusers' FLUX folders."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from jax_distill.interop import flux_config, scheduler_config
from jax_distill.interop.keys.autoencoder import AUTOENCODER_KEYS
from jax_distill.interop.keys.clip import clip_keys
from jax_distill.interop.keys.t5 import EMBEDDING_NAMES, t5_keys
from jax_distill.interop.keys.table import KeyTable
from jax_distill.interop.keys.transformer import TRANSFORMER_KEYS
from jax_distill.interop.parts import Part
from jax_distill.interop.readers import unreadable, variants
from jax_distill.interop.readers.safetensors_files import read_file, read_folder, read_metadata
from jax_distill.interop.tensors import Tensors
from jax_distill.models import clip, mmdit, t5
from jax_distill.models.autoencoder import Autoencoder, AutoencoderConfig
from jax_distill.models.binding import parameters
from jax_distill.storage.files import check_regular, read_json

INDEX = "model_index.json"
SUBFOLDERS = {
    "network": "transformer",
    "autoencoder": "vae",
    "clip": "text_encoder",
    "t5": "text_encoder_2",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model"),
)
_TOKENIZER_BYTES = 64 << 20  # of a file; T5's largest has 2 MB
SCHEDULER = "scheduler"
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
OWN_EMBEDDERS = "own_embedders.safetensors"  # of a network that was refitted for stock diffusers
FLOW_MAP_CLASS = "FlowMapTransformer2DModel"  # of exported networks with two time embedders


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON file of the folder; raises ValueError when it is missing or damaged."""
    try:
        return read_json(path, fix="download it again")
    except FileNotFoundError:
        raise ValueError(f"'{path}' is missing; give a whole diffusers folder of FLUX") from None


def _config(folder: Path) -> dict[str, Any]:
    """A model's config.json; raises ValueError when its weights are quantised."""
    values = read_config(folder / "config.json")
    unreadable.check_config(folder / "config.json", values)
    return values


def parts(folder: Path, variant: str = variants.PLAIN) -> dict[str, Part]:
    """The four parts of a pipeline's folder, under their names in `ported_folder.PARTS`.

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
    try:
        ours = flux_config.from_diffusers(config, interval_embeds=interval)
    except ValueError as error:
        raise ValueError(f"'{where}': {error}") from None
    return Part(where, config, tensors, table, shapes(ours))


@functools.cache
def shapes(config: Any) -> dict[str, Any]:
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
    values, tensors, like = _read(folder, AutoencoderConfig.from_dict, DIFFUSERS_STEM, variant)
    return Part(str(folder), values, tensors, AUTOENCODER_KEYS, like)


def clip_text(folder: Path, variant: str = variants.PLAIN) -> Part:
    values, tensors, like = _read(folder, clip.ClipConfig.from_dict, TRANSFORMERS_STEM, variant)
    if not tensors:
        raise ValueError(f"'{folder}' has no tensors; download it again")
    return Part(str(folder), values, tensors, clip_keys(tensors), like, (min(tensors),))


def t5_encoder(folder: Path, variant: str = variants.PLAIN) -> Part:
    values, tensors, like = _read(folder, t5.T5Config.from_dict, TRANSFORMERS_STEM, variant)
    names = tuple(name for name in EMBEDDING_NAMES if name in tensors)
    return Part(str(folder), values, tensors, t5_keys(tensors), like, names)


def _read(
    folder: Path, understand: Callable[[dict[str, Any]], Any], stem: str, variant: str
) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """A model's config, its tensors, and the shapes of our parameters.

    Raises:
      ValueError: naming the file.
    """
    values = _config(folder)
    try:
        like = shapes(understand(values))
    except ValueError as error:
        raise ValueError(f"'{folder / 'config.json'}': {error}") from None
    return values, read_folder(folder, stem, variant), like


def scheduler(folder: Path) -> dict[str, Any]:
    """The config of a pipeline's scheduler; raises ValueError when it is missing or damaged."""
    path = folder / SCHEDULER / "scheduler_config.json"
    values = read_config(path)
    scheduler_config.check(values, where=f"'{path}'", fix="download it again")
    return values


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files that a tokenizer is read from, and no others of its folder.

    Links are followed to the folder's own pipeline and to the blobs of the hub's cache that it
    lies in, nowhere else: a link to some other file would carry that file along.

    Args:
      source: a folder in that of a pipeline, or in a ported one.
      target: to make.

    Raises:
      ValueError: it is missing, or a file leads elsewhere or is longer than any tokenizer's.
    """
    if not source.is_dir():
        raise ValueError(f"'{source}' is missing; give a whole diffusers folder of FLUX")
    pipeline = source.parent.resolve()
    allowed = [pipeline]
    if pipeline.parent.name == "snapshots":  # models--owner--name/snapshots/revision, ../blobs
        allowed.append(pipeline.parent.parent / "blobs")
    target.mkdir()
    for name in TOKENIZER_FILES:
        path = source / name
        if not path.exists() and not path.is_symlink():
            continue
        found = path.resolve()
        if not any(found.is_relative_to(folder) for folder in allowed):
            raise ValueError(
                f"'{path}' is a link to '{found}', outside of '{pipeline}'; put the file itself"
                " there"
            )
        try:
            check_regular(found)
            content = found.open("rb").read(_TOKENIZER_BYTES + 1)
        except FileNotFoundError:
            raise ValueError(f"'{path}' leads to no file; download it again") from None
        if len(content) > _TOKENIZER_BYTES:
            raise ValueError(f"'{path}' is longer than any tokenizer's file; download it again")
        (target / name).write_bytes(content)
    if others := sum(path.name not in TOKENIZER_FILES for path in source.iterdir()):
        logging.info(
            "'%s': %d other files, which no tokenizer is read from, left out", source, others
        )
