"""Ported folders: FLUX, or a student of it, as `python -m jax_distill.port` writes it.

    config.json     a configuration of this program
    ported.json     what the parts are; written last
    network/ autoencoder/ clip/ t5/      parameters, one Orbax tree each
    tokenizer/ tokenizer_2/              as they came

A folder that was made from a transformer alone has `network` alone; its `config.teacher.checkpoint`
then names the ported folder that has the rest.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from msgspec import Meta

from jax_distill.devices.sharding import shard_state
from jax_distill.interop import diffusers_folder, flux_config, scheduler_config
from jax_distill.interop.orbax_tree import check_shapes, open_tree
from jax_distill.models.autoencoder import AutoencoderConfig
from jax_distill.models.clip import ClipConfig
from jax_distill.models.sizes import LONGEST
from jax_distill.models.t5 import T5Config
from jax_distill.storage import paths
from jax_distill.storage.files import FileError, read_json, unread
from jax_distill.storage.quoting import one_line

_CONFIGS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "network": flux_config.from_diffusers,
    "autoencoder": AutoencoderConfig.from_dict,
    "clip": ClipConfig.from_dict,
    "t5": T5Config.from_dict,
}
PARTS = tuple(_CONFIGS)
DESCRIPTION = "ported.json"
_FIX = "port it again"


class _Origin(TypedDict):
    layout: Literal["diffusers", "t2i_distill", "bfl"]


class _Description(TypedDict):
    """See `describe`."""

    source: _Origin
    dtype: str
    parts: dict[Literal["network", "autoencoder", "clip", "t5"], dict[str, Any]]
    names: dict[str, list[str]]
    scheduler: dict[str, Any] | None
    text_length: Annotated[int, Meta(ge=1, le=LONGEST)]
    assumed: NotRequired[list[str]]


def is_ported(folder: Path) -> bool:
    """Whether a folder was made by `jax_distill.port`, and whole."""
    return (paths.path(folder) / DESCRIPTION).is_file()


def describe(folder: Path) -> dict[str, Any]:
    """Describes a ported folder.

    Returns:
      "source": {"layout": "diffusers", "t2i_distill" or "bfl"}; "dtype": of the parameters;
      "parts": for each one that is there its own config, under its library's names (diffusers' for
      the network, for the others those of `AutoencoderConfig`, `ClipConfig` and `T5Config`);
      "names": of tensors that tell under which of several names a part had its tensors;
      "scheduler": diffusers' scheduler_config.json, or null; "text_length": of T5's sequences;
      "assumed": sentences about facts that the source did not state (missing in the first
      versions' folders).

    Raises:
      ValueError: it is not a ported folder, or its description is damaged.
    """
    path = paths.path(folder) / DESCRIPTION
    try:
        described = read_json(path, _Description, fix=_FIX)
    except FileNotFoundError:
        raise ValueError(
            f"'{folder}' is not a ported folder: it has no {DESCRIPTION}; make one with"
            " python -m jax_distill.port"
        ) from None
    if described["scheduler"] is not None:
        where = f"'{path}': the scheduler"
        scheduler_config.check(described["scheduler"], where=where, fix=_FIX)
    for name in ("network", *described["parts"]):
        values = described["parts"].get(name)
        if values is None or name not in described["names"]:
            raise FileError(f"'{path}' says nothing of its {name}; {_FIX}")
        try:
            _CONFIGS[name](values)
        except ValueError as error:
            raise FileError(f"'{path}': parts.{name}: {error}; {_FIX}") from None
    return described


def load_part(
    folder: Path, name: str, like: Mapping[str, Any], *, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameters of one part, read from disk straight to the devices that hold them.

    Args:
      folder: a ported folder.
      name: one of `PARTS`.
      like: nested `jax.ShapeDtypeStruct`s (or arrays), such as `jax.eval_shape` of the part's
        `initial_parameters` makes; types may differ from those on disk. Shardings are kept.
      mesh: places the leaves that have no sharding by the rules of `devices.sharding`; without one
        they are on the default device.

    Returns:
      Arrays in the structure of `like`.

    Raises:
      ValueError: the part is missing, damaged, or of other shapes.
    """
    described = describe(folder)
    if name not in described["parts"]:
        there = ", ".join(described["parts"])
        raise ValueError(f"'{folder}' has no {name}, only {there}; port a whole diffusers folder")
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, like)
    else:
        places = shard_state(like, mesh)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or place
        ),
        like,
        places,
    )
    path = paths.absolute(folder) / name
    check_shapes(str(path), open_tree(path), target)
    try:  # not by a `Checkpointer`, which in buckets asks for a mark of its own
        return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(target))
    except Exception as error:  # Orbax and TensorStore raise all kinds
        reason = one_line(str(error).partition("\n")[0][:200])
        raise unread(f"'{path}'", error) or ValueError(
            f"'{path}' cannot be read ({reason}); port it again"
        ) from None


def open_part(folder: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The parameters of one part, nested `StoredLeaf`s, of which nothing is read yet.

    Args:
      folder: a ported folder.
      name: one of `PARTS`.
      values: the part's own config, as `describe` gives it.

    Raises:
      ValueError: they are damaged, or of other shapes than the config says.
    """
    path = paths.path(folder) / name
    tree = open_tree(path)
    check_shapes(str(path), tree, diffusers_folder.shapes(_CONFIGS[name](values)))
    return tree
