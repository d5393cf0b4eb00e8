"""Pictures as PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from jax_distill.storage import paths
from jax_distill.storage.files import write_atomically

ENDINGS = (".png",)  # of the files that are written


def png(picture: np.ndarray) -> bytes:
    """The file of a picture (H, W, 3) uint8."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    return content.getvalue()


def save(path: str | Path, picture: np.ndarray) -> None:
    """Writes a picture (H, W, 3) uint8.

    Raises:
      ValueError: the name does not end in ".png".
    """
    path = paths.path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"'{path}': pictures are written as PNG; name the file *.png")
    write_atomically(path, png(picture))
