"""Drawing benchmarks: a picture is the same whoever draws it, and whatever was drawn before."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_pipeline import tiny_pipeline

from jax_distill import pipeline
from jax_distill.config import base
from jax_distill.devices.processes import ALONE, Share
from jax_distill.evaluation.benchmarks import drawn, generation
from jax_distill.evaluation.benchmarks.drawn import BUNDLED, read_asked, read_drawn
from jax_distill.flow import Text
from jax_distill.runs import benchmarking
from jax_distill.storage.files import FileError

ROOT = Path(__file__).parents[1]
SETTINGS = generation.Settings(4, 2, seed=3, guidance=None, resolution=(16, 32))
FACTS = {"network": "0"}


class Drawer:
    """Draws noise from what a picture may depend on; counts."""

    def __init__(self):
        self.config, self.params, self.count = base(), {}, 0
        self.config.unlock()
        self.world = SimpleNamespace(encoder=lambda: self.encode, null=None)

    def encode(self, captions):
        features = [[len(words), *map(ord, words[:8].ljust(8))] for words in captions]
        return Text(np.zeros((len(captions), 1, 1)), np.array(features))

    def draw_each(self, text, *, steps, seeds, guidance, batch_size, numbers, resolution, tile):
        assert batch_size == len(text.pooled) == len(numbers) == len(seeds) == 1
        self.count += 1
        rng = np.random.default_rng([steps, *seeds, *numbers, *map(int, text.pooled[0])])
        return rng.integers(0, 256, (1, *resolution, 3), np.uint8)


@pytest.fixture(scope="module")
def asked():
    return {
        "geneval": read_asked("geneval", BUNDLED / "geneval.jsonl"),
        "dpg": read_asked("dpg", BUNDLED / "dpg.csv"),
    }


def draw(asked, folder, settings=SETTINGS, share=ALONE):
    """Draws into a folder; returns how many pictures were drawn."""
    drawer = Drawer()
    if asked.benchmark == "dpg" and settings.resolution == SETTINGS.resolution:
        settings = settings._replace(resolution=(16, 16))
    generation.draw(drawer, asked, folder, settings, FACTS, share)
    return drawer.count


def content(folder):
    """Files by name, but for the time that it took."""
    found = {name: (folder / name).read_bytes() for name in drawn.names(folder)}
    found.pop(generation.SPEED, None)
    return found


@pytest.fixture(scope="module", params=["geneval", "dpg"])
def whole(request, asked, tmp_path_factory):
    """The prompts, and a folder that was drawn in one go."""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    assert draw(asked[request.param], folder) == 4 * len(asked[request.param].prompts)
    return asked[request.param], folder


def test_the_layouts_are_the_authors(whole):
    asked, folder = whole
    names = drawn.names(folder)
    if asked.benchmark == "dpg":
        grids = {f"pictures/{prompt.item}.png" for prompt in asked.prompts}
        assert names - grids == {"drawing.json", "prompts.csv", "speed.json"}
        assert {Image.open(folder / name).size for name in grids} == {(32, 32)}
        return
    for place, prompt in enumerate(asked.prompts):
        at = folder / f"{place:05d}"
        described = json.loads((at / "metadata.jsonl").read_text())
        assert described["prompt"] == prompt.prompt and described["tag"] == prompt.tag
        pictures = [drawn.read_picture(at / f"samples/{n:04d}.png") for n in range(4)]
        grid = drawn.read_picture(at / "grid.png")
        assert (grid == np.vstack([np.hstack(pictures[:2]), np.hstack(pictures[2:])])).all()
    assert len(names) == 6 * len(asked.prompts) + 3


def test_what_is_there_is_not_drawn_again(whole, tmp_path):
    asked, folder = whole
    shutil.copytree(folder, tmp_path / "again")
    assert draw(asked, tmp_path / "again") == 0
    removed = [name for name in sorted(drawn.names(folder)) if name.endswith(".png")][1::3]
    for name in removed:
        (tmp_path / "again" / name).unlink()
    single = [name for name in removed if not name.endswith("grid.png")]
    expected = 4 * len(removed) if asked.benchmark == "dpg" else len(single)
    assert draw(asked, tmp_path / "again") == expected
    assert content(tmp_path / "again") == content(folder)


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3, 30])
def test_a_killed_try_is_continued(whole, tmp_path, monkeypatch, stopped_after):
    """Each file is whole or not there: a kill is a write that does not come, and none after it."""
    asked, folder = whole
    stopped_after = min(stopped_after, len(content(folder)) - 1)
    write, count, lock = drawn.write_atomically, [0], threading.Lock()

    def dying(path, text):
        with lock:
            count[0] += 1
            if count[0] > stopped_after:
                raise KeyboardInterrupt
        write(path, text)

    for module in (drawn, generation, drawn.png):
        monkeypatch.setattr(module, "write_atomically", dying)
    monkeypatch.setattr(generation, "write_json", lambda path, x: dying(path, json.dumps(x)))
    with pytest.raises(KeyboardInterrupt):
        draw(asked, tmp_path / "it")
    monkeypatch.undo()
    assert len(drawn.names(tmp_path / "it")) == stopped_after
    draw(asked, tmp_path / "it")
    assert content(tmp_path / "it").keys() == content(folder).keys()
    pictures = {name: x for name, x in content(folder).items() if name.endswith("png")}
    assert pictures.items() <= content(tmp_path / "it").items()


class Together(Share):
    """One of several threads that draw as processes do."""

    def wait(self, what):
        BARRIERS[self.count].wait(60)

    def any(self, value):
        self.wait("any")
        return True

    def first(self, act, what):
        if self.leads:
            act()
        self.wait(what)


BARRIERS = {count: threading.Barrier(count) for count in (2, 4)}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_draw_what_one_draws(whole, tmp_path, monkeypatch, count):
    asked, folder = whole
    counts = [0] * count

    def run(index):
        counts[index] = draw(asked, tmp_path / "it", share=Together(index, count))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path / "it") == content(folder)
    assert sum(counts) == 4 * len(asked.prompts)
    assert max(counts) - min(counts) <= 4  # a prompt more


def test_a_picture_does_not_depend_on_how_many_there_are(asked, tmp_path):
    prompts = asked["geneval"]
    for count in (2, 4):
        draw(prompts, tmp_path / str(count), SETTINGS._replace(pictures=count))
    two, four = (read_drawn(tmp_path / str(count)) for count in (2, 4))
    assert all(
        (a == b).all()
        for place in range(12)
        for a, b in zip(two.layout.read(place), four.layout.read(place))
    )
    assert not (four.layout.read(0)[0] == four.layout.read(0)[1]).all()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"steps": 4}, "begun with steps=2 and not 4; go on"),
        ({"seed": 4}, "begun with seed=3 and not 4"),
        ({"resolution": (32, 32)}, r"begun with resolution=\[16, \d+\] and not \[32, 32\]"),
        ({"pictures": 1}, "begun with pictures=4 and not 1"),
    ],
)
def test_other_settings_are_refused(whole, changed, expected):
    asked, folder = whole
    before = content(folder)
    with pytest.raises(FileError, match=expected):
        draw(asked, folder, SETTINGS._replace(**changed))
    assert content(folder) == before


def test_other_prompts_networks_and_folders_are_refused(asked, tmp_path):
    draw(asked["geneval"], tmp_path / "it", SETTINGS._replace(pictures=1))
    cut = asked["geneval"]._replace(text="x")
    with pytest.raises(FileError, match="begun with prompts="):
        draw(cut, tmp_path / "it", SETTINGS._replace(pictures=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(FileError, match="holds other files, such as 'thesis.tex'"):
        draw(asked["geneval"], tmp_path / "other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="is a file; give a folder"):
        draw(asked["geneval"], tmp_path / "file")
    with pytest.raises(ValueError, match="1 or 4 pictures of a prompt, not 3"):
        draw(asked["dpg"], tmp_path / "new", SETTINGS._replace(pictures=3))
    (tmp_path / "it/00003/samples/0000.png").unlink()
    with pytest.raises(FileError, match="lacks pictures of 1 of 12 prompts"):
        read_drawn(tmp_path / "it")
    with pytest.raises(FileError, match="has no drawing.json"):
        read_drawn(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a red circle\n\n two squares\n"),
        ("p.jsonl", '{"prompt": "a red circle"}\n{"prompt": "two squares"}\n'),
        ("p.jsonl", '{"text": "a red circle"}\n{"text": "two squares"}\n'),
        ("p.csv", "id,prompt\n1,a red circle\n2,two squares\n"),
        ("p.csv", "text,prompt,context\nno,a red circle,text\nno,two squares,\n"),
        ("p.csv", "negative_prompt,caption\nno,a red circle\nno,two squares\n"),
        ("p.jsonl", '{"a": "text", "prompt": "a red circle"}\n{"prompt": "two squares"}\n'),
        ("p.jsonl", '\n{"caption": "a red circle"}\n{"caption": "two squares"}\n'),
    ],
)
def test_plain_prompts_are_lines_or_a_column(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = read_asked("prompts", tmp_path / name)
    assert list(found.captions) == ["a red circle", "two squares"]


@pytest.mark.parametrize(("name", "text"), [("p.jsonl", '{"words": "text"}'), ("p.csv", "a,b\n")])
def test_a_table_without_captions_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(FileError, match=r"p\.\w+' has no column prompt, text, caption; call that"):
        read_asked("prompts", tmp_path / name)


def test_grids_that_the_authors_program_cannot_cut_are_refused(asked, tmp_path):
    dense = asked["dpg"]
    with pytest.raises(ValueError, match="cuts its grids into squares, and 16 by 32 are none"):
        generation.draw(Drawer(), dense, tmp_path / "it", SETTINGS, FACTS)
    dotted = [dense.prompts[0]._replace(item="a.b"), *dense.prompts[1:]]
    with pytest.raises(FileError, match="item_id 'a.b' has a dot"):
        draw(dense._replace(prompts=dotted), tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_an_edited_file_of_prompts_is_not_gone_on_with(whole, tmp_path):
    asked, folder = whole
    shutil.copytree(folder, tmp_path / "it")
    path = tmp_path / "it" / f"prompts{asked.ending}"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(FileError, match="is not as it was drawn from; remove it"):
        draw(asked, tmp_path / "it")
    with pytest.raises(FileError, match="is not as it was drawn from; put the file back"):
        read_drawn(tmp_path / "it")
    path.unlink()
    assert draw(asked, tmp_path / "it") == 0 and read_drawn(tmp_path / "it")


def test_a_network_that_was_saved_meanwhile_draws_nothing(asked, tmp_path):
    def check():
        raise FileError("it was saved again")

    with pytest.raises(FileError, match="saved again"):
        generation.draw(Drawer(), asked["geneval"], tmp_path / "it", SETTINGS, FACTS, ALONE, check)
    assert not list((tmp_path / "it").rglob("*.png"))


@pytest.fixture(scope="module")
def student():
    return tiny_pipeline("scm")


def test_the_pipeline_draws_what_the_first_pictures_are(monkeypatch, student, tmp_path):
    monkeypatch.setattr(pipeline, "load", lambda source, mesh: student)
    monkeypatch.setattr(benchmarking, "weights_of", lambda source: "0")
    captions = ["a red circle", "two squares"]
    (tmp_path / "p.txt").write_text("\n".join(captions))
    asked = benchmarking.read_asked("prompts", str(tmp_path / "p.txt"))
    asking = benchmarking.Asking(1, 1, 0, None, None, None, None)
    for _ in range(2):  # the second time all are there
        assert benchmarking.draw("it", asked, tmp_path / "it", asking) == 2
    pictures = student(captions, steps=1, batch_size=1)
    found = read_drawn(tmp_path / "it")
    assert all((found.layout.read(place)[0] == pictures[place]).all() for place in (0, 1))
    assert found.facts["kind"] == "student" and found.facts["config"]["seed"] == 0
    with pytest.raises(FileError, match="begun with steps=1 and not 2"):
        benchmarking.draw("it", asked, tmp_path / "it", asking._replace(steps=2))
    (tmp_path / "long.txt").write_text("a red circle " * 30)
    digests = iter("01")
    monkeypatch.setattr(benchmarking, "weights_of", lambda source: next(digests))
    with pytest.raises(FileError, match="--checkpoint: 'it' was saved again meanwhile"):
        benchmarking.draw("it", asked, tmp_path / "saved", asking)
    monkeypatch.setattr(benchmarking, "weights_of", lambda source: "0")
    asked = benchmarking.read_asked("prompts", str(tmp_path / "long.txt"))
    with pytest.raises(ValueError, match="keeps 60 tokens"):
        benchmarking.draw("it", asked, tmp_path / "long", asking)


def test_a_bucket_is_filled_in_tries_too(asked, bucket, tmp_path):
    settings = SETTINGS._replace(pictures=1)
    assert draw(asked["dpg"], bucket / "it", settings) == len(asked["dpg"].prompts)
    item = asked["dpg"].prompts[1].item
    (bucket / f"it/pictures/{item}.png").unlink()
    with pytest.raises(FileError, match="lacks pictures of 1 of"):
        read_drawn(bucket / "it")
    assert draw(asked["dpg"], bucket / "it", settings) == 1
    draw(asked["dpg"], tmp_path / "it", settings)
    assert content(bucket / "it") == content(tmp_path / "it")
    ours, theirs = (read_drawn(folder / "it").layout for folder in (bucket, tmp_path))
    assert (ours.read(1)[0] == theirs.read(1)[0]).all()


@pytest.mark.slow
def test_processes_of_the_command_draw_the_same_pictures(tmp_path):
    program = [sys.executable, "benchmarks/generation_kill.py", "--prompts=3", "--kills=0"]
    done = subprocess.run(
        [*program, "--processes=2"], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["ratio"] == 1 and line["files"] == line["distinct"] == 15
