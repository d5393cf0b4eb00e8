"""Every record once an epoch, by its key, on 1, then 4, then 2 processes, some records damaged."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from regression import SHAPE
from test_mixture import Named

from jax_distill.data.loader import batches
from jax_distill.data.mixture import Mixture, Part
from jax_distill.flow import Batch

ROOT = Path(__file__).parents[1]
COUNT, BAD, FIRST = 24, (3, 17), 100  # of the larger source; where the smaller one begins
BATCH, STEPS = 4, (6, 14, 27)  # steps when each start ends: three epochs of 36 records
PROCESSES = (1, 4, 2)


class Keyed(Named):
    """Records whose first number is their key; some cannot be read, and raise that."""

    def __getitem__(self, index):
        key = super().__getitem__(index).x[0, 0]
        x = np.random.default_rng(int(key)).standard_normal(SHAPE).astype(np.float32)
        x[0, 0] = key
        return Batch(x)


def mixture():
    """Two sources; the smaller one lacks keys that were left out when it was prepared."""
    return Mixture([Part(Keyed(0, COUNT, bad=BAD), 2.0), Part(Keyed(FIRST, COUNT // 2), 1.0)])


def check_keys(keys):
    """Checks three epochs of keys in the order that they were given in.

    Every one that can be read comes once an epoch; in the place of one that cannot, another one of
    its source.
    """
    keys = np.asarray(keys)
    for first, count, bad in ((0, COUNT, BAD), (FIRST, COUNT // 2, ())):
        mine = keys[(keys >= first) & (keys < first + FIRST)] - first
        assert len(mine) == 3 * count
        for epoch in mine.reshape(3, count):
            times = np.bincount(epoch, minlength=count)
            assert set(np.flatnonzero(times == 0)) == set(bad)
            assert times.sum() == count and times.max() <= 1 + len(bad)


def test_rows_of_any_number_of_processes_make_the_same_epochs():
    """Simulated: each process reads its rows of the stream."""
    position, given, step = {"examples": 0}, [], 0
    for processes, until in zip(PROCESSES, STEPS):
        shares = np.split(np.arange(BATCH), processes)
        runs = [batches(mixture(), BATCH, 5, rows, damaged_share=0.1) for rows in shares]
        for run in runs:
            run.set_state(json.loads(json.dumps(position)))
        for _ in range(step, until):
            given.extend(np.concatenate([next(run).x[:, 0, 0] for run in runs]).astype(int))
        position, step = runs[0].get_state(), until
    check_keys(given)
    whole = batches(mixture(), BATCH, 5, damaged_share=0.1)
    expected = [next(whole).x[:, 0, 0].astype(int) for _ in range(STEPS[-1])]
    np.testing.assert_array_equal(given, np.concatenate(expected))


DRIVER = """
    import json, os, sys
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, {tests!r})
    import jax, numpy as np
    from regression import Regression, frozen, parameters, small_config
    from test_exactly_once import BATCH, mixture
    from jax_distill import main
    from jax_distill.devices import sharding
    from jax_distill.runs import checks, commands, experiment
    from jax_distill.training import loop

    shard_batch = sharding.shard_batch

    def noted(batch, mesh):
        rows = sharding.local_rows(BATCH, mesh).tolist()
        with open(f"{notes}-{{jax.process_index()}}", "a") as file:
            line = {{"rows": rows, "keys": np.asarray(batch.x)[:, 0, 0].astype(int).tolist()}}
            print(json.dumps(line), file=file)
        return shard_batch(batch, mesh)

    def run(config, workdir):
        sharding.shard_batch = noted
        config = small_config(total_steps={steps}, data__damaged="skip", data__damaged_share=0.1)
        loop.fit(config, workdir, Regression(), parameters(), frozen(), mixture())

    checks.check = lambda config, workdir: None
    experiment.run = run
    commands.run(main.main)
"""


def start(folder, count, steps):
    """Runs so many processes until a step; the keys of each batch that they took."""
    notes = folder / f"notes-{count}"
    code = textwrap.dedent(DRIVER).format(tests=str(ROOT / "tests"), notes=str(notes), steps=steps)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", code, f"--config={ROOT}/configs/teacher.py"]
    command += [f"--workdir={folder / 'run'}", f"--coordinator_address=localhost:{port}"]
    command += [f"--num_processes={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, f"--process_id={i}"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(count)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), "\n".join(errors)
    return [Path(f"{notes}-{i}").read_text().splitlines() for i in range(count)], errors


@pytest.mark.slow
def test_every_record_comes_once_an_epoch_over_restarts_of_1_4_and_2_processes(tmp_path):
    given, warned = [], ""
    for count, steps in zip(PROCESSES, STEPS):
        notes, errors = start(tmp_path, count, steps)
        warned += "".join(errors)
        for lines in zip(*notes, strict=True):
            keys = np.full(BATCH, -1)
            for line in map(json.loads, lines):
                keys[line["rows"]] = line["keys"]
            given.extend(keys)
    assert len(given) == BATCH * STEPS[-1]
    check_keys(given)
    whole = batches(mixture(), BATCH, 0, damaged_share=0.1)
    expected = [next(whole).x[:, 0, 0].astype(int) for _ in range(STEPS[-1])]
    np.testing.assert_array_equal(given, np.concatenate(expected))
    for index in BAD:
        assert f"example {index} of 'here' is damaged" in warned
