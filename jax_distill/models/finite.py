"""Numbers that are not finite, found before they become pictures, and where they come from."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHOWN = 60  # letters of a caption


class NotFinite(ValueError):
    """Pictures or latents hold NaN or infinity; the message says which, and why."""


def name_pictures(captions: Sequence[str] | int) -> list[str]:
    """Names for messages: the place of each picture, and the caption where it is known.

    Args:
      captions: one a picture, or how many pictures there are.
    """
    if isinstance(captions, int):
        return [f"picture {index}" for index in range(captions)]
    short = [text if len(text) <= SHOWN else text[:SHOWN] + "…" for text in captions]
    return [f"picture {index} ({text!r})" for index, text in enumerate(short)]


def bad_rows(array: Any) -> list[int]:
    """The rows (first axis) of an array that hold NaN or infinity."""
    array = np.asarray(array)
    return np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)).tolist()


def check_rows(array: Any, names: Sequence[str], what: str, cause: str) -> None:
    """Checks that an array of pictures, latents or captions is finite.

    Args:
      array: (B, ...).
      names: at least one a row.
      what: the array, such as "its latents are".
      cause: and the fix.

    Raises:
      NotFinite: naming the first of the rows that are not.
    """
    if bad := bad_rows(array):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NotFinite(f"{names[bad[0]]}{more}: {what} not finite; {cause}")


def first_bad_array(params: Any) -> str | None:
    """The path of the first array of a tree that holds NaN or infinity, if one does."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None
