"""The page and its HTTP endpoints, on Tornado."""

import asyncio
import base64
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tornado.httpserver
import tornado.netutil
import tornado.web
from absl import logging
from tornado.iostream import StreamClosedError

from jax_distill.pipeline import Pipeline
from jax_distill.serving import page, parameters
from jax_distill.serving.drawing import Drawn, Refused, Studio
from jax_distill.serving.queue import Gone, Job, Queue, Unavailable

MOST_PICTURES = 16  # of one press of a button
MOST_BYTES = 2**22  # of a request: a prompt that is too long is answered too
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_SENTENCES = {404: "there is nothing here; see / and /image", 405: "use GET or POST"}


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets of an address; port 0 takes a free one.

    Raises:
      ValueError: there is no such address here, or it is taken.
    """
    try:
        return tornado.netutil.bind_sockets(port, host)
    except OSError as error:
        raise ValueError(
            f"--host={host} --port={port}: {error.strerror or error}; give another, --port=0 for"
            " one that is free"
        ) from None


async def serve(
    sockets: Sequence[socket.socket],
    studio: Studio,
    settings: Mapping[str, int],
    title: str,
    ready: Callable[[], None],
) -> None:
    """Answers until SIGTERM or SIGINT; then what is being drawn is answered, the rest refused.

    Args:
      sockets: as `listen` makes them.
      studio: draws.
      settings: of the `Queue`.
      title: of the page.
      ready: called when requests are answered.
    """
    networks, queue = (
        studio.networks,
        Queue(studio.draw, ready=studio.ready, compile=studio.compile, **settings),
    )
    handlers = [("/", Page), ("/image", Image), ("/draw", Draw)]
    application = tornado.web.Application(
        [(path, handler, {"queue": queue, "networks": networks}) for path, handler in handlers],
        default_handler_class=Handler,
        default_handler_args={"queue": queue, "networks": networks},
        static_path=str(Path(__file__).with_name("static")),
        page=page.render(networks, title),
        answering=set(),
        log_function=lambda handler: None,
    )
    server = tornado.httpserver.HTTPServer(
        application, max_header_size=MOST_BYTES, max_body_size=MOST_BYTES
    )
    server.add_sockets(sockets)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop() -> None:
        for number in signals:  # a second one ends the process at once
            loop.remove_signal_handler(number)
        logging.info("stopping; what is being drawn is answered")
        server.stop()
        queue.close()

    for number in signals:
        loop.add_signal_handler(number, stop)
    ready()
    await queue.run()
    while application.settings["answering"]:
        await asyncio.sleep(0.02)
    await server.close_all_connections()


class Handler(tornado.web.RequestHandler):
    """Answers with one sentence of plain text whatever is wrong."""

    def initialize(self, queue: Queue, networks: Mapping[str, Pipeline]) -> None:
        self.queue, self.networks = queue, networks
        self.jobs: list[Job] = []

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        self.settings["answering"].add(self)
        if type(self) is Handler:
            raise tornado.web.HTTPError(404)

    def on_finish(self) -> None:
        self.settings["answering"].discard(self)

    def on_connection_close(self) -> None:
        self.queue.cancel(self.jobs)
        self.settings["answering"].discard(self)

    def refuse(self, status: int, sentence: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(" ".join(sentence.split()) + "\n")

    def refuse_for(self, error: Exception) -> None:
        """Answers with what kept a picture from being drawn."""
        if isinstance(error, Gone):
            return
        if isinstance(error, Unavailable):
            self.set_header("Retry-After", str(error.seconds))
        self.refuse(_status(error), _sentence(error))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.refuse(status_code, _SENTENCES.get(status_code, self._reason))


class Page(Handler):
    """The page."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.finish(self.settings["page"])


class Image(Handler):
    """One picture as a PNG; parameters in the query or in a form's body."""

    async def get(self) -> None:
        try:
            wanted = parameters.picture(self._given(), self.networks)
        except ValueError as error:
            return self.refuse(400, str(error))
        try:
            self.jobs = self.queue.add([wanted])
            drawn = await self.jobs[0].drawn()
        except Exception as error:
            return self.refuse_for(error)
        self.set_header("Content-Type", "image/png")
        self.set_header("X-Evaluations", str(drawn.evaluations))
        self.set_header("X-Milliseconds", f"{drawn.milliseconds:.1f}")
        self.finish(drawn.png)

    post = get

    def _given(self) -> dict[str, list[str]]:
        kind = self.request.headers.get("Content-Type", "application/x-www-form-urlencoded")
        if self.request.body and not kind.startswith("application/x-www-form-urlencoded"):
            raise ValueError("the body is no form; send application/x-www-form-urlencoded")
        try:
            return {
                name: [text.decode() for text in texts]
                for name, texts in self.request.arguments.items()
            }
        except UnicodeDecodeError:
            raise ValueError("a parameter is not UTF-8 text; encode it so") from None


class Draw(Handler):
    """Several pictures for the page: a JSON list of parameters in, a stream of events out.

    Each event has the picture's `index`, and its `position` in the queue (0: it is drawn now), its
    `png` in base 64 with `evaluations` and `milliseconds`, or an `error`.
    """

    async def post(self) -> None:
        try:
            wanted = [parameters.picture(given, self.networks) for given in self._given()]
        except ValueError as error:
            return self.refuse(400, str(error))
        try:
            self.jobs = self.queue.add(wanted)
        except Unavailable as error:
            return self.refuse_for(error)
        self.set_header("Content-Type", "text/event-stream")
        with contextlib.suppress(StreamClosedError):  # the client has gone
            await self._tell()
            self.finish()

    async def _tell(self) -> None:
        """Sends what is new of each picture, until all have ended."""
        told: dict[int, int] = {}
        left = dict(enumerate(self.jobs))
        while left:
            for index, job in list(left.items()):
                event = {"position": self.queue.position(job)}
                if job.done:
                    event = await _event(left.pop(index))
                elif told.get(index) == event["position"]:
                    continue
                told[index] = event.get("position", 0)
                self.write(f"data: {json.dumps({'index': index, **event})}\n\n")
                await self.flush()
            if left and not any(job.done for job in left.values()):
                await self.queue.moved()

    def _given(self) -> list[dict[str, list[str]]]:
        try:
            pictures = json.loads(self.request.body)
        except (ValueError, RecursionError):
            pictures = None
        listed = isinstance(pictures, list) and all(isinstance(one, dict) for one in pictures)
        if not listed or not 0 < len(pictures) <= MOST_PICTURES:
            raise ValueError(
                f"the body is no list of 1 to {MOST_PICTURES} JSON objects, one for each picture"
            )
        return [{name: [str(value)] for name, value in one.items()} for one in pictures]


async def _event(job: Job) -> dict[str, Any]:
    try:
        drawn: Drawn = await job.drawn()
    except Exception as error:
        return {"error": _sentence(error)}
    return {
        "png": base64.b64encode(drawn.png).decode(),
        "evaluations": drawn.evaluations,
        "milliseconds": round(drawn.milliseconds, 1),
    }


def _status(error: Exception) -> int:
    if isinstance(error, Unavailable):
        return 503
    return 400 if isinstance(error, Refused) else 500


def _sentence(error: Exception) -> str:
    if isinstance(error, Unavailable | Refused | Gone):
        return " ".join(str(error).split())
    logging.error("a picture could not be drawn", exc_info=error)
    return "the picture could not be drawn; the server's terminal says why"
