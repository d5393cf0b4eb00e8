"""A page to try a student on: `python -m jax_distill.serve --checkpoint=DIR [--teacher=DIR]`.

Pictures are also had without the page, at /image (`docs/serving.md`).
"""

import asyncio
import importlib.util

from absl import flags, logging

from jax_distill.assembly.resolution import EMBEDDED
from jax_distill.devices import processes
from jax_distill.runs import commands, program_cache
from jax_distill.serving.parameters import MOST_PICTURES

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    EMBEDDED,
    "Workdir of a run, folder of jax_distill.port, or 'embedded' for the bundled teacher.",
)
_TEACHER = flags.DEFINE_string("teacher", None, "A teacher to draw beside it: as --checkpoint.")
_HOST = flags.DEFINE_string("host", "localhost", "Address to listen at; 0.0.0.0: all of them.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: a free one.", 0, 65535)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Pictures of one call of a program; default: 8, and 1 for FLUX's.", 1, 256
)
_QUEUE = flags.DEFINE_integer(
    "queue",
    100,
    f"Pictures that may wait, others are refused; at least the {MOST_PICTURES} of one request.",
    MOST_PICTURES,
)
processes.define_flags()
program_cache.define_flag()


def main(argv: list[str]) -> None:
    del argv
    if importlib.util.find_spec("tornado") is None:
        raise ValueError("the page needs tornado; pip install 'jax-distill[serve]'")
    if processes.several():
        raise ValueError(
            "the page draws in one process, and several are asked for; start it on one host with"
            " --num_processes=1"
        )
    from jax_distill.serving import addresses, drawing, networks, web

    sockets = addresses.listen(_HOST.value, _PORT.value)
    program_cache.use()
    found, title = networks.load(_CHECKPOINT.value, _TEACHER.value), _title()
    large = any(pipe.world.distributed for pipe in found.values())
    batch_size = _BATCH_SIZE.value or (1 if large else 8)
    studio = drawing.Studio(found, batch_size)
    logging.info("loading %s and compiling", title)
    studio.prepare()
    settings = {"lanes": drawing.lanes(), "batch_size": batch_size, "limit": _QUEUE.value}

    def ready() -> None:
        print(f"{addresses.shown(_HOST.value, sockets)} is ready; Ctrl-C ends it", flush=True)

    asyncio.run(web.serve(sockets, studio, settings, title, ready))


def _title() -> str:
    beside = "" if _TEACHER.value is None else f" beside {_TEACHER.value}"
    return f"{_CHECKPOINT.value}{beside}"


if __name__ == "__main__":
    commands.run(main)
