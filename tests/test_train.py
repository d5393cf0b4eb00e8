"""The step and the loop: what a step computes, and that a run cannot be told from its restarts."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import SHAPE, Regression, Source, frozen, parameters, small_config, student

from jax_distill.devices.signals import Interrupted
from jax_distill.flow import Batch
from jax_distill.objectives.objective import View
from jax_distill.planning.flops import count_flops
from jax_distill.training import loop
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.step import init_state, kept_share, make_optimizers, make_step


def batch_of(seed, size=4):
    x = np.random.default_rng(seed).standard_normal((size, *SHAPE)).astype(np.float32)
    return Batch(jnp.asarray(x))


class UnboundedInBias(Regression):
    """The same loss, with a gradient by the bias that is infinite."""

    def loss(self, params, view, batch, draws, step):
        loss, metrics = super().loss(params, view, batch, draws, step)
        return loss + jnp.sum(jnp.sqrt(params["network"]["bias"])), metrics


SGD = {"student": optax.sgd(1.0)}
NOISY = Regression()


@functools.cache
def compiled(objective, **changes):
    return jax.jit(make_step(objective, SGD, small_config(**changes)))


def take(steps, *, objective=NOISY, batch=None, bad=(), **changes):
    """States and metrics of some steps of gradient descent, the initial state first."""
    states = [init_state(objective, SGD, parameters(), seed=0)]
    metrics = []
    for _ in range(steps):
        step = compiled(objective, **changes)
        state, values = step(states[-1], frozen(*bad), batch_of(0) if batch is None else batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# The step.


def test_randomness_is_a_function_of_seed_and_step():
    batch = batch_of(0)
    for seed in (0, 7):
        _, metrics = take(3, seed=seed)
        for index, values in enumerate(metrics):
            key = jax.random.fold_in(jax.random.key(seed), index)
            expected = jnp.mean(Regression().draw(key, batch).noise)
            np.testing.assert_allclose(values["noise_mean"], expected, rtol=1e-5, atol=1e-7)
    draws = {float(values["noise_mean"]) for s in (0, 7) for values in take(3, seed=s)[1]}
    assert len(draws) == 6


def test_accumulated_gradient_is_the_mean_gradient():
    accumulate, objective, batch = 4, Regression(noise_scale=0.0), batch_of(0)
    whole, single = take(1, objective=objective)
    parts, _ = take(1, objective=objective, accumulate=accumulate)
    expected = jax.tree.leaves(student(whole[1]).params)
    for a, b in zip(expected, jax.tree.leaves(student(parts[1]).params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # And micro-batches that are all alike give the gradient of one.
    copies = Batch(jnp.concatenate([batch.x] * accumulate))
    alike, metrics = take(1, objective=objective, batch=copies, accumulate=accumulate)
    for a, b in zip(expected, jax.tree.leaves(student(alike[1]).params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics[0]["loss"], single[0]["loss"], rtol=1e-6)


def test_micro_batches_draw_numbers_of_their_own():
    copies = Batch(jnp.concatenate([batch_of(0).x] * 2))
    _, metrics = take(1, batch=copies, accumulate=2)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    means = [float(jnp.mean(Regression().draw(key, batch_of(0)).noise)) for key in keys]
    assert abs(means[0] - means[1]) > 1e-3
    np.testing.assert_allclose(metrics[0]["noise_mean"], np.mean(means), rtol=1e-5)


@pytest.mark.parametrize("warmup", [10.0, 1.0])
def test_average_follows_its_formula_and_warms_up(warmup):
    decay = 0.25
    states, _ = take(6, ema_decay=decay, ema_warmup=warmup)
    states = [student(state) for state in states]
    average = states[0].params
    decays = []
    for index, state in enumerate(states[1:]):
        decays.append(min(decay, (1 + index) / (warmup + index)))
        average = jax.tree.map(
            lambda a, p, d=decays[-1]: d * np.float64(a) + (1 - d) * p, average, state.params
        )
        for a, b in zip(jax.tree.leaves(average), jax.tree.leaves(state.ema)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert decays[0] == min(decay, 1 / warmup) and decays[-1] == decay


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_an_average_by_a_power_of_the_moves_is_as_wide_as_asked(width):
    """It weighs the parameters after each move; those weights' standard deviation is s times N."""
    moves = np.arange(20_000)
    with jax.enable_x64(True):
        kept = np.asarray(kept_share(small_config(ema_power=width), jnp.asarray(moves)))
    assert kept[0] == 0  # nothing of the initial parameters is left
    after = np.cumprod(kept[:0:-1])[::-1]
    weights = (1 - kept) * np.append(after, 1)
    np.testing.assert_allclose(weights.sum(), 1)
    time = (moves + 1) / len(moves)
    mean = (weights * time).sum()
    np.testing.assert_allclose(np.sqrt((weights * (time - mean) ** 2).sum()), width, rtol=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    states, metrics = take(4, bad=[3])
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]
    states = [student(state) for state in states]
    assert same(states[2][:3], states[3][:3])  # parameters, average, optimizer
    assert [int(s.moves) for s in states] == [0, 1, 2, 3, 4]
    assert [int(s.skipped) for s in states] == [0, 0, 0, 1, 1]
    assert [int(m["skipped"]) for m in metrics] == [0, 0, 1, 1]
    assert not same(states[3].params, states[4].params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[4]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_parameters_count_neither_in_the_norm_nor_in_the_finite_check(accumulate):
    """All else is as with the gradient of all parameters, whose frozen part the optimizer drops."""
    config = small_config(optimizer__frozen="kernel|bias", accumulate=accumulate)
    objective, batch = UnboundedInBias(), batch_of(0)
    optimizers = make_optimizers(objective, config)
    optimizer = optimizers["student"]
    state = init_state(objective, optimizers, parameters(), seed=0)
    step = jax.jit(make_step(objective, optimizers, config))

    @jax.jit
    def gradient(params, index):
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        keys = [key] if accumulate == 1 else jax.random.split(key, accumulate)
        total = jax.tree.map(jnp.zeros_like, params)
        for turn, key in enumerate(keys):
            part = Batch(batch.x[turn::accumulate])
            draws = objective.draw(key, part)
            new = jax.grad(objective.loss, has_aux=True)(
                params, View(frozen()), part, draws, index
            )[0]
            total = jax.tree.map(jnp.add, total, new)
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    params, opt_state = student(state).params, student(state).opt_state
    for index in range(4):
        whole = gradient(params, index)
        assert not np.isfinite(whole["network"]["bias"]).all()
        updates, opt_state = optimizer.update(whole, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, frozen(), batch)
        np.testing.assert_allclose(
            metrics["gradient_norm"], jnp.linalg.norm(whole["head"]), rtol=1e-5
        )
    found = student(state)
    assert int(found.skipped) == 0 and same(found.params["network"], parameters())
    np.testing.assert_allclose(found.params["head"], params["head"], rtol=1e-6)
    assert not same(found.params["head"], objective.init_student(jax.random.key(0), {})["head"])


def test_no_gradient_of_a_frozen_parameter_is_made():
    def flops(pattern):
        config = small_config(optimizer__frozen=pattern)
        optimizers = make_optimizers(NOISY, config)
        state = init_state(NOISY, optimizers, parameters(), seed=0)
        return count_flops(make_step(NOISY, optimizers, config), state, frozen(), batch_of(0))

    product = 2 * 4 * SHAPE[0] * 8 * 8  # of the batch and the kernel's gradient
    assert flops("bias") - flops("kernel") >= product


# The loop.


class Killed(Exception):
    pass


def fit(workdir, *, bad=(), die=None, stop=None, **changes):
    """Trains; dies of an exception, or is sent SIGTERM, in the midst of the step given."""

    def hook(step, params):
        del params
        if step == die:
            raise Killed
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return loop.fit(
        small_config(**changes),
        workdir,
        Regression(),
        parameters(),
        frozen(*bad),
        Source(),
        hooks=[(1, hook)],
    )


def final_state(workdir, step=12, **changes):
    config = small_config(**changes)
    optimizers = make_optimizers(Regression(), config)
    like = init_state(Regression(), optimizers, parameters(), config.seed)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == step
        return checkpoints.restore(step, like)


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "per_sec")
    return [{k: v for k, v in line.items() if not any(c in k for c in clock)} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    fit(workdir)
    return workdir


class Pairs(Regression):
    """Of examples that have two rows each, which it compares."""

    rows_per_example = 2

    def loss(self, params, view, batch, draws, step):
        loss, metrics = super().loss(params, view, batch, draws, step)
        apart = jnp.max(jnp.abs(batch.x[::2] - batch.x[1::2]))
        alike = jnp.max(jnp.abs(draws.noise[::2] - draws.noise[1::2]))
        return loss, {**metrics, "apart": apart, "noise_apart": alike}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_of_one_example_meet_in_a_micro_batch(tmp_path, accumulate):
    config = small_config(total_steps=6, accumulate=accumulate, batch_size=8)
    loop.fit(config, tmp_path, Pairs(), parameters(), frozen(), Source())
    assert all(line["apart"] == 0 < line["noise_apart"] for line in logged(tmp_path))


@pytest.mark.parametrize(
    "interruptions",
    [
        [{"stop": 1}],
        [{"stop": 4}, {"stop": 7}],  # where a checkpoint is due anyway; between two log lines
        [{"stop": 12}],  # the last step
        [{"die": 2}],  # before the first checkpoint
        [{"die": 6}, {"die": 11}, {"stop": 11}],  # the same steps twice
    ],
    ids=str,
)
def test_a_restarted_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path, uninterrupted, interruptions
):
    for interruption in interruptions:
        with pytest.raises(Interrupted if "stop" in interruption else Killed) as caught:
            fit(tmp_path, **interruption)
        if "stop" in interruption:
            assert f"saved at step {interruption['stop']}" in str(caught.value)
            assert (tmp_path / "checkpoints" / str(interruption["stop"])).is_dir()
    average = fit(tmp_path)
    expected, found = final_state(uninterrupted), final_state(tmp_path)
    assert same(expected.state, found.state) and same(average, student(expected.state).ema)
    assert expected.position == found.position
    assert logged(tmp_path) == logged(uninterrupted)


def test_two_stages_share_parameters_and_a_step_takes_none_away(uninterrupted, tmp_path):
    params = parameters()
    constants = {**frozen(), "teacher": params}
    loop.fit(small_config(), tmp_path, Regression(), params, constants, Source())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert same(params, parameters())
    assert same(final_state(tmp_path).state, final_state(uninterrupted).state)


def test_the_state_is_donated():
    config = small_config()
    optimizers = make_optimizers(Regression(), config)
    state = init_state(Regression(), optimizers, parameters(), 0)
    state = jax.tree.map(jnp.copy, state)
    step = make_step(Regression(), optimizers, config)
    lowered = jax.jit(step, donate_argnums=0).lower(state, frozen(), batch_of(0)).as_text()
    assert lowered.count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_metrics_lines_hold_means_since_the_line_before(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for line in lines:
        assert {"loss", "gradient_norm", "skipped", "learning_rate", "noise_mean"} < line.keys()
        assert {"time", "steps_per_sec", "examples_per_sec"} < line.keys()
    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(3)]
    means = [jnp.mean(jax.random.normal(key, (4, *SHAPE))) for key in keys]
    np.testing.assert_allclose(lines[0]["noise_mean"], np.mean(means), rtol=1e-5)


def test_only_wall_clock_figures_differ_between_equal_runs(uninterrupted, tmp_path):
    fit(tmp_path)
    assert logged(tmp_path) == logged(uninterrupted)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_finished_run_says_so_and_does_nothing(uninterrupted, capfd):
    def files():
        return {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}

    before = files()
    average = fit(uninterrupted)
    assert files() == before
    assert same(average, student(final_state(uninterrupted).state).ema)
    average = fit(uninterrupted, total_steps=5)
    assert files() == before


def test_a_finished_run_can_be_made_longer(tmp_path):
    fit(tmp_path, total_steps=6, optimizer__schedule="constant")
    fit(tmp_path, total_steps=8, optimizer__schedule="constant")
    assert [line["step"] for line in logged(tmp_path)] == [3, 6, 8]


def test_the_latest_checkpoints_are_kept(tmp_path):
    fit(tmp_path, checkpoint__every=2, checkpoint__keep=3)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"8", "10", "12"}


@pytest.mark.parametrize("bad", [3, 7, 12])
def test_a_loss_that_is_not_finite_stops_with_all_that_one_needs(tmp_path, bad):
    with pytest.raises(loop.NonFiniteLoss) as caught:
        fit(tmp_path, bad=[bad])
    message = str(caught.value)
    assert f"step {bad}:" in message and "loss inf" in message and "noise_mean" in message
    good = (bad - 1) // 4 * 4
    if good:
        assert str(tmp_path / "checkpoints" / str(good)) in message
        assert (tmp_path / "checkpoints" / str(good)).is_dir()
    else:
        assert "none yet" in message
    with pytest.raises(loop.NonFiniteLoss, match=f"step {bad}:"):  # and again
        fit(tmp_path, bad=[bad])


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    fit(tmp_path, bad=[4, 5, 6, 8], on_nonfinite="skip")
    lines = logged(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 3, 4, 4]
    assert lines[1]["loss"] is None and np.isfinite(lines[2]["loss"])
    assert int(student(final_state(tmp_path).state).skipped) == 4
    strict = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in strict and "Infinity" not in strict


def test_a_damaged_checkpoint_does_not_stop_a_restart(tmp_path, uninterrupted):
    with pytest.raises(Interrupted):
        fit(tmp_path, stop=10)
    directory = tmp_path / "checkpoints"
    largest = max((directory / "10" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    killed = directory / "11.orbax-checkpoint-tmp"  # as a save that was killed leaves it
    killed.mkdir()
    (killed / "state").write_text("half")
    fit(tmp_path)
    assert same(final_state(tmp_path).state, final_state(uninterrupted).state)
    assert logged(tmp_path) == logged(uninterrupted)
    assert not killed.exists()


DRIVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from regression import Regression, Source, frozen, parameters, small_config
    from jax_distill import main
    from jax_distill.runs import checks, commands, experiment
    from jax_distill.training import loop

    def run(config, workdir):
        def hook(step, params):
            print("step", step, flush=True)
        config = small_config(total_steps=10**6)
        start = config, workdir, Regression(), parameters(), frozen(), Source()
        loop.fit(*start, hooks=[(1, hook)])

    checks.check = lambda config, workdir: None
    experiment.run = run
    commands.run(main.main)
"""


def test_sigterm_saves_and_exits_with_zero(tmp_path):
    root = Path(__file__).parents[1]
    driver = textwrap.dedent(DRIVER).format(tests=str(root / "tests"))
    command = [sys.executable, "-c", driver, "--config=configs/teacher.py", f"--workdir={tmp_path}"]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line == "step 5\n":
                process.send_signal(signal.SIGTERM)
                break
        # Not `communicate`, which loses what the loop above has read ahead.
        out, errors = process.stdout.read(), process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 0, errors
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved at step {saved}; run the same command to go on" in errors
    # Within the step: no further one was begun after the signal had come.
    steps = [int(line.split()[1]) for line in out.splitlines() if line.startswith("step")]
    assert saved == max([5, *steps])
    assert "Traceback" not in errors and "I1" not in errors
