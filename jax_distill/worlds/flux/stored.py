"""Reads the parts of a ported folder in the types that they are stored in."""

from pathlib import Path

import jax
from flax import traverse_util
from jax.sharding import Mesh

from jax_distill.interop import ported_folder
from jax_distill.interop.orbax_tree import open_tree


def load_stored(folder: Path, name: str, like: dict, mesh: Mesh | None = None) -> dict:
    """Like `ported_folder.load_part`, with parameters of the types they have on disk."""
    return ported_folder.load_part(folder, name, stored_shapes(folder, name, like), mesh=mesh)


def stored_shapes(folder: Path, name: str, like: dict) -> dict:
    """The shapes of a part's parameters, with the types they have on disk."""
    stored = traverse_util.flatten_dict(open_tree(folder / name))
    flat = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype if path in stored else leaf.dtype)
        for path, leaf in traverse_util.flatten_dict(like).items()
    }
    return traverse_util.unflatten_dict(flat)
