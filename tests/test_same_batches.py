"""The same pictures, and captions alone, through every kind of source to the batches of a run.

Those of a data set of tfds are compared in `tiny_tfds.py`, which `test_sources` runs.
"""

import csv
import json

import numpy as np
import plain_encoders
import pytest
from test_sources import CAPTIONS, LAYOUTS, beside

from jax_distill.data import encoding
from jax_distill.data.drawing import DrawnLatents
from jax_distill.data.sources.opening import open_source


@pytest.fixture(scope="module")
def batches_of_folder(tmp_path_factory):
    """What a run reads of the pictures of a folder with captions beside them."""
    root = tmp_path_factory.mktemp("beside")
    (root / "pictures").mkdir()
    names, columns = beside(root / "pictures")
    plain_encoders.prepare(open_source(names, columns), root / "prepared")
    return plain_encoders.read(root / "prepared")


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "beside"])
def test_the_same_pictures_give_identical_batches_from_every_kind(
    tmp_path, batches_of_folder, kind
):
    (tmp_path / "source").mkdir()
    names, columns = LAYOUTS[kind](tmp_path / "source")
    plain_encoders.prepare(open_source(names, columns), tmp_path / "prepared")
    found = plain_encoders.read(tmp_path / "prepared")
    plain_encoders.assert_same(found, batches_of_folder)
    assert found[0] == list(CAPTIONS) and np.ptp(found[1].x, axis=(0, 1)).min() > 0.1


def test_captions_alone_give_identical_batches_from_every_kind(tmp_path):
    """Latents are those that a teacher draws for them."""
    words = [caption.replace("\n", " ") for caption in CAPTIONS]  # a line each
    (tmp_path / "a.txt").write_text("\n".join(words), "utf-8-sig")
    with (tmp_path / "b.csv").open("w", encoding="utf-16", newline="") as file:
        csv.writer(file).writerows([["text"], *([line] for line in words)])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in words))

    def draw(text, start):
        return np.repeat(text.pooled[:, None], 2, axis=1) + start

    found = []
    for name in ("a.txt", "b.csv", "c.jsonl"):
        source = open_source([str(tmp_path / name)])
        rows = [(source.key(index), source[index].caption) for index in range(len(source))]
        text, latents = plain_encoders.stored_text(), {"shape": [2, 2], "type": "float16"}
        facts = {"latents": latents, "text": text.facts}
        work = DrawnLatents(*zip(*rows), lambda: draw, plain_encoders.embed, text, facts)
        encoding.make(tmp_path / f"{name}-prepared", work)
        found.append(plain_encoders.read(tmp_path / f"{name}-prepared"))
    assert found[0][0] == words
    for other in found[1:]:
        plain_encoders.assert_same(other, found[0])
