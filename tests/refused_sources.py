"""Sources of captioned pictures that deserve what is said of them."""

import io
import json
import os
import tarfile

import pyarrow as pa
from pyarrow import parquet
from test_sources import PICTURES, pack, stream, table

from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.opening import open_source
from jax_distill.data.sources.prompts import Prompts
from jax_distill.data.sources.source import Columns

PNG = PICTURES["a.png"]


def read(*names, columns=(), share=0.0):
    """Opens and reads a whole source."""
    checked(open_source([str(n) for n in names], Columns(*columns)), (1, 1), damaged_share=share)


def ask_all(root, ask):
    """As `refused_weights.ask_all`."""
    _names(root / "names", ask)
    _tars(root / "tars", ask)
    _parquet(root / "parquet", ask)
    _arrow(root / "arrow", ask)


def _names(root, ask):
    (root / "two").mkdir(parents=True)
    (root / "splits").mkdir()
    for split in ("train", "test"):
        (root / f"splits/{split}-00000-of-00001.parquet").touch()
    ask(read, root / "splits")
    for name in ("a.h5", "a.h5", "b.png.heic"):
        (root / "others").mkdir(exist_ok=True)
        (root / "others" / name).touch()
    ask(read, root / "others")
    _folders(root, ask)
    for name in ("two/a.tar", "two/b.png", "a.parquet", "a.tar.gz", "a.h5"):
        (root / name).touch()
    (root / "a.txt").write_text("a fox\n")
    ask(read, "gs://bucket/pictures")
    for names in (
        ["no"],
        ["no*"],
        ["two", "a.txt"],
        ["two/a.tar", "a.parquet"],
        ["two"],
        ["a.tar.gz"],
        ["a.h5"],
        ["a.txt"],
    ):
        ask(read, *(root / name for name in names))
    pictures = (("a", PNG), ("b", PNG), ("c", PNG[:60]), ("d", b""))
    for name, content in pictures:
        (root / f"two/{name}.png").write_bytes(content)
        (root / f"two/{name}.txt").write_text("a fox")
    (root / "two/a.tar").unlink()
    ask(read, root / "two", share=0.25)
    ask(Prompts, [root / "a.txt"], Columns(caption="words"))


def _folders(root, ask):
    for name in ("many/a/0.tar", "many/b/0.tar", "train-and/train.parquet", "train-and/b.parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    ask(read, root / "many")
    ask(read, root / "train-and")
    for split in ("test", "train"):
        (root / "folders" / split).mkdir(parents=True)
        (root / f"folders/{split}/a.png").write_bytes(PNG)
    ask(read, root / "folders")
    (root / "inner/train").mkdir(parents=True)
    (root / "inner/train/a.arrow").touch()
    (root / "inner/train/state.json").write_text('{"_data_files": []}')
    ask(read, root / "inner")
    (root / "gap/data").mkdir(parents=True)
    (root / "gap/data/train-00000-of-00002.parquet").touch()
    ask(read, root / "gap")
    (root / "gap/data/train-00000-of-00001.parquet").touch()
    ask(read, root / "gap/data")
    (root / "a.parquet").touch()
    ask(read, root / "a.parquet", root / "a.parquet")
    (root / "of tfds").mkdir()
    (root / "of tfds/features.json").write_text("{}")
    ask(read, root / "of tfds")
    (root / "beside").mkdir()
    (root / "beside/a.png").write_bytes(PNG)
    (root / "beside/a.txt").write_text("a fox")
    ask(read, root / "beside", columns=("jpg",))
    (root / "beside/metadata.csv").write_text("file_name;text\na.png;a fox\n")
    ask(read, root / "beside")
    (root / "beside/metadata.csv").write_text("file_name, text\na.png, a fox\n")
    ask(read, root / "beside")
    (root / "beside/metadata.csv").unlink()
    (root / "beside/metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "text": ""}')
    ask(read, root / "beside")


def _tars(root, ask):
    (root / "x").mkdir(parents=True)
    path, caption = root / "a.tar", ("b.txt", b"a fox")
    good = pack(path, [caption, ("b.png", PNG)]).read_bytes()
    for content in (good[: 1536 + 100], good[:1024], b"no tar" * 200, good + good):
        path.write_bytes(content)
        ask(read, path)
    for kind, name in ((tarfile.SYMTYPE, "b.png"), (tarfile.FIFOTYPE, "b.png"), (b"0", "../b.png")):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "c.png"
        with tarfile.open(path, "w") as tar:
            tar.addfile(member, io.BytesIO())
        ask(read, path)
    for members in (
        [("b.png", PNG), ("b.png", PNG)],
        [("b.png", PNG), ("b.jpg", PNG), caption],
        [("b.png", PNG)],
        [("b.png", PNG), ("b.json", b'{"words": "a fox"}')],
        [("b.png", PNG), ("b.json", b'{"text": 3}')],
        [caption],
    ):
        ask(read, pack(path, members))
    for picture in ("b.png", "b.PNG"):
        ask(read, pack(path, [caption, ("b.png", PNG), (picture, PNG)]))
    others = [("c.orig.png", PNG), ("c.txt", b"a hen")]
    ask(read, pack(path, [caption, ("b.png", PNG), *others]), columns=("orig.png",))
    ask(read, path, columns=("small.png",))
    for name in ("a.tar", "x/a.tar"):
        pack(root / name, [caption, ("b.png", PNG)])
    ask(read, path, root / "x/a.tar")


def _parquet(root, ask):
    root.mkdir()
    path, rows = root / "a.parquet", table()

    def refuse(changed, *columns):
        parquet.write_table(changed, path)
        ask(read, path, columns=columns)

    refuse(rows.drop_columns(["image"]))
    refuse(rows, "n")
    refuse(rows, None, "n")
    refuse(rows.rename_columns(["text", "image", "text"]))
    refuse(rows[:0])
    refuse(rows.set_column(2, "text", rows["text"].dictionary_encode()))
    refuse(rows.set_column(1, "image", pa.array([PNG, None, PNG, PNG, PNG], pa.binary())))
    refuse(rows.set_column(2, "text", pa.array([" ", *"abcd"])))
    broken = pa.array([b"a", b"\xff", b"c", b"d", b"e"]).view(pa.string())
    refuse(rows.set_column(2, "text", broken))
    parquet.write_table(rows, path)
    (root / "x").mkdir()
    parquet.write_table(rows, root / "x/a.parquet")
    ask(read, path, root / "x/a.parquet")
    os.truncate(path, path.stat().st_size - 20)
    ask(read, path)


def _arrow(root, ask):
    root.mkdir()
    stream(root / "a.arrow", table())
    content = (root / "a.arrow").read_bytes()
    (root / "a.arrow").write_bytes(content[:-8])
    ask(read, root / "a.arrow")
    for state in (
        {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i"}]},
        {"_data_files": [{"filename": "../a.arrow"}]},
    ):
        (root / "state.json").write_text(json.dumps(state))
        ask(read, root)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (root / "a.arrow").unlink()
    ask(read, root)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    ask(read, root)
