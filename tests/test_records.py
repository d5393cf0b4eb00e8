"""Records on disk: what was written is read, and everything else is refused by name."""

import json
import tracemalloc

import made_records
import ml_dtypes
import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from flax import serialization
from made_records import some

from jax_distill.data import arrays, manifest
from jax_distill.data.manifest import DESCRIPTION, NULL
from jax_distill.data.record_fields import Array, pack, unpack
from jax_distill.data.records import LatentRecord, LatentRecords
from jax_distill.flow import Text
from jax_distill.storage.files import FileError

SHARD = "latents-00000.array_record"


def null(length=5):
    rng = np.random.default_rng(1)
    shapes = (1, length, 6), (1, 3)
    return Text(*(rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes))


def embedded(count):
    return some(count, null())


def assert_same(found, expected):
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        assert type(other) is type(value), name
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype
        np.testing.assert_array_equal(other, value)


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (7, 3), (9, 3)])
def test_round_trip_at_random(tmp_path, count, shards):
    written = some(count)
    made_records.write(tmp_path / "deep" / "data", written, {"seed": 5}, shard_records=3)
    read = LatentRecords(tmp_path / "deep" / "data")
    assert len(read) == count and read.description["seed"] == 5
    assert len(read.description["shards"]["latents"]) == shards
    for index in np.random.default_rng(1).permutation(count):
        assert_same(read[int(index)], written[index])
    assert list(read.captions()) == [record.caption for record in written]


def test_embedded_captions_come_back(tmp_path):
    written = embedded(3)
    made_records.write(tmp_path, written, null=null())
    read = LatentRecords(tmp_path)
    for index, record in enumerate(written):
        assert_same(read[index], record)
    assert all(np.array_equal(*leaves) for leaves in zip(read.null, null()))


def test_a_repeated_caption_is_stored_once(tmp_path):
    first, second = embedded(2)
    again = second._replace(caption=first.caption, sequence=first.sequence, pooled=first.pooled)
    written = [first, second, again._replace(key="again"), first]
    made_records.write(tmp_path, written, null=null())
    read = LatentRecords(tmp_path)
    assert len(read) == 4 and read.description["distinct_captions"] == 2
    for index, record in enumerate(written):
        assert_same(read[index], record)
    assert len(records_of(tmp_path / "captions-00000.array_record")) == 2


def test_rows_beyond_a_caption_are_the_empty_captions(tmp_path):
    written = embedded(3)
    rows = {record.caption: own for record, own in zip(written, (1, 4, 5))}
    made_records.write(tmp_path, written, null=null(), padding="shared", rows=rows)
    read = LatentRecords(tmp_path)
    for index, own in enumerate((1, 4, 5)):
        found = read[index].sequence
        assert found.shape == (5, 6) and found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[:own], written[index].sequence[:own])
        np.testing.assert_array_equal(found[own:], null().sequence[0, own:])
    made_records.write(tmp_path / "kept", written, null=null(), rows=rows)
    with pytest.raises(FileError, match=r"caption 1 in .*sequence is \(4, 6\).*not \(5, 6\)"):
        LatentRecords(tmp_path / "kept")[1]
    longer = [written[0]._replace(sequence=np.ones((6, 6), ml_dtypes.bfloat16))]
    made_records.write(tmp_path / "longer", longer, null=null(), padding="shared")
    with pytest.raises(FileError, match="caption 0 in .*has 6 rows, more than 5"):
        LatentRecords(tmp_path / "longer")[0]


def test_a_folder_that_is_no_data_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"data.path: '{path}' has no {DESCRIPTION}; make"):
            LatentRecords(path)
    made_records.write(tmp_path, some(5), shard_records=2)
    shard = tmp_path / "latents-00001.array_record"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="latents-00001.array_record' is missing"):
        LatentRecords(tmp_path)
    shard.mkdir()
    with pytest.raises(FileError, match="00001.array_record' is no regular file"):
        LatentRecords(tmp_path)
    shard.rmdir()
    shard.write_bytes(content[:-1])
    with pytest.raises(FileError, match=f"' has {len(content) - 1} bytes, and {len(content)} were"):
        LatentRecords(tmp_path)
    (tmp_path / DESCRIPTION).write_text('{"shards": ["latents-00000.array_record"]}')
    with pytest.raises(FileError, match="was prepared by an earlier version; prepare it again"):
        LatentRecords(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 3}, r"Expected `object`, got `int` - at `\$.shards`"),
        ({"shards": {"latents": [3]}}, r"at `\$.shards"),
        ({"shards": {}}, "its latents shards have 0 of 4 records"),
        ({"examples": "4"}, r"at `\$.examples`"),
        ({"examples": 5}, "its latents shards have 4 of 5 records"),
        ({"examples": 0}, r"at `\$.examples`"),
        ({"distinct_captions": 3}, "its captions shards have 4 of 3 records"),
        ({"resolution": 512}, r"at `\$.resolution`"),
        ({"resolution": [512]}, "length 2, got 1"),
        ({"mark": "0"}, r"at `\$.mark`"),
        ({"format": 3}, r"at `\$.format`"),
        ({"latents": {"shape": [4, 8], "type": "O"}}, r"at `\$.latents.type`"),
        ({"text": None}, r"at `\$.text`"),
    ],
)
def test_a_description_of_something_else_is_refused(tmp_path, change, message):
    made_records.write(tmp_path, some(4))
    assert len(LatentRecords(tmp_path)) == 4
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**described, **change}))
    with pytest.raises(FileError, match=f"{DESCRIPTION}'.*{message}"):
        LatentRecords(tmp_path)


@pytest.mark.parametrize("name", ["../data/x.array_record", f"{SHARD}[0:2]", "..", "/etc/hosts"])
def test_a_shard_has_its_name_and_no_other(tmp_path, name):
    made_records.write(tmp_path, some(4))
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    described["shards"]["latents"][0]["name"] = name
    (tmp_path / DESCRIPTION).write_text(json.dumps(described))
    with pytest.raises(FileError, match="is not the shard latents-00000.array_record"):
        LatentRecords(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": np.zeros((4, 9), np.float16)}, r"latents is \(4, 9\) float16, not \(4, 8\)"),
        ({"latents": np.zeros((4, 8), np.float32)}, "float32, not .* float16"),
        ({"latents": np.full((4, 8), np.inf, np.float16)}, "latents is not finite"),
        ({"latents": np.zeros((4, 8), np.int16)}, "int16' is not one of float16"),
        ({"latents": np.zeros(8, np.float16)}, r"latents is \(8\) float16, not"),
        ({"latents": "text"}, "latents is no array"),
        ({"key": 3}, "key is no str"),
    ],
)
def test_a_record_of_something_else_is_refused_by_its_number(tmp_path, changes, message):
    written = embedded(7)
    written[6] = written[6]._replace(**changes)
    made_records.write(tmp_path, written, null=null(), shard_records=4)
    read = LatentRecords(tmp_path)
    assert read[5].caption == written[5].caption
    with pytest.raises(FileError, match=f"example 6 in '.*latents-00001.array_record' .*{message}"):
        read[6]


def records_of(path):
    reader = ArrayRecordReader(str(path))
    found = reader.read_all()
    reader.close()
    return found


def replace(path, records):
    """Writes other records into a shard; the manifest says what is there now, but no checksum."""
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    described = json.loads((path.parent / DESCRIPTION).read_text())
    for files in described["shards"].values():
        for file in files:
            if file["name"] == path.name:
                file["bytes"] = path.stat().st_size
    (path.parent / DESCRIPTION).write_text(json.dumps(described))


def test_records_out_of_their_place_are_refused(tmp_path):
    made_records.write(tmp_path / "a", embedded(4), null=null(), shard_records=2)
    made_records.write(tmp_path / "b", embedded(4), {"seed": 1}, null=null(), shard_records=2)
    for kind in ("latents", "captions"):
        paths = [tmp_path / "a" / f"{kind}-0000{number}.array_record" for number in (0, 1)]
        contents = [path.read_bytes() for path in paths]
        first = records_of(paths[0])
        replace(paths[0], first[::-1])
        with pytest.raises(FileError, match="0 in '.*the record with number 1 lies in its place"):
            LatentRecords(tmp_path / "a")[0]
        for path, content in zip(paths, reversed(contents)):
            path.write_bytes(content)
        with pytest.raises(FileError, match="3 in '.*the record with number 1 lies in its place"):
            LatentRecords(tmp_path / "a")[3]
        other = tmp_path / "b" / paths[0].name
        for path, content in zip(paths, (other.read_bytes(), contents[1])):
            path.write_bytes(content)
        with pytest.raises(FileError, match="the record of another folder lies in its place"):
            LatentRecords(tmp_path / "a")[0]
        paths[0].write_bytes(contents[0])
    assert_same(LatentRecords(tmp_path / "a")[0], embedded(4)[0])


def test_an_example_without_its_caption_is_refused(tmp_path):
    made_records.write(tmp_path, some(3))
    fields = [serialization.msgpack_restore(record) for record in records_of(tmp_path / SHARD)]
    for wrong in (3, -1, "0", True):
        fields[1]["caption"] = wrong
        replace(tmp_path / SHARD, [pack(each) for each in fields])
        with pytest.raises(
            FileError, match="example 1 in '.*(there is no caption|is no int|not a record)"
        ):
            LatentRecords(tmp_path)[1]


def test_the_empty_caption_is_like_the_others(tmp_path):
    made_records.write(tmp_path, embedded(2), null=null())
    good = (tmp_path / NULL).read_bytes()
    for wrong in (null(length=4), null()._replace(pooled=np.ones((1, 3), np.float32))):
        (tmp_path / NULL).write_bytes(pack(wrong._asdict()).ljust(len(good), b"\0")[: len(good)])
        with pytest.raises(FileError, match=f"{NULL}' (cannot be read|has)"):
            _ = LatentRecords(tmp_path).null
    (tmp_path / NULL).write_bytes(good[:-1])
    with pytest.raises(FileError, match=f"{NULL}' has {len(good) - 1} bytes"):
        LatentRecords(tmp_path)


def test_a_checksum_tells_what_reading_does_not(tmp_path):
    made_records.write(tmp_path, embedded(4), null=null(), shard_records=2)
    assert manifest.verify(tmp_path)["examples"] == 4
    shard = tmp_path / "latents-00001.array_record"
    fields = serialization.msgpack_restore(records_of(shard)[1])
    fields["latents"] = fields["latents"] + np.float16(1)
    size = shard.stat().st_size
    replace(shard, [records_of(shard)[0], pack(fields)])
    assert shard.stat().st_size == size  # as long, and right by all that readers compare
    LatentRecords(tmp_path)[3]
    with pytest.raises(FileError, match="00001.array_record' holds something else than was writt"):
        manifest.verify(tmp_path)


def flax_array(shape, kind, values):
    return msgpack.ExtType(1, msgpack.packb((shape, kind, values), use_bin_type=True))


KINDS = {"caption": str, "latents": Array((4, 8), "float16")}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 - 1
        b"\x82\xa1a" + b"\x91" * 100_000,  # lists in lists
        b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000,  # a million lists
        msgpack.packb({"latents": flax_array((2**40, 2**20), "float16", b""), "caption": "a"}),
        msgpack.packb({"latents": flax_array((0, 2**62), "float16", b""), "caption": "a"}),
        msgpack.packb({"latents": flax_array((-1, 2), "float16", bytes(8)), "caption": "a"}),
        msgpack.packb({"latents": flax_array((1.5, 2), "float16", bytes(6)), "caption": "a"}),
        msgpack.packb({"latents": flax_array((1, 1), "O", bytes(8)), "caption": "a"}),
        msgpack.packb({"latents": flax_array((1, 1), "V0", b""), "caption": "a"}),
        msgpack.packb({"latents": flax_array((1, 1), 3, b""), "caption": "a"}),
        msgpack.packb({"latents": flax_array(3, "float16", bytes(6)), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(1, b"\x93"), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(1, b"\x05"), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(2, bytes(9)), "caption": "a"}),
        msgpack.packb({"latents": 1, "caption": "a", "more": 1}),
        msgpack.packb(["latents", "caption"]),
        msgpack.packb(7),
    ],
)
def test_hostile_bytes_are_refused_and_take_no_memory(content):
    tracemalloc.start()
    with pytest.raises(ValueError, match="^(it|its) "):
        unpack(content, KINDS)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_flax_writes_is_what_is_read():
    record = embedded(1)[0]._asdict()
    content = serialization.msgpack_serialize(record)
    arrays = {name: Array(record[name].shape, record[name].dtype.name) for name in Text._fields}
    ours = unpack(content, {**KINDS, "key": str, **arrays})
    theirs = serialization.msgpack_restore(content)
    assert ours.keys() == theirs.keys() and ours["caption"] == theirs["caption"]
    for name in ("latents", "sequence", "pooled"):
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_damaged_shard_gives_what_was_written_or_is_named(tmp_path):
    written = some(12)
    made_records.write(tmp_path, written)
    good = (tmp_path / SHARD).read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for at in rng.integers(0, len(good), 60):
        damages = [
            good[:at],
            good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :],
            good[:at] + bytes(min(70, len(good) - at)) + good[at + 70 :],
            good[:at] + good[at + 9 :],
        ]
        (tmp_path / SHARD).write_bytes(damages[at % 4])
        try:
            read = LatentRecords(tmp_path)
            for index, record in enumerate(written):
                assert_same(read[index], record)
        except FileError as error:
            assert str(error).startswith("data.path: ") and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_what_is_written_is_what_it_was(tmp_path):
    """Folders are shared by runs of several versions: the bytes of a record are fixed."""
    record = LatentRecord(np.arange(4, dtype=np.float16)[None], "a fox", "a.png")
    made_records.write(tmp_path, [record], {"n": 1})
    mark = json.loads((tmp_path / DESCRIPTION).read_text())["mark"]
    assert mark == MARK
    (content,) = records_of(tmp_path / SHARD)
    assert content.hex() == LATENTS
    (content,) = records_of(tmp_path / "captions-00000.array_record")
    assert content.hex() == CAPTION


MARK = "4335d0e2df1c8840"
LATENTS = (
    "85a2617400a763617074696f6e00a36b6579a5612e706e67a76c6174656e7473c7160193920104a7"
    "666c6f61743136c4080000003c00400042a26f66c4084335d0e2df1c8840"
)
CAPTION = "83a2617400a763617074696f6ea56120666f78a26f66c4084335d0e2df1c8840"


def test_every_half_becomes_its_single_and_what_is_not_finite_is_told():
    half, single = np.arange(2**16, dtype=np.uint16).view(np.float16), np.empty(2**16, np.float32)
    finite = np.isfinite(half)
    assert not arrays.widen(half, single)
    np.testing.assert_array_equal(single[finite], half[finite].astype(np.float32))
    good = half[finite]
    assert arrays.widen(good, single[: len(good)])
    assert not any(arrays.widen(half[[0, index]], single[:2]) for index in np.flatnonzero(~finite))


def test_the_empty_caption_is_what_was_written(tmp_path):
    made_records.write(tmp_path, embedded(2), null=null(), padding="shared")
    content = bytearray((tmp_path / NULL).read_bytes())
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / NULL).write_bytes(changed)
        with pytest.raises(FileError, match=f"{NULL}' cannot be read"):
            _ = LatentRecords(tmp_path).null
