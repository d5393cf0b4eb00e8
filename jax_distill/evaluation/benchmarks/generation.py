"""Draws the pictures of a benchmark into a folder: by any number of processes, in any of tries.

A picture is the same, bit for bit, whatever the number of processes and wherever a try ended. Its
noise comes from the seed, its prompt's place and its number alone. And it is drawn by a program of
its own shape, one picture at a time: a batch of another size is another program, which rounds
otherwise. So every process draws on its own devices, some prompts each; results are as equal as
programs of one kind and number of devices are.
"""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_distill import streams
from jax_distill.assembly import build
from jax_distill.data.making import Pace, difference
from jax_distill.devices.processes import ALONE, Share
from jax_distill.evaluation.benchmarks import drawn
from jax_distill.evaluation.benchmarks.drawn import FACTS, MOST_PROMPTS, Asked
from jax_distill.flow import Text
from jax_distill.models.finite import NotFinite
from jax_distill.pipeline import Pipeline
from jax_distill.storage import outputs
from jax_distill.storage.files import (
    FileError,
    read_json,
    read_text,
    write_atomically,
    write_json,
)

SPEED = "speed.json"
_WRITERS = 4  # threads that compress and write


class Settings(NamedTuple):
    """How pictures are drawn.

    Attributes:
      pictures: of each prompt.
      steps: of the sampler.
      seed: of the noise.
      guidance: scale; None is the configuration's.
      resolution: height and width in pixels.
      tile: see `Pipeline`.
    """

    pictures: int
    steps: int
    seed: int
    guidance: float | None
    resolution: tuple[int, int]
    tile: int | None = None


class Done(NamedTuple):
    """Pictures that this process has drawn, and all that the folder has."""

    drawn: int
    there: int


def number_of(place: int, picture: int) -> int:
    """The number that a picture's noise comes from, of its prompt's place and its own number.

    A prompt's first picture has its place, as the pictures of `Pipeline` have.
    """
    return picture * MOST_PROMPTS + place


def draw(
    pipe: Pipeline,
    asked: Asked,
    folder: Path,
    settings: Settings,
    facts: Mapping[str, Any],
    share: Share = ALONE,
    check: Callable[[], None] = lambda: None,
) -> Done:
    """Draws those pictures that the folder lacks.

    Args:
      pipe: of a network on this process' own devices.
      asked: the prompts.
      folder: may hold pictures of earlier tries.
      settings: checked.
      facts: JSON-able, about the network; a folder that was begun with others is refused.
      share: of this process.
      check: raises if the network that has been read is not the one of the facts.

    Raises:
      ValueError: the folder was begun with other settings or is another's, is written by another
        command, or is not seen by all processes; a caption cannot be embedded; or DPG-Bench's
        program would not cut its grids into these pictures.
      NotFinite: what was drawn holds NaN or infinity.
      Stopped: by a signal.
    """
    height, width = settings.resolution
    if asked.benchmark == "dpg" and height != width:
        raise ValueError(
            f"--height, --width: DPG-Bench's program cuts its grids into squares, and {height} by"
            f" {width} are none; give the same for both"
        )
    layout = drawn.layout(folder, asked, settings.pictures)
    facts = _facts(pipe, asked, settings, facts)
    config = json.loads(pipe.config.to_json_best_effort())
    with outputs.filled_in_tries(folder, share):
        share.first(lambda: _begin(folder, asked, facts, config), f"--output: '{folder}'")
        if not (folder / FACTS).exists():
            raise FileError(
                f"--output: process {share.index} does not see what process 0 writes into"
                f" '{folder}'; give a folder that all hosts share"
            )
        lacking = _lacking(layout, asked, folder)
        places = list(lacking)[share.index :: share.count]
        mine = {place: lacking[place] for place in places}
        if share.any(bool(mine)):  # which also tells that all have looked before one writes
            _draw(pipe, asked, layout, mine, settings, check, folder if share.leads else None)
        share.wait(f"pictures of '{folder}'")
        if left := _lacking(layout, asked, folder):
            raise FileError(
                f"--output: '{folder}' lacks pictures of {len(left)} prompts that were drawn; run"
                " the same command again"
            )
    return Done(sum(map(len, mine.values())), len(asked.captions) * settings.pictures)


def _facts(
    pipe: Pipeline, asked: Asked, settings: Settings, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """All that tells a folder of pictures from others; see `drawn.Facts`."""
    given = settings._asdict()
    given["guidance"] = _guidance(pipe, settings)
    return {
        "benchmark": asked.benchmark,
        "file": f"prompts{asked.ending}",
        "prompts": drawn.digest(asked.text),
        "kind": build.role(pipe.config),
        **given,
        **facts,
    }


def _guidance(pipe: Pipeline, settings: Settings) -> float | None:
    if not build.takes_guidance(pipe.config):
        return None
    given = settings.guidance
    return float(pipe.config.evaluation.guidance if given is None else given)


def _begin(folder: Path, asked: Asked, facts: Mapping[str, Any], config: Mapping) -> None:
    """Writes the facts and the configuration down, or compares the facts with those there."""
    path = folder / FACTS
    if path.exists():
        if (other := difference(read_json(path), facts)) is not None:
            raise FileError(
                f"--output: '{folder}' was begun with {other}; go on with what it was begun with,"
                " or give another folder"
            )
    elif others := sorted(name for name in drawn.names(folder) if not name.startswith(".")):
        raise FileError(
            f"--output: '{folder}' holds other files, such as '{others[0]}'; give another folder"
        )
    else:
        write_json(path, {**facts, "config": config})
    if not (file := folder / facts["file"]).exists():
        write_atomically(file, asked.text)
    elif read_text(file) != asked.text:
        raise FileError(
            f"--output: '{file}' is not as it was drawn from; remove it, and the same command puts"
            " it back"
        )


def _lacking(layout: Any, asked: Asked, folder: Path) -> dict[int, list[int]]:
    """Numbers of the pictures to draw, for each prompt that is not whole."""
    there = drawn.names(folder)
    found = {place: layout.lacking(place, there) for place in range(len(asked.captions))}
    return {place: numbers for place, numbers in found.items() if numbers is not None}


def _draw(
    pipe: Pipeline,
    asked: Asked,
    layout: Any,
    lacking: Mapping[int, list[int]],
    settings: Settings,
    check: Callable[[], None],
    told: Path | None,
) -> None:
    """Draws and writes pictures; `told` is the folder of the leader, who notes the speed.

    All processes are here together, if they lack pictures or not, as they read networks together.
    """
    with streams.default_settings():
        embed = pipe.world.encoder()
        texts = {place: embed([asked.captions[place]]) for place in lacking}
        if build.needs_null(pipe.config):
            _ = pipe.world.null
        del embed  # before the network takes its place
    _ = pipe.params
    check()
    pace, taken = Pace("pictures", sum(map(len, lacking.values()))), []
    with _writing() as write:
        for place, numbers in lacking.items():
            images = {}
            for number in numbers:
                begun = time.monotonic()
                images[number] = _picture(pipe, texts[place], place, number, settings)
                taken.append(time.monotonic() - begun)
            write(layout.write, place, images)
            del texts[place]
            pace.add(len(numbers))
    if told is not None and len(taken) > 1:
        # The first one compiles.
        device = jax.local_devices()[0].device_kind
        speed = {"seconds_a_picture": float(np.median(taken[1:])), "device": device}
        write_atomically(told / SPEED, json.dumps({**speed, "devices": jax.local_device_count()}))


def _picture(pipe: Pipeline, text: Text, place: int, number: int, settings: Settings) -> np.ndarray:
    """One picture, (H, W, 3) uint8, of a prompt's embedded caption (1, ..)."""
    try:
        (image,) = pipe.draw_each(
            text,
            steps=settings.steps,
            seeds=[settings.seed],
            guidance=[settings.guidance],
            batch_size=1,
            numbers=[number_of(place, number)],
            resolution=settings.resolution,
            tile=settings.tile,
        )
    except NotFinite as error:
        raise NotFinite(f"prompt {place}, picture {number}: {error}") from None
    return image


@contextlib.contextmanager
def _writing() -> Iterator[Any]:
    """A function that calls another one in a thread, a few of them at a time."""
    ahead: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(_WRITERS) as pool:

        def write(act, *arguments) -> None:
            ahead.append(pool.submit(act, *arguments))
            if len(ahead) > 2 * _WRITERS:
                ahead.popleft().result()

        yield write
        while ahead:
            ahead.popleft().result()
