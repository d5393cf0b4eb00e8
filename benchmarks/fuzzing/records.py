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
_FIELDS = ("latents", "caption", "sequence", "pooled")


def _some(seed: int, count: int, embedded: bool) -> list:
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    made = []
    for index in range(count):
        text = (draw((3, 4), BFLOAT16), draw((5,), BFLOAT16)) if embedded else ()
        fields = (draw((4, 8), FLOAT16), f"caption {index}, a roté cercle", *text)
        made.append(package.records.LatentRecord(*fields))
    return made


def _make(root: Path) -> None:
    for name, seed, embedded in (("plain", 0, False), ("embedded", 1, True), (OUTSIDE, 2, False)):
        null = None
        if embedded:
            row = _some(3, 1, True)[0]
            null = package.records.Text(row.sequence[None], row.pooled[None])
        count = 6
        description = {"world": "flux" if embedded else "shapes", "examples": count, "seed": seed}
        package.write_records(root / name, _some(seed, count, embedded), description, null)
    (root / OUTSIDE / "secret.txt").write_text(SECRET)


def _damage(rng: Random, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if name.endswith(".array_record")]
    kind = rng.randrange(10)
    if kind < 4:
        fitting = (*shards, f"../{OUTSIDE}/{shards[0]}", f"../{OUTSIDE}/secret.txt", shards, [])
        fitting += ("/dev/zero", "shards", "dataset.json", "null.msgpack", "latents-*.array_record")
        fitting += (shards[0] + "@2", "gs://bucket/x", 10**9, f"/proc/self/cwd/{shards[0]}")
        damage_file(
            rng, folder / "dataset.json", lambda rng, content: damage_json(rng, content, fitting)
        )
    elif kind < 6:
        damage_file(rng, folder / rng.choice(names), damage_bytes, 0.2)
    elif kind < 7 and "null.msgpack" in names:
        path = folder / "null.msgpack"
        fields = serialization.msgpack_restore(path.read_bytes())
        path.write_bytes(_packed(rng, fields))
    else:  # records of other content under checksums that are right
        path = folder / rng.choice(shards)
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        index = rng.randrange(len(records))
        fields = serialization.msgpack_restore(records[index])
        records[index] = _packed(rng, fields)
        path.unlink()
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()


def _packed(rng: Random, fields: dict) -> bytes:
    """A record with a field of another kind, or other bytes."""
    name = rng.choice(list(fields))
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


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and not isinstance(a, np.ndarray) and a == b


def _raw(folder: Path) -> list[bytes]:
    shards = json.loads((folder / "dataset.json").read_bytes())["shards"]
    found = []
    for name in shards:
        reader = ArrayRecordReader(str(folder / name))
        found += reader.read_all()
        reader.close()
    return found


def _good(record: Any) -> bool:
    """Whether a record is one that `prepare` could have written."""
    latents = record.latents
    texts = [x for x in (record.sequence, record.pooled) if x is not None]
    return (
        isinstance(record.caption, str)
        and isinstance(latents, np.ndarray)
        and (latents.ndim, latents.dtype) == (2, FLOAT16)
        and all(isinstance(x, np.ndarray) and x.dtype == BFLOAT16 for x in texts)
        and all(np.isfinite(x.astype(np.float32)).all() for x in (latents, *texts))
    )


def _differs(value: Any, folder: Path, base: Path) -> str:
    originals = [_unpacked(content) for content in _raw(base)]
    try:  # what was written under right checksums
        written = [_unpacked(content) for content in _raw(folder)]
    except Exception:
        written = []
    for record in value.found:
        fields = {k: x for k, x in record._asdict().items() if x is not None}
        sources = (*originals, *written)
        if not any(
            fields.keys() == one.keys() and all(_equal(fields[k], one[k]) for k in fields)
            for one in sources
        ):
            return "a record is none of the data's"
        if not _good(record):
            return "a record is of other types, or not finite"
    if len({record.latents.shape for record in value.found}) > 1:
        return "records are of several shapes"
    if value.null is not None:
        try:
            said = _unpacked((folder / "null.msgpack").read_bytes())
            if not all(_equal(x, said[k]) for k, x in value.null._asdict().items()):
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
