"""The bundled weights: the shapes world's autoencoder and teacher.

They are made by `configs/autoencoder.py` and `configs/teacher.py` and by nothing else, and put here
by `python -m jax_distill.bundle --run=runs/autoencoder` and `--run=runs/teacher`;
`weights/README.md` has the seeds, times and scores.
"""

from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jax_distill.storage.files import read_json, unread, write_atomically, write_json

FOLDER = Path(__file__).with_name("weights")


def save(name: str, params: dict, description: dict, folder: Path = FOLDER) -> None:
    """Writes parameters in float16 with their description beside them."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    half = {path: np.ascontiguousarray(leaf, np.float16) for path, leaf in flat.items()}
    write_atomically(folder / f"{name}.safetensors", safetensors.numpy.save(half))
    write_json(folder / f"{name}.json", description)


def load(name: str, folder: Path = FOLDER) -> tuple[dict, dict]:
    """Parameters in float32, and their description.

    Raises:
      ValueError: the package was installed without its weights, or they are damaged.
    """
    path = folder / f"{name}.safetensors"
    fix = f"reinstall the package or train configs/{name}.py"
    try:
        flat = {key: leaf.astype(np.float32) for key, leaf in load_file(path).items()}
        description = read_json(folder / f"{name}.json", fix=fix)
    except FileNotFoundError as error:
        missing = error.filename or path
        raise ValueError(f"'{missing}' is missing; {fix}") from None
    except SafetensorError as error:
        raise unread(f"'{path}'", error) or ValueError(
            f"'{path}' is damaged ({error}); {fix}"
        ) from None
    return traverse_util.unflatten_dict(flat, sep="/"), description


def teacher_config() -> ConfigDict:
    """The configuration of the run that made the teacher; raises as `load`."""
    return ConfigDict(load("teacher")[1]["config"])
