"""Sources that are damaged: a sentence, or what they held; what is left out is told."""

import json
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet
from test_sources import CAPTIONS, PICTURES, pack, stream, table, views

from jax_distill.data import pictures
from jax_distill.data.pictures import Encoded
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.source import Captioned, Columns
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
def test_a_damaged_file_is_refused_or_read_as_it_is(tmp_path, ending):
    """Parquet's checksums tell all damage; of others, nothing is read that the file does not hold.

    Headers of tars have checksums, and contents none: there, a picture is of its length, and no
    bit of it is another than in the file. Arrow files have none at all.
    """
    path = tmp_path / f"a.{ending}"
    content = make(path)
    rng, refused = random.Random(ending), 0
    for _ in range(200):
        changed = flipped(rng, content)
        path.write_bytes(changed)
        read = held(path)
        refused += read is None
        if ending == "parquet":
            assert read in (None, WHOLE)
        elif read is not None:
            assert len(read) == len(WHOLE)
            assert all(picture in changed for _, picture in read)
            if ending == "tar":
                sizes = [len(picture) for _, picture in WHOLE]
                assert [len(picture) for _, picture in read] == sizes
                assert sum(map(apart, read, WHOLE)) <= 4
    assert refused > 20


def apart(one, other):
    """The bits in which the pictures of two examples differ."""
    return sum((a ^ b).bit_count() for a, b in zip(one[1], other[1], strict=True))


def test_a_part_of_a_tar_that_was_never_written_is_seen(tmp_path):
    """As of a download into a file that already has its size: zeros from a header on."""
    members = [(f"{number}.{end}", b"x" * 9000) for number in range(3) for end in ("png", "txt")]
    path = pack(tmp_path / "a.tar", members)
    assert len(held(path)) == 3
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3 // 512 * 512].ljust(len(content), b"\0"))
    assert held(path) is None
    header = content.index(b"1.png")
    path.write_bytes(content[:header].ljust(len(content), b"\0"))
    assert held(path) is None


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


@pytest.mark.parametrize("what", ["image", "text"])
def test_views_that_lead_out_of_a_file_are_not_followed(tmp_path, what):
    """Arrow's compute functions would follow them, into a crash."""
    path = Path(views(tmp_path)[0][0])
    content = PICTURES["b.jpg"] if what == "image" else CAPTIONS[1].encode()
    view = struct.pack("<i", len(content)) + content[:4]  # then the buffer's number, the offset
    changed = bytearray(path.read_bytes())
    assert changed.count(view) == 1
    at = changed.index(view) + 12
    changed[at : at + 4] = struct.pack("<i", 2**30)
    path.write_bytes(changed)
    usable = checked(open_source([str(path)]), (8, 8), damaged_share=0.5)
    assert [key for key, _ in usable.damaged] == ["a.arrow:0", "a.arrow:1"]
    assert all("is cut short or damaged" in reason for _, reason in usable.damaged)


def test_examples_that_are_left_out_are_told_by_key(tmp_path):
    values = list(PICTURES.items())
    rows = [*zip(values, CAPTIONS), (("f.png", values[0][1][:60]), "cut"), (("g.png", b"x"), "no")]
    members = [m for (n, c), t in rows for m in ((n, c), (f"{n[0]}.txt", t.encode()))]
    source = open_source([str(pack(tmp_path / "a.tar", [*members, ("h.png", values[0][1])]))])
    with pytest.raises(FileError, match=r"'f.png' cannot be read .*\(and 2 more of 8 pictures\)$"):
        checked(source, (8, 8))
    with pytest.raises(FileError, match=r"2 more of 8 pictures\); --damaged_share=0.3 allows no"):
        checked(source, (8, 8), damaged_share=0.3)
    usable = checked(source, (8, 8), damaged_share=0.4)
    assert [usable[index].caption for index in range(len(usable))] == list(CAPTIONS)
    told = [(damaged.key, "has no caption" in damaged.reason) for damaged in usable.damaged]
    assert told == [("a.tar/f", False), ("a.tar/g", False), ("a.tar/h", True)]


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
    usable = checked(open_source([str(path)]), (8, 8), damaged_share=0.5)
    assert read == [0, 1, 2]
    assert [key for key, _ in usable.damaged] == ["a.parquet:2", "a.parquet:3"]
    assert all("is cut short or damaged" in reason for _, reason in usable.damaged)
    assert [usable[index].caption for index in range(3)] == [CAPTIONS[i] for i in (0, 1, 4)]


def tables():
    """Names of tables, their lines, and the keys of those that are damaged: all but two."""
    fine = [("a.png", "a fox"), ("a.png", "a cow")]
    odd = {
        "a.png#2": ("a.png", " "),
        "no.png": ("no.png", "a hen"),
        "a.png#3": ("a.png", None),
        "a.png#4": ("a.png", 3),
        "metadata.jsonl:6": (None, "a hen"),
        "metadata.jsonl:7": ("../a.png", "a hen"),
    }
    rows = [fine[0], *odd.values(), fine[1]]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    lines += ['{"file_name": "a.png"}', '{"file_name": "a.png", "text', "[3]"]
    lines += ['{"file_name": "a.png", "text": "a", "text": "b"}']
    more = ["a.png#6", *(f"metadata.jsonl:{number}" for number in (10, 11, 12))]
    yield "metadata.jsonl", lines, [*odd, *more]
    lines = ["file_name,text", "a.png,a fox", "a.png", "a.png,a fox, red", "a.png,", "a.png,a cow"]
    yield "metadata.csv", lines, ["metadata.csv:3", "metadata.csv:4", "a.png#2"]


@pytest.mark.parametrize(("name", "lines", "keys"), list(tables()))
def test_lines_of_tables_that_cannot_be_used_are_left_out(tmp_path, name, lines, keys):
    (tmp_path / "a.png").write_bytes(PICTURES["a.png"])
    (tmp_path / name).write_text("\n".join(lines))
    source = open_source([str(tmp_path)])
    usable = checked(source, (8, 8), damaged_share=len(keys) / len(source))
    assert [usable[index].caption for index in range(len(usable))] == ["a fox", "a cow"]
    assert [key for key, _ in usable.damaged] == keys
    assert usable.key(0) == "a.png"
    assert all(name in reason or "no.png" in reason for _, reason in usable.damaged)
    with pytest.raises(
        FileError, match=rf"\(and {len(keys) - 1} more of {len(source)} pictures\)$"
    ):
        checked(source, (8, 8))


def test_columns_are_those_of_the_first_line_that_has_them(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES["a.png"])
    lines = ["{}", '{"image": "a.png", "caption": "a fox"}', '{"image": "a.png", "text": "a hen"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    usable = checked(open_source([str(tmp_path)]), (8, 8), damaged_share=0.7)
    assert [key for key, _ in usable.damaged] == ["metadata.jsonl:1", "a.png#2"]
    assert usable[0].caption == "a fox"


def test_the_first_damaged_line_of_captions_alone_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ('{"text": null}', '{"text": " "}', "{"):
        path.write_text(f'{{"text": "a fox"}}\n{line}\n{{"text": 3}}')
        with pytest.raises(FileError, match="a.jsonl', line 2"):
            open_source([str(path)])


def test_a_table_that_lists_itself_has_one_damaged_example(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "metadata.jsonl", "text": "a fox"}')
    with pytest.raises(FileError, match="metadata.jsonl' cannot be read as a picture"):
        checked(open_source([str(tmp_path)]), (8, 8))


def test_an_example_of_a_tar_without_the_ending_that_is_named_is_damaged(tmp_path):
    picture = PICTURES["a.png"]
    members = [("a.orig.png", picture), ("a.txt", b"a"), ("b.png", picture), ("b.txt", b"b")]
    members += [("c.small.png", picture), ("c.txt", b"c"), ("README", b"x"), ("d.txt", b"d")]
    source = open_source([str(pack(tmp_path / "a.tar", members))], Columns("orig.png"))
    usable = checked(source, (8, 8), damaged_share=0.7)
    assert [usable.key(index) for index in range(len(usable))] == ["a.tar/a"]
    assert [key for key, _ in usable.damaged] == ["a.tar/b", "a.tar/c"]


class Many:
    """A source of as many examples as it is told, of one picture."""

    name, has_pictures = "'many'", True

    def __init__(self, count, damaged=False):
        self.count, self.damaged = count, damaged

    def __len__(self):
        return self.count

    def key(self, index):
        return f"{index:09}"

    def __getitem__(self, index):
        if self.damaged:
            raise FileError(f"'{index:09}' is damaged")
        return Captioned(self.key(index), "a fox", Encoded(b"", f"'{index:09}'"))


@pytest.mark.parametrize("damaged", [False, True])
def test_checking_keeps_little_of_an_example(monkeypatch, damaged):
    picture = pictures.Shown(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(pictures, "shown", lambda encoded: picture)
    count = 20_000
    tracemalloc.start()
    if damaged:
        with pytest.raises(FileError, match="'000000000' is damaged .and 19999 more of 20000"):
            checked(Many(count, damaged), (8, 8))
    else:
        assert len(checked(Many(count), (8, 8))) == count
    peak = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.stop()
    assert peak < 36  # its place, its caption's, and the digest of its picture


def test_a_table_may_list_pictures_of_folders_that_are_named_as_splits(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PICTURES["a.png"])
        (tmp_path / name / "a.txt").write_text(name)
    with pytest.raises(FileError, match="has the splits test, train; say which to read"):
        open_source([str(tmp_path)])
    assert open_source([str(tmp_path / "train")])[0].caption == "train"
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,a fox\ntest/a.png,a hen\n")
    assert len(open_source([str(tmp_path)])) == 2
