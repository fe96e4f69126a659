"""A headless Chromium, driven over its DevTools protocol by a pipe: enough of it for tests of pages."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0  # for an answer
FLAGS = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--disable-background-networking"),
)


class Page:
    """A tab. `errors` are what its console complained of, `requests` the URLs that it asked for."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers, self._buffer, self._number = to, answers, b"", 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._events.append(answer)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer within {SECONDS:.0f} s"
            read = os.read(self._answers, 1 << 20)
            assert read, "Chromium ended"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, url: str) -> None:
        """Open a URL and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition} did not become true within {SECONDS:.0f} s"
            time.sleep(0.05)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            of_press = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **of_press)

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and the scheme of colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    @property
    def errors(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the page's policy refused."""
        self.run("0")  # events that are on their way
        found = []
        for event in self._events:
            told = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(told["exceptionDetails"]))
            if event.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(told["args"]))
            if event.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """URLs of requests, but for those of data in the page itself."""
        self.run("0")
        asked = [
            event["params"]["request"]["url"]
            for event in self._events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith("data:")]


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A tab of a Chromium that ends with the block; the test skips where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs Chromium ({', '.join(NAMES)}); .ci/run installs Debian's package")
    (commands, to), (answers, out) = os.pipe(), os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{out}', "bash", program, *FLAGS, f"--user-data-dir={profile}"]
    with subprocess.Popen(
        command, pass_fds=(commands, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        for end in (commands, out):  # Chromium has its own
            os.close(end)
        try:
            yield Page(to, answers)
        finally:
            process.kill()
            for end in (to, answers):
                os.close(end)
