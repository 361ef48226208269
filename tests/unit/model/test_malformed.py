"""Rubbish in, a clear error or a clean row out: never a traceback, whatever the settings and the images are."""

import csv
import io
import json
import random
import signal
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_dist_testing import unprivileged
from lora_dist_testing.launching import flags
from lora_dist_testing.tiny import make_folder, make_image, write_bundle
from PIL import features

from lora_dist import predict
from lora_dist.data.pixels.images import UnreadableImageError, load_rgb
from lora_dist.errors import UserError
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.audit import AuditSettings
from lora_dist.settings.audit import contradictions as audit_contradictions
from lora_dist.settings.cli import flat_fields, parse
from lora_dist.settings.train import Settings
from lora_dist.settings.train_contradictions import contradictions
from lora_dist.storage.writable import require_writable

EXAMPLES = 200
NAMES = sorted(flat_fields(Settings))
RUBBISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _parse(arguments: list[str]) -> None:
    """Settings, help, or an error in words; anything else fails the test."""
    with suppress(UserError, SystemExit):
        parse(Settings, arguments, prog="p", description="", contradictions=contradictions)


@quick
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), RUBBISH, max_size=6))
def test_any_content_of_a_config_is_settings_or_an_error(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    _parse(["--config", str(path)])


@quick
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_in_place_of_a_config_are_settings_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    _parse(["--config", str(path)])


@quick
@given(st.lists(st.sampled_from([f"--{name}" for name in NAMES]) | st.text(max_size=10), max_size=8))
def test_any_words_are_settings_or_an_error(words: list[str]) -> None:
    _parse(words)


LONG = "x" * 300
ODD_PATHS = st.text(alphabet="a/.~\0\n\ud800", max_size=12) | st.sampled_from([LONG, f"new/{LONG}", f"{LONG}/new", ""])


@quick
@given(ODD_PATHS, ODD_PATHS, ODD_PATHS)
def test_any_path_is_one_or_an_error(tmp_path: Path, data: str, exclude: str, output: str) -> None:
    """Below an existing folder, so that nothing is met by chance, and as a place to write to."""
    root = tmp_path / "file"
    root.touch(exist_ok=True)
    paths = {"train_dir": data, "exclude": exclude, "output_dir": output}
    for base in (f"{tmp_path}/", f"{root}/", ""):
        arguments = [f"--{name}={base}{path}" for name, path in paths.items()]
        for kind, check in ((Settings, contradictions), (AuditSettings, audit_contradictions)):
            with suppress(UserError, SystemExit):
                parse(kind, arguments, prog="p", description="", contradictions=check)
        with suppress(UserError):
            require_writable(Path(base + output))


def test_a_path_that_cannot_be_is_named_by_its_flag(tmp_path: Path) -> None:
    """One with too long a name, and one in a directory that is closed."""
    (tmp_path / "closed").mkdir(mode=0)
    code = """if True:
        import sys
        from lora_dist import audit, predict, train
        from lora_dist.audit.__main__ import main
        from lora_dist.errors import UserError
        def refusal(command, *words):
            try:
                command(list(words))
            except SystemExit as end:
                print(command.__module__, end.code, file=sys.stderr)
        here = sys.argv[2]
        for path in eval(sys.argv[1]):
            print("next path", file=sys.stderr)
            refusal(train.main, "--train_dir", path, "--exclude", path)
            refusal(train.main, "--train_dir", here, "--output_dir", path)
            refusal(train.main, "--config", path)
            refusal(main, "--train_dir", here, "--output_dir", path)
            refusal(predict.main, "--adapter", path, "--images", here)
            refusal(predict.main, "--adapter", here, "--images", path)
    """
    make_folder(tmp_path / "photos")
    paths = [f"{tmp_path}/new/{LONG}", f"{tmp_path}/closed/x"]
    arguments = unprivileged.python("-c", code, repr(paths), tmp_path / "photos")
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert "Traceback" not in result.stderr, result.stderr
    _, *said = result.stderr.split("next path\n")
    assert len(said) == len(paths), result.stderr
    for text in said:
        assert [line for line in text.splitlines() if line.startswith("lora_dist.")] == [
            *["lora_dist.train 2"] * 3,
            "lora_dist.audit.__main__ 2",
            *["lora_dist.predict 2"] * 2,
        ]
        for flag in ("train_dir", "exclude", "output_dir", "config", "images"):
            assert f"--{flag}" in text


def _encoded(kind: str) -> bytes:
    content = io.BytesIO()
    image = make_image(1, 1)
    if kind == "GIF":
        image.save(content, kind, save_all=True, append_images=[make_image(2, 2)])
    elif kind == "TIFF":
        image.save(content, kind, compression="tiff_lzw")
    else:
        image.save(content, kind)
    return content.getvalue()


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", *(("AVIF",) if features.check("avif") else ()))
KINDS = {kind: _encoded(kind) for kind in FORMATS}


def _spoiled(content: bytes, chance: random.Random) -> bytes:
    """Cut off, flipped, doubled, shifted or filled with rubbish."""
    data = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        index = chance.randrange(len(data)) if data else 0
        kind = chance.randrange(5)
        if kind == 0:
            del data[index:]
        elif kind == 1 and data:
            data[index] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[index:index] = data[index : index + chance.randrange(64)]
        elif kind == 3:
            del data[index : index + chance.randrange(64)]
        else:
            data[index : index + 16] = chance.randbytes(16)
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_image_is_pixels_or_an_error_that_names_it(kind: str) -> None:
    chance = random.Random(kind)
    outcomes: set[str | bool] = set()
    for number in range(EXAMPLES):
        try:
            outcomes.add(load_rgb(_spoiled(KINDS[kind], chance), f"image {number}").mode)
        except UnreadableImageError as error:
            outcomes.add(str(error).startswith(f"image {number}: "))
    assert outcomes == {"RGB", True}


def test_a_picture_of_a_billion_pixels_is_refused_at_its_header() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    content = KINDS["PNG"][:12] + header + struct.pack(">I", zlib.crc32(header)) + KINDS["PNG"][33:]
    with pytest.raises(UnreadableImageError, match="exceeds limit"):
        load_rgb(content, "bomb")


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ["=1+1", 'a "b", c', "<script>alert(1)</script>\n🌷"]
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    write_bundle(directory, vit, labels, card="card", lora_r=4)
    return directory


@pytest.fixture
def own_process() -> Iterator[None]:
    """`predict` makes a closed pipe end its process, and this one has other tests to run."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_every_spoiled_file_gets_one_clean_row(form: str, adapter: Path, tmp_path: Path) -> None:
    """Names and labels with quotes, commas, line ends, HTML and emoji among them."""
    chance = random.Random(form)
    photos, out = tmp_path / "photos", tmp_path / f"out.{form}"
    photos.mkdir()
    odd = ["a,b", 'c"d"', "e\nf", "<b>g<hr>", "h🌷", "=i", " j ", "k;l", "m\\n", "'o'"]
    for number in range(EXAMPLES):
        kind = chance.choice(sorted(KINDS))
        content = KINDS[kind] if number % 4 == 0 else _spoiled(KINDS[kind], chance)
        (photos / f"{odd[number % len(odd)]}{number}.{kind.lower()}").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        predict.main(flags(adapter=str(adapter), images=str(photos), output=str(out), num_workers="0"))
    assert end.value.code == 1
    with out.open(encoding="utf-8", newline="") as file:
        rows = [json.loads(line) for line in file] if form == "jsonl" else list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(map(str, photos.iterdir()))
    labels = set(load_classifier(adapter).labels)
    for row in rows:
        assert bool(row.get("error")) != bool(row.get("label"))
        assert not row.get("label") or row["label"] in labels
    assert sum(bool(row.get("error")) for row in rows) > EXAMPLES / 10
    assert sum(bool(row.get("label")) for row in rows) > EXAMPLES / 10
