"""A world of captioned shapes: 64x64 pictures that ask the six questions of GenEval.

Random access by (seed, index), so an input pipeline can shuffle, shard and resume it. Tasks follow
GenEval (Ghosh et al., 2023, https://arxiv.org/abs/2310.11513). Three (colour, shape) pairs and a
tenth of the two-object combinations are never drawn for training: they measure composition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product

import numpy as np

from jax_distill.worlds.shapes.captions import write_caption
from jax_distill.worlds.shapes.requests import RELATIONS, TASKS, Request

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (245, 205, 40),
    "purple": (145, 60, 180),
    "black": (25, 25, 28),
}
TRAINING_MIX = (0.08, 0.17, 0.22, 0.08, 0.25, 0.20)  # the share of each of TASKS
_MIX_ENDS = np.cumsum(TRAINING_MIX)
SPLITS = ("train", "test")
HELD_OUT_PAIRS = frozenset({("blue", "triangle"), ("yellow", "circle"), ("purple", "cross")})

_MARGIN = 2.0
_GAP = 3.0
_MAX_MINOR_OFFSET = 0.35  # of the major one, for objects in a relation
_SINGLE_RADIUS = (9.0, 14.0)
_SEVERAL_RADIUS = (8.0, 11.0)
_LAYOUT_TRIES = 64
_PROMPTS_PER_TASK = 100

Pair = tuple[str, str]  # (colour, shape)


@dataclass(frozen=True)
class Placed:
    """An object in a picture; x, y and radius (half its extent) in pixels, y down."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def width(self) -> float:
        return 2 * EXTENT[self.shape] * self.radius

    @property
    def height(self) -> float:
        return 2 * EXTENT[self.shape] * self.radius


@dataclass(frozen=True)
class Example:
    """A captioned picture: image (64, 64, 3) uint8 and the objects in it."""

    request: Request
    caption: str
    objects: tuple[Placed, ...]
    image: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """A caption to generate from; `unseen` if it asks a combination kept out of training."""

    caption: str
    request: Request
    unseen: bool


# Half extent of each shape in units of the radius, chosen for similar areas (2.0 to 2.6 r^2).
EXTENT = {"circle": 0.9, "square": 0.8, "triangle": 1.0, "cross": 1.0}
ARM = 0.38  # half width of a cross's arms, in radii
_SLANT = (
    2 / 5**0.5,
    1 / 5**0.5,
)  # normal of the triangle's right edge, (1, -1) to (0, 1)


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline of an upright shape, negative inside.

    Args:
        shape: one of `SHAPES`.
        dx: offsets right of the shape's box centre, (W,) or broadcastable with `dy`, in pixels.
        dy: offsets below it, (H, 1) or broadcastable with `dx`, in pixels.
        radius: half extent in pixels.

    Returns:
        (H, W) distances; a lower bound of the distance beyond corners.
    """
    extent = EXTENT[shape] * radius
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - extent
    dx = np.abs(dx)
    if shape == "square":
        return np.maximum(dx, np.abs(dy)) - extent
    if shape == "triangle":
        slanted = _SLANT[0] * dx - (_SLANT[1] * (dy + extent))
        return np.maximum(slanted, dy - extent)
    if shape == "cross":
        dy = np.abs(dy)
        arm = ARM * radius
        return np.minimum(
            np.maximum(dx - extent, dy - arm),
            np.maximum(dx - arm, dy - extent),
        )
    raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")


def coverage(obj: Placed) -> tuple[tuple[slice, slice], np.ndarray]:
    """How much of each pixel an object covers: its box in the picture and (h, w) in [0, 1]."""
    reach = obj.radius + 1
    x0, x1 = max(int(obj.x - reach), 0), min(int(obj.x + reach) + 1, IMAGE_SIZE)
    y0, y1 = max(int(obj.y - reach), 0), min(int(obj.y + reach) + 1, IMAGE_SIZE)
    dx = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - obj.x)
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - obj.y)
    distance = signed_distance(obj.shape, dx, dy, obj.radius)
    inside = np.minimum(np.maximum(np.float32(0.5) - distance, 0), 1)
    return (slice(y0, y1), slice(x0, x1)), inside


def render(objects: Sequence[Placed], background: float = 240.0) -> np.ndarray:
    """Draws anti-aliased objects on a grey background of level 0..255: (64, 64, 3) uint8."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), background, np.float32)
    for obj in objects:
        box, inside = coverage(obj)
        patch = canvas[box]
        patch += inside[..., None] * (np.array(COLORS[obj.color], np.float32) - patch)
    return (canvas + np.float32(0.5)).astype(np.uint8)


@cache
def held_out_combination(first: Pair, second: Pair) -> bool:
    """Whether these two (colour, shape) pairs, in any order, are kept apart in training.

    A tenth of the combinations of two different shapes, by a hash that never changes.
    """
    if first[1] == second[1]:
        return False
    name = "+".join(sorted(f"{color} {shape}" for color, shape in (first, second))) + ", apart"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _kept_out(pairs: Sequence[Pair]) -> bool:
    """Whether a picture of these (colour, shape) pairs is kept out of training."""
    if any(pair in HELD_OUT_PAIRS for pair in pairs):
        return True
    return len(pairs) == 2 and held_out_combination(*pairs)


def is_unseen(request: Request) -> bool:
    """Whether the colours and shapes a request asks for never appear together in training."""
    pairs = [(c, s) for s, c, n in request.objects for _ in range(n) if c is not None]
    return _kept_out(pairs)


def _layout(rng: np.random.Generator, count: int, relation: str | None) -> np.ndarray:
    """Draws (count, 3) rows of x, y, radius in pixels: apart, inside, and in `relation`."""
    low, high = _SINGLE_RADIUS if count == 1 else _SEVERAL_RADIUS
    tries = 1 if count == 1 else _LAYOUT_TRIES
    while True:
        u = rng.random((tries, 3, count))
        radius = low + (high - low) * u[:, 2]
        border = _MARGIN + radius
        room = IMAGE_SIZE - 2 * border
        x, y = border + u[:, 0] * room, border + u[:, 1] * room
        valid = np.ones(tries, bool)
        for i, j in combinations(range(count), 2):
            apart = radius[:, i] + radius[:, j] + _GAP
            far = np.maximum(np.abs(x[:, i] - x[:, j]), np.abs(y[:, i] - y[:, j]))
            valid &= far >= apart
        if relation is not None:
            right, down = x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]
            major, minor = (right, down) if relation in ("left", "right") else (down, right)
            if relation in ("left", "above"):
                major = -major
            valid &= np.abs(minor) < _MAX_MINOR_OFFSET * major
        if valid.any():
            best = int(valid.argmax())
            return np.stack([x[best], y[best], radius[best]], axis=1)


def _draw_pairs(request: Request, rng: np.random.Generator) -> list[Pair]:
    """The (colour, shape) of every object, open colours drawn at random."""
    names = tuple(COLORS)
    return [
        (names[int(rng.integers(len(names)))] if color is None else color, shape)
        for shape, color, count in request.objects
        for _ in range(count)
    ]


def _place(
    request: Request, pairs: Sequence[Pair], rng: np.random.Generator
) -> tuple[tuple[Placed, ...], np.ndarray]:
    layout = _layout(rng, len(pairs), request.relation).tolist()
    objects = tuple(
        Placed(shape, color, x, y, radius)
        for (color, shape), (x, y, radius) in zip(pairs, layout, strict=True)
    )
    return objects, render(objects, background=float(rng.integers(228, 251)))


def picture(request: Request, rng: np.random.Generator) -> tuple[tuple[Placed, ...], np.ndarray]:
    """Draws a picture that holds exactly what `request` asks; all else is random.

    Args:
        request: to be drawn, seen in training or not.
        rng: the source of open colours, places, sizes and the background.

    Returns:
        The objects, and the image (64, 64, 3) uint8.
    """
    return _place(request, _draw_pairs(request, rng), rng)


def _draw_request(task: str, rng: np.random.Generator) -> Request:
    names = tuple(COLORS)
    shape, other = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    color, other_color = (names[i] for i in rng.permutation(len(names))[:2])
    if task == "single_object":
        return Request(task, ((shape, None, 1),))
    if task == "colors":
        return Request(task, ((shape, color, 1),))
    if task == "counting":
        count = 2 + int(rng.integers(3))
        return Request(task, ((shape, color if rng.random() < 0.5 else None, count),))
    if task == "color_attr":
        return Request(task, ((shape, color, 1), (other, other_color, 1)))
    if task == "two_object":
        return Request(task, ((shape, None, 1), (other, None, 1)))
    if rng.random() < 0.5:
        color = other_color = None
    relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
    return Request(task, ((shape, color, 1), (other, other_color, 1)), relation)


def sample(seed: int, index: int, split: str = "train") -> Example:
    """The `index`-th captioned picture of the stream `seed`.

    Training requests that name a held-out combination are drawn again, which leaves colours named
    in two fifths of the position captions and 45 % of the counting ones.

    Args:
        seed: stream, a non-negative integer.
        index: place in the stream, a non-negative integer.
        split: "train" leaves out the held-out pairs and combinations; "test" draws from all.

    Returns:
        The same example for the same arguments, on every machine.

    Raises:
        ValueError: if `split` is unknown.
    """
    request, pairs, caption, rng = _asked(seed, index, split)
    objects, image = _place(request, pairs, rng)
    return Example(request, caption, objects, image)


def caption(seed: int, index: int) -> str:
    """The caption of `sample(seed, index)`, whose picture is not drawn."""
    return _asked(seed, index, "train")[2]


def _asked(
    seed: int, index: int, split: str
) -> tuple[Request, Sequence[Pair], str, np.random.Generator]:
    """What a picture is asked to show, in what words, and the generator that places it."""
    if split not in SPLITS:
        raise ValueError(f"split: unknown split {split!r}, expected one of {SPLITS}")
    key = np.array([seed, index], np.uint64)
    counter = np.array([0, 0, 0, SPLITS.index(split)], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
    task = TASKS[min(int(np.searchsorted(_MIX_ENDS, rng.random(), "right")), len(TASKS) - 1)]
    train = split == "train"
    while is_unseen(request := _draw_request(task, rng)) and train:
        pass
    # Only the open colours are drawn again, so that no shape or count becomes rarer than asked.
    while _kept_out(pairs := _draw_pairs(request, rng)) and train:
        pass
    return request, pairs, write_caption(request, rng), rng


def _all_requests(task: str) -> Iterator[Request]:
    """Every request of a task that its held-out prompts may ask."""
    if task == "single_object":
        yield from (Request(task, ((shape, None, 1),)) for shape in SHAPES)
    elif task == "two_object":
        for a, b in combinations(SHAPES, 2):
            yield Request(task, ((a, None, 1), (b, None, 1)))
    elif task == "counting":
        for shape, count in product(SHAPES, (2, 3, 4)):
            yield Request(task, ((shape, None, count),))
    elif task == "colors":
        for shape, color in product(SHAPES, COLORS):
            yield Request(task, ((shape, color, 1),))
    elif task == "position":
        for (a, b), relation in product(permutations(SHAPES, 2), RELATIONS):
            yield Request(task, ((a, None, 1), (b, None, 1)), relation)
    else:
        for (a, b), (c, d) in product(combinations(SHAPES, 2), permutations(COLORS, 2)):
            yield Request(task, ((a, c, 1), (b, d, 1)))


_UNSEEN_PROMPTS = {"colors": 25, "color_attr": 40}  # of the hundred of the task


@cache
def held_out_prompts() -> tuple[Prompt, ...]:
    """The fixed prompts of the benchmark: 600, a hundred a task in the order of `TASKS`.

    Captions differ from each other and cover a task's requests evenly. A quarter of the colors
    prompts and two fifths of the color_attr prompts ask for combinations never shown in training.
    """
    rng = np.random.default_rng(20240501)
    prompts = []
    for task in TASKS:
        requests = list(_all_requests(task))
        requests = [requests[i] for i in rng.permutation(len(requests))]
        unseen = [r for r in requests if is_unseen(r)]
        seen = [r for r in requests if not is_unseen(r)]
        quota = _UNSEEN_PROMPTS.get(task, 0)
        captions: dict[str, Request] = {}
        for group, total in ((unseen, quota), (seen, _PROMPTS_PER_TASK)):
            turn = 0
            while len(captions) < total:
                caption = write_caption(group[turn % len(group)], rng)
                if caption not in captions:
                    captions[caption] = group[turn % len(group)]
                    turn += 1
        prompts += [Prompt(c, r, is_unseen(r)) for c, r in captions.items()]
    return tuple(prompts)
