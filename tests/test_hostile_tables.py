"""Tables of numbers made to do harm: results, metrics, what reports and studies read of them."""

import json
import os
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from random_text import write_tokenizers

from jax_distill.assembly import adapters
from jax_distill.evaluation import comparison, page, plots, report
from jax_distill.evaluation import metrics as logged
from jax_distill.evaluation.metrics import read_metrics
from jax_distill.evaluation.results import parse_results, read_results
from jax_distill.runs import cells
from jax_distill.storage import files
from jax_distill.worlds.flux.tokenizers import FluxTokenizer
from jax_distill.worlds.shapes import bundled

SCORE = {"score": 0.5, "tasks": {"a": 0.5}}


def one_sentence(error):
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "content",
    [
        {"student": {"9" * 5000: SCORE}},
        {"student": {"12345678": SCORE}},
        {"student": {str(n): SCORE for n in range(1, 1000)}},
        {"student": {"1": {"score": 0.5, "tasks": {f"t{n}": 1 for n in range(100_000)}}}},
        {"student": {"1": {"score": 0.5, "tasks": {"a\nb": 1}}}},
        {"student": {"1": {"score": 0.5, "tasks": {"a" * 1000: 1}}}},
        {"student": {"1": {"score": 10**400}}},
        {"student": {"1": {"score": -1e300}}},
        {"teacher": {"score": 0.5, "nfe": 2.5}},
        {"teacher": {"score": 0.5, "nfe": 10**50}},
        {"teacher": {"score": 0.5, "nfe": 0}},
        {"teacher": {"score": 0.5, "few": {"1": [SCORE]}}},
        {"teacher": None},
        [SCORE],
        7,
    ],
)
def test_results_are_bounded_and_of_their_types(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"results\.json' does not hold the scores") as error:
        read_results(path)
    one_sentence(error)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("text", ["[" * 100_000, '{"student": ' * 70 + "1" + "}" * 70, '"\\ud800"'])
def test_deep_and_broken_json_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json'") as error:
        read_results(tmp_path / "results.json")
    one_sentence(error)


def test_json_has_bounds(monkeypatch):
    nested = lambda depth: "[" * depth + "]" * depth  # noqa: E731
    assert files.parse_json(nested(files.JSON_DEPTH), where="x", fix="y")
    with pytest.raises(files.FileError, match="x has more than 64 nested tables; y"):
        files.parse_json(nested(files.JSON_DEPTH + 1), where="x", fix="y")
    monkeypatch.setattr(files, "JSON_BYTES", 2**20)
    with pytest.raises(files.FileError, match="longer than the 1 MiB of JSON"):
        files.parse_json("[" + "1," * 2**20 + "1]", where="x", fix="y")
    for number in ("NaN", "-Infinity"):
        value = files.parse_json(f'{{"a": [1, {{"b": {number}}}]}}', where="x", fix="y")
        with pytest.raises(files.FileError, match="x holds a number that is not finite; y"):
            files.check_finite_numbers(value, where="x", fix="y")


def test_formulas_in_names_are_text():
    """matplotlib would read what stands between dollars, and fail where it cannot."""
    names = [r"$\frac{", "a$b$c", r"\alpha", "$$", "^_{}"]
    scores = {name: 0.5 for name in names}
    draw = plots.bars_by_task(names, scores, "teacher", {1: scores})
    assert "<img" in plots.inline(draw, (4, 3), "x")
    assert plots.label("a\n$b\u202e") == r"a \$b"


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1e400, "loss": 1}',
        '{"step": 99999999999999999999, "loss": 1}',
        '{"step": -1, "loss": 1}',
        '{"step": 1.5, "loss": 1}',
        '{"step": true, "loss": 1}',
        '{"step": 3, "loss": 1' + "0" * 400 + "}",
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 3, "lo\\u0000ss": 1}',
        '{"step": 3, "' + "x" * 1000 + '": 1}',
        "[" * 50_000,
        '{"step": 3, "loss": "' + "x" * 2**21 + '"}',
    ],
    ids=range(11),
)
def test_lines_that_no_run_writes_are_counted_and_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n' + line + '\n{"step": 2, "loss": 3}\n')
    metrics = read_metrics(path)
    assert [x["step"] for x in metrics.lines] == [1, 2] and metrics.unreadable == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_metrics_are_read_in_what_their_mark_says(tmp_path, encoding):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\r\n{"step": 2, "loss": NaN}\n', encoding=encoding)
    metrics = read_metrics(path)
    assert metrics.unreadable == 0 and metrics.names() == ["step", "loss"]


def test_many_lines_are_thinned_and_many_names_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(logged, "MOST_LINES", 50)
    monkeypatch.setattr(logged, "MOST_NAMES", 10)
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": step, f"m{step}": 1, "loss": 2 * step} for step in range(1000))
    path.write_text("\n".join(map(json.dumps, lines)))
    metrics = read_metrics(path)
    assert 50 <= len(metrics.lines) <= 100 and metrics.stride > 1 and metrics.unreadable == 0
    assert len(metrics.names()) <= 10 and metrics.last_step > 900
    steps, loss = metrics.series("loss")
    np.testing.assert_array_equal(loss, 2 * steps)


def test_a_report_is_made_of_whatever_a_workdir_holds(tmp_path):
    """In seconds, with what cannot be read named or left out."""
    rows = [(0, 1e308, 5e-324), (2**52, 1e-300, 1e99), (5, float("nan"), -1e99), (7, 1e99, -1e308)]
    lines = [{"step": s, "loss": v, "<b>$x": w} for s, v, w in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    content = {"student": {"1": {"score": 0.5, "tasks": {"<script>$": 0.5}}}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("[" * 5000 + "]" * 5000)
    samples = tmp_path / "samples"
    samples.mkdir()
    os.mkfifo(samples / "step-1.png")
    Image.new("RGB", (4, 4)).save(samples / "step-2.png", format="gif")
    (samples / "step-3.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    begin = time.monotonic()
    text = report.write_report(tmp_path).read_text()
    assert time.monotonic() - begin < 20
    assert "config.json is not valid JSON" in text and "<script>" not in text and "<b>$" not in text
    assert "<h2>Samples</h2>" not in text


def test_a_wide_configuration_is_shown_in_part(tmp_path):
    values = {f"key{index}": index for index in range(5000)} | {"total_steps": 10**300}
    (tmp_path / "config.json").write_text(json.dumps(values))
    text = report.write_report(tmp_path).read_text()
    assert "4001 more" in text and text.count("<tr>") < 1100


def test_a_picture_is_looked_at_before_it_is_unpacked(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (9, 9)).save(path)
    assert page.picture(path).startswith("data:image/png")
    data = bytearray(path.read_bytes())
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(data)
    assert page.picture(path) is None


def test_a_table_in_markdown_is_a_table():
    lines = [["a|b", "c"], ["d\ne", "`f` <b>"]]
    assert comparison.markdown(lines).splitlines() == [
        r"| a\|b | c |",
        "| --- | ---: |",
        r"| d e | \`f\` \<b\> |",
    ]


# Studies, adapters, what is bundled.


@pytest.mark.parametrize(
    "file, content, match",
    [
        ("results.json", None, r"results\.json' is missing; remove the run's folder"),
        ("results.json", {"student": {"2": 1}}, r"student\.2 is 1"),
        ("metrics.jsonl", None, "has no speeds of a run"),
        ("metrics.jsonl", {"step": 1, "loss": 1}, "has no speeds of a run"),
        ("metrics.jsonl", {"step": 1, "steps_per_sec": 0}, "has no speeds of a run"),
        ("scores.json", {"5": {"2": {"score": "x"}}}, r"scores\.json' does not hold scores"),
        ("scores.json", {"five": {"2": SCORE}}, r"scores\.json' does not hold scores"),
        ("scores.json", [1], r"scores\.json' does not hold what"),
    ],
)
def test_a_cell_that_lacks_something_is_named(tmp_path, file, content, match):
    from jax_distill import config

    settings = config.base()
    settings.name, settings.objective.name = "cell", "scm"
    config.save(settings, tmp_path)
    good = {
        "results.json": {"student": {"2": SCORE}},
        "metrics.jsonl": {"step": 1, "steps_per_sec": 2},
    } | {file: content}
    for name, value in good.items():
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=match) as error:
        cells.measured(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize(
    "content", [{"peak_gib": "1"}, {"peak_gib": -1}, {"command": 1, "peak_gib": 1}, {}, [], "x"]
)
def test_costs_are_of_their_types(tmp_path, content):
    (tmp_path / cells.COST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cost\.json'.*run the study again") as error:
        cells.train("configs/teacher.py", tmp_path, [])
    one_sentence(error)


@pytest.mark.parametrize("text", ["{", "[]", '{"checksum": "1"}', '{"checksum": 1.5}'])
def test_what_adapters_stand_beside_is_a_number(tmp_path, text):
    from jax_distill import config

    settings = config.base()
    with settings.unlocked():
        settings.lora.rank, settings.lora.alpha = 2, 2.0
    (tmp_path / adapters.TEACHER).write_text(text)
    with pytest.raises(ValueError, match=r"teacher\.json'.*train anew in another --workdir"):
        adapters.check_teacher(settings, tmp_path, {"x": np.zeros(3, np.float32)})


def test_damaged_weights_of_the_package_are_named(tmp_path):
    bundled.save("x", {"a": np.zeros(3, np.float32)}, {"b": 1}, tmp_path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json' is not valid JSON.*reinstall the package"):
        bundled.load("x", tmp_path)
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match=r"x\.json' is missing; reinstall the package"):
        bundled.load("x", tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"x\.safetensors' is damaged .*reinstall the package"):
        bundled.load("x", tmp_path)


# Tokenizers.


@pytest.fixture
def folder(tmp_path):
    write_tokenizers(tmp_path)
    return tmp_path


def test_code_and_templates_of_a_tokenizer_are_not_run(folder):
    mark = folder / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "evil.py").write_text(code + "class Evil: pass\n")
        path = folder / name / "tokenizer_config.json"
        values = json.loads(path.read_text()) if path.exists() else {}
        values["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        values["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        path.write_text(json.dumps(values))
    ids = FluxTokenizer.load(folder, 16).encode(["a red circle"])
    assert ids.t5.shape == (1, 16) and not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"model_max_length": "long", "added_tokens_decoder": 3}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [], "merges": 3}}'),
        ("tokenizer.json", "\0"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(folder, name, file, content):
    (folder / name / file).write_text(content)
    with pytest.raises(ValueError, match="tokenizer") as error:
        FluxTokenizer.load(folder, 16).encode(["a red circle"])
    one_sentence(error)


def test_lengths_and_sizes_of_tokenizers_are_bounded(folder, monkeypatch):
    with pytest.raises(ValueError, match="t5_length: 1000000000 is more than 8192"):
        FluxTokenizer.load(folder, 10**9)
    path = folder / "tokenizer/tokenizer_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"model_max_length": 500_000}))
    with pytest.raises(ValueError, match="it has no model_max_length of captions"):
        FluxTokenizer.load(folder, 16)
    monkeypatch.setattr("jax_distill.worlds.flux.tokenizers._BYTES", 10)
    with pytest.raises(ValueError, match="is longer than any tokenizer's file"):
        FluxTokenizer.load(folder, 16)
    os.mkfifo(folder / "tokenizer/added_tokens.json")


def test_scores_below_which_there_is_no_share_have_none():
    found = parse_results({"teacher": {"score": 1e-300}, "student": {"1": SCORE}})
    assert found.shares(found.student) == {}
