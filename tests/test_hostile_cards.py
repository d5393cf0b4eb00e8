"""What a stranger's files say comes into a model card as text or as a number, never as code."""

import ast
import dataclasses
import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
import random_pipeline
from tiny_runs import RUNS, programs, save_run

from jax_distill.interop.cards import card as cards
from jax_distill.interop.cards import model_card
from jax_distill.interop.time_scale import Refitted
from jax_distill.models import mmdit
from jax_distill.runs.exporting import export
from jax_distill.runs.porting import port
from jax_distill.sampling import Angles, Listed, PushForward, Restart, Shifted
from jax_distill.storage import quoting

PAYLOADS = [
    "x\nimport os; os.abort()\n",
    "x\r\n```python\nraise SystemExit\n```\n",
    "'''; raise SystemExit; '''",
    '"); raise SystemExit #',
    "`raise SystemExit` ``` ~~~",
    "$mu ${shift} $$ %s {card.name} {0}",
    "__import__('os').abort()",
    "<script>alert(1)</script> [a](javascript:b) ![c](http://d)",
    "\u2028import os\u2029\x85\x0bimport os\x1b[2J\u202e\ud800",
]
BENIGN = cards.Card(
    name="run",
    method="scm",
    summary="A student",
    layout="diffusers",
    dtype="float32",
    time_scale=1000.0,
    guidance_factor=1000.0,
    refits={},
    guidance=4.5,
    guidance_embeds=True,
    guided=False,
    interval_embeds=False,
    steps=2,
    resolution=(64, 64),
    patch=16,
    channels=16,
    sampler=Restart(Angles(1.3)),
    text_length=24,
)
VARIANTS = [
    BENIGN,
    dataclasses.replace(BENIGN, layout="safetensors", sampler=PushForward(Shifted(0.5, 0.9))),
    dataclasses.replace(BENIGN, layout="safetensors", sampler=Restart(Listed((1.0, 0.4)))),
    dataclasses.replace(BENIGN, layout="t2i_distill", guidance_factor=1.0),
    dataclasses.replace(
        BENIGN, layout="lora", base=cards.Base("a folder", 4, int8=True, same_inputs=True)
    ),
]


def shape(code):
    """A program without its constants."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = 0
    return ast.dump(tree)


def blocks(text):
    return [shape(code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("card", VARIANTS, ids=lambda card: card.layout)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_is_one_line_of_text_wherever_it_stands(card, payload):
    texts = {
        "name": payload,
        "dtype": payload,
        "assumed": [payload],
        "captions": [payload] if card.layout == "diffusers" else (),
        "has_text": card.layout == "diffusers",
    }
    hostile = dataclasses.replace(card, **texts)
    harmless = {key: "x" if isinstance(x, str) else ["x"] * (x != ()) for key, x in texts.items()}
    benign = dataclasses.replace(card, **harmless | {"has_text": texts["has_text"]})
    text, expected = model_card.text(hostile), model_card.text(benign)
    assert blocks(text) == blocks(expected)
    assert text.count("```") == expected.count("```")
    assert len(text.splitlines()) == len(expected.splitlines())
    assert not re.search(r"(?<!\\)<|(?<!\\)\[a", text.partition("```")[0])
    text.encode()


NUMBERS = [
    *("guidance", "time_scale", "guidance_factor", "steps", "patch", "channels"),
    "text_length",
]


@pytest.mark.parametrize("value", [*PAYLOADS, math.nan, math.inf, 1e300, True, None, [1], {"a": 1}])
def test_what_is_no_number_is_refused_by_its_name(value):
    for name in NUMBERS:
        with pytest.raises(ValueError, match=f"^{name}: .* is no number") as error:
            dataclasses.replace(BENIGN, **{name: value})
        assert len(str(error.value).splitlines()) == 1
    for changes in (
        {"resolution": (64, value)},
        {"sampler": Restart(Angles(value))},
        {"sampler": PushForward(Shifted(value))},
        {"sampler": PushForward(Shifted(0.0, value))},
        {"sampler": Restart(Listed((1.0, value)))},
        {"scores": {2: value}},
    ):
        with pytest.raises(ValueError, match="is no number"):
            dataclasses.replace(BENIGN, **changes)


def test_numbers_of_numpy_are_written_as_pythons():
    assert quoting.literal("x", np.float64(0.5)) == "0.5"
    assert quoting.literal("x", 3) == "3"
    with pytest.raises(ValueError, match="x: "):
        quoting.literal("x", 10**400)


@pytest.mark.parametrize("text", ["a", "`", "a``b", "``` `", "`a"])
def test_code_ends_where_it_should(text):
    written = quoting.code(text)
    fence = re.match("`+", written)[0]
    inner = written[len(fence) : -len(fence)]
    assert inner.strip() == text and fence not in re.findall("`+", inner)


def test_the_command_for_a_base_is_one_word_for_a_shell():
    import shlex

    for text in ("a b; rm -rf x", "$(x)", "a'b", "plain/path_1"):
        assert shlex.split(quoting.word(text)) == [text]


TEXTS = {  # what a ported folder says, in numbers or in words
    "config.json": [
        *(("name",), ("evaluation", "guidance"), ("samples", "teacher_steps")),
        *(("objective", "name"), ("model", "time_scale")),
    ],
    "ported.json": [
        *(("assumed",), ("scheduler", "_class_name"), ("scheduler", "shift")),
        *(("scheduler", "base_shift"), ("parts", "network", "_class_name"), ("dtype",)),
    ],
}


@pytest.fixture(scope="module")
def ported_folder(tmp_path_factory):
    """A ported folder, and the shapes of the programs in its card."""
    root = tmp_path_factory.mktemp("ported")
    random_pipeline.save_random(root / "source")
    port(root / "source", root / "good", text_length=16)
    settings = json.loads((root / "good/config.json").read_text())
    settings["data"]["resolution"] = [32, 32]
    (root / "good/config.json").write_text(json.dumps(settings))
    export(str(root / "good"), root / "benign", layout="safetensors")
    return root / "good", [shape(code) for code in programs(root / "benign")]


def test_no_value_of_a_ported_folder_or_a_run_becomes_code(ported_folder, tmp_path, monkeypatch):
    """Every text and number in the JSON of a ported folder, one after another."""
    good, expected = ported_folder
    # Tracing the network, the same in all, is most of an export's time.
    monkeypatch.setattr(mmdit, "as_network", functools.cache(mmdit.as_network))
    bad = shutil.copytree(good, tmp_path / "bad")
    written = set()
    for file, paths in TEXTS.items():
        whole = (bad / file).read_text()
        for index, path in enumerate(paths):
            for payload in (PAYLOADS[index % 2], PAYLOADS[2 + index % 5]):  # the latter of one line
                values = json.loads(whole)
                node = values
                for key in path[:-1]:
                    node = node[key]
                node[path[-1]] = [payload] if path == ("assumed",) else payload
                (bad / file).write_text(json.dumps(values))
                try:
                    export(str(bad), tmp_path / "out", layout="safetensors")
                except ValueError as error:
                    assert len(str(error)) < 1000
                    continue
                written.add(path)
                assert [shape(code) for code in programs(tmp_path / "out")] == expected
                assert "\nimport os; os.abort()" not in (tmp_path / "out/README.md").read_text()
                shutil.rmtree(tmp_path / "out")
        (bad / file).write_text(whole)
    assert {("name",), ("assumed",), ("dtype",)} <= written  # words are no reason to refuse


def test_scores_of_a_card_are_those_of_results(tmp_path):
    run = save_run(tmp_path / "run", RUNS["flow_matching"])
    content = {"student": {"2": {"score": "0.5\nimport os"}}}
    (run / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"results.json' does not hold the scores.*student\.2"):
        export(str(run), tmp_path / "out")


def test_residuals_are_numbers_of_ours():
    refit = Refitted({}, 0.01, 0.5, 0.1)
    card = dataclasses.replace(BENIGN, refits={"time_embedder": refit})
    assert "differs by at most 1.0e-02" in model_card.text(card)
