"""The audit: reading files, finding duplicates, counting classes, and reports."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from lora_dist_testing.disks import small_disk
from lora_dist_testing.launching import ROOT, TIMEOUT, environment, flags
from lora_dist_testing.planted import (
    ODD_CLASS,
    ODD_NAME,
    Planted,
    die_of_it,
    hang_at_it,
    picture,
    plant_all,
    plant_sound,
)
from lora_dist_testing.tiny import make_folder, make_image
from PIL import Image, ImageEnhance, ImageFilter

from lora_dist.audit import pool
from lora_dist.audit.__main__ import main
from lora_dist.audit.audit import audit
from lora_dist.audit.checks import check
from lora_dist.audit.findings import KINDS, File, Finding, Scanned, exit_code, left_out
from lora_dist.audit.near_duplicates import connected, near_pairs
from lora_dist.audit.pool import in_processes
from lora_dist.audit.report import Report, counted, visible, write_json, write_page, write_quarantine
from lora_dist.audit.scan import Facts, scan, thumbnail
from lora_dist.data.sources.exclusions import absolute, read_exclusions
from lora_dist.demo import local_path
from lora_dist.errors import UserError
from lora_dist.settings import cli
from lora_dist.settings.audit import AuditData, AuditRun, AuditSettings, Checks, contradictions


def settings_of(*argv: object) -> AuditSettings:
    return cli.parse(
        AuditSettings,
        [str(word) for word in argv],
        prog="audit",
        description="",
        contradictions=contradictions,
        takes_config=False,
    )


def audit_of(planted: Planted, *more: object) -> Report:
    return audit(settings_of("--train_dir", planted.train, "--validation_dir", planted.validation, *more))


def found_in(report: Report) -> list[tuple[str, frozenset[str]]]:
    files = report.scanned.files
    return [(finding.kind.name, frozenset(files[index].path for index in finding.files)) for finding in report.findings]


# Everything together


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant_all(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def report(planted: Planted) -> Report:
    return audit_of(planted)


def test_every_fault_is_found_and_nothing_else(planted: Planted, report: Report) -> None:
    assert sorted(found_in(report), key=repr) == sorted(planted.expected, key=repr)
    assert {kind for kind, _ in planted.expected} == KINDS.keys() - {"label_issue"}, "each other kind is planted"
    assert exit_code(report.findings) == 4


def test_ignored_files_are_counted_and_some_named(report: Report) -> None:
    messages = [finding.message for finding in report.findings if finding.kind.name == "ignored"]
    assert messages == [
        "train: .cr2 files: 4, e.g. few/1.cr2, many/1.CR2, many/2.cr2",
        "train: .txt files: 2, e.g. many/notes.txt, readme.txt",
        "train: images outside of class folders: 1, e.g. loose.png",
        "validation: files without a suffix: 1, e.g. many/no suffix",
    ]


def test_the_list_has_what_it_should_and_an_audit_without_these_finds_what_is_left(
    planted: Planted, report: Report, tmp_path: Path
) -> None:
    file = tmp_path / "quarantine.txt"
    write_quarantine(report, file)
    assert read_exclusions(file) == planted.left_out
    again = audit_of(planted, "--exclude", file)
    stay = {
        "one_split",
        "near_conflict",
        "near_duplicate",
        "wrong_extension",
        "huge",
        "aspect_ratio",
        "imbalance",
        "few_images",
        "ignored",
        "deep",
        "hidden",
        "constant",
        "thin",
        "large_share",
    }
    few = str(planted.train / "few" / "0.png")
    kept = [(kind, files) for kind, files in planted.expected if kind in stay or few in files]
    assert sorted(found_in(again), key=repr) == sorted(kept, key=repr)
    write_quarantine(again, file)
    assert read_exclusions(file) == planted.left_out, "a list that replaces the one that was used has its files as well"


def test_a_sound_data_set_has_no_finding(tmp_path: Path) -> None:
    report = audit_of(plant_sound(tmp_path))
    assert report.findings == []
    assert exit_code(report.findings) == 0


def test_handwritten_digits_are_not_duplicates_of_each_other() -> None:
    """They are the same scene again and again, and look much more alike than photographs do."""
    report = audit(settings_of("--train_dir", local_path("demo:digits/train")))
    assert [kind for kind, _ in found_in(report)] == []
    assert len(report.scanned.files) == 1442


def test_without_a_validation_folder_each_class_needs_an_image_to_hold_out(tmp_path: Path) -> None:
    planted = plant_sound(tmp_path)
    planted.new(planted.train / "single" / "1.png")
    planted.new(planted.train / "empty" / "1.png").unlink()
    report = audit(settings_of("--train_dir", planted.train, "--max_imbalance", 20))
    assert [(finding.kind.name, finding.message.partition(":")[0]) for finding in report.findings] == [
        ("one_split", "single"),
        ("few_images", "empty"),
        ("few_images", "single"),
    ]


def test_a_folder_without_classes_and_a_report_within_the_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folders"):
        audit(settings_of("--train_dir", tmp_path))
    for inside in (tmp_path, tmp_path / "reports" / "1"):
        with pytest.raises(UserError, match=r"--output_dir, --train_dir: .* would become part of the data"):
            settings_of("--train_dir", tmp_path, "--output_dir", inside)
    with pytest.raises(UserError, match="no data: set a folder"):
        settings_of()


@pytest.mark.root
def test_an_audit_that_fails_leaves_no_list_and_one_that_cannot_write_keeps_the_old(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*argv: object) -> str:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in argv])
        assert end.value.code == 2
        return capfd.readouterr().err

    (tmp_path / "no classes").mkdir()
    assert "no class folders" in fails("--train_dir", tmp_path / "no classes", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    planted = Planted(tmp_path)
    for number in range(30):
        planted.new(planted.train / "a" / f"{number}.png", (400, 300))
    with small_disk(tmp_path / "disk", "64k") as out:
        (out / "quarantine.txt").write_text("/old\n")
        copies = ("--max_aspect_ratio", 1.1, "--train_dir", planted.train)
        assert f"--output_dir {out}: cannot be written (No space left" in fails(*copies, "--output_dir", out)
        assert [path.name for path in out.iterdir()] == ["quarantine.txt"]
        assert (out / "quarantine.txt").read_text() == "/old\n"


# One file


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "empty"), (b"GIF89a", "unreadable"), (b"\xff\xd8\xff\xe0", "unreadable"), (b"plain text", "unreadable")],
)
def test_what_cannot_be_read_is_a_fault_of_its_kind(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    facts = scan(str(tmp_path / "x.jpg"))
    assert facts.fault == fault
    assert facts.message
    assert "\n" not in facts.message
    assert facts.digest == b""


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert scan(str(tmp_path / "pipe.png")).fault == "unreadable"
    (tmp_path / "folder.png").mkdir()
    assert scan(str(tmp_path / "folder.png")).message == "not a file"


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.webp", "cut.gif", "cut.bmp", "cut.tif", "cut.ppm"])
def test_a_truncated_file_of_any_format_is_found(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    picture(1).save(file)
    whole = scan(str(file))
    assert (whole.fault, whole.width, whole.height) == ("", 120, 90)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert scan(str(file)).fault in ("truncated", "unreadable")


def test_the_same_pixels_have_the_same_digest_and_others_do_not(tmp_path: Path) -> None:
    def digest(image: Image.Image, name: str, **options: Any) -> bytes:
        image.save(tmp_path / name, **options)
        return scan(str(tmp_path / name)).digest

    image = picture(1)
    turned = Image.Exif()
    turned[0x0112] = 6
    same = {
        digest(image, "1.png"),
        digest(image, "2.bmp"),
        digest(image, "3.webp", lossless=True),
        digest(image.rotate(90, expand=True), "4.png", exif=turned),
    }
    assert len(same) == 1
    changed = image.copy()
    changed.putpixel((119, 89), (0, 0, 0))
    flat = Image.new("RGB", (40, 30))
    others = {digest(changed, "5.png"), digest(flat, "6.png"), digest(flat.rotate(90, expand=True), "7.png")}
    assert len(others | same) == 4


def test_a_photograph_of_a_telephone_has_no_wrong_extension(tmp_path: Path) -> None:
    """Some have a second picture in the file, and Pillow calls that format MPO."""
    picture(1).save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[picture(2)])
    facts = scan(str(tmp_path / "x.jpg"))
    assert facts.format == "MPO"
    findings = check(Scanned([File("x.jpg", "train", "a")], [facts]), ["a"], True, Checks())
    assert {finding.kind.name for finding in findings} == {"one_split", "few_images"}


# Copies


def indices_of(findings: Sequence[Finding]) -> list[tuple[str, list[int], list[int]]]:
    return [(finding.kind.name, list(finding.files), list(finding.left_out)) for finding in findings]


def copies(*files: tuple[str, str, int]) -> Sequence[Finding]:
    """Findings about files of (split, class, picture), in classes of many other files."""
    parts = dict.fromkeys((split, label) for split, label, _ in files)
    files += tuple((*part, 10 + index) for index, part in enumerate(part for part in parts for _ in range(20)))
    facts = [Facts(format="PNG", width=9, height=9, digest=bytes([number])) for _, _, number in files]
    named = [File(f"{index}.png", split, label) for index, (split, label, _) in enumerate(files)]
    checks = Checks(near_distance=0, min_class_images=1)
    return check(Scanned(named, facts), [], True, checks)


def test_of_copies_in_a_split_the_first_stays() -> None:
    found = copies(("train", "a", 1), ("train", "a", 2), ("train", "a", 1), ("train", "a", 1), ("validation", "a", 3))
    assert indices_of(found) == [("duplicate", [0, 2, 3], [2, 3])]


def test_a_leak_leaves_training_and_one_copy_stays_in_validation() -> None:
    found = copies(("train", "a", 1), ("train", "a", 1), ("validation", "a", 1), ("validation", "a", 1))
    assert indices_of(found) == [("leak", [0, 1, 2, 3], [0, 1, 3])]


def test_an_image_of_two_classes_goes_altogether_and_is_a_leak_as_well_where_it_is_one() -> None:
    found = copies(("train", "a", 1), ("train", "b", 1), ("validation", "a", 1), ("train", "a", 2), ("train", "b", 2))
    assert indices_of(found) == [
        ("leak", [0, 1, 2], [0, 1]),
        ("conflict", [0, 1, 2], [0, 1, 2]),
        ("conflict", [3, 4], [3, 4]),
    ]
    assert left_out(found) == {0, 1, 2, 3, 4}


def test_a_list_that_takes_much_of_a_class_away_is_a_question() -> None:
    files = [File(f"{index}.png", "train", "ab"[index < 4]) for index in range(14)]
    facts = [Facts(format="PNG", width=9, height=9, digest=bytes([index % 9])) for index in range(14)]
    found = check(Scanned(files, facts), ["a", "b"], False, Checks(near_distance=0, min_class_images=5))
    # 9 to 12 of class a repeat 0 to 3 of class b; 13 repeats 4 of its own class.
    assert indices_of(found)[:4] == [("conflict", [index, index + 9], []) for index in range(4)]
    assert {index for finding in found for index in finding.proposed} == {0, 1, 2, 3, 9, 10, 11, 12, 13}
    assert [finding.message for finding in found if finding.kind.name == "large_share"] == [
        "a: 5 of 10 train images; same image in several classes: 4, duplicates: 1",
        "b: 4 of 4 train images; same image in several classes: 4",
    ]
    assert [finding.message for finding in found if finding.kind.name == "few_images"] == ["b: 4 training images"]


def test_counts_say_what_is_left() -> None:
    files = [File(f"{index}.png", "train", "a") for index in range(10)]
    facts = [Facts("truncated", "cut") if index < 3 else Facts(digest=bytes([index])) for index in range(10)]
    found = check(Scanned(files, facts), ["a"], False, Checks(near_distance=0))
    assert found[-1].message == "a: 7 of 10 training images left"


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((60, 45)),
        lambda image: image.resize((300, 210)),
        lambda image: ImageEnhance.Brightness(image).enhance(1.08),
        lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        lambda image: image.crop((1, 0, 120, 89)),
    ],
)
def test_a_changed_copy_is_a_near_duplicate(change: Any, tmp_path: Path) -> None:
    facts = []
    for seed in range(4):
        picture(seed).save(tmp_path / f"{seed}.png")
        change(picture(seed)).save(tmp_path / f"{seed}.jpg", quality=70)
        facts += [scan(str(tmp_path / f"{seed}.png")), scan(str(tmp_path / f"{seed}.jpg"))]
    pairs = near_pairs([one.phash for one in facts], [one.colors for one in facts], Checks().near_distance)
    assert list(pairs) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_plain_images_are_alike_only_in_the_same_color(tmp_path: Path) -> None:
    """Their hashes say nothing."""
    facts = []
    for index, (color, size) in enumerate([("red", 50), ("blue", 50), ("red", 70), ("#fe0101", 50)]):
        Image.new("RGB", (size, size), color).save(tmp_path / f"{index}.png")
        facts.append(scan(str(tmp_path / f"{index}.png")))
    pairs = near_pairs([one.phash for one in facts], [one.colors for one in facts], 0.12)
    assert list(pairs) == [(0, 2), (0, 3), (2, 3)]


def test_the_search_finds_every_pair_that_differs_in_few_bits() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 1500, dtype=np.uint64)
    for index in range(0, 1500, 2):
        flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 12), replace=False))
        hashes[index + 1] = hashes[index] ^ np.uint64(flips)
    expected = [
        (first, second)
        for first in range(1500)
        for second in range(first + 1, 1500)
        if int(hashes[first] ^ hashes[second]).bit_count() <= 7
    ]
    assert 300 < len(expected) < 700
    assert list(near_pairs(hashes.tolist(), [bytes(48)] * 1500, 0.12)) == expected


@pytest.mark.parametrize("alike", [False, True])
def test_the_search_does_not_go_over_all_pairs(alike: bool) -> None:
    """Of 200,000 images there are 20 billion, which would take minutes; nor where all hashes are nearly the same."""
    count = 10_000 if alike else 200_000
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    if alike:
        hashes &= np.uint64(0x0001_0001_0001_0001)
    start = time.process_time()
    pairs = list(near_pairs(hashes.tolist(), [bytes(48)] * count, 0.12))
    assert time.process_time() - start < 60
    assert len(pairs) > 100_000 if alike else len(pairs) < 100


@pytest.mark.parametrize("readable", [0, 1])
def test_an_audit_of_hardly_any_image_is_an_audit_all_the_same(readable: int, tmp_path: Path) -> None:
    planted = Planted(tmp_path)
    for number in range(readable):
        planted.new(planted.train / "a" / f"{number}.png")
    (planted.train / "a").mkdir(parents=True, exist_ok=True)
    (planted.train / "a" / "bad.png").write_bytes(b"bad")
    kinds = {kind for kind, _ in found_in(audit(settings_of("--train_dir", planted.train)))}
    assert kinds == {"unreadable", "few_images", *(["one_split"] if readable else [])}
    every = tmp_path / "every.txt"
    every.write_text("".join(f"{path}\n" for path in (planted.train / "a").iterdir()))
    report = audit(settings_of("--train_dir", planted.train, "--exclude", every))
    assert [kind for kind, _ in found_in(report)] == ["few_images"]


def test_groups_are_what_is_connected() -> None:
    assert connected([(5, 9), (1, 2), (9, 7), (2, 0), (3, 4)]) == [[0, 1, 2], [3, 4], [5, 7, 9]]
    assert connected([]) == []


# Processes


def test_a_crashed_worker_loses_only_the_file_that_it_was_reading() -> None:
    paths = [f"{'deadly' if index in (3, 40, 41) else 'fine'} {index}" for index in range(70)]
    results = dict(in_processes(die_of_it, paths, workers=2, failed="failed"))
    assert results == {index: "failed" if index in (3, 40, 41) else path.upper() for index, path in enumerate(paths)}


def test_a_hung_worker_loses_only_the_file_that_it_was_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SILENT_SECONDS", 2.0)
    paths = ["fine", "stuck", "fine too"]
    assert dict(in_processes(hang_at_it, paths, workers=2, failed="failed")) == {0: "FINE", 1: "failed", 2: "FINE TOO"}


def workers_of(parent: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The two workers of a process, and what else `multiprocessing` starts, once they are there."""
    end = time.monotonic() + 60
    while len(workers := psutil.Process(parent.pid).children()) < 3:
        assert parent.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    return workers


def test_processes_do_not_outlive_their_parent() -> None:
    """Killed while files are read, it cannot end them itself."""
    code = "from lora_dist_testing.planted import wait_long; from lora_dist.audit.pool import in_processes; "
    code += "print(list(in_processes(wait_long, ['x'] * 99, 2, '')))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    workers = workers_of(parent)
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


WAITING = """
from lora_dist_testing.planted import wait_long
from lora_dist.audit.pool import in_processes
from lora_dist.processes.lifetime import exit_on_user_error
exit_on_user_error(lambda: list(in_processes(wait_long, ['x'] * 99, 2, '')))()
"""


@pytest.mark.parametrize("work", ["a file that takes long", "an audit"])
@pytest.mark.parametrize("seconds", [0, 3])
def test_ctrl_c_ends_everything_at_once_and_without_a_traceback(work: str, seconds: int, tmp_path: Path) -> None:
    """Sent to all processes, as a terminal does it, while the workers start and while they work."""
    arguments = ["-c", WAITING]
    if work == "an audit":
        (tmp_path / "data" / "a").mkdir(parents=True)
        Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
        for number in range(300):
            (tmp_path / "data" / "a" / f"{number}.png").symlink_to(tmp_path / "large.png")
        arguments = ["-m", "lora_dist.audit", "--train_dir", str(tmp_path / "data"), "--num_workers", "2"]
        arguments += ["--output_dir", str(tmp_path / "out")]
    parent = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        # Whoever runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        workers = workers_of(parent)
        time.sleep(seconds)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=15)[1] == "interrupted\n"
    finally:
        parent.kill()
    assert parent.returncode == 130
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, signal, threading, time
from lora_dist.audit.pool import _no_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
try:
    with _no_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        print("whole", flush=True)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_waits_for_a_start_though_another_thread_receives_it() -> None:
    """Such as a thread of numpy's; it would leave a worker behind that was told nothing, and says so."""
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout == "whole\ninterrupted\n"


# Reports


def report_of(folder: Path, names: Sequence[str]) -> Report:
    for index, name in enumerate(names):
        (folder / ODD_CLASS).mkdir(exist_ok=True)
        picture(index).save(folder / ODD_CLASS / name, "PNG")
    return audit(settings_of("--train_dir", folder, "--max_aspect_ratio", 1.1))


NAMES = (ODD_NAME, "{{ 7 * 7 }}.png", os.fsdecode(b"not utf-8 \xff.png"), "\u202egnp.exe.png", "👩\u200d🔬.png")


def test_odd_names_come_out_right_everywhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    report = report_of(tmp_path / "data", NAMES)
    paths = {str(tmp_path / "data" / ODD_CLASS / name) for name in NAMES}
    write_json(report, tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {file["path"] for one in content["findings"] for file in one["files"]} == paths
    assert content["classes"][0] == {"class": ODD_CLASS, "train": 5, "validation": 0, "train_kept": 5}
    write_page(report, tmp_path / "report.html", lambda indices: {})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "two\\nlines &lt;img src=x onerror=&#34;alert(1)&#34;&gt; 🦊 &#39;&#34;&amp;.png" in page
    assert "{{ 7 * 7 }}.png" in page
    assert "not utf-8 \\udcff.png" in page
    assert "\\u202egnp.exe.png" in page
    assert "👩\u200d🔬.png" in page
    assert all("\n" not in line for line in report.lines())


@pytest.mark.parametrize(("text", "shown"), [("a b é 🦊", "a b é 🦊"), ("a\nb\x1b[31m\t", "a\\nb\\x1b[31m\\t")])
def test_what_would_not_be_seen_is_shown_by_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_page_of_very_many_findings_stays_small(tmp_path: Path) -> None:
    files = [File(f"/data/a/{index}.png", "train", "a") for index in range(30_000)]
    facts = [Facts("unreadable", "broken")] * 20_000 + [Facts(width=9, height=9, digest=b"x")] * 10_000
    findings = check(Scanned(files, facts), ["a"], False, Checks(near_distance=0))
    report = Report({"train": "/data"}, ["a"], Scanned(files, facts), findings)
    asked: list[int] = []

    def thumbnails(indices: Sequence[int]) -> dict[int, str]:
        asked.extend(indices)
        return {}

    write_page(report, tmp_path / "report.html", thumbnails)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 100_000
    assert len(asked) < 100
    assert "and 19,960 more in report.json" in page
    assert "and 9,992 more" in page
    write_quarantine(report, tmp_path / "list.txt")
    # The 10,000 copies are a large part of the class.
    assert len(read_exclusions(tmp_path / "list.txt")) == 20_000
    assert absolute("/data/a/20000.png") not in read_exclusions(tmp_path / "list.txt")


def test_a_thumbnail_is_small_and_missing_for_what_cannot_be_read(tmp_path: Path) -> None:
    picture(1, (1200, 900)).save(tmp_path / "large.png")
    address = thumbnail(str(tmp_path / "large.png"))
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 20_000
    (tmp_path / "bad.png").write_bytes(b"bad")
    assert thumbnail(str(tmp_path / "bad.png")) == ""


def _save_shapes(folder: Path, split_count: int = 4, white: bool = False) -> None:
    """Shapes that are all of one color, on a transparent background."""
    for number in range(split_count):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        alpha = np.zeros((32, 32), dtype=np.uint8)
        alpha[4 + number :, : 8 + 8 * number] = 255
        Image.fromarray(np.dstack([np.full((32, 32, 3), 255 * white, np.uint8), alpha])).save(file)


def _kinds(folder: Path, **data: Any) -> dict[str, list[Finding]]:
    report = audit(AuditSettings(data=AuditData(train_dir=str(folder), **data), run=AuditRun(num_workers=1)))
    return {kind.name: findings for kind, findings in report.by_kind().items()}


def test_black_icons_are_neither_duplicates_nor_conflicts(tmp_path: Path) -> None:
    _save_shapes(tmp_path)
    assert _kinds(tmp_path).keys() == {"few_images"}


def test_icons_that_the_background_hides_are_named_and_kept(tmp_path: Path) -> None:
    _save_shapes(tmp_path, white=True)
    found = _kinds(tmp_path)
    assert found.keys() == {"hidden", "few_images"}
    assert len(found["hidden"][0].files) == 4
    assert not found["hidden"][0].left_out
    assert _kinds(tmp_path, transparent_background="black").keys() == {"few_images"}


def test_deep_images_are_audited_with_the_range_of_training(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(4):
        file = tmp_path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 4096, (32, 32)).astype(np.uint16)).save(file)
    found = _kinds(tmp_path)
    assert found.keys() == {"deep", "few_images"}
    assert found["deep"][0].message.startswith("4 images of mode I;16; ")
    assert _kinds(tmp_path, pixel_range=[0, 4e6]).keys() == {"deep", "constant", "few_images"}
    found = _kinds(tmp_path, pixel_range=[0.0, 4095.0])
    assert found["deep"][0].message == "4 images of mode I;16; 0 to 4095 become 0 to 255"


def test_constant_images_are_no_conflict(tmp_path: Path) -> None:
    for number, name in enumerate("aabb"):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / name / f"{number}.png")
    found = _kinds(tmp_path)
    assert found.keys() == {"constant", "few_images"}
    assert len(found["constant"]) == 4


CRASHES = """
import os
from PIL import Image
whole = Image.open
Image.open = lambda source, *rest: os.abort() if "deadly" in str(source) else whole(source, *rest)
"""


def test_a_decoder_that_crashes_costs_only_its_image(tmp_path: Path) -> None:
    """Also where the audit looks for the range of deep images, before it scans all of them."""
    photos = make_folder(tmp_path / "photos", per_class=4)
    first = min(photos.rglob("*.png"))
    first.rename(first.with_name("0_deadly.png"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHES)
    result = subprocess.run(
        [sys.executable, "-m", "lora_dist.audit", *flags(train_dir=photos, output_dir=tmp_path / "out")],
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(ROOT)])),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 4, result.stderr
    assert "0_deadly.png" in (tmp_path / "out" / "quarantine.txt").read_text()


def test_an_image_counts_for_each_of_its_labels(tmp_path: Path) -> None:
    """The same pixels with different labels are a conflict."""
    for number in range(6):
        make_image(number % 3, number).save(tmp_path / f"{number}.png")
    make_image(0, 0).save(tmp_path / "copy.png")
    rows = ["0.png,cat;dog", "1.png,cat", "2.png,", "3.png,dog;bird", "4.png,bird", "5.png,cat", "copy.png,cat"]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    data = AuditData(
        train_dir=str(tmp_path),
        labels_file=str(tmp_path / "labels.csv"),
        problem_type="multi_label_classification",
    )
    report = audit(AuditSettings(data=data))
    assert {row["class"]: row["train"] for row in report.class_counts()} == {"bird": 2, "cat": 4, "dog": 2}
    conflicts = [finding.message for finding in report.findings if finding.kind.name == "conflict"]
    assert conflicts == ["cat;dog and cat"]
    same = AuditSettings(data=AuditData(train_dir=str(tmp_path), validation_dir=f"{tmp_path}/."))
    assert ["the same folder" in problem.message for problem in contradictions(same)] == [True]
    refused = AuditSettings(data=AuditData(train_dir=str(tmp_path), problem_type="multi_label_classification"))
    assert "set --labels_file" in " ".join(problem.message for problem in contradictions(refused))


def test_one_finding_is_counted_as_one() -> None:
    assert [counted(count, "warning") for count in (0, 1, 2000)] == ["0 warnings", "1 warning", "2,000 warnings"]
