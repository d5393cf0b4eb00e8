"""Pictures on disk: captioned grids of generated images, written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import IdentityTransform

from jax_distill.evaluation import png

# Sizes are in pixels and for pictures of this width; with wider ones all grows alike.
PICTURE_WIDTH = 128
GAP = 8
MARGIN = 16
ROW_LABEL_WIDTH = 92
CAPTION_LINES = 8  # longer texts end in an ellipsis

INK = "#1f2328"
DPI = 128  # a power of two: pixels become inches and back without rounding


def save_grid(
    path: str | Path,
    rows: Sequence[np.ndarray],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Writes rows of pictures as a labelled PNG, each enlarged by a whole number without blur.

    Args:
      path: of the PNG; its folder is made.
      rows: arrays (n, H, W, 3) uint8, all of one shape.
      row_labels: one a row, e.g. "student, 2 steps"; a line may end after a comma.
      column_labels: n captions, above the columns.
      title: above all.

    Raises:
      ValueError: no pictures, pictures of another shape or type, labels of another number, or a
        name that does not end in ".png".
    """
    rows = [_checked(row, f"rows[{index}]") for index, row in enumerate(rows)]
    if not rows:
        raise ValueError("rows: no pictures to show")
    for index, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise ValueError(f"rows[{index}] has shape {row.shape}, rows[0] has {rows[0].shape}")
    if len(row_labels) != len(rows):
        raise ValueError(f"row_labels: {len(row_labels)} labels for {len(rows)} rows")
    columns = len(rows[0])
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"column_labels: {len(column_labels)} labels for {columns} columns")

    scale, width, height, unit = _enlarged(rows[0])
    gap, margin = round(GAP * unit), round(MARGIN * unit)
    row_text, caption_text, title_text = (text.scaled(unit) for text in (ROW, CAPTION, TITLE))
    names = [
        row_text.wrap(label.replace(", ", ",\n"), round(ROW_LABEL_WIDTH * unit))
        for label in row_labels
    ]
    captions = [caption_text.wrap(label, width - gap) for label in column_labels or []]
    left = margin + max(row_text.width(lines) for lines in names) + gap
    page_width = left + columns * (width + gap) - gap + margin
    heading = title_text.wrap(title or "", page_width - 2 * margin)

    captions_bottom = margin + title_text.height(heading) + gap * bool(heading)
    captions_bottom += max((caption_text.height(lines) for lines in captions), default=0)
    y = captions_bottom + gap * bool(captions)
    heights = [max(height, row_text.height(lines)) for lines in names]
    page = _Page(page_width, y + sum(heights) + gap * (len(rows) - 1) + margin)
    page.text(heading, margin, margin, title_text)
    for column, lines in enumerate(captions):  # they stand on their pictures
        x = left + column * (width + gap)
        page.text(lines, x, captions_bottom - caption_text.height(lines), caption_text, width)
    for row, lines, row_height in zip(rows, names, heights):
        page.text(lines, margin, y + (row_height - row_text.height(lines)) // 2, row_text)
        for column, picture in enumerate(row):
            x = left + column * (width + gap)
            page.picture(picture, scale, x, y + (row_height - height) // 2)
        y += row_height + gap
    png.save(path, page.pixels())


def save_pictures(path: str | Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Writes one picture as it is, or several as a near-square grid with their captions below.

    Args:
      path: of the PNG; its folder is made.
      images: (n, H, W, 3) uint8.
      captions: n strings, used when n > 1.

    Raises:
      ValueError: no pictures, pictures of another type, another number of captions, or a name
        that does not end in ".png".
    """
    images = _checked(images, "images")
    if len(captions) != len(images):
        raise ValueError(f"captions: {len(captions)} captions for {len(images)} pictures")
    if len(images) == 1:
        png.save(path, images[0])
        return
    scale, width, height, unit = _enlarged(images)
    gap, margin = round(GAP * unit), round(MARGIN * unit)
    caption_text = CAPTION.scaled(unit)
    wrapped = [caption_text.wrap(caption, width - gap) for caption in captions]
    columns = math.ceil(math.sqrt(len(images)))
    starts = range(0, len(images), columns)
    heights = [
        height + gap + max(caption_text.height(lines) for lines in wrapped[start : start + columns])
        for start in starts
    ]
    page = _Page(
        2 * margin + columns * (width + gap) - gap,
        2 * margin + sum(heights) + margin * (len(starts) - 1),
    )
    y = margin
    for start, row_height in zip(starts, heights):
        for column in range(min(columns, len(images) - start)):
            x = margin + column * (width + gap)
            page.picture(images[start + column], scale, x, y)
            page.text(wrapped[start + column], x, y + height + gap, caption_text, width)
        y += row_height + margin
    png.save(path, page.pixels())


def _checked(pictures: np.ndarray, name: str) -> np.ndarray:
    pictures = np.asarray(pictures)
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected (n, H, W, 3) uint8, got {pictures.shape} {pictures.dtype}"
        )
    if not pictures.size:
        raise ValueError(f"{name}: no pictures to show")
    return pictures


def _enlarged(pictures: np.ndarray) -> tuple[int, int, int, float]:
    """How often pixels are repeated, the width and height after it, and the unit of sizes."""
    scale = max(1, math.ceil(PICTURE_WIDTH / pictures.shape[2]))
    width, height = scale * pictures.shape[2], scale * pictures.shape[1]
    return scale, width, height, width / PICTURE_WIDTH


_RULER = FigureCanvasAgg(Figure((1, 1), dpi=DPI)).get_renderer()


@dataclass(frozen=True)
class _Text:
    """Style of text; sizes in pixels."""

    size: float
    weight: str = "normal"

    def scaled(self, unit: float) -> _Text:
        return replace(self, size=self.size * unit)

    @property
    def font(self) -> FontProperties:
        return FontProperties(size=self.size * 72 / DPI, weight=self.weight)

    @property
    def line_height(self) -> int:
        return math.ceil(1.4 * self.size)

    def height(self, lines: Sequence[str]) -> int:
        return len(lines) * self.line_height

    def width(self, lines: Sequence[str]) -> int:
        """Width of the widest line."""
        measure = _RULER.get_text_width_height_descent
        widths = (measure(line, self.font, ismath=False)[0] for line in lines)
        return math.ceil(max(widths, default=0))

    def wrap(self, text: str, width: int) -> list[str]:
        """Lines at most `width` wide; a word that is wider itself is broken."""
        lines: list[str] = []
        for paragraph in text.splitlines():
            line = ""
            words = paragraph.split()
            while words:
                word = words.pop(0)
                longer = f"{line} {word}" if line else word
                if self.width([longer]) <= width or len(longer) == 1:
                    line = longer
                elif line:
                    lines.append(line)
                    line = ""
                    words.insert(0, word)
                else:
                    fitting = self._fitting(word, width)
                    lines.append(word[:fitting])
                    words.insert(0, word[fitting:])
            lines += [line] if line else []
        if len(lines) > CAPTION_LINES:
            lines = lines[:CAPTION_LINES]
            last = lines[-1]
            while last and self.width([last + " …"]) > width:
                last = last.rpartition(" ")[0] or last[:-1]
            lines[-1] = last + " …"
        return lines

    def _fitting(self, word: str, width: int) -> int:
        """The number of letters of a too wide word that fit on a line, at least one."""
        count = 1
        while count < len(word) - 1 and self.width([word[: count + 1]]) <= width:
            count += 1
        return count


CAPTION, ROW, TITLE = _Text(12), _Text(13, "bold"), _Text(17, "bold")


class _Page:
    """A white canvas in pixels, with y down."""

    def __init__(self, width: int, height: int):
        self._height = height
        self._figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def picture(self, picture: np.ndarray, scale: int, x: int, y: int) -> None:
        """Puts (H, W, 3) with its upper left corner at (x, y)."""
        enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        self._figure.figimage(enlarged, x, self._height - y - len(enlarged), origin="upper")

    def text(
        self, lines: Sequence[str], x: int, y: int, text: _Text, width: int | None = None
    ) -> None:
        """Writes lines from (x, y) down, centred in `width` if that is given."""
        for index, line in enumerate(lines):
            self._figure.text(
                x if width is None else x + width / 2,
                self._height - y - index * text.line_height - text.size,
                line,
                transform=IdentityTransform(),
                ha="left" if width is None else "center",
                va="baseline",
                fontproperties=text.font,
                color=INK,
                parse_math=False,
            )

    def pixels(self) -> np.ndarray:
        """The page as (H, W, 3) uint8."""
        canvas = FigureCanvasAgg(self._figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
