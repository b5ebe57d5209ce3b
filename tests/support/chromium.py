"""A headless Chromium, spoken to in its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from support.waiting import wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
"""Empty: this machine has none."""

_REPLY_S = 30.0
_MOST_BYTES = 64 * 2**20  # of a message: a picture
_FLAGS = (
    "--headless",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    # What a page asks of another host fails here, and is seen.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Tab:
    """One page. Calls wait for their replies; what the page complains of and asks for meanwhile is kept."""

    def __init__(self, address: str) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._num_calls = 0
        self._run(self._open(address))
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._run(self._session.close())
        self._loop.close()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """A method of the protocol."""
        return self._run(asyncio.wait_for(self._call(method, arguments), _REPLY_S))

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def visit(self, url: str, width: int, height: int, is_dark: bool = False) -> None:
        """Opens a page in a window of this size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def wait(self, condition: str, limit_s: float = _REPLY_S) -> None:
        """Until a JavaScript expression holds."""
        wait_until(lambda: bool(self.run(condition)), limit_s)

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds, as a person would."""
        self.run(
            f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))"
        )
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key such as `ArrowRight`; modifiers: 2 is control."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers)

    def picture(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _middle(self, selector: str) -> tuple[float, float]:
        x, y = self.run(
            f"""(found => {{
                found.scrollIntoView({{ block: 'center', behavior: 'instant' }});
                const box = found.getClientRects()[0];
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})(document.querySelector({json.dumps(selector)}))"""
        )
        return x, y

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    async def _open(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.put(f"{address}/json/new") as answer:
            tab = await answer.json()
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=_MOST_BYTES)

    async def _call(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._num_calls += 1
        await self._socket.send_json({"id": self._num_calls, "method": method, "params": arguments})
        while True:
            said = await self._socket.receive_json()
            if said.get("id") == self._num_calls:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result
            self._note(said.get("method"), said.get("params", {}))

    def _note(self, event: str, said: Mapping[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(said["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"]))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(said["entry"]["text"])


@contextmanager
def running_chromium() -> Iterator[str]:
    """The address of one, which is ended with the block."""
    # Its sandbox refuses root.
    flags = (*_FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            place = Path(folder) / "DevToolsActivePort"
            wait_until(lambda: place.exists() and "\n" in place.read_text())
            yield f"http://127.0.0.1:{place.read_text().splitlines()[0]}"
        finally:
            process.terminate()
            process.wait(_REPLY_S)


@contextmanager
def tab_of(address: str) -> Iterator[Tab]:
    """A new tab of a Chromium."""
    tab = Tab(address)
    try:
        yield tab
    finally:
        tab.close()
