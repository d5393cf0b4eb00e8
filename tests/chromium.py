"""Chromium without a window, driven by its own protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

from tornado.websocket import websocket_connect

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Chromium:
    """One page of a browser; an asynchronous context.

    Args:
      folder: of its profile.
      width: of the window in pixels.
      height: likewise.
    """

    def __init__(self, folder: Path, width: int = 1000, height: int = 900):
        self._folder, self._size = folder, f"--window-size={width},{height}"
        self._numbers = itertools.count(1)
        self.said: list[str] = []  # on its console

    async def __aenter__(self) -> "Chromium":
        self._process = subprocess.Popen(
            [
                PROGRAM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                self._size,
                "--remote-debugging-port=0",
                f"--user-data-dir={self._folder}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = self._folder / "DevToolsActivePort"
        while not found.exists() or not found.read_text().count("\n"):
            assert self._process.poll() is None, "Chromium has ended"
            await asyncio.sleep(0.1)
        port = found.read_text().splitlines()[0]
        while True:
            with urllib.request.urlopen(f"http://localhost:{port}/json") as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                break
            await asyncio.sleep(0.1)
        self._socket = await websocket_connect(
            pages[0]["webSocketDebuggerUrl"], max_message_size=2**26
        )
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *exception) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    async def call(self, method: str, **parameters) -> dict:
        """Calls the protocol's method."""
        number = next(self._numbers)
        await self._socket.write_message(
            json.dumps({"id": number, "method": method, "params": parameters})
        )
        while True:
            message = json.loads(await self._socket.read_message())
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 120) -> None:
        """Returns when an expression is true."""
        began = time.monotonic()
        while not await self.run(script):
            assert time.monotonic() - began < seconds, script
            await asyncio.sleep(0.1)

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def screenshot(self, file: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(answer["data"]))
