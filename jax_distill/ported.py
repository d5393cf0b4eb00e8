"""Ported folders: FLUX, or a student of it, as `python -m jax_distill.port` writes it.

    config.json     a configuration of this program
    ported.json     what the parts are; written last
    network/ autoencoder/ clip/ t5/      parameters, one Orbax tree each
    tokenizer/ tokenizer_2/              as they came

A folder that was made from a transformer alone has `network` alone; its `config.teacher.checkpoint`
then names the ported folder that has the rest.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jax_distill.parallel import shard_state

PARTS = ("network", "autoencoder", "clip", "t5")
DESCRIPTION = "ported.json"


def is_ported(folder: Path) -> bool:
    """Whether a folder is one that `jax_distill.port` has finished."""
    return (Path(folder) / DESCRIPTION).is_file()


def describe(folder: Path) -> dict[str, Any]:
    """What a ported folder holds.

    Returns:
      "source": {"layout": "diffusers", "t2i_distill" or "bfl"}; "dtype": of the parameters;
      "parts": for each one that is there its own config, under its library's names (diffusers' for
      the network, what `AutoencoderConfig`, `ClipConfig` and `T5Config` read for the others);
      "names": of tensors that tell under which of several names a part had its tensors;
      "scheduler": diffusers' scheduler_config.json, or null; "text_length": of T5's sequences;
      "assumed": sentences about what the source did not say (folders of the first versions have
      none).

    Raises:
      ValueError: it is no ported folder, or its description is damaged.
    """
    path = Path(folder) / DESCRIPTION
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"'{folder}' is no ported folder: it has no {DESCRIPTION}; make one with"
            " python -m jax_distill.port"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); port it again") from None


def load_part(
    folder: Path, name: str, like: Mapping[str, Any], *, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameters of one part, read from disk straight to the devices that hold them.

    Args:
      folder: a ported folder.
      name: one of `PARTS`.
      like: nested `jax.ShapeDtypeStruct`s (or arrays), such as `jax.eval_shape` of the part's
        `initial_parameters` makes; types may differ from those on disk. Shardings are kept.
      mesh: places the leaves that have no sharding by the rules of `parallel`; without one they are
        on the default device.

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
    path = (Path(folder) / name).resolve()
    _check(path, target)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(path, target)
        except Exception as error:  # Orbax and TensorStore raise all kinds
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(f"'{path}' cannot be read ({reason}); port it again") from error


def _check(path: Path, target: Any) -> None:
    """Compares names and shapes, which Orbax would report as a fault of its own, or pad."""
    found = {
        "/".join(map(str, (key.key for key in keys))): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes(path))
    }
    wanted = {
        "/".join(map(str, (key.key for key in keys))): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    for name in sorted(found.keys() ^ wanted.keys()):
        kind = "is missing" if name in wanted else "is not expected"
        raise ValueError(f"'{path}': parameter '{name}' {kind}; is config.model another network's?")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"'{path}': parameter '{name}' has shape {found[name]} where {shape} is expected"
            )


def shapes(path: Path) -> dict[str, Any]:
    """The tree of an Orbax folder, with leaves that have a shape and a dtype; nothing is read.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        return ocp.PyTreeCheckpointHandler().metadata(Path(path).resolve()).tree
    except Exception as error:  # Orbax raises all kinds
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"'{path}' is no Orbax tree ({reason})") from error
