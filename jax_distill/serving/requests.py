"""How requests are read, and who may send them; what is wrong is said in one sentence."""

import ipaddress
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jax_distill.serving.parameters import MOST_PICTURES, NAMES
from jax_distill.storage.quoting import shown

MOST_BYTES = 2**22  # of a body: a prompt that is too long is answered too
MOST_FIELDS = 100  # of a query or a form
_FORM, _JSON = "application/x-www-form-urlencoded", "application/json"


class Mistake(ValueError):
    """What is wrong with a request, beside its parameters.

    Attributes:
      status: of the answer.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class _Number(str):
    """A JSON number as it is written."""


def check_host(headers: Mapping[str, str], local: bool) -> None:
    """Refuses names of others, which their owner may lead to this machine.

    Args:
      headers: of the request.
      local: whether only this machine reaches the server.

    Raises:
      Mistake: the server is local, and the client asks for another name than this machine's.
    """
    host = headers.get("Host", "localhost")
    if local and not _is_loopback(host):
        raise Mistake(
            403,
            f"Host: {shown(host)} is no name of this machine for itself; ask for localhost, or"
            " start the server with --host=0.0.0.0",
        )


def check_origin(headers: Mapping[str, str]) -> None:
    """Refuses what a browser sends for a page of another server.

    Args:
      headers: of the request.

    Raises:
      Mistake: it does.
    """
    origin, host = headers.get("Origin"), headers.get("Host", "")
    foreign = origin is not None and _netloc(origin) != host.lower()
    if foreign or headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
        raise Mistake(
            403, "another site's page asked for this; use this server's own page, or curl"
        )


def too_large() -> Mistake:
    """What is said of a body of more than `MOST_BYTES`."""
    return Mistake(413, f"the body is larger than {MOST_BYTES // 2**20} MB; shorten the prompt")


def cut(path: str) -> str:
    """An address with one parameter too many at most: enough for `form` to refuse it."""
    return "&".join(path.split("&", MOST_FIELDS + 1)[: MOST_FIELDS + 1])


def form(query: str, headers: Mapping[str, str], body: bytes) -> dict[str, list[str]]:
    """The parameters of a query and of a form's body.

    Args:
      query: of the address, as sent; bytes beyond ASCII as Latin-1.
      headers: of the request.
      body: empty, or a form.

    Raises:
      Mistake: the body is no form, or the parameters are too many or no UTF-8.
    """
    if body and _kind(headers) not in ("", _FORM):
        raise Mistake(400, f"the body is no form; send it as Content-Type: {_FORM}")
    _check_encoding(headers)
    found: dict[str, list[str]] = {}
    for text in (query, body.decode("latin-1")):
        if text.count("&") >= MOST_FIELDS:
            known = ", ".join(NAMES)
            raise Mistake(400, f"there are more than {MOST_FIELDS} parameters; they are {known}")
        try:
            for pair in parse_qsl(text, keep_blank_values=True, encoding="latin-1"):
                name, value = (part.encode("latin-1").decode() for part in pair)
                found.setdefault(name, []).append(value)
        except UnicodeError:
            raise Mistake(400, "a parameter is not UTF-8 text; encode it so") from None
    return found


def listed(headers: Mapping[str, str], body: bytes) -> list[dict[str, list[str]]]:
    """The parameters of several pictures, as texts.

    Args:
      headers: of the request.
      body: a JSON list of objects.

    Raises:
      Mistake: it is not, or has a name twice or a value of another type than its parameter's.
    """
    if _kind(headers) != _JSON:
        raise Mistake(400, f"the body is not said to be JSON; send it as Content-Type: {_JSON}")
    _check_encoding(headers)
    try:
        pictures = json.loads(
            body,
            object_pairs_hook=_object,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_no_number,
        )
    except Mistake:
        raise
    except (ValueError, RecursionError):
        pictures = None
    objects = isinstance(pictures, list) and all(isinstance(one, dict) for one in pictures)
    if not objects or not 0 < len(pictures) <= MOST_PICTURES:
        raise Mistake(
            400, f"the body is no list of 1 to {MOST_PICTURES} JSON objects, one for each picture"
        )
    return [{name: [_text(name, value)] for name, value in one.items()} for one in pictures]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Mistake(400, f"{shown(name)} is given twice for one picture; give it once")
        found[name] = value
    return found


def _no_number(text: str) -> None:
    raise Mistake(400, f"{text} is no number of JSON; send a finite number")


def _text(name: str, value: Any) -> str:
    """A parameter's value as it would be in a query."""
    if name not in NAMES:
        return ""  # refused with the names that there are
    words = name in ("prompt", "network")
    if not isinstance(value, str) or (words and isinstance(value, _Number)):
        wanted = "send text" if words else "send a number, or leave it out"
        raise Mistake(400, f"{name}: {_type(value)} is not its type; {wanted}")
    return str(value)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"


def _kind(headers: Mapping[str, str]) -> str:
    """The type of the body, without its parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _check_encoding(headers: Mapping[str, str]) -> None:
    encoding = headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise Mistake(400, f"the body is encoded as {shown(encoding)}; send it as it is")


def _netloc(origin: str) -> str:
    """Host and port of an origin; of `null`, a word that no Host header is."""
    try:
        return urlsplit(origin).netloc.lower() or "?"
    except ValueError:
        return "?"


def _is_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine's loopback address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
