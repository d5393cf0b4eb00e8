"""What all commands share: quiet libraries, and one clear sentence for what is wrong."""

import contextlib
import io
import itertools
import math
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from jax_distill import streams
from jax_distill.config import ConfigError
from jax_distill.runs import peers
from jax_distill.storage import disks

PACKAGE = str(Path(__file__).parents[1])


INTERRUPTED, PIPE_CLOSED = 130, 141  # exit codes, 128 and the signal's number, as of shells


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command; what a user can mend ends it with `error: ...` and exit code 1."""
    try:
        app.run(_prepared(main), flags_parser=_parse)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BrokenPipeError as error:
        if not _reader_is_gone():
            _end(f"error: {error}", 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again
        _end("", PIPE_CLOSED)
    except Exception as error:
        peers.end_if_lost(error)
        sentence = explain(error)
        if sentence is None and not jax.distributed.is_initialized():
            raise
        if sentence is None:
            traceback.print_exception(error)
            sentence = (
                "this process failed, or one that it works with; when all have ended, run the"
                " same command to go on"
            )
        _end(f"error: {sentence}", 1)


def _end(line: str, code: int) -> NoReturn:
    """Ends the command with a line on stderr.

    One of several processes ends at once: an orderly end would wait for the others. They notice,
    and end too, instead of waiting for ever.
    """
    if not jax.distributed.is_initialized() and code == 1:
        sys.exit(line)  # which Python prints
    if line:
        print(line, file=sys.stderr)
    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reader_is_gone() -> bool:
    """Whether what reads stdout, such as `head`, has ended."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except ValueError:  # it is closed, or no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def explain(error: Exception) -> str | None:
    """One sentence for what a user can mend; None for a fault, which needs its trace."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        asked = re.search(r"allocat\w+ ([\d.]+) (bytes|[KMGTPE]iB)", str(error))
        size = f" ({asked[1]} {asked[2]} were asked for)" if asked else ""
        return f"out of memory{size}; take a smaller batch or smaller pictures, or more devices"
    if isinstance(error, OSError) and error.filename is not None and disks.passing(error):
        what, fix = disks.full(error) or (os.strerror(error.errno), "mend that")
        return f"'{error.filename}': {what}; {fix} and run the same command again"
    return str(error) if _mendable(error) else None


def _mendable(error: Exception) -> bool:
    """Whether our own checks raised it, or the system; all else is a fault that needs its trace."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError | RuntimeError) and raised_in.startswith(PACKAGE)
    return ours or isinstance(error, OSError)


def _prepared(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def command(argv):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --")
        if isinstance(sys.stdout, io.TextIOWrapper):  # a name that its encoding lacks is no error
            sys.stdout.reconfigure(errors="backslashreplace")
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().setFormatter(None)
        # Libraries log through the same logger; the terminal is for our own lines.
        logging.get_absl_handler().addFilter(
            lambda record: record.levelno >= 40 or record.pathname.startswith(PACKAGE)
        )
        with streams.default_settings() as changed:
            if changed:
                text = "of JAX's settings %s are not used: numbers are those of the defaults"
                logging.warning(text, ", ".join(changed))
            main(argv)
        sys.stdout.flush()

    return command


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; what is wrong with them, or with a configuration file, ends the command."""
    path = _config_path(argv)
    if path is not None and "config" in flags.FLAGS and not Path(path).is_file():
        sys.exit(f"error: --config: there is no file '{path}'")
    try:
        rest = flags.FLAGS(argv)
        _check_finite()
        return rest
    except SystemExit:  # absl has printed the help, which it counts as failure
        sys.exit(0)
    except Exception as error:
        words = _explain(error, path, argv).split()  # of a config file's exception, any
        sys.exit(f"error: {' '.join(words)[:1000]}")


def _check_finite() -> None:
    """Refuses NaN and infinity for numbers; configurations are checked where they are whole."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.parser, flags.FloatParser) and not name.startswith("config."):
            if flag.value is not None and not math.isfinite(flag.value):
                raise flags.IllegalFlagValueError(f"flag --{name}={flag.value}: not finite")


_PLAIN_WORDS = {
    r"invalid literal for int\(\).*": "not a whole number",
    r"could not convert string to float.*": "not a number",
    r"\('Non-boolean argument.*": "neither true nor false",
}


def _explain(error: Exception, path: str | None, argv: list[str]) -> str:
    """One sentence for an exception that parsing flags, or the file at `path`, has raised."""
    overrides = [arg.partition("=")[0] for arg in argv[1:] if re.match(r"--?config\.", arg)]
    if path is None and overrides:
        return f"--config is missing before {overrides[0]}; such as --config=configs/scm.py"
    if isinstance(error, config_flags.FlagOrderError):
        return f"{overrides[0]} comes before --config; put --config=FILE first"
    # ml_collections puts the traceback of a faulty file into the message of a second exception.
    while "Error whilst parsing config file" in str(error) and error.__context__:
        error = error.__context__
    text = str(error).replace("\\n", "\n").replace("\\'", "'")
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    where = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, flags.Error):
        for pattern, words in _PLAIN_WORDS.items():
            text = re.sub(pattern, words, text)
        return text.replace("flag --", "--", 1)
    if "attribute 'get_config'" in text:
        return f"--config: '{path}' has no function get_config(preset='')"
    if isinstance(error, AttributeError | KeyError) and "ml_collections" in frames[-1].filename:
        patterns = (r"lookup: ([\w.]+)", r'Key "(\w+)"', r"'(\w+)'")
        key = next(match[1] for p in patterns if (match := re.search(p, text)))
        guilty = [name for name in overrides if f".{key}." in f"{name}."]
        close = re.search(r'Did you mean "(\w+)"', text)
        hint = f"; did you mean '{close[1]}'?" if close else ""
        return f"{where if lines or not guilty else f'{guilty[0]}: '}there is no key '{key}'{hint}"
    kinds = re.search(r"field '(\w+)'.*?<class '(\w+)'>.*<class '(\w+)'>", text)
    if isinstance(error, TypeError) and kinds:
        return f"{where}{kinds[1]} must be of type {kinds[3]}, not {kinds[2]}"
    return f"{where}{type(error).__name__}: {text}"


def _config_path(argv: list[str]) -> str | None:
    """The file that --config names, without its preset; None where the flag is not given."""
    for arg, following in itertools.pairwise([*argv, ""]):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            value = following if match[1] is None else match[1]
            return value.partition(":")[0] or None
    return None
