"""Pictures: every mode of Pillow is what a viewer shows on white, or refused by name."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from jax_distill.data import pictures
from jax_distill.storage.files import FileError

HEIGHT, WIDTH = 24, 40
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # grey, from black to white
DEEP = np.round(RAMP * 65535).astype(np.uint16)
RNG = np.random.default_rng(5)
ALPHA = RNG.choice([0, 1, 60, 128, 254, 255], (HEIGHT, WIDTH)).astype(np.uint8)


def grey(levels=255):
    return np.round(RAMP * levels).astype(np.uint8)


def colours(bands=3):
    waves = [np.roll(grey(), 7 * band, axis=band % 2) for band in range(bands)]
    return np.stack(waves, -1)


def on_white(values, alpha):
    """The oracle: v a + 255 (1 - a) in exact numbers."""
    share = alpha[..., None] / 255
    return np.round(np.atleast_3d(values).astype(float) * share + 255 * (1 - share))


def as_rgb(values):
    return np.repeat(values[..., None], 3, -1).astype(float)


def shown(path):
    return np.asarray(pictures.shown(path).image).astype(float)


def png(bits, kind, rows, *chunks):
    """A PNG of what Pillow cannot write: `rows` of bytes, `chunks` of (name, content)."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def palette():
    indices = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16
    table = RNG.integers(0, 256, (256, 3)).astype(np.uint8)
    made = Image.fromarray(indices.astype(np.uint8), "P")
    made.putpalette(table.tobytes())
    return made, table[indices], indices


MADE, TABLE, INDICES = palette()
RGB, RGBA = Image.fromarray(colours()), Image.fromarray(np.dstack([colours(), ALPHA]))
GREY, LA = Image.fromarray(grey()), Image.fromarray(np.dstack([grey(), ALPHA]), "LA")
PA = Image.merge("PA", (MADE, Image.fromarray(ALPHA)))
PA.putpalette(MADE.getpalette())
DEEP_ROWS = DEEP.astype(">u2").view(np.uint8)
EIGHT = np.round(DEEP / 257)
INK = colours(4)


def lab_to_srgb(lab):
    """CIE's formulas, D50, and Bradford's matrix to sRGB."""
    lightness, (a, b) = (
        lab[..., 0] / 2.55,
        np.moveaxis(lab[..., 1:].view(np.int8), -1, 0).astype(int),
    )
    y = (lightness + 16) / 116
    roots = np.stack([y + a / 500, y, y - b / 200], -1)
    cubes = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29))
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(cubes * [0.9642, 1, 0.8249] @ np.array(matrix).T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


LAB = np.dstack([grey(), np.full_like(grey(), 20), np.full_like(grey(), 246)])
INT = Image.fromarray(DEEP.astype(np.int32))

# Name: (ending, what is saved, its options, what is expected, levels that it may be off)
MODES = {
    "1": ("png", GREY.convert("1"), {}, as_rgb(np.asarray(GREY.convert("1")) * 255), 0),
    "L": ("png", GREY, {}, as_rgb(grey()), 0),
    "P": ("png", MADE, {}, TABLE, 0),
    "P in GIF": ("gif", MADE, {}, TABLE, 0),
    "P, one index": ("png", MADE, {"transparency": 3}, on_white(TABLE, 255 * (INDICES != 3)), 0),
    "P, bytes": (
        "png",
        MADE,
        {"transparency": bytes(range(0, 256, 17))},
        on_white(TABLE, INDICES * 17),
        1,
    ),
    "P in GIF, one index": (
        "gif",
        MADE,
        {"transparency": 5},
        on_white(TABLE, 255 * (INDICES != 5)),
        0,
    ),
    "PA": ("tif", PA, {}, on_white(TABLE, ALPHA), 1),
    "RGB": ("png", RGB, {}, colours(), 0),
    "RGB, a colour": (
        "png",
        RGB,
        {"transparency": tuple(int(v) for v in colours()[3, 4])},
        on_white(colours(), 255 * (colours() != colours()[3, 4]).any(-1)),
        0,
    ),
    "L, a level": (
        "png",
        GREY,
        {"transparency": 77},
        on_white(as_rgb(grey()), 255 * (grey() != 77)),
        0,
    ),
    "RGBA": ("png", RGBA, {}, on_white(colours(), ALPHA), 1),
    "RGBA in WebP": (
        "webp",
        RGBA,
        {"lossless": True, "exact": True},
        on_white(colours(), ALPHA),
        1,
    ),
    "RGBA in TIFF": ("tif", RGBA, {"compression": "tiff_lzw"}, on_white(colours(), ALPHA), 1),
    "LA": ("png", LA, {}, on_white(as_rgb(grey()), ALPHA), 1),
    "RGBX": ("tif", RGB.convert("RGBX"), {}, colours(), 0),
    "CMYK": (
        "tif",
        Image.fromarray(INK, "CMYK"),
        {},
        (255 - INK[..., :3].astype(float)) * (255 - INK[..., 3:].astype(float)) / 255,
        1,
    ),
    "YCbCr": ("tif", RGB.convert("YCbCr"), {}, colours(), 3),
    "LAB": ("tif", Image.frombytes("LAB", (WIDTH, HEIGHT), LAB.tobytes()), {}, lab_to_srgb(LAB), 6),
    "I": ("tif", INT, {}, as_rgb(EIGHT), 0),
    "I in PGM": ("pgm", INT, {}, as_rgb(EIGHT), 0),
    "I;16": ("png", Image.fromarray(DEEP), {}, as_rgb(EIGHT), 0),
    "I;16 in TIFF": ("tif", Image.fromarray(DEEP), {}, as_rgb(EIGHT), 0),
    "I;16B": ("tif", Image.fromarray(DEEP.astype(">u2")), {}, as_rgb(EIGHT), 0),
    "I;16 in JPEG 2000": ("jp2", Image.fromarray(DEEP), {}, as_rgb(EIGHT), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_what_a_viewer_shows(tmp_path, name):
    ending, image, options, expected, off = MODES[name]
    path = tmp_path / f"a.{ending}"
    image.save(path, **options)
    with Image.open(path) as saved:  # the file has the mode that it is to test
        assert saved.mode == name.split()[0].rstrip(",").replace("RGBX", "RGB")
    assert np.abs(shown(path) - expected).max() <= off
    same_size = pictures.read(path, HEIGHT, WIDTH)
    assert same_size.dtype == np.uint8
    np.testing.assert_array_equal(same_size, shown(path))


def deep_colours():
    return np.stack([np.roll(DEEP, 5 * band, axis=0) for band in range(3)], -1)


WRITTEN = {
    "grey of 16 bits, a level": (
        png(16, 0, DEEP_ROWS, (b"tRNS", struct.pack(">H", DEEP[4, 4]))),
        on_white(as_rgb(EIGHT), 255 * (DEEP != DEEP[4, 4])),
    ),
    "grey of 16 bits with alpha": (
        png(
            16,
            4,
            np.dstack([DEEP, ALPHA.astype(int) * 257])
            .astype(">u2")
            .view(np.uint8)
            .reshape(HEIGHT, -1),
        ),
        on_white(as_rgb(EIGHT), ALPHA),
    ),
    "colours of 16 bits": (
        png(16, 2, deep_colours().astype(">u2").view(np.uint8).reshape(HEIGHT, -1)),
        np.round(deep_colours() / 257),
    ),
    "grey of 4 bits, a level": (
        png(
            4,
            0,
            np.packbits(
                np.unpackbits(grey(15)[..., None], axis=-1)[..., 4:].reshape(HEIGHT, -1), axis=-1
            ),
            (b"tRNS", b"\0\5"),
        ),
        on_white(as_rgb(grey(15) * 17), 255 * (grey(15) != 5)),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_pngs_that_pillow_does_not_write(tmp_path, name):
    content, expected = WRITTEN[name]
    (tmp_path / "a.png").write_bytes(content)
    assert np.abs(shown(tmp_path / "a.png") - expected).max() <= 1


def tiff(colours, order, packed=False, planes=False):
    """A TIFF of 16 bits a colour, (H, W, 3)."""
    axes = (2, 0, 1) if planes else (0, 1, 2)
    data = colours.transpose(axes).astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if packed else data
    strips = 3 if planes else 1
    at = [8 + strip * (len(data) // strips) for strip in range(strips)]
    bits = 8 + len(data)
    tags = [
        (256, colours.shape[1]),
        (257, colours.shape[0]),
        (258, bits),
        (259, 8 if packed else 1),
    ]
    tags += [(262, 2), (273, at[0]), (277, 3), (279, len(data)), (284, 1 + planes)]
    more = struct.pack(f"{order}6H", 16, 16, 16, 0, 0, 0)
    if planes:
        tags[5], tags[7] = (273, bits + 12), (279, bits + 24)
        more += struct.pack(f"{order}6I", *at, *[len(data) // 3] * 3)
    counts = {258: 3, 273: strips, 279: strips}
    entries = [struct.pack(f"{order}HHII", tag, 4, counts.get(tag, 1), x) for tag, x in tags]
    entries[2] = struct.pack(f"{order}HHII", 258, 3, 3, bits)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", bits + len(more))
    return head + data + more + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4)


def test_colours_of_16_bits_are_rounded():
    colours = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    colours[0, 0] = 0x00FF, 0x80FF, 0xFE80
    expected = np.round(colours / 257)
    assert expected[0, 0].tolist() == [1, 128, 254]
    opaque = np.dstack([colours, np.full((HEIGHT, WIDTH), 65535)])
    grey = np.dstack([colours[..., 0], np.full((HEIGHT, WIDTH), 65535)])
    made = {
        "colours": (png(16, 2, as_rows(colours)), expected),
        "with alpha": (png(16, 6, as_rows(opaque)), expected),
        "grey with alpha": (png(16, 4, as_rows(grey)), as_rgb(expected[..., 0])),
        "TIFF": (tiff(colours, "<"), expected),
        "TIFF of the other order": (tiff(colours, ">"), expected),
        "packed TIFF": (tiff(colours, "<", packed=True), expected),
    }
    for name, (content, wanted) in made.items():
        found = np.asarray(pictures.shown(pictures.Encoded(content, name)).image)
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    with pytest.raises(FileError, match="^it is a TIFF with a plane of 16 bits for each colour"):
        pictures.shown(pictures.Encoded(tiff(colours, "<", planes=True), "it"))


def as_rows(values):
    """The rows of a PNG of 16 bits."""
    return values.astype(">u2").view(np.uint8).reshape(HEIGHT, -1)


def patched(tmp_path, image, tag, value):
    """A TIFF with one short entry changed."""
    path = tmp_path / "a.tif"
    image.save(path)
    content = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", content, 4)[0]
    for entry in range(struct.unpack_from("<H", content, start)[0]):
        if struct.unpack_from("<H", content, start + 2 + 12 * entry)[0] == tag:
            struct.pack_into("<H", content, start + 2 + 12 * entry + 8, value)
    path.write_bytes(content)
    return path


def test_white_may_be_zero(tmp_path):
    path = patched(tmp_path, Image.fromarray(DEEP), 262, 0)
    np.testing.assert_array_equal(shown(path), as_rgb(255 - EIGHT))
    path = patched(tmp_path, GREY, 262, 0)
    np.testing.assert_array_equal(shown(path), as_rgb(255 - grey()))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (Image.fromarray(RAMP.astype(np.float32)), "mode F,"),
        (Image.fromarray(DEEP.astype(np.int32) - 1), "mode I with values from -1 to 65534"),
        (Image.fromarray(DEEP.astype(np.int32) * 2), "mode I with values from 0 to 131070"),
    ],
)
def test_samples_without_an_agreed_range_are_refused(tmp_path, image, named):
    image.save(tmp_path / "a.tif")
    with pytest.raises(FileError, match=f"a.tif' is a picture of {named}.*8 or 16 bits"):
        pictures.shown(tmp_path / "a.tif")


def test_16_signed_bits_are_refused(tmp_path):
    plain = Image.fromarray(np.arange(0, 32768, 2048, dtype=np.uint16).reshape(4, 4))
    plain.save(tmp_path / "a.tif", tiffinfo={339: 1})
    assert pictures.shown(tmp_path / "a.tif").image.size == (4, 4)
    plain.save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(FileError, match="signed, whose values have no agreed range"):
        pictures.shown(tmp_path / "a.tif")


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    rows = deep_colours().astype(">u2").view(np.uint8).reshape(HEIGHT, -1)
    (tmp_path / "a.png").write_bytes(png(16, 2, rows, (b"tRNS", bytes(6))))
    with pytest.raises(FileError, match="RGB;16B with a transparent colour"):
        pictures.shown(tmp_path / "a.png")


def test_hidden_colours_leave_no_fringes(tmp_path):
    """Pixels that cannot be seen are red; made smaller, the picture has no red in it."""
    seen = np.zeros((64, 64), np.uint8)
    seen[16:48, 16:48] = 255
    image = np.zeros((64, 64, 4), np.uint8)
    image[..., 0] = np.where(seen, 90, 255)
    image[..., 1:3] = np.where(seen, 90, 0)[..., None]
    image[..., 3] = seen
    Image.fromarray(image).save(tmp_path / "a.png")
    small = pictures.read(tmp_path / "a.png", 20, 20).astype(int)
    assert np.ptp(small, axis=-1).max() == 0 and small[0, 0, 0] == 255 and small[10, 10, 0] == 90


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGBA.save(tmp_path / "a.png", exif=exif)
    # EXIF: where the first row and the first column of the file are in what is seen.
    turned = on_white(colours(), ALPHA)
    if orientation > 4:
        turned = turned.transpose(1, 0, 2)
    flip_rows, flip_columns = {
        1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)
    }[orientation]  # fmt: skip
    turned = turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    assert np.abs(shown(tmp_path / "a.png") - turned).max() <= 1


def test_exif_that_cannot_be_read_is_refused(tmp_path):
    RGB.save(tmp_path / "a.png", exif=b"Exif\0\0no EXIF at all")
    with pytest.raises(FileError, match="a.png' has EXIF data that cannot be read .*which side"):
        pictures.check(tmp_path / "a.png", 1, 1)


def profile(gamma, primaries=None):
    """A matrix profile (RGB; columns X, Y, Z of its primaries) or one of grey, of version 2."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + b"\0\0"

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    white = (0.9642, 1, 0.8249)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(78 + 4)
    tags = {b"wtpt": xyz(white), b"desc": text, b"cprt": b"text\0\0\0\0a\0\0\0"}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
        tags |= {n + b"XYZ": xyz(p) for n, p in zip((b"r", b"g", b"b"), primaries)}
    table, data = struct.pack(">I", len(tags)), b""
    begin = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", begin + len(data), len(content))
        data += content
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(
        ">I4sI4s4s4s", begin + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + xyz(white)[8:]
    return head + bytes(128 - len(head)) + table + data


WIDE = [(0.61, 0.31, 0.02), (0.205, 0.626, 0.061), (0.149, 0.063, 0.744)]  # AdobeRGB's


def expected_srgb(values, gamma, primaries):
    to_linear = np.array(primaries).T
    srgb = [[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    linear = ((values / 255) ** gamma) @ to_linear.T @ np.linalg.inv(srgb).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def test_profiles_are_followed(tmp_path):
    expected = expected_srgb(colours(), 2.2, WIDE)
    assert np.abs(expected - colours()).max() > 30
    RGB.save(tmp_path / "a.png", icc_profile=profile(2.2, WIDE))
    assert np.abs(shown(tmp_path / "a.png") - expected).max() <= 3
    RGBA.save(tmp_path / "b.png", icc_profile=profile(2.2, WIDE))
    assert np.abs(shown(tmp_path / "b.png") - on_white(expected, ALPHA)).max() <= 3
    linear = 255 * (grey() / 255) ** (1 / 2.4)
    GREY.save(tmp_path / "c.png", icc_profile=profile(1.0))
    assert np.abs(shown(tmp_path / "c.png") - as_rgb(linear))[grey() > 20].max() < 12
    assert shown(tmp_path / "c.png").mean() > grey().mean() + 30


def test_a_profile_that_is_srgb_changes_no_bit(tmp_path):
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (RGB, GREY):
        image.save(tmp_path / "a.png", icc_profile=own)
        assert pictures.shown(tmp_path / "a.png").notes == frozenset()
        np.testing.assert_array_equal(shown(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("broken", [b"no profile", profile(1.8, WIDE)[:200], profile(1.8)])
def test_a_profile_that_cannot_be_used_is_left_aside_and_told(tmp_path, broken):
    RGB.save(tmp_path / "a.png", icc_profile=broken)
    assert pictures.check(tmp_path / "a.png", 1, 1) == {pictures.PROFILE}
    np.testing.assert_array_equal(shown(tmp_path / "a.png"), colours())
    ink = Image.fromarray(INK, "CMYK")
    ink.save(tmp_path / "a.tif", icc_profile=profile(2.2, WIDE))
    assert pictures.check(tmp_path / "a.tif", 1, 1) == {pictures.PROFILE}
    np.testing.assert_array_equal(shown(tmp_path / "a.tif"), np.asarray(ink.convert("RGB")))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken_and_told(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    GREY.convert("RGB").save(path, save_all=True, append_images=[RGB.copy()], **options)
    assert np.abs(shown(path) - as_rgb(grey())).max() <= 1
    assert pictures.check(path, 1, 1) == {pictures.FRAMES}


@pytest.mark.parametrize("ending", "png jpg webp avif gif tif bmp jp2 ppm qoi".split())
def test_a_file_that_is_cut_short_is_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RNG.integers(0, 256, (90, 80, 3)).astype(np.uint8)).save(path)
    pictures.check(path, 1, 1)
    content = path.read_bytes()
    for share in (0.2, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(FileError, match=rf"a.{ending}' cannot be read as a picture"):
            pictures.check(path, 1, 1)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (2, 900)])
def test_pictures_of_any_shape_are_fitted(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    assert (pictures.read(tmp_path / "a.png", 16, 32) == (10, 200, 30)).all()
    assert pictures.check(tmp_path / "a.png", 16, 32) == {pictures.SMALL}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(FileError, match="a.png' is no regular file"):
        pictures.check(tmp_path / "a.png", 1, 1)
    with pytest.raises(FileError, match="b.png' is missing"):
        pictures.check(tmp_path / "b.png", 1, 1)


def test_no_other_program_is_run(tmp_path):
    """PostScript under a picture's name would be Ghostscript's to draw."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(FileError, match="cannot identify"):
        pictures.check(tmp_path / "a.png", 1, 1)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((9000, 7200), {}, r"has 64.8 million pixels, more than the 64 million .*scale it down"),
        ((20000, 20000), {}, r"has 400.0 million pixels"),
    ],
)
def test_more_pixels_than_fit_are_refused_by_their_number(tmp_path, size, options, message):
    Image.new("1", size).save(tmp_path / "a.png", **options)
    with pytest.raises(FileError, match=message):
        pictures.check(tmp_path / "a.png", 1, 1)


def test_more_bytes_than_a_picture_has_are_refused(tmp_path):
    RGB.save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", pictures.FILE_BYTES)  # zeros, which take no room
    pictures.check(tmp_path / "a.png", 1, 1)
    os.truncate(tmp_path / "a.png", pictures.FILE_BYTES + 1)
    with pytest.raises(FileError, match="a.png' is larger than the 256 MiB"):
        pictures.check(tmp_path / "a.png", 1, 1)


def test_the_largest_pictures_take_less_than_a_gigabyte(tmp_path):
    Image.new("RGBA", (8000, 8000)).save(tmp_path / "a.png", compress_level=1)
    Image.new("RGB", (10500, 10400)).save(tmp_path / "b.jpg", progressive=True, subsampling=0)
    program = (
        "import sys, resource\n"
        "from jax_distill.data import pictures\n"
        "for path in sys.argv[1:]: assert pictures.read(path, 16, 16).shape == (16, 16, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    paths = [str(tmp_path / name) for name in ("a.png", "b.jpg")]
    # A shell in between: a child begins with the peak of its parent.
    command = ["sh", "-c", '"$@" & wait $!', "sh", sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**20


def test_scans_are_bounded(tmp_path):
    RGB.save(tmp_path / "a.jpg", progressive=True)
    content = (tmp_path / "a.jpg").read_bytes()
    pictures.check(tmp_path / "a.jpg", 1, 1)
    begin = content.index(b"\xff\xda")
    scan = content[begin : content.index(b"\xff", begin + 20)]
    (tmp_path / "a.jpg").write_bytes(content[:begin] + scan * 101 + content[begin:])
    with pytest.raises(FileError, match="more than the 100 scans"):
        pictures.check(tmp_path / "a.jpg", 1, 1)


def test_a_gamma_that_is_not_followed_is_told(tmp_path):
    rows = colours().reshape(HEIGHT, -1)
    for gamma, told in ((100000, {pictures.GAMMA}), (45455, set())):
        content = png(8, 2, rows, (b"gAMA", struct.pack(">I", gamma)))
        (tmp_path / "a.png").write_bytes(content)
        assert pictures.check(tmp_path / "a.png", 1, 1) == told


def test_warnings_of_pillow_are_its_own(tmp_path, recwarn):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0" + bytes(range(30))
    RGB.save(tmp_path / "a.jpg", exif=exif)
    MADE.save(tmp_path / "b.png", transparency=bytes(range(16)))
    for name in ("a.jpg", "b.png"):
        pictures.read(tmp_path / name, 16, 16)
    assert not recwarn.list


def test_good_pictures_are_as_they_were(tmp_path):
    """RGB without a profile: nothing but orientation and size is touched."""
    image = Image.fromarray(RNG.integers(0, 256, (70, 90, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    decoded = Image.open(buffer).convert("RGB")
    fitted = ImageOps.fit(decoded, (48, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.jpg", 32, 48), np.asarray(fitted))
