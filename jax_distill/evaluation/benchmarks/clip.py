"""CLIP's embeddings of pictures and texts, and the colours that it sees in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from jax_distill.evaluation.benchmarks import runners
from jax_distill.evaluation.benchmarks.prompts import Color

_BATCH = 16  # pictures at a time
_LENGTH = 77  # tokens
_HIDDEN = (153, 153, 153)  # the grey that GenEval puts in the place of what is not the object
_PHRASES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}")
_PHRASES += ("a photo of a {color} object",)
"""Texts of GenEval's authors (Ghosh et al., 2023); a colour's embedding is their mean."""


class Clip(NamedTuple):
    """A CLIP.

    Attributes:
      pictures: pictures (H, W, 3) uint8 of any sizes to embeddings (n, d) of unit length.
      texts: texts to embeddings (n, d) of unit length; what is beyond 77 tokens is cut off.
    """

    pictures: Callable[[Sequence[np.ndarray]], np.ndarray]
    texts: Callable[[Sequence[str]], np.ndarray]


def load(folder: Path) -> Clip:
    """Opens a CLIP of transformers, or `vision_model.onnx` and `text_model.onnx` beside its files.

    Raises:
      FileError: the folder has none.
      ValueError: a package is missing.
    """
    process = runners.processor(folder)
    from transformers import AutoTokenizer

    tokenizer = runners.read_folder(folder, AutoTokenizer)
    vision, text = (
        runners.onnx_file(folder, name) for name in ("vision_model.onnx", "text_model.onnx")
    )
    inputs = ("input_ids", "attention_mask")
    if vision is not None and text is not None:
        see = runners.run_onnx(vision, ("pixel_values",))
        read = runners.run_onnx(text, inputs)
    else:
        network = runners.torch_network(folder, "CLIPModel")
        see = runners.run_torch(network.get_image_features, "image_embeds")
        read = runners.run_torch(network.get_text_features, "text_embeds")

    def pictures(images: Sequence[np.ndarray]) -> np.ndarray:
        parts = [
            see(pixel_values=process(images[start : start + _BATCH])["pixel_values"])[
                "image_embeds"
            ]
            for start in range(0, len(images), _BATCH)
        ]
        return _unit(np.concatenate(parts))

    def texts(words: Sequence[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(words), _BATCH):
            part = list(words[start : start + _BATCH])
            ids = tokenizer(
                part, padding=True, truncation=True, max_length=_LENGTH, return_tensors="np"
            )
            parts.append(
                read(**{name: ids[name].astype(np.int64) for name in inputs})["text_embeds"]
            )
        return _unit(np.concatenate(parts))

    return Clip(pictures, texts)


class Colors:
    """Names the colours of objects as GenEval does: by the nearest of the colours' texts."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self._classes = functools.cache(self._embedded)

    def _embedded(self, name: str) -> np.ndarray:
        """Embeddings (10, d) of the colours for objects of a class."""
        words = [
            phrase.format(color=color, name=name)
            for color in get_args(Color)
            for phrase in _PHRASES
        ]
        found = self._clip.texts(words).reshape(len(get_args(Color)), len(_PHRASES), -1)
        return _unit(found.mean(1))

    def __call__(
        self,
        image: np.ndarray,
        name: str,
        crops: Sequence[tuple[Sequence[float], np.ndarray | None]],
    ) -> list[dict[str, float]]:
        """The colours' scores, cosines, of some objects of a class.

        Args:
          image: (H, W, 3) uint8.
          name: of the class.
          crops: the box of each object in pixels, and its mask (H, W) bool if there is one: the
            rest of the box is made grey.
        """
        found = self._clip.pictures([crop(image, *each) for each in crops])
        scores = found @ self._classes(name).T
        return [dict(zip(get_args(Color), map(float, row))) for row in scores]


def crop(image: np.ndarray, box: Sequence[float], mask: np.ndarray | None) -> np.ndarray:
    """The part of a picture in a box, a pixel or more; grey where a mask is false."""
    if mask is not None:
        image = np.where(mask[..., None], image, np.uint8(_HIDDEN))
    height, width = image.shape[:2]
    left, top, right, bottom = (round(each) for each in box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[top : max(bottom, top + 1), left : max(right, left + 1)]


def _unit(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
