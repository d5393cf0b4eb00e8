"""What values each setting may have: tables that `preflight` checks a configuration against."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax_distill import adapters, build, rounding, streams, worlds
from jax_distill.config import ConfigError
from jax_distill.draw_settings import MOST_STEPS

Rule = tuple[Sequence[str], Callable[[Any], bool], str]
"""Keys, what must hold of their values, and how that is said."""


def check(values: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Checks the values that there are."""
    for keys, holds, words in rules:
        for key in keys:
            if values.get(key) is not None and not holds(values[key]):
                raise ConfigError(f"{key}: {values[key]!r} is not {words}")


_MODEL_NUMBERS = (
    "model.in_channels",
    "model.num_layers",
    "model.num_single_layers",
    "model.attention_head_dim",
    "model.num_attention_heads",
    "model.joint_attention_dim",
    "model.pooled_projection_dim",
    "model.time_scale",
    "model.guidance_factor",
)
_POSITIVE = (
    *("total_steps", "batch_size", "accumulate", "log_every", "checkpoint.every"),
    *("checkpoint.keep", "data.examples", "data.text_length", "samples.prompts"),
    *("samples.teacher_steps", "rescale.batch_size", "rescale.learning_rate"),
    *("optimizer.learning_rate", "optimizer.epsilon", "optimizer.clip_norm"),
    *("optimizer.adam_share", "evaluation.prompts", "lora.alpha", *_MODEL_NUMBERS),
)
_NOT_NEGATIVE = (
    *("samples.every", "evaluation.every", "rescale.total_steps", "evaluation.guidance"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "lora.rank"),
)
_SHARES = ("ema_decay", "optimizer.b1", "optimizer.b2")
_SEEDS = ("seed", "data.seed")
_STEP_COUNTS = ("evaluation.student_steps", "evaluation.teacher_steps")
_RESOLUTION = f"a height and a width, multiples of {build.PATCH} up to {build.MOST_PIXELS} pixels"
_CHOICES = {
    "on_nonfinite": ("stop", "skip"),
    "dtype": ("float32", "bfloat16"),
    "ema_dtype": rounding.DTYPES,
    "optimizer.moments": rounding.DTYPES,
    "teacher.velocity": ("rescaled", "original"),
    "teacher.guidance": tuple(build.GUIDANCE),
    "world": tuple(worlds.WORLDS),
    "lora.base": adapters.BASES,
}


def of_runs() -> Iterable[Rule]:
    """Keys, what must hold of their values, and how that is said."""
    yield _POSITIVE, lambda value: 0 < value < math.inf, "positive"
    yield _NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "zero or more"
    yield (*_POSITIVE, *_NOT_NEGATIVE), _fits, "less than 2^31"
    yield _SHARES, lambda value: 0 <= value < 1, "at least 0 and less than 1"
    yield _SEEDS, lambda value: 0 <= value <= streams.MOST_SEED, "at least 0 and less than 2^32"
    yield ("optimizer.decay_share",), lambda value: 0 <= value <= 1, "from 0 to 1"
    yield ("name",), bool, "a word; it names the default workdir"
    yield ("data.resolution",), _is_resolution, _RESOLUTION
    steps = f"a list of positive numbers up to {MOST_STEPS}"
    yield _STEP_COUNTS, lambda value: 0 < min(value) and max(value) <= MOST_STEPS, steps
    yield ("samples.teacher_steps",), lambda value: value <= MOST_STEPS, f"at most {MOST_STEPS}"
    for key, known in _CHOICES.items():
        yield (key,), known.__contains__, f"one of {', '.join(filter(None, known))}"


def of_objectives() -> Iterable[Rule]:
    """The same for what objectives have, by the settings' names."""

    def keys(names):
        return [f"objective.{name}" for name in names.split()]

    positive = "time_std angle_std data_scale data_std tangent_constant loss_constant particles"
    yield keys(positive), lambda value: 0 < value < math.inf, "positive"
    at_least = "tangent_warmup discrete_warmup loss_power weight_power"
    yield keys(at_least), lambda value: 0 <= value < math.inf, "zero or more"
    yield keys(at_least), _fits, "less than 2^31"
    shares = "equal_share drop_rate mix_from mix_to"
    yield keys(shares), lambda value: 0 <= value <= 1, "from 0 to 1"
    numbers = "time_mean angle_mean weight_offset omega kappa time_shift"
    yield keys(numbers), math.isfinite, "a finite number"
    yield keys("gap"), lambda value: 1 <= value <= 20, "from 1 to 20; float32 tells no closer times"
    yield keys("middle_angle"), lambda value: 0 < value < math.pi / 2, "between 0 and pi / 2"
    scales = "a list of finite numbers"
    yield keys("guidance_scales"), lambda value: all(map(math.isfinite, value)) and value, scales


def _fits(value: float) -> bool:
    """Whether a number fits the type that steps are counted in; only whole ones may not."""
    return not isinstance(value, int) or value < 2**31


def _is_resolution(value: Sequence[int]) -> bool:
    sizes = range(build.PATCH, build.MOST_PIXELS + 1, build.PATCH)
    return len(value) == 2 and all(size in sizes for size in value)
