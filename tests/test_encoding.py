"""Encoding: every example is its own picture's latents, in order, whatever the batches."""

import numpy as np
import pytest
from PIL import Image
from test_sources import KINDS

from jax_distill.data import encoding
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.data.sources.opening import open_source
from jax_distill.flow import Text
from jax_distill.worlds.shapes import renderer, sources


def mean_color(images):
    """An encoder whose one latent is the picture's mean colour."""
    assert len(images) == sources.BATCH  # one shape, one compilation
    return images.mean((1, 2))[:, None] / 255


@pytest.mark.parametrize("examples", [1, sources.BATCH, sources.BATCH + 5])
def test_examples_are_in_order_and_whole(tmp_path, examples):
    sources.encode_shapes(tmp_path, examples, 3, mean_color)
    records = LatentRecords(tmp_path)
    assert len(records) == examples
    assert records.description["seed"] == 3 and records.description["examples"] == examples
    for index in {0, examples // 2, examples - 1}:
        example = renderer.sample(3, index)
        assert records[index].caption == example.caption
        expected = example.image.mean((0, 1))[None] / 255
        np.testing.assert_allclose(records[index].latents, expected, atol=1e-3)


def test_drawn_latents_belong_to_their_captions_and_noise(tmp_path):
    captions = [f"{index} circles" for index in range(encoding.DRAWN_BATCH + 3)]

    def embed(rows):
        numbers = np.array([float(row.split()[0]) for row in rows])
        return Text(numbers[:, None, None], numbers[:, None])

    def draw(text, start):
        assert len(text.pooled) == encoding.DRAWN_BATCH  # one shape, one compilation
        return np.stack([text.pooled, np.full_like(text.pooled, start)], -1)

    encoding.encode_drawn(tmp_path / "plain", captions, embed, draw, {"teacher": "it"})
    records = LatentRecords(tmp_path / "plain")
    assert len(records) == len(captions) and records.description["teacher"] == "it"
    assert not records.has_null and records[0].sequence is None
    for index in (0, 7, len(captions) - 1):
        start = index - index % encoding.DRAWN_BATCH
        assert records[index].caption == captions[index]
        np.testing.assert_array_equal(records[index].latents, [[index, start]])

    null = Text(np.zeros((1, 1, 1)), np.zeros((1, 1)))
    encoding.encode_drawn(tmp_path / "stored", captions, embed, draw, {}, null=null)
    records = LatentRecords(tmp_path / "stored")
    assert records.has_null
    np.testing.assert_array_equal(records[7].pooled.astype(float), [7])


def test_what_is_not_finite_in_float16_stops_by_name(tmp_path):
    def encode(images):
        latents = np.ones((len(images), 1, 2))
        latents[5] = 70_000.0  # float16 ends at 65,504
        return latents

    with pytest.raises(ValueError, match="picture 5 of the shapes world has latents .* float16"):
        sources.encode_shapes(tmp_path / "shapes", 9, 3, encode)
    sources.encode_shapes(tmp_path / "padded", 5, 3, encode)  # the sixth is no picture's

    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(f"picture {number}")
    pictures = checked(PictureFolder(tmp_path / "pictures"), (8, 8))

    def embed(captions, bad="none"):
        values = np.array([np.nan if bad in words else 1 for words in captions])
        return Text(values[:, None, None], values[:, None])

    def latents(images, key):
        return np.where(np.arange(len(images)) == 2, np.nan, 1)[:, None, None]

    with pytest.raises(ValueError, match="2.png' has latents that are not finite"):
        encoding.encode_pictures(tmp_path / "a", pictures, (8, 8), latents, embed)
    with pytest.raises(ValueError, match="caption 'picture 1' has embeddings that are not finite"):
        encoding.encode_pictures(
            tmp_path / "b",
            pictures,
            (8, 8),
            lambda images, key: np.ones((len(images), 1, 1)),
            lambda captions: embed(captions, "picture 1"),
        )
    with pytest.raises(ValueError, match="the drawing of 'two squares' has latents"):
        encoding.encode_drawn(
            tmp_path / "c", ["a disk", "", "two squares"], embed, lambda t, s: latents(t[1], 0), {}
        )
    for name in "abc":
        with pytest.raises(ValueError, match="has no dataset.json"):
            LatentRecords(tmp_path / name)


def test_records_are_the_same_from_every_kind_of_source(tmp_path):
    def encode(images, key):
        return images.mean((1, 2))[:, None] / 255

    def embed(captions):
        values = np.array([sum(caption.encode()) for caption in captions], np.float32)
        return Text(values[:, None, None], values[:, None])

    shards = set()
    for number, make in enumerate(KINDS.values()):
        folder, output = tmp_path / f"{number}", tmp_path / f"out-{number}"
        folder.mkdir()
        usable = checked(open_source(*make(folder)), (8, 8))
        encoding.encode_pictures(output, usable, (8, 8), encode, embed)
        assert len(LatentRecords(output)) == 5
        shards.add(next(output.glob("*.array_record")).read_bytes())
    assert len(shards) == 1
