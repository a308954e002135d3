"""Chromium, driven over two pipes by its DevTools protocol, so that a test sees what a reader sees."""

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

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = (390, 844), (1280, 900)


def program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """A page in a browser; `events` is all the browser said, newest last."""

    def __init__(self, out: int, back: int):
        self.out, self.back, self.buffer, self.number, self.session = out, back, b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        own = {"id": self.number, "method": method, "params": params}
        os.write(self.out, json.dumps(own | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            message = self._read(60)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def _read(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            self.buffer += os.read(self.back, 1 << 20)
        first, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message

    def wait(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._read(60)

    def show(self, file: Path | str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> float:
        """Open a file or a URL; seconds until it is loaded and two frames are drawn."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size[0] <= PHONE[0],
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        start = time.monotonic()
        self.call("Page.navigate", url=file if isinstance(file, str) else file.absolute().as_uri())
        self._wait_until_drawn()
        return time.monotonic() - start

    def _wait_until_drawn(self) -> None:
        self.wait("Page.loadEventFired")
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def press(self, key: str, code: int, loads: bool = False) -> None:
        """Press a key by its name and Windows code; `loads`: until the page that it asks for is drawn."""
        self.events.clear()
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", **event, **(text if kind == "keyDown" else {}))
        if loads:
            self._wait_until_drawn()

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def fetched(self) -> list[str]:
        """What was asked for besides data in the file itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def complaints(self) -> list[Any]:
        """What the console says: errors, warnings, violations of the page's policy."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event["method"] in kinds]


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A tab of a new browser, which cannot reach any network."""
    name = program()
    assert name
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-pipe"]
    flags += ["--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}", "about:blank"]
    # The protocol speaks on descriptors 3 and 4; sh cannot name those above 9.
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', name, *flags]
    with (profile.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        one = Tab(ours_out, ours_in)
        targets = one.call("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        one.session = one.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            one.call(f"{domain}.enable")
        yield one
    finally:
        os.close(ours_out)
        process.terminate()
        process.wait(20)
        os.close(ours_in)
