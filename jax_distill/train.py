"""The training loop: one jitted, sharded step, and everything a long run needs around it."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from clu import metric_writers
from ml_collections import ConfigDict

from jax_distill import parallel
from jax_distill.checkpoint import Checkpoints
from jax_distill.data.pipeline import batches
from jax_distill.objectives.objective import Batch, Objective
from jax_distill.optimizer import learning_rate, make_optimizer

INIT_STREAM = 2**32 - 1  # apart from the streams of the steps


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # steps taken
    params: dict
    ema: dict  # running average of params, what is sampled from
    opt_state: Any
    skipped: jax.Array  # steps left out because their loss or gradient was not finite


class NonFiniteLoss(RuntimeError):
    """Training stopped: a loss or gradient was not finite."""


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, params: dict, seed: int
) -> TrainState:
    """A state at step zero from the student's initial network parameters."""
    params = objective.init(jax.random.fold_in(jax.random.key(seed), INIT_STREAM), params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, params, optimizer.init(params), zero)


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, config: ConfigDict
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, (state, frozen, batch) -> (state, metrics), to be jitted.

    Its randomness is a function of (seed, step). A step whose loss or gradient is not finite
    changes nothing but the counters.
    """

    def step(state: TrainState, frozen: dict, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_and_gradient(batch, key):
            draws = objective.draw(key, batch)
            (loss, metrics), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
                state.params, frozen, batch, draws, state.step
            )
            return {"loss": loss, **metrics}, gradient

        if config.accumulate == 1:
            metrics, gradient = loss_and_gradient(batch, key)
        else:
            micro = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), batch)
            keys = jax.random.split(key, config.accumulate)
            shapes = jax.eval_shape(loss_and_gradient, jax.tree.map(lambda x: x[0], micro), key)

            def add(total, inputs):
                return jax.tree.map(jnp.add, total, loss_and_gradient(*inputs)), None

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, (micro, keys))
            metrics, gradient = jax.tree.map(lambda leaf: leaf / config.accumulate, total)

        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        params, ema, opt_state = keep_if_finite(
            (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        )
        state = TrainState(state.step + 1, params, ema, opt_state, state.skipped + ~finite)
        return state, {**metrics, "gradient_norm": norm, "skipped": state.skipped}

    return step


def fit(
    config: ConfigDict,
    workdir: Path,
    objective: Objective,
    params: dict,
    frozen: dict,
    source: Any,
    *,
    preview: Callable[[int, dict], None] | None = None,
) -> dict:
    """Trains until `config.total_steps`, from the latest checkpoint in `workdir` if there is one.

    A run that was stopped, at whatever moment, ends with the parameters of one that was not, bit
    for bit. SIGTERM and SIGINT save and raise `Interrupted`.

    Args:
      config: the run's configuration.
      workdir: of this stage; checkpoints, metrics and samples go there.
      objective: what is trained.
      params: the student network's initial parameters.
      frozen: parameters that no gradient reaches, passed to the loss.
      source: random-access data, see `data/pipeline.py`.
      preview: called with (step, averaged parameters) every `config.samples.every` steps.

    Returns:
      The averaged (EMA) parameters.

    Raises:
      NonFiniteLoss: with `on_nonfinite="stop"`, naming the step and the last good checkpoint.
      Interrupted: after saving.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = parallel.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.total_steps)

    def create(params):
        return init_state(objective, optimizer, params, config.seed)

    shardings = parallel.shard_state(jax.eval_shape(create, params), mesh)
    state = jax.jit(create, out_shardings=shardings)(params)
    frozen = jax.device_put(frozen, parallel.shard_state(frozen, mesh))
    iterator = batches(source, config.batch_size, config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(checkpoints.latest, state)
        iterator.set_state(position)
    start = int(state.step)
    if start >= config.total_steps:
        logging.info("%s: finished at step %d, nothing to do", workdir, start)
        checkpoints.close()
        return state.ema
    logging.info("%s: %s at step %d", workdir, "resuming" if start else "starting", start)

    train_step = jax.jit(
        make_step(objective, optimizer, config), donate_argnums=0, out_shardings=(shardings, None)
    )
    schedule = learning_rate(config.optimizer, config.total_steps)
    report = Report(workdir, start, config.total_steps, config.batch_size)

    def save(step):
        # The position belongs to the state: both after `step` batches.
        checkpoints.save(step, state, iterator.get_state())

    with Signals() as signals:
        pending = None  # metrics of the last step, read once the next one is under way
        for step in range(start + 1, config.total_steps + 1):
            batch = parallel.shard_batch(next(iterator), mesh)
            state, metrics = train_step(state, frozen, batch)
            if pending is not None:
                check_finite(pending, step - 1, config, checkpoints)
            pending = metrics
            report.add(metrics)
            if step % config.log_every == 0 or step == config.total_steps:
                report.write(step, {"learning_rate": float(schedule(step - 1))})
            if config.samples.every and step % config.samples.every == 0 and preview:
                preview(step, state.ema)
            last = step == config.total_steps
            if last or signals.received or step % config.checkpoint.every == 0:
                check_finite(metrics, step, config, checkpoints)
                save(step)
            if signals.received and not last:
                checkpoints.wait()
                report.close()
                checkpoints.close()
                raise Interrupted(f"{workdir}: stopped by a signal, saved at step {step}")
    checkpoints.wait()
    report.close()
    checkpoints.close()
    return state.ema


def check_finite(metrics: dict, step: int, config: ConfigDict, checkpoints: Checkpoints) -> None:
    """Raises NonFiniteLoss if the step's loss or gradient is not finite and that is to stop us."""
    if config.on_nonfinite == "skip":
        return
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return
    checkpoints.wait()
    values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())
    good = checkpoints.latest
    where = f"'{checkpoints.directory / str(good)}'" if good is not None else "none yet"
    raise NonFiniteLoss(
        f"step {step}: the loss or its gradient is not finite ({values}); last good checkpoint:"
        f" {where}; lower optimizer.learning_rate or set on_nonfinite='skip'"
    )


class Signals:
    """Notes SIGTERM and SIGINT instead of dying of them, so that a step can end and be saved."""

    def __enter__(self) -> "Signals":
        self.received = False
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number, frame) -> None:
        del frame
        self.received = True

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Report:
    """Progress on the terminal, TensorBoard events, and one line of metrics.jsonl a logged step."""

    def __init__(self, workdir: Path, start: int, total: int, batch_size: int):
        self._active = jax.process_index() == 0
        self._path = workdir / "metrics.jsonl"
        self._total, self._batch_size = total, batch_size
        self._pending: list[dict] = []
        self._begun = self._last = time.monotonic()
        self._start = self._last_step = start
        if self._active:
            self._forget_after(start)
            self._writer = metric_writers.create_default_writer(
                str(workdir), just_logging=False, asynchronous=True
            )

    def _forget_after(self, step: int) -> None:
        """Lines of steps that will be taken again are dropped, atomically."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:  # the last line of a killed run may be half a line
                continue
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._path)

    def add(self, metrics: dict) -> None:
        self._pending.append(metrics)

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Averages what was added since the last line and writes it."""
        values = jax.device_get(self._pending)
        self._pending = []
        mean = {name: float(sum(v[name] for v in values) / len(values)) for name in values[0]}
        mean["skipped"] = int(values[-1]["skipped"])
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        line = {
            **mean,
            **extra,
            "steps_per_sec": rate,
            "examples_per_sec": rate * self._batch_size,
            "time": now - self._begun,
        }
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        self._writer.write_scalars(step, line)
        remaining = (self._total - step) / max(rate, 1e-9)
        logging.info(
            "step %d/%d  loss %.4f  %.0f examples/s  %s left",
            step,
            self._total,
            mean["loss"],
            line["examples_per_sec"],
            f"{int(remaining // 60)}:{int(remaining % 60):02d}",
        )

    def close(self) -> None:
        if self._active:
            self._writer.close()
