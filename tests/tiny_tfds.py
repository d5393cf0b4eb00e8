"""Makes a data set of tfds and reads it, in a process of its own: python tiny_tfds.py FOLDER."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_sources import CAPTIONS, PICTURES, assert_as_made, beside

from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.source import Columns
from jax_distill.storage import buckets, paths


class Tiny(tfds.core.GeneratorBasedBuilder):
    """The pictures of `test_sources`, in order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, None)),
            "words": tfds.features.Text(),
            "number": np.int64,
            "box": tfds.features.BBoxFeature(),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, (content, caption) in enumerate(zip(PICTURES.values(), CAPTIONS)):
            yield (
                number,
                {
                    "image": io.BytesIO(content),
                    "words": caption,
                    "number": number,
                    "box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
                },
            )


def refused(name, columns):
    try:
        open_source([f"tfds:{name}"], Columns(*columns))
    except ValueError as error:
        print(error)


def main(folder):
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    words = Columns(caption="words")
    for name in ("tiny", "tiny:1.0.0", "tiny:1.0.0:train[:100%]", f"{folder}/tiny/1.0.0:train"):
        assert_as_made(open_source([f"tfds:{name}"], words))
    part = open_source(["tfds:tiny:train[1:3]"], words)
    assert len(part) == 2 and part[0].caption == CAPTIONS[1]
    for split in ("train[1:3]", "train[20%:60%]", "train[-4:-2]", "train[1:2]+train[2:3]"):
        same = open_source([f"tfds:tiny:{split}"], words)
        assert [same[i] for i in (0, 1)] == [
            part[i]._replace(picture=same[i].picture) for i in (0, 1)
        ]
        assert [same.key(0), same.key(1)] == ["train:1", "train:2"]
        for index in (-1, 2):
            with pytest.raises(IndexError):
                same[index]
    assert pickle.loads(pickle.dumps(part))[1].caption == CAPTIONS[2]
    for name in ("nothing", "tiny:test", "tiny:train[", "tiny:train+train[:1]"):
        refused(name, (None, "words"))
    for columns in (("number", "words"), (None, "box"), (None, None)):
        refused("tiny", columns)
    try:
        open_source([f"{folder}/tiny/1.0.0"])
    except ValueError as error:
        print(error)
    described = Path(folder, "tiny/1.0.0/dataset_info.json")
    described.write_text(described.read_text().replace('"array_record"', '"tfrecord"'))
    refused("tiny", (None, "words"))
    described.write_text(described.read_text().replace('"tfrecord"', '"array_record"'))
    refused("s3://test/tiny/1.0.0", (None, "words"))
    assert "tensorflow" not in sys.modules


def read_from_a_bucket(folder):
    """Reads the data set in a bucket, where there are the packages for that."""
    try:
        from bucket_server import BucketServer, environment
    except ImportError:
        return
    with BucketServer() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.port).items():
            patch.setenv(name, value)
        address = "gs://test/tiny/1.0.0"
        buckets.upload(Path(folder, "tiny/1.0.0"), paths.path(address))
        source = open_source([f"tfds:{address}:train"], Columns(caption="words"))
        assert_as_made(source)
        assert pickle.loads(pickle.dumps(source))[1].caption == CAPTIONS[1]


def compare(folder):
    """Compares a run's batches with those of a folder of pictures; TensorFlow is not needed."""
    import plain_encoders

    (folder / "pictures").mkdir()
    kinds = {"beside": beside(folder / "pictures"), "tfds": (["tfds:tiny"], Columns(None, "words"))}
    for name, (names, columns) in kinds.items():
        plain_encoders.prepare(open_source(names, columns), folder / name)
    plain_encoders.assert_same(*(plain_encoders.read(folder / name) for name in kinds))
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])
    read_from_a_bucket(sys.argv[1])
    compare(Path(sys.argv[1]))
