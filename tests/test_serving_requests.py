"""Requests that are refused, and how the server ends while it answers."""

import asyncio
import gzip
import json
import os
import signal
import socket

import pytest
import tiny_runs

pytest.importorskip("tornado", reason="pip install 'jax-distill[serve]'")

from test_serving import JSON, Slow, begun, of_server, wanted

from jax_distill import pipeline
from jax_distill.serving import addresses, parameters, requests, web
from jax_distill.serving.drawing import Refused
from jax_distill.serving.queue import Queue

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Quick(Slow):
    """Draws at once, pictures of so many bytes."""

    def __init__(self, size=8):
        super().__init__()
        self.go.set()
        self._size = size

    def draw(self, batch):
        return [drawn._replace(png=drawn.png.ljust(self._size)) for drawn in super().draw(batch)]


def sentence(answer):
    """The one sentence of plain text that an answer is."""
    assert answer.headers["Content-Type"].startswith("text/plain")
    text = answer.body.decode()
    assert text.endswith("\n") and text.count("\n") == 1 and len(text) < 300
    return text.strip()


async def raw(server, data):
    """Sends bytes; all that comes back."""
    port = int(server.address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("localhost", port)
    writer.write(data)
    got = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    return got


async def sent(server, path, body):
    """The connection of a request that has been sent."""
    reader, writer = await asyncio.open_connection(
        "localhost", int(server.address.rpartition(":")[2])
    )
    head = b" HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    writer.write(path + head % len(body) + body)
    return reader, writer


def test_a_request_larger_than_the_queue_is_told_so():
    async def main():
        with pytest.raises(Refused, match="3 pictures are more than the queue's 2 places"):
            Queue(Slow().draw, limit=2).add([wanted()] * 3)

    asyncio.run(main())

    async def test(server):
        body = json.dumps([{"prompt": "a"}] * 3)
        answer = await server.ask("/draw", method="POST", body=body, headers=JSON)
        assert answer.code == 400 and "ask for fewer at a time" in sentence(answer)

    of_server(test, Slow(), limit=2)


NOT_DRAWN = [
    ('[{"prompt": null}]', "prompt: null is not its type; send text"),
    ('[{"prompt": 5}]', "prompt: a number is not its type; send text"),
    ('[{"prompt": ["a"]}]', "prompt: a list is not its type; send text"),
    ('[{"prompt": {"a": "b"}}]', "prompt: an object is not its type; send text"),
    ('[{"prompt": "a", "network": true}]', "network: true is not its type; send text"),
    ('[{"prompt": "a", "seed": true}]', "seed: true is not its type; send a number"),
    ('[{"prompt": "a", "steps": null}]', "steps: null is not its type; send a number"),
    ('[{"prompt": "a", "guidance": NaN}]', "NaN is no number of JSON"),
    ('[{"prompt": "a", "guidance": -Infinity}]', "-Infinity is no number of JSON"),
    ('[{"prompt": "a", "guidance": 1e999}]', "guidance: inf is not a finite number"),
    ('[{"prompt": "a", "prompt": "b"}]', "'prompt' is given twice for one picture"),
    ('[{"prompt": "a", "steps": 2.0}]', "steps: '2.0' is not a whole number"),
    ('[{"prompt": "a", "seed": %s}]' % ("9" * 5000), "is not a whole number"),
    ('[{"prompt": "a", "size": 5}]', "'size' is no parameter"),
    ('[{"prompt": "\\ud800"}]', "is not UTF-8 text"),
    ("[" * 100_000, "the body is no list of 1 to 16 JSON objects"),
]


def test_what_is_drawn_is_what_was_asked_for():
    async def test(server):
        for body, said in NOT_DRAWN:
            answer = await server.ask("/draw", method="POST", body=body, headers=JSON)
            assert answer.code == 400 and said in sentence(answer), body
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            answer = await server.ask(
                "/draw", method="POST", body='[{"prompt": "a"}]', headers={"Content-Type": kind}
            )
            assert answer.code == 400 and "Content-Type: application/json" in sentence(answer)

    slow = Slow()
    of_server(test, slow)
    assert not slow.batches


def test_json_numbers_are_those_that_were_sent():
    body = b'[{"prompt": "5", "steps": 4, "seed": "7", "guidance": 1e-1}]'
    [given] = requests.listed({"Content-Type": "Application/JSON; charset=utf-8"}, body)
    assert given == {"prompt": ["5"], "steps": ["4"], "seed": ["7"], "guidance": ["1e-1"]}


@pytest.mark.parametrize("text", ["1_0", "١", "1e", "0x1", "inf", "1 0", ".", "9" * 5000])
def test_guidance_is_a_decimal_number(text):
    network = pipeline.Pipeline(tiny_runs.settings({"name": "flow_matching"}), {})
    with pytest.raises(ValueError, match="guidance: .* is not a number"):
        parameters.picture({"prompt": ["a"], "guidance": [text]}, {"teacher": network})
    for good, value in (("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("1e1", 10.0), ("+3", 3.0)):
        given = {"prompt": ["a"], "guidance": [good]}
        assert parameters.picture(given, {"teacher": network}).guidance == value


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST:9000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("evil.example:8000", False),
        ("localhost@evil.example", False),
        ("192.168.0.1", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_a_local_server_has_the_names_of_the_loopback_address(host, loopback):
    requests.check_host({"Host": host}, local=False)
    if loopback:
        requests.check_host({"Host": host}, local=True)
        return
    with pytest.raises(requests.Mistake, match="is no name of this machine") as raised:
        requests.check_host({"Host": host}, local=True)
    assert raised.value.status == 403


def test_pages_of_other_sites_get_nothing():
    async def test(server):
        host = server.address.removeprefix("http://")
        for path in ("/", "/static/page.js", "/image?prompt=a", "/draw", "/nothing"):
            answer = await server.ask(path, headers={"Host": "evil.example"})
            assert answer.code == 403 and "ask for localhost" in sentence(answer)
        picture = {"method": "POST", "body": '[{"prompt": "a"}]'}
        for path, options, headers in (
            ("/image?prompt=a", {}, {"Sec-Fetch-Site": "cross-site"}),
            ("/image", {"method": "POST", "body": "prompt=a"}, {"Origin": "http://evil.example"}),
            ("/image", {"method": "POST", "body": "prompt=a"}, {"Origin": "null"}),
            ("/draw", picture, {**JSON, "Origin": "http://localhost:1"}),
            ("/draw", picture, {**JSON, "Origin": "http://[bad"}),
            ("/draw", picture, {**JSON, "Sec-Fetch-Site": "cross-site"}),
        ):
            answer = await server.ask(path, headers=headers, **options)
            assert answer.code == 403 and "another site's page" in sentence(answer)
        for headers in (
            {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
        ):
            answer = await server.ask("/draw", headers={**JSON, **headers}, **picture)
            assert answer.code == 200
            assert (await server.ask("/image?prompt=a", headers=headers)).code == 200
        assert (await server.ask("/", headers={"Sec-Fetch-Site": "cross-site"})).code == 200

    of_server(test, Quick())


def test_bodies_that_cannot_be_read_get_a_sentence():
    async def test(server):
        zipped = gzip.compress(b"prompt=a")
        for body, headers, status, said in (
            (b"prompt=" + b"a" * 2**22, FORM, 413, "the body is larger than 4 MB"),
            (b"&".join([b"a=1"] * 2000), FORM, 400, "more than 100 parameters; they are prompt"),
            (zipped, {**FORM, "Content-Encoding": "gzip"}, 400, "encoded as 'gzip'; send it as it"),
            (b"?", {"Content-Type": "multipart/form-data"}, 400, "the body is no form; send it as"),
        ):
            answer = await server.ask("/image", method="POST", body=body, headers=headers)
            assert answer.code == status and said in sentence(answer)
        many = await server.ask("/image?" + "&".join(["a=1"] * 2000))
        assert many.code == 400 and "more than 100 parameters" in sentence(many)
        for headers in (b"", b"Content-Type: Application/X-WWW-Form-URLencoded; charset=UTF-8\r\n"):
            head = b"POST /image HTTP/1.0\r\n" + headers + b"Content-Length: 8\r\n\r\n"
            assert b" 200 OK" in await raw(server, head + b"prompt=a")
        for length, more in ((2**30, b""), (2**23, b"Expect: 100-continue\r\n")):
            head = b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % length
            got = await raw(server, head + more + b"\r\n")
            assert got.startswith(b"HTTP/1.1 413 ") and b"\r\n\r\nthe body is larger" in got

    of_server(test, Quick())


def test_methods_and_addresses_that_there_are_not_get_a_sentence():
    async def test(server):
        for path, method, allowed in (
            ("/", "DELETE", "GET, HEAD"),
            ("/static/page.js", "PUT", "GET, HEAD"),
            ("/image", "HEAD", "GET, POST"),
            ("/image", "BREW", "GET, POST"),
            ("/draw", "GET", "POST"),
            ("/draw", "OPTIONS", "POST"),
        ):
            answer = await server.ask(path, method=method, allow_nonstandard_methods=True)
            assert answer.code == 405 and answer.headers["Allow"] == allowed
            if method != "HEAD":
                assert sentence(answer) == f"use {allowed.replace(', ', ' or ')} here"
        for path in ("/static/", "/static/page.html", "/static/..%2fweb.py", "/static/pageXjs"):
            answer = await server.ask(path)
            assert answer.code == 404 and sentence(answer).startswith("there is nothing here")
        for path in ("/robots.txt", "/favicon.ico", "//", "/image/"):
            answer = await server.ask(path)
            assert answer.code == 404 and sentence(answer).startswith("there is nothing here")
        page, head = await server.ask("/"), await server.ask("/", method="HEAD")
        assert head.code == 200 and not head.body
        assert head.headers["Content-Length"] == str(len(page.body))

    of_server(test, Slow())


@pytest.mark.parametrize(
    ("path", "body", "beginning", "end"),
    [
        (b"GET /image?prompt=a", b"", b"PNG", b" " * 100),
        (b"POST /draw", b'[{"prompt": "a"}]', b"png", b'"milliseconds": 1.5}\n\n'),
    ],
)
def test_a_large_picture_arrives_whole_when_the_server_ends(path, body, beginning, end):
    size = 2**24

    async def test(server):
        reader, writer = await sent(server, path, body)
        await reader.readuntil(beginning)
        server.stop()
        got = await reader.read()
        assert len(got) >= size - 4 and got.endswith(end)
        writer.close()

    of_server(test, Quick(size))


def test_a_client_that_does_not_read_holds_the_server_up_for_a_limited_time(monkeypatch):
    monkeypatch.setattr(web, "DELIVERY", 0.1)

    async def test(server):
        reader, writer = await sent(server, b"POST /draw", b'[{"prompt": "a"}]')
        await reader.readuntil(b"png")
        server.stop()
        try:
            await server.ended(10)
        finally:
            writer.close()

    of_server(test, Quick(2**24))


def test_a_second_signal_ends_the_process_whatever_is_drawn(monkeypatch):
    slow, codes = Slow(), []

    def ended(code):
        codes.append(code)
        slow.go.set()  # a process would be gone

    monkeypatch.setattr(os, "_exit", ended)

    async def test(server):
        first = asyncio.create_task(server.ask("/image", {"prompt": "first"}))
        await begun(slow)
        waiting = asyncio.create_task(server.ask("/image", {"prompt": "waiting", "steps": 3}))
        await server.until_waiting(1)
        server.stop()
        assert (await waiting).code == 503 and not codes
        os.kill(os.getpid(), signal.SIGINT)
        assert (await first).code == 200

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    of_server(test, slow)
    assert codes == [128 + signal.SIGINT]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


class Bound:
    """A socket that listens at an address."""

    def __init__(self, host):
        self._host = host

    def getsockname(self):
        return (self._host, 8000, 0, 0) if ":" in self._host else (self._host, 8000)


@pytest.mark.parametrize(
    ("host", "bound", "expected"),
    [
        ("localhost", "127.0.0.1", "http://localhost:8000/"),
        ("127.0.0.1", "127.0.0.1", "http://127.0.0.1:8000/"),
        ("::1", "::1", "http://[::1]:8000/"),
        ("fe80::1%eth0", "fe80::1%eth0", "http://[fe80::1%25eth0]:8000/"),
        ("my-machine", "127.0.1.1", "http://127.0.1.1:8000/"),
        ("my-machine", "192.168.0.9", "http://my-machine:8000/"),
        *(
            (host, bound, "http://localhost:8000/ (from other machines: http://here:8000/)")
            for host, bound in (("0.0.0.0", "0.0.0.0"), ("::", "::"), ("", "0.0.0.0"))
        ),
    ],
)
def test_the_address_that_is_shown_can_be_opened(monkeypatch, host, bound, expected):
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    assert addresses.shown(host, [Bound(bound)]) == expected
    assert addresses.is_local([Bound(bound)]) == bound.startswith(("127.", "::1"))
