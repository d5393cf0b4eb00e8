"""Several processes: how they find each other; that the run is the one of a single process.

With -m slow two of them train; four as well with JAX_DISTILL_SLOW_TESTS=1.
"""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from regression import Regression, Source, frozen, parameters, small_config

from jax_distill.devices import clusters, lost_report, processes
from jax_distill.runs import commands
from jax_distill.training import loop
from jax_distill.training.checkpoint import Checkpoints
from jax_distill.training.step import init_state, make_optimizers

ROOT = Path(__file__).parents[1]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def join(monkeypatch):
    """Joins with flags and an environment; returns what `jax.distributed` is asked, if it is."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: asked.append((*a, k)))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(lost_report, "shorten", lambda: None)
    for name in (*VARIABLES, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def run(given, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        values = flags.FlagValues()
        with monkeypatch.context() as patch:
            patch.setattr(flags, "FLAGS", values)
            patch.setattr(flags, "DEFINE_string", _into(flags.DEFINE_string, values))
            patch.setattr(flags, "DEFINE_integer", _into(flags.DEFINE_integer, values))
            processes.define_flags()
            values(["main", *given])
            processes.join()
        return asked

    return run


def _into(define, values):
    return lambda *arguments: define(*arguments, flag_values=values)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ([], {}, []),
        (["--num_processes=1"], SLURM, []),
        (["--num_processes=1"], {"JAX_PROCESS_ID": "3"}, []),
        ([], {**SLURM, "SLURM_NTASKS": "1"}, []),
        ([], SLURM, [(None, None, None)]),  # `jax.distributed` finds out itself
        (
            ["--coordinator_address=host:1", "--num_processes=4", "--process_id=3"],
            {},
            [("host:1", 4, 3)],
        ),
        ([], dict(zip(VARIABLES, ("host:2", "2", "1"))), [("host:2", 2, 1)]),
        (["--process_id=0"], dict(zip(VARIABLES, ("host:2", "2", "1"))), [("host:2", 2, 0)]),
    ],
)
def test_processes_are_named_by_flags_by_variables_or_by_the_cluster(
    join, given, environment, expected
):
    asked = join([*given, "--heartbeat_timeout_seconds=9"], environment)
    assert asked == [(*call, {"heartbeat_timeout_seconds": 9}) for call in expected]


def test_what_is_missing_is_said(join, monkeypatch):
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: 'two' is not a whole number"):
        join([], {"JAX_NUM_PROCESSES": "two"})

    for index, count in ((2, 2), (5, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"--process_id: {index} is none of "):
            join([f"--process_id={index}"], {"JAX_NUM_PROCESSES": str(count)})
    with pytest.raises(ValueError, match="--process_id: -1 is none of the processes"):
        join([], {"JAX_PROCESS_ID": "-1", "JAX_NUM_PROCESSES": ""})
    monkeypatch.delenv("JAX_PROCESS_ID")

    def initialize(*arguments, **options):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"each other \(Number of .*\); give .*--num_processes"):
        join(["--coordinator_address=host:1"], {"JAX_NUM_PROCESSES": ""})


def test_the_detection_of_jax_is_as_it_is_called():
    """It is not public: where it changes, `clusters._found` and the bound in setup.py do too."""
    from jax._src.clusters import ClusterEnv

    parameters = inspect.signature(ClusterEnv.auto_detect_unset_distributed_params).parameters
    assert list(parameters) == [
        "coordinator_address",
        "num_processes",
        "process_id",
        "local_device_ids",
        "cluster_detection_method",
        "initialization_timeout",
    ]
    assert clusters._found() == 1


SEVERAL = {  # environments of one of several processes, and the variable that tells
    "SLURM_NTASKS": SLURM,
    "SLURM_STEP_NUM_TASKS": {"SLURM_STEP_NUM_TASKS": "4"},
    "SLURM_PROCID": {"SLURM_PROCID": "3"},
    "OMPI_COMM_WORLD_SIZE": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    "PMI_SIZE": {"PMI_SIZE": "8"},
    "TPU_WORKER_HOSTNAMES": {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "0"},
    "TPU_PROCESS_ADDRESSES": {"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1,d:1"},
    "TPU_PROCESS_BOUNDS": {"TPU_PROCESS_BOUNDS": "2,2,1"},
    "TPU_WORKER_ID": {"TPU_WORKER_ID": "5"},
    "MV2_COMM_WORLD_SIZE": {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "0"},
    "PMIX_RANK": {"PMIX_RANK": "1"},
    "CLOUD_TPU_TASK_ID": {"CLOUD_TPU_TASK_ID": "1"},
    "MEGASCALE_NUM_SLICES": {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
}
ONE = (
    {},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script: no step
    {"SLURM_NTASKS": "many"},
    {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # of an allocation of two
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_HOST_BOUNDS": "1,1,1"},
    {
        name: "WARNING: could not determine it, please set env var manually"
        for name in ("CLOUD_TPU_TASK_ID", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
    },
    {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": ""},
    {"MEGASCALE_NUM_SLICES": "1"},
    {"SLURM_ARRAY_TASK_ID": "3", "JOB_COMPLETION_INDEX": "2"},  # runs of their own
)


def none_found():
    return 1


def changed():
    raise AttributeError("module 'jax._src' has no attribute 'clusters'")


def failing():
    raise KeyError("job-name")


@pytest.fixture
def detection(monkeypatch):
    """Puts a function in the place of JAX's detection, on a machine without a TPU."""
    monkeypatch.setattr(clusters, "_on_tpu", lambda: False)
    return lambda found: monkeypatch.setattr(clusters, "_found", found)


@pytest.mark.parametrize("found", [none_found, changed, failing])
@pytest.mark.parametrize("name", SEVERAL)
def test_one_of_several_processes_never_goes_on_alone(detection, name, found):
    detection(found)
    with pytest.raises(ValueError, match=f"^{name}=.* several .*--num_processes=1") as caught:
        clusters.count(SEVERAL[name])
    assert "\n" not in str(caught.value)
    detection(lambda: 2)
    assert clusters.count(SEVERAL[name]) == 2


@pytest.mark.parametrize("variables", ONE)
def test_a_process_that_is_alone_goes_on(detection, variables):
    for found in (none_found, changed):
        detection(found)
        assert clusters.count(variables) == 1


def test_where_it_cannot_be_known_it_is_to_be_said(detection, monkeypatch):
    detection(failing)  # where it finds a cluster, and fails in it
    with pytest.raises(ValueError, match="cannot tell .*KeyError: 'job-name'.*--num_processes=1"):
        clusters.count({})
    detection(changed)
    monkeypatch.setattr(clusters, "_on_tpu", lambda: True)  # a pod's hosts have no variables
    with pytest.raises(ValueError, match="cannot tell .*AttributeError: .*--num_processes=1"):
        clusters.count({})


@pytest.mark.parametrize(
    "variables",
    [
        {**SLURM, "SLURM_NTASKS": "abc"},
        {"SLURM_PROCID": "x"},
        {"OMPI_COMM_WORLD_SIZE": "-2"},
        {"PMI_SIZE": "1.5"},
        {"TPU_PROCESS_BOUNDS": "2,b"},
        {"MEGASCALE_NUM_SLICES": "two"},
    ],
)
def test_variables_that_are_no_numbers_are_named(detection, variables):
    detection(none_found)
    with pytest.raises(ValueError, match="^[A-Z_]+: '.*' is not a number of processes"):
        clusters.count(variables)


def test_a_run_that_is_told_to_be_alone_asks_nobody(join, detection):
    detection(failing)
    assert join(["--num_processes=1"], SEVERAL["TPU_WORKER_HOSTNAMES"]) == []
    with pytest.raises(ValueError, match="^TPU_WORKER_HOSTNAMES="):
        join([], SEVERAL["TPU_WORKER_HOSTNAMES"])


DRIVER = """
    import os, signal, sys, time
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, {tests!r})
    import jax
    from regression import Regression, Source, frozen, parameters, small_config
    from jax_distill import main
    from jax_distill.runs import checks, commands, experiment
    from jax_distill.training import loop

    first, number, last = {signalled!r}

    def run(config, workdir):
        def hook(step, params):
            print("step", step, flush=True)
            if jax.process_index() == 1 and step == first:
                os.kill(os.getpid(), number)
            if first and step >= first:
                time.sleep(0.2)  # as long as a step is; the signal is noticed within a second

        start = small_config(total_steps=last), workdir, Regression(), parameters(), frozen()
        loop.fit(*start, Source(), hooks=[(1, hook)])

    checks.check = lambda config, workdir: None
    experiment.run = run
    commands.run(main.main)
"""
TOTAL = 40


def run_processes(workdir, count, *, step=0, number=signal.SIGTERM):
    """Trains in `count` processes, of which the second is sent a signal in a step; exit codes,
    what they printed, and what they logged."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    tests = str(ROOT / "tests")
    code = textwrap.dedent(DRIVER).format(tests=tests, signalled=(step, int(number), TOTAL))
    flags_ = ["--config=configs/teacher.py", f"--workdir={workdir}", f"--num_processes={count}"]
    flags_ += [f"--coordinator_address=localhost:{port}", "--heartbeat_timeout_seconds=10"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *flags_, f"--process_id={index}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], *zip(*outputs)


def final_state(workdir, config):
    optimizers = make_optimizers(Regression(), config)
    like = init_state(Regression(), optimizers, parameters(), config.seed)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == config.total_steps
        return checkpoints.restore(config.total_steps, like)


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4] if "JAX_DISTILL_SLOW_TESTS" in os.environ else [2])
def test_processes_are_killed_stopped_and_go_on_as_one(tmp_path, count):
    """And at the end all is as if it had been one process from the beginning."""
    config = small_config(total_steps=TOTAL)
    start = Regression(), parameters(), frozen(), Source()
    loop.fit(config, tmp_path / "single", *start)
    workdir = tmp_path / "several"

    codes, _, errors = run_processes(workdir, count, step=9, number=signal.SIGKILL)
    assert codes[1] == -signal.SIGKILL and all(codes), errors
    assert (workdir / "checkpoints" / "4").is_dir()  # that of step 8 may not have been complete

    codes, printed, errors = run_processes(workdir, count, step=14)
    assert not any(codes), errors
    steps = [
        [int(line[5:]) for line in out.splitlines() if line.startswith("step ")] for out in printed
    ]
    stopped = [taken[-1] for taken in steps]
    assert steps[0][0] in (5, 9) and len(set(stopped)) == 1 and 14 <= stopped[0] < TOTAL
    assert f"saved at step {stopped[0]}; run the same command to go on" in errors[0]
    assert "regression" in errors[0] and "regression" not in "".join(errors[1:])  # one process logs
    assert (workdir / "checkpoints" / str(stopped[0])).is_dir()
    written = [path.name for path in workdir.glob("events.out.tfevents.*")]
    assert len(written) == 2  # one for each start

    loop.fit(config, workdir, *start)
    expected, found = (final_state(tmp_path / name, config) for name in ("single", "several"))
    assert expected.position == found.position
    for a, b in zip(jax.tree.leaves(expected.state), jax.tree.leaves(found.state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    expected, found = logged(tmp_path / "single"), logged(workdir)
    assert expected.keys() == found.keys()
    for step, values in expected.items():
        np.testing.assert_allclose(values, found[step], rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("INTERNAL: Barrier failed because: task is set to ERROR: Task 1 heartbeat timeout", True),
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:61", True),
        ("UNAVAILABLE: Socket closed", True),
        ("INTERNAL: a bug of the compiler", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes", False),
    ],
)
def test_errors_of_a_lost_process_are_known(text, lost):
    wrapped = RuntimeError("orbax")
    wrapped.__cause__ = jax.errors.JaxRuntimeError(text)
    assert commands.is_of_lost(wrapped) == commands.is_of_lost(wrapped.__cause__) == lost
    called = ValueError(text)  # as of a program that is called, not compiled ahead
    assert commands.is_of_lost(called) == lost
    assert not commands.is_of_lost(ValueError(f"data.path: {text}"))  # of our own
