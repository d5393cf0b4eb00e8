"""Drawing pictures: what a picture depends on, and what is refused."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_distill import config as configuration
from jax_distill import pipeline
from jax_distill.assembly import build
from jax_distill.evaluation import scoring
from jax_distill.storage.files import write_json
from jax_distill.worlds.shapes import renderer, requests


def tiny_config(objective: str):
    config = configuration.base()
    config.objective.name = objective
    config.model = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "joint_attention_dim": 160,
        "pooled_projection_dim": 144,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": objective != "flow_matching",
        "time_scale": 1000.0,
        "interval_embeds": False,
    }
    return config.lock()


def tiny_pipeline(objective: str) -> pipeline.Pipeline:
    """A network with random weights everywhere, so that its output depends on all its inputs."""
    config = tiny_config(objective)
    leaves, tree = jax.tree.flatten(build.initial_parameters(config))
    rng = np.random.default_rng(0)
    leaves = [leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    network = {"network": jax.tree.unflatten(tree, leaves)}
    return pipeline.Pipeline(config, network)


@pytest.fixture(scope="module")
def student():
    return tiny_pipeline("scm")


CAPTIONS = ["a red circle", "two squares", "a cross above a triangle"]


def test_a_picture_depends_on_its_prompt_seed_and_place_alone(student):
    together = student(CAPTIONS, steps=2, batch_size=3)
    in_parts = student(CAPTIONS, steps=2, batch_size=2)
    assert together.shape == (3, 64, 64, 3) and together.dtype == np.uint8
    # Rounding may move a value across a grey level; nothing else may differ.
    assert np.abs(together.astype(int) - in_parts).max() <= 1
    other = student([CAPTIONS[0], "four crosses", CAPTIONS[2]], steps=2, batch_size=3)
    assert np.abs(together[[0, 2]].astype(int) - other[[0, 2]]).max() <= 1
    assert np.abs(together[1].astype(int) - other[1]).max() > 1


def test_another_seed_draws_another_picture(student):
    first, second = (student(CAPTIONS, steps=2, seed=seed, batch_size=3) for seed in (0, 1))
    assert (first != second).mean() > 0.1


def test_guidance_reaches_student_and_teacher(student):
    teacher = tiny_pipeline("flow_matching")
    for pipe in (student, teacher):
        low, high = (pipe(CAPTIONS, steps=2, guidance=w, batch_size=3) for w in (1.0, 6.0))
        assert (low != high).mean() > 0.01


def test_one_string_is_one_picture(student):
    assert student("a red circle", steps=2, batch_size=1).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts: none given"),
        ("a red circle", {"steps": 0}, "steps: 0 is not at least 1"),
        (" ".join(f"word{i}" for i in range(11)), {}, "keeps 11 tokens .* the limit is 10"),
    ],
)
def test_bad_input_is_refused_with_its_cause(student, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        student(prompts, **settings)


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json; make one with"):
        pipeline.load(tmp_path)
    configuration.save(tiny_config("scm"), tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint"):
        pipeline.load(tmp_path)


def test_true_pictures_score_one_and_wrong_ones_little():
    """`score` judges each picture against its own prompt."""
    prompts = scoring.held_out(60)
    rng = np.random.default_rng(0)
    true = np.stack([renderer.picture(prompt.request, rng)[1] for prompt in prompts])

    def stub(pictures):
        return lambda captions, *, steps, seed, guidance: pictures

    right = scoring.score(stub(true), (1, 4), prompts)
    assert set(right) == {"1", "4"} and right["1"]["score"] > 0.98
    wrong = scoring.score(stub(np.roll(true, 10, axis=0)), (2,), prompts)["2"]
    assert wrong["score"] < 0.35  # a picture of two objects also shows a single one


def test_held_out_takes_each_task_alike():
    tasks = [prompt.request.task for prompt in scoring.held_out(60)]
    assert {task: tasks.count(task) for task in tasks} == dict.fromkeys(requests.TASKS, 10)
    for bad in (0, 7, 606):
        with pytest.raises(ValueError, match=f"prompts: {bad} is not a multiple of 6 up to 600"):
            scoring.held_out(bad)


def test_results_keep_the_layout_that_scripts_read(tmp_path):
    entry = {"score": 0.5, "tasks": {"counting": 0.5}}
    config = tiny_config("scm")
    layout = scoring.results(
        teacher={"50": entry, "2": entry}, student={"1": entry}, config=config, seed=3
    )
    write_json(tmp_path / "results.json", layout)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["teacher"] == {"nfe": 50, **entry, "few": {"2": entry}}
    assert read["student"] == {"1": entry} and read["seed"] == 3
    assert read["config"]["objective"]["name"] == "scm"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_scores_under_way_are_kept_by_step(tmp_path, monkeypatch):
    """And those of steps that a stopped run takes again are replaced, not doubled."""
    student = SimpleNamespace(config=tiny_config("scm"), params=None)
    monkeypatch.setattr(scoring, "score", lambda pipe, *args, **kwargs: {"1": pipe.params})
    for step, value in ((10, 0.1), (20, 0.2), (10, 0.3)):
        scoring.recorder(tmp_path / scoring.SCORES, student)(step, value)
    assert json.loads((tmp_path / scoring.SCORES).read_text()) == {
        "10": {"1": 0.3},
        "20": {"1": 0.2},
    }
