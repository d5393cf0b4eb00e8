"""Detectors and CLIP as adapters: what they find is what GenEval's rules judge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_viewers
from PIL import Image
from test_generation import SETTINGS, Drawer

from jax_distill.evaluation import report
from jax_distill.evaluation.benchmarks import clip, detectors, findings, generation, geneval
from jax_distill.evaluation.benchmarks.drawn import BUNDLED, read_asked, read_drawn
from jax_distill.evaluation.benchmarks.prompts import Color
from jax_distill.runs import benchmarking
from jax_distill.runs.benchmarking import Findings
from jax_distill.storage.files import FileError

RGB = {
    **{"red": (230, 30, 30), "orange": (240, 140, 20), "yellow": (240, 230, 30)},
    **{"green": (30, 160, 50), "blue": (40, 60, 220), "purple": (130, 40, 170)},
    **{"pink": (250, 160, 190), "brown": (120, 70, 30), "black": (5, 5, 5)},
    "white": (250, 250, 250),
}


@pytest.fixture(scope="module")
def viewers(tmp_path_factory):
    """Folders of tiny networks by name."""
    root = tmp_path_factory.mktemp("viewers")
    kinds = ("yolos", "clip", "onnx_detector", "onnx_clip")
    return {kind: getattr(tiny_viewers, kind)(root / kind) for kind in kinds}


@pytest.fixture(scope="module")
def drawn_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    asked = read_asked("geneval", BUNDLED / "geneval.jsonl")
    for name, objective in (("teacher", "flow_matching"), ("student", "scm")):
        drawer = Drawer()
        drawer.config.objective.name = objective
        generation.draw(drawer, asked, root / name, SETTINGS, {"network": name})
    return root


@pytest.fixture
def folder(drawn_once, tmp_path):
    """The bundled prompts of GenEval that a teacher and a student have drawn."""
    for name in ("teacher", "student"):
        shutil.copytree(drawn_once / name, tmp_path / name)
    return tmp_path


def test_a_detector_of_transformers_is_decoded_as_they_do(viewers):
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    found = detectors.load(viewers["yolos"]).find(image)
    processor = AutoImageProcessor.from_pretrained(viewers["yolos"])
    model = AutoModelForObjectDetection.from_pretrained(viewers["yolos"])
    with torch.no_grad():
        outputs = model(torch.from_numpy(processor([image], return_tensors="np")["pixel_values"]))
    (theirs,) = processor.post_process_object_detection(outputs, 0.3, [(24, 40)])
    order = np.argsort(-theirs["scores"].numpy())
    assert len(found) >= len(order) > 0
    for ours, place in zip(found, order):  # a query has one class there, here each that is sure
        assert ours.name == tiny_viewers.CLASSES[theirs["labels"][place]].replace(
            "mouse", "computer mouse"
        )
        assert ours.score == pytest.approx(float(theirs["scores"][place]), rel=1e-5)
        box = np.clip(theirs["boxes"][place].numpy(), 0, [40, 24, 40, 24])
        assert ours.box == pytest.approx(box.tolist(), abs=1e-3)


def test_a_detector_in_onnx_gives_boxes_of_the_picture(viewers):
    detector = detectors.load(viewers["onnx_detector"])
    assert detector.classes == {"kettle", "owl", "ladder", "drum", "computer mouse"}
    bright = np.full((64, 128, 3), 230, np.uint8)
    first, second = detector.find(bright)
    assert first.name == "drum" and first.box == (0, 0, 64, 32)
    assert first.score == pytest.approx((230 / 255 - 0.5) / 0.5, abs=1e-5)
    assert second.name == "computer mouse" and second.box == (64, 32, 128, 64)
    assert [each.name for each in detector.find(bright // 2)] == ["computer mouse"]


def test_masks_give_boxes_and_are_of_the_picture():
    """Of what the network saw only three quarters are the picture; the rest is padding."""
    logits = np.full((1, 2, 16, 16), -20.0, np.float32)
    logits[0, 0, 4:8, 2:6] = 20
    classes = np.array([[[0, 9, 0.0], [9, 0, 0]]], np.float32)
    seen = np.zeros((1, 64, 64), np.int64)
    seen[:, :48, :48] = 1
    names = {0: "owl", 1: "drum"}
    raw = detectors._decoded(
        {"class_queries_logits": classes, "masks_queries_logits": logits},
        {"pixel_mask": seen},
        names,
        None,
    )
    (drum,) = detectors._objects(raw, names, (96, 192))
    assert drum.name == "drum" and drum.score > 0.8
    assert drum.box == pytest.approx((32, 32, 96, 64), abs=8)  # to the blur of a coarse mask
    inside = np.zeros((96, 192), bool)
    inside[32:64, 32:96] = True
    assert (drum.mask == inside).mean() > 0.98


class Seeing:
    """A CLIP of colours: pictures are their mean, texts the colour that they name."""

    def pictures(self, images):
        return np.array([self.embedded(image.reshape(-1, 3).mean(0)) for image in images])

    def texts(self, words):
        named = [next(color for color in RGB if color in text) for text in words]
        return np.array([self.embedded(RGB[color]) for color in named])

    def embedded(self, color):
        value = np.append(np.asarray(color) - 127.5, 60)
        return value / np.linalg.norm(value)


def test_colours_are_those_of_the_object_alone():
    image = np.full((40, 60, 3), RGB["green"], np.uint8)
    mask = np.zeros((40, 60), bool)
    image[10:20, 10:30], image[25:35, 35:50] = RGB["red"], RGB["blue"]
    mask[25:35, 35:50] = True
    colors = clip.Colors(Seeing())
    boxes = [((10, 10, 30, 20), None), ((30, 20, 55, 38), mask), ((30, 20, 55, 38), None)]
    found = colors(image, "kettle", [*boxes, ((59.9, 39.9, 60, 40), None)])
    assert [max(each, key=each.get) for each in found] == ["red", "blue", "green", "green"]
    assert tuple(found[0]) == Color.__args__
    assert (clip.crop(image, *boxes[1])[0, 0] == 153).all()  # GenEval's grey


@pytest.mark.parametrize("kind", ["clip", "onnx_clip"])
def test_embeddings_do_not_depend_on_how_many_there_are(viewers, kind):
    seeing = clip.load(viewers[kind])
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + n, 30, 3), np.uint8) for n in range(18)]
    together = seeing.pictures(images)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)
    apart = np.concatenate([seeing.pictures([image]) for image in images[::5]])
    assert together[::5] == pytest.approx(apart, abs=1e-5)
    words = ["a red circle", "two squares", "a circle " * 100]
    texts = seeing.texts(words)
    assert texts.shape == (3, 8) and np.abs(texts[0] - texts[1]).max() > 1e-3
    if kind == "clip":  # the other one looks at padding too
        assert texts == pytest.approx(np.concatenate([seeing.texts([x]) for x in words]), abs=1e-5)


def test_findings_are_judged_as_a_file_of_them_is(folder):
    """A detector that finds what is asked for makes every prompt right, and the file says so."""
    drawn = read_drawn(folder / "student")
    objects = iter(
        [
            detectors.Found(clause.name, box, 0.95)
            for clause in prompt.include
            for box in [(40, 40, 50, 50)] * clause.count
        ]
        for prompt in drawn.asked.prompts
        for _ in range(4)
    )
    classes = frozenset(clause.name for prompt in drawn.asked.prompts for clause in prompt.include)
    path = findings.detect(
        drawn, detectors.Detector(classes, lambda image: next(objects)), Seeing()
    )
    assert path == folder / "student/detections.jsonl"
    found = geneval.read_detections(path, drawn.asked.prompts)
    for prompt, pictures in zip(drawn.asked.prompts, found):
        asked = {clause.name for clause in prompt.include if clause.color}
        for each in (each for picture in pictures for each in picture):
            assert (each.colors is not None) == (each.name in asked)
    verdicts = geneval.verdicts(found, drawn.asked.prompts)
    tags = [prompt.tag for prompt in drawn.asked.prompts]
    right = {tag: verdicts[tags.index(tag)][0].correct for tag in dict.fromkeys(tags)}
    assert right["single_object"] and right["two_object"] and right["counting"]
    assert not right["position"]  # both are at one place


def test_a_picture_is_looked_at_once_by_the_same_networks(folder, monkeypatch):
    """A try that was stopped is gone on with; other networks, or an edited file, begin anew."""
    drawn = read_drawn(folder / "student")
    monkeypatch.setattr(findings, "_SECONDS", -1)
    classes = frozenset(clause.name for prompt in drawn.asked.prompts for clause in prompt.include)
    total, seen, lasting = 4 * len(drawn.asked.prompts), [], [9]

    def find(image):
        seen.append(image)
        if len(seen) > lasting[0]:
            raise KeyboardInterrupt
        name = sorted(classes)[image.sum() % len(classes)]
        return [detectors.Found(name, (0, 0, 4, 4), 0.5)]

    def looks(networks, lasts=total):
        seen.clear()
        lasting[0] = lasts
        findings.detect(drawn, detectors.Detector(classes, find), Seeing(), networks)
        return len(seen)

    path, by = folder / "student/detections.jsonl", {"detector": "a"}
    assert looks({"detector": "b"}) == total
    whole = path.read_text()
    with pytest.raises(KeyboardInterrupt):
        looks(by, lasts=9)
    assert path.read_text() == whole  # of the other detector, until there is a whole one
    assert looks(by) == total - 8 and path.read_text() == whole
    assert looks(by) == 0 and looks({"detector": "b"}) == total
    path.write_text(whole.replace("0.5", "0.6"))
    assert looks({"detector": "b"}) == total and path.read_text() == whole
    assert not (folder / "student/detections.unfinished.jsonl").exists()
    path.unlink()


def test_a_drawn_folder_is_taken_as_real_pictures_without_its_grids(folder):
    found = findings.embed_folder(folder / "student", Seeing())
    assert len(found) == 4 * 12


def test_classes_that_a_detector_does_not_know_are_refused(folder):
    drawn = read_drawn(folder / "student")
    nothing = detectors.Detector(frozenset(["owl"]), lambda image: [])
    with pytest.raises(ValueError, match=r"--detector: it knows no 'drum'.* \(3 of 4 classes"):
        findings.detect(drawn, nothing, Seeing())
    nothing = nothing._replace(classes=frozenset(["owl", "drum", "kettle", "ladder"]))
    with pytest.raises(ValueError, match="--clip is missing"):
        findings.detect(drawn, nothing)
    assert not (folder / "student/detections.jsonl").exists()


def test_teacher_and_student_are_judged_together(folder, viewers):
    both = [folder / "teacher", folder / "student"]
    with pytest.raises(FileError, match="detections.jsonl' is missing; give --detections"):
        benchmarking.judge(both, Findings())
    (folder / "real").mkdir()
    Image.new("RGB", (20, 30), "red").save(folder / "real/a.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "real/b.jpg")
    networks = Findings(detector=viewers["onnx_detector"], clip=viewers["onnx_clip"])
    results = benchmarking.judge(both, networks._replace(real=folder / "real"))
    assert results["benchmark"] == "geneval" and results["config"]["seed"] == 0
    entry, teacher = results["student"]["2"], results["teacher"]
    assert teacher["nfe"] == 2 and teacher["few"] == {}
    assert set(entry["tasks"]) == set(entry["intervals"]) - {"score"} and len(entry["tasks"]) == 6
    for name, (value, low, high) in results["differences"]["2"].items():
        ours, theirs = (
            each["score"] if name == "score" else {**each["tasks"], **_values(each)}[name]
            for each in (entry, teacher)
        )
        assert value == pytest.approx(ours - theirs) and low <= value <= high
    assert all(0 <= low <= high <= 1 for low, high in entry["intervals"].values())
    assert all(0 <= each <= 100 for each in entry["features"]["clip_score"])
    assert all(each >= 0 for each in entry["features"]["cmmd"])
    printed = report.format_benchmark(results)
    assert "GenEval" in printed and "CMMD" in printed and "more than the teacher" in printed
    again = benchmarking.judge(both, Findings())  # from the files that are there now
    assert again["student"]["2"]["tasks"] == entry["tasks"]

    (folder / "run").mkdir()
    assert benchmarking.write(folder / "run/results.json", results) == [
        f"wrote {folder}/run/results.json"
    ]
    (folder / "run/config.json").write_text('{"name": "it"}')
    lines = benchmarking.write(folder / "run/results.json", results)
    assert lines[1] == f"report: {folder}/run/report.html"
    page = (folder / "run/report.html").read_text()
    assert "<h2>GenEval</h2>" in page and "CLIP score" in page


def test_dense_and_plain_prompts_are_judged_too(viewers, tmp_path):
    dense = read_asked("dpg", BUNDLED / "dpg.csv")
    generation.draw(Drawer(), dense, tmp_path / "dpg", SETTINGS._replace(resolution=(16, 16)), {})
    lines = [
        {
            "item_id": prompt.item,
            "picture": number,
            "answers": {str(q.number): "yes" for q in prompt.questions},
        }
        for prompt in dense.prompts
        for number in range(4)
    ]
    (tmp_path / "answers").write_text("\n".join(map(json.dumps, lines)))
    results = benchmarking.judge([tmp_path / "dpg"], Findings(answers=(tmp_path / "answers",)))
    printed = report.format_benchmark(results)
    assert "DPG-Bench" in printed and "100.0 [100.0, 100.0]" in printed
    assert results["student"]["2"]["score"] == 100 and "differences" not in results
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo squares\n")
    plain = read_asked("prompts", tmp_path / "prompts.txt")
    generation.draw(Drawer(), plain, tmp_path / "it", SETTINGS._replace(pictures=1), {})
    with pytest.raises(FileError, match="plain prompts are scored by CLIP alone"):
        benchmarking.judge([tmp_path / "it"], Findings())
    seeing = Findings(clip=viewers["onnx_clip"])
    printed = report.format_benchmark(benchmarking.judge([tmp_path / "it"], seeing))
    assert printed.startswith("CLIP score") and "2 prompts, 1 picture each" in printed


def _values(entry):
    return {name: value for name, (value, _, _) in entry["features"].items()}


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ("T", {"answers": (Path("x"),)}, "--answers: pictures of geneval are not judged by"),
        ("TS", {"detections": (Path("x"),)}, "--detections: 1 files for 2 folders"),
        ("T", {"detections": (Path("x"),), "detector": Path("x")}, "give one of them"),
        ("T", {"detector": Path("x")}, "has no config.json; give a folder"),
        ("TT", {}, "is another folder of the teacher in 2 steps"),
        ("TC", {}, "are of other numbers of pictures; judge them apart"),
        ("SN", {}, "are of other networks; judge them apart"),
        ("E", {}, "is not as it was drawn from; put the file back"),
    ],
)
def test_folders_and_findings_that_do_not_fit_are_refused(folder, names, given, expected):
    for name in ("teacher", "student"):
        lines = [
            {"picture": f"{place:05d}/samples/{number:04d}.png", "objects": []}
            for place in range(12)
            for number in range(4)
        ]
        text = "\n".join(map(json.dumps, lines))
        (folder / name / "detections.jsonl").write_text(text)
    paths = {"T": folder / "teacher", "S": folder / "student"}
    facts = json.loads((folder / "student/drawing.json").read_text())
    for name, changed in {"C": {"pictures": 3}, "N": {"network": "new", "steps": 4}}.items():
        paths[name] = shutil.copytree(folder / "student", folder / name)
        (folder / name / "drawing.json").write_text(json.dumps({**facts, **changed}))
        kept = [line for line in lines if not ("3.png" in line["picture"] and name == "C")]
        (folder / name / "detections.jsonl").write_text("\n".join(map(json.dumps, kept)))
    paths["E"] = shutil.copytree(folder / "student", folder / "edited")
    text = (folder / "edited/prompts.jsonl").read_text()
    (folder / "edited/prompts.jsonl").write_text(text.replace('"count": 1', '"count": 2', 1))
    with pytest.raises(ValueError, match=expected):
        benchmarking.judge([paths[name] for name in names], Findings(**given))


def test_networks_of_other_kinds_are_refused(viewers, tmp_path):
    kind, theirs = "YolosImageProcessor", viewers["onnx_clip"] / "onnx"
    folder = tiny_viewers.describe(tmp_path / "it", kind, {"height": 8, "width": 8})
    with pytest.raises(FileError, match="holds no AutoModelForObjectDetection"):
        detectors.load(folder)
    (folder / "model.onnx").write_bytes(b"no network")
    with pytest.raises(FileError, match="no network that ONNX Runtime reads"):
        detectors.load(folder)
    shutil.copy(theirs / "text_model.onnx", folder / "model.onnx")
    with pytest.raises(FileError, match="asks for 'input_ids'; export it with the inputs"):
        detectors.load(folder)
    shutil.copy(theirs / "vision_model.onnx", folder / "model.onnx")
    with pytest.raises(FileError, match="of the size in preprocessor_config"):
        detectors.load(folder).find(np.zeros((8, 8, 3), np.uint8))
    tiny_viewers.describe(folder, kind, {"height": 32, "width": 32})
    with pytest.raises(FileError, match="the network gives image_embeds; give a detector"):
        detectors.load(folder).find(np.zeros((8, 8, 3), np.uint8))
