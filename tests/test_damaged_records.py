"""Folders of records that are damaged in part: other records take the places of damaged ones."""

import errno

import made_records
import numpy as np
import pytest
from test_disks import of_tensorflow
from test_mixture import Named
from test_passing_errors import failing
from test_records import SHARD, embedded, null

from jax_distill import worlds
from jax_distill.config import ConfigError, base
from jax_distill.config import check as check_config
from jax_distill.data import damaged, identity
from jax_distill.data.loader import EmbeddedLatents, TokenizedLatents, batches
from jax_distill.data.records import LatentRecord, LatentRecords
from jax_distill.runs import checks
from jax_distill.storage.files import FileError, PassingError
from jax_distill.worlds.flux.world import Flux

COUNT = 24
SIZE = [32, 32]


def spoiled(record):
    return record._replace(latents=np.full_like(record.latents, np.nan))


@pytest.fixture
def first_damaged(tmp_path):
    """A folder whose first record is damaged."""
    first, *others = embedded(4)
    facts = {"world": "flux", "resolution": SIZE}
    return made_records.write(tmp_path / "data", [spoiled(first), *others], facts, null=null())


def flux(folder, **data):
    """The world of a run on a folder, whose text encoders have the widths of its captions."""
    config = base()
    with config.unlocked():
        config.world, config.samples.prompts = "flux", 2
        config.data.update({"path": str(folder), "resolution": SIZE, "text_length": 5, **data})
    world = Flux(config)
    world.folder = folder.parent / "ported"
    parts = {"t5": {"d_model": 6}, "clip": {"hidden_size": 3}}
    world.__dict__["_described"] = {"parts": parts}
    return world


@pytest.mark.parametrize("damage", ["fail", "skip"])
def test_a_first_record_that_is_damaged_is_left_to_the_loader(tmp_path, first_damaged, damage):
    """Shapes are in the manifest; previews have other captions where some may be damaged."""
    skip = {"damaged": damage, "damaged_share": 0.5}
    world, good = flux(first_damaged, **skip), embedded(4)
    source = world.source(tmp_path).first
    world.check(LatentRecords(first_damaged), str(first_damaged))
    if damage == "fail":
        with pytest.raises(FileError, match=f"example 0 in '.*{SHARD}' cannot be read"):
            world.preview(source, 4)
        return
    captions, text = world.preview(source, 4)
    assert captions == [good[index].caption for index in (1, 1, 2, 3)]
    np.testing.assert_array_equal(text.pooled, np.stack([good[i].pooled for i in (1, 1, 2, 3)]))
    world = flux(first_damaged, embedding="training", **skip)
    world.check(LatentRecords(first_damaged, 0.5), str(first_damaged))
    source = TokenizedLatents(
        LatentRecords(first_damaged, 0.5), lambda captions: captions, lambda: Unchanged
    )
    assert source.captions([0, 2])[1] == [good[1].caption, good[2].caption]


class Unchanged:
    """An embedder that gives what it is given."""

    gathered = staticmethod(list)


@pytest.mark.parametrize("damage", ["fail", "skip"])
def test_a_folder_of_the_shapes_world_is_checked_by_its_manifest(tmp_path, damage):
    config = base()
    config.objective.name = "flow_matching"
    world = worlds.of(config)
    shape = (64, config.model.in_channels)
    captions = ["a red circle", "two blue squares", "a green cross"]
    rows = [LatentRecord(np.zeros(shape, np.float16), caption) for caption in captions]
    made_records.write(tmp_path, [spoiled(rows[0]), *rows[1:]], shard_records=1)
    config.data.path, config.data.damaged, config.data.damaged_share = str(tmp_path), damage, 0.5
    with pytest.raises(ConfigError, match="have 64 tokens, where .64, 64. pixels have 16; set"):
        checks.check_folders(config, world)
    # Damaged captions are passed over likewise.
    (tmp_path / "captions-00001.array_record").unlink()
    if damage == "skip":
        records = LatentRecords(tmp_path, 0.5)
        assert list(records.captions()) == [captions[0], captions[2]]
        world.check(records)
    else:
        with pytest.raises(FileError, match="captions-00001.array_record' is missing"):
            checks.check_folders(config, world)


def test_the_next_good_one_stands_in_for_any_example():
    source = Named(0, 10, bad={3, 4, 9})
    given = [int(damaged.good(source, index, 0.2).x[0, 0]) for index in (2, 3, 4, 9)]
    assert given == [2, 5, 5, 0]
    with pytest.raises(FileError, match="example 3 of 'here' is damaged$"):
        damaged.good(source, 3, 0.0)
    with pytest.raises(FileError, match="example 4 .*; data.damaged_share=0.1 allows no more$"):
        damaged.good(source, 3, 0.1)
    with pytest.raises(PassingError):
        damaged.good(Named(0, 10, bad={3}, error=PassingError), 3, 0.5)


def test_all_of_a_source_may_not_be_damaged():
    source = Named(0, 10, bad=range(10))
    with pytest.raises(FileError, match="damaged; data.damaged_share=1 allows no more"):
        next(batches(source, 2, 0, damaged_share=1.0))
    config = base()
    config.name, config.objective.name, config.data.damaged_share = "x", "flow_matching", 1.0
    check_config(config.to_dict())


def test_damaged_records_are_named_by_their_keys(tmp_path, warned):
    """By their numbers where the key cannot be read either."""
    rows = embedded(COUNT)
    made_records.write(tmp_path, [*rows[:5], spoiled(rows[5]), *rows[6:]], null=null())
    path = tmp_path / SHARD
    content = bytearray(path.read_bytes())
    content[content.index(rows[9].latents.tobytes()) + 9] ^= 1  # a wrong checksum
    path.write_bytes(content)
    source = EmbeddedLatents(LatentRecords(tmp_path, 0.1))
    assert [source.key(index) for index in (4, 5, 9)] == [rows[4].key, rows[5].key, ""]
    stream = batches(source, 4, 0, damaged_share=0.1)
    for _ in range(12):
        next(stream)
    assert len(warned) == 2
    named = sorted(line.partition(" is replaced by the next one (")[0] for line in warned)
    assert named == [f"example 5 ('{rows[5].key}')", "example 9"]
    for number, line in enumerate(warned, 1):
        assert f"({number} of {COUNT} so far): data.path: example" in line and SHARD in line


@pytest.fixture
def folder(tmp_path):
    """Six shards of four records, with captions alike."""
    made_records.write(tmp_path / "data", embedded(COUNT), null=null(), shard_records=4)
    return tmp_path / "data"


def shard(folder, number, kind="latents"):
    return folder / f"{kind}-{number:05d}.array_record"


def missing(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def of_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [missing, cut, of_zeros])
def test_records_of_a_lost_shard_are_damaged_records(folder, warned, harm):
    known = identity.identity(folder)
    harm(shard(folder, 1))
    harm(shard(folder, 4))
    assert identity.identity(folder) == known  # a run goes on
    for share in (0.0, 0.33):
        with pytest.raises(FileError, match=r"latents-00001|a shard of") as error:
            LatentRecords(folder, share)
        assert str(error.value).endswith("=0.33 allows no more") == (share > 0)
    records = LatentRecords(folder, 0.34)
    assert [lost.examples for lost in records.lost] == [range(4, 8), range(16, 20)]
    assert records.good(6).key == embedded(COUNT)[8].key and records[8].key == records.good(8).key
    with pytest.raises(FileError, match="latents-00004.array_record' "):
        _ = records[17]
    stream = batches(EmbeddedLatents(records), 6, 0, damaged_share=0.34)
    taken = np.concatenate([next(stream).x for _ in range(4)])
    lost = {*range(4, 8), *range(16, 20)}
    keys = {row.latents.astype(np.float32).tobytes() for row in good_rows(lost)}
    assert {x.tobytes() for x in taken} == keys
    assert [line.partition(": ")[0] for line in warned] == [
        f"examples 4 to 7 are replaced by others (4 of {COUNT} so far)",
        f"examples 16 to 19 are replaced by others (8 of {COUNT} so far)",
    ]


def good_rows(lost):
    return [row for index, row in enumerate(embedded(COUNT)) if index not in lost]


def test_lost_and_other_damaged_records_have_one_limit(tmp_path, warned):
    rows = embedded(COUNT)
    rows[:2] = map(spoiled, rows[:2])
    folder = made_records.write(tmp_path / "data", rows, null=null(), shard_records=4)
    missing(shard(folder, 5))
    source = EmbeddedLatents(LatentRecords(folder, 5 / COUNT))
    stream = batches(source, 6, 0, damaged_share=5 / COUNT)
    with pytest.raises(FileError, match="example [01] in .*; data.damaged_share=0.208333 allows"):
        for _ in range(4):
            next(stream)
    assert len(warned) == 2  # of the shard, and of one more


def test_examples_of_a_lost_shard_of_captions_are_named_as_they_come(folder, warned):
    missing(shard(folder, 2, "captions"))
    source = EmbeddedLatents(LatentRecords(folder, 0.2))
    stream = batches(source, 6, 0, damaged_share=0.2)
    for _ in range(8):
        next(stream)
    keys = [row.key for row in embedded(COUNT)[8:12]]
    assert sorted(line.split("'")[1] for line in warned) == sorted(keys)
    assert all("captions-00002.array_record' is missing" in line for line in warned)


def test_a_folder_without_any_shard_of_a_kind_is_refused(folder):
    for number in range(6):
        missing(shard(folder, number, "captions"))
    with pytest.raises(FileError, match="captions-00000.array_record' is missing"):
        LatentRecords(folder, 1.0)


def test_a_lost_file_beside_the_shards_is_refused(folder):
    missing(folder / "null.msgpack")
    with pytest.raises(FileError, match="null.msgpack' is missing"):
        LatentRecords(folder, 1.0)


def test_a_shard_that_cannot_be_read_for_now_is_not_lost(folder, monkeypatch):
    missing(shard(folder, 1))

    failed = failing(of_tensorflow(errno.EIO))
    monkeypatch.setattr("grain.sources.ArrayRecordDataSource", failed)
    with pytest.raises(PassingError, match="cannot be read for now"):
        LatentRecords(folder, 0.5)
