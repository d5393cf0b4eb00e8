"""Records on disk: what was written is read, and half a folder is refused."""

import tracemalloc

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from jax_distill.data import records
from jax_distill.data.records import DESCRIPTION, LatentRecord, LatentRecords
from jax_distill.flow import Text
from jax_distill.storage.files import FileError


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
    (tmp_path / "latents-00001.array_record").mkdir()
    with pytest.raises(FileError, match="00001.array_record' is no regular file"):
        LatentRecords(tmp_path)


SHARD = "latents-00000.array_record"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "dataset.json' is not valid JSON"),
        ("[]", "dataset.json' does not hold"),
        ('{"world": "shapes"}', "missing required field `shards`"),
        ('{"shards": "latents"}', r"Expected `array`, got `str` - at `\$.shards`"),
        ('{"shards": [3]}', r"at `\$.shards\[0\]`"),
        (f'{{"shards": ["{SHARD}"], "examples": "4"}}', r"at `\$.examples`"),
        (f'{{"shards": ["{SHARD}"], "resolution": 512}}', r"at `\$.resolution`"),
        (f'{{"shards": ["{SHARD}"], "resolution": [512]}}', "length 2, got 1"),
        (f'{{"shards": ["../data/{SHARD}"]}}', "is not a shard"),
        (f'{{"shards": ["{SHARD}[0:2]"]}}', "is not a shard"),
        ('{"shards": [".."]}', "is not a shard"),
        ('{"shards": ["/etc/hosts"]}', "is not a shard"),
        ('{"shards": ["other.array_record"]}', "other.array_record' is missing"),
        (f'{{"shards": ["{SHARD}"], "examples": 5}}', "has 4 of 5 examples"),
        (f'{{"shards": ["{SHARD}", "{SHARD}"], "examples": 4}}', "has 8 of 4 examples"),
    ],
)
def test_a_description_of_something_else_is_refused(tmp_path, text, message):
    records.write(tmp_path / "data", some(4), {"examples": 4})
    assert len(LatentRecords(tmp_path / "data")) == 4
    (tmp_path / "data" / DESCRIPTION).write_text(text)
    with pytest.raises(FileError, match=message):
        LatentRecords(tmp_path / "data")


def embedded(count, length=5):
    rng = np.random.default_rng(2)
    for record in some(count):
        sequence = rng.standard_normal((length, 6)).astype(ml_dtypes.bfloat16)
        yield record._replace(sequence=sequence, pooled=sequence[0, :3])


def null(length=5):
    return Text(np.ones((1, length, 6), ml_dtypes.bfloat16), np.ones((1, 3), ml_dtypes.bfloat16))


def test_embedded_captions_come_back(tmp_path):
    written = list(embedded(3))
    records.write(tmp_path, written, {"examples": 3}, null=null())
    read = LatentRecords(tmp_path)
    for index, record in enumerate(written):
        for name, value in record._asdict().items():
            assert np.array_equal(getattr(read[index], name), value)
    assert all(np.array_equal(*leaves) for leaves in zip(read.null, null()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latents": np.zeros((4, 9), np.float16)},
            r"example 6 .*\(4, 9\).* unlike the first one's",
        ),
        ({"latents": np.zeros((4, 8), np.float32)}, "example 6 .*float32.* unlike the first one's"),
        ({"latents": np.full((4, 8), np.inf, np.float16)}, "example 6 .*latents are not finite"),
        ({"latents": np.zeros((4, 8), np.int16)}, "example 6 .*int16' is not one of float16"),
        ({"latents": np.zeros(8, np.float16)}, "example 6 .*not an array of 2 axes"),
        ({"latents": np.zeros((0, 8), np.float16)}, "example 6 .*not an array of 2 axes"),
        ({"latents": "text"}, "example 6 .*not an array"),
        ({"caption": 3}, "example 6 .*caption is not text"),
        ({"caption": np.zeros(3)}, "example 6 .*caption is not text"),
        ({"pooled": None}, "example 6 .*lacks some of the fields"),
        ({"sequence": None, "pooled": None}, "example 6 .*unlike the first one's"),
        ({"sequence": np.full((5, 6), np.nan, ml_dtypes.bfloat16)}, "sequence are not finite"),
    ],
)
def test_a_record_unlike_the_first_is_refused_by_its_number(tmp_path, changes, message):
    written = list(embedded(7))
    written[6] = written[6]._replace(**changes)
    records.write(tmp_path, written, {}, null=null())
    read = LatentRecords(tmp_path)
    assert read[5].caption == written[5].caption
    with pytest.raises(FileError, match=message):
        read[6]


def test_the_empty_caption_is_like_the_others(tmp_path):
    for wrong in (null(length=4), null()._replace(pooled=np.ones((1, 3), np.float32))):
        records.write(tmp_path, embedded(2), {}, null=wrong)
        with pytest.raises(FileError, match=f"{records.NULL} of '.*is unlike the captions'"):
            _ = LatentRecords(tmp_path).null
    (tmp_path / records.NULL).write_bytes(b"\xc1")
    with pytest.raises(FileError, match=f"{records.NULL} of '.*is not a record"):
        _ = LatentRecords(tmp_path).null


def flax_array(shape, kind, values):
    return msgpack.ExtType(1, msgpack.packb((shape, kind, values), use_bin_type=True))


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
        msgpack.packb({"latents": flax_array(3, "float16", bytes(6)), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(1, b"\x93"), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(1, b"\x05"), "caption": "a"}),
        msgpack.packb({"latents": msgpack.ExtType(2, bytes(9)), "caption": "a"}),
        msgpack.packb({"latents": 1, "caption": "a", "more": 1}),
        msgpack.packb(["latents", "caption"]),
        msgpack.packb(7),
    ],
)
def test_hostile_bytes_are_refused_and_take_no_memory(tmp_path, content):
    tracemalloc.start()
    with pytest.raises(ValueError, match="^(it|its) "):
        records.restore(content, LatentRecord, ranks=(2, 2, 1))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_what_flax_writes_is_what_is_read():
    record = next(embedded(1))._asdict()
    content = serialization.msgpack_serialize(record)
    ours = records.restore(content, LatentRecord, ranks=(2, 2, 1))
    theirs = serialization.msgpack_restore(content)
    assert ours.keys() == theirs.keys() and ours["caption"] == theirs["caption"]
    for name in ("latents", "sequence", "pooled"):
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_damaged_shard_gives_what_was_written_or_is_named(tmp_path):
    written = some(12)
    records.write(tmp_path, written, {"examples": 12})
    good = (tmp_path / SHARD).read_bytes()
    rng = np.random.default_rng(4)
    refused = 0
    for at in rng.integers(0, len(good), 60):
        damages = [
            good[:at],
            good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :],
            good[:at] + bytes(7) + good[at:],
            good[:at] + good[at + 9 :],
        ]
        (tmp_path / SHARD).write_bytes(damages[at % 4])
        try:
            read = LatentRecords(tmp_path)
            for index, record in enumerate(written):
                assert read[index].caption == record.caption
                np.testing.assert_array_equal(read[index].latents, record.latents)
        except FileError as error:
            assert f"of '{tmp_path}' cannot be read" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_what_is_written_is_what_it_was(tmp_path):
    """Folders are shared by runs of several versions: the bytes of a record are fixed."""
    records.write(tmp_path, [LatentRecord(np.arange(4, dtype=np.float16)[None], "a fox")], {"n": 1})
    content = LatentRecords(tmp_path)._source[0]
    assert content.hex() == (
        "82a763617074696f6ea56120666f78"
        "a76c6174656e7473c7160193920104a7666c6f61743136c4080000003c00400042"
    )
