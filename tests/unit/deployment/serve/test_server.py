"""The server over real HTTP: its answers, its refusals, and that it keeps running."""

import http.client
import io
import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import torch
import uvicorn
from lora_dist_testing.tiny import write_bundle
from lora_dist_testing.uploads import HEAD, encoded, png_of
from lora_dist_testing.web import BOUNDARY, Browser, multipart, post, post_body
from PIL import Image
from torch import Tensor, nn
from transformers import BitImageProcessor, ViTImageProcessor

import lora_dist
from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.serve import request_limits
from lora_dist.deployment.serve.batching import Batcher
from lora_dist.deployment.serve.request_limits import Limits
from lora_dist.deployment.serve.server import make_app, run
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet, load_adapter_set
from lora_dist.model.trained.classifier import Classifier

LABELS = ["<b>red</b>", "green & co", "blau 🦊"]
LIMITS = Limits(body=300_000, pixels=20_000, files=8)
GOOD = encoded()


class Mean(nn.Module):
    """Logits are the mean red, green and blue. Records its batch sizes, and can be paused."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.broken = False

    def forward(self, pixel_values: Tensor) -> Any:
        self.sizes.append(len(pixel_values))
        assert self.may_go.wait(30)
        if self.broken:
            raise RuntimeError("out of luck")
        return SimpleNamespace(logits=3 * pixel_values.mean(dim=(2, 3)))


@contextmanager
def _serving(served: Classifier | AdapterSet, **more: Any) -> Iterator[str]:
    served = AdapterSet({"model": served}) if isinstance(served, Classifier) else served
    app = make_app(served, "<i>model</i>", LIMITS, top_k=2, batch_size=16, device=torch.device("cpu"), **more)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(Mean(), ViTImageProcessor(size={"height": 8, "width": 8}), LABELS)


@pytest.fixture(scope="module")
def url(classifier: Classifier) -> Iterator[str]:
    with _serving(classifier) as address:
        yield address


@pytest.fixture
def model(classifier: Classifier) -> Mean:
    assert isinstance(classifier.model, Mean)
    classifier.model.sizes.clear()
    return classifier.model


def test_several_files_come_back_in_order_as_predict_says(url: str, classifier: Classifier, tmp_path: Any) -> None:
    files = [(f"{number} ü.{kind}", encoded(kind)) for number, kind in enumerate(("PNG", "JPEG", "BMP"))]
    for name, data in files:
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name, _ in files]
    rows = classify(classifier, paths, Inference(torch.device("cpu"), batch_size=8, num_workers=0), top_k=2)
    status, answer = post(url, files)
    assert status == 200
    assert [entry["file"] for entry in answer["predictions"]] == [name for name, _ in files]
    for entry, row in zip(answer["predictions"], rows, strict=True):
        assert [(one["label"], pytest.approx(one["score"])) for one in entry["top_k"]] == row.top_k
        assert (entry["label"], entry["score"]) == (entry["top_k"][0]["label"], entry["top_k"][0]["score"])


def test_an_unsure_answer_is_unknown_and_has_its_scores(classifier: Classifier) -> None:
    with _serving(classifier, min_confidence=0.999) as url:
        (entry,) = post(url, [("a.png", GOOD)])[1]["predictions"]
    assert entry["label"] == "unknown"
    assert entry["score"] == entry["top_k"][0]["score"] < 0.999
    assert entry["top_k"][0]["label"] in LABELS


def test_a_model_without_feature_maps_refuses_to_explain_and_serves_on(url: str) -> None:
    body = multipart([("a.png", GOOD)], "file")
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}/explain", body, headers), timeout=30)
    assert refused.value.code == 501
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_an_image_that_is_too_long_and_thin_is_refused_and_has_a_row(tmp_path: Path) -> None:
    processor = BitImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 8, "width": 8})
    classifier = Classifier(Mean(), processor, LABELS)
    for name, size in (("strip.png", (3, 4_001)), ("line.png", (1, 4_000)), ("good.png", (20, 30))):
        Image.new("RGB", size).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("good.png", "strip.png", "line.png")]
    rows = list(classify(classifier, paths, Inference(torch.device("cpu"), batch_size=8, num_workers=0), top_k=2))
    assert [bool(row.top_k) for row in rows] == [True, False, True]
    assert "3 x 4001 pixels are too long and thin" in (rows[1].error or "")
    with _serving(classifier) as url:
        status, answer = post(url, [("strip.png", Path(paths[1]).read_bytes())])
        assert (status, "too long and thin" in answer["detail"]) == (413, True)
        assert post(url, [("line.png", Path(paths[2]).read_bytes())])[0] == 200


@pytest.mark.parametrize(("query", "count"), [("", 2), ("?top_k=1", 1), ("?top_k=99", 3)])
def test_a_request_says_how_many_classes_it_wants(url: str, query: str, count: int) -> None:
    status, answer = post(url, [("a.png", GOOD)], query)
    assert status == 200
    assert len(answer["predictions"][0]["top_k"]) == count


def test_requests_at_the_same_time_share_a_batch(url: str, model: Mean) -> None:
    model.may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, url, [("a.png", GOOD), ("b.png", GOOD)]) for _ in range(8)]
        # The first requests block the model while the others arrive.
        threading.Event().wait(2)
        model.may_go.set()
        assert [answer.result()[0] for answer in answers] == [200] * 8
    assert sum(model.sizes) == 16
    assert len(model.sizes) < 8, "fewer runs of the model than requests"


BODY = LIMITS.body
HOSTILE: dict[str, tuple[list[tuple[str, bytes]], int]] = {
    "empty": ([("a.png", b"")], 422),
    "truncated": ([("a.png", GOOD[:-300])], 422),
    "text": ([("a.png", b"GIF? no")], 415),
    "svg": ([("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")], 415),
    "tiff": ([("a.tif", encoded("TIFF"))], 415),
    "decompression bomb": ([("a.png", png_of(65_535, 65_535, bytes(10_000_000)))], 413),
    "too many pixels": ([("a.png", encoded(size=(201, 100)))], 413),
    "path": ([("../../../etc/passwd", GOOD)], 400),
    "windows path": ([("..\\\\..\\\\boot.ini", GOOD)], 400),
    "absolute path": ([("/etc/passwd", GOOD)], 400),
    "long name": ([("x" * 300 + ".png", GOOD)], 400),
    "too many bytes": ([("a.png", bytes(BODY))], 413),
    "too many files": ([("a.png", GOOD)] * 9, 413),
    "thousands of files": ([("a", b"")] * 2000, 400),
    "one bad of two": ([("a.png", GOOD), ("b.png", b"bad")], 415),
    "no file": ([], 422),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_and_the_server_goes_on(name: str, url: str, model: Mean) -> None:
    files, expected = HOSTILE[name]
    status, answer = post(url, files)
    assert status == expected, answer
    assert answer["detail"]
    assert not model.sizes
    assert post(url, [("a.png", GOOD)])[0] == 200


@pytest.mark.parametrize("query", ["?top_k=0", "?top_k=-1", "?top_k=many"])
def test_a_wrong_parameter_is_refused(url: str, query: str) -> None:
    assert post(url, [("a.png", GOOD)], query)[0] == 422


def test_a_request_without_the_field_of_the_form_is_told_how_to_send_a_file(url: str) -> None:
    # `curl -F files=<one.jpg` sends a file without its name.
    nameless = multipart([("a.png", GOOD)]).replace(b'; filename="a.png"', b"")
    for status, answer in (
        post(url, [("a.png", GOOD)], field="image"),
        post(url, []),
        post_body(f"{url}/predict", nameless),
    ):
        assert status == 422
        assert answer["detail"] == f"send images in the field 'files' of a form: curl -F files=@one.jpg {url}/predict"
    explained = post(url, [("a.png", GOOD)], field="files", path="/explain")
    assert explained[1]["detail"] == f"send an image in the field 'file' of a form: curl -F file=@one.jpg {url}/explain"


def _raw(url: str, head: str, chunks: list[bytes]) -> bytes:
    """Sends raw bytes, and returns the status line of the response."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        try:
            for chunk in chunks:
                connection.sendall(chunk)
        except OSError:
            # The server has answered and closed the connection.
            pass
        return connection.recv(4096).partition(b"\r\n")[0]


def test_a_body_without_a_declared_size_is_cut_off_at_the_limit(url: str) -> None:
    """As `curl -H 'Transfer-Encoding: chunked'` sends it."""
    body = multipart([("a.png", bytes(BODY + 1))])
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    assert b" 413 " in _raw(url, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", [chunk, b"0\r\n\r\n"])
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_a_declared_size_beyond_the_limit_is_refused_unread(url: str) -> None:
    assert b" 413 " in _raw(url, f"{HEAD}Content-Length: {BODY + 1}\r\n\r\n", [])


@pytest.mark.parametrize("declared", [True, False])
def test_a_client_that_sends_too_much_still_receives_the_reason(url: str, declared: bool) -> None:
    """Closing a connection with unread bytes resets it and loses the response, so the server drains it first."""
    body = multipart([("a.png", bytes(100 * BODY))])
    size = f"Content-Length: {len(body)}" if declared else "Transfer-Encoding: chunked"
    chunks = [body] if declared else [b"%x\r\n%s\r\n" % (len(body), body), b"0\r\n\r\n"]
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{HEAD}{size}\r\n\r\n".encode())
        for chunk in chunks:
            connection.sendall(chunk)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 413 " in answer.partition(b"\r\n")[0]
    assert b"at most 0.3 MB" in answer


def _send_for(connection: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.sendall(bytes(10_000))
        time.sleep(0.01)


def test_a_client_that_never_stops_sending_is_disconnected(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "DRAIN_SECONDS", 0.5)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{HEAD}Content-Length: {10**12}\r\n\r\n".encode())
        with pytest.raises(OSError, match=r"reset|pipe"):
            _send_for(connection, 30)
    assert post(url, [("a.png", GOOD)])[0] == 200


FIELD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n'.encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"--boundary-of-the-parts\r\nbroken", FIELD * 2000 + f"--{BOUNDARY}--".encode()],
    ids=["empty", "nonsense", "broken", "thousands of fields"],
)
def test_a_body_that_is_no_form_is_refused(url: str, content: bytes) -> None:
    answer = _raw(url, f"{HEAD}Content-Length: {len(content)}\r\n\r\n", [content])
    assert b" 400 " in answer or b" 422 " in answer
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_an_aborted_upload_does_no_harm(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{HEAD}Content-Length: 10000\r\n\r\n".encode() + b"--bound")
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_more_concurrent_uploads_than_allowed_are_all_answered(url: str, model: Mean) -> None:
    """With bodies of the largest size: closing a connection with unread bytes would reset it."""
    body = multipart([("a.png", GOOD), ("b.png", bytes(BODY - 10_000))])

    def upload() -> tuple[int, str | None, str]:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("POST", "/predict", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
        answer = connection.getresponse()
        return answer.status, answer.headers["Retry-After"], json.load(answer)["detail"]

    with ThreadPoolExecutor(100) as pool:
        answers = [answer.result() for answer in [pool.submit(upload) for _ in range(100)]]
    assert {status for status, *_ in answers} <= {415, 503}
    assert [wait for status, wait, _ in answers if status == 503] == ["1"] * [one for one, *_ in answers].count(503)


def test_uploads_beyond_the_limit_are_refused(url: str, model: Mean, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "MAX_UPLOADS", 4)
    model.may_go.clear()
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, url, [("a.png", GOOD)]) for _ in range(20)]
        done = [answer.result() for answer in itertools.islice(as_completed(answers), 16)]
        assert [status for status, _ in done] == [503] * 16
        assert "try again" in done[0][1]["detail"]
        with urllib.request.urlopen(url, timeout=30) as response:
            assert response.status == 200, "the page is not limited"
        model.may_go.set()
        assert sorted(answer.result()[0] for answer in answers) == [200] * 4 + [503] * 16
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_an_upload_that_takes_too_long_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it never stops sending."""
    monkeypatch.setattr(request_limits, "UPLOAD_SECONDS", 1.0)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{HEAD}Content-Length: 10000\r\n\r\n".encode() + FIELD)
        for _ in range(20):
            connection.sendall(b"-")
            time.sleep(0.1)
        assert b" 408 " in connection.recv(4096).partition(b"\r\n")[0]


def test_a_slow_upload_within_the_time_is_classified(url: str) -> None:
    body = multipart([("a.png", GOOD)])
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode())
        for part in range(8):
            connection.sendall(body[part * len(body) // 8 : (part + 1) * len(body) // 8])
            time.sleep(0.2)
        assert b" 200 " in connection.recv(4096).partition(b"\r\n")[0]


def test_the_server_keeps_running_after_an_error_of_the_model(url: str, model: Mean) -> None:
    model.broken = True
    request = urllib.request.Request(
        f"{url}/predict", multipart([("a.png", GOOD)]), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    )
    with pytest.raises(urllib.error.HTTPError, match="500"):
        urllib.request.urlopen(request, timeout=30)
    model.broken = False
    assert post(url, [("a.png", GOOD)])[0] == 200


def test_the_page_loads_nothing_external_and_escapes_names(url: str) -> None:
    with urllib.request.urlopen(url, timeout=30) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "&lt;i&gt;model&lt;/i&gt;" in page
    assert "<i>model" not in page
    assert "http" not in page.replace("http-equiv", "")
    # The page sends each image in a request of its own.
    assert "Each is one request, of up to 0.3 MB and 0.02 megapixels." in page
    assert "up to 8 files and 0.3 MB in a request" in page
    assert policy.startswith("default-src 'self'")


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/openapi.json"])
def test_head_requests_get_headers_alone(path: str, url: str) -> None:
    with urllib.request.urlopen(f"{url}{path}", timeout=30) as response:
        whole = response.headers
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", method="HEAD"), timeout=30) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == whole["Content-Type"]
        assert response.headers["Content-Length"] == whole["Content-Length"]
        assert response.read() == b""


def test_the_endpoint_is_documented(url: str) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=30) as response:
        operation = json.load(response)["paths"]["/predict"]["post"]
    assert operation["description"]
    assert {"200", "400", "413", "415", "422"} <= operation["responses"].keys()
    assert "multipart/form-data" in operation["requestBody"]["content"]


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


DAY, NIGHT = ["sun", 'cloud "nine"'], ["<b>moon</b>", "star", "owl"]


@pytest.fixture(scope="module")
def two(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], AdapterSet]:
    """Directories of two adapters of one base with different classes, and the adapters."""
    root = tmp_path_factory.mktemp("two")
    directories = {"day": root / "day", "a & <night>": root / "night"}
    for seed, (directory, labels) in enumerate(zip(directories.values(), (DAY, NIGHT), strict=True)):
        write_bundle(directory, vit, labels, seed=seed, scale=0.5)
    return directories, load_adapter_set(directories)


def test_each_adapter_answers_under_its_name(two: tuple[dict[str, Path], AdapterSet]) -> None:
    """While requests for both wait together."""
    directories, served = two
    expected = {
        name: lora_dist.load(directory)(Image.open(io.BytesIO(GOOD)), top_k=3)
        for name, directory in directories.items()
    }
    names = list(directories) * 8
    with _serving(served) as url, ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda name: post(url, [("a.png", GOOD)], f"?top_k=3&adapter={quote(name)}"), names)
        for name, (status, answer) in zip(names, answers, strict=True):
            assert status == 200
            found = answer["predictions"][0]["top_k"]
            assert [one["label"] for one in found] == [one["label"] for one in expected[name]]
            assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected[name]], abs=1e-6)
        unnamed, unknown = (post(url, [("a.png", GOOD)], query) for query in ("", "?adapter=noon"))
        health, (_, page), (_, text) = (_get(f"{url}/{path}") for path in ("health", "", "metrics"))
    assert (unnamed[0], unknown[0]) == (422, 422)
    way_out = "; add ?adapter=NAME with one of these names: day, a & <night>"
    assert unnamed[1]["detail"] == f"there are several adapters{way_out}"
    assert unknown[1]["detail"] == f"there is no adapter 'noon'{way_out}"
    assert (health[0], json.loads(health[1])) == (200, {"status": "ok", "adapters": list(directories)})
    assert '<option value="a &amp; &lt;night&gt;">a &amp; &lt;night&gt; (3 classes)</option>' in page
    assert 'lora_dist_images_total{adapter="day"} 8\n' in text
    assert 'lora_dist_images_total{adapter="a & <night>"} 8\n' in text


def test_metrics_count_what_was_answered_and_refused(classifier: Classifier, model: Mean) -> None:
    with _serving(classifier) as url:
        before = _get(f"{url}/metrics")[1]
        assert post(url, [("a.png", GOOD), ("b.png", GOOD)])[0] == 200
        assert post(url, [("a.png", b"bad")])[0] == 415
        assert post(url, [("a.png", bytes(BODY))])[0] == 413
        model.broken = True
        with pytest.raises(ValueError, match="Expecting value"):  # the text of a 500 is no JSON
            post(url, [("a.png", GOOD)])
        model.broken = False
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            lines = response.read().decode().splitlines()
    assert "lora_dist_request_seconds_count 0" in before.splitlines()
    for line in (
        'lora_dist_requests_total{status="200"} 1',
        'lora_dist_requests_total{status="413"} 1',
        'lora_dist_requests_total{status="415"} 1',
        'lora_dist_requests_total{status="500"} 1',
        'lora_dist_request_seconds_bucket{le="+Inf"} 4',
        "lora_dist_request_seconds_count 4",
        'lora_dist_images_total{adapter="model"} 2',
        "lora_dist_waiting_images 0",
        "# TYPE lora_dist_request_seconds histogram",
    ):
        assert line in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert 0 < float(values["lora_dist_model_seconds_total"]) < float(values["lora_dist_request_seconds_sum"]) + 1
    buckets = [int(value) for name, value in values.items() if "_bucket" in name]
    assert buckets == sorted(buckets)


def test_a_server_whose_model_has_stopped_is_not_healthy(classifier: Classifier, monkeypatch: Any) -> None:
    made: list[Batcher] = []

    def recorded(*arguments: Any) -> Batcher:
        made.append(Batcher(*arguments))
        return made[0]

    monkeypatch.setattr("lora_dist.deployment.serve.server.Batcher", recorded)
    with _serving(classifier) as url:
        assert _get(f"{url}/health")[0] == 200
        made[0].close()
        assert _get(f"{url}/health") == (503, '{"detail":"the model has stopped"}')


@pytest.mark.browser
def test_the_page_asks_the_adapter_that_is_chosen(two: tuple[dict[str, Path], AdapterSet], tmp_path: Path) -> None:
    """In a real browser. Images that are there keep the answers of the adapter that gave them."""
    (tmp_path / "a.png").write_bytes(GOOD)
    with _serving(two[1]) as url, Browser() as browser:
        browser.open(url)
        browser.choose("#choose", [tmp_path / "a.png"])
        browser.wait_for("document.querySelectorAll('.bars').length === 1")
        browser.evaluate("document.getElementById('adapter').value = 'a & <night>'")
        browser.choose("#choose", [tmp_path / "a.png"])
        browser.wait_for("document.querySelectorAll('.bars').length === 2")
        texts = "[...document.querySelectorAll('.result')].map((card) => card.querySelector('h2').textContent)"
        assert json.loads(browser.evaluate(f"JSON.stringify({texts})")) == ["a.png (a & <night>)", "a.png (day)"]
        labels = "[...document.querySelectorAll('.label')].map((one) => one.textContent)"
        found = json.loads(browser.evaluate(f"JSON.stringify({labels})"))
        assert (set(found[:2]) < set(NIGHT), set(found[2:])) == (True, set(DAY))
        assert "adapter=NAME" in browser.evaluate("document.querySelector('footer code').textContent")
        assert browser.problems == []


def test_a_port_in_use_is_refused_by_name(classifier: Classifier, url: str) -> None:
    port = int(url.rpartition(":")[2])
    app = make_app(AdapterSet({"x": classifier}), "x", LIMITS, top_k=1, batch_size=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match=f"--port {port}: Address already in use.*--port 0"):
        run(app, "127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host no\.such\.host\.invalid"):
        run(app, "no.such.host.invalid", 0)
