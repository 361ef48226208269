"""The audit as a command: exit codes, files, the page in a browser; and its list makes a broken data set trainable."""

import html.parser
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lora_dist_testing.launching import flags, results_of, run, train
from lora_dist_testing.planted import ODD_CLASS, Planted, plant_files, plant_sound
from lora_dist_testing.web import CHROMIUM
from PIL import Image


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_files(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def audited(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an audit of files with every fault leaves behind."""
    out = tmp_path_factory.mktemp("audit") / "out"
    result = _audit(planted, out, code=4)
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "quarantine.txt"}
    assert "Traceback" not in result.stderr
    assert "error: truncated images: 2\n" in result.stdout
    assert "13 files to leave out: lora_dist.train --exclude" in result.stdout
    return out


def _audit(planted: Planted, out: Path, *more: object, code: int) -> subprocess.CompletedProcess[str]:
    arguments = ("--train_dir", planted.train, "--validation_dir", planted.validation, "--output_dir", out)
    return run("lora_dist.audit", *arguments, "--num_workers", 2, *more, code=code)


def test_the_exit_code_is_that_of_the_worst_finding(planted: Planted, audited: Path, tmp_path: Path) -> None:
    content = json.loads((audited / "report.json").read_text(encoding="utf-8"))
    assert content["exit_code"] == 4
    assert {one["severity"] for one in content["findings"]} == {"error", "warning"}
    _audit(planted, tmp_path / "without", "--exclude", audited / "quarantine.txt", code=3)
    content = json.loads((tmp_path / "without" / "report.json").read_text(encoding="utf-8"))
    assert content["exit_code"] == 3
    assert {one["severity"] for one in content["findings"]} == {"warning"}
    sound = plant_sound(tmp_path / "sound")
    result = _audit(sound, tmp_path / "sound audit", code=0)
    assert "57 images in 3 classes (42 training, 15 validation): 0 errors, 0 warnings" in result.stdout
    assert "No problems found" in (tmp_path / "sound audit" / "report.html").read_text()
    (tmp_path / "file").touch()
    assert f"--output_dir {tmp_path / 'file'}" in _audit(sound, tmp_path / "file", code=2).stderr
    assert "no such file: /nowhere" in _audit(sound, tmp_path / "x", "--exclude", "/nowhere", code=2).stderr


def test_a_run_that_fails_on_a_bad_file_trains_without_the_listed_ones(
    planted: Planted, audited: Path, vit: Path, tmp_path: Path
) -> None:
    arguments = flags(
        model_name_or_path=vit,
        train_dir=planted.train,
        validation_dir=planted.validation,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
    )
    failed = train(*arguments, "--output_dir", tmp_path / "1", code=2)
    assert "cannot read an image of the data set" in failed.stderr
    assert any(path in failed.stderr for path in planted.left_out)

    listed = audited / "quarantine.txt"
    done = train(*arguments, "--output_dir", tmp_path / "2", "--exclude", listed)
    assert "are not in the data" not in done.stderr
    files = [path for path in (*planted.train.rglob("*"), *planted.validation.rglob("*")) if not path.is_dir()]
    split = json.loads((tmp_path / "2" / "split.json").read_text())
    used = split["train"]["num_samples"] + split["validation"]["num_samples"]
    assert used == len(files) - len(planted.left_out)
    results = results_of(tmp_path / "2")
    assert results["eval_samples"] == split["validation"]["num_samples"]
    assert results["data_fingerprint"]["train"] == split["train"]["fingerprint"]


class _Tags(html.parser.HTMLParser):
    """Tags of a page, and what the body says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.body: dict[str, str | None] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "body":
            self.body = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


PROBE = """<script>addEventListener("load", () => {
  const data = document.body.dataset;
  data.overflow = document.documentElement.scrollWidth - innerWidth;
  data.pictures = document.images.length;
  data.missing = [...document.images].filter(one => !one.naturalWidth).length;
})</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_as_it_is_meant(width: int, planted: Planted, audited: Path, tmp_path: Path) -> None:
    """All pictures are there, nothing sticks out, and no name became markup."""
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text((audited / "report.html").read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1200",
    ]
    shown = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, timeout=120, check=True)
    tags = _Tags()
    tags.feed(shown.stdout.decode())
    assert int(tags.body["data-overflow"] or 0) <= 0
    unreadable = {"empty", "truncated", "unreadable", "bomb"}
    pictures = sum(len(files) for kind, files in planted.expected if kind not in unreadable)
    assert int(tags.body["data-pictures"] or 0) == tags.tags.count("img") == pictures
    assert tags.body["data-missing"] == "0"
    assert tags.tags.count("script") == 1, "the probe"
    assert ODD_CLASS.replace("\n", "\\n") in tags.text
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        assert image.width == width
        assert np.asarray(image.convert("L")).std() > 5
