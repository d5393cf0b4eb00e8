"""Weights that a folder has several times, in other types: diffusers' and transformers' variants.

Beside `model.safetensors` may stand `model.fp16.safetensors`; the shards of a variant are in an
index of its own, `model.safetensors.index.fp16.json`, or `model.safetensors.fp16.index.json` as
older versions wrote it.

Source: diffusers' `_add_variant` and `variant_compatible_siblings`.
"""

import re
from collections.abc import Iterable

PLAIN = ""
_VARIANT = r"\.(?!index\b)(?P<variant>[\w-]+)"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")


def files(names: Iterable[str], stem: str) -> dict[str, str]:
    """The file that each variant of a model's weights begins with: its index, or else the whole.

    Args:
      names: of the files of a folder.
      stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers).

    Returns:
      Names of files by variant; the weights without one are `PLAIN`.
    """
    stem = re.escape(stem)
    patterns = [  # a later one is stronger
        rf"{stem}(?:{_VARIANT})?\.safetensors",
        rf"{stem}\.safetensors(?:{_VARIANT})?\.index\.json",
        rf"{stem}\.safetensors\.index(?:{_VARIANT})?\.json",
    ]
    found = {}
    for pattern in patterns:
        for name in sorted(names):
            match = re.fullmatch(pattern, name)
            if match and not _SHARD.fullmatch(match["variant"] or ""):
                found[match["variant"] or PLAIN] = name
    return found


def choose(where: str, found: Iterable[str], wanted: str) -> tuple[str, str]:
    """The variant to read, and a sentence about it where that is not plain.

    Args:
      where: the folder, for messages.
      found: the variants that are there, at least one.
      wanted: one, or `PLAIN` for the plain weights, or the only ones that there are.

    Raises:
      ValueError: the wanted one is not there, or there are several and none is plain.
    """
    found = sorted(found)
    if wanted in found:
        return wanted, ""
    if wanted and PLAIN in found:
        return PLAIN, f"'{where}' has no variant {wanted}; its plain weights are taken"
    if wanted:
        known = ", ".join(found)
        raise ValueError(f"--variant: '{where}' has no variant {wanted}, only {known}")
    if len(found) == 1:
        return found[0], f"'{where}' has its weights as variant {found[0]} alone; that is taken"
    flags = " or ".join(f"--variant={variant}" for variant in found)
    raise ValueError(f"'{where}' has several variants of its weights; give {flags}")
