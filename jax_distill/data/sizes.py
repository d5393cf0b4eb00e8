"""Sizes of pictures, each a folder of records of its own, and which of them suits a picture best.

A picture is cut least in the size whose ratio of height to width is nearest its own. Of several of
the same ratio it goes to the largest that it fills, so that nothing is enlarged without need.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jax_distill.data.encoding import EncodedPictures, look, make
from jax_distill.data.making import Making
from jax_distill.devices.processes import ALONE, Share

Size = tuple[int, int]
"""Height and width in pixels."""


def parse(text: str) -> list[Size]:
    """Reads sizes such as "512x512,432x768", each of a height and a width.

    Raises:
      ValueError: one is no such pair, or is given twice.
    """
    found = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 2 or not all(each.isascii() and each.isdigit() for each in numbers):
            raise ValueError(
                f"--sizes: {part.strip()!r:.80} is no size; give heights and widths in pixels, such"
                " as --sizes=512x512,432x768"
            )
        size = (int(numbers[0]), int(numbers[1]))
        if size in found:
            raise ValueError(f"--sizes: {name(size)} is given twice; give it once")
        found.append(size)
    return found


def name(size: Size) -> str:
    """Its name in flags and of its folder: "432x768" of a height of 432 and a width of 768."""
    return f"{size[0]}x{size[1]}"


def make_each(
    folder: Path,
    sizes: Sequence[Size],
    work: Callable[[Size], EncodedPictures],
    share: Share = ALONE,
) -> dict[Size, int]:
    """Makes a folder of records for each size, below one folder, or what is left to do of that.

    All pictures are looked at once. What is damaged is counted over all of them, and listed in the
    first folder that is made.

    Args:
      folder: in which the folders of records have the names of their sizes.
      sizes: among which pictures choose.
      work: of all pictures, as if all of them had one size.
      share: of this process.

    Returns:
      The number of examples of each size that suits some.

    Raises:
      FileError: as `encoding.make`.
      ValueError: as `encoding.make`.
    """
    works = {size: _among(work(size), sizes) for size in sizes}
    everything = Making(folder, _facts(works[sizes[0]].facts), share)
    found = look(dataclasses.replace(works[sizes[0]], others=tuple(sizes[1:])), everything, share)
    counts, damaged = {}, found.damaged
    for number, (size, one) in enumerate(works.items()):
        part = found.of_size(number, damaged)
        if len(part):
            one = dataclasses.replace(one, found=part)
            counts[size], damaged = make(folder / name(size), one, share), ()
        else:
            logging.warning("no picture is nearest to %s; there is no folder of it", name(size))
    share.first(everything.forget, f"'{folder}'")
    return counts


def _among(work: EncodedPictures, sizes: Sequence[Size]) -> EncodedPictures:
    facts = {**work.facts, "sizes": [list(size) for size in sizes]}
    return dataclasses.replace(work, facts=facts)


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the folders of all sizes have in common."""
    return {key: facts[key] for key in facts if key not in ("resolution", "latents")} | {
        "taken": {key: facts["latents"][key] for key in facts["latents"] if key != "shape"}
    }
