"""Port: `python -m jax_distill.port --source=FLUX_DIR --output=DIR`, PyTorch weights to ours."""

import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from jax_distill import commands, ported
from jax_distill import config as configuration
from jax_distill.files import write_json
from jax_distill.interop import diffusers_folder, flux_config
from jax_distill.interop.parts import Part, write_part

_DTYPES = {"keep": None, "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}

_SOURCE = flags.DEFINE_string("source", None, "Folder that diffusers can load.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
_DTYPE = flags.DEFINE_enum("dtype", "keep", list(_DTYPES), "Of the parameters on disk.")
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", 256, "Tokens of T5's sequences: 256 for FLUX.1-lite and schnell, 512 for dev."
)


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    port(Path(_SOURCE.value), output, dtype=_DTYPE.value, text_length=_TEXT_LENGTH.value)
    print(f"wrote {output}")


def port(source: Path, output: Path, *, dtype: str = "keep", text_length: int = 256) -> None:
    """Makes a ported folder (see `ported`), whole or not at all.

    Args:
      source: a diffusers folder.
      output: must not exist.
      dtype: "keep", "bfloat16" or "float32".
      text_length: of T5's sequences.

    Raises:
      ValueError: the source cannot be read or does not fit together, or the output exists.
    """
    if output.exists():
        raise ValueError(f"--output: '{output}' exists; remove it or choose another")
    parts = diffusers_folder.parts(source)
    for part in parts.values():
        part.check()
    scheduler = diffusers_folder.read_json(
        source / diffusers_folder.SCHEDULER / "scheduler_config.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for name, part in parts.items():
            count = write_part(part, partial / name, _DTYPES[dtype])
            logging.info("%s: %d tensors, %.2f GB", name, len(part.tensors), count / 1e9)
        for name in diffusers_folder.TOKENIZERS:
            shutil.copytree(source / name, partial / name)
        configuration.save(_configuration(parts["network"], text_length), partial)
        description = {
            "source": {"layout": "diffusers"},
            "dtype": dtype,
            "parts": {name: part.config for name, part in parts.items()},
            "scheduler": scheduler,
            "text_length": text_length,
        }
        write_json(partial / ported.DESCRIPTION, description)
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _configuration(network: Part, text_length: int) -> ConfigDict:
    """The configuration of a ported teacher."""
    config = configuration.base()
    model = flux_config.from_diffusers(network.config)
    with config.unlocked():
        config.world = "flux"
        config.objective.name = "flow_matching"
        for key in config.model:
            if hasattr(model, key):
                config.model[key] = getattr(model, key)
        config.data.text_length = text_length
        config.data.resolution = (512, 512)
        config.evaluation.guidance = 3.5
    return config


if __name__ == "__main__":
    flags.mark_flags_as_required(["source", "output"])
    commands.run(main)
