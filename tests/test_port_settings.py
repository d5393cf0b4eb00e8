"""Files tell, flags tell, or it is asked for or assumed aloud; nothing is guessed in silence."""

import json
import math
import re
import subprocess
import sys

import pytest
import random_files
import random_pipeline
import torch
from random_files import BASE_LENGTH, NETWORK, SCHNELL, factors
from safetensors.torch import save_file

from jax_distill import config, worlds
from jax_distill.assembly import build
from jax_distill.interop import ported_folder
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port
from jax_distill.worlds.flux.world import ported_config

STOCK = {"time_scale": 1000.0, "guidance_factor": 1000.0}
ONES = {"time_scale": 1.0, "guidance_factor": 1.0}
INTERVAL = {"interval": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_files.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    """A base without guidance embedder, whose schedule is not shifted."""
    root = tmp_path_factory.mktemp("schnell")
    sizes = random_pipeline.Sizes(SCHNELL, scheduler=(("shift", 1.0),))
    random_pipeline.save_random(root / "source", sizes)
    port(root / "source", root / "base", text_length=BASE_LENGTH)
    return root / "base"


def _file(path, header=None, network=NETWORK, interval=False, wrapped=False, head=False):
    """Writes a transformer as safetensors, or as PyTorch does if the name ends with pt."""
    state = random_files.state_dict(network, interval)
    state |= random_files.loss_head() if head else {}
    if path.suffix == ".pt":
        torch.save({"module": state} if wrapped else state, path)
    else:
        save_file(state, path, header and {k: str(x) for k, x in header.items()})
    return path


def _asked(path, base, message, **flags):
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        port(path, path.parent / "out", base=str(base or ""), **flags)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


PAIR = "give --time_scale=1000 --guidance_factor=1000 .* or --time_scale=1 --guidance_factor=1 "


@pytest.mark.parametrize(
    ("name", "made", "flags", "message"),
    [
        ("x.pt", {}, {}, PAIR),
        ("x.pt", {}, {"objective": "flow_matching"}, PAIR),
        ("x.pt", {"wrapped": True}, {"objective": "flow_matching"}, PAIR),
        ("x.pt", {"wrapped": True}, {"objective": "time_rescale"}, PAIR),
        (
            "x.pt",
            {},
            {"time_scale": 1.0},
            "its time scale is not a plain teacher's; give --objective",
        ),
        (
            "x.pt",
            {},
            {"time_scale": 1.0, "objective": "time_rescale"},
            "multiplies the guidance scale .* --guidance_factor=1 ",
        ),
        ("x.pt", INTERVAL, {"time_scale": 1000.0}, "give --guidance_factor=1000"),
        ("x.safetensors", INTERVAL, {}, PAIR),
        ("x.safetensors", {"head": True}, {}, PAIR),
        ("x.safetensors", {}, {"objective": "scm"}, PAIR),
        ("x.safetensors", {}, {"objective": "imm"}, PAIR),
        ("x.safetensors", {}, {"objective": "time_rescale"}, PAIR),
        (
            "x.safetensors",
            {},
            {"time_scale": 1.0, "objective": "scm"},
            "multiplies the guidance scale before",
        ),
        (
            "x.safetensors",
            {"header": {"time_scale": 1.0}},
            {},
            "give --objective, one of dmd2, flow_matching, ",
        ),
        (
            "x.safetensors",
            {"header": {"time_scale": 1.0}, **INTERVAL},
            {},
            "--guidance_factor=1000",
        ),
    ],
)
def test_factors_that_nothing_tells_are_asked_for(base, tmp_path, name, made, flags, message):
    _asked(_file(tmp_path / name, **made), base, message, **flags)


@pytest.mark.parametrize(
    ("name", "made", "flags", "expected"),
    [
        ("x.pt", {"wrapped": True}, {}, ("scm", 1.0, 1.0)),
        ("x.pt", {"head": True}, {}, ("scm", 1.0, 1.0)),
        ("x.pt", INTERVAL, {}, ("meanflow", 1.0, 1.0)),
        ("x.pt", {}, STOCK, ("flow_matching", 1000.0, 1000.0)),
        (
            "x.pt",
            {"wrapped": True},
            {"objective": "flow_matching", **STOCK},
            ("flow_matching", 1000.0, 1000.0),
        ),
        ("x.safetensors", {}, {}, ("flow_matching", 1000.0, 1000.0)),
        ("x.safetensors", {}, {"objective": "scm", **ONES}, ("scm", 1.0, 1.0)),
        (
            "x.safetensors",
            {"header": {"objective": "imm", "time_scale": 1.0, "guidance_factor": 7.0}, **INTERVAL},
            {"objective": "imm"},
            ("imm", 1.0, 7.0),
        ),
    ],
)
def test_what_is_told_or_assumed_is_kept(base, tmp_path, name, made, flags, expected):
    port(_file(tmp_path / name, **made), tmp_path / "out", base=str(base), **flags)
    objective = config.load(tmp_path / "out").objective.name
    assert (objective, *factors(tmp_path / "out")) == expected
    said = " ".join(ported_folder.describe(tmp_path / "out")["assumed"])
    assert ("1 t and 1 w" in said) == (name == "x.pt" and not flags)
    assert ("1000 t and 1000 w" in said) == (name != "x.pt" and not (flags or made))
    if "header" not in made and not flags.get("objective"):
        methods = {"scm": "by sCM", "meanflow": "(--objective=imm)", "flow_matching": "a teacher"}
        assert methods[expected[0]] in said
    else:
        assert "trained by" not in said and "a teacher" not in said


@pytest.mark.parametrize(
    ("header", "flags", "message"),
    [
        ({"objective": "scm", **ONES}, {"objective": "imm"}, "says scm, which is not imm; leave"),
        ({"objective": "scm", **ONES}, {"time_scale": 1000.0}, "says 1, which is not 1000; leave"),
        ({"objective": "scm", **ONES}, {"guidance_factor": 2.0}, "--guidance_factor: .* says 1, "),
        ({"objective": "magic"}, {}, "unknown objective 'magic'; known: dmd2, flow_matching, "),
        ({"time_scale": "fast"}, {}, "time_scale is 'fast', not a number"),
    ],
)
def test_flags_do_not_contradict_files(base, tmp_path, header, flags, message):
    _asked(_file(tmp_path / "x.safetensors", header), base, message, **flags)


def _shift(folder, tokens=4096):
    return worlds.of(ported_config(folder)).time_shift(tokens)


@pytest.mark.parametrize(
    ("flags", "shift", "length"),
    [
        ({"shift": "1", "text_length": 256}, 0.0, 256),
        ({"shift": "3", "text_length": 256}, math.log(3), 256),
        ({"shift": "base", "text_length": 512}, 1.15, 512),
        ({"shift": "dynamic", "text_length": 12}, 1.15, 12),
    ],
)
def test_a_network_unlike_its_base_is_drawn_from_as_told(base, tmp_path, flags, shift, length):
    path = _file(tmp_path / "x.safetensors", network=SCHNELL)
    port(path, tmp_path / "out", base=str(base), **flags)
    assert _shift(tmp_path / "out") == pytest.approx(shift)
    assert _shift(base) == pytest.approx(1.15)
    assert config.load(tmp_path / "out").data.text_length == length
    export(str(tmp_path / "out"), tmp_path / "exported")
    scheduler = json.loads((tmp_path / "exported/scheduler/scheduler_config.json").read_text())
    assert scheduler["use_dynamic_shifting"] == (flags["shift"] in ("base", "dynamic"))
    card = (tmp_path / "exported/README.md").read_text()
    for words in ported_folder.describe(tmp_path / "out")["assumed"]:
        assert f"did not say: {words}\n" in card
    assert "a teacher, made by flow matching" in card and "captions are of" not in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "no guidance embedder and that of --base one, .* give --shift=1 --text_length=256"),
        ({}, f"or --shift=base --text_length={BASE_LENGTH} .as --base"),
        ({"shift": "1"}, f"give --text_length=256 .* or --text_length={BASE_LENGTH} "),
        ({"text_length": 9}, "give --shift=1 .as FLUX.1-schnell. or --shift=base .as --base.$"),
        ({"shift": "fast", "text_length": 9}, "--shift: give base, dynamic .* not 'fast'"),
        ({"shift": "-1", "text_length": 9}, "--shift: give base, dynamic .* not '-1'"),
        ({"shift": "nan", "text_length": 9}, "--shift: give base, dynamic .* not 'nan'"),
    ],
)
def test_schedule_and_length_of_a_base_unlike_it_are_asked_for(base, tmp_path, flags, message):
    _asked(_file(tmp_path / "x.safetensors", network=SCHNELL), base, message, **flags)


def test_a_guided_network_beside_a_base_without_guidance_is_asked_for_too(schnell, tmp_path):
    assert _shift(schnell) == 0.0
    path = _file(tmp_path / "x.safetensors")
    dev = "give --shift=dynamic --text_length=512 .as FLUX.1-dev. or --shift=base"
    _asked(path, schnell, dev)


def test_a_network_like_its_base_is_drawn_from_as_it_is(base, tmp_path):
    port(_file(tmp_path / "x.safetensors"), tmp_path / "out", base=str(base))
    described = ported_folder.describe(tmp_path / "out")
    assert described["scheduler"] == ported_folder.describe(base)["scheduler"]
    assert config.load(tmp_path / "out").data.text_length == BASE_LENGTH
    assert "the schedule is that of --base" in described["assumed"]
    assert f"captions are of {BASE_LENGTH} tokens, as those of --base" in described["assumed"]


def test_what_does_not_fit_the_source_is_refused(base, tmp_path):
    folder = base.parent / "source"
    for flags, message in (
        ({"shift": "1"}, "--shift: the folder has a scheduler of its own; leave it out"),
        ({"variant": "fp16"}, "--variant: .* has no weights of variant fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            port(folder, tmp_path / "out", **flags)
    schnell = _file(tmp_path / "x.safetensors", network=SCHNELL)
    _asked(schnell, base, "embeds no guidance scale; leave it out", guidance_factor=1.0)
    _asked(schnell, base, "x.safetensors' is one file, which has none", variant="fp16")
    inner = tmp_path / "transformer"
    random_files.save_transformer(inner, random_files.state_dict(SCHNELL), SCHNELL)
    _asked(inner, None, "no guidance embedder and no scheduler of .* --shift=1 .* --shift=dynamic")
    _asked(inner, None, "--shift=base: needs --base", shift="base")


@pytest.mark.parametrize("factor", ["time_scale", "guidance_factor"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_factors_are_positive_numbers(base, tmp_path, factor, value):
    path = _file(tmp_path / "x.pt", wrapped=True)
    flags = ONES | {factor: value}
    _asked(path, base, f"{factor}: {value} is not a positive number", **flags)


def test_the_text_length_of_a_pipeline_is_told(base, tmp_path):
    port(base.parent / "source", tmp_path / "out")
    assert config.load(tmp_path / "out").data.text_length == 256
    [said] = ported_folder.describe(tmp_path / "out")["assumed"]
    assert "captions are of 256 tokens" in said and "FLUX.1-dev was made with 512" in said
    assert ported_folder.describe(base)["assumed"] == []


@pytest.mark.parametrize("layout", ["diffusers", "safetensors"])
@pytest.mark.parametrize(
    ("interval", "flags"),
    [
        (False, {"objective": "scm", **ONES}),
        (True, {"objective": "imm", "time_scale": 1.0, "guidance_factor": 1000.0}),
        (True, {"objective": "meanflow", **STOCK}),
    ],
)
def test_our_exports_say_all_of_it(base, tmp_path, layout, interval, flags):
    path = _file(tmp_path / "x.safetensors", interval=interval)
    port(path, tmp_path / "first", base=str(base), **flags)
    export(str(tmp_path / "first"), tmp_path / "exported", layout=layout)
    if layout == "diffusers":
        port(tmp_path / "exported", tmp_path / "second", text_length=BASE_LENGTH)
        assert ported_folder.describe(tmp_path / "second")["assumed"] == []
    else:
        port(tmp_path / "exported/model.safetensors", tmp_path / "second", base=str(base))
    first, second = (config.load(tmp_path / name) for name in ("first", "second"))
    assert first.model == second.model and first.objective == second.objective
    assert first.objective.name == flags["objective"]
    assert factors(tmp_path / "second") == (flags["time_scale"], flags["guidance_factor"])
    random_files.assert_same_tensors(
        tmp_path / "second", random_files.network_of(tmp_path / "first")
    )


def test_a_folder_of_a_student_that_does_not_say_its_objective_is_asked(base, tmp_path):
    inner = tmp_path / "transformer"
    random_files.save_transformer(inner, random_files.state_dict(), time_scale=1.0)
    _asked(inner, base, "its time scale is not a plain teacher's; give --objective, one of")
    _asked(inner, base, "multiplies the guidance scale before", objective="scm")


def test_students_ported_before_the_guidance_factor_are_to_be_ported_again(base, tmp_path):
    folder = tmp_path / "out"
    port(_file(tmp_path / "x.pt", wrapped=True), folder, base=str(base))
    ported_config(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["model"]["guidance_factor"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="ported before the guidance factor was kept; port it ag"):
        ported_config(folder)


def test_the_command_takes_what_it_asks_for(base, tmp_path):
    path = _file(tmp_path / "x.safetensors", network=SCHNELL)
    command = [sys.executable, "-m", "jax_distill.port", f"--source={path}", f"--base={base}"]
    command.append(f"--output={tmp_path / 'out'}")
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: .*; give --shift=1 --text_length=256 .*\n", ran.stderr)
    command += ["--shift=3", "--text_length=7", "--time_scale=2", "--objective=time_rescale"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert _shift(tmp_path / "out") == pytest.approx(math.log(3))
    settings = config.load(tmp_path / "out")
    assert settings.objective.name == "time_rescale" and settings.data.text_length == 7
    assert settings.model.time_scale == 2.0
    assert ported_folder.describe(tmp_path / "out")["assumed"] == [] and "assumed" not in ran.stderr


def test_how_a_teacher_is_guided_is_told_or_said(base, tmp_path):
    path = _file(tmp_path / "x.safetensors", network=SCHNELL)
    told = {"base": str(base), "shift": "1", "text_length": 7}
    port(path, tmp_path / "auto", **told)
    assert any(
        "no guidance is applied" in x for x in ported_folder.describe(tmp_path / "auto")["assumed"]
    )
    assert build.guidance_of(config.load(tmp_path / "auto")) == "none"
    student = config.load(tmp_path / "auto").copy_and_resolve_references()
    with student.unlocked():  # whose card says what its teacher's does
        student.teacher.checkpoint = str(tmp_path / "auto")
    assert worlds.of(student).assumed == ported_folder.describe(tmp_path / "auto")["assumed"]
    port(path, tmp_path / "cfg", **told, guidance="cfg")
    assert not any("guidance" in x for x in ported_folder.describe(tmp_path / "cfg")["assumed"])
    assert build.guidance_of(config.load(tmp_path / "cfg")) == "cfg"
    del told["base"]  # as `_asked` gives it
    _asked(path, base, "has no guidance embedder; leave it out", **told, guidance="embedded")
