"""diffusers' scheduler_config.json: the keys that are read, and their bounds."""

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from jax_distill.storage.files import FileError, check_finite_numbers, check_kind

EULER = "FlowMatchEulerDiscreteScheduler"
FLUX_DEV = {
    "_class_name": EULER,
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""FLUX.1-dev's: shifted by the number of tokens."""

_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z_]\w{0,99}\Z")]
_Shift = Annotated[float, Meta(ge=-20, le=20)]  # mu, of which e^mu is taken
_Tokens = Annotated[int, Meta(ge=1, le=2**20)]


class SchedulerConfig(TypedDict, total=False):
    """The keys that are understood; others are kept as they are."""

    _class_name: _Name
    num_train_timesteps: Annotated[int, Meta(ge=1, le=10**6)]
    shift: Annotated[float, Meta(gt=0, le=10**6)]
    use_dynamic_shifting: bool
    base_shift: _Shift
    max_shift: _Shift
    base_image_seq_len: _Tokens
    max_image_seq_len: _Tokens


def followed(values: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The scheduler that is followed: FLUX.1-dev's in place of None and of other kinds."""
    if values and values.get("_class_name", EULER) == EULER:
        return {**values, "_class_name": EULER}
    return FLUX_DEV


def check(values: Mapping[str, Any], *, where: str, fix: str) -> None:
    """Checks the types and sizes of a scheduler's config.

    Args:
      values: diffusers' keys.
      where: begins the message, such as "'scheduler_config.json'".
      fix: ends it.

    Raises:
      FileError: a value is of another type, not finite or out of bounds.
    """
    check_kind(values, SchedulerConfig, where=where, fix=fix)
    check_finite_numbers(values, where=where, fix=fix)
    lengths = (values.get("base_image_seq_len", 256), values.get("max_image_seq_len", 4096))
    if lengths[0] >= lengths[1]:
        raise FileError(
            f"{where}: base_image_seq_len={lengths[0]} is not below max_image_seq_len={lengths[1]};"
            f" {fix}"
        )
