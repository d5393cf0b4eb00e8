"""What `export` can write: the layouts of other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_distill.files import write_json
from jax_distill.interop import (
    diffusers_folder,
    flux_config,
    lora_weights,
    model_card,
    safetensors_files,
    torch_files,
)
from jax_distill.interop.autoencoder_keys import AUTOENCODER_KEYS
from jax_distill.interop.clip_keys import clip_keys
from jax_distill.interop.parts import tensors_of
from jax_distill.interop.t5_keys import t5_keys
from jax_distill.interop.tensors import Tensors
from jax_distill.models.mmdit import MMDiTConfig

LAYOUTS = ("diffusers", "t2i_distill", "safetensors", "lora")
_LIBRARIES = {
    "transformer": ("diffusers", flux_config.CLASS),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "image_encoder": (None, None),
    "feature_extractor": (None, None),
}


def write_transformer(
    folder: Path,
    layout: str,
    config: MMDiTConfig,
    objective: str,
    tensors: Tensors,
    shard_bytes: int,
) -> None:
    """Writes the transformer as `layout` has it, its config in `transformer/` in any case.

    Raises:
      ValueError: the layout has no place for the network's time scale.
    """
    inner = folder / diffusers_folder.SUBFOLDERS["network"]
    write_json(inner / "config.json", flux_config.to_diffusers(config, objective))
    if layout == "diffusers":
        stem = diffusers_folder.DIFFUSERS_STEM
        safetensors_files.write_folder(inner, stem, tensors, shard_bytes)
    elif layout == "t2i_distill":
        if config.time_scale != 1:
            raise ValueError(
                f"--format=t2i_distill: its networks embed t and this one {config.time_scale:g} t;"
                " use --format=diffusers"
            )
        if config.guidance_embeds and config.guidance_factor != 1:
            raise ValueError(
                "--format=t2i_distill: its networks embed the guidance scale w and this one"
                f" {config.guidance_factor:g} w; use --format=diffusers"
            )
        torch_files.write_file(folder / "model.pt", tensors)
    else:
        safetensors_files.write_file(
            folder / "model.safetensors", tensors, _own_values(config, objective)
        )


def write_adapters(
    folder: Path, config: MMDiTConfig, objective: str, tree: Mapping[str, Any], rank: int
) -> None:
    """Writes adapters, the embedders that they come with, and the configs of both.

    Args:
      folder: of the export.
      config: of the student.
      objective: that it was trained for.
      tree: nested `StoredLeaf`s, or `models.lora.Adapted` of them.
      rank: of the adapters.
    """
    inner = folder / diffusers_folder.SUBFOLDERS["network"]
    write_json(inner / "config.json", flux_config.to_diffusers(config, objective))
    tensors = lora_weights.adapter_tensors(tree)
    safetensors_files.write_file(folder / lora_weights.WEIGHTS, tensors)
    write_json(folder / lora_weights.PEFT_CONFIG, lora_weights.peft_config(tensors, rank))
    embedders = lora_weights.embedder_tensors(tree)
    safetensors_files.write_file(
        folder / lora_weights.EMBEDDERS, embedders, _own_values(config, objective)
    )


def _own_values(config: MMDiTConfig, objective: str) -> dict[str, str]:
    """What names and shapes do not say of a network, for the header of a file."""
    return {name: str(x) for name, x in flux_config.own_values(config, objective).items()}


def write_autoencoder(folder: Path, config: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Writes `vae/`.

    Args:
      folder: of the pipeline.
      config: diffusers'.
      tree: nested `StoredLeaf`s.
    """
    inner = folder / diffusers_folder.SUBFOLDERS["autoencoder"]
    write_json(inner / "config.json", config)
    tensors = tensors_of(tree, AUTOENCODER_KEYS)
    safetensors_files.write_folder(inner, diffusers_folder.DIFFUSERS_STEM, tensors)


def write_text_encoder(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    tree: Mapping[str, Any],
    names: Sequence[str],
) -> None:
    """Writes `text_encoder/` or `text_encoder_2/`.

    Args:
      folder: of the pipeline.
      name: "clip" or "t5".
      config: transformers'.
      tree: nested `StoredLeaf`s.
      names: as `ported.describe` has them.
    """
    inner = folder / diffusers_folder.SUBFOLDERS[name]
    write_json(inner / "config.json", config)
    table = {"clip": clip_keys, "t5": t5_keys}[name](names)
    tensors = tensors_of(tree, table)
    safetensors_files.write_folder(inner, diffusers_folder.TRANSFORMERS_STEM, tensors)


def write_scheduler(folder: Path, card: model_card.Card) -> None:
    """Writes `scheduler/`."""
    config = model_card.scheduler_config(card)
    write_json(folder / diffusers_folder.SCHEDULER / "scheduler_config.json", config)


def write_index(folder: Path, scheduler: str) -> None:
    """Writes `model_index.json`; what is not there is null, as for prompts that come embedded."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    index["scheduler"] = ["diffusers", scheduler]
    for name, library in _LIBRARIES.items():
        index[name] = list(library) if (folder / name).is_dir() else [None, None]
    write_json(folder / diffusers_folder.INDEX, index)
