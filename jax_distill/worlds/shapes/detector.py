"""The detector of the shapes world: finds the objects of a picture, by segmentation and templates.

It stands in for the learned detectors that GenEval needs (Ghosh et al., 2023,
https://arxiv.org/abs/2310.11513); in this world it is exact enough to need no learned model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from jax_distill.worlds.shapes.renderer import (
    ARM,
    COLORS,
    EXTENT,
    IMAGE_SIZE,
    SHAPES,
    Placed,
    coverage,
)

# Segmentation, in RGB distance (0..442). The lightest contrast in the world is yellow's, 188.
_FOREGROUND = 60.0
_SPECK = 12  # px
# The picture must have the world's background, or noise would offer blobs of every shape.
_LIGHTEST_SHADOW = 200.0
_BACKGROUND_TINT = 30.0
_BORDER = 2  # px that no object of the world touches
_BORDER_SHARE = 0.9
# Objects: uniform in colour, near a named colour, of a possible size, and like one template.
_OFF_LINE = 60.0  # RGB distance from the line between the background and the object's colour
_PURE_SHARE = 0.9
_COLOR_LIMIT = 80.0
_RADIUS = (6.0, 17.0)  # px
# A circle and a square of equal area overlap by 0.826: no shape passes for another at that.
_MIN_IOU = 0.83
_MIN_MARGIN = 0.03
_SHARPNESS = 3.0

# Area and the centroid's offset below the box centre, in units of radius^2 and radius.
_AREA = {
    "circle": np.pi * EXTENT["circle"] ** 2,
    "square": 4 * EXTENT["square"] ** 2,
    "triangle": 2 * EXTENT["triangle"] ** 2,
    "cross": 4 * ARM * (2 - ARM),
}
_CENTROID = {"circle": 0.0, "square": 0.0, "triangle": EXTENT["triangle"] / 3, "cross": 0.0}
_PALETTE = np.array(list(COLORS.values()), np.float64)
_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Found:
    """An object found in a picture.

    Attributes:
        shape, color: one of `SHAPES` and of `COLORS`.
        x, y: centre of its box in pixels, y down.
        width, height: extent of its box in pixels.
        area: covered area in pixels.
        confidence: overlap (intersection over union) with the template of its shape, 0..1.
    """

    shape: str
    color: str
    x: float
    y: float
    width: float
    height: float
    area: float
    confidence: float


def _background(image: np.ndarray) -> np.ndarray | None:
    """The (3,) background colour, or None if the border is not a light near-uniform grey."""
    inner = np.zeros(image.shape[:2], bool)
    inner[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    border = image[~inner]
    color = np.median(border, axis=0)
    if color.min() < _LIGHTEST_SHADOW or np.ptp(color) > _BACKGROUND_TINT:
        return None
    clean = np.linalg.norm(border - color, axis=-1) < _FOREGROUND
    return color if clean.mean() >= _BORDER_SHARE else None


def _sharpen(alpha: np.ndarray) -> np.ndarray:
    """Steepens soft edges about one half, so that an autoencoder's blur costs no overlap."""
    return np.clip(_SHARPNESS * (alpha - 0.5) + 0.5, 0, 1)


def _classify(alpha: np.ndarray) -> tuple[str, float, Placed] | None:
    """Names the shape of a soft mask (64, 64): the name, its overlap and the matched template."""
    area = float(alpha.sum())
    rows, columns = alpha.sum(1), alpha.sum(0)
    centers = np.arange(IMAGE_SIZE) + 0.5
    x, y = float(columns @ centers) / area, float(rows @ centers) / area
    matches = []
    for shape in SHAPES:
        radius = (area / _AREA[shape]) ** 0.5
        if not _RADIUS[0] <= radius <= _RADIUS[1]:
            continue
        template = Placed(shape, _COLOR_NAMES[0], x, y - _CENTROID[shape] * radius, radius)
        box, inside = coverage(template)
        inside = _sharpen(inside)
        common = float(np.minimum(alpha[box], inside).sum())
        matches.append((common / (area + float(inside.sum()) - common), shape, template))
    if not matches:
        return None
    matches.sort(key=lambda match: -match[0])
    overlap, shape, template = matches[0]
    margin = overlap - matches[1][0] if len(matches) > 1 else 1.0
    if overlap < _MIN_IOU or margin < _MIN_MARGIN:
        return None
    return shape, overlap, template


def find_objects(image: np.ndarray) -> list[Found]:
    """Finds the objects of a picture, surest first.

    A region counts only if it is one upright shape in one colour: merged objects, malformed blobs
    and specks are left out, as is everything in a picture without the world's light background.

    Args:
        image: (64, 64, 3) uint8.

    Returns:
        The objects, in order of falling confidence.

    Raises:
        ValueError: if the image has another shape or type.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image: expected ({IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8, got {image.shape} "
            f"{image.dtype}; scale pictures from [-1, 1] with (x + 1) * 127.5 and round"
        )
    image = image.astype(np.float64)
    background = _background(image)
    if background is None:
        return []
    contrast = image - background
    labels, _ = ndimage.label(np.linalg.norm(contrast, axis=-1) > _FOREGROUND)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels == label
        if region[box].sum() < _SPECK:
            continue
        core = image[ndimage.binary_erosion(region)]
        if not len(core):
            continue
        color = np.median(core, axis=0)
        from_palette = np.linalg.norm(_PALETTE - color, axis=-1)
        nearest = int(from_palette.argmin())
        if from_palette[nearest] > _COLOR_LIMIT:
            continue
        # A pixel's coverage is its place on the line from the background to the colour; pixels off
        # that line are of another colour.
        axis = color - background
        alpha = np.clip(contrast @ axis / (axis @ axis), 0, 1)
        off_line = np.linalg.norm(contrast - alpha[..., None] * axis, axis=-1)
        if (off_line[region] < _OFF_LINE).mean() < _PURE_SHARE:
            continue
        rim = ndimage.binary_dilation(region, np.ones((3, 3)))
        alpha *= rim & ((labels == 0) | region)
        match = _classify(_sharpen(alpha))
        if match is None:
            continue
        shape, overlap, template = match
        size = 2 * EXTENT[shape] * template.radius
        area = float(alpha.sum())
        name = _COLOR_NAMES[nearest]
        found.append(Found(shape, name, template.x, template.y, size, size, area, overlap))
    return sorted(found, key=lambda obj: -obj.confidence)
