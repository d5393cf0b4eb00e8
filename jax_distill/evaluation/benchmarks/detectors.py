"""Detectors of objects: what they find in a picture, as boxes, or as masks with their boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image
from scipy.special import expit, softmax

from jax_distill.evaluation.benchmarks import runners
from jax_distill.evaluation.benchmarks.geneval import THRESHOLD
from jax_distill.storage.files import FileError

_MOST = 100  # objects of a picture, the surest
_OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""What GenEval calls classes of COCO."""
_SEGMENTING = ("ForUniversalSegmentation", "ForInstanceSegmentation")


class Found(NamedTuple):
    """An object in a picture.

    Attributes:
      name: of its class.
      box: left, top, right, bottom in pixels of the picture.
      score: 0..1.
      mask: (H, W) bool of the picture, from detectors that make some.
    """

    name: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


class Detector(NamedTuple):
    """A detector.

    Attributes:
      classes: names of those that it knows.
      find: a picture (H, W, 3) uint8 to its objects above GenEval's threshold, surest first.
    """

    classes: frozenset[str]
    find: Callable[[np.ndarray], list[Found]]


class _Config(TypedDict):
    """The keys of `config.json` that are read here."""

    id2label: dict[str, str]


class _Raw(NamedTuple):
    """Objects as numbers: classes (n,), scores (n,), boxes (n, 4) and masks (n, H, W) or None.

    Boxes are shares of the width and height of what the network saw.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


def load(folder: Path) -> Detector:
    """Opens a detector.

    The network's outputs are those of transformers (`logits` and `pred_boxes`, as of DETR and those
    after it; `class_queries_logits` and `masks_queries_logits`, as of Mask2Former, which GenEval's
    authors use), or `boxes`, `labels`, `scores` and perhaps `masks` of one picture, as those of
    torchvision are exported, with boxes in pixels of what the network sees.

    Args:
      folder: of transformers, or with `model.onnx`; the classes are `id2label` in `config.json`.

    Raises:
      FileError: it holds no such detector.
      ValueError: a package is missing.
    """
    process = runners.processor(folder)
    config = runners.config_of(folder, _Config)
    labels = config["id2label"]
    names = {int(key): _OTHER_NAMES.get(name, name) for key, name in labels.items()}
    if (onnx := runners.onnx_file(folder)) is not None:
        run = runners.run_onnx(onnx, ("pixel_values", "pixel_mask"))
    else:
        kinds = [kind for kind in _SEGMENTING for name in _architectures(config) if kind in name]
        kind = f"AutoModel{kinds[0] if kinds else 'ForObjectDetection'}"
        run = runners.run_torch(runners.torch_network(folder, kind))

    def find(image: np.ndarray) -> list[Found]:
        inputs = _with_mask(process([image]))
        raw = _decoded(run(**inputs), inputs, names, folder)
        return _objects(raw, names, image.shape[:2])

    return Detector(frozenset(names.values()), find)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [name for name in config.get("architectures") or [] if isinstance(name, str)]


def _with_mask(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A network's inputs, of one picture, with the mask of its pixels, which is 0 for padding."""
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    whole = np.ones((1, *pixels.shape[2:]), np.int64)
    return {"pixel_values": pixels, "pixel_mask": np.asarray(inputs.get("pixel_mask", whole))}


def _decoded(
    outputs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    names: Mapping[int, str],
    folder: Path,
) -> _Raw:
    """A network's outputs, of whichever of the three kinds they are."""
    seen = inputs["pixel_mask"][0]
    height, width = int(seen[:, 0].sum()), int(seen[0].sum())  # padding is at the right and below
    if {"logits", "pred_boxes"} <= outputs.keys():
        labels, scores, query = _surest(outputs["logits"][0], len(names))
        x, y, across, down = outputs["pred_boxes"][0][query].T / [[1], [1], [2], [2]]
        boxes = np.stack([x - across, y - down, x + across, y + down], 1)
        return _Raw(labels, scores, boxes)
    if {"class_queries_logits", "masks_queries_logits"} <= outputs.keys():
        labels, scores, query = _surest(outputs["class_queries_logits"][0], len(names))
        return _of_masks(
            labels, scores, outputs["masks_queries_logits"][0][query], seen.shape, (height, width)
        )
    if {"boxes", "labels", "scores"} <= outputs.keys():
        boxes = outputs["boxes"].reshape(-1, 4) / [width, height, width, height]
        masks = outputs.get("masks")
        if masks is not None:
            masks = masks.reshape(-1, *masks.shape[-2:])[:, :height, :width] > 0.5
        return _Raw(outputs["labels"].reshape(-1), outputs["scores"].reshape(-1), boxes, masks)
    raise FileError(
        f"'{folder}': the network gives {', '.join(sorted(outputs))}; give a detector with logits"
        " and pred_boxes, or with boxes, labels and scores"
    )


def _surest(logits: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, scores and queries (n,) of logits (queries, classes, and one more for nothing).

    Without the one for nothing, each class is a question of its own.
    """
    logits = np.asarray(logits, np.float64)
    scores = softmax(logits, -1)[:, :-1] if logits.shape[1] == classes + 1 else expit(logits)
    order = np.argsort(-scores, axis=None, kind="stable")[:_MOST]
    query, label = np.unravel_index(order, scores.shape)
    return label, scores[query, label], query


def _of_masks(
    labels: np.ndarray,
    scores: np.ndarray,
    logits: np.ndarray,
    padded: tuple[int, int],
    size: tuple[int, int],
) -> _Raw:
    """Objects of masks (n, h, w), which are true above 0; they cover the padding, too.

    The score of a class is multiplied by the mean probability within the mask, as Mask2Former's
    authors do (Cheng et al., 2022, arXiv:2112.01527).
    """
    found = []
    for label, score, each in zip(labels, scores, logits):
        whole = Image.fromarray(np.asarray(each, np.float32)).resize(padded[::-1], _LINEAR)
        part = np.asarray(whole)[: size[0], : size[1]]
        mask = part > 0
        if mask.any():
            found.append((label, score * expit(part[mask]).mean(), _box_of(mask), mask))
    labels, scores, boxes, masks = (np.array(each) for each in zip(*found)) if found else _NONE
    return _Raw(labels, scores, boxes, masks)


_LINEAR = Image.Resampling.BILINEAR
_NONE = np.zeros(0, int), np.zeros(0), np.zeros((0, 4)), np.zeros((0, 1, 1), bool)


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box of a mask that is true somewhere, as shares of its width and height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    ends = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return tuple(map(float, ends))


def _objects(raw: _Raw, names: Mapping[int, str], size: tuple[int, int]) -> list[Found]:
    """Objects above the threshold in a picture of a height and width."""
    height, width = size
    found = []
    for place in np.argsort(-raw.scores, kind="stable"):
        name, score = names.get(int(raw.labels[place])), float(raw.scores[place])
        if name is None or not score > THRESHOLD:  # a class for nothing, or NaN
            continue
        ends = raw.boxes[place] * [width, height, width, height]
        left, right = np.clip(ends[::2], 0, width)
        top, bottom = np.clip(ends[1::2], 0, height)
        box = tuple(map(float, (left, top, max(left, right), max(top, bottom))))
        mask = None
        if raw.masks is not None:
            image = Image.fromarray(raw.masks[place]).resize((width, height))
            mask = np.asarray(image, bool)
        found.append(Found(name, box, min(score, 1.0), mask))
    return found
