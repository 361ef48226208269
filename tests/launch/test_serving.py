"""`predict --serve` as a process: what a person sees in Chromium, what a program gets, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lora_dist_testing.hub_server import Commit, Repository, environment_of, serving
from lora_dist_testing.launching import command, environment, predict
from lora_dist_testing.tiny import make_image, write_bundle
from lora_dist_testing.uploads import HEAD, encoded, png_of
from lora_dist_testing.web import Browser, post

LABELS = ["<b>bold</b>", "a & b", "an émoji 🦊"]
NAMES = ["<img src=x onerror=alert(1)>.png", "two words.png", "ü.png"]


@contextmanager
def _serving(*arguments: object, **extra: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it says it serves on."""
    words = command("lora_dist.predict", [*arguments, "--serve", "--port", 0])
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(**extra)
    )
    assert process.stderr is not None
    said = ""
    try:
        while not (found := re.search(r"serving on (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "adapter"
    write_bundle(directory, vit, LABELS, scale=0.5, lora_r=4)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        make_image(number, 0).save(folder / name)
    return [folder / name for name in NAMES]


def _cards(browser: Browser) -> list[dict[str, Any]]:
    """What stands on the page, top down: names, classes with their shares, lengths of bars, errors."""
    script = """JSON.stringify([...document.querySelectorAll('.result')].map((card) => ({
        name: card.querySelector('h2').textContent,
        labels: [...card.querySelectorAll('.label')].map((label) => label.textContent),
        scores: [...card.querySelectorAll('.score')].map((score) => score.textContent),
        shares: [...card.querySelectorAll('.bar')].map((bar) => bar.getBoundingClientRect().width
            / bar.parentElement.getBoundingClientRect().width),
        error: card.querySelector('.error')?.textContent ?? '',
        shown: card.querySelector('img').naturalWidth,
    })))"""
    return json.loads(browser.evaluate(script))


def test_the_server_stands_hostile_uploads_and_ends_without_a_traceback(
    adapter: Path, images: list[Path], tmp_path: Path
) -> None:
    """All in one process, which serves the ONNX file of a blend of an adapter with itself. What it says is what
    `predict` says of the same files with that adapter."""
    told = predict("--adapter", adapter, "--images", *images, "--top_k", 3).stdout
    rows = [json.loads(line) for line in told.splitlines()]
    onnx = tmp_path / "blend.onnx"
    served = ["--adapter", adapter, f"again={adapter}", "--average", "--onnx", onnx]
    files = [(f"{number}.png", image.read_bytes()) for number, image in enumerate(images)]
    with _serving(*served, "--max_upload_mb", 1, "--max_megapixels", 1) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        hostile = [b"", b"text", b"<svg/>", files[0][1][:-99], png_of(50_000, 50_000, bytes(1000)), bytes(2_000_000)]
        for data in hostile:
            assert 400 <= post(url, [("a.png", data)])[0] < 500
        assert post(url, [("../a.png", files[0][1])])[0] == 400
        status, answer = post(url, files)
        assert status == 200
        for entry, row in zip(answer["predictions"], rows, strict=True):
            assert [one["label"] for one in entry["top_k"]] == [one["label"] for one in row["top_k"]]
            for one, other in zip(entry["top_k"], row["top_k"], strict=True):
                assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_a_hundred_uploads_at_once_are_all_answered(adapter: Path) -> None:
    """By two adapters on one base, in turns."""
    files = [("large.bmp", encoded("BMP", (800, 800)))]
    queries = ["?adapter=day", "?adapter=night"]
    both = ["--adapter", f"day={adapter}", f"night={adapter}"]
    with _serving(*both) as (_, url), ThreadPoolExecutor(100) as pool:
        uploads = [pool.submit(post, url, files, queries[number % 2]) for number in range(100)]
        statuses = [upload.result()[0] for upload in uploads]
        assert set(statuses) <= {200, 503}
        assert statuses.count(200) >= 64
        assert [post(url, files, query)[0] for query in queries] == [200, 200]


def test_an_adapter_is_served_by_its_name_on_the_hub(adapter: Path, images: list[Path], tmp_path: Path) -> None:
    told = json.loads(predict("--adapter", adapter, "--images", images[0]).stdout)
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with serving() as hub:
        hub.repositories["lab/flowers"] = Repository(commits=[Commit("c" * 40, "message", files, frozenset(files))])
        with _serving("--adapter", "lab/flowers", **environment_of(hub, tmp_path)) as (_, url):
            status, answer = post(url, [("a.png", images[0].read_bytes())])
            with urllib.request.urlopen(url, timeout=30) as response:
                assert "<title>lab/flowers</title>" in response.read().decode()
    assert status == 200
    assert answer["predictions"][0]["label"] == told["label"]
    assert answer["predictions"][0]["score"] == pytest.approx(told["score"])


@pytest.mark.parametrize("signals", [1, 2])
def test_it_ends_though_an_upload_is_open(signals: int, adapter: Path) -> None:
    with _serving("--adapter", adapter) as (process, url):
        assert process.stderr is not None
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{HEAD}Content-Length: 10000\r\n\r\n".encode() + b"--bound")
            time.sleep(0.5)
            start = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            said = ""
            while not said.endswith("stopped\n"):
                line = process.stderr.readline()
                assert line, said
                said += line
            # What comes after that is Python's own end.
            assert time.monotonic() - start < 8
            assert b" 503 " in connection.recv(4096)
        said += process.communicate(timeout=60)[1]
        assert process.returncode == 0
        assert "Traceback" not in said


@pytest.mark.browser
def test_dropped_and_chosen_images_come_back_with_bars(adapter: Path, images: list[Path], tmp_path: Path) -> None:
    """In a real browser. Names of files and classes are text, whatever markup they hold."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(encoded()[:-300])
    with _serving("--adapter", adapter) as (_, url), Browser() as browser:
        expected = {
            image.name: post(url, [("a.png", image.read_bytes())], "?top_k=5")[1]["predictions"][0]["top_k"]
            for image in images
        }
        browser.open(url)
        assert browser.evaluate("document.title") == str(adapter)
        browser.drop("#drop", images[:1])
        browser.wait_for("document.querySelectorAll('.bars').length === 1")
        browser.choose("#choose", [*images[1:], bad])
        browser.wait_for("document.querySelectorAll('.bars').length === 3 && document.querySelector('.error') !== null")
        browser.wait_for("[...document.images].every((image) => image.complete)")
        cards = {card["name"]: card for card in _cards(browser)}
        assert cards.keys() == {*NAMES, bad.name}
        for name, scores in expected.items():
            card = cards[name]
            assert card["labels"] == [one["label"] for one in scores]
            assert card["scores"] == [f"{100 * one['score']:.1f}%" for one in scores]
            assert card["shares"] == pytest.approx([one["score"] for one in scores], abs=0.01)
            assert card["shown"] == 40
            assert not card["error"]
        assert "truncated" in cards[bad.name]["error"]
        # The answer to the damaged file is the one error that the browser knows of.
        assert len(browser.problems) <= 1, browser.problems
        assert all("422" in problem for problem in browser.problems)
        # A file that the browser cannot show gets an empty box, without the icon of a broken image.
        text = tmp_path / "text.png"
        text.write_text("no image")
        browser.choose("#choose", [text])
        browser.wait_for("document.querySelectorAll('.error').length === 2")
        browser.wait_for("document.querySelectorAll('.result img:not([src])').length === 1")
        # A click shows the heat map in place of the picture, and another click the picture again.
        for pressed, width in (("true", 256), ("false", 40), ("true", 256)):
            browser.evaluate("document.querySelector('.explain').click()")
            browser.wait_for(f"document.querySelector('.explain').getAttribute('aria-pressed') === '{pressed}'")
            browser.wait_for(f"document.querySelector('.explain img').naturalWidth === {width}")
        browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
