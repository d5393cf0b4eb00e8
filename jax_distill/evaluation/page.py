"""Pages of HTML that need no other file, and the small things they are made of."""

import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from jax_distill.evaluation import plots
from jax_distill.storage.files import check_regular, write_atomically

MAX_WIDTH = 2400  # px of a picture; wider ones are reduced, or a page of large ones gets too heavy
MAX_PIXELS = 10**8  # of a picture that is read at all
MAX_BYTES = 2**25  # of a file that is taken as it is


def write(path: Path, title: str, body: str) -> None:
    """Writes a page whose body is HTML and whose title is not."""
    write_atomically(path, _PAGE.substitute(title=escape(title), body=body))


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


def figure(image: str, caption: str) -> str:
    """`image` is HTML; `caption` is not."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>"


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


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --ink: #1f2328; --faint: #59636e; --line: #d8dee4; --page: #ffffff; --accent: #0a58b8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --page: #0d1117; --accent: #6cb0ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: 1.25rem; }
p { max-width: 44rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.note { margin-top: .75rem; color: var(--faint); font-size: .875rem; }
.tiles { margin: 1.25rem 0 0; }
.tiles p, .tiles dt { margin: 0 0 .25rem; color: var(--faint); font-size: .875rem; }
.tiles dl { display: flex; flex-wrap: wrap; gap: .5rem clamp(1.25rem, 5vw, 2.5rem); margin: 0; }
.tiles dd { margin: 0; color: var(--accent); font-size: clamp(1.5rem, 6vw, 2rem);
  font-weight: 600; line-height: 1.1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 500; }
tbody th, thead th[scope=row] { padding-left: 0; text-align: left; }
thead th { color: var(--faint); }
thead th[scope=colgroup] { text-align: center; }
.scores tbody tr:first-child > * { font-weight: 700; }
colgroup + colgroup + colgroup { border-left: 1px solid var(--line); }
.settings { font: .8125rem/1.4 ui-monospace, monospace; }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { margin-bottom: .35rem; font-size: .875rem; font-weight: 600; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; }
.plots { display: grid; gap: 1.75rem 2rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.small figcaption { font-weight: 400; font-family: ui-monospace, monospace; }
.grid img { width: auto; max-width: max(100%, 62rem); border-radius: 6px; }
details { margin-top: 1rem; }
details > figure { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 30rem) {
  table { font-size: .875rem; }
  th, td { padding: .3rem .35rem; }
}
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
