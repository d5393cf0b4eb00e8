"""Allowed values of each setting: tables that configurations are checked against.

They import no other part of the program, so that every reader of a configuration can check it;
tests compare their names with the parts that they stand for.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax_distill import streams
from jax_distill.config.settings import ConfigError
from jax_distill.storage.quoting import shown

Rule = tuple[Sequence[str], Callable[[Any], bool], str]
"""Keys, a condition on their values, and the condition in words."""

_PLAYER = re.compile(r"^optimizers\.\w+\.")


def general(key: str) -> str:
    """The key of `optimizer` whose rules a key of a player's optimizer has; others as they are."""
    return _PLAYER.sub("optimizer.", key)


def check(values: Mapping[str, Any], rules: Iterable[Rule]) -> None:
    """Checks values against rules.

    Args:
      values: flat, with checked types.
      rules: such as `of_runs` gives.

    Raises:
      ConfigError: naming the key, its value, and what it must be.
    """
    for keys, holds, words in rules:
        for key, value in values.items():
            if general(key) in keys and value is not None and not holds(value):
                raise ConfigError(f"{key}: {shown(value)} is not {words}")
    for key, value in values.items():
        if not _is_moderate(value):
            raise ConfigError(f"{key}: {shown(value)} is not {_MODERATE}")


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
    *("autoencoder.latent_channels", "autoencoder.layers_per_block"),
    *("autoencoder.norm_num_groups", "data.threads", "data.prefetch"),
)
_NOT_NEGATIVE = (
    *("samples.every", "evaluation.every", "rescale.total_steps", "evaluation.guidance"),
    *("evaluation.diversity_prompts", "data.workers"),
    *("optimizer.warmup_steps", "optimizer.weight_decay", "lora.rank"),
)
_SHARES = ("ema_decay", "optimizer.b1", "optimizer.b2", "data.caption_dropout")
_WHOLE_SHARES = ("optimizer.decay_share", "data.damaged_share")
_SEEDS = ("seed", "data.seed")
_STEP_COUNTS = ("evaluation.student_steps", "evaluation.teacher_steps")
MOST_STEPS = 10_000
"""Of a sampler; its schedule is held in memory."""
PATCH = 16
"""Pixels along a side of a token: eight of the autoencoder's, two of the packing."""
MOST_PIXELS = 2**14
"""Along a side of a picture; FLUX's are of 2^11."""
_RESOLUTION = f"a height and a width, multiples of {PATCH} up to {MOST_PIXELS} pixels"
CHOICES = {
    "on_nonfinite": ("stop", "skip"),
    "dtype": ("float32", "bfloat16"),
    "data.embedding": ("prepared", "training"),
    "ema_dtype": ("float32", "bfloat16"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.moments": ("float32", "bfloat16"),
    "optimizer.schedule": ("constant", "cosine", "trapezoid"),
    "teacher.velocity": ("rescaled", "original"),
    "teacher.guidance": ("auto", "embedded", "cfg", "none"),
    "world": ("shapes", "flux"),
    "lora.base": ("", "int8"),
    "data.damaged": ("fail", "skip"),
}
"""Settings that are one of a few words."""

# Far more than anybody needs, and far less than overflows a counter or a machine's memory: a number
# is refused before so many layers, tokens or pictures are made.
_AT_MOST = {
    2**31 - 1: (
        *("total_steps", "rescale.total_steps", "log_every", "checkpoint.every", "samples.every"),
        *("evaluation.every", "data.examples", "optimizer.warmup_steps"),
    ),
    2**20: ("batch_size", "rescale.batch_size", "accumulate"),
    2**17: (
        *("model.in_channels", "model.joint_attention_dim", "model.pooled_projection_dim"),
        *("lora.rank", "autoencoder.latent_channels", "autoencoder.norm_num_groups"),
    ),
    10_000: (
        *("samples.prompts", "samples.teacher_steps", "evaluation.prompts", "checkpoint.keep"),
        *("evaluation.diversity_prompts", "evaluation.diversity_pictures"),
    ),
    8192: ("data.text_length",),
    256: ("data.threads", "data.prefetch", "data.workers"),
    1024: (
        *("model.num_layers", "model.num_single_layers", "model.attention_head_dim"),
        *("model.num_attention_heads", "autoencoder.layers_per_block"),
    ),
}


def of_runs() -> Iterable[Rule]:
    """Rules of all settings but an objective's."""
    yield _POSITIVE, lambda value: 0 < value < math.inf, "positive"
    yield _NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "zero or more"
    yield _SHARES, lambda value: 0 <= value < 1, "at least 0 and less than 1"
    yield ("ema_warmup",), lambda value: 1 <= value < math.inf, "1 or more"
    yield ("ema_power",), lambda value: 0 <= value <= 0.28, "from 0 to 0.28"
    yield _SEEDS, lambda value: 0 <= value <= streams.MOST_SEED, "at least 0 and less than 2^32"
    yield ("evaluation.diversity_pictures",), lambda value: value >= 2, "2 or more"
    yield _WHOLE_SHARES, lambda value: 0 <= value <= 1, "from 0 to 1"
    yield ("name",), _is_name, "a word; it names the default workdir"
    yield ("data.resolution",), _is_resolution, _RESOLUTION
    yield ("data.weights",), _are_weights, "a list of positive numbers"
    yield _STEP_COUNTS, lambda value: min(value) > 0, "a list of positive numbers"
    steps = f"a list of at most 100 numbers, none above {MOST_STEPS}"
    yield _STEP_COUNTS, lambda value: max(value) <= MOST_STEPS and len(value) <= 100, steps
    yield ("autoencoder.block_out_channels",), _are_widths, "a list of up to 8 positive widths"
    yield ("model.axes_dims_rope",), _are_axes, "a list of three even numbers"
    yield ("optimizer.frozen", "lora.targets"), is_pattern, PATTERN
    for most, keys in _AT_MOST.items():
        yield keys, lambda value, most=most: value <= most, f"{most} or less"
    for key, known in CHOICES.items():
        yield (key,), known.__contains__, f"one of {', '.join(filter(None, known))}"


PATTERN = (
    "a pattern of up to 500 characters, in which no repetition is within another, and at most four"
    " stand one after another"
)
_REPETITIONS = 4  # on paths of a hundred letters those take less than a second
_FEW = 3  # up to so many do not count as a repetition


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression that is matched against a path in no time."""
    if len(text) > 500:
        return False
    try:
        re.compile(text)
        return _repetitions(re._parser.parse(text)) <= _REPETITIONS
    except (re.error, OverflowError, RecursionError):
        return False


def _repetitions(pattern: Any) -> float:
    """The most repetitions that a path goes through, one after another.

    Infinite if one can match a text in several ways: it holds another, or alternatives.

    Args:
      pattern: of `re`'s parser, a sequence of operations with their arguments.
    """
    most = 0.0
    for operation, argument in pattern:
        name = str(operation)
        if name == "BRANCH":
            most += max(map(_repetitions, argument[1]))
        elif "REPEAT" in name:
            _, upper, inner = argument
            held = _repetitions(inner)
            if upper <= _FEW:
                most += upper * held
            else:
                most += math.inf if held or _has_alternatives(inner) else 1
        else:
            most += sum(map(_repetitions, _within(argument)))
    return most


def _has_alternatives(pattern: Any) -> bool:
    """Whether a repeated pattern may match in several ways; lookaheads match nothing."""
    for operation, argument in pattern:
        name = str(operation)
        if name == "BRANCH" or ("REPEAT" in name and argument[0] != argument[1]):
            return True
        if "ASSERT" not in name and any(map(_has_alternatives, _within(argument))):
            return True
    return False


def _within(argument: Any) -> list[Any]:
    """The patterns inside an operation, such as a group."""
    parts = argument if isinstance(argument, tuple) else (argument,)
    return [part for part in parts if isinstance(part, re._parser.SubPattern)]


def _is_name(value: str) -> bool:
    """Whether a name is words between slashes that only lead down; or empty, which runs refuse."""
    parts = value.split("/") if value else ()
    plain = len(value) <= 200 and value.isprintable() and "\\" not in value
    return plain and all(part.strip(". ") for part in parts)


def _is_resolution(value: Sequence[int]) -> bool:
    return len(value) == 2 and all(0 < x <= MOST_PIXELS and x % PATCH == 0 for x in value)


def _are_weights(value: Sequence[float]) -> bool:
    return all(0 < weight < math.inf for weight in value)


def _are_widths(value: Sequence[int]) -> bool:
    return len(value) <= 8 and all(0 < width <= 2**17 for width in value)


def _are_axes(value: Sequence[int]) -> bool:
    return len(value) == 3 and all(width > 0 and width % 2 == 0 for width in value)


_MODERATE = "a finite number, a short line, or a list of up to 1000 of them"


def _is_moderate(value: Any) -> bool:
    """Whether a value can be computed with, stored and shown."""
    if isinstance(value, list | tuple):
        return len(value) <= 1000 and all(map(_is_moderate, value))
    if isinstance(value, str):
        return len(value) <= 4096 and value.isprintable()
    return value is None or abs(value) < 2**63
