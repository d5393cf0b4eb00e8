"""The page and its HTTP endpoints, on Tornado."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tornado.httpserver
import tornado.web
from absl import logging
from tornado.iostream import IOStream, StreamClosedError

from jax_distill.pipeline import Pipeline
from jax_distill.serving import addresses, page, parameters, requests
from jax_distill.serving.drawing import Drawn, Refused, Studio
from jax_distill.serving.queue import Gone, Job, Queue, Unavailable

DELIVERY = 30.0  # seconds that clients have for answers when the last picture is drawn
_MOST_READ = 2**26  # bytes of a body that are read, so that its refusal arrives
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_KINDS = {".css": "text/css; charset=UTF-8", ".js": "text/javascript; charset=UTF-8"}


async def serve(
    sockets: Sequence[socket.socket],
    studio: Studio,
    settings: Mapping[str, int],
    title: str,
    ready: Callable[[], None],
) -> None:
    """Answers until SIGTERM or SIGINT; then what is being drawn is answered, the rest refused.

    Clients have `DELIVERY` seconds to take the answers. A second signal ends the process at once.

    Args:
      sockets: as `addresses.listen` makes them.
      studio: draws.
      settings: of the `Queue`.
      title: of the page.
      ready: called when requests are answered.
    """
    queue = Queue(studio.draw, ready=studio.ready, compile=studio.compile, **settings)
    application = _Application(
        _routes(page.render(studio.networks, title)),
        default_handler_class=Handler,
        queue=queue,
        networks=studio.networks,
        local=addresses.is_local(sockets),
        answering=set(),
        log_function=lambda handler: None,
    )
    server = tornado.httpserver.HTTPServer(
        application, max_header_size=requests.MOST_BYTES, max_body_size=sys.maxsize
    )
    server.add_sockets(sockets)

    def stop() -> None:
        logging.info("stopping; what is being drawn is answered")
        server.stop()
        queue.close()

    with _stopped_by_signals(stop):
        ready()
        await queue.run()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DELIVERY):
                while application.settings["answering"]:
                    await asyncio.sleep(0.02)
        await server.close_all_connections()


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the first signal; the second ends the process, whatever is being drawn."""
    loop, before = asyncio.get_running_loop(), {one: signal.getsignal(one) for one in _SIGNALS}

    def first() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, _end)
        stop()

    for number in _SIGNALS:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _end(number: int, frame: Any) -> None:
    """Ends the process at once: Python would wait for the threads that draw."""
    del frame
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(128 + number)


def _routes(html: str) -> list[tuple]:
    files = {"/": {"content": html.encode(), "kind": "text/html; charset=UTF-8"}}
    for path in Path(__file__).with_name("static").iterdir():
        if path.suffix in _KINDS:
            content = {"content": path.read_bytes(), "kind": _KINDS[path.suffix]}
            files[f"/static/{path.name}"] = content
    return [
        ("/image", Image),
        ("/draw", Draw),
        *((path.replace(".", r"\."), File, content) for path, content in files.items()),
    ]


class _Application(tornado.web.Application):
    """Leaves more parameters than there are to us, which Tornado would refuse without a word."""

    def start_request(self, server_conn: Any, request_conn: Any) -> Any:
        delegate = super().start_request(server_conn, request_conn)
        received = delegate.headers_received

        def headers_received(start_line: Any, headers: Any) -> Any:
            return received(start_line._replace(path=requests.cut(start_line.path)), headers)

        delegate.headers_received = headers_received
        return delegate


@tornado.web.stream_request_body
class Handler(tornado.web.RequestHandler):
    """Answers with one sentence of plain text whatever is wrong; by itself, that nothing is there.

    Requests are read here rather than by Tornado, whose own answers to what is wrong with a body
    are no sentences.
    """

    METHODS: tuple[str, ...] = ()  # none: there is nothing at this address

    def initialize(self) -> None:
        self.queue: Queue = self.settings["queue"]
        self.networks: Mapping[str, Pipeline] = self.settings["networks"]
        self.jobs: list[Job] = []
        self._body, self._length = bytearray(), 0

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuses, unread, a large body that waits to be asked for, and one that is too large."""
        length = self.request.headers.get("Content-Length", "")
        asks = self.request.headers.get("Expect", "").lower() == "100-continue"
        if length.isdecimal() and int(length[:20]) > (requests.MOST_BYTES if asks else _MOST_READ):
            self.refuse_for(requests.too_large())

    def data_received(self, chunk: bytes) -> None:
        self._length += len(chunk)
        if self._length <= requests.MOST_BYTES:
            self._body += chunk
        elif self._length > _MOST_READ and not self._finished:
            self.refuse_for(requests.too_large())

    async def _answer(self) -> None:
        self.settings["answering"].add(self)
        try:
            requests.check_host(self.request.headers, self.settings["local"])
            if self.request.method not in self.METHODS:
                return self._refuse_method()
            if self._length > requests.MOST_BYTES:
                raise requests.too_large()
            await self.answer()
        except Exception as error:
            self.refuse_for(error)

    get = head = post = put = patch = delete = options = _answer

    async def answer(self) -> None:
        """Answers a request of one of `METHODS` whose body is in `self._body`."""
        raise NotImplementedError

    def wanted(self, given: Mapping[str, Sequence[str]]) -> parameters.Wanted:
        """The picture that parameters ask for.

        Raises:
          Mistake: one of them is wrong.
        """
        try:
            return parameters.picture(given, self.networks)
        except ValueError as error:
            raise requests.Mistake(400, str(error)) from None

    def finish(self, chunk: Any = None) -> asyncio.Future:
        """Ends the answer, which the server's end waits for until it is sent."""
        self.settings["answering"].add(self)
        stream: IOStream = self.request.connection.stream
        sent = super().finish(chunk)
        try:
            stream.write(b"").add_done_callback(lambda done: self._forget())
        except StreamClosedError:
            self._forget()
        return sent

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.queue.cancel(self.jobs)
        self._forget()

    def _forget(self) -> None:
        self.settings["answering"].discard(self)

    def refuse(self, status: int, sentence: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(" ".join(sentence.split()) + "\n")

    def refuse_for(self, error: Exception) -> None:
        """Answers with what kept a request from being answered."""
        if isinstance(error, Gone | StreamClosedError):
            return self._forget()
        if isinstance(error, Unavailable):
            self.set_header("Retry-After", str(error.seconds))
        self.refuse(_status(error), _sentence(error))

    def _refuse_method(self) -> None:
        if not self.METHODS:
            return self.refuse(404, "there is nothing here; see / and /image")
        self.set_header("Allow", ", ".join(self.METHODS))
        self.refuse(405, f"use {' or '.join(self.METHODS)} here")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answers for Tornado, which knows no methods but those above."""
        if status_code == 405:
            return self._refuse_method()
        self.refuse(status_code, self._reason)


class File(Handler):
    """The page, or what it loads."""

    METHODS = ("GET", "HEAD")

    def initialize(self, content: bytes, kind: str) -> None:
        super().initialize()
        self._content, self._kind = content, kind

    async def answer(self) -> None:
        self.set_header("Content-Type", self._kind)
        self.finish(self._content)


class Image(Handler):
    """One picture as a PNG; parameters in the query or in a form's body."""

    METHODS = ("GET", "POST")

    async def answer(self) -> None:
        headers = self.request.headers
        requests.check_origin(headers)
        given = requests.form(self.request.query, headers, bytes(self._body))
        self.jobs = self.queue.add([self.wanted(given)])
        drawn = await self.jobs[0].drawn()
        self.set_header("Content-Type", "image/png")
        self.set_header("X-Evaluations", str(drawn.evaluations))
        self.set_header("X-Milliseconds", f"{drawn.milliseconds:.1f}")
        self.finish(drawn.png)


class Draw(Handler):
    """Several pictures for the page: a JSON list of parameters in, a stream of events out.

    Each event has the picture's `index`, and its `position` in the queue (0: it is drawn now), its
    `png` in base 64 with `evaluations` and `milliseconds`, or an `error`.
    """

    METHODS = ("POST",)

    async def answer(self) -> None:
        headers = self.request.headers
        requests.check_origin(headers)
        given = requests.listed(headers, bytes(self._body))
        self.jobs = self.queue.add([self.wanted(one) for one in given])
        self.set_header("Content-Type", "text/event-stream")
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
    if isinstance(error, requests.Mistake):
        return error.status
    if isinstance(error, Unavailable):
        return 503
    return 400 if isinstance(error, Refused) else 500


def _sentence(error: Exception) -> str:
    if isinstance(error, Unavailable | Refused | Gone | requests.Mistake):
        return " ".join(str(error).split())
    logging.error("a picture could not be drawn", exc_info=error)
    return "the picture could not be drawn; the server's terminal says why"
