"""Training checkpoints: Orbax, asynchronous and atomic, with the input pipeline's position."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, `<workdir>/checkpoints`.
      keep: how many of the latest are kept.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = Path(directory).resolve()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, create=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begins to save; returns once the arrays are copied. Does nothing if `step` is there."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
            ),
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the input position of a step.

        Args:
          step: one that was saved.
          like: a state of the same structure, whose shapes, types and shardings are used.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_averaged(workdir: Path) -> dict:
    """The averaged parameters of a run's latest checkpoint, on the default device.

    Raises:
      ValueError: the run has no complete checkpoint.
    """
    directory = (Path(workdir) / "checkpoints").resolve()
    if not directory.is_dir():
        raise ValueError(
            f"'{workdir}' has no checkpoints; train it with python -m jax_distill.main"
        )
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(
                f"'{directory}' has no complete checkpoint yet; train on and try again"
            )
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))[
            "state"
        ]
    ema = restored["ema"] if isinstance(restored, dict) else restored.ema
    return jax.tree.map(jax.numpy.asarray, ema)
