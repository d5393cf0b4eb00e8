"""Encoding: every example is its own picture's latents, in order, whatever the batches."""

import numpy as np
import pytest

from jax_distill.data import encoding, shapes
from jax_distill.data.records import LatentRecords


def mean_color(images):
    """An encoder whose one latent is the picture's mean colour."""
    assert len(images) == encoding.BATCH  # one shape, one compilation
    return images.mean((1, 2))[:, None] / 255


@pytest.mark.parametrize("examples", [1, encoding.BATCH, encoding.BATCH + 5])
def test_examples_are_in_order_and_whole(tmp_path, examples):
    encoding.encode_shapes(tmp_path, examples, 3, mean_color)
    records = LatentRecords(tmp_path)
    assert len(records) == examples
    assert records.description["seed"] == 3 and records.description["examples"] == examples
    for index in {0, examples // 2, examples - 1}:
        example = shapes.sample(3, index)
        assert records[index].caption == example.caption
        expected = example.image.mean((0, 1))[None] / 255
        np.testing.assert_allclose(records[index].latents, expected, atol=1e-3)
