"""Texts, pictures, captions and records that deserve what is said of them."""

import errno
import json
import os
import shutil

import made_records
import numpy as np
from PIL import Image
from test_passing_errors import failing
from test_pictures import DEEP, HEIGHT, RAMP, RGB, deep_colours, png, tiff
from test_records import SHARD, embedded, null, replace

from jax_distill import prepare, worlds
from jax_distill.config import base
from jax_distill.data import encoding, folders, manifest, mixture, pictures, records
from jax_distill.data.loader import EmbeddedLatents, batches
from jax_distill.data.making import Making
from jax_distill.data.record_fields import pack
from jax_distill.data.sources.checking import checked
from jax_distill.data.sources.folder import PictureFolder
from jax_distill.runs import checks
from jax_distill.storage import files, paths
from jax_distill.worlds.flux.world import Flux


def ask_all(root, ask):
    """As `refused_weights.ask_all`."""
    _texts(root, ask)
    _pictures(root, ask)
    _captions(root, ask)
    _latents(root, ask)
    _words(root, ask)
    _mixtures(root, ask)


def _words(root, ask):
    config = base()
    with config.unlocked():
        config.data.path, config.data.resolution = str(root / "words"), (32, 32)
        config.samples.prompts = 1
    world = Flux(config)
    world.folder = root / "ported"
    for embedding, caption in (("prepared", "a fox"), ("training", "")):
        config.data.embedding = embedding
        shutil.rmtree(root / "words", ignore_errors=True)
        rows = [records.LatentRecord(np.zeros((4, 8), np.float16), caption)]
        made_records.write(root / "words", rows, {"resolution": [32, 32]})
        ask(world.check, records.LatentRecords(root / "words"), str(root / "words"))


def _mixtures(root, ask):
    ask(folders.weighed, "a,b", (1.0,))
    ask(folders.weighed, "a,./a", (1.0, 1.0))
    ask(folders.weighed, "a,,b", (1.0, 1.0, 1.0))
    ask(mixture.rounds, (1e-6, 1.0))
    config = base()
    config.objective.name = "flow_matching"
    made_records.write(root / "foxes", embedded(2), {"world": "flux"}, null=null())
    config.data.path = str(root / "foxes")
    ask(checks.check_folders, config, worlds.of(config))
    with config.unlocked():
        config.data.path = f"{root / 'foxes'},{root / 'hares'}"
        config.world, config.data.resolution = "flux", (32, 32)
        config.data.text_length = len(null().sequence[0])
        config.samples.prompts = 1
    facts = {"world": "flux", "resolution": [32, 32], "encoders": {"t5": "another"}}
    made_records.write(root / "hares", embedded(2), facts, null=null())
    world = Flux(config)
    world.folder = root / "ported"
    world.__dict__["_described"] = {
        "parts": {"t5": {"d_model": null().sequence.shape[-1]}, "clip": {"hidden_size": 1}}
    }
    ask(world.check, records.LatentRecords(root / "hares"), str(root / "hares"))
    first, second = embedded(2)
    strange = second._replace(latents=np.full((4, 8), np.nan, np.float16))
    made_records.write(root / "damaged", [first, strange], null=null())
    source = EmbeddedLatents(records.LatentRecords(root / "damaged"))
    ask(next, batches(source, 2, 0, damaged_share=0.01))


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
    path.write_bytes(tiff(deep_colours(), "<", planes=True))
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
    made_records.write(good, embedded(2), null=null())
    ask(records.LatentRecords, root)

    def damaged(change, read=records.LatentRecords):
        shutil.copytree(good, bad)
        change(json.loads((bad / manifest.DESCRIPTION).read_text()))
        ask(read, bad)
        shutil.rmtree(bad)

    def described(**changes):
        damaged(lambda old: files.write_json(bad / manifest.DESCRIPTION, {**old, **changes}))

    def renamed(old):
        old["shards"]["latents"][0]["name"] = "../a"
        files.write_json(bad / manifest.DESCRIPTION, old)

    def changed(old):
        content = bytearray((bad / SHARD).read_bytes())
        content[len(content) // 2] ^= 1
        (bad / SHARD).write_bytes(content)

    size = (good / SHARD).stat().st_size
    described(shards="latents")
    damaged(lambda _: files.write_json(bad / manifest.DESCRIPTION, {"shards": ["a"]}))
    damaged(renamed)
    described(examples=5)
    damaged(lambda _: (bad / SHARD).unlink())
    damaged(lambda _: (bad / SHARD).write_bytes(bytes(70_000)))
    damaged(lambda _: (bad / SHARD).write_bytes(bytes(size)))
    damaged(changed, manifest.verify)
    first, second = embedded(2)
    strange = second._replace(latents=np.full((4, 8), np.nan, np.float16))
    made_records.write(bad, [first, strange], null=null())
    ask(lambda: records.LatentRecords(bad)[1])
    shutil.rmtree(bad)
    wide = second._replace(pooled=second.pooled[:2])
    made_records.write(bad, [first, wide], null=null())
    ask(lambda: records.LatentRecords(bad)[1])
    fields = {"at": 1, "key": "a", "caption": 0, "latents": first.latents}
    replace(bad / SHARD, [pack({**fields, "of": bytes(8)})] * 2)
    ask(lambda: records.LatentRecords(bad)[0])
    ask(lambda: records.LatentRecords(bad)[1])
    (bad / manifest.NULL).write_bytes(bytes((bad / manifest.NULL).stat().st_size))
    ask(lambda: records.LatentRecords(bad).null)
    begun = root / "begun"
    Making(begun, {"steps": 2})
    (begun / SHARD).touch()
    ask(Making, begun, {"steps": 3})
