"""Writes networks in the layouts of other programs, for `export`."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_distill.interop import diffusers_folder, flux_config, lora_weights
from jax_distill.interop.keys.autoencoder import AUTOENCODER_KEYS
from jax_distill.interop.keys.clip import clip_keys
from jax_distill.interop.keys.t5 import t5_keys
from jax_distill.interop.keys.table import KeyTable
from jax_distill.interop.parts import StoredPart, tensors_of
from jax_distill.interop.readers import safetensors_files, torch_files
from jax_distill.interop.tensors import Tensor, Tensors
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.storage.files import write_json

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "diffusers": ("autoencoder", "clip", "t5"),
    "t2i_distill": ("autoencoder",),
    "safetensors": ("autoencoder",),
    "lora": (),
}
"""All layouts, with the other parts of a pipeline that each holds beside the network."""

_TABLES: Mapping[str, Callable[[Sequence[str]], KeyTable]] = {
    "autoencoder": lambda _: AUTOENCODER_KEYS,
    "clip": clip_keys,
    "t5": t5_keys,
}
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
_FLOW_MAP = Path(__file__).with_name("flow_map")  # what networks with two time embedders come with
_FLOW_MAP_TRANSFORMER = ["flow_map_transformer", diffusers_folder.FLOW_MAP_CLASS]
_FLOW_MAP_PIPELINE = ["flow_map_pipeline", "FlowMapPipeline"]
_EMBEDDERS = (
    "time_text_embed.timestep_embedder.",
    "time_text_embed.guidance_embedder.",
    "timestep_embedder2.",
)


def factors(layout: str, config: MMDiTConfig, scale: float | None) -> dict[str, float]:
    """The factors of embedders in a layout: those that its readers fix, or the network's own.

    Args:
      layout: one of `LAYOUTS`.
      config: of the network.
      scale: the wanted time scale; None for the layout's.

    Raises:
      ValueError: readers of the layout have another time scale.
    """
    if layout == "t2i_distill":
        found = dict.fromkeys(flux_config.FACTORS, 1.0)
    elif layout == "safetensors" or config.interval_embeds:
        own = {name: getattr(config, name) for name in flux_config.FACTORS}
        return own if scale is None else own | {"time_scale": scale}
    else:
        found = dict(flux_config.FACTORS)
    if scale not in (None, found["time_scale"]):
        raise ValueError(
            f"--time_scale: what reads --format={layout} embeds {found['time_scale']:g} t, not"
            f" {scale:g} t; leave it out, or use --format=safetensors"
        )
    return found


def in_type(tensors: Tensors, dtype: np.dtype | None) -> Tensors:
    """The tensors of a transformer in another type; None keeps theirs.

    Embedders of time, guidance and interval are not narrowed: they would lose what tells one time
    from another.
    """

    def cast(tensor: Tensor) -> Tensor:
        return Tensor(tensor.shape, dtype, lambda: tensor.read().astype(dtype, copy=False))

    if dtype is None:
        return tensors
    kept = () if dtype == np.float32 else _EMBEDDERS
    return {
        name: tensor if name.startswith(kept) else cast(tensor) for name, tensor in tensors.items()
    }


def types(tensors: Tensors) -> str:
    """The types of a transformer's tensors, in words; float32 for adapters, without tensors here.

    The most frequent type comes first.
    """
    sizes: dict[str, int] = {}
    embedders = set()
    for name, tensor in tensors.items():
        if name.startswith(_EMBEDDERS):
            embedders.add(str(tensor.dtype))
        else:
            sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.nbytes
    found = sorted(sizes, key=sizes.get, reverse=True) or ["float32"]
    text = ", some of it ".join(found)
    if other := embedders - set(found):
        text += f"; embedders of time, guidance and interval {', '.join(sorted(other))}"
    return text


def write_transformer(
    folder: Path,
    layout: str,
    config: MMDiTConfig,
    purpose: flux_config.Purpose,
    tensors: Tensors,
    shard_bytes: int,
) -> None:
    """Writes the transformer in a layout, its config always in `transformer/`."""
    inner = folder / diffusers_folder.SUBFOLDERS["network"]
    write_json(inner / "config.json", flux_config.to_diffusers(config, purpose))
    if layout == "diffusers":
        stem = diffusers_folder.DIFFUSERS_STEM
        safetensors_files.write_folder(inner, stem, tensors, shard_bytes)
    elif layout == "t2i_distill":
        torch_files.write_file(folder / "model.pt", tensors)
    else:
        safetensors_files.write_file(
            folder / "model.safetensors", tensors, _own_values(config, purpose)
        )


def write_own_embedders(
    folder: Path, config: MMDiTConfig, purpose: flux_config.Purpose, tree: Mapping[str, Any]
) -> None:
    """Writes the embedders from before they were refitted, beside those of `transformer/`.

    diffusers does not read them; `diffusers_folder.transformer` puts them back.

    Args:
      folder: of the export.
      config: of the network that they are of.
      purpose: of the network.
      tree: nested `StoredLeaf`s of that network.
    """
    path = folder / diffusers_folder.SUBFOLDERS["network"] / diffusers_folder.OWN_EMBEDDERS
    embedders = lora_weights.embedder_tensors(tree)
    safetensors_files.write_file(path, embedders, _own_values(config, purpose))


def write_flow_map(folder: Path, time_max: float) -> None:
    """Writes the class of a transformer with two time embedders, and its pipeline.

    Args:
      folder: with `transformer/`, whose config is changed to that class.
      time_max: where the schedule begins.
    """
    inner = folder / diffusers_folder.SUBFOLDERS["network"]
    config = diffusers_folder.read_config(inner / "config.json")
    config |= {"_class_name": diffusers_folder.FLOW_MAP_CLASS, "time_max": time_max}
    write_json(inner / "config.json", config)
    for target, (module, _) in ((inner, _FLOW_MAP_TRANSFORMER), (folder, _FLOW_MAP_PIPELINE)):
        shutil.copyfile(_FLOW_MAP / f"{module}.py", target / f"{module}.py")


def write_adapters(
    folder: Path,
    config: MMDiTConfig,
    purpose: flux_config.Purpose,
    tree: Mapping[str, Any],
    rank: int,
) -> None:
    """Writes adapters, the embedders that belong to them, and the configs of both.

    Args:
      folder: of the export.
      config: of the student.
      purpose: of the network.
      tree: nested `StoredLeaf`s, or `models.lora.Adapted` of them.
      rank: of the adapters.
    """
    inner = folder / diffusers_folder.SUBFOLDERS["network"]
    write_json(inner / "config.json", flux_config.to_diffusers(config, purpose))
    tensors = lora_weights.adapter_tensors(tree)
    safetensors_files.write_file(folder / lora_weights.WEIGHTS, tensors)
    write_json(folder / lora_weights.PEFT_CONFIG, lora_weights.peft_config(tensors, rank))
    embedders = lora_weights.embedder_tensors(tree)
    safetensors_files.write_file(
        folder / lora_weights.EMBEDDERS, embedders, _own_values(config, purpose)
    )


def _own_values(config: MMDiTConfig, purpose: flux_config.Purpose) -> dict[str, str]:
    """Facts about a network that its tensors' names and shapes do not show, for a file's header."""
    return {name: str(x) for name, x in flux_config.own_values(config, purpose).items()}


def write_pipeline_part(folder: Path, name: str, part: StoredPart) -> None:
    """Writes `vae/`, or a text encoder with its tokenizer.

    Args:
      folder: of the pipeline.
      name: "autoencoder", "clip" or "t5".
      part: to write.
    """
    inner = folder / diffusers_folder.SUBFOLDERS[name]
    write_json(inner / "config.json", part.config)
    own = name == "autoencoder"
    stem = diffusers_folder.DIFFUSERS_STEM if own else diffusers_folder.TRANSFORMERS_STEM
    tensors = tensors_of(part.tree, _TABLES[name](part.names))
    safetensors_files.write_folder(inner, stem, tensors)
    if part.tokenizer is not None:
        diffusers_folder.copy_tokenizer(part.tokenizer, folder / part.tokenizer.name)


def write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `scheduler/`."""
    write_json(folder / diffusers_folder.SCHEDULER / "scheduler_config.json", config)


def write_index(folder: Path, *, flow_map: bool) -> None:
    """Writes `model_index.json`; missing parts are null, as for prompts that come embedded.

    Args:
      folder: of the pipeline.
      flow_map: whether its transformer and pipeline are those of `write_flow_map`.
    """
    index: dict[str, Any] = {"_class_name": _FLOW_MAP_PIPELINE if flow_map else "FluxPipeline"}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for name, library in _LIBRARIES.items():
        index[name] = list(library) if (folder / name).is_dir() else [None, None]
    if flow_map:
        index["transformer"] = _FLOW_MAP_TRANSFORMER
    write_json(folder / diffusers_folder.INDEX, index)
