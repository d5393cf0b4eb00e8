"""Pages of HTML that need no other file, rendered from `templates/`."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from jax_distill.evaluation import plots
from jax_distill.storage.files import check_regular, write_atomically

MAX_WIDTH = 2400  # px of a picture; wider ones are reduced, or a page of large ones gets too heavy
MAX_PIXELS = 10**8  # of a picture that is read at all
MAX_BYTES = 2**25  # of a file that is taken as it is

_TEMPLATES = Environment(
    loader=PackageLoader("jax_distill.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def listed(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Figure(NamedTuple):
    """A plot, as `plots.inline` makes it, and its caption."""

    caption: str
    plot: Markup


def write(path: Path, template: str, title: str, **content: Any) -> None:
    """Writes a page from a file of `templates/`; all text but that of `Markup` is escaped."""
    text = _TEMPLATES.get_template(template).render(title=title, plural=plural, **content)
    write_atomically(path, text + "\n")


def picture(path: Path) -> str | None:
    """A PNG file as a data URI, reduced if it is very wide; None if it cannot be read."""
    try:
        check_regular(path)
        # Of Pillow's many formats some run other programs.
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.load()
            if image.width <= MAX_WIDTH and path.stat().st_size <= MAX_BYTES:
                return plots.data_uri(path.read_bytes(), "image/png")
            width = min(image.width, MAX_WIDTH)
            height = max(1, round(image.height * width / image.width))
            content = io.BytesIO()
            reduced = image.convert("RGB").resize((width, height))
            reduced.save(content, format="jpeg", quality=90)
            return plots.data_uri(content.getvalue(), "image/jpeg")
    # Pillow's errors for a file that is cut short, of another kind, or made to be too large.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
