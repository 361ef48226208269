"""The real client and a Hub on this machine: what arrives, what is tried again, what comes back, what stays secret."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from lora_dist_testing.edits import edit_json
from lora_dist_testing.hub_server import SIGNATURE, TOKEN, Hub, point_client_at, serving
from lora_dist_testing.launching import assert_same_run, free_port, lines_of, results_of, run_flags
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_image, write_bundle
from safetensors.torch import load, load_file

from lora_dist import hub, hub_client, train
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.hub import HubError, local_directory, open_repository, upload
from lora_dist.model.base.backbone import load_base
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.training.saving.publisher import Publisher, Push

NOW = (0.0, 0.0, 0.0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client in this process talks to, as one who is logged in."""
    with serving() as running:
        point_client_at(running.url, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def dead_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the Hub should be."""
    point_client_at(f"http://127.0.0.1:{free_port()}", tmp_path / "cache", monkeypatch)


def _files(directory: Path, weights: bytes = b"weights", card: str = "---\ntags: [x]\n---\n\n# card\n") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    (directory / "config.json").write_bytes(b'{"a": 1}\n')
    (directory / "README.md").write_text(card)
    return directory


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def _bundle(directory: Path, base_model: Path) -> torch.Tensor:
    model, base = write_bundle(directory, base_model, ["a", "b"], card="# card\n", lora_r=4)
    with torch.inference_mode():
        return model.eval()(pixel_values=ImageTransforms(base.processor).batch([make_image(0, 0)])).logits


# --- one call ---


def test_a_directory_becomes_one_commit_with_the_same_bytes(server: Hub, tmp_path: Path) -> None:
    assert open_repository("flowers", private=False) == "ada/flowers"
    directory = _files(tmp_path / "bundle", weights=bytes(range(256)) * 500)
    upload("ada/flowers", directory, "Step 7: accuracy 0.9000")
    assert server.messages("ada/flowers") == ["Step 7: accuracy 0.9000"]
    assert server.repositories["ada/flowers"].files == _contents(directory)
    assert {"preupload", "batch", "store", "verify", "commit"} <= set(server.requests)


def test_what_has_not_changed_is_not_sent_again(server: Hub, tmp_path: Path) -> None:
    open_repository("flowers", private=False)
    upload("ada/flowers", _files(tmp_path / "bundle"), "first")
    upload("ada/flowers", _files(tmp_path / "bundle", card="---\ntags: [x]\n---\n\n# new\n"), "second")
    assert server.repositories["ada/flowers"].commits[1].sent == {"README.md"}
    assert server.requests.count("store") == 1


@pytest.mark.parametrize(("name", "whole"), [("flowers", "ada/flowers"), ("lab/flowers", "lab/flowers")])
def test_a_repository_is_made_once_in_the_namespace_that_is_named(server: Hub, name: str, whole: str) -> None:
    assert [open_repository(name, private=False) for _ in range(2)] == [whole, whole]
    assert not server.repositories[whole].private


def test_a_repository_is_private_if_that_is_asked_for_and_keeps_what_it_is(server: Hub) -> None:
    open_repository("hidden", private=True)
    open_repository("hidden", private=False)
    assert server.repositories["ada/hidden"].private


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x", "https://huggingface.co/ada/x"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_it_is_asked(server: Hub, name: str) -> None:
    with pytest.raises(HubError, match="Repo id must") as caught:
        open_repository(name, private=False)
    assert not caught.value.temporary
    assert server.requests == []


def test_without_a_token_the_way_to_one_is_named(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token: .*hf auth login.*HF_TOKEN") as caught:
        open_repository("flowers", private=False)
    assert not caught.value.temporary


def test_offline_is_said(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        open_repository("flowers", private=False)
    assert not caught.value.temporary


def test_a_hub_that_does_not_answer_is_not_waited_for(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 0.3)
    server.fail("create", "mute", "for ever")
    start = time.monotonic()
    with pytest.raises(HubError, match="timed out") as caught:
        open_repository("flowers", private=False)
    assert time.monotonic() - start < 2
    assert caught.value.temporary


@pytest.mark.parametrize(
    ("route", "failure", "temporary"),
    [
        ("create", 503, True),
        ("create", 429, True),
        ("create", "drop", True),
        ("create", 401, False),
        ("create", 403, False),
        ("validate", "html", True),
        ("validate", 500, True),
        ("validate", "drop", True),
        ("preupload", 403, False),
        ("preupload", 404, False),
        ("batch", 403, False),
        ("store", 403, False),
        ("commit", 502, True),
        ("commit", 429, True),
        ("commit", 409, True),
        ("commit", 412, True),
        ("commit", "drop", True),
        ("commit", 401, False),
        ("commit", 403, False),
        ("commit", 413, False),
    ],
)
def test_which_failures_may_go_away(
    route: str, failure: int | str, temporary: bool, server: Hub, tmp_path: Path
) -> None:
    server.fail(route, failure, "for ever")
    with pytest.raises(HubError) as caught:
        upload(open_repository("flowers", private=False), _files(tmp_path / "bundle"), "message")
    assert caught.value.temporary == temporary
    assert server.requests[-1] == ("info" if (route, failure) in (("create", 401), ("create", 403)) else route)


def test_nobody_listening_may_go_away(dead_end: None) -> None:
    with pytest.raises(HubError) as caught:
        open_repository("flowers", private=False)
    assert caught.value.temporary


def test_a_card_that_the_hub_does_not_take_is_a_lasting_failure(server: Hub, tmp_path: Path) -> None:
    open_repository("flowers", private=False)
    card = "---\nbase_model: /home/ada/vit\n---\n# x\n"
    with pytest.raises(HubError, match="/home/ada/vit") as caught:
        upload("ada/flowers", _files(tmp_path / "bundle", card=card), "message")
    assert not caught.value.temporary


@pytest.mark.parametrize("route", ["create", "preupload", "store", "commit"])
def test_no_message_holds_a_token_or_a_signature(
    route: str, server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail(route, 403, "for ever")
    with pytest.raises(HubError) as caught:
        upload(open_repository("flowers", private=False), _files(tmp_path / "bundle"), "message")
    assert "403" in str(caught.value)
    for secret in (TOKEN, SIGNATURE):
        assert secret not in str(caught.value)
        assert secret not in caplog.text


def test_a_token_given_where_a_name_belongs_is_not_repeated(server: Hub) -> None:
    with pytest.raises(HubError) as caught:
        open_repository(f"https://ada:{TOKEN}@huggingface.co/ada/x", private=False)
    assert TOKEN not in str(caught.value)
    with pytest.raises(HubError) as caught:
        open_repository("https://ada:hf_anotherTOKEN0123@huggingface.co/ada/x", private=False)
    assert "hf_another" not in str(caught.value)


def test_nor_is_one_of_another_form(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-a-company")
    with pytest.raises(HubError, match="Repo id must") as caught:
        open_repository("https://ada:secret-of-a-company@hub.example/ada/x", private=False)
    assert "secret-of-a-company" not in str(caught.value)


# --- in the background ---


def _publisher(name: str = "flowers", waits: tuple[float, ...] = NOW) -> Publisher:
    return Publisher(name, private=False, waits=waits)


@pytest.mark.parametrize(
    ("route", "failures"),
    [
        ("create", (503, 503)),
        ("create", ("drop",)),
        ("validate", ("html", "drop", 500)),
        ("preupload", (503,)),
        ("store", (500,)),
        ("commit", (503, 429, 502)),
        ("commit", ("drop",)),
        ("*", (503,)),
    ],
)
def test_a_push_is_tried_until_it_works(
    route: str, failures: tuple[int | str, ...], server: Hub, tmp_path: Path
) -> None:
    server.fail(route, *failures)
    directory = _files(tmp_path / "bundle")
    pushing = _publisher()
    assert pushing.finish(Push(directory, "the result", is_temporary=False))
    assert pushing.name == "ada/flowers"
    assert server.messages("ada/flowers") == ["the result"]
    assert server.repositories["ada/flowers"].files == _contents(directory)
    assert directory.is_dir()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(server: Hub, tmp_path: Path) -> None:
    server.fail("commit", "lose")
    assert _publisher().finish(Push(_files(tmp_path / "bundle"), "the result", is_temporary=False))
    assert server.messages("ada/flowers") == ["the result"]


@pytest.mark.parametrize(("failure", "tries"), [(503, 4), (403, 1), (404, 1)])
def test_tries_are_bounded_and_lasting_failures_are_not_repeated(
    failure: int, tries: int, server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("commit", failure, "for ever")
    directory = _files(tmp_path / "bundle")
    with caplog.at_level(logging.INFO, "lora_dist"):
        assert not _publisher().finish(Push(directory, "the result", is_temporary=False))
    assert server.requests.count("commit") == tries
    assert f"hf upload ada/flowers {directory} ." in caplog.text
    assert str(failure) in caplog.text
    assert _contents(directory)


def test_a_hub_that_is_gone_costs_a_warning(dead_end: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = _files(tmp_path / "bundle")
    assert not _publisher().finish(Push(directory, "the result", is_temporary=False))
    assert f"hf upload flowers {directory} ." in caplog.text
    assert directory.is_dir()


def test_the_end_waits_only_so_long(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.delay("commit", 5)
    start = time.monotonic()
    # It goes on in the background after this test, so it must not try again at the next one's server.
    pushing = _publisher("slow", waits=())
    assert not pushing.finish(Push(_files(tmp_path / "bundle"), "the result", is_temporary=False), seconds=1)
    assert 1 <= time.monotonic() - start < 4
    assert "took longer than 1 s" in caplog.text
    assert "hf upload" in caplog.text


def test_a_push_does_not_wait_and_the_newest_takes_the_place_of_one_that_waits(server: Hub, tmp_path: Path) -> None:
    server.delay("commit", 1.5)
    pushing = _publisher()
    directories = [_files(tmp_path / str(number), weights=b"%d" % number) for number in range(4)]
    start = time.monotonic()
    pushing.push(Push(directories[0], "0", is_temporary=True))
    _until(lambda: "commit" in server.requests or "preupload" in server.requests)
    before = time.monotonic()
    pushing.push(Push(directories[1], "1", is_temporary=True))
    pushing.push(Push(directories[2], "2", is_temporary=True))
    assert time.monotonic() - before < 0.75
    assert not directories[1].exists()
    _until(lambda: len(server.repositories["ada/flowers"].commits) == 2)
    assert time.monotonic() - start > 2.5
    assert pushing.finish(Push(directories[3], "3", is_temporary=False))
    assert server.messages("ada/flowers") == ["0", "2", "3"]
    assert [directory.exists() for directory in directories] == [False, False, False, True]
    commits = server.repositories["ada/flowers"].commits
    assert [commit.files["adapter_model.safetensors"] for commit in commits] == [b"0", b"2", b"3"]


def _until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_newer_one_ends_the_tries_of_an_older_one(server: Hub, tmp_path: Path) -> None:
    server.fail("commit", 503)
    pushing = _publisher(waits=(600.0,))
    pushing.push(Push(_files(tmp_path / "old"), "old", is_temporary=True))
    _until(lambda: "commit" in server.requests)
    assert pushing.finish(Push(_files(tmp_path / "new"), "new", is_temporary=False), seconds=30)
    assert server.messages("ada/flowers") == ["new"]


def test_a_failure_before_the_end_does_not_end_the_pushing(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("commit", 403)
    pushing = _publisher()
    pushing.push(Push(_files(tmp_path / "old"), "Step 3", is_temporary=True))
    _until(lambda: "not pushed to the Hub: Step 3" in caplog.text)
    _until(lambda: not (tmp_path / "old").exists())
    assert pushing.finish(Push(_files(tmp_path / "new"), "new", is_temporary=False))
    assert server.messages("ada/flowers") == ["new"]


def test_a_failure_of_no_known_kind_is_said_and_does_not_pass_for_success(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def upload_oddly(*_: object) -> None:
        raise KeyError("odd")

    pushing = _publisher()
    monkeypatch.setattr(hub, "upload", upload_oddly)
    pushing.push(Push(_files(tmp_path / "best"), "Step 3", is_temporary=True))
    _until(lambda: "not pushed to the Hub: Step 3: KeyError: 'odd'" in caplog.text)
    directory = _files(tmp_path / "bundle")
    assert not pushing.finish(Push(directory, "the result", is_temporary=False))
    assert f"hf upload ada/flowers {directory} ." in caplog.text
    monkeypatch.setattr(hub, "open_repository", upload_oddly)
    with pytest.raises(HubError, match="KeyError: 'odd'"):
        _publisher().open()


class _Stuck(Push):
    def discard(self) -> None:
        raise RuntimeError("ends the thread")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_does_not_pass_for_success(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {*threading.enumerate()}
    pushing = _publisher()
    (thread,) = {*threading.enumerate()} - before
    pushing.push(_Stuck(_files(tmp_path / "best"), "Step 3", is_temporary=True))
    _until(lambda: not thread.is_alive())
    directory = _files(tmp_path / "bundle")
    assert not pushing.finish(Push(directory, "the result", is_temporary=False))
    assert f"hf upload ada/flowers {directory} ." in caplog.text


def test_a_token_that_cannot_be_read_is_said(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(HubError, match=r"cannot read the token: .*hf auth login"):
        open_repository("flowers", private=False)
    with pytest.raises(HubError, match="Is a directory"):
        upload("ada/flowers", _files(tmp_path / "bundle"), "message")


def test_a_result_that_is_gone_is_said(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not _publisher("ada/flowers").finish(Push(tmp_path / "none", "the result", is_temporary=False))
    assert f"hf upload ada/flowers {tmp_path / 'none'} ." in caplog.text


def test_the_end_says_what_it_waits_for(server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lora_dist"):
        assert _publisher().finish(Push(_files(tmp_path / "bundle"), "the result", is_temporary=False), seconds=40)
    assert caplog.messages[0] == "pushing the result to flowers on the Hub; giving up after 40 s"


def test_the_thread_keeps_no_process_alive() -> None:
    _publisher()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "hub")


# --- and back ---


def test_a_bundle_comes_back_and_classifies_as_before(server: Hub, vit: Path, tmp_path: Path) -> None:
    expected = _bundle(tmp_path / "bundle", vit)
    upload(open_repository("flowers", private=True), _with_more(tmp_path / "bundle"), "message")
    directory = local_directory("ada/flowers")
    here = _contents(tmp_path / "bundle")
    assert _contents(directory) == {name: here[name] for name in here if name != "pytorch_model.bin"}
    classifier = load_classifier(directory)
    with torch.inference_mode():
        found = classifier.model(pixel_values=ImageTransforms(classifier.processor).batch([make_image(0, 0)])).logits
    torch.testing.assert_close(found, expected)


def _with_more(directory: Path) -> Path:
    """With what somebody may have beside a bundle, which is not to be fetched."""
    (directory / "pytorch_model.bin").write_bytes(b"x")
    return directory


def test_an_adapter_of_an_old_release_comes_back(server: Hub) -> None:
    """Its weights are a pickle, for want of anything else."""
    old = OLD / "peft_0_2"
    upload(open_repository("flowers", private=False), old, "message")
    classifier = load_classifier(local_directory("ada/flowers"), str(OLD / "base"))
    torch.testing.assert_close(logits(classifier.model), expected_of(old), rtol=1e-5, atol=1e-5)


def test_a_whole_model_of_an_old_release_comes_back(server: Hub, vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    edit_json(tmp_path / "old" / "config.json", id2label={0: "a", 1: "b"})
    torch.save({}, tmp_path / "old" / "training_args.bin")
    upload(open_repository("flowers", private=False), tmp_path / "old", "message")
    directory = local_directory("ada/flowers")
    assert not (directory / "training_args.bin").exists()
    expected = load_base(str(vit), ["a", "b"]).model.state_dict()
    for name, tensor in load_classifier(directory).model.state_dict().items():
        assert tensor.equal(expected[name]), name


def test_a_revision_can_be_named(server: Hub, tmp_path: Path) -> None:
    open_repository("flowers", private=False)
    for weights in (b"old", b"new"):
        upload("ada/flowers", _files(tmp_path / "bundle", weights=weights), "message")
    first = server.repositories["ada/flowers"].commits[0].oid
    for name, weights in (("ada/flowers", b"new"), (f"ada/flowers@{first}", b"old"), ("ada/flowers@main", b"new")):
        assert (local_directory(name) / "adapter_model.safetensors").read_bytes() == weights


def test_a_directory_comes_before_the_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _files(tmp_path / "ada")
    _files(tmp_path / "ada" / "flowers")
    for name in ("ada/flowers", str(tmp_path / "ada"), str(tmp_path / "none"), "./ada/none", "a/b/c", "none"):
        assert local_directory(name) == Path(name)
    assert server.requests == []


def test_the_cache_is_used_if_the_hub_fails(server: Hub, tmp_path: Path) -> None:
    upload(open_repository("flowers", private=False), _files(tmp_path / "bundle"), "message")
    before = local_directory("ada/flowers")
    server.fail("*", 503, "for ever")
    assert local_directory("ada/flowers") == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ada/none", "no repository ada/none, or it is private"),
        ("ada/flowers@v9", "no branch, tag or commit v9"),
        ("ada/gated", "ada/gated is gated"),
    ],
)
def test_a_failed_download_says_what_to_do(name: str, said: str, server: Hub, tmp_path: Path) -> None:
    for repository in ("flowers", "gated"):
        upload(open_repository(repository, private=False), _files(tmp_path / "bundle"), "message")
    server.repositories["ada/gated"].gated = True
    with pytest.raises(UserError, match=said) as caught:
        local_directory(name)
    assert f"no such directory: {name}" in str(caught.value)


def test_no_network_is_said(dead_end: None) -> None:
    with pytest.raises(UserError, match=r"no such directory: ada/flowers.*\n.*hf download ada/flowers"):
        local_directory("ada/flowers")


def test_a_hub_in_trouble_is_said(server: Hub) -> None:
    server.fail("*", 503, "for ever")
    with pytest.raises(UserError, match="503"):
        local_directory("ada/flowers")


def test_a_private_repository_is_not_found_without_a_token(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(open_repository("hidden", private=True), _files(tmp_path / "bundle"), "message")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="or it is private: run `hf auth login` or set HF_TOKEN"):
        local_directory("ada/hidden")


# --- a run ---


def _run(vit: Path, photos: Path, out: Path, *more: object) -> Path:
    train.main(
        [
            *run_flags(
                vit,
                photos,
                out,
                logging_steps=1,
                eval_steps=1,
                checkpointing_steps=1,
                save_total_limit=9,
                max_train_steps=5,
                metric_for_best_model="loss",
                learning_rate=5e-3,
            ),
            *map(str, more),
        ]
    )
    return out


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_pushes_its_bests_and_its_result_and_trains_as_without(
    tuning: str, server: Hub, vit: Path, photos: Path, tmp_path: Path
) -> None:
    """With LoRA at a rate that spoils what the first updates reach; in full at one that gets better all the time."""
    rate = (
        ("--learning_rate", 0.5, "--lr_scheduler_type", "constant") if tuning == "lora" else ("--learning_rate", 5e-4)
    )
    more = ("--tuning", tuning, *rate)
    pushed = _run(vit, photos, tmp_path / "run", *more, "--push_to_hub", "--hub_private_repo")
    result = pushed / ("model" if tuning == "full" else "adapter")
    repository = server.repositories["ada/run"]
    assert repository.private
    assert repository.files == _contents(result)
    assert f"predict --{result.name} ada/run --images" in repository.files["README.md"].decode()
    losses = {line["step"]: line["eval/loss"] for line in lines_of(pushed) if "eval/loss" in line}
    bests = [step for step in losses if losses[step] == min(losses[before] for before in range(1, step + 1))]
    steps = [int(message.split()[1].rstrip(":")) for message in server.messages("ada/run")]
    if tuning == "lora":
        assert bests != list(losses), "every evaluation happened to be the best, which proves nothing"
    else:
        assert len(steps) >= 2, "pushed at the end alone"
    assert steps == sorted(steps)
    assert set(steps) <= set(bests)
    assert steps[-1] == results_of(pushed)["best_step"]
    weights = next(name for name in repository.files if name.endswith(".safetensors"))
    for step, commit in zip(steps, repository.commits, strict=True):
        assert commit.message == f"Step {step}: loss {losses[step]:.4f}"
        saved = list(load_file(pushed / "checkpoints" / f"step-{step:08d}" / "trained.safetensors").values())
        for tensor in load(commit.files[weights]).values():
            assert any(tensor.equal(one) for one in saved)
    assert not (pushed / "outbox").exists()
    if tuning == "lora":
        assert_same_run(pushed, _run(vit, photos, tmp_path / "plain", *more))


def test_a_hub_that_refuses_every_commit_costs_a_run_nothing(
    server: Hub, vit: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.fail("commit", 403, "for ever")
    out = _run(vit, photos, tmp_path / "run", "--push_to_hub")
    assert results_of(out)["step"] == 5
    assert load_classifier(out / "adapter").labels == ["a", "b", "c"]
    said = capfd.readouterr().err
    assert "Training continues" in said
    assert f"hf upload ada/run {out / 'adapter'} ." in said
    assert server.repositories["ada/run"].commits == []
    assert not (out / "outbox").exists()


@pytest.mark.parametrize(
    ("token", "more", "said"),
    [
        (None, (), "no token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrongWRONGwrong01234", (), "Invalid credentials"),
        ("hf_readsREADSreads0123456789abcdefgh", (), "You don't have the rights"),
        (TOKEN, ("--hub_model_id", "someone/else"), "cannot push to someone/else"),
        (TOKEN, ("--hub_model_id", "a/b/c"), "Repo id must"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    token: str | None,
    more: tuple[str, ...],
    said: str,
    server: Hub,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as caught:
        _run(tmp_path / "no-such-model", photos, tmp_path / "run", "--push_to_hub", *more)
    assert caught.value.code == 2
    err = capfd.readouterr().err
    assert "--push_to_hub: " in err
    assert said in err
    assert token is None or token not in err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_without_the_hub_but_does_not_begin_without(
    server: Hub, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publisher.__init__, "__defaults__", (NOW,))
    server.fail("create", 503, "for ever")
    with pytest.raises(SystemExit) as caught:
        _run(vit, photos, tmp_path / "run", "--push_to_hub")
    assert caught.value.code == 2
    _run(vit, photos, tmp_path / "run", "--max_train_steps", 2)
    (tmp_path / "run" / "outbox" / "step-00000001").mkdir(parents=True)
    more = ("--push_to_hub", "--resume_from_checkpoint", "auto")
    assert results_of(_run(vit, photos, tmp_path / "run", *more))["step"] == 5
    assert server.repositories == {}
    assert not (tmp_path / "run" / "outbox").exists()
