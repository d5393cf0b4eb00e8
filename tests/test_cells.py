"""The study: what its cells run, that finished ones are kept, and what its table says."""

import dataclasses
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.assembly.resolution import resolve
from jax_distill.config import ConfigError
from jax_distill.config.settings import flatten
from jax_distill.evaluation import comparison
from jax_distill.models.mmdit import MMDiTConfig
from jax_distill.objectives.scm import SCM
from jax_distill.planning import evaluations, program
from jax_distill.runs import cells, config_flag, study_settings

ROOT = Path(__file__).parents[1]

STUB = """#!{python}
import json, os, sys
from pathlib import Path
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
flags = ("--workdir=", "--output=")
workdir = Path(next(a for a in sys.argv if a.startswith(flags)).split("=", 1)[1])
if "prepare" in sys.argv[2]:
    sys.exit(0)
workdir.mkdir(parents=True, exist_ok=True)
if "fail" in workdir.name:
    sys.exit(1)
if "stop" in workdir.name:
    sys.exit(0)
(workdir / "config.json").write_text('{{"seed": 0}}')
(workdir / "results.json").write_text('{{"config": {{"seed": 0}}}}')
"""


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Puts a program that only notes its arguments in the place of Python; returns the notes."""
    log, stub = tmp_path / "log", tmp_path / "stub"
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(0o755)
    log.write_text("")
    monkeypatch.setattr(cells.sys, "executable", str(stub))
    return lambda: log.read_text().splitlines()


def test_a_cell_is_the_training_command_and_a_finished_one_is_kept(trained, tmp_path):
    cell = tmp_path / "MeanFlow-0"
    for _ in range(2):
        command = cells.train("configs/meanflow.py", cell, ["seed=0", "objective.kappa=0.5"])
    want = (
        f"-m jax_distill.main --config=configs/meanflow.py --workdir={cell} --config.seed=0"
        " --config.objective.kappa=0.5"
    )
    assert trained() == [want] and command == f"python {want}"
    assert 0 < json.loads((cell / cells.COST).read_text())["peak_gib"] < 8


def test_a_failed_cell_stops_the_study_and_names_its_command(trained, tmp_path):
    with pytest.raises(ConfigError, match="a cell of the study failed.*--workdir=.*fail-0"):
        cells.train("configs/scm.py", tmp_path / "fail-0", [])
    with pytest.raises(ConfigError):
        cells.train("configs/scm.py", tmp_path / "fail-0", [])
    assert len(trained()) == 2  # it is not taken for finished


def test_a_cell_is_run_again_when_its_command_changed(trained, tmp_path):
    for steps in (2, 4, 4):
        cells.train("configs/scm.py", tmp_path / "sCM-0", [f"total_steps={steps}"])
    assert len(trained()) == 2


def test_a_cell_that_was_stopped_is_not_taken_for_finished(trained, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match="stopped before its end; run the study again"):
            cells.train("configs/scm.py", tmp_path / "stop-0", [])
    assert len(trained()) == 2


def test_data_is_made_by_its_command_once(trained, tmp_path):
    for made in (False, True):
        cells.prepare(tmp_path / "drawn", ["teacher=embedded", "steps=8"])
        command = (
            f"-m jax_distill.prepare --output={tmp_path / 'drawn'} --teacher=embedded --steps=8"
        )
        assert trained() == [command]
        if not made:
            (tmp_path / "drawn").mkdir()
            (tmp_path / "drawn" / "dataset.json").write_text("{}")


def test_the_folder_of_a_cell_needs_no_quotes():
    assert cells.folder("sCM, 1000 t", 0) == "sCM_1000_t-0"


@pytest.mark.parametrize("preset", ["", "ablations", "matching", "smoke"])
def test_every_row_of_the_studies_is_a_configuration_that_exists(preset):
    """Settings are keys of the row's file, of their type; names, and so folders, differ."""
    config = load_config("study").get_config(preset)
    rows = [row for row, *_ in config.rows]
    assert len({cells.folder(row, 0) for row in rows}) == len(rows)
    for row, file, *own in config.rows:
        known = flatten(load_config(Path(file).stem).get_config("").to_dict())
        model = {f"model.{field.name}" for field in dataclasses.fields(MMDiTConfig)}
        for setting in own:
            key, value = setting.split("=")
            assert key in known.keys() | model
            kind = type(known.get(key, 1000.0))
            assert kind is bool and value in ("True", "False") or kind(value) is not None
        own = [setting for setting in own if not setting.startswith("start.")]
        counts = cells.drawable(config.student_steps, config_flag.read(str(ROOT / file), own))
        assert set(config.grid_steps) <= set(counts)
        assert counts == list(config.student_steps) or row == "rCM" and counts == [1, 2, 4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"rows": 3}, "rows"),
        ({"rows": (("sCM", "configs/scm.py", 3),)}, r"Expected `str`, got `int` .* `\$.rows"),
        ({"rows": (("sCM",),)}, "rows: each needs a name and a config file"),
        ({"seeds": ("one",)}, "seeds"),
        ({"teacher": {"checkpoint": ""}}, "teacher"),
        ({"common": {"batch_size": 64}}, "common: give total_steps of every cell, or evaluations"),
        ({"common": {"evaluations": 9, "total_steps": 9}}, "common: give .*; not both"),
        ({"common": {"evaluations": -1}}, "common.evaluations: -1 is not a positive number"),
        ({"name": "../study"}, "name: '../study' is not a word"),
    ],
    ids=str,
)
def test_a_study_that_is_none_is_told_so(changes, expected):
    config = load_config("study").get_config().to_dict()
    if expected is None:
        return study_settings.check(ConfigDict(config))
    with pytest.raises(ValueError, match=expected) as caught:
        study_settings.check(ConfigDict({**config, **changes}))
    assert "\n" not in str(caught.value)


def load_config(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_are_rows_by_seeds_with_their_own_settings():
    rows = (("a", "configs/scm.py"), ("b", "configs/imm.py", "objective.gap=8"))
    config = ConfigDict({"rows": rows, "seeds": (0, 1)})
    assert list(cells._cells(config)) == [
        ("a", 0, "configs/scm.py", []),
        ("a", 1, "configs/scm.py", []),
        ("b", 0, "configs/imm.py", ["objective.gap=8"]),
        ("b", 1, "configs/imm.py", ["objective.gap=8"]),
    ]


def test_steps_follow_from_a_budget_where_a_row_has_none_of_its_own(monkeypatch):
    read = []

    def of_run(config):
        read.append((config.seed, config.batch_size))
        return evaluations.Costs(SCM(None, None), 40.0, {"student": evaluations.Moves(6, 6, 0)})

    monkeypatch.setattr(cells.evaluations, "of_run", of_run)
    own = ["seed=3", "batch_size=8"]
    assert cells.within(100, "configs/scm.py", own) == [*own, "total_steps=10"]
    assert read == [(3, 8)]
    for budget, settings in ((100, [*own, "total_steps=7"]), (None, own)):
        assert cells.within(budget, "configs/scm.py", settings) == settings
    with pytest.raises(ConfigError, match="no_such"):
        cells.within(100, "configs/scm.py", ["no_such=1"])


def entry(score):
    return {"score": score, "tasks": {"counting": score, "colors": score / 2}}


def cell(row, seed, one, four):
    return {
        "row": row,
        "seed": seed,
        "command": f"python -m jax_distill.main --config=<{row}>",
        "student": {"1": entry(one), "4": entry(four)},
        "history": {"100": {"1": entry(one / 2), "4": entry(four / 2)}},
        "steps": 200,
        "spent": {
            "100": {"evaluations": 700.0, "seconds": 45.0},
            "200": {"evaluations": 1300.0, "seconds": 90.0},
        },
        "evaluations": 1300.0,
        "evaluations_per_step": 6.0,
        "train_seconds": 90.0 + 60 * seed,
        "flops_per_step": 123_000_000_000,
        "peak_gib": 1.0 + seed,
    }


def cost(evaluations):
    return {"flops": 100_000_000 * evaluations, "seconds": evaluations / 1000}


STUDY = {
    "name": "study",
    "teacher": {"nfe": 50, **entry(0.8), "few": {"4": entry(0.2)}},
    "sampling": {
        "teacher": {"4": {**cost(8), "seconds": 0.004}, "50": {**cost(100), "seconds": 0.05}},
        "sCM": {"1": cost(1), "4": cost(4)},
    },
    "cells": [cell("sCM", 0, 0.4, 0.6), cell("sCM", 1, 0.56, 0.68), cell("IMM", 0, 0.2, 0.8)],
}


def test_table_has_shares_with_their_spread_and_costs():
    lines = comparison.table(STUDY)
    assert lines[0][1:3] == ["1 step", "4 steps"]
    assert lines[1] == ["sCM", "0.60 ±0.10", "0.80 ±0.05", "1300", "6.0", "2.0", "123", "2.0"]
    assert lines[2] == ["IMM", "0.25", "1.00", "1300", "6.0", "1.5", "123", "1.0"]
    assert lines[3][:3] == ["teacher", "-", "0.25"]
    text = comparison.format_table(STUDY).splitlines()
    assert len({len(line) for line in text[:3]}) == 1 and "0.800" in text[-1]
    assert comparison.markdown(lines).count("\n") == 4


def test_a_method_that_has_fewer_steps_leaves_a_gap(tmp_path):
    """Nothing is drawn, measured or plotted in more steps than a schedule has."""
    eight = cell("sCM", 0, 0.4, 0.6)
    eight["student"] = {**eight["student"], "8": entry(0.6)}
    study = {**STUDY, "cells": [cell("rCM", 0, 0.4, 0.6), eight]}
    lines = comparison.table(study)
    assert lines[0][1:4] == ["1 step", "4 steps", "8 steps"]
    assert [line[3] for line in lines[1:]] == ["-", "0.75", "-"]
    comparison.write(tmp_path, study)
    assert (tmp_path / "share-by-evaluations-8.svg").exists()


def test_a_pictures_cost_stands_where_it_is_known():
    lines = comparison.sampling_table(STUDY)
    assert lines[0] == ["a picture's cost", "1 step", "4 steps", "50 steps"]
    assert lines[1] == ["teacher", "-", "0.80 GFLOP, 4.0 ms", "10.00 GFLOP, 50.0 ms"]
    assert lines[2] == ["sCM", "0.10 GFLOP, 1.0 ms", "0.40 GFLOP, 4.0 ms", "-"]


def test_measures_have_the_teachers_and_real_ones_beside_them():
    one = {"latents": 1.0, "place": 16.0, "size": 2.0, "color": 0.8, "twice": 1.0}
    half = {**one, "place": 8.0, "to_real": 0.02}
    first, second, other = STUDY["cells"]
    study = {
        **STUDY,
        "measures": {"real": one, "teacher": one},
        "cells": [
            {**first, "measures": {"1": one}},
            {**second, "measures": {"1": half}},
            {**other, "measures": {"1": half}},
        ],
    }
    lines = comparison.measures_table(study)
    assert [line[:3] for line in lines[1:]] == [
        ["real", "-", "1.000"],
        ["teacher", "50", "1.000"],
        ["sCM", "1", "0.750 ±0.250"],
        ["IMM", "1", "0.500"],
    ]
    assert lines[3][4] == "12.000 ±4.000" and lines[3][-2:] == ["-", "-"]
    assert comparison.measures_table(STUDY) == []


@pytest.mark.parametrize("file", ["scm", "imm", "time_rescale"])
def test_a_picture_costs_an_evaluation_a_step(file):
    """A step of a student is one forward; the teacher's, its guidance being embedded, too."""
    config = load_config(file).get_config("")
    config = resolve(config).config
    one, four = (cells.sampling_flops(config, steps) for steps in (1, 4))
    assert four == 4 * one == 4 * program.forward_flops(config) // config.batch_size


def test_a_cell_of_the_embedded_teacher_is_measured_as_any(tmp_path):
    config = load_config("scm").get_config("")
    with config.unlocked():
        config.teacher.checkpoint = "embedded"
    config = resolve(config).config
    configuration.save(config, tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"student": {"2": entry(0.5)}}))
    (tmp_path / cells.COST).write_text(json.dumps({"peak_gib": 2.5}))
    lines = [{"step": 50, "steps_per_sec": 5.0}, {"step": 100, "steps_per_sec": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = cells.measured(tmp_path)
    assert found["train_seconds"] == 50 / 5 + 50 / 2 and found["peak_gib"] == 2.5
    assert (
        5.9 <= found["evaluations_per_step"] / config.batch_size <= 6.3
    )  # the teacher is guided by two
    spent = found["spent"][str(config.total_steps)]
    assert spent["evaluations"] == found["evaluations"] > 600 * found["evaluations_per_step"]


def test_page_holds_everything_and_needs_no_other_file(tmp_path):
    long = "python -m jax_distill.main " + " ".join(f"--config.{n}=1" for n in range(200))
    first, *others = STUDY["cells"]
    comparison.write(tmp_path, {**STUDY, "cells": [first, {**first, "command": long}, *others]})
    assert f"\n    {long}\n" in (tmp_path / "study.md").read_text()
    comparison.write(tmp_path, STUDY)
    page = (tmp_path / "study.html").read_text()
    assert "0.60 ±0.10" in page and "--config=&lt;sCM&gt;" in page
    assert "against training, thousands of network evaluations" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    spent = {f"{kind}-{n}" for kind in ("evaluations", "seconds") for n in (1, 4)}
    plots = {f"share-by-{what}.svg" for what in {"steps", *spent}}
    assert set(os.listdir(tmp_path)) == {"study.html", "study.md", *plots}
    text = (tmp_path / "study.md").read_text()
    assert set(re.findall(r"\]\((.*?)\)", text)) == plots
    assert "| sCM | 0.60 ±0.10 |" in text and "\n    python -m jax_distill.main" in text


def test_a_study_of_one_seed_has_no_spread():
    one = {**STUDY, "cells": STUDY["cells"][2:]}
    assert str(comparison.shares(one, one["cells"])[4]) == "1.00"
