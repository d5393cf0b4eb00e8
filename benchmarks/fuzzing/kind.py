"""The kind of an input: how bases are made, damaged, read, and what they mean to another reader."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

OUTSIDE = "outside"
"""A folder beside every input, with files that are none of it."""


@dataclass(frozen=True)
class Kind:
    """A kind of inputs, each a folder.

    Attributes:
      share: of all inputs.
      make: fills a folder with bases, a folder each, and `OUTSIDE`.
      damage: one base's copy, in place.
      read: calls the package; `rng` draws what only a share of inputs is put to.
      differs: how what was read differs from what the input says, in words; "" where it does not.
        Its arguments: what was read, the input as it is, its base.
    """

    share: float
    make: Callable[[Path], None]
    damage: Callable[[Random, Path], None]
    read: Callable[[Random, Path], Any]
    differs: Callable[[Any, Path, Path], str]


def decoded(content: bytes) -> str | None:
    """A text as its byte order mark says, or UTF-8; None where it is neither."""
    marks = (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
    )
    marks += ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    name = next((name for mark, name in marks if content.startswith(mark)), "utf-8")
    try:
        return content.decode(name)
    except UnicodeDecodeError:
        return None


def lines_of(text: str) -> list[str]:
    r"""Lines that end at \n or \r\n and nowhere else."""
    return re.split(r"\r?\n", text)


def same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same, types and signs included; tuples are lists."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b) or a != a and b != b
    return a == b
