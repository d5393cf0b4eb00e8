"""Captioned pictures in one file: tars, parquet and arrow files, compressed or not."""

import io
import tarfile
from pathlib import Path
from random import Random

import pyarrow as pa
from pyarrow import parquet

from fuzzing import package
from fuzzing.kind import OUTSIDE, Kind
from fuzzing.mutations import SECRET, damage_bytes, damage_file

_EXAMPLES = [(f"caption {i}, a roté cercle", Random(i).randbytes(200 + i)) for i in range(5)]
_CHECKED = ("a.parquet",)  # whose checksums tell all damage of contents
_COMPRESSED = ("b.arrow", "d.arrow")


def _make(root: Path) -> None:
    contents = {"type": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    pictures = [{"bytes": content, "path": None} for _, content in _EXAMPLES]
    captions = pa.array([caption for caption, _ in _EXAMPLES])
    plain = pa.table({"image": pa.array(pictures, **contents), "text": captions})
    views = pa.array([content for _, content in _EXAMPLES], pa.binary_view())
    viewed = pa.table({"image": views, "text": captions.cast(pa.string_view())})
    for name, rows, make, compression in (
        ("a.arrow", plain, pa.ipc.new_stream, None),
        ("b.arrow", plain, pa.ipc.new_stream, "zstd"),
        ("c.arrow", viewed, pa.ipc.new_stream, None),
        ("d.arrow", viewed, pa.ipc.new_file, "lz4"),
        ("e.arrow", plain, pa.ipc.new_file, None),
    ):
        path = root / name / name
        path.parent.mkdir(parents=True)
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as file, make(file, rows.schema, options=options) as writer:
            writer.write_table(rows, max_chunksize=2)
    path = root / "a.parquet" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(plain, path, row_group_size=2, write_page_checksum=True)
    path = root / "a.tar" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, (caption, content) in enumerate(_EXAMPLES):
            for ending, part in (("txt", caption.encode()), ("png", content)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    (root / OUTSIDE).mkdir()
    (root / OUTSIDE / "secret.txt").write_text(SECRET)


def _file(folder: Path) -> Path:
    return next(folder.iterdir(), folder / "a.parquet")  # damage may have taken it away


def _damage(rng: Random, folder: Path) -> None:
    damage_file(rng, _file(folder), damage_bytes)


def _read(rng: Random, folder: Path) -> list[tuple[str, bytes]]:
    return package.read_packed(_file(folder))


def _differs(value: list[tuple[str, bytes]], folder: Path, base: Path) -> str:
    path = _file(folder)
    if value == _EXAMPLES:
        return ""
    if path.name in _CHECKED:
        return "read in spite of checksums"
    content = path.read_bytes()
    if path.name not in _COMPRESSED and not all(picture in content for _, picture in value):
        return "a picture is not in the file"
    return ""


KINDS = {"packed": Kind(0.1, _make, _damage, _read, _differs)}
