"""A store of objects that speaks Google Cloud Storage's protocol, and fails as networks do.

It is gcp-storage-emulator, whose objects are in memory, with what that leaves out and clients rely
on: generations in downloads, and preconditions on them (`ifGenerationMatch`).

    python tests/bucket_server.py --port=9023 --faults=0.02

Clients find it by the variables in `environment`.
"""

import argparse
import collections
import io
import json
import logging
import random
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = "test"
SLOW = 0.2  # seconds


def environment(port: int) -> dict[str, str]:
    """Variables by which gcsfs, TensorStore and ArrayRecord take a server for Google's."""
    address = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
    }


class Faults:
    """What goes wrong: each kind at a share of the requests that can have it.

    slow           the answer takes a while
    unavailable    503, and nothing is done
    cut_write      the connection ends amid a write, and nothing is stored
    lost_answer    the connection ends before the answer to a write, which is stored
    cut_read       the connection ends amid the answer
    """

    KINDS = ("slow", "unavailable", "cut_write", "lost_answer", "cut_read")

    def __init__(self, share: float = 0.0, seed: int = 0):
        self.share = share
        self.next: list[str] = []  # kinds that the next requests have, first of all
        self.seen: collections.Counter[str] = collections.Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def draw(self, method: str, writes: bool) -> str:
        """The fault of a request, or ""."""
        with self._lock:
            reads = method == "GET"
            fits = {"cut_write": writes, "lost_answer": not reads, "cut_read": reads}
            if self.next and fits.get(self.next[0], True):
                found = self.next.pop(0)
            else:
                kind = self._random.choice([x for x in self.KINDS if fits.get(x, True)])
                found = kind if self._random.random() < self.share else ""
            self.seen[found] += 1
            return found


class _Handler(server.RequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    lock: threading.RLock
    finished: dict[str, bytes]  # answers to uploads in parts
    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: self._serve()  # noqa: E731

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.faults.draw(self.command, length > 0 and "upload" in self.path)
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "cut_write":
            self.rfile.read(length // 2)
            return self._cut()
        body = server._read_raw_data(self) or b""
        rest, line, answer = self.rfile, self.wfile, io.BytesIO()
        self.rfile, self.wfile = io.BytesIO(body), answer
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        (upload,) = parse_qs(urlsplit(self.path).query).get("upload_id", [""])
        try:
            with self.lock:
                if fault == "unavailable":
                    self._say(HTTPStatus.SERVICE_UNAVAILABLE)
                elif upload in self.finished:  # Google's remembers it for a week
                    answer.write(self.finished[upload])
                elif refused := self._refused(body):
                    self._say(refused)
                else:
                    server.Router(self).handle(self.command)
                    if upload and answer.getvalue().startswith(b"HTTP/1.1 200"):
                        self.finished[upload] = answer.getvalue()
        finally:
            self.rfile, self.wfile = rest, line
        content = answer.getvalue()
        if fault == "lost_answer":
            return self._cut()
        if fault == "cut_read":
            line.write(content[: len(content) // 2])
            return self._cut()
        line.write(content)

    def _cut(self) -> None:
        self.close_connection = True

    def _say(self, status: HTTPStatus) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refused(self, body: bytes) -> HTTPStatus | None:
        """What a precondition answers, if it does not hold."""
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        parts = address.path.partition("/b/")[2].split("/o/", 1)
        name = unquote(parts[1]) if len(parts) == 2 else query.get("name")
        if name is None and query.get("uploadType") == "multipart":
            name = _multipart(body)[0]["name"]
        self._generation = None
        if name is None:
            return None
        self._generation = self._current(parts[0].partition("/")[0], name)
        if (wanted := self.headers.get("Range", "")).startswith("bytes=-"):
            self._make_absolute(parts[0], name, int(wanted.removeprefix("bytes=-")))
        found = self._generation or "0"
        if query.get("ifGenerationMatch", found) != found:
            return HTTPStatus.PRECONDITION_FAILED
        if query.get("ifGenerationNotMatch", "") == found != "0":
            return HTTPStatus.NOT_MODIFIED
        return None

    def _current(self, bucket: str, name: str) -> str | None:
        try:
            return self.storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return None

    def _make_absolute(self, bucket: str, name: str, length: int) -> None:
        """The last bytes, which the emulator does not know, by their place."""
        if self._generation is None:
            return
        size = int(self.storage.get_file_obj(bucket, name)["size"])
        del self.headers["Range"]
        self.headers["Range"] = f"bytes={max(size - length, 0)}-"

    def end_headers(self) -> None:
        if getattr(self, "_generation", None) and self.command == "GET":
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()


def _multipart(body: bytes) -> tuple[dict, str, bytes]:
    """Metadata, type and content of an upload in two parts, which may be any bytes."""
    lines = b"\r\n" if b"\r\n\r\n" in body.partition(b"{")[0] else b"\n"
    mark = body.partition(lines)[0]
    _, meta, rest = body.split(mark, 2)
    meta = json.loads(meta.split(lines * 2, 1)[1])
    header, _, content = rest.partition(lines * 2)
    kind = header.decode().partition(":")[2].strip()
    return meta, kind, content[: content.rindex(lines + mark)]


def _read_data(handler, query):
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return _emulators(handler, query)
    meta, kind, content = _multipart(server._read_raw_data(handler))
    return {"meta": meta, "content": content, "content-type": kind}


_emulators, server._read_data = server._read_data, _read_data


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address) -> None:
        """Says nothing of clients that have gone: some are killed."""


class BucketServer:
    """Serves a bucket from threads of this process.

    Args:
      port: of localhost; any free one by default.
      faults: what goes wrong.
    """

    def __init__(self, port: int = 0, faults: Faults | None = None):
        self.faults = faults or Faults()
        for name in ("api", "gcp_storage_emulator"):  # of what is not there, at each request
            logging.getLogger(name).setLevel(logging.CRITICAL)
        storage = Storage(use_memory_fs=True)
        storage._write_config_to_file = lambda: None  # all of it, at each write
        buckets.create_bucket(BUCKET, storage)
        values = {"faults": self.faults, "lock": threading.RLock(), "finished": {}}
        handler = type("Handler", (_Handler,), values)
        self._http = _Quiet(("localhost", port), partial(handler, storage))
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> "BucketServer":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9023)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with BucketServer(arguments.port, Faults(arguments.faults, arguments.seed)) as running:
        print(f"serving gs://{BUCKET} on port {running.port}", flush=True)
        threading.Event().wait()
