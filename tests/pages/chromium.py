"""A small client for headless Chromium, over its DevTools protocol: open a file as a reader would, and ask the page about itself."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars"),
)
PATIENCE = 60.0  # seconds for any answer: the machine may be busy


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser. `said` is what its console complained of, `asked` every address that it requested, since `open`."""

    def __init__(self, path: str) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._count, self._session, self._loaded = 0, "", False
        try:
            self._socket = connect(self._address(), max_size=None, open_timeout=PATIENCE)
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._end()

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Show a file at a width, on a phone below 600 pixels, to a reader who prefers light or dark; returns when it is loaded."""
        phone = width < 600
        height = 740 if phone else 900
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.said.clear()
        self.asked.clear()
        self._loaded = False
        self._call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._receive()

    def js(self, expression: str) -> Any:
        """The value of an expression in the page. Raises RuntimeError where it throws."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"], indent=1))
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page, not only what fits the window, as a PNG."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _address(self) -> str:
        port = Path(self._profile) / "DevToolsActivePort"
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            lines = port.read_text().split() if port.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise RuntimeError("the browser did not start")

    def _call(self, method: str, **params: Any) -> Any:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params, **session}))
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=PATIENCE))
        what, about = message.get("method"), message.get("params", {})
        if what == "Page.loadEventFired":
            self._loaded = True
        elif what == "Runtime.consoleAPICalled":
            self.said.append(f"{about['type']}: {' '.join(str(a.get('value', a.get('description'))) for a in about['args'])}")
        elif what == "Runtime.exceptionThrown":
            self.said.append(f"exception: {about['exceptionDetails'].get('text')}")
        elif what == "Log.entryAdded":
            self.said.append(f"{about['entry']['level']}: {about['entry']['text']}")
        elif what == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif what == "Network.loadingFailed":
            self.said.append(f"not loaded: {about['errorText']}")
        return message

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)
