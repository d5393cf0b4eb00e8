"""Encoded pictures, from files or bytes, as a viewer shows them on a white page."""

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps

from jax_distill.data import deep_colours
from jax_distill.storage import disks
from jax_distill.storage.files import FileError, check_regular, unread

BACKGROUND = (255, 255, 255)
"""The colour behind transparent pixels."""

# Formats of browsers and viewers, recognised by the first bytes; none that runs another program.
FORMATS = "PNG JPEG MPO WEBP AVIF GIF TIFF BMP JPEG2000 PPM QOI".split()

# The most pixels of a picture, which keep reading it below 1 GB. A decoder takes up to 10 bytes a
# pixel, or 25 in these formats; JPEG can be decoded at half the size.
PIXELS, PIXELS_WIDE, PIXELS_JPEG = 64_000_000, 30_000_000, 110_000_000
_WIDE = ("WEBP", "AVIF", "JPEG2000")
FILE_BYTES, PROFILE_BYTES = 2**28, 2**24
SCANS = 100  # of a progressive JPEG: each visits all pixels, and takes a few bytes of the file

FRAMES = "have several frames or pages, of which the first is taken"
PROFILE = "have a colour profile that cannot be used, and are taken as sRGB"
GAMMA = "name a gamma that is not sRGB's (PNG's gAMA), which is not followed"
SMALL = "are smaller than what is made of them, and are enlarged"

_UPRIGHT = {  # EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN = {  # modes without alpha, and the mode of their pixels before a profile is applied
    "1": "L",
    "L": "L",
    "P": "RGB",
    "RGB": "RGB",
    "RGBX": "RGB",
    "CMYK": "CMYK",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "HSV": "RGB",
}
_ALPHA = {"LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class Encoded(NamedTuple):
    """The content of a picture's file, from wherever it lies."""

    content: bytes
    where: str  # begins messages, such as "'a.tar', 'cat.png'"


class Shown(NamedTuple):
    """A picture as it is seen, with notes on conversions that its owner may not expect."""

    image: Image.Image  # RGB, upright
    notes: frozenset[str] = frozenset()


@functools.cache
def endings() -> tuple[str, ...]:
    """The endings, in lower case, that mark a file as a picture."""
    known = Image.registered_extensions()
    return tuple(sorted(ending for ending, name in known.items() if name in FORMATS))


def load(path: Path) -> Encoded:
    """Reads the file of a picture without decoding it.

    Raises:
      FileError: the file is missing, or cannot be read.
    """
    path, where = Path(path), f"'{path}'"
    try:
        check_regular(path)
        with path.open("rb") as file:
            return Encoded(file.read(FILE_BYTES + 1), where)
    except FileNotFoundError:
        raise FileError(f"{where} is missing; restore it or take it off the list") from None
    except (OSError, MemoryError) as error:
        raise unread(where, error, disks.raised) or error from None


def read(picture: Path | Encoded, height: int, width: int) -> np.ndarray:
    """Reads a picture as (height, width, 3) uint8: resized to cover that, then cropped centrally.

    It looks as in a viewer on a white page, see `shown`.

    Raises:
      FileError: as `shown`.
    """
    encoded = _encoded(picture)
    with _decoding(encoded.where):
        fitted = ImageOps.fit(_shown(encoded).image, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(fitted)


def check(picture: Path | Encoded, height: int, width: int) -> frozenset[str]:
    """Decodes a picture to its end; returns notes about it, such as `FRAMES`.

    Args:
      picture: the path of its file, or its content.
      height: in pixels, that the picture will be fitted to.
      width: likewise.

    Raises:
      FileError: as `shown`.
    """
    return noted(shown(picture), height, width)


def noted(picture: Shown, height: int, width: int) -> frozenset[str]:
    """Notes about a picture that will be fitted to a height and a width in pixels."""
    image, notes = picture
    return notes | {SMALL} if image.width < width or image.height < height else notes


def nearest(picture: Shown, sizes: Sequence[tuple[int, int]]) -> int:
    """The number of the size that suits a picture best.

    It is the one whose ratio of height to width is nearest the picture's own. Of several of the
    same ratio, it is the largest that the picture fills, or the smallest if it fills none.

    Args:
      picture: any.
      sizes: heights and widths in pixels.
    """
    height, width = picture.image.height, picture.image.width

    def cost(number: int) -> tuple[float, bool, int]:
        rows, columns = sizes[number]
        apart = abs(math.log(height * columns / (width * rows)))
        enlarged = rows > height or columns > width
        return round(apart, 6), enlarged, rows * columns if enlarged else -rows * columns

    return min(range(len(sizes)), key=cost)


def shown(picture: Path | Encoded) -> Shown:
    """Decodes a picture as a viewer shows it on a white page.

    Its orientation is applied, and an embedded profile is converted to sRGB unless that moves no
    colour by more than two of 255 levels. Samples of 16 bits are rounded to 8, v / 257; of
    colours in JPEG 2000, and in TIFF as planes or multiplied by alpha, the high byte is taken.
    Transparent pixels are blended with white before anything is resized. The first of several
    frames or pages is taken.

    Raises:
      FileError: the file is missing, cannot be decoded to its end, or has too many pixels, or
        samples of unknown range: floats, signed ones, or more than 16 bits.
    """
    encoded = _encoded(picture)
    with _decoding(encoded.where):
        return _shown(encoded)


def _encoded(picture: Path | Encoded) -> Encoded:
    return picture if isinstance(picture, Encoded) else load(picture)


@contextlib.contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Names the picture in any error of Pillow's, and silences its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise FileError(_too_large(where, pixels, PIXELS)) from None
    except Exception as error:  # decoders raise nearly every kind
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = re.sub(r" <\S+ object at 0x\w+>", "", reason)  # the same in every process
        raise unread(where, error, disks.raised) or FileError(
            f"{where} cannot be read as a picture: {reason}; save it anew or take it away"
        ) from None


def _shown(encoded: Encoded) -> Shown:
    content, where = encoded
    if len(content) > FILE_BYTES:
        raise FileError(
            f"{where} is larger than the {FILE_BYTES >> 20} MiB that are read of a picture;"
            " save it anew"
        )
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with Image.open(io.BytesIO(content), formats=formats) as image:
        _bound(image, encoded)
        notes = {FRAMES} if getattr(image, "is_animated", False) else set()
        packed = _packed_as(image)
        image.load()
        deep_colours.round_samples(image, packed, content, formats, where)
        colours, alpha = _colours(image, packed, where)
        upright = _UPRIGHT.get(_orientation(image, where))
        profile = image.info.get("icc_profile")
        srgb = "srgb" in image.info or abs(image.info.get("gamma", 1 / 2.2) - 1 / 2.2) < 0.02
    if not profile and not srgb:
        notes.add(GAMMA)
    if profile:
        transform = _to_srgb(profile, colours.mode)
        if transform is None:
            notes.add(PROFILE)
        else:
            colours = transform(colours)
    colours = colours if colours.mode == "RGB" else colours.convert("RGB")
    if alpha is not None:
        colours.paste(BACKGROUND, mask=ImageChops.invert(alpha))
    if upright is not None:
        colours = colours.transpose(upright)
    return Shown(colours, frozenset(notes))


def _bound(image: Image.Image, encoded: Encoded) -> None:
    """Limits the work of decoding before it begins; large JPEGs are decoded at half the size."""
    content, where = encoded
    pixels = image.width * image.height
    jpeg = image.format in ("JPEG", "MPO") and image.mode != "CMYK"
    limit = PIXELS_WIDE if image.format in _WIDE or image.mode == "CMYK" else PIXELS
    if jpeg and limit < pixels <= PIXELS_JPEG:
        image.draft(image.mode, (image.width // 2, image.height // 2))
    elif pixels > limit:
        raise FileError(_too_large(where, pixels, PIXELS_JPEG if jpeg else limit))
    if image.info.get("progressive") and content.count(b"\xff\xda") > SCANS:
        raise FileError(f"{where} has more than the {SCANS} scans that are read; save it anew")


def _too_large(where: str, pixels: int, limit: int) -> str:
    return (
        f"{where} has {pixels / 1e6:.1f} million pixels, more than the {limit // 10**6} million"
        " that are read; scale it down"
    )


def _packed_as(image: Image.Image) -> str:
    """Pillow's name for the layout of samples in the file, or ''; it is lost by loading."""
    arguments: Any = image.tile[0][3] if getattr(image, "tile", None) else ""
    packed = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return packed if isinstance(packed, str) else ""


def _orientation(image: Image.Image, where: str) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # parsers of it raise nearly every kind, too
        reason = str(error).partition("\n")[0] or type(error).__name__
        reason = re.sub(r" <\S+ object at 0x\w+>", "", reason)  # the same in every process
        raise unread(where, error, disks.raised) or FileError(
            f"{where} has EXIF data that cannot be read ({reason}), so that nobody knows which"
            " side is up; save it anew or remove them"
        ) from None


def _colours(image: Image.Image, packed: str, where: str) -> tuple[Image.Image, Image.Image | None]:
    """Splits a picture of any mode into colours of 8 bits (L, RGB or CMYK) and alpha (L).

    Raises:
      FileError: its samples have no agreed range.
    """
    signed = image.format == "TIFF" and 2 in image.tag_v2.get(339, ())  # SampleFormat
    # 32 signed bits are how Pillow writes 16 bits of grey; 16 of them are another range.
    if image.mode in _DEEP and not (signed and 16 in image.tag_v2.get(258, ())):
        return _from_16_bits(image, packed, where)
    if image.mode not in {**_PLAIN, **_ALPHA} or signed:
        raise FileError(
            f"{where} is a picture of mode {image.mode}{', signed' if signed else ''}, whose"
            " values have no agreed range; save it with 8 or 16 bits a colour"
        )
    transparent = image.info.get("transparency")
    if transparent is None and image.mode in _PLAIN and not image.has_transparency_data:
        mode = _PLAIN[image.mode]
        return image if image.mode == mode else image.convert(mode), None
    if transparent is not None and image.mode in ("L", "RGB"):
        if packed.startswith("RGB;16"):
            raise FileError(
                f"{where} is a picture of mode {packed} with a transparent colour, of which"
                " reading keeps 8 bits; save it with an alpha channel"
            )
        scale = {"L;2": 85, "L;4": 17}.get(packed, 1)  # the colour is given in the file's levels
        image.info["transparency"] = transparent * scale if image.mode == "L" else transparent
    if image.mode in ("La", "RGBa"):
        image = image.convert(_ALPHA[image.mode])
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")
    return image.convert(image.mode[:-1]), image.getchannel("A")


def _from_16_bits(
    image: Image.Image, packed: str, where: str
) -> tuple[Image.Image, Image.Image | None]:
    """Converts grey of 16 bits, in any of Pillow's modes, to 8 bits and alpha."""
    white = 4095 if packed == "I;12" else 65535
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # white is zero
    transparent = image.info.get("transparency")
    values = image if image.mode == "I" else image.convert("I")
    lowest, highest = values.getextrema()
    if lowest < 0 or highest > white:
        raise FileError(
            f"{where} is a picture of mode {image.mode} with values from {lowest} to {highest},"
            f" more than 0 to {white}; save it with 8 or 16 bits a colour"
        )
    levels = np.minimum(np.arange(65536), white)
    grey = np.round(255 * levels / white).astype(np.uint8)
    colours = values.point((255 - grey if inverted else grey).tolist(), "L")
    if transparent is None:
        return colours, None
    return colours, values.point((255 * (np.arange(65536) != transparent)).tolist(), "L")


@functools.lru_cache(maxsize=8)  # a camera's pictures share theirs
def _to_srgb(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Builds a function that converts pictures of a mode from a profile's colours to sRGB.

    Args:
      profile: ICC's bytes.
      mode: L, RGB or CMYK.

    Returns:
      A function of pictures, the identity where the profile is sRGB in effect; None where the
      profile is damaged or describes other colours.
    """
    if len(profile) > PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        taken = _PROFILE_MODES.get(source.profile.xcolor_space.strip())
        if taken != mode and (taken, mode) != ("RGB", "L"):
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            taken,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        probe = _probe(taken)
        moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError):
        return None
    if taken != "CMYK" and max(high for _, high in moved.getextrema()) <= 2:
        return lambda image: image
    return lambda image: transform.apply(image if image.mode == taken else image.convert(taken))


@functools.cache
def _probe(mode: str) -> Image.Image:
    """A picture of all kinds of colours."""
    steps = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    grid = np.meshgrid(*[steps] * len(Image.new(mode, (1, 1)).getbands()), indexing="ij")
    return Image.frombytes(mode, (grid[0].size, 1), np.stack(grid, -1).tobytes())
