"""Runs commands: quiet libraries, and one clear sentence for whatever is wrong."""

import contextlib
import io
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

from jax_distill import streams
from jax_distill.devices import lost_report
from jax_distill.runs import config_flag
from jax_distill.storage import disks
from jax_distill.storage.files import PassingError

PACKAGE = str(Path(__file__).parents[1])

INTERRUPTED, PIPE_CLOSED = 130, 141  # exit codes, 128 and the signal's number, as of shells
_SIGNS_OF_LOSS = re.compile(
    r"CoordinationService|heartbeat|Gloo|Barrier failed|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|[Cc]onnection (?:reset|closed|refused)|Broken pipe|Socket closed|preempted"
)
_STATUS = re.compile(r"[A-Z]+(?:_[A-Z]+)*: ")


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
        if jax.distributed.is_initialized() and is_of_lost(error):
            _end(lost_report.LOST, 1)
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


def is_of_lost(error: Exception) -> bool:
    """Whether JAX raised an error because another process did not answer."""
    return any(_of_jax(x) and _SIGNS_OF_LOSS.search(str(x)) for x in disks.chain(error))


def _of_jax(error: BaseException) -> bool:
    """Whether XLA raised it: ValueErrors of a program that is called begin with their status."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    return type(error) is ValueError and _STATUS.match(str(error)) is not None


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
    if isinstance(error, PassingError):  # says the same of what it names
        return str(error)
    if any(map(disks.of_network, disks.chain(error))):
        given = ", ".join(argument for argument in sys.argv[1:] if "gs://" in argument)
        bucket = f"the bucket ({given})" if given else "the bucket"
        return f"{bucket}: {disks.reason(error)}; mend that and run the same command again"
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
    try:
        rest = config_flag.parse(argv)
        _check_finite()
        return rest
    except SystemExit:  # absl has printed the help, which it counts as failure
        sys.exit(0)
    except flags.IllegalFlagValueError as error:
        sentence = _of_value(error)
    except (flags.Error, config_flag.Mistake) as error:
        sentence = str(error)
    sys.exit(f"error: {' '.join(sentence.split())[:1000]}")  # of a config file's exception, any


def _check_finite() -> None:
    """Refuses NaN and infinity for numbers; configurations are checked where they are whole."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.parser, flags.FloatParser) and flag.value is not None:
            if not math.isfinite(flag.value):
                raise flags.Error(f"--{name}={flag.value}: not finite")


def _of_value(error: flags.IllegalFlagValueError) -> str:
    """Says what a flag's value must be: absl quotes the exception of Python's conversion."""
    given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
    parser = flags.FLAGS[given.partition("=")[0].removeprefix("--")].parser
    if isinstance(parser, flags.BooleanParser):
        return f"{given}: neither true nor false"
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        return f"{given}: not {parser.syntactic_help}"
    return str(error).removeprefix("flag ")
