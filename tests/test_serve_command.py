"""The page in a real browser, and the command as a process of its own."""

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request

import chromium
import pytest
import tiny_runs

pytestmark = pytest.mark.slow
pytest.importorskip("tornado", reason="pip install 'jax-distill[serve]'")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server of a tiny student, which ends well when it is told to."""
    workdir = tmp_path_factory.mktemp("served") / "<b>tiny"
    tiny_runs.save_run(workdir, tiny_runs.RUNS["scm"])
    command = [sys.executable, "-m", "jax_distill.serve", f"--checkpoint={workdir}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().split()[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_the_command_serves_pictures(address):
    with urllib.request.urlopen(f"{address}image?prompt=a+red+circle&steps=2") as answer:
        assert answer.headers["X-Evaluations"] == "2" and answer.read(4) == b"\x89PNG"


def test_what_the_command_cannot_do_is_said_before_anything_is_loaded():
    hidden = "import sys; sys.modules['tornado'] = None; from jax_distill import serve; from"
    hidden += " jax_distill.runs import commands; commands.run(serve.main)"
    for command, said in (
        (["-c", hidden], "the page needs tornado; pip install 'jax-distill[serve]'"),
        (["-m", "jax_distill.serve", "--num_processes=2"], "the page draws in one process"),
        (["-m", "jax_distill.serve", "--queue=15"], "--queue=15: not integer >= 16"),
    ):
        ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert ended.returncode == 1 and said in ended.stderr and "Traceback" not in ended.stderr


def test_a_second_signal_ends_the_command_while_a_picture_is_drawn():
    slow = """
import threading
from jax_distill.serving import drawing
drawing.Studio.prepare = lambda studio: None
def draw(studio, batch):
    print("drawing", flush=True)
    threading.Event().wait()
drawing.Studio.draw = draw
from jax_distill import serve
from jax_distill.runs import commands
commands.run(serve.main)
"""
    command = [sys.executable, "-c", slow, "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        port = int(server.stdout.readline().split()[0].rpartition(":")[2].rstrip("/"))
        with socket.create_connection(("localhost", port)) as client:
            client.sendall(b"GET /image?prompt=a HTTP/1.0\r\n\r\n")
            assert server.stdout.readline() == "drawing\n"
            server.send_signal(signal.SIGTERM)
            while "stopping" not in server.stderr.readline():
                assert server.poll() is None
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 128 + signal.SIGINT


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_draws_and_shows_text_as_text(address, tmp_path):
    asyncio.run(use_the_page(address, tmp_path))


async def use_the_page(address, folder):
    async with chromium.Chromium(folder) as page:
        await page.open(address)
        assert "<b>tiny" in await page.run("document.querySelector('h1').textContent")
        assert await page.run("document.querySelectorAll('b, main *').length") == 0

        await ask(page, "a red circle", "draw")
        await page.until("document.querySelectorAll('img').length === 1")
        await page.until("document.querySelector('img').naturalWidth === 64")
        text = await page.run("document.querySelector('figcaption').innerText")
        assert "Student, 2 steps" in text and "2 evaluations" in text and "\xa0ms" in text

        await ask(page, "<img src=x onerror=alert(1)>", "draw")
        await page.until("document.getElementById('status').className === 'bad'")
        assert "is a tag, not a word" in await page.run(
            "document.getElementById('status').textContent"
        )

        await ask(page, "a < b & " + " ".join(f"word{number}" for number in range(11)), "draw")
        await page.until("document.querySelectorAll('main .bad').length === 1")
        assert "the limit is 10" in await page.run("document.querySelector('main').innerText")

        await ask(page, "two squares", "grid")
        await page.until("document.querySelectorAll('img').length === 12")
        assert await page.run("document.querySelector('main').innerText.match(/seed 3/g).length")
        await page.screenshot(folder / "page.png")
        assert (folder / "page.png").stat().st_size > 10_000
    unexpected = [said for said in page.said if "400 (Bad Request)" not in said]
    assert not unexpected


async def ask(page, prompt, button):
    await page.run(f"document.getElementById('form').elements.prompt.value = {prompt!r}")
    await page.run(f"document.getElementById({button!r}).click()")
