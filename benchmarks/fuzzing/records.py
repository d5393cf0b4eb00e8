"""Folders of latents: ArrayRecord shards, whose records have checksums, and a description."""

import json
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from flax import serialization

from fuzzing import package
from fuzzing.kind import OUTSIDE, Kind
from fuzzing.mutations import SECRET, damage_bytes, damage_file, damage_json

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
_FIELDS = ("at", "of", "key", "latents", "caption", "sequence", "pooled")
_COUNT = 6


def _make(root: Path) -> None:
    kinds = {"plain": None, "shared": "shared", "kept": "kept", OUTSIDE: None}
    for seed, (name, padding) in enumerate(kinds.items()):
        rng = np.random.default_rng(seed)

        def draw(*shape: int, dtype: np.dtype = BFLOAT16, rng: Any = rng) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        null = padding and package.records.Text(draw(1, 3, 4), draw(1, 5))
        texts = [(draw(3, 4), draw(5)) if null else () for _ in range(_COUNT - 1)]
        texts.append(texts[0])  # a caption twice
        words = [f"caption {index % (_COUNT - 1)}, a roté cercle" for index in range(_COUNT)]
        written = [
            package.records.LatentRecord(draw(4, 8, dtype=FLOAT16), caption, f"{index}.png", *text)
            for index, (caption, text) in enumerate(zip(words, texts))
        ]
        rows = {caption: 1 + index % 3 for index, caption in enumerate(words)}
        package.write_records(
            root / name,
            written,
            {"world": "flux" if null else "shapes", "seed": seed},
            null=null or None,
            padding=padding or "kept",
            rows=rows if padding == "shared" else None,
            shard_records=3,
        )
    (root / OUTSIDE / "secret.txt").write_text(SECRET)


def _damage(rng: Random, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".array_record")]
    kind = rng.randrange(12)
    if kind < 4:
        fitting = (*shards, f"../{OUTSIDE}/{shards[0]}", f"../{OUTSIDE}/secret.txt", shards, [])
        fitting += ("/dev/zero", "shards", "dataset.json", "null.msgpack", "latents-*.array_record")
        fitting += (shards[0] + "@2", "gs://bucket/x", 10**9, f"/proc/self/cwd/{shards[0]}")
        damage_file(
            rng, folder / "dataset.json", lambda rng, content: damage_json(rng, content, fitting)
        )
    elif kind < 6:
        damage_file(rng, folder / rng.choice(names), damage_bytes, 0.2)
        if rng.random() < 0.7:
            _tell_sizes(folder)
    elif kind < 7 and "null.msgpack" in names:
        path = folder / "null.msgpack"
        path.write_bytes(_packed(rng, serialization.msgpack_restore(path.read_bytes())))
        _tell_sizes(folder)
    elif kind < 8:  # shards that change places, or come from elsewhere
        one, other = rng.choice(shards), rng.choice(shards)
        from_there = folder.parent / OUTSIDE / other
        content = (folder / one).read_bytes()
        if rng.random() < 0.5 and from_there.exists():
            (folder / one).write_bytes(from_there.read_bytes())
        else:
            (folder / one).write_bytes((folder / other).read_bytes())
            (folder / other).write_bytes(content)
        _tell_sizes(folder)
    else:  # records of other content under checksums that are right
        path = folder / rng.choice(shards)
        records = _read(path)
        index = rng.randrange(len(records))
        if rng.random() < 0.2:
            rng.shuffle(records)
        else:
            records[index] = _packed(rng, serialization.msgpack_restore(records[index]))
        path.unlink()
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()
        _tell_sizes(folder)


def _tell_sizes(folder: Path) -> None:
    """Puts the sizes of files into the manifest, so that reading goes further than these."""
    path = folder / "dataset.json"
    if not path.is_file():  # but a pipe, which would be waited for
        return
    try:
        described = json.loads(path.read_bytes())
        kinds = [*described["shards"].values(), [described["null"]] if "null" in described else []]
        for files in kinds:
            for file in files:
                file["bytes"] = (folder / file["name"]).stat().st_size
        path.write_text(json.dumps(described))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged itself
        return


def _read(path: Path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    return records


def _packed(rng: Random, fields: dict) -> bytes:
    """A record with a field of another kind, or other bytes."""
    name = rng.choice([*fields, *(key for key in fields if key != "at")])
    array = fields[name]
    kind = rng.randrange(8)
    if kind == 0:
        return damage_bytes(rng, serialization.msgpack_serialize(fields))
    if kind == 1:
        del fields[name]
    elif kind == 2:
        fields[rng.choice(("a", *_FIELDS))] = fields[name]
    elif kind < 5 and isinstance(array, np.ndarray):
        other = rng.choice(
            (array[0], array[None], array.astype(np.float32), array * np.nan, array[:0], array.T)
            + (array.astype(np.int8), array.astype(np.float64), array.tolist(), array[:2])
            + (array + np.asarray(1j), np.asarray(1.5, array.dtype), np.full_like(array, np.inf))
        )
        fields[name] = np.ascontiguousarray(other) if isinstance(other, np.ndarray) else other
    elif kind == 5:
        shape = rng.choice(((10**9, 10**9), (-1, 8), (2**40,), (4, 9)))
        name_of_type = rng.choice(("float16", "object", "bfloat16", "S10000000", "V8", "x"))
        content = msgpack.packb((shape, name_of_type, array if isinstance(array, bytes) else b"12"))
        fields = {key: _plain(value) for key, value in fields.items()}
        fields[name] = msgpack.ExtType(1, content)
        return msgpack.packb(fields, strict_types=True)
    elif kind == 6:
        depth = rng.choice((100, 600, 3000))
        return b"\x91" * depth + b"\x01" if rng.random() < 0.5 else b"\xdd\xff\xff\xff\xff"
    else:
        value = rng.choice((None, 1, b"\xff", "", "\x00", "a" * 10**5, [], {}, ["a"], {"a": 1}, -1))
        fields[name if rng.random() < 0.5 else "caption"] = value
    return serialization.msgpack_serialize(fields)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = (value.shape, value.dtype.name, value.tobytes())
        return msgpack.ExtType(1, msgpack.packb(content))
    return value


def _unpacked(content: bytes) -> dict:
    """A record's fields, read without flax."""

    def extended(code: int, data: bytes) -> Any:
        shape, name, raw = msgpack.unpackb(data)
        dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
        return np.frombuffer(raw, dtype).reshape(shape)

    return msgpack.unpackb(content, ext_hook=extended)


def _raw(folder: Path, kind: str) -> list[dict]:
    """The records of a kind, in the order of the manifest's shards."""
    shards = json.loads((folder / "dataset.json").read_bytes())["shards"][kind]
    return [_unpacked(content) for file in shards for content in _read(folder / file["name"])]


def _same(found: np.ndarray, said: Any) -> bool:
    return (
        isinstance(said, np.ndarray)
        and found.dtype == said.dtype
        and found.shape == said.shape
        and found.tobytes() == said.tobytes()
    )


def _texts(folder: Path) -> tuple[list[dict], np.ndarray | None]:
    """The captions of a folder, and the rows of its empty caption."""
    path = folder / "null.msgpack"
    null = _unpacked(path.read_bytes())["sequence"][0] if path.exists() else None
    return _raw(folder, "captions"), null


def _is_caption(record: Any, said: dict, null: np.ndarray | None) -> bool:
    """Whether a record has the words and numbers of a caption."""
    if record.caption != said["caption"] or (record.sequence is None) != ("sequence" not in said):
        return False
    if record.sequence is None:
        return record.pooled is None
    own = said["sequence"]
    whole = np.concatenate([own, null[len(own) :]]) if len(own) < len(null) else own
    return _same(record.sequence, whole) and _same(record.pooled, said["pooled"])


def _good(record: Any) -> bool:
    """Whether a record is one that `prepare` could have written."""
    latents = record.latents
    texts = [x for x in (record.sequence, record.pooled) if x is not None]
    return (
        isinstance(record.caption, str)
        and isinstance(record.key, str)
        and isinstance(latents, np.ndarray)
        and (latents.ndim, latents.dtype) == (2, FLOAT16)
        and all(isinstance(x, np.ndarray) and x.dtype == BFLOAT16 for x in texts)
        and all(np.isfinite(x.astype(np.float32)).all() for x in (latents, *texts))
    )


def _differs(value: Any, folder: Path, base: Path) -> str:
    versions = []  # what was written at first, and what lies there now, under right checksums
    for each in (base, folder):
        try:
            versions.append((_raw(each, "latents"), *_texts(each)))
        except Exception:
            continue
    for index, record in enumerate(value.found):
        examples = [latents[index] for latents, _, _ in versions if index < len(latents)]
        said = [
            example
            for example in examples
            if example.get("at") == index
            and example.get("key") == record.key
            and _same(record.latents, example.get("latents"))
        ]
        if not said:
            return "an example is none of the data's"
        texts = [(texts[x["caption"]], nulls) for x in said for _, texts, nulls in versions]
        if not any(_is_caption(record, text, null) for text, null in texts):
            return "a caption is none of the data's"
        if not _good(record):
            return "a record is of other types, or not finite"
    if len({record.latents.shape for record in value.found}) > 1:
        return "records are of several shapes"
    if value.null is not None:
        try:
            said = _unpacked((folder / "null.msgpack").read_bytes())
            if not all(_same(x, said[k]) for k, x in value.null._asdict().items()):
                return "the empty caption is another"
        except Exception as error:
            return f"the empty caption is read where it is none: {type(error).__name__}"
        for x in value.null:
            if not isinstance(x, np.ndarray) or x.dtype != BFLOAT16:
                return "the empty caption is of other types"
            if not np.isfinite(x.astype(np.float32)).all():
                return "the empty caption is not finite"
    return ""


KINDS = {
    "records": Kind(
        0.12, _make, _damage, lambda rng, folder: package.read_records(folder), _differs
    )
}
