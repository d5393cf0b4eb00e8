"""Encoding: every example is its own picture's latents, in order, whatever the batches."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_sources import KINDS

from jax_distill.data import encoding, estimate, making, manifest, shards
from jax_distill.data.drawing import DRAWN_BATCH, DrawnLatents
from jax_distill.data.encoding import EncodedPictures, StoredText
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.source import Captioned
from jax_distill.flow import Text
from jax_distill.storage.files import FileError
from jax_distill.worlds.shapes import renderer, sources

LENGTH = 6
TEXT_FACTS = {"sequence": [LENGTH, 1], "pooled": 1, "type": "bfloat16", "padding": "shared"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mean_color(images, key=None):
    """An encoder whose one latent is the picture's mean colour."""
    return images.mean((1, 2))[:, None] / 255


def rendered(count, encode=mean_color):
    return sources.RenderedPictures(count, 3, encode, (1, 3))


def embed(captions):
    """Rows that differ from caption to caption, those of padding too."""
    values = np.array([sum(caption.encode()) % 97 for caption in captions], np.float32)
    return Text(values[:, None, None] + np.arange(LENGTH)[:, None], values[:, None])


def rows(captions):
    return [min(len(caption.split()) + 1, LENGTH) for caption in captions]


def stored_text(embed=embed, padding="shared"):
    return StoredText({**TEXT_FACTS, "padding": padding}, lambda: embed, rows, {})


def work_of(source, encode=mean_color, text=None, shape=(1, 3), **options):
    text = text or stored_text()
    latents = {"shape": shape, "type": "float16"}
    facts = {"latents": latents, "text": text.facts, "looked_at": len(source)}
    return EncodedPictures(source, (8, 8), lambda: [encode], text, facts, **options)


@pytest.mark.parametrize("examples", [1, sources.BATCH, sources.BATCH + 5])
def test_examples_are_in_order_and_whole(tmp_path, examples):
    def encode(images):
        assert len(images) == sources.BATCH  # one shape, one compilation
        return mean_color(images)

    assert encoding.make(tmp_path, rendered(examples, encode)) == examples
    records = LatentRecords(tmp_path)
    assert len(records) == examples and records.description["seed"] == 3
    assert not (tmp_path / making.JOURNAL).exists()
    for index in {0, examples // 2, examples - 1}:
        example = renderer.sample(3, index)
        assert records[index].caption == example.caption == renderer.caption(3, index)
        assert records[index].key == f"3:{index}"
        expected = example.image.mean((0, 1))[None] / 255
        np.testing.assert_allclose(records[index].latents, expected, atol=1e-3)


def test_drawn_latents_belong_to_their_captions_and_noise(tmp_path):
    captions = [f"{index} circles" for index in range(DRAWN_BATCH + 3)]
    keys = [f"c.txt:{index}" for index in range(len(captions))]

    def numbers(rows):
        values = np.array([float(row.split()[0]) for row in rows])
        return Text(values[:, None, None] + np.zeros((LENGTH, 1)), values[:, None])

    def draw(text, start):
        assert len(text.pooled) == DRAWN_BATCH  # one shape, one compilation
        return np.stack([text.pooled, np.full_like(text.pooled, start)], -1)

    for text in (None, stored_text(numbers)):
        facts = {"teacher": "it", "latents": {"shape": [1, 2], "type": "float16"}}
        facts |= {} if text is None else {"text": text.facts}
        work = DrawnLatents(keys, captions, lambda: draw, numbers, text, facts)
        folder = tmp_path / str(text is None)
        if text is not None:
            numbers_of_null = lambda rows: numbers([row.strip() or "0" for row in rows])  # noqa: E731
            work = dataclasses.replace(work, text=stored_text(numbers_of_null))
        encoding.make(folder, work)
        records = LatentRecords(folder)
        assert len(records) == len(captions) and records.description["teacher"] == "it"
        assert records.has_null == (text is not None)
        for index in (0, 7, len(captions) - 1):
            start = index - index % DRAWN_BATCH
            assert (records[index].caption, records[index].key) == (captions[index], keys[index])
            np.testing.assert_array_equal(records[index].latents, [[index, start]])
            if text is not None:
                np.testing.assert_array_equal(records[index].pooled.astype(float), [index])


def pictures_of(folder, captions):
    folder.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return open_source([str(folder)])


def test_what_is_not_finite_in_float16_stops_by_name(tmp_path):
    def encode(images):
        latents = np.ones((len(images), 1, 3))
        latents[5] = 70_000.0  # float16 ends at 65,504
        return latents

    with pytest.raises(ValueError, match="picture 5 of the shapes world has latents .* float16"):
        encoding.make(tmp_path / "shapes", rendered(9, encode))
    encoding.make(tmp_path / "padded", rendered(5, encode))  # the sixth is no picture's
    source = pictures_of(tmp_path / "pictures", [f"picture {number}" for number in range(3)])

    def bad_embed(captions):
        pooled = [[np.nan if "1" in words else 1] for words in captions]
        return embed(captions)._replace(pooled=np.array(pooled))

    def latents(images, key=None):
        return np.where(np.arange(len(images)) == 2, np.nan, 1)[:, None, None]

    with pytest.raises(ValueError, match="2.png' has latents that are not finite"):
        encoding.make(tmp_path / "a", work_of(source, latents, shape=(1, 1)))
    with pytest.raises(ValueError, match="caption 'picture 1' has embeddings that are not finite"):
        encoding.make(tmp_path / "b", work_of(source, text=stored_text(bad_embed)))
    facts = {"latents": {"shape": [1, 1], "type": "float16"}}
    work = DrawnLatents(
        "abc",
        ["a disk", "x", "two squares"],
        lambda: lambda text, start: latents(text.pooled[:3]),
        embed,
        None,
        facts,
    )
    with pytest.raises(ValueError, match="the drawing of 'two squares' has latents"):
        encoding.make(tmp_path / "c", work)
    for name in "abc":
        with pytest.raises(ValueError, match="has no dataset.json"):
            LatentRecords(tmp_path / name)


def test_records_are_the_same_from_every_kind_of_source(tmp_path):
    """But for keys, which say where an example came from."""
    found = set()
    for number, make in enumerate(KINDS.values()):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        encoding.make(tmp_path / f"out-{number}", work_of(open_source(*make(folder))))
        records = LatentRecords(tmp_path / f"out-{number}")
        rows = [
            (x.key, x.caption, *(leaf.tobytes() for leaf in (x.latents, x.sequence, x.pooled)))
            for x in records_of(records)
        ]
        keys, *fields = zip(*rows)
        assert len(set(keys)) == 5
        found.add(tuple(fields))
    assert len(found) == 1


def records_of(records):
    return [records[index] for index in range(len(records))]


def test_captions_are_stored_once_with_their_own_rows(tmp_path):
    captions = ["a fox", "a small red fox in snow", "a fox", "a hen"]
    source = pictures_of(tmp_path / "pictures", captions)
    sizes = {}
    for padding in ("shared", "kept"):
        folder = tmp_path / padding
        encoding.make(folder, work_of(source, text=stored_text(padding=padding)))
        records = LatentRecords(folder)
        assert records.description["distinct_captions"] == 3
        assert records.description["text"]["padding"] == padding
        null = records.null.sequence[0].astype(float)
        expected = embed(captions)
        for index, caption in enumerate(captions):
            own = rows([caption])[0] if padding == "shared" else LENGTH
            found = records[index].sequence.astype(float)
            np.testing.assert_array_equal(found[:own], expected.sequence[index, :own])
            np.testing.assert_array_equal(found[own:], null[own:])
            assert records[index].caption == caption
        sizes[padding] = (folder / "captions-00000.array_record").stat().st_size
        assert manifest.verify(folder) == records.description


class Killed(BaseException):
    pass


def tries(folder, work, calls, most=100):
    """Makes a folder in tries that end after so many batches; returns the number of tries."""
    for number in range(1, most + 1):
        left = [calls]

        def encode(*arguments, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return mean_color(*arguments, **options)

        try:
            encoding.make(folder, work(encode))
        except Killed:
            continue
        return number
    return most + 1


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_what_was_stopped_goes_on_and_is_the_same(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(shards, "SHARD_RECORDS", 8)
    monkeypatch.setattr("jax_distill.data.sources.checking.PART", 10)
    source = pictures_of(tmp_path / "pictures", [f"a fox {n % 23}" for n in range(43)])
    whole, several = tmp_path / "whole", tmp_path / "several"

    def work(encode):
        return work_of(source, encode, seed=4)

    encoding.make(whole, work(mean_color))
    assert len(list(whole.glob("latents-*"))) == 6 and len(list(whole.glob("captions-*"))) == 3
    assert tries(several, work, calls) == -(-6 // calls)
    assert content(several) == content(whole)
    keys = [record.key for record in records_of(LatentRecords(whole))]
    assert keys == [source.key(index) for index in range(43)]


def test_what_a_dead_process_left_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_RECORDS", 64)
    encoding.make(tmp_path / "whole", rendered(200))
    folder = tmp_path / "again"
    with pytest.raises(Killed):
        tries_once = making.Making.finish
        monkeypatch.setattr(making.Making, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        encoding.make(folder, rendered(200))
    monkeypatch.setattr(making.Making, "finish", tries_once)
    (folder / "latents-00001.array_record").write_bytes(b"cut")  # noted, and not what is noted
    (folder / "journal" / "latents-00002.json").unlink()  # there, and not noted
    (folder / "journal" / "captions-00000.json").write_text("{")
    (folder / ".latents-00001.array_record.99999999.partial").write_bytes(b"x")
    encoding.make(folder, rendered(200))
    assert content(folder) == content(tmp_path / "whole")
    encoding.make(folder, rendered(200))  # it is done
    assert content(folder) == content(tmp_path / "whole")


def test_a_folder_of_other_facts_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "a"
    making.Making(folder, {"steps": 2, "latents": {"taken": "mean"}})
    begun = making.Making(folder, {"steps": 3, "latents": {"taken": "mean"}})  # nothing was lost
    assert begun.facts["steps"] == 3
    (folder / "latents-00000.array_record").touch()
    with pytest.raises(
        FileError, match="a' was begun with latents.taken='mean' and not 'sample'; go"
    ):
        making.Making(folder, {"steps": 3, "latents": {"taken": "sample"}})
    making.Making(folder, {"steps": 3, "latents": {"taken": "mean"}})


def test_shards_depend_on_the_records_alone():
    for count in (1, 7, 1000, 12_345, 10**6, 10**7):
        for size in (256, 10**4, 10**6, 10**8):
            for batch in (1, 8, 240):
                found = shards.records_a_shard(count, size, batch)
                assert found % batch == 0 and -(-count // found) <= shards.MOST_SHARDS
                if count < 10**5:
                    assert found < shards.SHARD_RECORDS + batch
    assert shards.records_a_shard(1000, shards.SHARD_BYTES // 16, 8) == 16


def test_what_is_left_out_is_told_alike_in_every_try(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_distill.data.sources.checking.PART", 4)
    monkeypatch.setattr(shards, "SHARD_RECORDS", 8)
    pictures_of(tmp_path / "pictures", [f"a fox {number}" for number in range(20)])
    for number in (3, 11):
        (tmp_path / f"pictures/{number}.png").write_bytes(b"no picture")

    def work(encode=mean_color, share=0.1):
        return work_of(open_source([str(tmp_path / "pictures")]), encode, damaged_share=share)

    for share in (0.0, 0.05):
        with pytest.raises(FileError, match=r"11.png'.*\(and 1 more of 20 pictures\)"):
            encoding.make(tmp_path / "out", work(share=share))
        assert not list((tmp_path / "out").iterdir())  # mended pictures are looked at again
    encoding.make(tmp_path / "whole", work())
    assert tries(tmp_path / "out", work, 1) == 3
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    lines = (tmp_path / "out" / manifest.DAMAGED).read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["11.png", "3.png"]
    description = LatentRecords(tmp_path / "out").description
    assert description["damaged"] == 2 and description["examples"] == 18


@pytest.mark.parametrize("other", ["caption", "picture"])
def test_what_changes_between_tries_is_named(tmp_path, other):
    pictures_of(tmp_path / "pictures", ["a fox", "a hen"])

    def work(encode):
        return work_of(open_source([str(tmp_path / "pictures")]), encode)

    def dying(*arguments, **options):
        raise Killed

    with pytest.raises(Killed):
        encoding.make(tmp_path / "out", work(dying))
    if other == "caption":
        (tmp_path / "pictures/1.txt").write_text("a cow")
    else:
        Image.new("RGB", (8, 8), (0, 0, 9)).save(tmp_path / "pictures/1.png")
    with pytest.raises(FileError, match=f"'1.png' has another {other} than when it was checked"):
        encoding.make(tmp_path / "out", work(mean_color))


@pytest.mark.parametrize("name", ["captions-00000.array_record", "latents-00000.array_record"])
def test_a_shard_of_the_same_source_as_it_was_before_is_told(tmp_path, name):
    pictures_of(tmp_path / "pictures", ["a fox", "a hen"])

    def make(folder):
        encoding.make(folder, work_of(open_source([str(tmp_path / "pictures")])))

    make(tmp_path / "before")
    Image.new("RGB", (8, 8), (0, 0, 9)).save(tmp_path / "pictures/1.png")
    make(tmp_path / "now")
    assert (tmp_path / "now" / name).stat().st_size == (tmp_path / "before" / name).stat().st_size
    shutil.copy(tmp_path / "before" / name, tmp_path / "now" / name)
    records = LatentRecords(tmp_path / "now")
    with pytest.raises(FileError, match="the record of another folder lies in its place"):
        _ = records[0]


def test_shards_are_kept_where_the_source_is_refused_later(tmp_path, monkeypatch):
    """As without the flag that lets damaged pictures be left out."""
    monkeypatch.setattr(shards, "SHARD_RECORDS", 8)
    source = pictures_of(tmp_path / "pictures", [f"a fox {number}" for number in range(20)])
    (tmp_path / "pictures/3.png").write_bytes(b"no picture")
    folder = tmp_path / "out"
    assert tries(folder, lambda encode: work_of(source, encode, damaged_share=0.1), 1, most=1) == 2
    found = content(folder / making.JOURNAL)
    with pytest.raises(FileError, match="3.png"):
        encoding.make(folder, work_of(source))
    assert content(folder / making.JOURNAL) == found
    encoding.make(folder, work_of(source, damaged_share=0.1))
    assert len(LatentRecords(folder)) == 19


def test_several_encoders_make_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_RECORDS", 24)
    source = pictures_of(tmp_path / "pictures", [f"a fox {number}" for number in range(50)])
    used = set()

    def encoder(number):
        def encode(images, key=None):
            used.add(number)
            return mean_color(images)

        return encode

    encoding.make(tmp_path / "one", work_of(source))
    several = work_of(source, workers=3)
    several = dataclasses.replace(several, encoders=lambda: [encoder(n) for n in range(3)])
    encoding.make(tmp_path / "three", several)
    assert content(tmp_path / "three") == content(tmp_path / "one") and len(used) > 1


def test_an_estimate_counts_and_writes_nothing(tmp_path):
    captions = ["a fox", "a small red fox in snow", "a fox", "a hen"]
    source = pictures_of(tmp_path / "pictures", captions)
    shutil.copy(tmp_path / "pictures/0.txt", tmp_path / "pictures/4.txt")
    (tmp_path / "pictures/4.png").write_bytes(b"no picture")
    source = open_source([str(tmp_path / "pictures")])
    before = sorted(tmp_path.rglob("*"))
    found = estimate.estimate(work_of(source))
    assert (found.examples, found.captions, found.damaged) == (5, 3, 1)
    assert found.latent_bytes == 5 * 2 * 3
    words = sum(map(len, {*captions}))
    assert found.caption_bytes == words + 2 * (3 + 6 + 3 + 3)
    assert found.seconds.keys() == {"checking", "captions", "latents"}
    lines = "\n".join(found.lines())
    assert "examples: 5 (1 of the first 5 are damaged)" in lines and "captions: 3" in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_an_estimate_reads_few_captions_from_all_parts_of_a_source():
    read = []

    class Source:
        name, has_pictures = "it", True

        def __len__(self):
            return 40_000

        def __getitem__(self, index):
            read.append(index)
            return Captioned(str(index), f"caption {index}", None)

    words = work_of(Source()).words(estimate.WORDS)
    assert words == [f"caption {index}" for index in read] and 900 < len(words) <= 1000
    assert read == sorted(set(read)) and read[-1] == 39_999 and max(np.diff(read)) < 3000
    assert np.mean(np.diff(read) == 1) > 0.9  # most beside the one before
    read.clear()
    assert len(work_of(Source()).words(10**6)) == len(read) == 40_000


def test_times_are_said_as_people_do():
    said = [making.duration(seconds) for seconds in (3, 89, 100, 7200, 12_000, 10**6)]
    assert said == ["3 s", "89 s", "2 min", "2 h 0 min", "3 h 20 min", "11 days 13 h"]
