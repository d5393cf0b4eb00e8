"""Records on disk: what was written is read, and half a folder is refused."""

import json

import numpy as np
import pytest

from jax_distill.data import records
from jax_distill.data.records import DESCRIPTION, LatentRecord, LatentRecords


def some(count):
    rng = np.random.default_rng(0)
    return [
        LatentRecord(rng.standard_normal((4, 8)).astype(np.float16), f"caption {i}, a roté cercle")
        for i in range(count)
    ]


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (7, 3), (9, 3)])
def test_round_trip_at_random(tmp_path, count, shards):
    written = some(count)
    records.write(tmp_path / "deep" / "data", iter(written), {"seed": 5}, shard_bytes=250)
    read = LatentRecords(tmp_path / "deep" / "data")
    assert len(read) == count and read.description["seed"] == 5
    assert len(read.description["shards"]) == shards
    for index in np.random.default_rng(1).permutation(count):
        assert read[int(index)].caption == written[index].caption
        assert read[int(index)].latents.dtype == np.float16
        np.testing.assert_array_equal(read[int(index)].latents, written[index].latents)


def test_writing_that_is_cut_short_is_never_read(tmp_path):
    records.write(tmp_path, some(4), {})

    def dying():
        yield from some(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(tmp_path, dying(), {})
    with pytest.raises(ValueError, match=f"data.path: '{tmp_path}' has no {DESCRIPTION}"):
        LatentRecords(tmp_path)
    records.write(tmp_path, some(3), {})
    assert len(LatentRecords(tmp_path)) == 3


def test_a_folder_that_is_no_data_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"data.path: '{path}' has no {DESCRIPTION}; make"):
            LatentRecords(path)
    records.write(tmp_path, [], {})
    with pytest.raises(ValueError, match="has no examples"):
        LatentRecords(tmp_path)
    records.write(tmp_path, some(5), {}, shard_bytes=200)
    (tmp_path / "latents-00001.array_record").unlink()
    with pytest.raises(ValueError, match="latents-00001.array_record' is missing"):
        LatentRecords(tmp_path)
    for text in ("{", "[]", json.dumps({"world": "shapes"})):
        (tmp_path / DESCRIPTION).write_text(text)
        with pytest.raises(ValueError, match="is no list of shards"):
            LatentRecords(tmp_path)
