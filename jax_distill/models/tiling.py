"""Large pictures through an autoencoder in overlapping tiles.

Like diffusers' `AutoencoderKL.enable_tiling`, tile for tile: memory is that of one tile, and the
result differs from that of the whole picture, whose positions all see each other through the group
norms and the attention. A picture that fits into one tile is not changed by it.
"""

from collections.abc import Callable

import jax
import numpy as np

OVERLAP = 4  # a quarter of a tile


def tiled(
    apply: Callable[[np.ndarray], jax.Array], x: np.ndarray, tile: int, out_tile: int
) -> np.ndarray:
    """Applies a map of pictures to pictures, of a constant ratio of sizes, tile by tile.

    Neighbours share a quarter of a tile, over which the one above (or left) fades into the other.
    They are put together in host memory: the device holds one at a time.

    Args:
      apply: (B, h, w, C) to (B, H, W, D); it is called with at most four shapes.
      x: (B, h, w, C).
      tile: largest height and width that `apply` is given; a multiple of 4.
      out_tile: height and width of its result for such a tile; a multiple of 4.

    Returns:
      (B, H, W, D).

    Raises:
      ValueError: a tile is no multiple of 4.

    Source: diffusers' `AutoencoderKL._tiled_encode` and `tiled_decode`.
    """
    for size in (tile, out_tile):
        if size < 1 or size % OVERLAP:
            raise ValueError(f"tile: {size} is no positive multiple of {OVERLAP}")
    height, width = x.shape[1:3]
    if height <= tile and width <= tile:
        return np.asarray(apply(x))
    stride, fade = tile - tile // OVERLAP, out_tile // OVERLAP
    keep = out_tile - fade
    above: list[np.ndarray] = []
    rows = []
    for top in range(0, height, stride):
        row: list[np.ndarray] = []
        for column, left in enumerate(range(0, width, stride)):
            made = np.asarray(apply(x[:, top : top + tile, left : left + tile]))
            if above:
                made = _fade(above[column], made, fade, axis=1)
            if row:
                made = _fade(row[-1], made, fade, axis=2)
            row.append(made)
        rows.append(np.concatenate([made[:, :keep, :keep] for made in row], axis=2))
        above = row
    return np.concatenate(rows, axis=1)


def _fade(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> np.ndarray:
    """`after`, its beginning along `axis` faded in from the end of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    before, after = np.moveaxis(before, axis, -1), np.moveaxis(after, axis, -1)
    weight = np.arange(extent, dtype=after.dtype) / extent
    mixed = before[..., before.shape[-1] - extent :] * (1 - weight) + after[..., :extent] * weight
    return np.moveaxis(np.concatenate([mixed, after[..., extent:]], axis=-1), -1, axis)
