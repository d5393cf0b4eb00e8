"""The configuration: locked from the start, and kept as it was."""

import functools
import json
import random
import re
import time

import pytest
from ml_collections import ConfigDict

from jax_distill import config as configuration
from jax_distill import worlds
from jax_distill.assembly import adapters, build
from jax_distill.config import ConfigError, base, rules, stored
from jax_distill.config.settings import flatten
from jax_distill.objectives.methods import KINDS
from jax_distill.objectives.settings import settings_of
from jax_distill.training import rounding
from jax_distill.training.optimizer import make_optimizer


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
    with pytest.raises(ConfigError, match="unknown preset 'huge'; known: large"):
        base("huge", presets=("", "large"))


def test_players_have_the_optimizer_of_the_student_but_for_what_is_set(tmp_path):
    config = base()
    config.name, config.objective.name = "x", "scm"
    config.optimizer.learning_rate = 3e-4
    config.optimizers.critic = configuration.overrides(config.optimizer, weight_decay=0.5)
    config.lock()
    config.optimizers.critic.b1 = 0.0  # as the command line sets it
    configuration.save(config, tmp_path)
    expected = config.optimizer.to_dict() | {"weight_decay": 0.5, "b1": 0.0}
    for run in (config, configuration.load(tmp_path)):
        for player, settings in (("critic", expected), ("", config.optimizer.to_dict())):
            found = configuration.optimizer_of(run, player)
            assert found.to_dict() == settings and found.is_locked
        assert configuration.optimizer_of(run, "other").to_dict() == config.optimizer.to_dict()


def test_what_was_saved_is_loaded(tmp_path):
    config = base()
    config.name, config.objective.name = "x", "scm"
    config.evaluation.student_steps = (1, 8)
    configuration.save(config.lock(), tmp_path / "deep" / "run")
    loaded = configuration.load(tmp_path / "deep" / "run")
    expected = json.loads(config.to_json())
    # With all of the objective's settings, whose defaults may be others in a later version.
    expected["objective"] = json.loads(json.dumps({"name": "scm", **settings_of(KINDS["scm"])}))
    assert json.loads(loaded.to_json()) == expected
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


def written(workdir, changes):
    """A saved configuration with some of its values replaced; ... removes one."""
    config = base()
    config.name, config.objective.name = "x", "meanflow"
    values = json.loads(config.to_json_best_effort())
    for key, value in changes.items():
        *sections, name = key.split(".")
        inner = functools.reduce(dict.__getitem__, sections, values)
        if value is ...:
            del inner[name]
        else:
            inner[name] = value
    (workdir / "config.json").write_text(json.dumps(values))
    return workdir


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": None}, "model: None must be a section"),
        ({"model": [1, 2]}, r"model: \[1, 2\] must be a section"),
        ({"model.num_layers": ...}, "model.num_layers: missing; restore the file"),
        ({"evaluation": ...}, "evaluation.*: missing; restore the file"),
        ({"optimizer.speed": 3}, "optimizer.speed: there is no such key"),
        ({"seed": "3"}, "seed: '3' must be int"),
        ({"seed": True}, "seed: True must be int"),
        ({"ema_decay": float("nan")}, "ema_decay: nan is not"),
        ({"optimizer.clip_norm": float("inf")}, "clip_norm: inf is not positive"),
        ({"optimizer.clip_norm": 10**400}, "clip_norm: 1000.* is not a finite number"),
        ({"lora.alpha": 1e300}, r"lora.alpha: 1e\+300 is not a finite number"),
        ({"mesh.data": -(10**30)}, "mesh.data: -1000.* is not a finite number"),
        ({"model.num_layers": 10**8}, "model.num_layers: 100000000 is not 1024 or less"),
        ({"data.text_length": 10**9}, "data.text_length: 1000000000 is not 8192 or less"),
        ({"data.resolution": [512, 10**9]}, "data.resolution: .* is not a height and a width"),
        ({"evaluation.student_steps": [10**9]}, "evaluation.student_steps: .* none above 10000"),
        ({"evaluation.teacher_steps": [1] * 1000}, "teacher_steps: .* at most 100"),
        ({"model.axes_dims_rope": [16, 48]}, "model.axes_dims_rope: .* three even numbers"),
        ({"model.axes_dims_rope": [16, 16, 16]}, "model.axes_dims_rope: .* must add up to"),
        ({"model.remat": "some"}, "model.remat: 'some' is not one of"),
        ({"autoencoder.norm_num_groups": 5}, "autoencoder.block_out_channels: 8 is not a multiple"),
        ({"autoencoder.block_out_channels": []}, r"block_out_channels: \[\] must be a list of one"),
        ({"autoencoder.block_out_channels": [2] * 64}, "block_out_channels: .* up to 8"),
        ({"optimizer.frozen": "(a+)+$"}, "optimizer.frozen: .* no repetition is within"),
        ({"optimizer.frozen": "("}, r"optimizer.frozen: '\(' is not a pattern"),
        ({"lora.targets": "a{99999999999}"}, "lora.targets: .* is not a pattern"),
        ({"name": "../other"}, "name: '../other' is not a word"),
        ({"name": "/tmp/other"}, "name: '/tmp/other' is not a word"),
        ({"teacher.checkpoint": "a\nb"}, r"teacher.checkpoint: 'a\\nb' is not .* a short line"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of float32, bfloat16"),
        ({"objective": "scm"}, "objective: 'scm' must be a section that has a name"),
        ({"objective.name": "gan"}, "objective.name: 'gan' is not one of"),
        ({"optimizers": 3}, "optimizers: 3 must be a section"),
        ({"optimizers.critic": 3}, "optimizers.critic: 3 must be a section"),
        ({"optimizers.a b": {}}, "optimizers: 'a b' is not a player's name"),
        ({"optimizers.critic": {"speed": 1}}, "optimizers.critic.speed: there is no such key"),
        ({"optimizers.critic": {"b1": "x"}}, "optimizers.critic.b1: 'x' must be float"),
        ({"optimizers.critic": {"b1": 1.0}}, "optimizers.critic.b1: 1.0 is not at least 0 and"),
        ({"optimizers.critic": {"name": "x"}}, "optimizers.critic.name: 'x' is not one of adamw"),
        ({"objective.gap": 3}, "objective.gap: there is no such key"),
        ({"objective.equal_share": "much"}, "objective.equal_share: 'much' must be float"),
        ({"objective.time_shift": [1]}, r"objective.time_shift: \[1\] must be a number or null"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_workdirs_configuration_is_named(tmp_path, changes, expected):
    assert configuration.load(written(tmp_path, {})).objective.name == "meanflow"
    with pytest.raises(
        ConfigError, match=f"config.json' is no configuration .*: .*{expected}"
    ) as e:
        configuration.load(written(tmp_path, changes))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_a_configuration_of_an_older_version_is_completed(tmp_path):
    whole = configuration.load(written(tmp_path, {}))
    older = {key: ... for key in stored.LATER if not key.startswith(("lora.", "rescale."))}
    older |= {"lora": ..., "rescale": ..., "evaluation.batch_size": 120}
    found = configuration.load(written(tmp_path, older))
    assert found.optimizers.to_dict() == {}
    for key in ("remat", "attention", "guidance_factor"):  # which networks have defaults for
        assert key not in found.model
        del whole.unlock().model[key]
    assert json.loads(found.to_json()) == json.loads(whole.to_json())


def test_damaged_configurations_end_in_a_sentence(tmp_path):
    rng = random.Random(0)
    written(tmp_path, {})
    whole = (tmp_path / "config.json").read_text()
    values = json.loads(whole)
    strange = [None, True, -1, 10**30, 1e999, "", "é" * 9, [], {}, [[]], [None], {"name": {}}]
    for _ in range(400):
        if rng.random() < 0.2:  # bytes
            text = list(whole)
            text[rng.randrange(len(text))] = rng.choice('{}[],:"\\\x00é9')
            (tmp_path / "config.json").write_text("".join(text))
        else:
            inner = damaged = json.loads(whole)
            for _ in range(rng.randrange(3)):
                sections = [key for key in inner if isinstance(inner[key], dict)]
                inner = inner[rng.choice(sections)] if sections else inner
            key = rng.choice(list(inner) or ["critic"])
            if rng.random() < 0.3:
                inner.pop(key, None)
            else:
                inner[key] = rng.choice(strange)
            (tmp_path / "config.json").write_text(json.dumps(damaged))
        try:
            found = configuration.load(tmp_path)
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            assert flatten(found.to_dict()).keys() <= flatten(values).keys()


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            "time_embedder|guidance_embedder/linear_1",
            "blocks/(?!text/mlp)",
            "^a.*b$",
            "(a|b)?c",
        ),
        *("^((?!time_embedder).)*$", ".*double.*attn.*kernel.*", "(blocks)+", "[a-z]{2,3}x*y*z*"),
        *("blocks/.*/attn/.*/.*/kernel/.*", "a.*|b.*|c.*|d.*|e.*|f.*", ".*.*.*.*x"),
    ],
)
def test_patterns_that_are_found_in_no_time(pattern):
    assert rules.is_pattern(pattern)
    begin = time.monotonic()
    re.search(pattern, "single_blocks/attention/query/kernel/" * 3)
    assert time.monotonic() - begin < 5  # 0.3 s where nothing else runs


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(a+)+$",
            "(a|a)*$",
            "((a*)b)*c",
            ".*" * 5 + "x",
            "(",
            "[",
            "a{2,99999999999}",
            "a" * 501,
        ),
        *("(.*.*.*|b)(.*.*.*|b)(.*.*.*|b)Z", "(?:(?:a|ab)){9}", "(a{1,9}){1,9}b", "(a?a?)*x"),
    ],
)
def test_patterns_that_might_take_for_ever_are_refused(pattern):
    assert not rules.is_pattern(pattern)


def test_the_words_that_settings_may_be_are_those_of_the_program():
    choices = rules.CHOICES
    assert choices["world"] == tuple(worlds.WORLDS)
    assert choices["teacher.guidance"] == tuple(build.GUIDANCE)
    assert choices["lora.base"] == adapters.BASES
    assert choices["ema_dtype"] == choices["optimizer.moments"] == rounding.DTYPES
    config = base()
    config.name, config.objective.name = "x", "meanflow"
    for key, words in choices.items():
        for word in words:
            config.update_from_flattened_dict({key: word})
            configuration.check(config.to_dict())
            make_optimizer(config.optimizer, 10)


def test_adapters_beside_themselves_are_refused(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, teacher in zip(folders, [*folders[1:], folders[0]]):
        folder.mkdir()
        written(folder, {"lora.rank": 2, "teacher.checkpoint": str(teacher)})
    with pytest.raises(ConfigError, match="teacher.checkpoint: .*a' .* stands beside itself"):
        configuration.check_teachers(folders[0])
    written(folders[2], {"lora.rank": 2})
    configuration.check_teachers(folders[0])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"'{tmp_path}' is no workdir of a run"):
        configuration.load(tmp_path)
    (tmp_path / "config.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match="config.json' is not valid JSON"):
        configuration.load(tmp_path)
