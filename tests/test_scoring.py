"""Scoring: a run is scored once, and again when it has become another."""

import pytest

from jax_distill import config as configuration
from jax_distill.evaluation import scoring


@pytest.fixture
def scored(monkeypatch):
    """Puts a score in the place of drawing; returns the step counts that were scored."""
    counts = []

    def score(pipe, steps, prompts, *, seed, seen=None):
        counts.extend(steps)
        return {str(count): {"score": 0.5, "tasks": {"counting": 0.5}} for count in steps}

    monkeypatch.setattr(scoring, "score", score)
    return counts


class Teacher:
    def __init__(self, config):
        self.config = config


def test_a_run_is_scored_again_only_when_its_configuration_changed(scored, tmp_path):
    config = configuration.base()
    config.evaluation.diversity_prompts = 0
    for steps, scores in ((100, 4), (100, 4), (200, 8)):
        config.total_steps = steps
        configuration.save(config, tmp_path)
        scoring.conclude(tmp_path, teacher=Teacher(config))
        assert len(scored) == scores and scoring.concluded(tmp_path)
    config.evaluation.prompts = 12
    configuration.save(config, tmp_path)
    assert not scoring.concluded(tmp_path)


def test_prompts_are_spread_evenly_over_the_tasks():
    tasks = [prompt.request.task for prompt in scoring.held_out(12)]
    assert [tasks.count(task) for task in dict.fromkeys(tasks)] == [2] * 6
    with pytest.raises(ValueError, match="13 is not a multiple of 6"):
        scoring.held_out(13)
