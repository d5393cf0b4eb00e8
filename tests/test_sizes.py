"""Each picture goes to the folder of the size that suits it, and to no other, in any tries."""

import functools
import io
import json

import numpy as np
import plain_encoders
import pytest
from PIL import Image

from jax_distill.data import encoding, pictures, shards, sizes
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.opening import open_source
from jax_distill.storage.files import FileError

SIZES = [(16, 16), (16, 32), (32, 16), (32, 32)]
SHAPES = {  # height, width, and the size that suits
    "square": (20, 20, (16, 16)),
    "large": (40, 40, (32, 32)),
    "tiny": (8, 8, (16, 16)),
    "nearly": (30, 36, (16, 16)),
    "wide": (20, 50, (16, 32)),
    "tall": (90, 40, (32, 16)),
    "strip": (4, 400, (16, 32)),
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (name, (height, width, _)) in enumerate(SHAPES.items()):
        Image.new("RGB", (width, height), (number, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return open_source([str(folder)])


def work(source, size, **options):
    text = plain_encoders.stored_text()
    latents = {"shape": [size[0] * size[1] // 64, 3], "type": "float16", "taken": "mean"}
    facts = {"latents": latents, "text": text.facts, "resolution": list(size)}
    encode = plain_encoders.encode
    return encoding.EncodedPictures(source, size, lambda: [encode], text, facts, **options)


def made(folder, source, among=SIZES, **options):
    folder.mkdir(exist_ok=True)
    return sizes.make_each(folder, among, functools.partial(work, source, **options))


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_each_picture_is_in_the_folder_of_its_size_and_in_no_other(tmp_path, source):
    counts = made(tmp_path / "out", source)
    assert counts == {(16, 16): 3, (16, 32): 2, (32, 16): 1, (32, 32): 1}
    found = {}
    for size in counts:
        records = LatentRecords(tmp_path / "out" / sizes.name(size))
        assert records.description["sizes"] == [list(each) for each in SIZES]
        for index in range(len(records)):
            record = records[index]
            assert record.latents.shape == (size[0] * size[1] // 64, 3)
            assert record.caption not in found
            found[record.caption] = size
            number = list(SHAPES).index(record.caption)  # is its red
            np.testing.assert_allclose(record.latents[0, 0] * 255, number, atol=0.05)
    assert found == {name: shape[2] for name, shape in SHAPES.items()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        map(sizes.name, counts)
    )


def test_a_picture_is_seen_upright_before_its_size_is_chosen():
    image, file = Image.new("RGB", (40, 20)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(file, "JPEG", exif=exif)
    shown = pictures.shown(pictures.Encoded(file.getvalue(), "it"))
    assert pictures.nearest(shown, SIZES) == SIZES.index((32, 16))


def test_a_killed_making_goes_on_and_ends_the_same(tmp_path, source, monkeypatch):
    counts = made(tmp_path / "whole", source)
    write = shards.write_shard
    for allowed in range(9):
        monkeypatch.setattr(shards, "write_shard", stopped(allowed, write))
        try:
            again = made(tmp_path / "out", source)
        except KeyboardInterrupt:
            continue
        assert again == counts and allowed in range(2, 8)
        break
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_sizes_are_refused_once_there_are_shards_of_some(tmp_path, source, monkeypatch):
    monkeypatch.setattr(sizes, "make", stopped(0, encoding.make))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", source)
    (tmp_path / "out" / "16x16").mkdir()  # a folder that was begun, without a shard
    monkeypatch.setattr(sizes, "make", stopped(1, encoding.make))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", source, SIZES[1:])
    assert not (tmp_path / "out" / "16x16").exists()
    with pytest.raises(FileError, match=r"was begun with sizes=.* and not "):
        made(tmp_path / "out", source)
    with pytest.raises(FileError, match="was begun with"):
        encoding.make(tmp_path / "out", work(source, (16, 16)))


def stopped(after, act):
    """A function that is interrupted when it is called once more than so many times."""
    left = iter(range(after))

    def once(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return act(*arguments)

    return once


def test_damage_is_counted_over_all_sizes_and_listed_once(tmp_path, source):
    (tmp_path / "pictures" / "square.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match="square.png"):
        made(tmp_path / "out", source)
    (tmp_path / "pictures" / "large.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match="1 more of 7"):
        made(tmp_path / "out", source, damaged_share=0.2)
    counts = made(tmp_path / "out", source, damaged_share=0.3)
    assert counts == {(16, 16): 2, (16, 32): 2, (32, 16): 1}  # nothing is left for 32x32
    lists = list((tmp_path / "out").rglob("damaged.jsonl"))
    assert [path.parent.name for path in lists] == ["16x16"]
    keys = [json.loads(line)["key"] for line in lists[0].read_text().splitlines()]
    assert sorted(keys) == ["large.png", "square.png"]


def test_sizes_are_read_and_named():
    assert sizes.parse("512x512, 432x768") == [(512, 512), (432, 768)]
    assert sizes.name((432, 768)) == "432x768"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512", "'512' is no size"),
        ("512x", "'512x' is no size"),
        ("512x-16", "'512x-16' is no size"),
        ("512x512,", "'' is no size"),
        ("512x512,512x512", "512x512 is given twice"),
    ],
)
def test_what_is_no_size_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sizes.parse(text)
