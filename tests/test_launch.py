"""The launch scripts: dry runs print what would be run, and what is run arrives as it was given."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([ROOT / "tpu_setup.sh", *(ROOT / "launch").glob("*.sh")])
PROGRAMS = [script for script in SCRIPTS if script.name != "common.sh"]
TPU = ("launch/tpu_vm.sh", "--name=a-slice", "--zone=us-east5-a")
# Words that a shell takes apart, in one way or another, unless they are quoted.
TRAINING = [
    "--config=configs/scm.py:smoke",
    "--workdir=/shared/my runs/scm",
    "--config.objective.guidance_scales=(2.0, 2.5, 3.0)",
    "--config.optimizer.frozen=time_embedder|proj.*$",
    '--config.name=it\'s "one" $HOME `id` \\ & ; # {x} *',
]
# In the place of gcloud and the others; appends its words to $CALLS, one JSON list a call.
RECORD = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Host:
    """A home and programs of its own; what they were called with is in `calls`."""

    def __init__(self, folder):
        self.home = folder / "home"
        self.home.mkdir()
        self.bin = folder / "bin"
        self._calls = folder / "calls"
        for name in ("gcloud", "xpk", "sbatch", "srun", "scancel", "scontrol", "kubectl", "sudo"):
            program(self.bin / name, RECORD.format(python=sys.executable))
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "CALLS": str(self._calls),
        }

    @property
    def calls(self):
        return [json.loads(line) for line in self._calls.read_text().splitlines()]

    def run(self, *words, cwd=ROOT, **environment):
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done

    def checkout(self, folder, python=None):
        """The launch scripts in a folder, with a Python that records its words."""
        shutil.copytree(ROOT / "launch", folder / "launch")
        program(folder / ".venv/bin/python", python or RECORD.format(python=sys.executable))
        return folder


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def trained(call):
    """The arguments of jax_distill.main in a call of Python."""
    assert call[:3] == ["python", "-m", "jax_distill.main"]
    return call[3:]


def printed(done):
    """The commands of a dry run."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def test_shellcheck():
    bundled = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(bundled) if bundled.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; it comes with the extra 'test'")
    subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.name)
def test_help_says_how_it_is_called_and_runs_nothing(script, host):
    assert script.stat().st_mode & stat.S_IXUSR
    assert "\nset -euo pipefail\n" in script.read_text()
    done = host.run(script, "--help")
    assert done.returncode == 0 and done.stderr == "" and script.name in done.stdout
    assert not done.stdout.startswith("#") and "set -euo" not in done.stdout
    assert not host.home.joinpath("calls").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["launch/tpu_vm.sh"], "which command"),
        (["launch/tpu_vm.sh", "delete"], "--name is missing"),
        (["launch/tpu_vm.sh", "delete", "--zone=z"], "--name is missing"),
        (["launch/tpu_vm.sh", "delete", "--name", "--zone=z"], "--name has no value"),
        (["launch/tpu_vm.sh", "delete", "--name="], "--name has no value"),
        (["launch/tpu_vm.sh", "stop", "--name=a"], "--zone is missing"),
        ([TPU[0], "create", *TPU[1:]], "--type is missing"),
        ([TPU[0], "create", *TPU[1:], "--type=v9-8"], "--type=v9-8: .* --runtime"),
        ([TPU[0], "create", *TPU[1:], "--typ=v6e-8"], "unknown option --typ=v6e-8"),
        ([TPU[0], "destroy", *TPU[1:]], "unknown command 'destroy'"),
        ([TPU[0], "mount", *TPU[1:]], "--bucket or --nfs is missing"),
        ([TPU[0], "mount", *TPU[1:], "--bucket=gs://b"], "without gs://"),
        ([TPU[0], "mount", *TPU[1:], "--bucket=b", "--nfs=h:/s"], "both given"),
        ([TPU[0], "run", *TPU[1:]], "nothing to run"),
        ([TPU[0], "run", *TPU[1:], "--config=x"], "after --"),
        ([TPU[0], "run", *TPU[1:], "--", "--workdir=/a"], "--config is missing"),
        ([TPU[0], "run", *TPU[1:], "--", "--config=x"], "--workdir is missing"),
        ([TPU[0], "run", *TPU[1:], "--", "--config=x", "--workdir=s3://b/x"], "or relative"),
        ([TPU[0], "watch", *TPU[1:], "--type=v6e-8", "--every=soon"], "--every=soon"),
        (["launch/xpk.sh", "run", "--name=a"], "--cluster is missing"),
        (["launch/xpk.sh", "delete", "--cluster=c"], "--name is missing"),
        (["launch/xpk.sh", "run", "--cluster=c", "--name=a"], "--type is missing"),
        (["launch/slurm.sh", "run"], "--name is missing"),
        (["launch/slurm.sh", "stop"], "--name is missing"),
        (["launch/slurm.sh", "run", "--name=a", "--nodes=two"], "--nodes=two is not a positive"),
        (["launch/slurm.sh", "setup", "--cuda=11"], "neither 12 nor 13"),
        (["launch/slurm_job.sh", "--config=x"], "not a Slurm job"),
        (["launch/train.sh", "--config=x", "--workdir=s3://b/x"], "or relative"),
        (["tpu_setup.sh", "here"], "unknown option here"),
        (["tpu_setup.sh", "--extra=rocm"], "unknown --extra=rocm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence_and_nothing_is_run(words, expected, host):
    done = host.run("bash", *words)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(f"error: .*{expected}.*\n", done.stderr), done.stderr
    assert not Path(host.environment["CALLS"]).exists()


def test_dry_runs_run_nothing(host):
    runs = [
        [TPU[0], command, *TPU[1:], "--type=v6e-8", "--bucket=b", "--queued", "--", *TRAINING]
        for command in (
            "create",
            "copy",
            "mount",
            "run",
            "logs",
            "status",
            "stop",
            "delete",
            "watch",
        )
    ]
    for command in ("run", "logs", "list", "delete"):
        words = ["--cluster=c", "--name=a", "--type=v6e-8", "--", *TRAINING]
        runs.append(["launch/xpk.sh", command, *words])
    for command in ("setup", "run", "logs", "stop"):
        runs.append(["launch/slurm.sh", command, "--name=a", "--", *TRAINING])
    runs.append(["tpu_setup.sh"])
    for words in runs:
        where = words.index("--") if "--" in words else len(words)
        assert host.run("bash", *words[:where], "--dry_run", *words[where:]).stdout, words
    assert not Path(host.environment["CALLS"]).exists()
    assert not (ROOT / "runs/slurm").exists()


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_a_slice_is_made(host, kind, runtime):
    words = [TPU[0], "create", "--dry_run", *TPU[1:], f"--type={kind}", "--spot", "--project=p"]
    place = ["a-slice", "--zone=us-east5-a", "--project=p"]
    tpus = ["gcloud", "compute", "tpus"]
    assert printed(host.run(*words)) == [
        [*tpus, "tpu-vm", "create", *place]
        + [f"--version={runtime}", f"--accelerator-type={kind}", "--spot"]
    ]
    create, describe = printed(host.run(*words, "--queued"))
    assert create == [*tpus, "queued-resources", "create", *place] + [
        *("--node-id=a-slice", f"--runtime-version={runtime}"),
        *(f"--accelerator-type={kind}", "--spot"),
    ]
    assert describe == [*tpus, "queued-resources", "describe", *place] + [
        "--format=value(state.state)"
    ]


def test_a_slice_is_deleted_with_its_place_in_the_queue_and_gcloud_asks(host):
    assert host.run(TPU[0], "delete", *TPU[1:]).returncode == 0
    assert host.run(TPU[0], "delete", *TPU[1:], "--queued").returncode == 0
    node, queued = host.calls
    place = ["delete", "a-slice", "--zone=us-east5-a"]
    assert node == ["gcloud", "compute", "tpus", "tpu-vm", *place]
    assert queued == ["gcloud", "compute", "tpus", "queued-resources", *place, "--force"]


def remote(call):
    """What a call of gcloud has a host's shell run."""
    assert call[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    return next(word for word in call if word.startswith("--command=")).removeprefix("--command=")


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
    return path


def test_arguments_arrive_on_a_host_of_a_slice_as_they_were_given(host):
    words = [TPU[0], "run", *TPU[1:]]
    assert host.run(*words, "--", *TRAINING).returncode == 0
    ((*_, call),) = [host.calls]
    assert "--worker=all" in call
    assert printed(host.run(*words, "--dry_run", "--", *TRAINING)) == [call]

    host.checkout(host.home / "jax_distill")
    assert host.run("bash", "-c", remote(call), cwd=host.home).returncode == 0
    wait_for(host.home / "jax_distill_run/code")
    assert trained(host.calls[1]) == TRAINING


def test_a_run_on_a_slice_is_told_to_stop_and_its_end_is_noted(host, tmp_path):
    python = f"#!{sys.executable}\n" + (
        "import os, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3); open('saved', 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nopen('started', 'w').close()\ntime.sleep(60)\n"
    )
    checkout = host.checkout(host.home / "jax_distill", python)
    host.run(TPU[0], "run", *TPU[1:], "--", *TRAINING)
    host.run(TPU[0], "stop", *TPU[1:])
    start, stop = map(remote, host.calls)
    assert host.run("bash", "-c", start, cwd=host.home).returncode == 0
    wait_for(checkout / "started")
    assert host.run("bash", "-c", stop, cwd=host.home).returncode == 0
    wait_for(checkout / "saved")
    code = wait_for(host.home / "jax_distill_run/code")
    while not code.read_text():  # it is there before its content
        time.sleep(0.02)
    assert code.read_text() == "143\n"


def test_this_checkout_is_copied_without_what_is_big(host):
    assert host.run(TPU[0], "copy", *TPU[1:]).returncode == 0
    copied, unpacked = host.calls
    assert copied[3:5] == ["tpu-vm", "scp"] and copied[6] == "a-slice:jax_distill.tar.gz"
    assert "tpu_setup.sh" in remote(unpacked) and "--worker=all" in copied
    tar = printed(host.run(TPU[0], "copy", "--dry_run", *TPU[1:]))[0]
    archive = host.home / "copied.tar.gz"
    assert host.run(*[str(archive) if "FOLDER" in word else word for word in tar]).returncode == 0
    names = set(host.run("tar", "-tzf", archive).stdout.splitlines())
    assert {"./setup.py", "./tpu_setup.sh", "./launch/train.sh", "./configs/scm.py"} <= names
    assert not [name for name in names if re.match(r"\./(\.git|\.venv|runs)(/|$)", name)]


def test_what_hosts_share_is_mounted(host):
    assert host.run(TPU[0], "mount", *TPU[1:], "--nfs=10.0.0.2:/share one").returncode == 0
    assert host.run(TPU[0], "mount", *TPU[1:], "--bucket=my-bucket").returncode == 0
    nfs, bucket = map(remote, host.calls)
    program(host.bin / "mountpoint", "#!/bin/sh\nexit 1\n")
    missing = host.run("bash", "-c", bucket, cwd=host.home)
    assert missing.returncode == 1 and "gcsfuse is missing; install it on all" in missing.stderr
    program(host.bin / "gcsfuse", RECORD.format(python=sys.executable))
    for command in (nfs, bucket):
        assert host.run("bash", "-c", command, cwd=host.home).returncode == 0
    calls = host.calls[2:]
    assert ["10.0.0.2:/share one", "/mnt/jax_distill"] in [call[-2:] for call in calls]
    assert calls[-1][0] == "gcsfuse" and calls[-1][-2:] == ["my-bucket", "/mnt/jax_distill"]


GCLOUD = """#!{python}
# A slice that is taken away once; the run fails once, and ends well in the end.
import json, os, sys
words = sys.argv[1:]
path = os.environ["CALLS"]
calls = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
def count(*what):
    return sum(all(any(word in w for w in call) for word in what) for call in calls)
with open(path, "a") as file:
    file.write(json.dumps(["gcloud", *words]) + "\\n")
if "describe" in words:
    created, asked = count("create"), count("echo running")
    if created == 0:
        sys.exit("NOT_FOUND")
    print("SUSPENDED" if created == 1 and asked >= 1 else "ACTIVE")
elif any("echo running" in word for word in words):
    answers = ["running", "1", "143", "none", "0"]
    print("# a banner of ssh\\n" + answers[count("echo running")])
"""


def test_a_spot_slice_that_is_taken_away_is_made_again_and_the_run_goes_on(host):
    program(host.bin / "gcloud", GCLOUD.format(python=sys.executable))
    program(host.bin / "sleep", "#!/bin/sh\n")
    options = ["--type=v6e-64", "--queued", "--spot", "--bucket=b", "--", *TRAINING]
    done = host.run(TPU[0], "watch", *TPU[1:], *options)
    assert done.returncode == 0, done.stderr
    verbs = []
    for call in host.calls:
        verb = call[4]
        if verb == "ssh":
            command = remote(call)
            verb = next(
                name
                for name, part in {
                    "setup": "tpu_setup.sh",
                    "mount": "gcsfuse",
                    "run": "launch/train.sh",
                    "clear": "kill -KILL",
                    "code": "echo running",
                }.items()
                if part in command
            )
        if verb != "describe":
            verbs.append(verb)
    made = ["create", "scp", "setup", "mount", "run"]
    # Running, taken away; failed with 1, told to stop, lost, finished.
    again = ["code", "clear", "run"]
    assert verbs == [*made, "code", "delete", *made, *again, *again, "code", *made[1:], "code"]
    assert "the run is finished" in done.stderr and "--queued" in done.stderr


def test_a_watch_ends_when_the_slice_cannot_be_had(host):
    program(host.bin / "sleep", "#!/bin/sh\n")
    program(host.bin / "gcloud", "#!/bin/sh\necho 'no such quota' >&2\nexit 1\n")
    done = host.run(TPU[0], "watch", *TPU[1:], "--type=v6e-64", "--", *TRAINING)
    assert done.returncode == 1 and done.stderr.count("no such quota") == 3
    assert done.stderr.splitlines()[-1].startswith("error: three failures in a row")


def test_a_second_run_is_refused_while_one_is_under_way(host):
    checkout = host.checkout(host.home / "jax_distill", "#!/bin/bash\ntouch started\nsleep 60\n")
    host.run(TPU[0], "run", *TPU[1:], "--", *TRAINING)
    start = remote(host.calls[0])
    assert host.run("bash", "-c", start, cwd=host.home).returncode == 0
    wait_for(checkout / "started")
    second = host.run("bash", "-c", start, cwd=host.home)
    assert second.returncode == 1 and second.stderr.startswith("error: a run is under way")
    os.killpg(int((host.home / "jax_distill_run/pid").read_text()), signal.SIGKILL)


def test_a_workload_of_gke_gets_its_arguments_as_they_were_given(host):
    words = ["launch/xpk.sh", "run", "--cluster=c", "--name=scm", "--type=v6e-64"]
    words += ["--storage=shared", "--storage=more", "--spot", "--slices=2", "--zone=z"]
    assert host.run(*words, "--", *TRAINING).returncode == 0
    (call,) = host.calls
    assert call[:4] == ["xpk", "workload", "create", "--workload=scm"]
    given = set(call)
    assert {"--cluster=c", "--zone=z", "--tpu-type=v6e-64", "--num-slices=2", "--spot"} <= given
    assert {"--storage=shared", "--storage=more", f"--script-dir={ROOT}"} <= given
    command = call[-1].removeprefix("--command=")
    assert "\n" not in command  # it becomes a line of a manifest

    image = host.checkout(host.home / "app")
    shutil.rmtree(image / ".venv")
    program(host.bin / "python3", RECORD.format(python=sys.executable))
    # As xpk's container runs it.
    done = host.run("bash", "-c", f"({command}) & wait $!", cwd=image)
    assert done.returncode in (0, 143), done.stderr
    install, main, *_ = host.calls[1:]
    assert install[1:] == ["-m", "pip", "install", "--quiet", "--editable", ".[tpu]"]
    assert main[1:3] == ["-m", "jax_distill.main"] and main[3:] == TRAINING


def test_a_job_of_slurm_gets_its_arguments_as_they_were_given(host):
    checkout = host.checkout(host.home / "checkout")
    options = ["--name=scm", "--nodes=2", "--gpus=4", "--time=1:00:00", "--sbatch=--account=a b"]
    done = host.run(checkout / "launch/slurm.sh", "run", *options, "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    (call,) = host.calls
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00"} < set(call)
    assert {"--account=a b", "--requeue", f"--chdir={checkout}"} < set(call)
    script = call.index(f"{checkout}/launch/slurm_job.sh")
    assert call[script + 1 :] == TRAINING

    done = host.run(*call[script:], cwd=checkout, SLURM_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    step = host.calls[1]
    train = step.index("launch/train.sh")
    assert step[0] == "srun"
    host.run(*step[train:], cwd=checkout)
    assert trained(host.calls[2]) == TRAINING


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (0, False), (1, False)])
def test_a_job_whose_time_is_nearly_over_saves_and_queues_again(host, code, requeued):
    srun = "#!/bin/bash\ntrap 'sleep 0.2; exit {}' TERM\ntouch started\nsleep 60 & wait\n"
    program(host.bin / "srun", srun.format(code))
    program(host.bin / "scancel", '#!/bin/bash\nkill -TERM "$(cat srun.pid)"\n')
    environment = host.environment | {"SLURM_JOB_ID": "7"}
    program(host.bin / "srun", srun.format(code).replace("touch", "echo $$ >srun.pid; touch"))
    with subprocess.Popen(
        [ROOT / "launch/slurm_job.sh", *TRAINING], cwd=host.home, env=environment
    ) as job:
        wait_for(host.home / "started")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=120) == code
    calls = Path(host.environment["CALLS"])
    assert calls.exists() == requeued
    if requeued:
        assert host.calls == [["scontrol", "requeue", "7"]]


@pytest.mark.parametrize(
    ("exited", "steps", "expected"),
    [
        (0, [400, 600], 0),
        (0, [400], 143),  # another host was told to stop, and all have saved
        (0, [], 143),
        (1, [600], 1),
        (3, [], 3),
    ],
)
def test_the_code_of_a_run_tells_whether_it_is_finished(host, tmp_path, exited, steps, expected):
    text = f"""#!/bin/bash
if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi
exit {exited}
"""
    checkout = host.checkout(host.home / "checkout", text)
    workdir = tmp_path / "a run"
    for step in steps:
        (workdir / f"checkpoints/{step}").mkdir(parents=True)
    (workdir / "checkpoints/700.orbax-checkpoint-tmp").mkdir(parents=True)
    (workdir / "config.json").write_text('{"total_steps": 600}')
    command = [checkout / "launch/train.sh", "--config=configs/scm.py", f"--workdir={workdir}"]
    assert host.run(*command).returncode == expected


def test_setup_takes_a_python_that_fits_and_else_brings_one(host, tmp_path):
    usual = ("bash", "awk", "sed", "dirname", "env", "timeout")
    for name in usual:
        (host.bin / name).symlink_to(shutil.which(name))
    old = "#!/bin/bash\nexit 1\n"  # too old, or without its module of virtual environments
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        program(host.bin / name, old)
    alone = {"PATH": str(host.bin)}
    venv = tmp_path / "venv"
    words = [ROOT / "tpu_setup.sh", "--dry_run", f"--venv={venv}"]

    def commands(*options):
        done = host.run(*words, *options, **alone)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.removesuffix("\n").splitlines()
        return [shlex.split(line) for line in lines if line.startswith(("python", str(venv)))]

    brought = commands()
    assert brought[0][:4] == ["python3", "-m", "pip", "install"] and brought[0][-1] == "uv"
    assert brought[1][1:] == ["venv", "--quiet", "--seed", "--python", "3.12", str(venv)]
    assert brought[3][-1] == f"{ROOT}[tpu]"
    program(host.bin / "python3.12", "#!/bin/bash\nexit 0\n")
    assert commands("--extra=cuda12")[0] == ["python3.12", "-m", "venv", str(venv)]
    assert commands("--extra=cuda12")[2][-1] == f"{ROOT}[cuda12]"
    assert commands("--extra=none")[2][-1] == str(ROOT)
