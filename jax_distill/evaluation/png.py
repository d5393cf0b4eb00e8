"""Pictures as PNG files."""

import io

import numpy as np
from PIL import Image


def png(picture: np.ndarray) -> bytes:
    """The file of a picture (H, W, 3) uint8."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    return content.getvalue()
