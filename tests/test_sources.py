"""Sources of captioned pictures: the same ones from every kind are the same."""

import csv
import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from jax_distill.data import pictures
from jax_distill.data.making import in_order
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.rows import Group, Rows
from jax_distill.data.sources.source import Columns
from jax_distill.storage.files import FileError

ROOT = Path(__file__).parents[1]
CAPTIONS = ("a fée, red", 'a "so-called" fox', "two\nlines", "日本の絵", "five")


def encode(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def made():
    """Names and contents of pictures: colours, JPEG, alpha, 16 bits, a palette."""
    rng = np.random.default_rng(3)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (24, 18, 4)).astype(np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (16, 16)).astype(np.uint16))
    return {
        "a.png": encode(rgb, "PNG"),
        "b.jpg": encode(rgb, "JPEG"),
        "c.webp": encode(rgba, "WEBP", lossless=True),
        "d.png": encode(deep, "PNG"),
        "e.png": encode(rgb.quantize(8), "PNG"),
    }


PICTURES = made()


def beside(root):
    for (name, content), caption in zip(PICTURES.items(), CAPTIONS):
        (root / name).write_bytes(content)
        text = caption.replace("\n", "\r\n") + "\r\n"
        encoding = {"a": "utf-8", "b": "utf-8-sig"}.get(name[0], "utf-16")
        (root / name).with_suffix(".txt").write_bytes(text.encode(encoding))
    return [str(root)], Columns()


def listed(name, encoding="utf-8", end="\n", columns=("file_name", "text")):
    """Makes a folder with a table, whose pictures lie deeper."""

    def make(root):
        (root / "deep/er").mkdir(parents=True)
        rows = [(f"deep/er/{name}", caption) for name, caption in zip(PICTURES, CAPTIONS)]
        text = io.StringIO()
        if name.endswith(".csv"):
            csv.writer(text, lineterminator=end).writerows([columns, *rows])
        else:
            text.writelines(json.dumps(dict(zip(columns, row))) + end for row in rows)
        (root / name).write_bytes(text.getvalue().encode(encoding))
        for name_, content in PICTURES.items():
            (root / "deep/er" / name_).write_bytes(content)
        return [str(root)], Columns(*columns) if "words" in columns else Columns()

    return make


def listed_in_parquet(root):
    """The same with Hugging Face's table, which has more columns."""
    listed("metadata.jsonl")(root)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().split("\n")[:-1]]
    (root / "metadata.jsonl").unlink()
    parquet.write_table(
        pa.Table.from_pylist([{"objects": {"box": [1]}, **row} for row in rows]),
        root / "metadata.parquet",
        row_group_size=2,
    )
    return [str(root)], Columns()


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tars(root):
    """Two tars; captions are texts in one, and in JSON in the other."""
    rows = list(zip(PICTURES.items(), CAPTIONS))
    texts = [
        member
        for (name, content), caption in rows[:2]
        for member in ((f"x/{name}", content), (f"x/{name[0]}.txt", caption.encode()))
    ]
    tables = [
        member
        for (name, content), caption in rows[2:]
        for member in (
            (f"./{name[0]}.json", json.dumps({"caption": caption, "n": 3}).encode()),
            (f"./{name}", content),
        )
    ]
    pack(root / "s-0.tar", texts)
    pack(root / "s-1.tar", tables)
    return [str(root / "s-*.tar")], Columns()


def table(image="image", caption="text", structure=True):
    values = list(PICTURES.values())
    if structure:
        values = [{"bytes": content, "path": name} for name, content in PICTURES.items()]
    kind = (
        pa.struct({"bytes": pa.binary(), "path": pa.string()}) if structure else pa.large_binary()
    )
    columns = {"n": pa.array(range(5)), image: pa.array(values, kind), caption: pa.array(CAPTIONS)}
    return pa.table(columns)


def parquets(root):
    """Two files: one of small row groups; the other has structures whose bytes are beside it."""
    whole = table("jpg", "words")
    parquet.write_table(whole[:3], root / "a.parquet", row_group_size=2)
    left = [{"bytes": None, "path": name} for name in list(PICTURES)[3:]]
    last = whole[3:].set_column(1, "jpg", pa.array(left, whole["jpg"].type))
    parquet.write_table(last, root / "b.parquet")
    for name in list(PICTURES)[3:]:
        (root / name).write_bytes(PICTURES[name])
    return [str(root / "*.parquet")], Columns("jpg", "words")


def plain_parquet(root):
    parquet.write_table(table(structure=False), root / "a.parquet")
    return [str(root)], Columns()


def stream(path, rows, size=2, compression=None, make=pa.ipc.new_stream):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, make(file, rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=size)


def saved(root):
    """As `datasets.save_to_disk` writes it."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (table()[:3], table()[3:])):
        stream(root / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text("{}")
    return [str(root)], Columns()


def arrow_file(root):
    stream(root / "a.arrow", table(), make=pa.ipc.new_file)
    return [str(root / "a.arrow")], Columns()


def compressed(make):
    """Makes an arrow file of compressed batches, with a dictionary in another column."""

    def write(root):
        rows = table().append_column("kind", pa.array(list("aabbc")).dictionary_encode())
        stream(root / "a.arrow", rows, 1, "zstd", make)
        return [str(root / "a.arrow")], Columns()

    return write


def hub(root):
    """As the hub lays a data set out."""
    (root / "data").mkdir()
    (root / ".cache").mkdir()
    (root / "README.md").write_text("pictures")
    for number, rows in enumerate((table()[:3], table()[3:])):
        parquet.write_table(rows, root / f"data/train-0000{number}-of-00002.parquet")
    parquet.write_table(table(), root / ".cache/train-00000-of-00002.parquet")
    return [str(root)], Columns()


def cache(root):
    """As `datasets` keeps a split in its cache."""
    stream(root / "pictures-train.arrow", table())
    (root / "dataset_info.json").write_text("{}")
    return [str(root)], Columns()


def capitals(root):
    beside(root)
    for path in sorted(root.iterdir()):
        path.rename(path.with_suffix(path.suffix.upper()))
    return [str(root)], Columns()


def capital_tar(root):
    members = [
        member
        for (name, content), caption in zip(PICTURES.items(), CAPTIONS)
        for member in ((f"{name[0]}.TXT", caption.encode()), (f"{name[0]}.Orig.PNG", content))
    ]
    (root / "shards").mkdir()
    pack(root / "shards/0.tar", members)
    return [str(root)], Columns(".orig.png")


def views(root):
    rows = table(structure=False)
    for name, kind in (("image", pa.binary_view()), ("text", pa.string_view())):
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(kind))
    stream(root / "a.arrow", rows)
    return [str(root / "a.arrow")], Columns()


KINDS = {
    "beside": beside,
    "metadata.jsonl": listed("metadata.jsonl"),
    "captions.jsonl": listed("captions.jsonl", "utf-8-sig", "\r\n", ("image", "caption")),
    "metadata.csv": listed("metadata.csv", "utf-8-sig", "\r\n"),
    "captions.csv": listed("captions.csv", "utf-16", "\n", ("where", "words")),
    "tars": tars,
    "parquet": parquets,
    "plain parquet": plain_parquet,
    "datasets": saved,
    "arrow": arrow_file,
}
LAYOUTS = {
    **KINDS,
    "compressed stream": compressed(pa.ipc.new_stream),
    "compressed file": compressed(pa.ipc.new_file),
    "hub": hub,
    "cache": cache,
    "capitals": capitals,
    "tar of capitals": capital_tar,
    "metadata.parquet": listed_in_parquet,
    "views": views,
}


def assert_as_made(source):
    assert len(source) == len(PICTURES)
    keys = [source.key(index) for index in range(len(source))]
    assert len(set(keys)) == len(keys)
    for index in (4, 0, 2, 1, 3, 0):  # access is random
        example = source[index]
        content = list(PICTURES.values())[index]
        assert example.caption == CAPTIONS[index] and example.key == keys[index]
        assert example.picture.content == content
        wanted = pictures.read(pictures.Encoded(content, "x"), 16, 24)
        np.testing.assert_array_equal(pictures.read(example.picture, 16, 24), wanted)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_same_pictures_are_the_same_from_every_kind(tmp_path, kind):
    names, columns = LAYOUTS[kind](tmp_path)
    source = open_source(names, columns)
    assert_as_made(source)
    assert_as_made(pickle.loads(pickle.dumps(source)))  # as workers of a loader are given it
    again = open_source(names, columns)
    usable = checked(open_source(names, columns), (8, 8))
    assert [usable.key(i) for i in range(5)] == [again.key(i) for i in range(5)]
    assert_as_made(usable)
    for index in (-1, 5):
        for read in (source.__getitem__, source.key, usable.__getitem__, usable.key):
            with pytest.raises(IndexError):
                read(index)


def test_captions_alone_have_no_negative_indices(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n")
    source = open_source([str(tmp_path / "a.txt")])
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source[index]


def test_threads_read_a_group_once_and_one_at_a_time(tmp_path, monkeypatch):
    parquet.write_table(table(), tmp_path / "a.parquet", row_group_size=5)
    source, real = open_source([str(tmp_path)]), parquet.ParquetFile.read_row_group
    inside, reads = threading.Semaphore(1), []

    def read(self, number, **options):
        assert inside.acquire(blocking=False)
        reads.append(number)
        time.sleep(0.05)  # for the others to come
        inside.release()
        return real(self, number, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", read)
    with ThreadPoolExecutor(5) as pool:
        assert [x.caption for x in pool.map(source.__getitem__, range(5))] == list(CAPTIONS)
    assert reads == [0]


def test_threads_that_read_ahead_load_each_group_once():
    groups = [Group(Path("a.parquet"), n, 32 * n, 32, ("image", "text")) for n in range(16)]
    loaded = []

    def load(group):
        loaded.append(group.place)
        return pa.array([b"x"] * 32), pa.array([b"a fox"] * 32)

    source = Rows("it", groups, load)
    spans = [range(start, start + 8) for start in range(0, 512, 8)]
    in_step = threading.Barrier(8)

    def keys_of(span):
        return [source[index].key for index in span if in_step.wait(60) >= 0]

    read = in_order(keys_of, spans, 8)
    assert [key for keys in read for key in keys] == [f"a.parquet:{n}" for n in range(512)]
    assert sorted(loaded) == list(range(16))


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_pictures_are_in_memory_some_batches_at_a_time(
    tmp_path, monkeypatch, make, kept
):
    size, count = 2**20, 8
    monkeypatch.setattr("jax_distill.data.sources.rows.KEPT_BYTES", (kept + 0.5) * size)
    many = pa.table({"image": pa.array([bytes(size)] * count), "text": pa.array(["a"] * count)})
    stream(tmp_path / "a.arrow", many, 1, "zstd", make)
    del many
    before = pa.total_allocated_bytes()
    source = open_source([str(tmp_path / "a.arrow")])
    assert pa.total_allocated_bytes() - before < size
    for index in range(count):
        assert len(source[index].picture.content) == size
        assert pa.total_allocated_bytes() - before < (kept + 1) * size


def test_an_example_of_a_tar_takes_little_memory(tmp_path):
    count, names = 1500, (".jpg", ".json")
    path = pack(tmp_path / "a.tar", [(f"{i:09}{end}", b"x") for i in range(count) for end in names])
    open_source([str(path)])
    tracemalloc.start()
    source = open_source([str(path)])
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] / len(source)
    tracemalloc.stop()
    assert size < 200  # of which the key takes 58


def test_a_row_group_is_read_once_by_reads_in_order(tmp_path, monkeypatch):
    names, columns = parquets(tmp_path)
    read, opened = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, number, **options: read.append(number) or opened(self, number, **options),
    )
    source = open_source(names, columns)
    assert not read
    assert [source[index].caption for index in range(5)] == list(CAPTIONS)
    assert read == [0, 1, 0]  # of two files


def test_members_of_tars_that_are_no_pictures_are_left_out(tmp_path):
    picture, caption = PICTURES["a.png"], b"a fox"
    junk = [("._a.png", b"x"), ("__MACOSX/a.png", b"x"), ("README", b"x"), ("b.txt", b"x")]
    both = [("c.small.png", b"x"), ("c.orig.png", picture), ("c.json", b'{"text": "t", "x": "j"}')]
    path = pack(tmp_path / "a.tar", [*junk, ("a.png", picture), ("a.txt", caption)])
    source = open_source([str(path)])
    assert [source.key(index) for index in range(len(source))] == ["a.tar/a"]
    path = pack(tmp_path / "b.tar", [*both, ("c.txt", caption)])
    example = open_source([str(path)], Columns("orig.png"))[0]
    assert example[:2] == ("b.tar/c", "a fox") and example.picture.content == picture
    assert open_source([str(path)], Columns("orig.png", "x"))[0].caption == "j"


@pytest.mark.parametrize(
    ("module", "name"),
    [("pyarrow", "a.parquet"), ("pyarrow", "a.arrow"), ("tensorflow_datasets", "tfds:tiny")],
)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, module, name):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.arrow").touch()
    monkeypatch.setitem(sys.modules, module, None)
    name = name if ":" in name else str(tmp_path / name)
    package = module.replace("_", "-")
    with pytest.raises(FileError, match=rf"{package}, which is missing; pip install 'jax-distill"):
        open_source([name])


REFUSED = (
    r"'tfds:nothing' is not prepared here \(.*\); make it with tfds build NAME",
    r"'tfds:tiny:test' has no split 'test' \(.*\); it has the splits train",
    r"'tfds:tiny:train\[' has no split 'train\[' \(",
    r"'tfds:tiny:train\+train\[:1\]' reads examples of 'train' twice; name parts that do",
    r"'tfds:tiny': feature 'number' is .*, which is no pictures; name another with --image_column",
    r"'tfds:tiny': feature 'box' is .*, which is no text; name another with --caption_column",
    r"'tfds:tiny' has no column 'text' or 'caption' \(it has: .*words.*\); name one of them with",
    r"'.*/tiny/1.0.0' is a data set of tfds; give it as 'tfds:/.*/tiny/1.0.0'",
    r"'tfds:tiny' has no random access \(.*\); make it with tfds build NAME --file_format=array_r",
    r"'s3://test/tiny/1.0.0' is an address of a kind that is not read; give a folder",
)


def test_a_data_set_of_tfds_is_read_by_name_without_tensorflow(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tests/tiny_tfds.py", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("'")]
    assert len(said) == len(REFUSED)
    for sentence, pattern in zip(said, REFUSED):
        assert re.match(pattern, sentence), sentence
