"""The serving page as its users meet it: uploads over HTTP, and a real Chromium driven through its DevTools pipe.

# A picture of the page after a drop:
PYTHONPATH=tests/helpers python -m lora_dist_testing.web http://127.0.0.1:8000 docs/serve.png one.png two.png
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60
BOUNDARY = "boundary-of-the-parts"


def multipart(files: Sequence[tuple[str, bytes]], field: str = "files") -> bytes:
    """The body of a form with files, under names that no browser would send."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def post(
    url: str, files: Sequence[tuple[str, bytes]], query: str = "", field: str = "files", path: str = "/predict"
) -> tuple[int, Any]:
    """Uploads files to an endpoint; the status, and the JSON of the answer."""
    return post_body(f"{url}{path}{query}", multipart(files, field))


def post_body(url: str, body: bytes) -> tuple[int, Any]:
    """Posts the body of a form; the status, and the JSON of the answer."""
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, width: int = 800, height: int = 900) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The pipe of the DevTools is on descriptors 3 and 4. As root, Chromium runs only without its sandbox.
        command = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        size = [f"--window-size={width},{height}", "--hide-scrollbars", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *flags, *size, "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._read, self._count, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; what the page logs as an error meanwhile goes to `problems`."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(answer["params"]))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            received = os.read(self._from, 1 << 16)
            assert received, "Chromium has ended"
            self._read += received
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.05)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drags files from outside over an element and lets them go."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = (self.evaluate(f"{box}.{low} + {box}.{size} / 2") for low, size in (("x", "width"), ("y", "height")))
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Chooses files as the dialog of a file input does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        """Writes the page, or part of it, as a PNG file."""
        options = {"clip": clip, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))


def main(url: str, picture: str, *files: str) -> None:
    """Drops files on the page and takes a picture of what it shows."""
    with Browser() as browser:
        browser.open(url)
        browser.drop("#drop", [Path(file).resolve() for file in files])
        browser.wait_for(f"document.querySelectorAll('.bars').length === {len(files)}")
        browser.wait_for("[...document.images].every((image) => image.complete)")
        height = browser.evaluate("document.body.scrollHeight")
        browser.screenshot(Path(picture), {"x": 0, "y": 0, "width": 800, "height": height, "scale": 1})


if __name__ == "__main__":
    main(*sys.argv[1:])
