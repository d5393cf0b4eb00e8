"""Texts, pictures, captions and records that deserve what is said of them."""

import errno
import json
import os
import shutil

import numpy as np
from PIL import Image
from test_passing_errors import failing
from test_pictures import DEEP, HEIGHT, RAMP, RGB, deep_colours, png
from test_records import SHARD, embedded, null, some

from jax_distill import prepare
from jax_distill.data import encoding, pictures, records
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.storage import files, paths


def ask_all(root, ask):
    """As `refused_weights.ask_all`."""
    _texts(root, ask)
    _pictures(root, ask)
    _captions(root, ask)
    _latents(root, ask)


def _texts(root, ask):
    path = root / "x.txt"
    path.write_bytes("ä".encode("latin-1"))
    ask(files.read_text, path)
    os.truncate(path, files.TEXT_BYTES + 1)
    ask(files.read_text, path)
    ask(files.parse_json, " " * (files.JSON_BYTES + 1), where="'x.json'", fix="mend it")
    ask(paths.path, "s3://bucket/x")
    ask(paths.path, "gs:///x")
    deep = "[" * 65 + "]" * 65
    ask(files.parse_json, deep, where="'x.json'", fix="mend it")


def _pictures(root, ask):
    (root / "p").mkdir()
    ask(pictures.shown, root / "p")
    path = root / "a.png"
    path.write_bytes(b"GIF")
    ask(pictures.shown, path)
    real, Image.open = (
        Image.open,
        failing(OSError(errno.EIO, os.strerror(errno.EIO))),
    )
    try:
        ask(pictures.shown, path)
    finally:
        Image.open = real
    rows = deep_colours().astype(">u2").view(np.uint8).reshape(HEIGHT, -1)
    path.write_bytes(png(16, 2, rows, (b"tRNS", bytes(6))))
    ask(pictures.shown, path)
    Image.new("1", (9000, 7200)).save(path)
    ask(pictures.shown, path)
    os.truncate(path, pictures.FILE_BYTES + 1)
    ask(pictures.shown, path)
    RGB.save(path, exif=b"Exif\0\0no EXIF at all")
    ask(pictures.shown, path)
    RGB.save(root / "a.jpg", progressive=True)
    with (root / "a.jpg").open("ab") as file:
        file.write(b"\xff\xda" * 101)
    ask(pictures.shown, root / "a.jpg")
    whole = np.linspace(-3, 900, DEEP.size).reshape(DEEP.shape)
    for values in (RAMP.astype(np.float32), whole.astype(np.int32)):
        Image.fromarray(values).save(root / "a.tif")
        ask(pictures.shown, root / "a.tif")


def found(path):
    return checked(PictureFolder(path), (1, 1))


def _captions(root, ask):
    here = root / "pictures"
    ask(found, here)
    here.mkdir()
    ask(found, here)
    RGB.save(here / "a.png")
    ask(found, here)
    header = "file_name,text\n"
    for text in ("", f"{header}a,b,c\n", f'{header}"a.png,x\n', "text\nx\n", "text,text\n"):
        (here / "metadata.csv").write_text(text)
        ask(found, here)
    (here / "captions.csv").touch()
    ask(found, here)
    (here / "metadata.csv").unlink()
    (here / "captions.csv").unlink()
    for caption in (" ", "a" * 70_000, "a\rb"):
        (here / "a.txt").write_text(caption, newline="")
        ask(found, here)
    for line in (
        "{",
        json.dumps({"file_name": "a.png", "text": None}),
        json.dumps({"file_name": "no.png", "text": "a"}),
        json.dumps({"file_name": "../x.png", "text": "a"}),
    ):
        (here / "metadata.jsonl").write_text(line)
        ask(found, here)
    path = root / "captions.txt"
    ask(prepare.read_captions, path)
    for text in ("\n \n", "a\nb\rc"):
        path.write_text(text, newline="")
        ask(prepare.read_captions, path)
    infinite = np.full((1, 2, 2), np.inf, np.float16)
    ask(encoding._check_finite, infinite, ["'a.png'"], "latents")


def _latents(root, ask):
    good, bad = root / "good", root / "bad"
    records.write(good, some(2), {"examples": 2})
    ask(records.LatentRecords, root)

    def damaged(change):
        shutil.copytree(good, bad)
        change(json.loads((bad / records.DESCRIPTION).read_text()))
        ask(records.LatentRecords, bad)
        shutil.rmtree(bad)

    def described(**changes):
        damaged(lambda old: files.write_json(bad / records.DESCRIPTION, {**old, **changes}))

    described(shards="latents")
    described(shards=["../a"])
    described(shards=[])
    described(examples=5)
    damaged(lambda _: (bad / SHARD).unlink())
    damaged(lambda _: (bad / SHARD).write_bytes(bytes(70_000)))
    first, second = embedded(2)
    strange = second._replace(latents=np.full((4, 8), np.nan, np.float16))
    records.write(bad, [first, strange], {}, null=null(length=4))
    ask(lambda: records.LatentRecords(bad)[1])
    ask(lambda: records.LatentRecords(bad).null)
