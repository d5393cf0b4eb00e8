"""The page's server: pictures are those of `sample`, and bad requests get one sentence."""

import asyncio
import io
import json
import os
import signal
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlencode

import jax
import numpy as np
import pytest
import tiny_runs
from PIL import Image

pytest.importorskip("tornado", reason="pip install 'jax-distill[serve]'")

from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import url_concat

from jax_distill import pipeline
from jax_distill.serving import addresses, drawing, networks, page, parameters, web
from jax_distill.serving.drawing import Drawn, Refused, Studio
from jax_distill.serving.parameters import Wanted
from jax_distill.serving.queue import Gone, Queue, Unavailable

PROMPTS = ("a red circle", "two squares", "a cross above a triangle", "three crosses")
CONFIG = tiny_runs.RUNS["scm"]
BATCH = 4
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def student():
    return pipeline.Pipeline(CONFIG, {"network": tiny_runs.random_parameters(CONFIG)})


@pytest.fixture(scope="module")
def studio(student):
    return Studio({"student": student}, BATCH)


def wanted(prompt=PROMPTS[0], seed=0, steps=2, guidance=None, resolution=(64, 64)):
    return Wanted("student", prompt, steps, seed, guidance, resolution)


def pixels(drawn):
    return np.asarray(Image.open(io.BytesIO(drawn.png)))


def test_a_picture_is_that_of_sample_bit_for_bit_whatever_is_drawn_beside_it(student, studio):
    batch = [wanted(prompt, seed) for seed, prompt in zip((0, 7, 0, 2**32 - 1), PROMPTS)]
    together = studio.draw(batch)
    for one, drawn in zip(batch, together):
        alone = student(one.prompt, steps=2, seed=one.seed)[0]
        assert np.array_equal(pixels(drawn), alone)
        assert drawn.evaluations == 2 and drawn.milliseconds > 0
    for few in (batch[1:2], batch[:1:-1]):
        assert [drawn.png for drawn in studio.draw(few)] == [
            together[batch.index(one)].png for one in few
        ]
    assert len({drawn.png for drawn in together}) == len(batch)


def test_each_picture_of_a_batch_has_its_own_guidance(student, studio):
    batch = [wanted(guidance=scale) for scale in (1.0, None, 6.0)]
    for one, drawn in zip(batch, studio.draw(batch)):
        alone = student(one.prompt, steps=2, guidance=one.guidance)[0]
        assert np.array_equal(pixels(drawn), alone)


def test_what_cannot_be_drawn_spoils_nothing_beside_it(studio):
    long = " ".join(f"word{number}" for number in range(11))
    good, unread, wild = studio.draw([wanted(), wanted(long), wanted(guidance=3e38)])
    assert good.png == studio.draw([wanted()])[0].png
    assert isinstance(unread, Refused) and "the limit is 10" in str(unread)
    assert isinstance(wild, Refused) and "lower the guidance" in str(wild)


def test_evaluations_are_those_of_the_network():
    teacher = tiny_runs.settings({"name": "flow_matching", "solver": "heun"})
    assert pipeline.Pipeline(teacher, {}).evaluations(5) == 2 * 2 * 5  # guided by two
    assert pipeline.Pipeline(CONFIG, {}).evaluations(4) == 4


REFUSED = [
    ({}, "prompt: empty; say what to draw"),
    ({"prompt": "  "}, "prompt: empty"),
    ({"prompt": "a" * 100_000}, "prompt: 100000 characters are more than 4000; shorten it"),
    ({"prompt": "<b>a circle</b>"}, "prompt: '<b>' is a tag, not a word; leave it out"),
    ({"prompt": "a<script>alert(1)</script>"}, "prompt: '<script>' is a tag"),
    ({"prompt": "a", "width": "17"}, "width: 17 is no multiple of 16 pixels"),
    ({"prompt": "a", "height": "0"}, "height: 0 is not at least 1"),
    ({"prompt": "a", "height": "144"}, "height: 144 is more than 128"),
    ({"prompt": "a", "steps": "0"}, "steps: 0 is not at least 1"),
    ({"prompt": "a", "steps": "101"}, "steps: 101 is more than 100"),
    ({"prompt": "a", "steps": "2.0"}, "steps: '2.0' is not a whole number"),
    ({"prompt": "a", "steps": "9" * 5000}, "is not a whole number"),
    ({"prompt": "a", "seed": "-1"}, "seed: -1 is not at least 0"),
    ({"prompt": "a", "seed": "4294967296"}, "seed: 4294967296 is more than 4294967295"),
    ({"prompt": "a", "guidance": "high"}, "guidance: 'high' is not a number"),
    ({"prompt": "a", "guidance": "nan"}, "guidance: 'nan' is not a number"),
    ({"prompt": "a", "guidance": "-1"}, "guidance: -1.0 is not a finite number of zero or more"),
    ({"prompt": "a", "network": "teacher"}, "network: 'teacher' is not one of student"),
    ({"prompt": "a", "stepz": "2"}, "'stepz' is no parameter; the parameters are prompt, "),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_what_is_wrong_is_said_before_anything_waits(student, given, sentence):
    with pytest.raises(ValueError) as raised:
        parameters.picture({name: [text] for name, text in given.items()}, {"student": student})
    assert sentence in str(raised.value) and len(str(raised.value)) < 300


def test_parameters_have_defaults_and_are_given_once(student):
    networks = {"student": student}
    found = parameters.picture({"prompt": [" a < b & c > d "], "seed": [""]}, networks)
    assert found == wanted("a < b & c > d")
    with pytest.raises(ValueError, match="steps: given 2 times"):
        parameters.picture({"prompt": ["a"], "steps": ["1", "2"]}, networks)


class Slow:
    """Draws when it is told to, and notes what it drew."""

    def __init__(self):
        self.networks = {"student": pipeline.Pipeline(CONFIG, {})}
        self.batches, self.go, self.began = [], threading.Event(), threading.Event()
        self.ready = lambda wanted: True
        self.compile = lambda wanted: None

    def draw(self, batch):
        self.batches.append([one.prompt for one in batch])
        self.began.set()
        assert self.go.wait(20)
        return [Drawn(b"\x89PNG", 2, 1.5) for _ in batch]


async def begun(slow):
    while not slow.began.is_set():
        await asyncio.sleep(0.01)


def test_pictures_of_one_program_are_drawn_together_and_in_order():
    slow = Slow()

    async def main():
        queue = Queue(slow.draw, lanes=1, batch_size=3, limit=9)
        running = asyncio.create_task(queue.run())
        jobs = queue.add([wanted("first")])
        await begun(slow)
        jobs += queue.add([wanted("a"), wanted("other", steps=4), wanted("b"), wanted("c")])
        jobs += queue.add([wanted("d")])
        assert [queue.position(job) for job in jobs] == [0, 1, 2, 3, 4, 5]
        slow.go.set()
        assert [(await job.drawn()).evaluations for job in jobs] == [2] * 6
        queue.close()
        await running

    asyncio.run(main())
    assert slow.batches == [["first"], ["a", "b", "c"], ["other"], ["d"]]


def test_a_full_queue_refuses_and_a_cancelled_picture_is_never_drawn():
    slow = Slow()

    async def main():
        queue = Queue(slow.draw, limit=2)
        running = asyncio.create_task(queue.run())
        queue.add([wanted("first")])
        await begun(slow)
        jobs = queue.add([wanted("gone"), wanted("kept")])
        with pytest.raises(Unavailable, match="2 of 2 places in the queue are taken") as raised:
            queue.add([wanted("more")])
        assert raised.value.seconds > 0
        queue.cancel(jobs[:1])
        assert queue.position(jobs[1]) == 1
        slow.go.set()
        with pytest.raises(Gone):
            await jobs[0].drawn()
        await jobs[1].drawn()
        queue.close()
        await running

    asyncio.run(main())
    assert slow.batches == [["first"], ["kept"]]


def test_a_program_is_compiled_beside_what_is_drawn():
    """Pictures of programs that are there overtake; no lane waits for the compiler."""
    slow, compiled, finish = Slow(), {2}, threading.Event()
    slow.go.set()

    def compile(one):
        assert finish.wait(20)
        compiled.add(one.steps)

    async def main():
        queue = Queue(slow.draw, ready=lambda one: one.steps in compiled, compile=compile)
        running = asyncio.create_task(queue.run())
        new = queue.add([wanted("new", steps=3), wanted("newer", steps=4)])
        for prompt in ("a", "b"):
            [job] = queue.add([wanted(prompt)])
            await asyncio.wait_for(job.drawn(), 20)
        assert [queue.position(job) for job in new] == [1, 2]
        finish.set()
        for job in new:
            await asyncio.wait_for(job.drawn(), 20)
        queue.close()
        await running

    asyncio.run(main())
    assert slow.batches == [["a"], ["b"], ["new"], ["newer"]]


def test_programs_are_kept_up_to_a_number(student, monkeypatch):
    monkeypatch.setattr(drawing, "PROGRAMS_KEPT", 2)
    studio = Studio({"student": student})
    first = studio.draw([wanted(steps=1)])[0].png
    for steps in (2, 4):
        studio.compile(wanted(steps=steps))
    kept = {steps for _, steps, each in student._samplers if each}
    assert kept == {2, 4} and studio.ready(wanted(steps=4)) and not studio.ready(wanted(steps=1))
    assert studio.draw([wanted(steps=1)])[0].png == first


@pytest.mark.parametrize(("lanes", "most"), [(1, 1), (2, 2)])
def test_programs_run_one_at_a_time_where_there_is_one_lane(student, monkeypatch, lanes, most):
    monkeypatch.setattr(drawing, "lanes", lambda: lanes)
    studio, running, found = Studio({"student": student}), [], []
    both = threading.Barrier(most)

    def pictures(batch, texts):
        running.append(batch)
        found.append(len(running))
        if most > 1:
            both.wait(20)
        time.sleep(0.05)
        running.pop()
        return np.zeros((1, 64, 64, 3), np.uint8)

    monkeypatch.setattr(studio, "_pictures", pictures)
    studio._used(wanted().program)
    threads = [
        threading.Thread(target=studio.draw, args=([wanted()],)),
        threading.Thread(target=studio.compile, args=(wanted(steps=4),)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(found) == most and len(found) == 2


def test_captions_are_embedded_with_the_settings_that_sample_has(student, monkeypatch):
    studio, found = Studio({"student": student}), []
    encode = studio._encoders["student"]

    def recorded(prompt):
        found.append(jax.config.jax_numpy_rank_promotion)
        return encode(prompt)

    monkeypatch.setitem(studio._encoders, "student", recorded)
    with jax.numpy_rank_promotion("raise"):
        [drawn] = studio.draw([wanted()])
    assert isinstance(drawn, Drawn) and set(found) == {"allow"}


def test_the_guidance_of_each_network_is_shown(student):
    other = pipeline.Pipeline(CONFIG.copy_and_resolve_references(), {})
    assert 'placeholder="3"' in page.render({"student": student, "teacher": other}, "it")
    other.config.evaluation.guidance = 2.5
    found = page.render({"student": student, "teacher": other}, "it")
    assert 'placeholder="student 3, teacher 2.5"' in found


def test_lanes_share_what_waits():
    slow, lanes = Slow(), 2

    async def main():
        queue = Queue(slow.draw, lanes=lanes, batch_size=8)
        jobs = queue.add([wanted(str(number)) for number in range(4)])
        running = asyncio.create_task(queue.run())
        slow.go.set()
        for job in jobs:
            await job.drawn()
        queue.close()
        await running

    asyncio.run(main())
    assert max(map(len, slow.batches)) == 2 and sum(map(len, slow.batches)) == 4


class Served:
    """A server in this process, asked within one event loop."""

    def __init__(self, studio, **settings):
        self._studio, self._settings = studio, {"lanes": 1, "batch_size": BATCH, **settings}
        self._stopped = False

    async def __aenter__(self):
        sockets = addresses.listen("localhost", 0)
        port = sockets[0].getsockname()[1]
        self.address, ready = f"http://localhost:{port}", asyncio.Event()
        self._task = asyncio.create_task(
            web.serve(sockets, self._studio, self._settings, "<tiny>", ready.set)
        )
        await ready.wait()
        self._client = AsyncHTTPClient(force_instance=True, max_clients=20)
        return self

    async def __aexit__(self, *exception):
        self.stop()
        await asyncio.wait_for(self._task, 20)
        self._client.close()

    def stop(self):
        """Tells the server to end, once: a second signal would end this process."""
        if not self._stopped:
            self._stopped = True
            os.kill(os.getpid(), signal.SIGTERM)

    async def ended(self, seconds):
        """Returns when the server has ended by itself."""
        await asyncio.wait_for(asyncio.shield(self._task), seconds)

    async def ask(self, path, given=None, **options):
        address = self.address + (url_concat(path, given) if given else path)
        return await self._client.fetch(address, raise_error=False, **options)

    async def waits(self, prompt):
        """Asks for a picture; its place in the queue, and the connection, which tells the rest."""
        port = int(self.address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("localhost", port)
        body = json.dumps([{"prompt": prompt}]).encode()
        head = b"POST /draw HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: "
        writer.write(head + b"%d\r\n\r\n%b" % (len(body), body))
        told = await reader.readuntil(b"}\n")
        return json.loads(told.partition(b"data: ")[2])["position"], reader, writer

    async def until_waiting(self, count):
        """Returns when so many wait."""
        while True:
            position, _, writer = await self.waits("how many?")
            writer.close()
            if position == count + 1:
                return


def of_server(test, studio, **settings):
    async def main():
        async with Served(studio, **settings) as server:
            await test(server)

    asyncio.run(main())


def test_an_image_comes_with_its_evaluations_and_milliseconds(student, studio):
    async def test(server):
        given = {"prompt": PROMPTS[1], "steps": 2, "seed": 5}
        expected = student(PROMPTS[1], steps=2, seed=5)[0]
        got = await server.ask("/image", given)
        sent = await server.ask("/image", method="POST", body=urlencode(given))
        for answer in (got, sent):
            assert answer.code == 200 and answer.headers["Content-Type"] == "image/png"
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), expected)
            assert answer.headers["X-Evaluations"] == "2"
            assert float(answer.headers["X-Milliseconds"]) > 0
        together = await asyncio.gather(
            *(server.ask("/image", {**given, "seed": seed}) for seed in (3, 4, 5, 6, 7))
        )
        assert together[2].body == got.body

    of_server(test, studio)


def test_a_bad_request_gets_one_sentence_of_plain_text():
    async def test(server):
        for given, sentence in REFUSED:
            for answer in (
                await server.ask("/image", given),
                await server.ask("/image", method="POST", body=urlencode(given)),
                await server.ask("/draw", method="POST", body=json.dumps([given]), headers=JSON),
            ):
                text = answer.body.decode()
                assert answer.code == 400 and sentence in text and text.count("\n") == 1
                assert answer.headers["Content-Type"].startswith("text/plain")
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
        many = json.dumps([{"prompt": "a"}] * 17)
        for body in (b"", b"{}", b"[]", b"[1]", b"[" * 100_000, many):
            answer = await server.ask("/draw", method="POST", body=body, headers=JSON)
            assert answer.code == 400 and b"no list of 1 to 16" in answer.body
        answer = await server.ask("/image?prompt=%ff")
        assert answer.code == 400 and b"not UTF-8" in answer.body
        assert (await server.ask("/nothing")).code == 404
        answer = await server.ask("/image", method="DELETE")
        assert (answer.code, answer.body) == (405, b"use GET or POST here\n")

    of_server(test, Slow())


def test_the_page_escapes_its_text_and_loads_nothing_from_elsewhere():
    async def test(server):
        page = await server.ask("/")
        text = page.body.decode()
        assert "&lt;tiny&gt;" in text and "<tiny>" not in text and "http" not in text
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        for file in ("page.js", "page.css"):
            found = await server.ask(f"/static/{file}")
            assert found.code == 200 and b"http" not in found.body
            assert b"innerHTML" not in found.body

    of_server(test, Slow())


def test_a_full_server_says_when_to_ask_again():
    slow = Slow()

    async def test(server):
        first = asyncio.create_task(server.ask("/image", {"prompt": "first"}))
        await begun(slow)
        position, reader, _ = await server.waits("second")
        assert position == 1
        refused = await server.ask("/image", {"prompt": "third"})
        assert refused.code == 503 and b"1 of 1 places in the queue are taken" in refused.body
        assert int(refused.headers["Retry-After"]) > 0
        slow.go.set()
        assert (await first).code == 200
        assert b'"png"' in await reader.read()

    of_server(test, slow, limit=1)
    assert slow.batches == [["first"], ["second"]]


def test_progress_is_told_and_a_client_that_goes_is_forgotten():
    slow = Slow()

    async def test(server):
        first = asyncio.create_task(server.ask("/image", {"prompt": "first"}))
        await begun(slow)
        _, _, gone = await server.waits("gone")
        gone.close()
        await server.until_waiting(0)
        said = []
        body = json.dumps([{"prompt": "kept"}, {"prompt": "kept too", "steps": 1}])

        def note(chunk):
            said.append(chunk.decode())
            if "".join(said).count("data:") == 2:
                slow.go.set()

        await server.ask("/draw", method="POST", body=body, headers=JSON, streaming_callback=note)
        assert (await first).code == 200
        events = [json.loads(part[6:]) for part in "".join(said).strip().split("\n\n")]
        assert events[:2] == [{"index": 0, "position": 1}, {"index": 1, "position": 2}]
        assert {"index": 1, "position": 1} in events
        pictures = [event for event in events if "png" in event]
        assert [event["index"] for event in pictures] == [0, 1]
        assert pictures[0]["evaluations"] == 2 and pictures[0]["milliseconds"] == 1.5

    of_server(test, slow)
    assert slow.batches == [["first"], ["kept"], ["kept too"]]


def test_a_signal_ends_what_is_drawn_and_refuses_the_rest():
    slow = Slow()

    async def test(server):
        first = asyncio.create_task(server.ask("/image", {"prompt": "first"}))
        await begun(slow)
        waiting = asyncio.create_task(server.ask("/image", {"prompt": "waiting", "steps": 3}))
        await server.until_waiting(1)
        server.stop()
        answer = await waiting
        assert answer.code == 503 and b"the server is stopping" in answer.body
        slow.go.set()
        assert (await first).code == 200

    before = signal.getsignal(signal.SIGTERM)
    of_server(test, slow)
    assert slow.batches == [["first"]] and signal.getsignal(signal.SIGTERM) is before


def test_a_fault_is_no_blank_page():
    class Broken(Slow):
        def draw(self, batch):
            raise RuntimeError("secret")

    async def test(server):
        answer = await server.ask("/image", {"prompt": "a"})
        assert answer.code == 500
        assert answer.body == b"the picture could not be drawn; the server's terminal says why\n"

    of_server(test, Broken())


def test_a_port_that_is_taken_is_refused():
    with addresses.listen("localhost", 0)[0] as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port={port}: .*; give another"):
            addresses.listen("localhost", port)


def test_a_teacher_is_drawn_beside_a_student_of_its_world(monkeypatch):
    teacher = SimpleNamespace(config=tiny_runs.RUNS["flow_matching"], world="x")
    student = SimpleNamespace(config=CONFIG, world=3)
    found = {"teacher": teacher, "student": student, "other": student}
    monkeypatch.setattr(pipeline, "load", found.get)
    assert list(networks.load("student", None)) == ["student"]
    assert list(networks.load("teacher", None)) == ["teacher"]
    assert list(networks.load("student", "other")) == ["student", "teacher"]
    with pytest.raises(ValueError, match="'teacher' is a teacher itself; leave --teacher out"):
        networks.load("teacher", "teacher")
    with pytest.raises(ValueError, match="another world than 'student'"):
        networks.load("student", "teacher")
