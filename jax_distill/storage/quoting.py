"""Untrusted text in programs and in Markdown: shown as it is, never taken as code or markup."""

import math
import re
import shlex
from typing import Any

_LENGTH = 500  # characters of a stranger's text; a longer one says nothing more
COMMAND = 10_000  # of a command, which must be whole
_MARKUP = re.compile(r"([\\`*<>&\[\]])")


def literal(name: str, value: Any) -> str:
    """A number as Python has it.

    Args:
      name: of the value, for the message.
      value: to be written.

    Raises:
      ValueError: it is no finite number of a size that numbers have.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e100 or not math.isfinite(value):
        raise ValueError(
            f"{name}: {shown(value)} is no number that a program can be written with; mend it in"
            " the configuration of what is exported"
        )
    # Number types of numpy and others may be printed in another way.
    return repr(int(value) if isinstance(value, int) else float(value))


def shown(value: Any) -> str:
    """A value for a message: in one line, shortened if it is long."""
    try:
        text = repr(value).replace("\n", " ")
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str, longest: int = _LENGTH) -> str:
    """Text without characters that break lines, move the cursor or reverse its direction.

    Args:
      text: of a stranger.
      longest: characters of it that are kept.
    """
    plain = "".join(x if x.isprintable() else " " for x in text[:longest])
    return " ".join(plain.split()) + ("..." if len(text) > longest else "")


def prose(text: str) -> str:
    """Text in a line of Markdown, in which it marks nothing up."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Text as code in a line of Markdown, whose end no backtick in it can be."""
    text = one_line(text, COMMAND)
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * next(n for n in range(1, len(runs) + 2) if n not in runs)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return fence + space + text + space + fence


def word(text: str) -> str:
    """Text as one word of a shell command; what is not printable is no part of it."""
    return shlex.quote(one_line(text, COMMAND))
