"""Encoders without weights, and the batches that a run would read of pictures prepared by them."""

import itertools

import jax
import numpy as np

from jax_distill.data import encoding
from jax_distill.data.loader import EmbeddedLatents, batches
from jax_distill.data.records import LatentRecords
from jax_distill.flow import Text

SIZE = (16, 24)
BATCHES, BATCH_SIZE = 4, 3  # of five pictures: more than two epochs


def encode(images, key=None):
    """Pictures (B, H, W, 3) to the mean colours of squares of eight pixels, packed."""
    rows, columns = (side // 8 for side in images.shape[1:3])
    squares = images.reshape(-1, rows, 8, columns, 8, 3).mean((2, 4)) / 255
    return squares.reshape(len(images), -1, 3)


def embed(captions):
    """The bytes of captions, added up in two ways."""
    rows = [np.frombuffer(caption.encode(), np.uint8).astype(np.float32) for caption in captions]
    values = np.stack([np.stack([row.mean(), row @ np.arange(len(row)) / 999]) for row in rows])
    return Text(values[:, :, None], values)


def stored_text():
    facts = {"sequence": [2, 1], "pooled": 2, "type": "bfloat16", "padding": "kept"}
    return encoding.StoredText(facts, lambda: embed, lambda captions: [2] * len(captions), {})


def prepare(source, output):
    text, latents = stored_text(), {"shape": [6, 3], "type": "float16"}
    facts = {"latents": latents, "text": text.facts}
    work = encoding.EncodedPictures(source, SIZE, lambda: [encode], text, facts)
    assert encoding.make(output, work) == len(source)


def read(folder):
    """The captions of a prepared folder in order, and the first batches of a run."""
    records = LatentRecords(folder)
    captions = [records[index].caption for index in range(len(records))]
    stream = batches(EmbeddedLatents(records), BATCH_SIZE, seed=5)
    found = list(itertools.islice(stream, BATCHES))
    return captions, jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def assert_same(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
