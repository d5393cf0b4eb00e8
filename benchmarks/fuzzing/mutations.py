"""Damages to files: to their bytes, to what they hold as JSON, lines, pickles, PNG chunks, zips.

All of them take a `random.Random`, on which alone they depend.
"""

import io
import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

CANARY = "FUZZ_CANARY"
"""The file that payloads make where they run; the word is in each of them."""
SECRET = "root:x:0:0:fuzz-secret-of-another-folder"
"""The content of files that inputs point to and that are none of theirs."""
PAYLOADS = (
    f"\n__import__('os').system('touch {CANARY}')\n",
    f"x'); __import__('os').system('touch {CANARY}') #",
    f'"""\n__import__("os").system("touch {CANARY}")\n"""',
    f"1 + __import__('os').system('touch {CANARY}')",
    f"${{__import__('os').system('touch {CANARY}')}}",
    f"```\n\n```python\n__import__('os').system('touch {CANARY}')\n```\n",
    f"$(touch {CANARY})",
    f"; touch {CANARY} #",
    f"<script>{CANARY}</script>",
    f"{{0.__class__.{CANARY}}}",
)
_RAW = {  # what `json.dumps` does not write, by the word that stands for it
    "@deep-list@": "[" * 3000 + "]" * 3000,
    "@deeper-list@": "[" * 100_000 + "]" * 100_000,
    "@deep-table@": '{"a":' * 2000 + "1" + "}" * 2000,
    "@long-list@": "[" + "0," * 99_999 + "0]",
    "@digits@": "1" * 5000,
    "@beyond@": "1e999",
    "@zeros@": "-0",
    "@exponent@": "1E5",
    "@half-escape@": '"\\ud800x"',
}
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1.5, 1e-300, 1e308, -1e308),
    *(10**4, 10**8, 10**9, 2**31, 2**32, 2**63, 2**64, 10**30),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "0", "1", "1.0", "true", "null", "NaN", "a" * 100_000, "\x00", "\ud800"),
    *(
        "é",
        "日本",
        "\u2028",
        "\r",
        "\n",
        "../../etc/passwd",
        "/etc/passwd",
        "../outside/secret.txt",
    ),
    *("/dev/zero", ".", "..", "/", "~", "a/b", "a\\b", "%s", "{}", "FLOAT", "bfloat16", "float32"),
    *([], {}, [None], [1], ["a"], {"a": 1}, [[]], [1, 2, 3], [1, "a"]),
    *_RAW,
)
KEYS = ("", "a", "0", "1", "-1", "a.b", "__class__", "__init__", "self", "name", "_class_name", "é")


def _cut(rng: Random, size: int) -> tuple[int, int]:
    """A part of so many bytes: begin and end; most are short."""
    begin = rng.randrange(size + 1)
    length = rng.choice((1, 2, 4, 8, 16, 64, 256, size)) or 1
    return begin, min(size, begin + rng.randint(1, length))


def damage_bytes(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """One to three damages that know nothing of a format; `other` is what parts may come from."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        begin, end = _cut(rng, len(data))
        source, stop = _cut(rng, len(data))
        kind = rng.randrange(11)
        if kind == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            for _ in range(rng.randint(2, 30)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[begin:begin] = rng.randbytes(rng.choice((1, 2, 4, 16, 100)))
        elif kind == 3:
            del data[begin:end]
        elif kind == 4:
            del data[begin:]
        elif kind == 5:
            data[begin:begin] = data[source:stop]
        elif kind == 6:
            data[begin:end] = data[source:stop]
        elif kind == 7:
            data[begin:end] = bytes(end - begin)
        elif kind == 8:
            data[begin:end] = b"\xff" * (end - begin)
        elif kind == 9:
            mine, theirs = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
            data = data[:mine] + other[theirs:]
        elif begin + 4 <= len(data):
            number = rng.choice((0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
            data[begin : begin + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(data)


def encoded(rng: Random, text: str) -> bytes:
    """A text in an encoding that people have."""
    text = rng.choice((text, text, text.replace("\n", "\r\n"), text.replace("\n", "\r")))
    name = rng.choice(
        ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7")
    )
    return text.encode(name, "replace")


# JSON


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, dict):
        found += [place for key in value for place in _places(value[key], (*path, key))]
    elif isinstance(value, list):
        found += [place for i, x in enumerate(value) for place in _places(x, (*path, i))]
    return found


def _value(rng: Random, old: Any, values: Sequence[Any]) -> Any:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(PAYLOADS)
    if kind == 1:
        return [old] if rng.random() < 0.5 else {"value": old}
    if kind == 2:
        return str(old)
    if kind == 3 and isinstance(old, int | float):
        return rng.choice((-old, old + 1, old * 10**6, float(old), old / 3, bool(old)))
    if kind == 3 and isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), old * 50, "../" + old, old + "\n"))
    if kind == 4 and values:
        return rng.choice(list(values))
    return rng.choice(VALUES)


def _renamed(table: dict, old: str, new: str) -> dict:
    return {new if key == old else key: value for key, value in table.items()}


def damage_value(rng: Random, value: Any, values: Sequence[Any] = ()) -> Any:
    """Changes one place of what JSON holds; `values` are some that fit, or nearly."""
    value = json.loads(json.dumps(value))
    place = rng.choice(_places(value))
    if not place:
        return _value(rng, value, values) if rng.random() < 0.5 else value
    outer = value
    for key in place[:-1]:
        outer = outer[key]
    key, kind = place[-1], rng.randrange(10)
    if kind == 0:
        del outer[key]
    elif kind == 1 and isinstance(outer, dict):
        new = rng.choice((*KEYS, *PAYLOADS, key.upper(), key + " ", *map(str, values)))
        changed = _renamed(outer, key, new)
        outer.clear()
        outer.update(changed)
    elif kind == 2 and isinstance(outer, dict):
        outer[key + "@twice@"] = _value(rng, outer[key], values)  # see `dumped`
    elif kind == 2:
        outer.append(outer[key])
    elif kind == 3 and isinstance(outer, dict):
        outer[rng.choice((*KEYS, *map(str, values)))] = _value(rng, None, values)
    elif kind == 4 and len(outer) > 1:
        other = rng.choice(list(outer) if isinstance(outer, dict) else range(len(outer)))
        outer[key], outer[other] = outer[other], outer[key]
    else:
        outer[key] = _value(rng, outer[key], values)
    return value


def dumped(value: Any, **options: Any) -> str:
    """JSON, with what only a text can have: keys twice, deep nesting, numbers beyond all."""
    text = json.dumps(value, **options).replace('@twice@"', '"')
    for word, raw in _RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text


def damage_json(rng: Random, content: bytes, values: Sequence[Any] = ()) -> bytes:
    """A JSON file with places changed, or its text, or its bytes."""
    kind = rng.randrange(20)
    if kind == 0:
        return damage_bytes(rng, content)
    if kind == 1:
        return encoded(rng, content.decode())
    if kind == 2:
        return _damage_text(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2))):
        value = damage_value(rng, value, values)
    text = dumped(value, indent=rng.choice((None, 2)))
    if rng.random() < 0.1:  # unescaped, where that can be said in UTF-8
        text = dumped(value, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def _damage_text(rng: Random, content: bytes) -> bytes:
    """Signs of JSON dropped, doubled or replaced."""
    places = [m.span() for m in re.finditer(rb'[{}\[\]:,"]|[\d.eE+-]+', content)] or [(0, 0)]
    begin, end = rng.choice(places)
    new = rng.choice((b"", b"{", b"}", b"]", b",", b'"', b"'", b"null", b"NaN", b"0x10", b"01"))
    return content[:begin] + new + content[end:]


def damage_lines(rng: Random, content: bytes, values: Sequence[Any] = ()) -> bytes:
    """A file of lines, JSON or not, with a line changed, or all of them."""
    lines = content.split(b"\n")
    index, kind = rng.randrange(len(lines)), rng.randrange(16)
    line, place = lines[index], rng.randrange(len(lines[index]) + 1)
    if kind == 0:
        return damage_bytes(rng, content)
    if kind == 1:
        return encoded(rng, content.decode())
    if kind == 2:
        del lines[index]
    elif kind == 3:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    elif kind == 4:
        separators = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\x00")
        lines[index] = line[:place] + rng.choice(separators).encode() + line[place:]
    elif kind == 5:
        lines[index] = line[:place]
    elif kind == 6:
        lines[index : index + 2] = [b"".join(lines[index : index + 2])]
    elif kind == 7:
        odd = (b"", b" ", b"\t", b"{}", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"\xef\xbb\xbf")
        lines.insert(index, rng.choice(odd))
    elif kind == 8:
        lines[index] = line[:place] + rng.choice(PAYLOADS).encode() + line[place:]
    elif kind == 9:
        lines = [line + b"\r" for line in lines]
    elif kind == 10:
        lines[index] = damage_bytes(rng, line)
    elif kind == 11:
        lines[index] = (
            line[:place] + rng.choice(("é", "日", "\ufeff", "😀")).encode() + line[place:]
        )
    else:
        try:
            value = damage_value(rng, json.loads(line), values)
            ascii_only = rng.random() < 0.5
            lines[index] = dumped(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        except ValueError:
            lines[index] = rng.choice((b"", b"a" * 100_000, line * 3, line.upper()))
    return b"\n".join(lines)


# Weights


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file and the bytes of its tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined_safetensors(header: str, data: bytes, length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


TENSOR_NAMES = (
    *("transformer_blocks.99999999.attn.to_q.weight", "transformer_blocks.-1.x.weight"),
    *("single_transformer_blocks.99999999999999999999.norm.linear.weight", "a.qweight", "", "."),
    *("double_blocks.99999999.img_mod.lin.weight", "single_blocks.99999999.linear1.weight"),
    *("transformer_blocks.7.attn.to_q.weight", "timestep_embedder2.linear_1.weight"),
    *("logvar_linear.weight", "vae.a", "text_encoders.b", "model.diffusion_model.x.weight", "é"),
    *("transformer_blocks.0٣.attn.to_q.weight", "__metadata__", "../x", "x_embedder.weight"),
)


def damage_safetensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file with another header, or other bytes."""
    kind = rng.randrange(12)
    if kind < 2:
        return damage_bytes(rng, content)
    header, data = split_safetensors(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == 2:
        return joined_safetensors(
            json.dumps(header), data, rng.choice((0, 1, 10**8, 2**31, 2**63 - 1, 2**64 - 1))
        )
    if kind == 3:
        return joined_safetensors(
            damage_json(rng, json.dumps(header).encode()).decode("utf-8", "replace"), data
        )
    if kind == 4:  # a name of one that is there
        new = rng.choice((*TENSOR_NAMES, rng.choice(names), re.sub(r"\d+", "9", name)))
        header = {new if key == name else key: value for key, value in header.items()}
    elif kind == 5:  # one more, without bytes or with one row
        new, end = rng.choice((*TENSOR_NAMES, re.sub(r"\.\d+\.", ".9999999.", name))), len(data)
        header[new] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
        if rng.random() < 0.5:
            header[new] |= {"shape": [1], "data_offsets": [end, end + 4]}
            data += b"\0\0\x80\x3f"
    elif kind == 6:
        shape = header[name]["shape"]
        axis = rng.randrange(len(shape) + 1)
        sizes = (0, -1, 1, 2, 2**31, 2**62, 2**64, 10**12, 1.5, "4", None, True)
        header[name]["shape"] = [*shape[:axis], rng.choice(sizes), *shape[axis + 1 :]]
    elif kind == 7:
        codes = ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8", "F4", "C64", "x")
        header[name]["dtype"] = rng.choice(codes)
    elif kind == 8:
        offsets = header[name]["data_offsets"]
        numbers = (0, -1, 1, len(data), len(data) + 1, 2**63, 2**64, offsets[0] + 4, "0", None, 1.5)
        offsets[rng.randrange(2)] = rng.choice(numbers)
    elif kind == 9:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == 10:
        keys = ("time_scale", "guidance_factor", "objective", "guidance", "format", "a")
        value = rng.choice((*PAYLOADS, "1", "0", "-1", "nan", "inf", "1e400", "scm", "x", "1_0", 3))
        header["__metadata__"] = {**header.get("__metadata__", {}), rng.choice(keys): value}
    else:
        value = damage_value(rng, {name: header[name]})
        del header[name]
        header |= value if isinstance(value, dict) else {"a": value}
    return joined_safetensors(dumped(header), data)


_OPCODES = (
    b"cos\nsystem\n(X%s\x00\x00\x00%stR" % (bytes([len(f"touch {CANARY}")]), b"touch FUZZ_CANARY"),
    b"cbuiltins\neval\n(X\x1f\x00\x00\x00open('FUZZ_CANARY', 'w').close()tR",
    b"cposix\nsystem\n.",
    b"csubprocess\nPopen\n(X\x11\x00\x00\x00touch FUZZ_CANARYtR",
    b"ctorch.serialization\nload\n)R",
    b"ctorch\nload\n)R",
    b"cnumpy\nload\n)R",
    b"ccollections\nOrderedDict\n)R}b",
    b"r\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x07",
    b"r\xff\xff\xff\x00",
    b"p9999999999\n",
    b"p-1\n",
    b"j\xff\xff\xff\x7f",
    b"h\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\x00\x00\x00\x80",
    b"\x8a\xff" + b"\xff" * 255,
    b"X\xff\xff\xff\x7f",
    b"\x8d\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x8e\xff\xff\xff\x7f\x00\x00\x00\x00",
    b"\x96\xff\xff\xff\xff\x00\x00\x00\x00",
    b"\x95\xff\xff\xff\x7f\x00\x00\x00\x00",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"I" + b"9" * 6000 + b"\n",
    b"\x80\xc8",
    b"\x80\x05",
    b"\x82\x01",
    b"ios\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"(" * 5000,
    b"]" * 5000,
    b")\x81",
    b"b",
    b"R",
    b"0",
    b"2",
    b"Q",
    b"1",
    b"N",
    b"}",
    b"]",
    b"\x88",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b".",
)


def _positions(content: bytes) -> list[tuple[str, int]]:
    try:
        return [(op.name, place) for op, _, place in pickletools.genops(content)]
    except ValueError:
        return [("STOP", 0)]


def damage_pickle(rng: Random, content: bytes) -> bytes:
    """A pickle with opcodes put in, taken out, or with other arguments."""
    places = _positions(content)
    index, kind = rng.randrange(len(places)), rng.randrange(8)
    name, place = places[index]
    end = places[index + 1][1] if index + 1 < len(places) else len(content)
    if kind == 0:
        return damage_bytes(rng, content)
    if kind == 1:
        return content[:place] + content[end:]
    if kind == 2:
        return content[:end] + content[place:]
    if kind == 3:  # numbers: offsets, shapes, strides, counts
        numbers = [i for i, (op, _) in enumerate(places) if "INT" in op or op == "LONG1"]
        if numbers:
            index = rng.choice(numbers)
            place, end = places[index][1], places[index + 1][1]
            number = rng.choice((0, 1, -1, 2, 7, 10**6, 2**31, 2**40, 2**61, 2**62, 2**63, 2**200))
            data = pickle.encode_long(number)
            return content[:place] + pickle.LONG1 + bytes([len(data)]) + data + content[end:]
    if kind == 4:  # names of types
        found = list(re.finditer(rb"c(torch[\w.]*)\n(\w+)\n", content))
        if found:
            names = (b"LongStorage", b"FloatStorage", b"HalfStorage", b"BFloat16Storage",
                     b"UntypedStorage", b"ComplexFloatStorage", b"QInt8Storage", b"x")  # fmt: skip
            match = rng.choice(found)
            return content[: match.start(2)] + rng.choice(names) + content[match.end(2) :]
    return content[:place] + rng.choice(_OPCODES) + content[place:]


def damage_torch(rng: Random, content: bytes) -> bytes:
    """A file of `torch.save` with another pickle, other members, or other bytes."""
    kind = rng.randrange(10)
    if kind < 2:
        return damage_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    data = next(key for key in members if key.endswith("data.pkl"))
    compression = zipfile.ZIP_STORED
    if kind < 7:
        members[data] = damage_pickle(rng, members[data])
    elif kind == 7:
        members[name] = damage_bytes(rng, members[name])
    elif kind == 8:
        new = rng.choice(("data.pkl", "a/data.pkl", "../data.pkl", "/etc/x", "archive/data/0", "é"))
        members = {new if key == name else key: value for key, value in members.items()}
    else:
        compression = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED))
        if rng.random() < 0.5:
            del members[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for key, value in members.items():
            archive.writestr(zipfile.ZipInfo(key), value, compression)
        if rng.random() < 0.05:
            archive.writestr(data.replace("data.pkl", "data/99"), bytes(10**7))
    return out.getvalue()


# Pictures


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, whose checksums are right."""
    text = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        checksum = zlib.crc32(name + data)
        text += struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
    return text


def damage_png(rng: Random, content: bytes) -> bytes:
    """A PNG whose chunks say something else, under checksums that are right."""
    chunks = _chunks(content)
    index, kind = rng.randrange(len(chunks)), rng.randrange(9)
    name, data = chunks[index]
    if kind == 0:
        return damage_bytes(rng, content)
    if kind == 1:
        chunks[index] = name, damage_bytes(rng, data)
    elif kind == 2:
        del chunks[index]
    elif kind == 3:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[index])
    elif kind in (4, 5):
        header = bytearray(chunks[0][1].ljust(13, b"\0"))
        field = rng.randrange(7)
        sizes = (0, 1, 3, 2**14, 2**16, 10**5, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
        if field < 2:
            header[4 * field : 4 * field + 4] = struct.pack(">I", rng.choice(sizes))
        elif field == 2:
            header[:8] = struct.pack(">II", rng.choice(sizes), rng.choice(sizes))
        else:
            header[5 + field] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0] = b"IHDR", bytes(header)
    elif kind == 6:
        extra = (
            (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 7, 300)))),
            (b"PLTE", rng.randbytes(rng.choice((0, 3, 4, 768, 900)))),
            (b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + rng.randbytes(3)),
            (b"eXIf", rng.randbytes(20)),
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 10**7))),
            (b"iTXt", b"a\0\0\0\0\0" + rng.randbytes(10)),
            (b"acTL", struct.pack(">II", rng.choice((0, 1, 2**31)), 0)),
            (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 200)),
            (b"gAMA", rng.randbytes(4)),
        )
        chunks.insert(rng.randrange(1, len(chunks)), rng.choice(extra))
    elif kind == 7:
        chunks[index] = rng.randbytes(4), data
    else:
        body = b"".join(data for name, data in chunks if name == b"IDAT")
        try:
            body = zlib.compress(damage_bytes(rng, zlib.decompress(body)))
        except zlib.error:
            body = zlib.compress(b"")
        chunks = [c for c in chunks if c[0] != b"IDAT"]
        chunks.insert(-1, (b"IDAT", body))
    return png(chunks)


def large_png(rng: Random) -> tuple[bytes, tuple[int, int]]:
    """A small file of very many pixels, all zero, which is a good picture; and its size."""
    width, height = rng.choice(((9000, 9000), (13000, 13000), (60000, 2000), (30000, 30000)))
    depth, colour, samples = rng.choice(((1, 0, 1), (1, 3, 1), (8, 0, 1), (8, 2, 3), (16, 6, 4)))
    row = bytes(1 + (width * depth * samples + 7) // 8)
    deflate = zlib.compressobj(1)
    rows = 64
    body = b"".join(deflate.compress(row * rows) for _ in range(height // rows))
    body += deflate.compress(row * (height % rows)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = [(b"PLTE", bytes(6))] if colour == 3 else []
    return png([(b"IHDR", header), *palette, (b"IDAT", body), (b"IEND", b"")]), (width, height)


# Files


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            _gone(inner)
        path.rmdir()
    else:
        path.unlink()


def damage_path(rng: Random, path: Path) -> None:
    """Puts something else where a file was: a folder, a pipe, a link, nothing, endless bytes."""
    content = path.read_bytes()
    kind = rng.randrange(13)
    if kind == 11:
        name = rng.choice((b".DS_Store", b"._x.png", b"\xff\xfe.png", b"a\nb.txt", b"x.json"))
        Path(os.fsdecode(os.fsencode(path.parent) + b"/" + name)).write_bytes(b"\0\5\x16\7")
        return
    if kind == 12:
        other = path.with_name(
            rng.choice((path.name.upper(), path.name + "~", "copy " + path.name))
        )
        other.write_bytes(damage_bytes(rng, content))
        return
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("../outside/secret.txt" if rng.random() < 0.5 else "/etc/passwd")
    elif kind == 3:
        path.symlink_to(path.name)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6:
        path.write_bytes(content)
        os.truncate(path, 3 << 30)  # with a hole, which takes no room on the disk
    elif kind == 7:
        path.with_name(path.name.upper()).write_bytes(content)
    elif kind == 8:
        path.mkdir()
        (path / path.name).write_bytes(content)
    elif kind == 9:
        path.write_bytes(bytes(len(content)))


Damage = Callable[[Random, bytes], bytes]


def damage_file(rng: Random, path: Path, damage: Damage, share_of_paths: float = 0.06) -> None:
    """Damages a file's content, or now and then the file itself."""
    if rng.random() < share_of_paths:
        damage_path(rng, path)
    else:
        path.write_bytes(damage(rng, path.read_bytes()))
