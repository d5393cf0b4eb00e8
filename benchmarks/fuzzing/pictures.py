"""Folders of pictures with captions, as people have them."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fuzzing import package
from fuzzing.kind import OUTSIDE, Kind, decoded, lines_of
from fuzzing.mutations import (
    PAYLOADS,
    SECRET,
    damage_bytes,
    damage_file,
    damage_lines,
    damage_png,
    encoded,
    large_png,
)

SIZE = (24, 20)  # width, height
_LARGE = 0.01  # of the pictures are small files of very many pixels
_LARGEST = 10**7  # pixels that the viewer below looks at
_MEAN, _MOST = 3.0, 80  # of 255: what roundings, and their order, may change


def _ramp(bits: int = 8, channels: int = 3) -> np.ndarray:
    """A smooth picture (H, W, channels)."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    planes = [x / width, y / height, (x + y) / (width + height), (height - y) / height]
    values = np.stack(planes[:channels], -1) * (2**bits - 1)
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def _samples() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Pictures of many modes, by file names."""
    rgb, grey = Image.fromarray(_ramp()), Image.fromarray(_ramp(channels=1)[..., 0])
    alpha = Image.fromarray(_ramp(channels=4), "RGBA")
    palette = rgb.quantize(16)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "rgb.png": (rgb, {}),
        "rgba.png": (alpha, {}),
        "grey.png": (grey, {}),
        "grey_alpha.png": (alpha.convert("LA"), {}),
        "grey16.png": (Image.fromarray(_ramp(16, 1)[..., 0]), {}),
        "bits.png": (grey.convert("1"), {}),
        "palette.png": (palette, {}),
        "palette_alpha.png": (palette, {"transparency": bytes([0, 128, 255, 9])}),
        "palette_key.png": (palette, {"transparency": 3}),
        "grey_key.png": (grey, {"transparency": 100}),
        "rgb.jpg": (rgb, {"quality": 90}),
        "turned.jpg": (rgb, {"exif": orientation}),
        "grey.jpeg": (grey, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "rgb.webp": (rgb, {"quality": 90}),
        "rgba.webp": (alpha, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (palette, {}),
        "bits.bmp": (grey.convert("1"), {}),
        "named.png": (rgb, {"format": "GIF"}),
        "tiff16.png": (Image.fromarray(_ramp(16, 1)[..., 0]), {"format": "TIFF"}),
        "float.png": (grey.convert("F"), {"format": "TIFF"}),
        "lab.png": (rgb.convert("LAB"), {"format": "TIFF"}),
        "moving.png": (rgb, {"save_all": True, "append_images": [rgb.transpose(0)]}),
        "moving.webp": (rgb, {"save_all": True, "append_images": [rgb.transpose(0)]}),
    }


def _outside(root: Path) -> None:
    (root / OUTSIDE).mkdir()
    (root / OUTSIDE / "secret.txt").write_text(SECRET)
    Image.new("RGB", SIZE, "lime").save(root / OUTSIDE / "other.png")


def _make_pictures(root: Path) -> None:
    _outside(root)
    for name, (image, options) in _samples().items():
        folder = root / name.replace(".", "_")
        folder.mkdir()
        image.save(folder / name, **options)
        (folder / name).with_suffix(".txt").write_text("a ramp")


def _picture(folder: Path) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.suffix != ".txt")


def _damage_picture(rng: Random, folder: Path) -> None:
    path = _picture(folder)
    if rng.random() < _LARGE:
        path.write_bytes(large_png(rng)[0])
        return
    is_png = path.read_bytes().startswith(b"\x89PNG")
    other = rng.choice(sorted(folder.parent.rglob("*.*"))).read_bytes()[:4000]
    damage = damage_png if is_png and rng.random() < 0.7 else _spliced(other)
    damage_file(rng, path, damage)


def _spliced(other: bytes) -> Any:
    return lambda rng, content: damage_bytes(rng, content, other)


def _read_pictures(rng: Random, folder: Path) -> Any:
    height, width = rng.choice(((20, 24), (24, 20), (16, 16), (32, 48), (1, 1)))
    return [
        (found, package.read_picture(found.path, height, width))
        for found in package.find_pictures(folder)
    ]


def viewed(path: Path, height: int, width: int) -> np.ndarray | None:
    """A picture as a viewer shows it on white, (height, width, 3) of 255; None: viewers differ."""
    with Image.open(path) as image:
        if image.width * image.height > _LARGEST:
            return None
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        pixels = np.asarray(upright.convert("RGBA"), np.float64)
    elif upright.mode.startswith("I;16"):
        values = np.asarray(upright, np.float64)
        pixels = np.stack([values / 257] * 3 + [np.full_like(values, 255)], -1)
        if (key := upright.info.get("transparency")) is not None:
            pixels[..., 3] = np.where(values == key, 0, 255)
    elif upright.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        pixels = np.asarray(upright.convert("RGB").convert("RGBA"), np.float64)
    else:
        return None
    share = pixels[..., 3:] / 255
    flat = np.rint(pixels[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
    fitted = ImageOps.fit(Image.fromarray(flat), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float64)


def _differs_pictures(value: Any, folder: Path, base: Path) -> str:
    for found, array in value:
        if found.caption != "a ramp" and found.path == _picture(folder):
            return "the caption is another"
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            return f"a picture of {array.shape} {array.dtype}"
        try:
            wanted = viewed(found.path, *array.shape[:2])
        except Exception as error:
            return f"a viewer shows nothing: {type(error).__name__}"
        if wanted is None:
            continue
        error = np.abs(wanted - array)
        if error.mean() > _MEAN or error.max() > _MOST:
            with Image.open(found.path) as image:
                return f"a viewer shows something else ({image.format}, {image.mode})"
    return ""


# Metadata


CAPTIONS = {"a.png": "a red circle", "b.png": "zwei blaue Würfel", "c.jpg": 'so-called "art", 3'}


def _make_metadata(root: Path) -> None:
    _outside(root)
    folder = root / "folder"
    (folder / "more").mkdir(parents=True)
    for name in (*CAPTIONS, "more/d.png"):
        Image.fromarray(_ramp()).save(folder / name)
    lines = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]
    lines += [{"file_name": "more/d.png", "text": "below", "width": 24}]
    text = "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines))
    (folder / "metadata.jsonl").write_text(text)


def _damage_metadata(rng: Random, folder: Path) -> None:
    fitting = ("file_name", "text", *CAPTIONS, "more/d.png", "A.png", f"../{OUTSIDE}/other.png")
    fitting += (f"../{OUTSIDE}/secret.txt", "/dev/zero", "more", "./a.png", "a.png\x00", "caption")
    fitting += (
        "more/../b.png",
        ["a", "b"],
        3,
        None,
        {"en": "a"},
        True,
        "file_name ",
        "metadata.jsonl",
    )
    damage_file(
        rng, folder / "metadata.jsonl", lambda rng, content: damage_lines(rng, content, fitting)
    )


def _differs_metadata(value: Any, folder: Path, base: Path) -> str:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return "captions of no file"
    text = decoded(path.read_bytes())
    if text is None:
        return "read what is no text"
    said = []
    for line in lines_of(text):
        if line.strip():
            try:
                entry = json.loads(line)
                name = entry["file_name"] if "file_name" in entry else entry["image"]
                said.append((folder / name, entry["text" if "text" in entry else "caption"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                return "read what is no description"
    if len(said) != len(value):
        return f"{'fewer' if len(value) < len(said) else 'more'} pictures than are described"
    for (wanted, caption), (found, _) in zip(sorted(said, key=str), sorted(value, key=str)):
        if not isinstance(caption, str):
            return f"a caption is no text but {type(caption).__name__}"
        if found.caption not in (caption, caption.strip()):
            return "a caption is another"
        if found.path.resolve() != wanted.resolve():
            return "a picture is another"
    return ""


# Captions


TEXTS = {"a": "a red circle\n", "b": "zwei blaue Würfel, 3", "c": "a\nb\n", "d": "日本の絵"}
FILE = "captions.lines"


def _make_captions(root: Path) -> None:
    _outside(root)
    folder = root / "folder"
    folder.mkdir()
    for name, text in TEXTS.items():
        Image.fromarray(_ramp()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    (folder / FILE).write_text("".join(f"{text}\n" for text in TEXTS.values()))


def _damage_captions(rng: Random, folder: Path) -> None:
    name = rng.choice((*(f"{name}.txt" for name in TEXTS), *[FILE] * 4))

    def damage(rng: Random, content: bytes) -> bytes:
        kind = rng.randrange(6)
        if kind == 0:
            return damage_bytes(rng, content)
        if kind == 1:
            return encoded(rng, content.decode())
        if kind == 2:
            return rng.choice(
                (*PAYLOADS, "", " \n", "\0", "a" * 10**6, "\u2028", "\ufeff")
            ).encode()
        return damage_lines(rng, content)

    damage_file(rng, folder / name, damage)


def _read_captions(rng: Random, folder: Path) -> Any:
    """The captions beside pictures, and those of the file; what is damaged decides which."""
    touched = (folder / FILE).is_file() and (folder / FILE).stat().st_size < 10**8
    base = "".join(f"{text}\n" for text in TEXTS.values()).encode()
    if not touched or (folder / FILE).read_bytes() != base:
        return package.read_captions(folder / FILE)
    return package.find_pictures(folder)


def _differs_captions(value: Any, folder: Path, base: Path) -> str:
    if value and isinstance(value[0], str):
        text = decoded((folder / FILE).read_bytes())
        if text is None:
            return "read what is no text"
        said = [line.strip() for line in lines_of(text) if line.strip()]
        return "" if value == said else "captions are others than the lines"
    for found in value:
        text = decoded(found.path.with_suffix(".txt").read_bytes())
        if text is None:
            return "read what is no text"
        if found.caption.replace("\r\n", "\n") != text.strip().replace("\r\n", "\n"):
            return "a caption is another than the text"
    return ""


KINDS = {
    "pictures": Kind(0.12, _make_pictures, _damage_picture, _read_pictures, _differs_pictures),
    "metadata": Kind(0.11, _make_metadata, _damage_metadata, _read_pictures, _differs_metadata),
    "captions": Kind(0.1, _make_captions, _damage_captions, _read_captions, _differs_captions),
}
