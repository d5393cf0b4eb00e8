"""What a client asks for: one picture, checked before it waits for its turn."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_distill import streams
from jax_distill.assembly import draw_settings
from jax_distill.pipeline import Pipeline
from jax_distill.storage.quoting import shown

MOST_PICTURES = 16  # of one request, as a grid's
MOST_LETTERS = 4000  # of a prompt; FLUX's encoder reads about half of that
MOST_STEPS = 100  # each number of steps is a program of its own
LARGEST = 2  # times the longer side of the world's pictures
STEPS = 2  # of a student

NAMES = ("prompt", "network", "steps", "seed", "guidance", "height", "width")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,3})?"
)
_TAG = re.compile(r"<[/!?]?[a-zA-Z][^<>]*>")


class Wanted(NamedTuple):
    """One picture that is asked for.

    Attributes:
      network: "student" or "teacher".
      prompt: its caption.
      steps: of the sampler.
      seed: of the noise.
      guidance: scale; None for the configuration's.
      resolution: height and width in pixels.
    """

    network: str
    prompt: str
    steps: int
    seed: int
    guidance: float | None
    resolution: tuple[int, int]

    @property
    def program(self) -> tuple:
        """What the compiled program depends on; pictures of one program can be drawn together."""
        return self.network, self.steps, self.resolution


def picture(given: Mapping[str, Sequence[str]], networks: Mapping[str, Pipeline]) -> Wanted:
    """The picture that a client's parameters ask for.

    Args:
      given: texts by name, as of a query; those of `NAMES`, of which only the prompt is needed.
      networks: that can be asked, the default first.

    Raises:
      ValueError: a parameter is unknown, given twice, missing, or out of its range.
    """
    for name, texts in given.items():
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise ValueError(f"{shown(name)} is no parameter; the parameters are {known}")
        if len(texts) > 1:
            raise ValueError(f"{name}: given {len(texts)} times; give it once")
    texts = {name: texts[0].strip() for name, texts in given.items() if texts[0].strip()}
    network = texts.get("network", next(iter(networks)))
    if network not in networks:
        raise ValueError(f"network: {shown(network)} is not one of {', '.join(networks)}")
    pipe = networks[network]
    prompt = _prompt(texts.get("prompt", ""))
    steps = _whole("steps", texts["steps"]) if "steps" in texts else default_steps(network, pipe)
    streams.whole_number("steps", steps, 1, MOST_STEPS)
    guidance = None
    if "guidance" in texts:
        guidance = draw_settings.guidance(_real("guidance", texts["guidance"]), pipe.config)
    return Wanted(
        network,
        prompt,
        draw_settings.steps(steps, pipe.config),
        streams.check_seed(_whole("seed", texts.get("seed", "0"))),
        guidance,
        _resolution(texts, pipe),
    )


def default_steps(network: str, pipe: Pipeline) -> int:
    """Steps where none are given: few for a student, those of its grids for a teacher."""
    return STEPS if network == "student" else min(pipe.config.samples.teacher_steps, MOST_STEPS)


def largest_side(pipe: Pipeline) -> int:
    """The most pixels along a side."""
    return LARGEST * max(pipe.world.resolution)


def _prompt(text: str) -> str:
    if not text:
        raise ValueError("prompt: empty; say what to draw")
    if len(text) > MOST_LETTERS:
        raise ValueError(f"prompt: {len(text)} characters are more than {MOST_LETTERS}; shorten it")
    if tag := _TAG.search(text):
        raise ValueError(f"prompt: {shown(tag[0])} is a tag, not a word; leave it out")
    return draw_settings.captions(text)[0]


def _resolution(texts: Mapping[str, str], pipe: Pipeline) -> tuple[int, int]:
    sides = [_whole(name, texts[name]) if name in texts else None for name in ("height", "width")]
    for name, side in zip(("height", "width"), sides):
        if side is not None:
            streams.whole_number(name, side, 1, largest_side(pipe))
    return draw_settings.resolution(*sides, pipe.world.resolution)


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,20}", text):
        raise ValueError(f"{name}: {shown(text)} is not a whole number")
    return int(text)


def _real(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name}: {shown(text)} is not a number")
    return float(text)
