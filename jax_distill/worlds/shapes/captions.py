"""Captions of the shape world: the grammar that writes them and the fixed encoder that reads them.

The encoder stands in for FLUX's pair of text encoders: a sequence of token features (T5) and one
pooled vector (CLIP). Nothing in it is learned, so a caption has the same features on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from jax_distill.worlds.shapes.requests import Request

T = TypeVar("T")

# (singular, plural); the first of each tuple is the plain name and is written half of the time.
SHAPE_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (
        ("circle", "circles"),
        ("disc", "discs"),
        ("disk", "disks"),
        ("ball", "balls"),
        ("round shape", "round shapes"),
    ),
    "square": (
        ("square", "squares"),
        ("box", "boxes"),
        ("block", "blocks"),
        ("square shape", "square shapes"),
    ),
    "triangle": (
        ("triangle", "triangles"),
        ("triangular shape", "triangular shapes"),
        ("pyramid", "pyramids"),
        ("wedge", "wedges"),
    ),
    "cross": (
        ("cross", "crosses"),
        ("plus", "pluses"),
        ("plus sign", "plus signs"),
        ("cross shape", "cross shapes"),
    ),
}
COLOR_NAMES: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "navy", "azure"),
    "yellow": ("yellow", "golden", "lemon"),
    "purple": ("purple", "violet", "plum"),
    "black": ("black", "dark", "ebony"),
}
NUMBER_NAMES: dict[str, tuple[str, ...]] = {
    "one": ("one", "1"),
    "two": ("two", "2"),
    "three": ("three", "3"),
    "four": ("four", "4"),
    "five": ("five", "5"),
    "six": ("six", "6"),
}
RELATION_NAMES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
# Words that carry grammar: which noun a relation binds to follows from them.
GRAMMAR_NAMES: dict[str, tuple[str, ...]] = {
    "and": ("and", "next to", "beside", "alongside", "together with"),
    "with": ("with", "has", "having"),
    "it": ("it",),
}
# Relation words outside a phrase ("on the left", "at the bottom") keep the relation's concept.
_BARE_RELATIONS = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an the is are there of in on at to side picture image photo drawing sketch showing "
        "shows depicting containing draw show paint make create me please where which that exactly "
        "only just group set colored coloured color colour shape shapes object objects sits "
        "sitting sit lies lying placed located positioned standing plain light white background "
        "both contains",
    )
)

_PREFIXES = (
    "a picture of ",
    "an image of ",
    "an image showing ",
    "a drawing of ",
    "a photo of ",
    "draw ",
    "show ",
    "a picture showing ",
)
_CLAUSE_PREFIXES = ("a picture where ", "an image in which ")
_SUFFIXES = (" on a plain background", " on a light background")

CONCEPT_DIM = 48
POSITION_DIM = 16
SEQUENCE_DIM = 3 * CONCEPT_DIM + POSITION_DIM
POOLED_DIM = 3 * CONCEPT_DIM
_CONTEXT_DECAY = 0.5
# A typical caption keeps four or five tokens; this count sets the pooled vector's unit variance.
_TYPICAL_TOKENS = 4.5


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _pick_name(rng: np.random.Generator, names: Sequence[T]) -> T:
    """The plain name half of the time, one of its synonyms otherwise."""
    if rng.random() < 0.5:
        return names[0]
    return names[1 + int(rng.integers(len(names) - 1))]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _noun(rng: np.random.Generator, shape: str, color: str | None, plural: bool = False) -> str:
    name = _pick_name(rng, SHAPE_NAMES[shape])[int(plural)]
    return name if color is None else f"{_pick_name(rng, COLOR_NAMES[color])} {name}"


def _noun_phrase(rng: np.random.Generator, shape: str, color: str | None) -> str:
    """'a red circle', or now and then 'a circle that is red'."""
    if color is not None and rng.random() < 0.15:
        name = _noun(rng, shape, None)
        return f"{_article(name)} that is {_pick_name(rng, COLOR_NAMES[color])}"
    return _article(_noun(rng, shape, color))


def _framed(rng: np.random.Generator, phrase: str) -> str:
    """A bare noun phrase with an optional prefix and background clause."""
    u = rng.random()
    if u < 0.5:
        phrase = _pick(rng, _PREFIXES) + phrase
    if 0.4 < u < 0.55:
        phrase += _pick(rng, _SUFFIXES)
    return phrase


def _position_caption(rng: np.random.Generator, first: str, second: str, relation: str) -> str:
    """`first` is <relation> of `second`, in one of six word orders."""
    where = _pick(rng, RELATION_NAMES[relation])
    form = int(rng.integers(6))
    if form == 0:
        return _framed(rng, f"{first} {where} {second}")
    if form == 1:
        verb = _pick(rng, ("is", "sits", "is placed", "lies"))
        lead = _pick(rng, _CLAUSE_PREFIXES) if rng.random() < 0.25 else ""
        return f"{lead}{first} {verb} {where} {second}"
    if form == 2:
        return f"there is {first} {where} {second}"
    if form == 3:
        lead = _pick(rng, _CLAUSE_PREFIXES) if rng.random() < 0.25 else ""
        return f"{lead}{where} {second} {_pick(rng, ('is', 'there is', 'sits'))} {first}"
    if form == 4:
        return _framed(rng, f"{second} with {first} {where} it")
    return f"{second} has {first} {where} it"


def write_caption(request: Request, rng: np.random.Generator) -> str:
    """Writes one of the many captions that ask exactly for `request`.

    Args:
        request: to be expressed.
        rng: the source of word order, synonyms and framing.

    Returns:
        A caption in lower case; `CaptionEncoder` keeps at most eight of its tokens.
    """
    (shape, color, count), *rest = request.objects
    if request.relation is not None:
        other, other_color, _ = rest[0]
        first = _article(_noun(rng, shape, color))
        second = _article(_noun(rng, other, other_color))
        return _position_caption(rng, first, second, request.relation)
    if rest:
        phrases = [_noun_phrase(rng, s, c) for s, c, _ in request.objects]
        if rng.random() < 0.5:
            phrases.reverse()
        both = f" {_pick_name(rng, GRAMMAR_NAMES['and'])} ".join(phrases)
        return f"there is {both}" if rng.random() < 0.15 else _framed(rng, both)
    if count > 1:
        number = _pick(rng, NUMBER_NAMES[("one", "two", "three", "four")[count - 1]])
        phrase = f"{number} {_noun(rng, shape, color, plural=True)}"
        u = rng.random()
        if u < 0.15:
            return f"there are {phrase}"
        return f"exactly {phrase}" if u < 0.2 else _framed(rng, phrase)
    phrase = _noun_phrase(rng, shape, color)
    return f"there is {phrase}" if rng.random() < 0.15 else _framed(rng, phrase)


def _concept_phrases() -> tuple[tuple[str, ...], dict[tuple[str, ...], str]]:
    """All concepts in a fixed order, and the word tuples that name each."""
    phrases: dict[tuple[str, ...], str] = {}
    concepts: list[str] = []
    for table in (
        SHAPE_NAMES,
        COLOR_NAMES,
        NUMBER_NAMES,
        RELATION_NAMES,
        GRAMMAR_NAMES,
    ):
        for concept, names in table.items():
            concepts.append(concept)
            for name in names:
                for form in name if isinstance(name, tuple) else (name,):
                    phrases[tuple(form.split())] = concept
    for word, concept in _BARE_RELATIONS.items():
        phrases[(word,)] = concept
    return tuple(concepts), phrases


CONCEPTS, _PHRASES = _concept_phrases()
_LONGEST_PHRASE = max(map(len, _PHRASES))
_CONCEPT_INDEX = {concept: i for i, concept in enumerate(CONCEPTS)}


@lru_cache(maxsize=4096)
def _concept_vector(token: str) -> np.ndarray:
    """A unit vector: one-hot for a known concept, hashed signs for any other word."""
    if token in _CONCEPT_INDEX:
        return np.eye(CONCEPT_DIM, dtype=np.float32)[_CONCEPT_INDEX[token]]
    digest = hashlib.blake2b(token.encode(), digest_size=CONCEPT_DIM // 8).digest()
    bits = np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32)
    return (2 * bits - 1) / np.float32(np.sqrt(CONCEPT_DIM))


class CaptionEncoder:
    """Turns captions into the text pair of FLUX: token features and one pooled vector.

    Each token holds its concept, a decayed sum of the concepts left and right of it (so that a
    colour is bound to its noun and a relation to its order without a learned encoder), and its
    position. Synonyms share a concept; articles, copulas and framing words are dropped.

    Args:
        max_length: number of tokens a sequence is padded to.
    """

    def __init__(self, max_length: int = 12):
        self.max_length = max_length
        self.sequence_dim = SEQUENCE_DIM
        self.pooled_dim = POOLED_DIM
        position = np.arange(max_length, dtype=np.float64)
        frequency = np.pi / 2.0 ** np.arange(POSITION_DIM // 2, dtype=np.float64) * 0.75
        angle = position[:, None] * frequency
        waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1) * np.sqrt(2)
        self._position = waves.astype(np.float32)  # (L, POSITION_DIM)
        phase = np.pi * position / max_length
        self._phases = np.stack([np.ones_like(phase), np.cos(phase), np.sin(phase)])  # (3, L)
        distance = position[:, None] - position  # of token j to the left of token i
        left = np.where(distance > 0, _CONTEXT_DECAY ** np.abs(distance), 0)
        # The decayed sum of unit concepts has norm 1/sqrt(3) in the long run: back to one.
        self._left = np.sqrt(3) * left  # (L, L)

    def concepts(self, caption: str) -> list[str]:
        """The tokens the encoder keeps of `caption`: concept names, and unknown words as written.

        Raises:
            ValueError: if the caption keeps more than `max_length` tokens.
        """
        words = re.findall(r"[^\W_]+", re.sub(r"['’]", "", caption.lower()))
        kept = []
        i = 0
        while i < len(words):
            for length in range(min(_LONGEST_PHRASE, len(words) - i), 0, -1):
                concept = _PHRASES.get(tuple(words[i : i + length]))
                if concept is not None:
                    kept.append(concept)
                    i += length
                    break
            else:
                if words[i] not in _FILLERS:
                    kept.append(words[i])
                i += 1
        if len(kept) > self.max_length:
            raise ValueError(
                f"caption {caption!r} keeps {len(kept)} tokens ({' '.join(kept)}), the limit is "
                f"{self.max_length}; shorten it or build CaptionEncoder(max_length={len(kept)})"
            )
        return kept

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes captions; the empty caption is the null caption of classifier-free guidance.

        Args:
            captions: B captions.

        Returns:
            sequence: (B, max_length, 160) float32, about unit variance; padding tokens hold their
                position only.
            pooled: (B, 144) float32, about unit variance; zero for the null caption.

        Raises:
            ValueError: if a caption keeps more than `max_length` tokens.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions must be a sequence of strings, got the string {captions!r}")
        batch = len(captions)
        concept = np.zeros((batch, self.max_length, CONCEPT_DIM))
        present = np.zeros((batch, self.max_length, 1))
        for row, caption in enumerate(captions):
            for column, token in enumerate(self.concepts(caption)):
                concept[row, column] = _concept_vector(token)
                present[row, column] = 1
        left = np.matmul(self._left, concept) * present
        right = np.matmul(self._left.T, concept) * present
        scale = np.sqrt(CONCEPT_DIM)
        position = np.broadcast_to(self._position, (batch, *self._position.shape))
        sequence = np.concatenate([scale * concept, scale * left, scale * right, position], -1)
        pooled = np.matmul(self._phases, concept).reshape(batch, POOLED_DIM)
        pooled *= np.sqrt(POOLED_DIM / (2 * _TYPICAL_TOKENS))
        return sequence.astype(np.float32), pooled.astype(np.float32)
