"""A Hub that accepts connections and says nothing: what is waited for is said, and not for ever."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from lora_dist_testing.hub_server import Hub, point_client_at, serving

from lora_dist import hub_client, waiting
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.streaming import prepare
from lora_dist.errors import UserError
from lora_dist.hub import local_directory, open_repository, upload
from lora_dist.model.base.backbone import load_base
from lora_dist.settings.train import DataSettings


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that has one second to say something, and to which a wait counts as long after a fifth of that."""
    monkeypatch.setattr(hub_client, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(hub_client, "_silence", hub_client._Silence())
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.2)
    with serving() as running:
        point_client_at(running.url, tmp_path / "cache", monkeypatch)
        yield running


def _load_photos() -> object:
    return load_data(DataSettings(dataset_name="ada/photos"), 0)


def _index_photos() -> object:
    return prepare(DataSettings(dataset_name="ada/photos", streaming=True, validation_split="test"))


@pytest.mark.parametrize(
    ("load", "what", "way_out"),
    [
        (lambda: load_base("ada/vit", ["a", "b"]), "the base model ada/vit", "`hf download ada/vit`"),
        (lambda: local_directory("ada/flowers@v1"), "the model or adapter ada/flowers@v1", "`hf download ada/flowers`"),
        (_load_photos, "the data set ada/photos", "datasets.load_dataset('ada/photos')"),
        (_index_photos, "the data set ada/photos", "datasets.load_dataset('ada/photos')"),
    ],
)
def test_a_silent_hub_is_an_error_that_says_what_to_do(
    load: Callable[[], object], what: str, way_out: str, server: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("*", "mute", "for ever")
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load()
    # Some tries of the client, a second or two apart, are in it as well.
    assert time.monotonic() - start < 20
    message = str(error.value)
    assert message.startswith(
        f"cannot load {what}: it is not cached, and the Hub at {server.url} has not responded for"
    )
    assert way_out in message
    assert "HF_HUB_OFFLINE=1" in message
    said = f"waiting up to 1 s for the Hub at {server.url} to respond: {what}"
    assert said in caplog.text


def test_the_cache_is_used_if_the_hub_is_silent(server: Hub, vit: Path) -> None:
    upload(open_repository("vit", private=False), vit, "message")
    first = load_base("ada/vit", ["a", "b"])
    there = local_directory("ada/vit")
    server.fail("*", "mute", "for ever")
    start = time.monotonic()
    second = load_base("ada/vit", ["a", "b"])
    assert (second.fingerprint, second.revision) == (first.fingerprint, first.revision)
    assert local_directory("ada/vit") == there
    assert time.monotonic() - start < 10


def test_a_hub_that_answers_again_is_asked_again(server: Hub, vit: Path) -> None:
    upload(open_repository("vit", private=False), vit, "message")
    server.fail("info", "mute")
    with pytest.raises(UserError, match="has not responded"):
        local_directory("ada/vit")
    assert (local_directory("ada/vit") / "model.safetensors").is_file()


def test_a_slow_download_is_not_interrupted(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "adapter_model.safetensors").write_bytes(bytes(range(60)))
    upload(open_repository("flowers", private=False), bundle, "message")
    before = server.requests.count("resolve")
    server.seconds_a_byte = 0.05
    start = time.monotonic()
    assert (local_directory("ada/flowers") / "adapter_model.safetensors").read_bytes() == bytes(range(60))
    assert time.monotonic() - start > 3, "it was not slow"
    assert server.requests.count("resolve") - before == 2, "the head, and the file at once"
    assert f"loading the model or adapter ada/flowers from the Hub at {server.url}" in caplog.text
