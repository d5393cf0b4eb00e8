"""The command line: what is wrong ends in one sentence that names it, and nothing is written."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import made_records
import numpy as np
import pytest
from absl.testing import flagsaver

from jax_distill import main
from jax_distill.assembly.resolution import resolve
from jax_distill.config import base
from jax_distill.data import records
from jax_distill.runs import checks, commands, experiment
from jax_distill.training import loop

ROOT = Path(__file__).parents[1]
TEACHER = f"--config={ROOT}/configs/teacher.py"
SCM = f"--config={ROOT}/configs/scm.py"
MEANFLOW, IMM = f"--config={ROOT}/configs/meanflow.py", f"--config={ROOT}/configs/imm.py"
TINY = (
    *("--config.model.num_layers=1", "--config.model.num_single_layers=1"),
    *("--config.model.attention_head_dim=16", "--config.model.num_attention_heads=2"),
    *("--config.model.axes_dims_rope=(4,6,6)", "--config.batch_size=4"),
)


def write_data(folder, captions, channels=64):
    latents = np.zeros((16, channels), np.float16)
    rows = [records.LatentRecord(latents, c) for c in captions]
    made_records.write(folder, rows, {"world": "shapes"})
    return f"--config.data.path={folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), ["a red circle", "two squares"] * 4)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the training command in this process, but for the training; returns its error."""
    workdir, ran = tmp_path / "run", []
    monkeypatch.setattr(experiment, "run", lambda config, workdir: ran.append(config))

    def run(*argv, into=workdir):
        monkeypatch.setattr(sys, "argv", ["main", *map(str, argv), f"--workdir={into}"])
        with flagsaver.flagsaver():
            try:
                commands.run(main.main)
            except SystemExit as stop:
                if stop.code is None or stop.code == 0:
                    return ran.pop()
                assert not ran and not workdir.exists()
                return stop.code

    return run


def one_sentence(error):
    return isinstance(error, str) and error.startswith("error: ") and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The flags.
        ([], "--config: give a file"),
        (["--config.seed=3"], "--config is missing"),
        ([TEACHER, "--config.seed", "3"], "--config.seed: give a value after '='"),
        ([TEACHER, "--config.model=3"], "--config.model: it is a section"),
        ([f"--config={ROOT}/configs/nothing.py"], "no file '.*nothing.py'"),
        ([TEACHER + ":huge"], "unknown preset 'huge'"),
        ([TEACHER, "--wrkdir=x"], "flag 'wrkdir'. Did you mean: workdir"),
        ([TEACHER, "x"], "unexpected arguments: x"),
        # Their names and types.
        ([TEACHER, "--config.totl_steps=9"], "config.totl_steps.*did you mean 'total_steps'"),
        ([TEACHER, "--config.optimizer.lerning_rate=9"], "did you mean 'learning_rate'"),
        ([SCM, "--config.objective.tangent_warm=9"], "tangent_warm: .* 'tangent_warmup'"),
        ([TEACHER, "--config.seed.x=9"], "config.seed.x"),
        ([TEACHER, "--config.total_steps=1.5"], "config.total_steps=1.5: not a whole number"),
        ([TEACHER, "--config.ema_decay=high"], "config.ema_decay=high: not a number"),
        ([TEACHER, "--config.model.guidance_embeds=maybe"], "guidance_embeds=maybe: neither"),
        # Their values.
        ([TEACHER, "--config.total_steps=0"], "total_steps: 0 is not positive"),
        ([TEACHER, "--config.batch_size=-4"], "batch_size: -4 is not positive"),
        ([TEACHER, "--config.log_every=0"], "log_every: 0 is not positive"),
        ([TEACHER, "--config.checkpoint.every=0"], "checkpoint.every: 0 is not positive"),
        ([TEACHER, "--config.checkpoint.keep=0"], "checkpoint.keep: 0 is not positive"),
        ([TEACHER, "--config.model.num_layers=0"], "model.num_layers: 0 is not positive"),
        ([TEACHER, "--config.optimizer.learning_rate=nan"], "learning_rate: nan is not positive"),
        ([TEACHER, "--config.optimizer.clip_norm=0"], "clip_norm: 0.0 is not positive"),
        ([TEACHER, "--config.optimizer.warmup_steps=-1"], "warmup_steps: -1 is not zero or more"),
        ([TEACHER, "--config.ema_warmup=0"], "ema_warmup: 0.0 is not 1 or more"),
        ([TEACHER, "--config.ema_power=0.4"], "ema_power: 0.4 is not from 0 to 0.28"),
        ([TEACHER, "--config.ema_decay=1"], "ema_decay: 1.0 is not at least 0 and less than 1"),
        ([TEACHER, "--config.seed=-1"], "seed: -1 is not"),
        ([TEACHER, "--config.name="], "name: '' is not"),
        ([TEACHER, "--config.dtype=float8"], "dtype: 'float8' is not one of float32, bfloat16"),
        ([TEACHER, "--config.ema_dtype=int8"], "ema_dtype: 'int8' is not one of float32, bfloat16"),
        ([TEACHER, "--config.optimizer.moments=half"], "moments: 'half' is not one of float32"),
        ([TEACHER, "--config.on_nonfinite=go"], "on_nonfinite: 'go' is not one of stop, skip"),
        ([TEACHER, "--config.optimizer.name=adam"], "optimizer.name: 'adam' is not one of"),
        ([TEACHER, "--config.optimizer.schedule=step"], "optimizer.schedule: 'step' is not one of"),
        ([TEACHER, "--config.objective.name=gan"], "objective.name: 'gan' is not one of"),
        ([SCM, "--config.teacher.velocity=fast"], "teacher.velocity: 'fast' is not one of"),
        ([SCM, "--config.evaluation.student_steps=1,b"], "student_steps: .* list of one int"),
        ([SCM, "--config.evaluation.student_steps=0,1"], "student_steps: .* list of positive"),
        ([SCM, "--config.evaluation.teacher_steps=4,10001"], "teacher_steps: .* 10000"),
        ([SCM, "--config.samples.teacher_steps=1000000000"], "samples.teacher_steps: .* 10000"),
        ([SCM, "--config.data.resolution=(16,1600000000)"], "data.resolution: "),
        ([TEACHER, "--config.total_steps=2147483648"], "total_steps: 2147483648 is not"),
        (
            [SCM, "--config.objective.tangent_warmup=4294967296"],
            "tangent_warmup: 4294967296 is not",
        ),
        ([TEACHER, "--config.seed=4294967296"], "seed: 4294967296 is not"),
        ([SCM, "--config.objective.guidance_scales=()"], "objective.guidance_scales"),
        ([SCM, "--config.objective.guidance_scales=(nan,)"], "guidance_scales"),
        ([SCM, "--config.objective.data_scale=0"], "objective.data_scale: 0.0 is not positive"),
        ([SCM, "--config.objective.tangent_warmup=-1"], "tangent_warmup: -1 is not zero or more"),
        ([SCM, "--config.objective.middle_angle=2"], "middle_angle: 2.0 is not between 0 and pi"),
        ([MEANFLOW, "--config.objective.equal_share=2"], "equal_share: 2.0 is not from 0 to 1"),
        ([MEANFLOW, "--config.objective.time_mean=inf"], "time_mean: inf is not a finite number"),
        (
            [MEANFLOW, "--config.objective.mix_from=0.8", "--config.objective.mix_to=0.2"],
            "mix_from",
        ),
        (
            [MEANFLOW, "--config.objective.discrete_warmup=9", "--config.dtype=bfloat16"],
            "objective.discrete_warmup: .* dtype=float32",
        ),
        ([MEANFLOW, "--config.objective.omega=0.5"], "drop_rate: 0 trains no null .* 0.5; set 0.1"),
        ([IMM, "--config.objective.gap=40"], "objective.gap: 40 is not from 1 to 20"),
        ([IMM, "--config.objective.particles=0"], "objective.particles: 0 is not positive"),
        # How they fit together.
        ([TEACHER, "--config.accumulate=3"], "batch_size: 128 .*accumulate=3.* multiple of 3"),
        ([SCM, "--config.rescale.batch_size=6", "--config.accumulate=4"], "rescale.batch_size: 6"),
        ([TEACHER, "--config.mesh.fsdp=3"], "mesh.fsdp: 3 does not divide 1 device; make it 1$"),
        ([TEACHER, "--config.mesh.tensor=-1"], "mesh: only one of"),
        ([TEACHER, "--config.data.examples=5"], "batch_size: 128 is more than the 5 examples"),
        ([IMM, "--config.data.examples=15"], "batch_size: 64 is more than 4 times the 15 examples"),
        ([TEACHER, "--config.data.text_length=2"], "data.text_length: caption .* the limit is 2"),
        ([SCM, "--config.data.text_length=3"], "data.text_length: 3 differs from the teacher's"),
        ([SCM, "--config.evaluation.prompts=7"], "evaluation.prompts: 7 is not a multiple of 6"),
        (
            [SCM, "--config.evaluation.diversity_prompts=7"],
            "evaluation.diversity_prompts: 7 is not a multiple of 6",
        ),
        ([SCM, "--config.samples.prompts=601"], "samples.prompts: 601 is more than 600"),
        ([TEACHER, "--config.model.in_channels=32"], "model.in_channels: 32"),
        ([TEACHER, "--config.model.joint_attention_dim=32"], "joint_attention_dim: 32 must be"),
        ([TEACHER, *TINY, "--config.model.attention_head_dim=18"], "model.axes_dims_rope"),
        ([MEANFLOW, "--config.model.interval_embeds=False"], "meanflow: interval: .*_embeds=False"),
        ([IMM, "--config.objective.particles=7"], "particles: groups of 7 .* a batch of 64"),
        ([IMM, "--config.accumulate=32"], "particles: groups of 4 do not divide a batch of 2"),
        # What they point to.
        ([TEACHER, "--config.data.path=no/where"], "data.path: 'no/where' has no dataset.json"),
        ([SCM, "--config.teacher.checkpoint=no/where"], "teacher.checkpoint: 'no/where' is no"),
    ],
    ids=lambda value: " ".join(value).replace(str(ROOT), "") if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence(run, arguments, expected):
    error = run(*arguments)
    assert one_sentence(error) and re.search(expected, error), error


@pytest.mark.parametrize(
    ("preset", "dtype", "gap", "warned"),
    [
        ("", "float32", 12, False),
        ("", "bfloat16", 12, True),
        ("", "bfloat16", 10, False),
        ("flux_lite", "bfloat16", None, False),
        ("flux_lite", "float32", 12, False),
        ("flux_lite_lora", "bfloat16", None, False),
        ("flux_lite_lora", "bfloat16", 11, True),
    ],
)
def test_a_gap_that_bfloat16_does_not_see_is_warned_of(preset, dtype, gap, warned, monkeypatch):
    found = []
    monkeypatch.setattr(checks.logging, "warning", lambda text, *args: found.append(text % args))
    config = runpy.run_path(f"{ROOT}/configs/imm.py")["get_config"](preset)
    config.dtype = dtype
    if gap is not None:
        config.objective.gap = gap
    checks.check_objective(config)
    assert len(found) == warned
    assert all(f"objective.gap: {gap} " in text and "gap=10 or less" in text for text in found)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("config.totl_steps = 5", "line 4: there is no key 'totl_steps'; .* 'total_steps'"),
        ("config.optimizer.rate = 1.0", "line 4: there is no key 'rate'"),
        ("config.seed = config.sed", "line 4: there is no key 'sed'; .* 'seed'"),
        ("config.total_steps = 'many'", "line 4: total_steps must be of type int, not str"),
        ("config.total_steps = 1.5", "line 4: total_steps must be of type int, not float"),
        ("config.objective.time_men = 1.0", "objective.time_men: .* objective.time_mean"),
        ("config.objective.time_mean = 'x'", "objective.time_mean: 'x' must be float"),
        ("config.optimizer = {'name': 'adamw'}", "optimizer.adam_share: missing"),
        ("config.model = {'num_layers': 2}", "model.attention: missing"),
        ("config.model = {'layers': 2}", "model.layers: there is no such key"),
        ("config.batch_size = 2 * undefined", "line 4: NameError: name 'undefined'"),
        ("config = None", "get_config returns"),
        ("raise RuntimeError('one' + chr(10) + 'two')", "line 4: RuntimeError: one two"),
        ("config.unlock().model = None", "model: None must be a section"),
        ("config.unlock().objective = None; return config", "objective: None must be a section"),
        ("config.objective.name = 'scm'; del config.unlock().name; return config", "name: missing"),
        (
            "config.objective.name, config.name = 'scm', '../x'; return config",
            "name: '../x' is not a word",
        ),
        ("config.data.text_length = 10**9", "data.text_length: 1000000000 is not 8192 or less"),
    ],
)
def test_what_is_wrong_in_a_configuration_file_is_said_with_its_place(
    run, tmp_path, body, expected
):
    path = tmp_path / "config.py"
    head = "from jax_distill.config import base\ndef get_config(preset=''):\n    config = base()\n"
    tail = "    if config: config.name, config.objective.name = 'x', 'flow_matching'\n"
    path.write_text(f"{head}    {body}\n{tail}    return config\n")
    error = run(f"--config={path}")
    assert one_sentence(error) and re.search(expected, error), error
    if "line" in expected:
        assert str(path) in error


def test_a_file_that_is_no_configuration(run, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(:\n")
    error = run(f"--config={path}")
    assert one_sentence(error) and "SyntaxError" in error and "broken.py" in error


def test_a_valid_configuration_runs_and_is_locked(run, data):
    config = run("--config.seed=3", TEACHER, *TINY, data, "--config.evaluation.student_steps=2,4")
    assert config.seed == 3 and config.evaluation.student_steps == (2, 4)
    for section in (config, config.optimizer, config.objective):
        with pytest.raises(AttributeError):
            section.new = 1


def test_every_setting_of_an_objective_can_be_set_on_the_command_line(run, data):
    settings = {"time_shift": 0.5, "mix_interval": True, "jvp_velocity": "sample", "drop_rate": 0.0}
    flags = [f"--config.objective.{key}={value}" for key, value in settings.items()]
    config = run(MEANFLOW, data, "--config.batch_size=8", "--config.rescale.batch_size=8", *flags)
    assert settings.items() <= config.objective.to_dict().items()


def test_every_setting_of_a_students_network_can_be_set_and_is_else_its_teachers(run, data):
    student = runpy.run_path(f"{ROOT}/configs/scm.py")["get_config"]("")
    assert student.model.keys() == base().model.keys()
    plain = resolve(student, base()).config.model.to_dict()
    own = {"time_scale": 1.0, "guidance_embeds": True}
    assert plain == base().model.to_dict() | own
    settings = {"attention": "xla", "guidance_factor": 10.0, "axes_dims_rope": (16, 8, 40)}
    flags = [f"--config.model.{key}={value}" for key, value in settings.items()]
    batches = ("--config.batch_size=8", "--config.rescale.batch_size=8")
    error = run(SCM, data, *batches, *flags)
    assert error == (
        "error: model.axes_dims_rope: (16, 8, 40) differs from the teacher's (16, 24, 24), whose"
        " parameters the student starts from; leave it out"
    )
    config = run(SCM, data, *batches, *flags[:-1], "--config.model.num_layers=2")
    assert settings.items() - config.model.to_dict().items() == {("axes_dims_rope", (16, 8, 40))}


def test_data_that_does_not_fit(run, tmp_path):
    long = "a red circle, a blue square, a green cross, a black triangle and a purple circle"
    error = run(TEACHER, *TINY, write_data(tmp_path / "long", ["a red circle"] * 7 + [long]))
    assert one_sentence(error) and re.search("data.text_length: caption .* shorten it", error)
    error = run(TEACHER, *TINY, write_data(tmp_path / "few", ["a red circle"] * 3))
    assert one_sentence(error) and "batch_size: 4 is more than the 3 examples" in error
    error = run(TEACHER, *TINY, write_data(tmp_path / "other", ["a red circle"] * 8, channels=8))
    assert one_sentence(error) and "data.path: the latents in" in error and "8 channels" in error


def test_a_teacher_without_checkpoint(run, tmp_path, data):
    teacher = tmp_path / "teacher"
    config = run(TEACHER, *TINY, data)
    experiment.configuration.save(config, teacher)
    error = run(SCM, f"--config.teacher.checkpoint={teacher}")
    assert one_sentence(error) and f"teacher.checkpoint: '{teacher}' has no checkpoints" in error
    (teacher / "checkpoints").mkdir()
    error = run(SCM, f"--config.teacher.checkpoint={teacher}")
    assert one_sentence(error) and "no complete checkpoint yet" in error
    (teacher / "config.json").write_text("{")
    error = run(SCM, f"--config.teacher.checkpoint={teacher}")
    assert one_sentence(error) and "teacher.checkpoint" in error and "not valid JSON" in error


def test_a_workdir_must_be_a_folder(run, tmp_path):
    (tmp_path / "file").touch()
    assert "file' is a file; give a folder" in run(TEACHER, into=tmp_path / "file")


def test_a_workdir_of_another_run_is_left_alone(run, tmp_path, data):
    other = tmp_path / "other"
    config = run(TEACHER, *TINY, data)
    experiment.configuration.save(config, other)
    before = (other / "config.json").read_bytes()
    for change, key in (
        ("--config.name=x", "name"),
        ("--config.seed=5", "seed"),
        ("--config.model.num_layers=2", "model.num_layers"),
        ("--config.objective.time_mean=0.0", "objective.time_mean"),
        ("--config.optimizer.name=adamw", "optimizer.name"),
        ("--config.data.seed=1", "data.seed"),
    ):
        error = run(TEACHER, *TINY, data, change, into=other)
        assert one_sentence(error) and f"holds another run, of {key}=" in error, error
    assert "of name='teacher' and not 'scm'" in run(SCM, into=other)
    assert (other / "config.json").read_bytes() == before
    harmless = ("total_steps=9", "checkpoint.every=2", "log_every=1", "optimizer.learning_rate=0.1")
    assert run(TEACHER, *TINY, data, *(f"--config.{c}" for c in harmless), into=other)
    file = tmp_path / "file"
    file.write_text("")
    assert f"'{file}' is a file" in run(TEACHER, *TINY, data, into=file)


def test_a_run_of_an_older_version_goes_on(run, tmp_path, data):
    """Keys that it did not know are taken to have had their defaults."""
    other = tmp_path / "other"
    experiment.configuration.save(run(TEACHER, *TINY, data), other)
    old = json.loads((other / "config.json").read_text())
    del old["rescale"], old["model"]["remat"], old["samples"]["teacher_steps"]
    old["teacher"]["velocity"] = "cfg"
    (other / "config.json").write_text(json.dumps(old))
    assert run(TEACHER, *TINY, data, into=other)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (loop.NonFiniteLoss("step 3"), "error: step 3"),
        (
            PermissionError(13, "Permission denied", "x"),
            "error: 'x': Permission denied; mend that and run the same command again",
        ),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'"),
    ],
)
def test_a_stop_that_explains_itself_needs_no_trace(monkeypatch, error, code):
    module = Path(commands.__file__).with_name("somewhere.py")
    raiser = {"error": error}
    exec(compile("def main(argv): raise error", module, "exec"), raiser)
    monkeypatch.setattr(sys, "argv", ["main"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        commands.run(raiser["main"])
    assert caught.value.code == code


def test_a_fault_of_a_library_keeps_its_trace(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main"])
    with flagsaver.flagsaver(), pytest.raises(ValueError, match="reshape"):
        commands.run(lambda argv: np.zeros(3).reshape(2))


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: jax.numpy.zeros(2**46), "281474976710656 bytes were asked for"),
        (lambda: np.zeros(2**56), "512. PiB were asked for"),
        (lambda: [0] * 2**60, "out of memory; take a smaller batch"),
    ],
)
def test_too_little_memory_is_one_sentence(monkeypatch, work, expected):
    monkeypatch.setattr(sys, "argv", ["main"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        commands.run(lambda argv: work())
    assert one_sentence(caught.value.code) and re.search(expected, caught.value.code)


def test_ctrl_c_is_a_line_and_the_exit_code_of_shells(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["main"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
        commands.run(interrupted)
    assert caught.value.code == commands.INTERRUPTED and capsys.readouterr().err == "interrupted\n"


def test_commands_run_under_the_default_settings_of_jax(monkeypatch, caplog):
    """Whatever the environment says, such as JAX_ENABLE_X64; and a line says so."""
    monkeypatch.setattr(sys, "argv", ["main"])
    found = []
    with flagsaver.flagsaver(), jax.enable_x64(True), pytest.raises(SystemExit) as caught:
        commands.run(lambda argv: found.append(jax.numpy.zeros(()).dtype))
    assert not caught.value.code and found == ["float32"]
    assert any("jax_enable_x64 are not used" in record.getMessage() for record in caplog.records)


PRINTS = r"""
from jax_distill.runs import commands
line = "wrote gr\u00fc\u00dfe \udcff.png " + "." * 100
commands.run(lambda argv: [print(line) for _ in range(2000)])
"""


def test_what_is_printed_need_not_fit_the_terminal_nor_be_read():
    """An encoding that lacks its letters, and a reader such as `head` that has enough."""
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    ) as running:
        assert running.stdout.readline().startswith(rb"wrote gr\xfc\xdfe \udcff.png .")
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == commands.PIPE_CLOSED


WRONG = {
    "sample": {
        "--prompt=a --seed=4294967296": "--seed=4294967296.*4294967295",
        "--prompt=a --seed=-1": "--seed=-1",
        "--prompt=a --seed=1.5": "--seed=1.5: not an integer in the range",
        "--prompt=a --guidance=nan": "--guidance=nan: not finite",
        "--prompt=a --guidance=-inf": "--guidance=-inf: not finite",
        "--prompt=a --steps=1000000000": "steps: 1000000000 is more than",
        "--prompt=a --steps=0": "--steps=0",
        "--prompt=a --height=-16": "--height=-16",
        "--prompt=a --output=x.jpg": "--output: 'x.jpg'",
        "--prompt=a --output=": "--output: ''",
        "--prompt=a --output=/proc/none/x.png": "--output: '/proc/none/x.png'",
        "--prompt=a --output=README.md/x.png": "--output: 'README.md/x.png'",
        "--steps=2": "--prompt is missing",
    },
    "evaluate": {
        "--seed=4294967296": "--seed=4294967296.*4294967295",
        "--guidance=inf": "--guidance=inf: not finite",
        "--steps=": "--steps: none given",
        "--steps=1,1000000000": "steps: 1000000000 is more than",
        "--steps=0": "steps: 0 is not at least 1",
        "--diversity_prompts=7": "diversity_prompts: 7 is not a multiple of 6",
        "--output=/proc/none/x.json": "--output: '/proc/none/x.json'",
        "--output=tests": "--output: 'tests' exists",
        "--output=": "--output: ''",
        "--judge=no/where": "'no/where' has no drawing.json",
        "--judge=x --steps=2": "--steps: the folders of --judge are drawn already",
        "--judge=x --real=x": "--real needs --clip",
        "--judge=x --output=x.txt": "--output: 'x.txt' has the wrong ending",
        "--clip=x": "--clip needs --judge",
        "--pictures=2": "--pictures needs --benchmark",
        "--benchmark=coco": "--benchmark=coco",
        "--benchmark=geneval": "--steps: give one number",
        "--benchmark=geneval --steps=2": "--output is missing",
        "--benchmark=geneval --steps=2 --output=x": "--prompts_file is missing",
        "--benchmark=dpg --steps=2 --output=x --prompts_file=y": "--prompts_file: 'y' is missing",
        "--benchmark=prompts --steps=2 --output=x --prompts_file=bundled": "no plain prompts",
        "--benchmark=dpg --prompts=6": "--prompts is of scores in the shapes world",
    },
    "prepare": {
        "--output=x --seed=4294967296": "--seed=4294967296.*4294967295",
        "--output=x --teacher=embedded --guidance=nan": "--guidance=nan: not finite",
    },
}
RUN_ALL = """
import importlib, sys
from absl import flags
from jax_distill import pipeline
from jax_distill.runs import commands
def fail(*arguments, **named): raise AssertionError("something is loaded")
pipeline.load = fail
module = importlib.import_module("jax_distill." + sys.argv[1])
for case in sys.argv[2:]:
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    sys.argv = ["command", *case.split(" ")]
    try:
        commands.run(module.main)
    except SystemExit as stop:
        print(stop.code)
"""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_asked_of_a_command_is_checked_before_anything_is_loaded(name):
    cases = WRONG[name]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, name, *cases], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(cases), done.stderr
    for line, (case, expected) in zip(lines, cases.items()):
        assert line.startswith("error: ") and re.search(expected, line), (case, line)


def process(*argv):
    return subprocess.run(
        [sys.executable, "-m", "jax_distill.main", *argv], cwd=ROOT, capture_output=True, text=True
    )


def test_the_process_ends_with_one_line_and_code_one():
    done = process("--config=configs/teacher.py", "--config.totl_steps=5")
    assert done.returncode == 1 and done.stdout == ""
    assert one_sentence(done.stderr.removesuffix("\n"))


def test_help():
    done = process("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "--config" in done.stdout and "--workdir" in done.stdout
    assert done.stdout.startswith("Train: `python -m jax_distill.main --config=")
