"""Damaged files are refused in a sentence or read as they say; what does worse is noticed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = "configs,results,metrics,records,pictures,metadata,captions,packed"
HEAVY = "weights,tokenizers,folders"


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kinds", "inputs"), [(LIGHT, 400), pytest.param(HEAVY, 300, marks=pytest.mark.slow)]
)
def test_damaged_files_are_refused_or_read_as_they_say(kinds, inputs):
    done = python("benchmarks/fuzz.py", f"--kinds={kinds}", f"--inputs={inputs}", "--seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["ratio"] == 0 and line["inputs"] > 0.9 * inputs
    assert line["refused"] > 0.1 * inputs and line["same"] > 0.1 * inputs


SANDBOX = """
    import os, sys, tempfile
    from pathlib import Path

    sys.path.insert(0, "benchmarks")
    from fuzzing.kind import Kind
    from fuzzing.sandbox import Sandbox

    def make(root):
        (root / "base").mkdir(parents=True)
        (root / "outside").mkdir()
        (root / "base" / "a.json").write_text("1")

    def read_of(act):
        def read(rng, folder):
            if (folder / "a.json").read_text() == "2":
                return act(folder)
        return read

    def refuse(message):
        def act(folder):
            raise ValueError(message)
        return act

    acts = {
        "same": lambda folder: None,
        "refused": refuse("'a.json' is damaged; mend it"),
        "unclear": refuse("something is wrong"),
        "traceback": lambda folder: {}["a"],
        "memory": lambda folder: bytes(15 * 10**8) and None,
        "executed": lambda folder: os.system("true"),
        "meaning": lambda folder: "another",
    }
    with tempfile.TemporaryDirectory() as folder:
        bases, scratch = Path(folder, "bases"), Path(folder, "scratch")
        scratch.mkdir()
        kinds = {
            name: Kind(
                1.0,
                make,
                lambda rng, folder: (folder / "a.json").write_text("2"),
                read_of(act),
                lambda value, folder, base: value or "",
            )
            for name, act in acts.items()
        }
        for name, kind in kinds.items():
            kind.make(bases / name)
        sandbox = Sandbox(scratch, bases, kinds, lambda path: path == "<string>")
        for name in kinds:
            print(name, sandbox.judge(name, 1, 0, lambda state: None).kind)
        os.chdir("/")
"""


def test_what_an_input_does_is_noticed():
    done = python("-c", textwrap.dedent(SANDBOX))
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert len(found) == 7
    assert found == {name: name for name in found}
