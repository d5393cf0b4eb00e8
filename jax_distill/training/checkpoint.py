"""Training checkpoints: Orbax, asynchronous and atomic, with the input pipeline's position."""

import copy
import itertools
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jax_distill.devices import processes
from jax_distill.devices.sharding import shard_state
from jax_distill.objectives.objective import STUDENT
from jax_distill.storage import buckets, paths
from jax_distill.storage.files import read_json
from jax_distill.training import damage


class Saved(NamedTuple):
    """The contents of a checkpoint."""

    state: Any
    position: dict[str, Any]  # of the input pipeline
    metrics: dict[str, Any]  # of the steps since the last logged one


class Progress(TypedDict):
    """Metrics and checksums beside the state in a checkpoint."""

    metrics: dict[str, Any]
    checksums: dict[str, int]


class Checkpoints:
    """The checkpoints of one run; what a killed save left behind is removed.

    Args:
      directory: where they are, `<workdir>/checkpoints`.
      keep: how many of the latest are kept.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = paths.absolute(directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, position: dict[str, Any], metrics: dict[str, Any] | None = None
    ) -> None:
        """Begins to save; returns once the arrays are copied. Does nothing if `step` is there.

        Args:
          step: steps taken.
          state: a NamedTuple of trees of arrays.
          position: of the input pipeline after `step` batches, JSON-able.
          metrics: of the steps since the last logged one, JSON-able.
        """
        if step in self._manager.all_steps():
            return
        # Copies: the files are written while the caller goes on.
        position, metrics = copy.deepcopy((position, metrics or {}))
        progress = {"metrics": metrics, "checksums": checksums(state, position)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(position),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def restore(self, step: int, like: Any) -> Saved:
        """Reads a checkpoint.

        Args:
          step: one that was saved.
          like: a state of the same structure, whose shapes, types and shardings are used; arrays
            or `jax.ShapeDtypeStruct`s.

        Raises:
          damage.Other: the state that was saved has other arrays.
          Exception: of whatever kind, when the files are damaged.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = _described(self.directory / str(step))
        if difference := damage.difference(_flat(found), _flat(target)):
            raise damage.Other(difference)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=items)
        state, position, progress = (restored[name] for name in ("state", "data", "progress"))
        if progress["checksums"] != checksums(state, position):
            raise damage.Changed("its checksums do not fit what it holds")
        return Saved(state, position, progress["metrics"])

    def restore_latest(self, like: Any) -> tuple[int, Saved] | None:
        """The latest checkpoint that is whole, with its step; None when there is none at all.

        Damaged ones after it are renamed to `damaged-<step>`, with a warning; nothing is deleted.

        Raises:
          ValueError: there are checkpoints and none can be restored, the latest holds another
            state, or it cannot be read for now.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        step, saved = damage.first_whole(
            self.directory, steps, lambda step: self.restore(step, like), self._check_itself
        )
        if step != steps[0]:
            if processes.is_leader():
                for damaged in steps[: steps.index(step)]:
                    _set_aside(self.directory / str(damaged))
            processes.wait("damaged checkpoints renamed")
            self._manager.reload()
        return step, saved

    def _check_itself(self, step: int) -> None:
        """Reads a checkpoint as it describes itself.

        Raises:
          Exception: of whatever kind, when the files are damaged.
        """
        folder = self.directory / str(step)
        fields = _restore(folder, _described(folder))
        position = ocp.JsonCheckpointHandler().restore(folder / "data")
        if _saved_sums(folder) != _sums(parts(fields), position):
            raise damage.Changed("its checksums do not fit what it holds")

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does and lets go of the directory."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Of several processes, one that fails waits for none: they may be waiting for it.
        if not (processes.joined() and isinstance(error, Exception)):
            self.close()


def complete_steps(workdir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, latest first; nothing is read or written.

    Raises:
      ValueError: the run has none.
    """
    directory = paths.absolute(workdir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(
            f"'{workdir}' has no checkpoints; train it with python -m jax_distill.main"
        )
    steps = sorted(ocp.utils.checkpoint_steps(directory), reverse=True)
    if not steps:
        raise ValueError(f"'{directory}' has no complete checkpoint yet; train on and try again")
    _check_layout(directory / str(steps[0]))
    return steps


class OldLayout(ValueError):
    """A checkpoint was saved by a version whose states had no players."""


def _check_layout(folder: Path) -> None:
    """Raises OldLayout for a checkpoint whose state has no players; not for a damaged one."""
    try:
        arrays = read_json(folder / "state" / "_METADATA")["tree_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if arrays and not any("players" in name for name in arrays):
        raise OldLayout(
            f"'{folder}' was saved by an earlier version of jax_distill, in another layout; go on"
            " with that version, or train anew in another --workdir"
        )


def load_averaged(workdir: Path, mesh: Mesh | None = None, *, from_step: int = 0) -> dict:
    """The student's averaged parameters in a run's latest whole checkpoint.

    The run may be under way: nothing is written, and no more than the average is read.

    Args:
      workdir: of the run.
      mesh: places them as `devices.sharding` does; without one they are on the default device.
      from_step: the earliest that will do.

    Raises:
      ValueError: the run has no complete checkpoint, none that can be restored, or cannot be read
        for now.
    """
    steps = [step for step in complete_steps(workdir) if step >= from_step]
    if not steps:
        raise ValueError(f"'{workdir}' has no complete checkpoint of step {from_step} or later")
    directory = paths.absolute(workdir) / "checkpoints"

    def restore(step: int) -> dict:
        folder = directory / str(step)
        average = _described(folder)["players"][STUDENT]["ema"]
        found = {"players": {STUDENT: {"ema": average}}}
        restored = _restore(folder, found, None if mesh is None else shard_state(found, mesh))
        if not bit_sums(parts(restored)).items() <= _saved_sums(folder).items():
            raise damage.Changed("its checksums do not fit what it holds")
        return restored["players"][STUDENT]["ema"]

    return damage.first_whole(directory, steps, restore)[1]


def _described(folder: Path) -> dict[str, Any]:
    """The state that a checkpoint holds, as a tree of shapes and types."""
    return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def _flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their names, such as "players.student.params.network.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _restore(folder: Path, found: dict[str, Any], places: Any = None) -> dict[str, Any]:
    """Reads a part of a checkpoint's state.

    Args:
      folder: of the checkpoint.
      found: that part of what `_described` gives.
      places: a tree of shardings; by default all is on the default device.
    """
    if places is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, found)
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        found,
        places,
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.PyTreeCheckpointHandler().restore(
        folder / "state", args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True)
    )


def _saved_sums(folder: Path) -> dict[str, int]:
    """The checksums of a checkpoint."""
    return read_json(folder / "progress" / "metadata", Progress)["checksums"]


def _set_aside(folder: Path) -> None:
    """Renames a damaged checkpoint; those that were set aside before stay."""
    for number in itertools.count():
        aside = folder.with_name(f"damaged-{folder.name}" + f"-{number}" * bool(number))
        if not aside.exists():
            if paths.is_bucket(folder):
                buckets.move(folder, aside)
            else:
                folder.rename(aside)
            return


def is_finished(workdir: Path, total_steps: int) -> bool:
    """Whether a run has a complete checkpoint of its last step."""
    try:
        return complete_steps(workdir)[0] >= total_steps
    except OldLayout:
        raise
    except ValueError:
        return False


def parts(state: Any) -> dict[str, Any]:
    """The parts of a state that have a checksum of their own: "step", "student.params", ...

    Args:
      state: a NamedTuple, or a dict of its fields; so are those of each of its "players".
    """
    fields = dict(state) if isinstance(state, dict) else state._asdict()
    for player, own in fields.pop("players", {}).items():
        fields |= {f"{player}.{name}": tree for name, tree in parts(own).items()}
    return fields


def checksums(state: Any, position: dict[str, Any]) -> dict[str, int]:
    """A number for each part of the state and one for the input's position.

    Orbax notices missing and cut files, but takes a flipped bit for data.
    """
    return _sums(parts(state), position)


def _sums(fields: dict[str, Any], position: dict[str, Any]) -> dict[str, int]:
    text = json.dumps(position, sort_keys=True)
    return bit_sums(fields) | {"data": zlib.crc32(text.encode())}


def bit_sums(fields: dict[str, Any]) -> dict[str, int]:
    """The sum modulo 2^32 of all bits as whole numbers, whatever the sharding."""
    return {name: int(value) for name, value in jax.device_get(_bit_sums(fields)).items()}


@jax.jit
def _bit_sums(fields: dict[str, Any]) -> dict[str, jax.Array]:

    def add(leaf: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, kind), dtype=jnp.uint32)

    zero = jnp.zeros((), jnp.uint32)
    return {name: sum(map(add, jax.tree.leaves(tree)), zero) for name, tree in fields.items()}
