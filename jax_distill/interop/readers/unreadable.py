"""Files of weights that are no plain network, told by the names of their tensors."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_distill.storage.files import check_regular, named
from jax_distill.storage.quoting import one_line, shown

_PLAIN = "give the network in bfloat16, float16, float32 or float8 instead"
_KINDS = (
    (
        r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)"
        r"|.*\.quant_state\..*",
        f"is quantised by bitsandbytes, which is not read here; {_PLAIN}",
    ),
    (
        r".*\.(qweight|qzeros|wscales|smooth_factor(_orig)?|_data|weight_scale_(2|inv))",
        "is quantised (as GPTQ, AWQ, SVDQuant, quanto or in blocks of small numbers), which is not"
        f" read here; {_PLAIN}",
    ),
    (
        r".*\.lora_(A|B|down|up)\b.*|lora_(unet|te\d?|transformer)_.*|.*\.(alpha|dora_scale)"
        r"|.*\.(hada|lokr)_w\d.*|.*\.processor\.\w*lora\w*\..*",
        "is an adapter, not a network; fuse it into its network with diffusers (load_lora_weights,"
        " fuse_lora, save_pretrained) and give that folder",
    ),
    (
        r"(.*\.)?(controlnet_(single_)?blocks|controlnet_x_embedder|controlnet_mode_embedder"
        r"|input_hint_block)\..*",
        "is a ControlNet, no transformer of FLUX; give the network that it goes beside",
    ),
    (
        r"(.*\.)?(image_proj|image_proj_model|ip_adapter|ip_adapter_proj_model)\..*"
        r"|.*\.(to_k_ip|to_v_ip|ip_adapter_double_stream_\w+)\..*",
        "is an IP-Adapter, no transformer of FLUX; give the network that it goes beside",
    ),
)
_LONGEST_NAME = 300  # characters
_PATTERNS = [(re.compile(pattern), words) for pattern, words in _KINDS]
_OTHERS = (
    (re.compile(r".*\b(text_model|encoder\.block|transformer\.resblocks)\..*"), "a text encoder"),
    (re.compile(r".*\b(encoder|decoder)\.(down|mid|up|conv_in|conv_out).*"), "an autoencoder"),
)


def check_names(where: str, names: Iterable[str]) -> None:
    """Raises ValueError when tensors of these names are quantised, an adapter or a side network.

    So it does for names that no tensor has, which would break lines of messages.

    Args:
      where: the file, for messages.
      names: of all of its tensors.
    """
    for name in names:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise ValueError(
                f"'{where}' has a tensor {shown(name)}, which is not a tensor's name; download it"
                " again"
            )
        for pattern, words in _PATTERNS:
            if pattern.fullmatch(name):
                raise ValueError(f"'{where}' {words} (it has a tensor '{name}')")


def check_file(path: Path) -> None:
    """Raises ValueError when a file is of a format that has no reader here."""
    try:
        check_regular(path)
        with named(path), path.open("rb") as file:
            begin = file.read(4)
    except FileNotFoundError:
        raise ValueError(f"no file '{path}'") from None
    if begin == b"GGUF":
        raise ValueError(
            f"'{path}' is in GGUF's format, quantised for llama.cpp and ComfyUI, which is not read"
            f" here; {_PLAIN}, such as the safetensors file that it was made of"
        )


def check_config(path: Path, values: Mapping[str, Any]) -> None:
    """Raises ValueError when a model's config.json says that its weights are quantised."""
    if (settings := values.get("quantization_config")) is not None:
        method = settings.get("quant_method", "?") if isinstance(settings, Mapping) else settings
        method = one_line(str(method)) if isinstance(method, str) else shown(method)
        raise ValueError(
            f"'{path}' says that its weights are quantised ({method}), which is not read here;"
            f" {_PLAIN}"
        )


def looks_like(names: Iterable[str]) -> str:
    """Says what a file without a transformer seems to be."""
    for pattern, words in _OTHERS:
        if any(pattern.fullmatch(name) for name in names):
            return f"it looks like {words}"
    return "its tensors have other names"
