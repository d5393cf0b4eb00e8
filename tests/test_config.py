"""The configuration: locked from the start, and kept as it was."""

import json

import pytest
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill.config import ConfigError, base


def test_no_key_can_be_added_but_to_the_objective():
    config = base()
    for section in (config, config.optimizer, config.model, config.checkpoint):
        with pytest.raises(AttributeError, match="mis_spelt"):
            section.mis_spelt = 1
    config.objective.tangent_warmup = 3
    assert config.objective.tangent_warmup == 3


def test_values_keep_their_types():
    config = base()
    config.ema_decay = 0  # a whole number is a number
    assert isinstance(config.ema_decay, float)
    for key, value in (("total_steps", 1.5), ("name", 3), ("evaluation", 1)):
        with pytest.raises(TypeError):
            config[key] = value


def test_bases_share_nothing():
    base().optimizer.learning_rate = 7.0
    assert base().optimizer.learning_rate != 7.0


def test_presets():
    assert base("", presets=("", "large")).name == base("large", presets=("", "large")).name
    with pytest.raises(ConfigError, match="no preset 'huge' .* known: large"):
        base("huge", presets=("", "large"))


def test_what_was_saved_is_loaded(tmp_path):
    config = base()
    config.name, config.objective.name = "x", "scm"
    config.evaluation.student_steps = (1, 8)
    configuration.save(config.lock(), tmp_path / "deep" / "run")
    loaded = configuration.load(tmp_path / "deep" / "run")
    assert json.loads(loaded.to_json()) == json.loads(config.to_json())
    assert isinstance(loaded, ConfigDict) and loaded.is_locked
    assert {p.name for p in (tmp_path / "deep" / "run").iterdir()} == {"config.json"}


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    config = base()
    configuration.save(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    config.seed = 9
    with pytest.raises(OSError):
        configuration.save(config, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"'{tmp_path}' is no workdir of a run"):
        configuration.load(tmp_path)
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match="config.json' is not valid JSON"):
        configuration.load(tmp_path)
