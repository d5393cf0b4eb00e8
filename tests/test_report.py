"""Laws of a report: one file that needs no other, of whatever a run left, with its numbers."""

import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jax_distill.evaluation.grids import save_pictures
from jax_distill.evaluation.report import format_benchmark, format_table, write_report

NASTY = '<script>alert("1")</script> & <b>\'$title'
VOID = {"meta", "img", "source", "br"}
RESULTS = {
    "teacher": {
        "nfe": 50,
        "score": 0.8,
        "tasks": {"counting": 0.7, "colors": 0.9},
        "few": {"1": {"score": 0.08, "tasks": {"counting": 0.06, "colors": 0.1}}},
    },
    "student": {
        "1": {"score": 0.5, "tasks": {"counting": 0.4, "colors": 0.6}},
        "4": {"score": 0.78, "tasks": {"counting": 0.68, "colors": 0.88}},
    },
    "config": {},
    "seed": 0,
}


class Page(HTMLParser):
    """What a browser sees: the elements, their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text, self.words = [], [], {}, ""
        self.feed(path.read_text())
        self.close()
        assert not self.open  # every element is closed

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        self.words += f"{data} "

    @property
    def addresses(self):
        names = ("src", "srcset", "href", "data", "action")
        return [values[name] for _, values in self.elements for name in names if name in values]


def metrics_lines(count):
    rng = np.random.default_rng(0)
    for step in range(1, count + 1):
        loss = float(np.exp(-step / count + rng.normal(0, 0.1)))
        yield {
            "step": step * 10,
            "loss": loss,
            "tangent_norm": -loss,
            "skipped": 0,
            "examples_per_sec": 100.0 + step,
            "time": step * 60.0,
        }


def fill(workdir):
    config = {"name": "scm", "total_steps": 400, "batch_size": 64, "optimizer": {"b1": 0.5}}
    (workdir / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(line) + "\n" for line in metrics_lines(40))
    (workdir / "metrics.jsonl").write_text(lines)
    (workdir / "time_rescale").mkdir()
    (workdir / "time_rescale" / "metrics.jsonl").write_text(lines)
    (workdir / "results.json").write_text(json.dumps(RESULTS))
    picture = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    for name in ("step-000090", "step-000100", "final"):
        save_pictures(workdir / "samples" / f"{name}.png", picture, [""])
    return workdir


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report of a whole run: (workdir, page)."""
    workdir = fill(tmp_path_factory.mktemp("run"))
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return workdir, Page(path)


def test_a_report_needs_no_other_file(full):
    _, page = full
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    style = "".join(page.text["style"])
    assert "url(" not in style and "@import" not in style
    policies = [x["content"] for _, x in page.elements if "content" in x]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policies


def test_a_report_shows_the_samples_latest_first(full):
    workdir, page = full
    shown = [
        base64.b64decode(address.split(",")[1])
        for address in page.addresses
        if address.startswith("data:image/png")
    ]
    assert shown == [(workdir / "samples" / "final.png").read_bytes()] * 3  # the same picture
    captions = [x for x in page.text["figcaption"] if "step" in x or "end" in x]
    assert captions[-3:] == ["At the end", "After 100 steps", "After 90 steps"]


def test_a_report_has_the_run_in_numbers(full):
    _, page = full
    assert page.text["title"] == page.text["h1"] == ["scm"]
    assert page.text["dd"] == ["62.5%", "97.5%"]
    assert "62.5% and 97.5% of its teacher's score (0.800 in 50 steps) in 1 and 4" in page.words
    assert "keeps 10.0% of it in 1 step." in page.words
    assert (
        "Trained for 400 steps of 64 pictures in 40 min, at 120 examples per second." in page.words
    )
    assert "Examples per second, median 120" in page.words
    assert "optimizer.b1 0.5" in page.words and "skipped = 0" in page.words
    headings = ["Scores", "Samples", "Training", "Stage before: time rescale", "Configuration"]
    assert page.text["h2"] == headings


def test_the_same_run_gives_the_same_report(full):
    workdir, _ = full
    before = (workdir / "report.html").read_bytes()
    assert write_report(workdir).read_bytes() == before


@pytest.mark.parametrize(
    "missing, heading",
    [
        ("results.json", "Scores"),
        ("metrics.jsonl", "Training"),
        ("config.json", "Configuration"),
        ("samples/*", "Samples"),
        ("time_rescale/*", "Stage before: time rescale"),
    ],
)
def test_what_is_missing_is_left_out(tmp_path, full, missing, heading):
    fill(tmp_path)
    for path in tmp_path.glob(missing):
        path.unlink()
    page = Page(write_report(tmp_path))
    assert page.text["h2"] == [x for x in full[1].text["h2"] if x != heading]
    assert ("not been evaluated" in page.words) == (missing == "results.json")


def test_an_empty_workdir_still_gets_a_page(tmp_path):
    workdir = tmp_path / "my run"
    workdir.mkdir()
    page = Page(write_report(workdir))
    assert page.text["h1"] == ["my run"] and "h2" not in page.text


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is no folder"):
        write_report(tmp_path / "nowhere")


def test_everything_is_shown_as_text(tmp_path):
    score = {"score": 0.5, "tasks": {NASTY: 0.5}}
    (tmp_path / "results.json").write_text(json.dumps({"student": {"2": score}}))
    (tmp_path / "config.json").write_text(
        json.dumps({"name": NASTY, "objective": {"name": NASTY}, NASTY: [NASTY]})
    )
    lines = [{"step": step, NASTY: step, f"constant {NASTY}": 1} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / NASTY.replace("/", "")).mkdir()
    (tmp_path / NASTY.replace("/", "") / "metrics.jsonl").write_text('{"step": 1, "loss": 1}')
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"{NASTY.replace('/', '')}.png")
    page = Page(write_report(tmp_path))
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags and "b" not in tags
    assert page.text["title"] == page.text["h1"] == [NASTY]
    assert page.words.count("alert") >= 8


def test_broken_parts_are_left_out_and_said(tmp_path):
    fill(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "lo')
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "samples" / "final.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    page = Page(write_report(tmp_path))
    assert "1 unreadable line of metrics.jsonl" in page.words
    assert "config.json is not valid JSON" in page.words
    assert "Trained for 400 steps" in page.words
    assert "At the end" not in page.words and "After 100 steps" in page.words


def test_broken_results_are_an_error_and_the_old_report_stays(tmp_path):
    (tmp_path / "results.json").write_text('{"teacher": ')
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ValueError, match="results.json' does not hold the scores of a run"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"


def test_an_interrupted_write_leaves_the_old_report(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("name, words", [("loss", "Loss"), ("fake/loss", "Fake: loss")])
def test_a_loss_that_went_wrong_is_drawn_as_far_as_it_goes(tmp_path, name, words):
    losses = [-1.0, 0.5, float("nan"), float("inf")]
    lines = [json.dumps({"step": i, name: loss}) for i, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report(tmp_path))
    assert page.text["figcaption"] == [f"{words} (2 values not finite, not drawn)"]


def test_a_very_wide_grid_is_reduced(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4800, 100)).save(tmp_path / "samples" / "final.png")
    [address] = Page(write_report(tmp_path)).addresses
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as image:
        assert image.size == (2400, 50)


@pytest.mark.parametrize("kept", ["teacher", "student"])
def test_one_side_alone_is_reported(tmp_path, kept):
    (tmp_path / "results.json").write_text(json.dumps({kept: RESULTS[kept]}))
    page = Page(write_report(tmp_path))
    assert f"The {kept} scores" in page.words and "Scores" in page.text["h2"]


def test_the_table_has_each_score_in_its_column():
    rows = [line.rsplit(maxsplit=4) for line in format_table(RESULTS).splitlines()]
    assert [[row[0].strip(), *row[1:]] for row in rows[1:]] == [
        ["steps", "50", "1", "4", "1"],
        ["overall", "0.800", "0.500", "0.780", "0.080"],
        ["share of teacher", "100.0%", "62.5%", "97.5%", "10.0%"],
        ["counting", "0.70", "0.40", "0.68", "0.06"],
        ["colors", "0.90", "0.60", "0.88", "0.10"],
    ]
    assert rows[0] == ["teacher", "student", "student", "teacher"]


def test_the_page_has_the_numbers_of_the_table(full):
    page = full[1]
    lines = format_table(RESULTS).splitlines()[2:]
    cells = [cell for line in lines for cell in line.rsplit(maxsplit=4)[1:]]
    assert page.text["td"][: len(cells)] == cells


def test_measures_have_a_table_and_a_sentence_of_their_own(tmp_path):
    known = {"latents": 1.2, "place": 16.0, "size": 2.0, "color": 0.8, "twice": 1.0}
    measured = {
        "real": {**known, "to_real": 0.0123},
        "teacher": {**known, "to_teacher": 0.25},
        "student": {"1": {**known, "place": 12.0}},
    }
    content = {**RESULTS, "measures": measured}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = Page(write_report(tmp_path))
    assert page.text["h2"] == ["Scores", "Diversity and distances"]
    assert "are at least 75.0% as diverse as the teacher's in 1 step" in page.words
    scores, measures = format_table(content).split("\n\n")
    assert scores == format_table(RESULTS)
    lines = measures.splitlines()
    assert lines[0].split() == ["teacher", "student", "real"]
    assert lines[2].split()[-3:] == ["100.0%", "75.0%", "100.0%"]
    assert lines[-2].split()[-3:] == ["-", "-", "0.012"]
    cells = [cell for line in lines[2:] for cell in line.rsplit(maxsplit=3)[1:]]
    assert page.text["td"][-len(cells) :] == cells


def test_the_lines_of_a_table_end_together_and_fit_a_terminal():
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    score = {"score": 1.0, "tasks": dict.fromkeys(tasks, 1.0)}
    scores = {steps: score for steps in ("1", "2", "4")}
    table = format_table({"teacher": {"nfe": 50, **score, "few": scores}, "student": scores})
    lengths = {len(line) for line in table.splitlines()}
    assert len(lengths) == 1 and lengths.pop() <= 80


def test_a_table_refuses_what_is_no_score():
    with pytest.raises(ValueError, match="student.2.score is 'high'"):
        format_table({"student": {"2": {"score": "high"}}})


JUDGED = {
    "benchmark": "dpg",
    "prompts": 3,
    "pictures": 4,
    "level": 0.95,
    "teacher": {
        "nfe": 28,
        "score": 80.0,
        "tasks": {"entity": 90.0},
        "few": {"2": {"score": 20.0, "tasks": {}}},
        "intervals": {"score": [75.0, 85.0]},
        "seconds_a_picture": 2.5,
    },
    "student": {
        "2": {
            "score": 78.0,
            "tasks": {"entity": 88.0},
            "intervals": {"score": [73.0, 83.0], "entity": [80.0, 95.0]},
            "features": {"cmmd": [0.5, 0.25, 0.75]},
        }
    },
    "differences": {"2": {"score": [-2.0, -4.0, 0.5]}},
    "seed": 0,
}


@pytest.mark.parametrize("alone", [True, False])
def test_a_benchmark_is_shown_with_its_intervals(tmp_path, alone):
    """That of results.json, or of another file beside it."""
    (tmp_path / ("results.json" if alone else "results-dpg.json")).write_text(json.dumps(JUDGED))
    if not alone:
        (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    page = Page(write_report(tmp_path))
    assert ("DPG-Bench" in page.text["h2"]) and "3 prompts, 4 pictures each." in page.words
    for cell in (
        *("80.0 [75.0, 85.0]", "78.0 [73.0, 83.0]", "20.0", "88.0 [80.0, 95.0]", "90.0"),
        *("-2.0 [-4.0, +0.5]", "0.50 [0.25, 0.75]", "2.5"),
    ):
        assert cell in page.text["td"]
    share = "97.5% of its teacher's score (80.000 in 28 steps) in 2 steps"
    assert (share in page.words) == alone
    assert "not been evaluated" not in page.words
    text = format_benchmark(JUDGED).splitlines()
    assert text[0].split() == ["DPG-Bench", "teacher", "28", "student", "2", "teacher", "2"]
    assert text[2].startswith("more than the teacher") and "-2.0 [-4.0, +0.5]" in text[2]


def test_figures_that_are_none_are_refused(tmp_path):
    for changed in ({"level": "high"}, {"differences": {"2": {"score": [1, 2]}}}):
        (tmp_path / "results.json").write_text(json.dumps(JUDGED | changed))
        with pytest.raises(ValueError, match="does not hold figures of a benchmark"):
            write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_grids_are_shown_from_all_of_the_training(tmp_path):
    picture = np.zeros((1, 9, 9, 3), np.uint8)
    for step in range(100, 2001, 100):
        save_pictures(tmp_path / "samples" / f"step-{step:06d}.png", picture, [""])
    captions = Page(write_report(tmp_path)).text["figcaption"]
    steps = [int(x.split()[1].replace(",", "")) for x in captions]
    assert steps == sorted(steps, reverse=True) and steps[0] == 2000 and steps[-1] == 100
    assert np.diff(steps).min() >= -400 and len(steps) == 6
