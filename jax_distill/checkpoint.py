"""Training checkpoints: Orbax, asynchronous and atomic, with the input pipeline's position."""

import contextlib
import copy
import gc
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh

from jax_distill import processes
from jax_distill.parallel import shard_state


class Saved(NamedTuple):
    """What a checkpoint holds."""

    state: Any
    position: dict[str, Any]  # of the input pipeline
    metrics: dict[str, Any]  # of the steps since the last logged one


class Checkpoints:
    """The checkpoints of one run; what a killed save left behind is removed.

    Args:
      directory: where they are, `<workdir>/checkpoints`.
      keep: how many of the latest are kept.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).resolve()
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
        """What was saved at a step.

        Args:
          step: one that was saved.
          like: a state of the same structure, whose shapes, types and shardings are used; arrays
            or `jax.ShapeDtypeStruct`s.

        Raises:
          Exception: of whatever kind, when the files are damaged.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {"state": ocp.args.StandardRestore(target), "data": ocp.args.JsonRestore()}
        if (self.directory / str(step) / "progress").exists():  # the first versions had none
            items["progress"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state, position = restored["state"], restored["data"]
        progress = restored.get("progress") or {"metrics": {}, "checksums": {}}
        found = checksums(state, position)
        if not progress["checksums"].items() <= found.items():
            raise _Changed("its checksums do not fit what it holds")
        return Saved(state, position, progress["metrics"])

    def restore_latest(self, like: Any) -> tuple[int, Saved] | None:
        """The latest checkpoint that is whole, with its step; None when there is none at all.

        Damaged ones after it are renamed to `damaged-<step>`, with a warning.

        Raises:
          ValueError: there are checkpoints and none can be restored.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        step, saved = _first_whole(self.directory, steps, lambda step: self.restore(step, like))
        if step != steps[0]:
            if processes.is_leader():
                for damaged in steps[: steps.index(step)]:
                    aside = self.directory / f"damaged-{damaged}"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self.directory / str(damaged), aside)
            processes.wait("damaged checkpoints renamed")
            self._manager.reload()
        return step, saved

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
    directory = (Path(workdir) / "checkpoints").resolve()
    if not directory.is_dir():
        raise ValueError(
            f"'{workdir}' has no checkpoints; train it with python -m jax_distill.main"
        )
    steps = sorted(ocp.utils.checkpoint_steps(directory), reverse=True)
    if not steps:
        raise ValueError(f"'{directory}' has no complete checkpoint yet; train on and try again")
    return steps


def load_averaged(workdir: Path, mesh: Mesh | None = None, *, from_step: int = 0) -> dict:
    """The averaged parameters of a run's latest whole checkpoint.

    The run may be under way: nothing is written, and no more than the average is read.

    Args:
      workdir: of the run.
      mesh: places them by the rules of `parallel`; without one they are on the default device.
      from_step: the earliest that will do.

    Raises:
      ValueError: the run has no complete checkpoint, or none that can be restored.
    """
    steps = [step for step in complete_steps(workdir) if step >= from_step]
    if not steps:
        raise ValueError(f"'{workdir}' has no complete checkpoint of step {from_step} or later")
    directory = (Path(workdir) / "checkpoints").resolve()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def restore(step: int) -> dict:
        path, handler = directory / str(step) / "state", ocp.PyTreeCheckpointHandler()
        found = {"ema": handler.metadata(path).tree["ema"]}
        places = jax.tree.map(lambda _: device, found) if mesh is None else shard_state(found, mesh)
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            found,
            places,
        )
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restored = handler.restore(
            path, args=ocp.args.PyTreeRestore(target, arguments, partial_restore=True)
        )
        progress = directory / str(step) / "progress" / "metadata"
        if progress.exists():
            expected = json.loads(progress.read_text())["checksums"]["ema"]
            if int(bit_sums(restored)["ema"]) != expected:
                raise _Changed("its checksums do not fit what it holds")
        return restored["ema"]

    return _first_whole(directory, steps, restore)[1]


def is_finished(workdir: Path, total_steps: int) -> bool:
    """Whether a run has a complete checkpoint of its last step."""
    try:
        return complete_steps(workdir)[0] >= total_steps
    except ValueError:
        return False


class _Changed(ValueError):
    """A checkpoint does not hold what was saved; all processes find so."""


def checksums(state: Any, position: dict[str, Any]) -> dict[str, int]:
    """A number for each field of the state (a NamedTuple) and one for the input's position.

    Orbax notices missing and cut files, but takes a flipped bit for data.
    """
    numbers = jax.device_get(bit_sums(state._asdict()))
    text = json.dumps(position, sort_keys=True)
    return {name: int(value) for name, value in numbers.items()} | {
        "data": zlib.crc32(text.encode())
    }


@jax.jit
def bit_sums(fields: dict[str, Any]) -> dict[str, jax.Array]:
    """The sum modulo 2^32 of all bits as whole numbers, whatever the sharding."""

    def add(leaf: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, kind), dtype=jnp.uint32)

    zero = jnp.zeros((), jnp.uint32)
    return {name: sum(map(add, jax.tree.leaves(tree)), zero) for name, tree in fields.items()}


def _first_whole(
    directory: Path, steps: Sequence[int], restore: Callable[[int], Any]
) -> tuple[int, Any]:
    """The first step that `restore` makes something of, and what; warns of those that it could not.

    Raises:
      ValueError: none could be restored; or one of several processes could not read its part, which
        the others, who wait for it, do not know.
    """
    failures = []
    for step in steps:
        with _quiet_failures():
            try:
                restored = restore(step)
            except Exception as error:  # Orbax and TensorStore raise all kinds
                failures.append((step, str(error).partition("\n")[0][:200]))
                if not processes.joined() or isinstance(error, _Changed):
                    continue
                raise ValueError(
                    f"'{directory / str(step)}' is damaged ({failures[-1][1]}); remove it and start"
                    " again, from the checkpoint before it"
                ) from error
        for damaged, reason in failures:
            where = directory / str(damaged)
            logging.warning("%s is damaged (%s); going back to step %d", where, reason, step)
        return step, restored
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in failures)
    raise ValueError(
        f"'{directory}': no checkpoint can be restored ({reasons}); start again in another"
        " --workdir, or with the configuration that made them"
    )


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Keeps the terminal clear of the reads that Orbax abandons when one of them fails."""
    previous, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines never awaited
            yield
            gc.collect()
    finally:
        sys.unraisablehook = previous
