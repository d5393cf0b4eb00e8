"""Sources that are damaged: a sentence, or what they held; what is left out is told."""

import json
import random

import numpy as np
import pytest
from pyarrow import parquet
from test_sources import CAPTIONS, PICTURES, pack, stream, table

from jax_distill.data import encoding
from jax_distill.data.records import LatentRecords
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.opening import open_source
from jax_distill.flow import Text
from jax_distill.storage.files import FileError

WHOLE = [(caption, content) for caption, content in zip(CAPTIONS, PICTURES.values())]


def make(path):
    """A source of a kind, told by the ending; parquet with checksums of its pages."""
    if path.suffix == ".tar":
        members = zip(PICTURES.items(), CAPTIONS)
        pack(path, [m for (n, c), t in members for m in ((n, c), (f"{n[0]}.txt", t.encode()))])
    elif path.suffix == ".parquet":
        parquet.write_table(table(), path, row_group_size=2, write_page_checksum=True)
    else:
        stream(path, table())
    return path.read_bytes()


def held(path):
    """What a source holds, None if it is refused."""
    try:
        source = open_source([str(path)])
        examples = [source[index] for index in range(len(source))]
    except FileError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return None
    return [(example.caption, example.picture.content) for example in examples]


@pytest.mark.parametrize("ending", ["tar", "parquet", "arrow"])
def test_a_part_of_a_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    content = make(path)
    assert held(path) == WHOLE
    rng = random.Random(ending)
    end = len(content.rstrip(b"\0")) if ending == "tar" else len(content)
    for _ in range(100):
        path.write_bytes(content[: rng.randrange(end)])
        assert held(path) is None


def flipped(rng, content):
    """One bit of it is another, or some bytes are."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("ending", ["tar", "parquet", "arrow"])
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path, ending):
    """Tars and arrow files have no checksums of contents: those that are read may be others."""
    path = tmp_path / f"a.{ending}"
    content = make(path)
    rng, refused = random.Random(ending), 0
    for _ in range(200):
        path.write_bytes(flipped(rng, content))
        found = held(path)
        refused += found is None
        if ending == "parquet":
            assert found in (None, WHOLE)
        elif found is not None:
            assert len(found) == len(WHOLE)
    assert refused > 20


def test_damaged_headers_of_tars_are_seen(tmp_path):
    path = tmp_path / "a.tar"
    content = make(path)
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 10
    rng = random.Random(1)
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.choice(headers) + rng.randrange(500)] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert held(path) in (None, WHOLE)


def test_examples_that_are_left_out_are_told_by_key(tmp_path):
    values = list(PICTURES.items())
    rows = [*zip(values, CAPTIONS), (("f.png", values[0][1][:60]), "cut"), (("g.png", b"x"), "no")]
    members = [m for (n, c), t in rows for m in ((n, c), (f"{n[0]}.txt", t.encode()))]
    source = open_source([str(pack(tmp_path / "a.tar", [*members, ("h.png", values[0][1])]))])
    with pytest.raises(FileError, match=r"'f.png' cannot be read .*\(and 2 more of 8 pictures\)$"):
        checked(source, (8, 8))
    with pytest.raises(FileError, match=r"2 more of 8 pictures\); --damaged_share=0.3 allows no"):
        checked(source, (8, 8), damaged_share=0.3)
    sound = checked(source, (8, 8), damaged_share=0.4)
    assert [sound[index].caption for index in range(len(sound))] == list(CAPTIONS)

    def embed(captions):
        values = np.ones(len(captions), np.float32)
        return Text(values[:, None, None], values[:, None])

    def encode(images, key):
        return images.mean((1, 2, 3))[:, None, None] / 255

    encoding.encode_pictures(tmp_path / "out", sound, (8, 8), encode, embed)
    records = LatentRecords(tmp_path / "out")
    assert len(records) == 5 and records.description["damaged"] == 3
    lines = (tmp_path / "out" / encoding.DAMAGED).read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["key"] for line in told] == ["a.tar/f", "a.tar/g", "a.tar/h"]
    assert "has no caption" in told[2]["reason"]


def test_a_row_group_that_is_damaged_is_read_once_and_its_rows_are_left_out(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    content = bytearray(make(path))
    chunk = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    content[chunk.dictionary_page_offset + 500] ^= 1
    path.write_bytes(content)
    read, reader = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, number, **options: read.append(number) or reader(self, number, **options),
    )
    sound = checked(open_source([str(path)]), (8, 8), damaged_share=0.5)
    assert read == [0, 1, 2]
    assert [key for key, _ in sound.damaged] == ["a.parquet:2", "a.parquet:3"]
    assert all("is cut short or damaged" in reason for _, reason in sound.damaged)
    assert [sound[index].caption for index in range(3)] == [CAPTIONS[i] for i in (0, 1, 4)]


def test_lines_of_tables_that_cannot_be_used_are_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES["a.png"])
    rows = [("a.png", "a fox"), ("a.png", " "), ("no.png", "a hen"), ("a.png", "a cow")]
    lines = (json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    sound = checked(open_source([str(tmp_path)]), (8, 8), damaged_share=0.5)
    assert [sound[index].caption for index in range(len(sound))] == ["a fox", "a cow"]
    assert [key for key, _ in sound.damaged] == ["a.png#2", "no.png"]
    assert [sound.key(index) for index in range(2)] == ["a.png", "a.png#3"]
