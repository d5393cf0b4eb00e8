"""The training loop: one jitted, sharded step, and everything a long run needs around it."""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_distill import streams
from jax_distill.data.loader import batches, example_of_row
from jax_distill.devices import processes, sharding
from jax_distill.devices.signals import Interrupted, Signals
from jax_distill.objectives.objective import Batch, Objective
from jax_distill.training import acceptance, checkpoint, damage, rounding
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.optimizer import learning_rate, make_optimizer, trained
from jax_distill.training.progress import Report

INIT_STREAM = 2**32 - 1  # apart from the streams of the steps
ROUNDING_STREAM = 2**32 - 2  # of a step


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # steps taken
    params: dict
    ema: dict  # running average of params, what is sampled from
    opt_state: Any
    skipped: jax.Array  # steps left out because their loss or gradient was not finite


class NonFiniteLoss(RuntimeError):
    """Training stopped: a loss or gradient was not finite."""


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    params: dict,
    seed: int,
    ema_dtype: str = "float32",
) -> TrainState:
    """A state at step zero from the student's initial network parameters, made float32."""
    params = objective.init(jax.random.fold_in(streams.key(seed), INIT_STREAM), params)
    params = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
    zero = jnp.zeros((), jnp.int32)
    average = rounding.narrow(params, ema_dtype)
    return TrainState(zero, params, average, optimizer.init(params), zero)


def partition(tree: Any, chosen: Any) -> tuple[Any, Any]:
    """The chosen leaves of a tree and the others: None, which is no leaf, in a leaf's place."""
    return (
        jax.tree.map(lambda leaf, is_chosen: leaf if is_chosen else None, tree, chosen),
        jax.tree.map(lambda leaf, is_chosen: None if is_chosen else leaf, tree, chosen),
    )


def combine(chosen: Any, others: Any) -> Any:
    """The tree that `partition` took apart."""

    def is_none(leaf):
        return leaf is None

    return jax.tree.map(lambda a, b: b if a is None else a, chosen, others, is_leaf=is_none)


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, (state, frozen, batch) -> (state, metrics), to be jitted.

    Its randomness is a function of (seed, step). A step whose loss or gradient is not finite
    changes nothing but the counters. The gradient is that of the trained parameters alone.
    """

    def step(state: TrainState, frozen: dict, batch: Batch):
        key = jax.random.fold_in(streams.key(config.seed), state.step)
        frozen = {**frozen, "average": state.ema}
        is_trained = trained(config.optimizer, state.params)
        learned, constant = partition(state.params, is_trained)

        def loss_and_gradient(batch, key):
            draws = objective.draw(key, batch)

            def loss_of(learned):
                params = combine(learned, constant)
                return objective.loss(params, frozen, batch, draws, state.step)

            (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(learned)
            return {"loss": loss, **metrics}, gradient

        if config.accumulate == 1:
            metrics, gradient = loss_and_gradient(batch, key)
        else:
            # Rows in turns: each device splits its own, and none moves.
            micro = jax.tree.map(
                lambda x: x.reshape(-1, config.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
            )
            keys = jax.random.split(key, config.accumulate)
            shapes = jax.eval_shape(loss_and_gradient, jax.tree.map(lambda x: x[0], micro), key)

            def add(total, inputs):
                return jax.tree.map(jnp.add, total, loss_and_gradient(*inputs)), None

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, (micro, keys))
            metrics, gradient = jax.tree.map(lambda leaf: leaf / config.accumulate, total)

        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        gradient = combine(gradient, jax.tree.map(jnp.zeros_like, constant))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, rounding.widen(state.ema), 1 - decay)
        ema = rounding.narrow_as(jax.random.fold_in(key, ROUNDING_STREAM), ema, state.ema)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params, ema, opt_state = keep_if_finite(
            (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        )
        state = TrainState(state.step + 1, params, ema, opt_state, state.skipped + ~finite)
        return state, {**metrics, "gradient_norm": norm, "skipped": state.skipped}

    return step


def jit_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: TrainState,
) -> Any:
    """`make_step`, jitted: the state is donated, and comes back under the same shardings."""
    step = make_step(objective, optimizer, config)
    mesh = shardings.step.mesh

    def placed(state: TrainState, frozen: dict, batch: Batch):
        with sharding.activations_on(mesh, split_tokens=config.mesh.split_tokens):
            return step(state, frozen, batch)

    return jax.jit(placed, donate_argnums=0, out_shardings=(shardings, None))


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
    objective: Objective,
    initial: Initial | dict,
    frozen: dict,
    source: Any,
    *,
    hooks: Sequence[tuple[int, Callable[[int, dict], None]]] = (),
) -> dict:
    """Trains until `config.total_steps`, from the latest checkpoint in `workdir` if there is one.

    A run that was stopped, at whatever moment, ends with the parameters of one that was not, bit
    for bit, and with its metrics; on another mesh or another number of processes, to rounding.
    SIGTERM and SIGINT let the step end, save, raise `Interrupted`; where there are several
    processes, in all of them, whichever got the signal.

    Args:
      config: the run's configuration.
      workdir: of this stage; checkpoints, metrics and samples go there.
      objective: what is trained.
      initial: the student network's parameters; as `Initial` they are not made where there is a
        checkpoint, and not kept once there is a state.
      frozen: parameters that no gradient reaches, passed to the loss.
      source: random-access data, see `data/loader.py`.
      hooks: (n, function): called with (step, averaged parameters) every n steps; n = 0 is never.

    Returns:
      The averaged (EMA) parameters.

    Raises:
      NonFiniteLoss: with `on_nonfinite="stop"`, naming the step and the last good checkpoint.
      Interrupted: after saving.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(config.mesh)
    average = finished(config, workdir, mesh)
    if average is not None:
        acceptance.accept(config, workdir)
        return average
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    if not isinstance(initial, Initial):
        initial = Initial(initial, functools.partial(dict, initial))

    def create(params):
        return init_state(objective, optimizer, params, config.seed, config.ema_dtype)

    abstract = jax.eval_shape(create, initial.shapes)
    shardings = sharding.shard_state(abstract, mesh)
    total = config.total_steps
    with (
        Signals() as signals,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
        Report(workdir, total, config.batch_size) as report,
    ):
        rows = sharding.local_rows(config.batch_size, mesh)
        layout = example_of_row(config.batch_size, config.accumulate, objective.rows_per_example)
        iterator = batches(source, config.batch_size, config.seed, rows, layout)
        found = checkpoints.restore_latest(with_shardings(abstract, shardings))
        if found is None:
            start, window = 0, {}
            params = initial.make()
            params = sharding.put(params, sharding.shard_state(params, mesh))
            state = jax.jit(create, out_shardings=shardings)(params)
            del params
        else:
            start, (state, position, window) = found
            iterator.set_state(
                acceptance.in_examples(
                    position, workdir, config.batch_size, objective.rows_per_example
                )
            )
        acceptance.accept(config, workdir)
        if start >= total:
            if found is None:  # a stage of no steps: what it starts from is what comes of it
                checkpoints.save(start, state, iterator.get_state())
            return state.ema
        what = f"{config.name}: {_count(state.params)} on {_devices()}, in {workdir}"
        logging.info("%s, %s step %d of %d", what, "after" if start else "from", start, total)

        frozen = sharding.put(frozen, sharding.shard_state(frozen, mesh))
        train_step = jit_step(objective, optimizer, config, shardings)
        schedule = learning_rate(config.optimizer, total)
        report.begin(start, window)
        running: deque[tuple[int, dict]] = deque()  # steps under way and their metrics

        def settle(leave: int) -> None:
            """Waits for all but the last `leave` steps, and looks at what came of them."""
            while len(running) > leave:
                step, metrics = running.popleft()
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                check_finite(values, step, config, checkpoints)
                report.add(values)

        for step in range(start + 1, total + 1):
            batch = sharding.shard_batch(next(iterator), mesh)
            state, metrics = train_step(state, frozen, batch)
            if step == start + 1:
                report.start_clock()  # the step is compiled
            running.append((step, metrics))
            settle(leave=1)  # the last runs while the next batch is made
            last = step == total
            if step % config.log_every == 0 or last:
                settle(leave=0)
                report.write(step, float(schedule(step - 1)))
            for every, hook in hooks:
                if every and step % every == 0:
                    hook(step, state.ema)
            stop = processes.preempted() if processes.joined() else signals.received
            if step % config.checkpoint.every == 0 or last or stop:
                settle(leave=0)
                # The input's position belongs to the state: both after `step` batches.
                checkpoints.save(step, state, iterator.get_state(), report.window)
            if stop:
                break
        if stop:
            raise Interrupted(f"{workdir}: stopped by a signal, saved at step {step}")
    return state.ema


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
    metrics: dict[str, float], step: int, config: ConfigDict, checkpoints: Checkpoints
) -> None:
    """Raises NonFiniteLoss, or warns, if the step's loss or gradient is not finite.

    With `on_nonfinite="skip"` the step has changed nothing, which a warning says.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return
    values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
    what = f"step {step}: the loss or its gradient is not finite ({values})"
    if config.on_nonfinite == "skip":
        logging.warning("%s; step skipped", what)
        return
    checkpoints.wait()
    good = checkpoints.latest
    where = f"'{checkpoints.directory / str(good)}'" if good is not None else "none yet"
    raise NonFiniteLoss(
        f"{what}; last good checkpoint: {where}; lower optimizer.learning_rate or set"
        " on_nonfinite='skip'"
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and types of a tree, with the places of a tree of shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
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
