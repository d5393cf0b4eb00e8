"""The training loop: steps, and everything that a long run needs around them."""

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill.config import optimizer_of
from jax_distill.data.damaged import share_of
from jax_distill.data.loader import Ahead, Batches, batches, example_of_row
from jax_distill.devices import processes, sharding
from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.objectives.objective import STUDENT, Method
from jax_distill.storage import paths
from jax_distill.training import acceptance, checkpoint, damage
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.feed import Embedder, Feed
from jax_distill.training.optimizer import learning_rate
from jax_distill.training.progress import Report
from jax_distill.training.step import (
    TrainState,
    init_state,
    jit_step,
    make_optimizers,
    metric_name,
    moves_of,
    nonfinite,
    with_shardings,
)

Hooks = Sequence[tuple[int, Callable[[int, dict], None]]]
"""(n, function): called with (step, the student's average) every n steps; n = 0 is never."""


class NonFiniteLoss(RuntimeError):
    """Training stopped: a loss or gradient was not finite."""


class Initial(NamedTuple):
    """The student network's initial parameters, made only where a run begins.

    Attributes:
      shapes: of the parameters, nested; any values in them will do.
      make: reads or computes them.
    """

    shapes: dict
    make: Callable[[], dict]


def fit(
    config: ConfigDict,
    workdir: Path,
    objective: Method | Sequence[Method],
    initial: Initial | dict,
    frozen: dict,
    source: Any,
    *,
    hooks: Hooks = (),
    embedder: Embedder | None = None,
) -> dict:
    """Trains until `config.total_steps`, from the latest checkpoint in `workdir` if there is one.

    A run that was stopped, at whatever moment, ends with the parameters of one that was not, bit
    for bit, and with its metrics; on another mesh or another number of processes, to rounding.
    SIGTERM and SIGINT let the step end, save, raise `Interrupted`; where there are several
    processes, in all of them, whichever got the signal.

    Args:
      config: the run's configuration.
      workdir: of this stage; checkpoints, metrics and samples go there.
      objective: what is trained; where the source has pictures of several sizes, one for each of
        them, in their order, which differ in nothing but the size.
      initial: the student network's parameters; as `Initial` they are not made where there is a
        checkpoint, and not kept once there is a state.
      frozen: parameters that no gradient reaches, passed to the loss.
      source: random-access data, see `data/loader.py`.
      hooks: see `Hooks`.
      embedder: of captions that come as token ids; its programs run after the step that is under
        way, and the host does not wait for them.

    Returns:
      The averaged (EMA) parameters of the student.

    Raises:
      NonFiniteLoss: with `on_nonfinite="stop"`, naming the step and the last good checkpoint.
      Interrupted: after saving.
    """
    objectives = objective if isinstance(objective, Sequence) else (objective,)
    objective = objectives[0]
    paths.make_folder(workdir)
    mesh = sharding.make_mesh(config.mesh)
    average = finished(config, workdir, mesh)
    if average is not None:
        acceptance.accept(config, workdir)
        return average
    if not isinstance(initial, Initial):
        initial = Initial(initial, functools.partial(dict, initial))
    optimizers = make_optimizers(objective, config)

    def create(params):
        return init_state(objective, optimizers, params, config.seed, config.ema_dtype)

    abstract = jax.eval_shape(create, initial.shapes)
    shardings = sharding.shard_state(abstract, mesh)
    with (
        Signals() as signals,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
        Report(workdir, config.total_steps, config.batch_size) as report,
    ):
        iterator = stream(config, source, objective, mesh)
        found = checkpoints.restore_latest(with_shardings(abstract, shardings))
        if found is None:
            start, window = 0, {}
            params = initial.make()
            params = sharding.put(params, sharding.shard_state(params, mesh))
            state = jax.jit(create, out_shardings=shardings)(params)
            del params
        else:
            start, (state, position, window) = found
            iterator.set_state(position)
        acceptance.accept(config, workdir)
        if start >= config.total_steps:
            if found is None:  # a stage of no steps: what it starts from is what comes of it
                checkpoints.save(start, state, iterator.get_state())
            return state.players[STUDENT].ema
        sizes = {name: player.params for name, player in state.players.items()}
        what = f"{config.name}: {_count(sizes)} on {_devices()}, in {workdir}"
        total, begins = config.total_steps, "after" if start else "from"
        logging.info("%s, %s step %d of %d", what, begins, start, total)
        report.begin(start, window)

        def program(size: int, turn: tuple[str, ...]) -> Callable:
            return jit_step(objectives[size], optimizers, config, shardings, turn)

        frozen = sharding.put(frozen, sharding.shard_state(frozen, mesh))
        run = _Run(config, objective, functools.cache(program), frozen, checkpoints, report)
        feed = Feed(iterator, mesh, config.batch_size, start, embedder)
        return run.train(state, start, feed, signals, hooks)


def stream(config: ConfigDict, source: Any, objective: Method, mesh: Mesh) -> Batches:
    """The batches of a run, of which this process reads the rows that its devices hold."""
    data = config.data
    return batches(
        source,
        config.batch_size,
        config.seed,
        sharding.local_rows(config.batch_size, mesh),
        example_of_row(config.batch_size, config.accumulate, objective.rows_per_example),
        caption_dropout=data.caption_dropout,
        damaged_share=share_of(data),
        ahead=Ahead(data.threads, data.prefetch, data.workers),
    )


class _Run:
    """The steps of a run, and what is logged, drawn and saved between them."""

    def __init__(
        self,
        config: ConfigDict,
        objective: Method,
        program: Callable[[int, tuple[str, ...]], Callable],
        frozen: dict,
        checkpoints: Checkpoints,
        report: Report,
    ):
        self._config, self._objective = config, objective
        self._checkpoints, self._report = checkpoints, report
        self._program, self._frozen = program, frozen
        self._running: deque[tuple[int, dict]] = deque()  # steps under way and their metrics
        moves = moves_of(objective, config.total_steps)
        self._schedules = {
            name: learning_rate(optimizer_of(config, player.optimizer), moves[name])
            for name, player in objective.players.items()
        }

    def train(
        self, state: TrainState, start: int, feed: Feed, signals: Signals, hooks: Hooks
    ) -> dict:
        """Takes the steps after `start`; returns the student's average."""
        config, total = self._config, self._config.total_steps
        moves = {name: int(player.moves) for name, player in state.players.items()}
        compiled: set[tuple[int, tuple[str, ...]]] = set()
        for step in range(start + 1, total + 1):
            turn = self._objective.turn(step - 1)
            batch = next(feed)
            which = (feed.size, turn)
            state, metrics = self._program(*which)(state, self._frozen, batch)
            if which not in compiled:
                self._report.start_clock(step - 1)
                compiled.add(which)
            moves |= {name: moves[name] + 1 for name in turn}
            self._running.append((step, metrics))
            self._settle(leave=1)  # the last runs while the next batch is made
            last = step == total
            if step % config.log_every == 0 or last:
                self._settle(leave=0)
                self._report.write(step, self._rates(moves))
            for every, hook in hooks:
                if every and step % every == 0:
                    hook(step, state.players[STUDENT].ema)
            stop = processes.preempted() if processes.joined() else signals.received
            if step % config.checkpoint.every == 0 or last or stop:
                self._settle(leave=0)
                self._report.flush()
                # The input's position belongs to the state: both after `step` batches.
                self._checkpoints.save(step, state, feed.get_state(), self._report.window)
            if stop:
                where = self._checkpoints.directory.parent
                raise Interrupted(f"{where}: stopped by a signal, saved at step {step}")
        return state.players[STUDENT].ema

    def _settle(self, leave: int) -> None:
        """Waits for all but the last `leave` steps, and takes in their metrics."""
        while len(self._running) > leave:
            step, metrics = self._running.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(values, step, self._config, self._checkpoints)
            self._report.add(values)

    def _rates(self, moves: Mapping[str, int]) -> dict[str, float]:
        """The learning rates of the players' last moves."""
        return {
            metric_name(self._objective, name, "learning_rate"): float(schedule(moves[name] - 1))
            for name, schedule in self._schedules.items()
            if moves[name]
        }


def finished(config: ConfigDict, workdir: Path, mesh: Mesh) -> dict | None:
    """The averaged parameters of a run that has nothing left to do, and nothing else of its state.

    None where it has: no checkpoint of the last step, or (in a single process, which can go on from
    an earlier one) a damaged one.
    """
    total = config.total_steps
    if not processes.agreed(checkpoint.is_finished(workdir, total)):
        return None
    try:
        average = checkpoint.load_averaged(workdir, mesh, from_step=total)
    except damage.Unreadable:
        raise
    except ValueError:
        if processes.joined():
            raise
        return None
    logging.info("%s: finished at step %d, nothing to do", workdir, total)
    return average


def check_finite(
    metrics: Mapping[str, float], step: int, config: ConfigDict, checkpoints: Checkpoints
) -> None:
    """Raises NonFiniteLoss, or warns, if a loss or gradient of the step is not finite.

    With `on_nonfinite="skip"` its players have not moved, which a warning says.
    """
    players = dict.fromkeys(name.rpartition("/")[0] for name in nonfinite(metrics))
    if not players:
        return
    values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    whose = " and ".join(f"{name}'s" for name in players if name)
    what = f"step {step}: {whose or 'the'} loss or its gradient is not finite ({values})"
    if config.on_nonfinite == "skip":
        logging.warning("%s; %s skipped", what, f"{whose} move" if whose else "step")
        return
    checkpoints.wait()
    good = checkpoints.latest
    where = f"'{checkpoints.directory / str(good)}'" if good is not None else "none yet"
    raise NonFiniteLoss(
        f"{what}; last good checkpoint: {where}; lower optimizer.learning_rate or set"
        " on_nonfinite='skip'"
    )


def _devices() -> str:
    count = jax.device_count()
    return f"{count} {jax.devices()[0].device_kind} device{'s' * (count > 1)}"


def _count(params: dict) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name} parameters"
    return f"{count} parameters"
