"""Errors of disks and of the memory that reads need, told apart, however libraries wrap them.

Orbax, TensorStore, TensorFlow and safetensors raise errors of their own, which name the system's
error in their text alone.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from jax_distill.storage import buckets, paths

FULL = {
    errno.ENOSPC: ("no space left", "make room"),
    errno.EDQUOT: ("no space left within the quota", "make room"),
    errno.EFBIG: ("files may not be as large as is needed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk can only be read", "mount it for writing"),
}
"""Errors of writing that a user can mend: the cause, and the fix."""

_OF_CONTENT = {  # about the content of a folder, which no second try changes
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
_NUMBER = re.compile(r"(?:os_error_code='|\[Errno |\(os error |errno[ =:]+)(\d+)", re.IGNORECASE)
_NAMES = {os.strerror(number).lower(): number for number in errno.errorcode}
_NETWORK = ("gcsfs.", "aiohttp.", "google.auth.", "google.api_core.", "requests.")
_NO_ANSWER = re.compile(
    r"\bUNAVAILABLE\b|HTTP (?:status|response) code: (?:401|403|408|429|5\d\d)"
    r"|[Rr]etry policy exhausted|retry attempts|[Cc]onnection (?:refused|reset)|[Tt]imed? ?out"
)
_STATUS = re.compile(
    r"\b(UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED"
    r"|ABORTED|CANCELLED)\b|\b[Oo]ut of memory\b"
)


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that led to it: causes, contexts, members of groups; each once."""
    seen, left = set(), [error]
    while left:
        found = left.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        left += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            left += found.exceptions


def numbers(error: BaseException) -> Iterator[int]:
    """The system's error numbers that an error and its causes name, as attribute or in words."""
    for found in chain(error):
        if isinstance(found, OSError) and (found.errno or 0) > 0:  # those of addresses are below
            yield found.errno
            continue
        text = str(found)
        yield from map(int, _NUMBER.findall(text))
        lower = text.lower()
        yield from (number for name, number in _NAMES.items() if name in lower)


def full(error: BaseException) -> tuple[str, str] | None:
    """The reason why a disk takes no more, and the fix (see `FULL`); None for other errors."""
    return next((FULL[number] for number in numbers(error) if number in FULL), None)


def of_network(error: BaseException) -> bool:
    """Whether those raised it who reach buckets, after they had tried for a while.

    TensorStore and ArrayRecord say so in words.
    """
    if type(error).__module__.startswith(_NETWORK):
        return True
    text = str(error)
    return "gs://" in text and _NO_ANSWER.search(text) is not None


def passing(error: BaseException) -> bool:
    """Whether an error of reading says nothing about the content: a second try may succeed."""
    if any(isinstance(found, MemoryError) or _unnumbered(found) for found in chain(error)):
        return True
    if any(map(of_network, chain(error))):
        return True
    if any(number not in _OF_CONTENT for number in numbers(error)):
        return True
    return any(_STATUS.search(str(found)) for found in chain(error))


def raised(error: BaseException) -> bool:
    """As `passing`, of a reader in Python such as Pillow, by the types of errors alone.

    Its own errors about the content are OSErrors without a number, and quote the file.
    """
    return any(
        isinstance(found, MemoryError)
        or (isinstance(found, OSError) and found.errno not in (None, *_OF_CONTENT))
        for found in chain(error)
    )


def _unnumbered(error: BaseException) -> bool:
    """Whether this is an error of the system that does not carry its number, or of addresses."""
    of_content = FileNotFoundError | NotADirectoryError | IsADirectoryError | FileExistsError
    numbered = isinstance(error, OSError) and (error.errno or 0) > 0
    return isinstance(error, OSError) and not numbered and not isinstance(error, of_content)


def of_system(error: BaseException) -> str | None:
    """The system's name of an error, unless it is about the content of a folder; then None."""
    found = (number for number in numbers(error) if number not in _OF_CONTENT)
    return next(map(os.strerror, found), None)


def reason(error: BaseException) -> str:
    """An error in a few words: the system's name of it, or the beginning of its first line.

    Of one that those who reach buckets have raised, that is theirs.
    """
    if (named := of_system(error)) is not None:
        return named
    if any(isinstance(found, MemoryError) for found in chain(error)):
        return "out of memory"
    error = next(filter(of_network, chain(error)), error)
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def read_all(folder: Path) -> None:
    """Reads every file in a folder and below, so that an error of the disk shows as itself.

    Raises:
      OSError: of the first that cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    if paths.is_bucket(folder):
        return buckets.read_all(folder)
    for parent, _, names in os.walk(folder, onerror=stop):
        for name in names:
            path = os.path.join(parent, name)
            if not stat.S_ISREG(os.stat(path).st_mode):
                continue  # a pipe would be waited for
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass
