"""Colours of 16 bits, of which Pillow keeps the high bytes, rounded to 8 bits.

Its reader takes one byte of each sample. Told that samples begin with their other byte, it takes
that one; both together are the whole sample.
"""

import io
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jax_distill.storage.files import FileError

_BLOCK = 512  # rows and columns at a time
_MODES = ("RGB", "RGBX", "RGBA", "CMYK")
_NATIVE = "L" if sys.byteorder == "little" else "B"


def round_samples(
    image: Image.Image, packed: str, content: bytes, formats: Sequence[str], where: str
) -> None:
    """Replaces high bytes by the samples they are of, rounded: v / 257; other pictures are left.

    Args:
      image: a PNG or TIFF that is loaded.
      packed: Pillow's name for the layout of samples in its file, such as "RGB;16B".
      content: of the file.
      formats: that it may have, by Pillow's names.
      where: begins messages.

    Raises:
      FileError: its colours are planes of 16 bits, which Pillow takes for 8 bits.
    """
    if image.format == "TIFF" and _is_of_planes(image):
        raise FileError(
            f"{where} is a TIFF with a plane of 16 bits for each colour, not compressed, which is"
            " not read; save it as PNG"
        )
    others = _layout_of_low_bytes(image, packed)
    if others is None:
        return
    with Image.open(io.BytesIO(content), formats=formats) as low:
        low.tile = [tile._replace(args=_with_layout(tile.args, others)) for tile in low.tile]
        low.load()
    starts = itertools.product(*(range(0, length, _BLOCK) for length in image.size))
    for left, top in starts:
        box = (left, top, min(left + _BLOCK, image.width), min(top + _BLOCK, image.height))
        high_bytes, low_bytes = (np.asarray(x.crop(box), np.uint32) for x in (image, low))
        if packed.startswith("LA"):
            low_bytes = low_bytes[..., [1, 1, 1, 3]]
        rounded = ((256 * high_bytes + low_bytes + 128) // 257).astype(np.uint8)
        size = (box[2] - left, box[3] - top)
        image.paste(Image.frombytes(image.mode, size, rounded.tobytes()), box)


def _is_of_planes(image: Image.Image) -> bool:
    """Whether a TIFF has planes of 16 bits without compression."""
    tags = image.tag_v2
    return 16 in tags.get(258, ()) and (tags.get(259, 1), tags.get(284, 1)) == (1, 2)


def _layout_of_low_bytes(image: Image.Image, packed: str) -> str | None:
    """The layout by which Pillow takes the low bytes; None where it keeps all, or takes no part."""
    if image.format not in ("PNG", "TIFF"):
        return None
    if (packed, image.mode) == ("LA;16B", "RGBA"):
        return "RGBA"  # all four bytes
    mode, _, order = packed.partition(";16")
    order = _NATIVE if order == "N" else order
    return f"{mode};16{'L' if order == 'B' else 'B'}" if mode in _MODES and order else None


def _with_layout(arguments: str | tuple, layout: str) -> str | tuple:
    """A decoder's arguments with another layout."""
    return layout if isinstance(arguments, str) else (layout, *arguments[1:])
