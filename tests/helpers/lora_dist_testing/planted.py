"""A data set with a fault of every kind that an audit finds, each planted once, and what it has to say of them."""

import io
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lora_dist.data.sources.exclusions import absolute

ODD_CLASS = "\"><script>alert(1)\n'rose' 🌹"
ODD_NAME = 'two\nlines <img src=x onerror="alert(1)"> 🦊 \'"&.png'


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Soft shapes that look like no other seed's."""
    rng = np.random.default_rng([7, seed])
    shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))


class Planted:
    """Folders `train` and `validation`, and the findings that have to come out.

    Attributes:
        train: the training folder.
        validation: the validation folder.
        expected: kind of each finding with the files that it is about.
        left_out: files that the list for `--exclude` has to have, and no other.
    """

    def __init__(self, root: Path) -> None:
        self.train, self.validation = root / "train", root / "validation"
        self.expected: list[tuple[str, frozenset[str]]] = []
        self.left_out: set[str] = set()
        self._seed = 0

    def new(self, file: Path, size: tuple[int, int] = (120, 90)) -> Path:
        """Writes a picture that is unlike all others."""
        self._seed += 1
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(self._seed, size).save(file)
        return file

    def expect(self, kind: str, *files: Path, left_out: tuple[Path, ...] = ()) -> None:
        """Notes a finding."""
        self.expected.append((kind, frozenset(map(str, files))))
        self.left_out |= {absolute(str(file)) for file in left_out}


def plant_sound(root: Path, classes: tuple[str, ...] = ("a", "b", ODD_CLASS), train: int = 14) -> Planted:
    """A data set without a fault."""
    planted = Planted(root)
    for name in classes:
        for number in range(train):
            planted.new(planted.train / name / f"{number:03d}.png")
        for number in range(5):
            planted.new(planted.validation / name / f"{number:03d}.jpg")
    return planted


def plant_files(root: Path) -> Planted:
    """A data set with every fault that files can have, some of odd names among them."""
    planted = plant_sound(root)
    train, validation = planted.train, planted.validation
    a, b, odd = (train / name for name in ("a", "b", ODD_CLASS))

    def alone(kind: str, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        planted.expect(kind, file, left_out=(file,) if kind in ("empty", "truncated", "unreadable", "bomb") else ())

    png = planted.new(a / "cut.png").read_bytes()
    jpeg = planted.new(validation / "b" / "cut.jpg").read_bytes()
    alone("truncated", a / "cut.png", png[: len(png) // 2])
    alone("truncated", validation / "b" / "cut.jpg", jpeg[: len(jpeg) // 2])
    alone("empty", b / "empty.webp", b"")
    alone("unreadable", odd / "page.jpg", b"<html>404 Not Found</html>")
    damaged = bytearray(png)
    damaged[60:90] = random.Random(0).randbytes(30)
    alone("unreadable", b / "damaged.png", bytes(damaged))
    alone("bomb", b / "bomb.png", _plain((14_000, 14_000)))
    alone("huge", b / "huge.png", _plain((9_500, 9_500)))
    planted.expect("constant", b / "huge.png")
    noise = np.random.default_rng(0).integers(0, 4096, (90, 120)).astype(np.uint16)
    Image.fromarray(noise).save(a / "deep.png")
    planted.expect("deep", a / "deep.png")
    Image.fromarray(np.dstack([np.full((90, 120, 3), 255, np.uint8), (noise >> 4).astype(np.uint8)])).save(
        a / "white.png"
    )
    planted.expect("hidden", a / "white.png")
    (a / "gone.png").symlink_to(a / "nowhere")
    planted.expect("unreadable", a / "gone.png", left_out=(a / "gone.png",))

    wrong = planted.new(a / "really_a.gif")
    wrong.rename(a / "really_a.jpg")
    planted.expect("wrong_extension", a / "really_a.jpg")
    planted.expect("aspect_ratio", planted.new(validation / "a" / "long.png", (300, 50)))
    planted.expect("aspect_ratio", planted.new(odd / "high.png", (20, 160)))
    planted.expect("thin", planted.new(odd / "thin.png", (4000, 3)))

    # The same bytes twice, and the same pixels in another format; the names of the first come first.
    first = planted.new(a / "010 original.png")
    copies = (a / "020 copy.png", a / ODD_NAME)
    copies[0].write_bytes(first.read_bytes())
    Image.open(first).save(copies[1].with_suffix(".bmp"))
    planted.expect(
        "duplicate",
        first,
        copies[0],
        copies[1].with_suffix(".bmp"),
        left_out=(copies[0], copies[1].with_suffix(".bmp")),
    )
    first = planted.new(odd / ODD_NAME)
    Image.open(first).resize((60, 45)).save(odd / "zz small.jpg")
    planted.expect("near_duplicate", first, odd / "zz small.jpg")

    seen = planted.new(b / "seen.png")
    (validation / "b" / "also seen.png").write_bytes(seen.read_bytes())
    planted.expect("leak", seen, validation / "b" / "also seen.png", left_out=(seen,))
    near = planted.new(a / "nearly seen.png")
    Image.open(near).save(validation / "a" / "nearly seen.jpg", quality=60)
    planted.expect("near_leak", near, validation / "a" / "nearly seen.jpg", left_out=(near,))

    two = planted.new(a / "is it a.png")
    (b / "or b.png").write_bytes(two.read_bytes())
    planted.expect("conflict", two, b / "or b.png", left_out=(two, b / "or b.png"))
    two = planted.new(b / "nearly b.png")
    Image.open(two).save(odd / "or odd.jpg", quality=70)
    planted.expect("near_conflict", two, odd / "or odd.jpg")

    return planted


def plant_all(root: Path) -> Planted:
    """A data set with everything that there is to find."""
    planted = plant_files(root)
    train, validation = planted.train, planted.validation
    for number in range(12):
        planted.new(train / "only trained" / f"{number}.png")
    planted.new(validation / "only validated" / "1.png")
    for number in range(2):
        planted.new(train / "few" / f"{number}.png")
    first, copy = train / "few" / "0.png", train / "few" / "0 copy.png"
    copy.write_bytes(first.read_bytes())
    # One image of three is a large part of a class.
    planted.expect("duplicate", copy, first)
    planted.expect("large_share")
    planted.new(validation / "few" / "0.png")
    for number in range(40):
        planted.new(train / "many" / f"{number}.png", (60, 60))
    planted.new(validation / "many" / "0.png")
    for name in (
        "few/1.cr2",
        "many/1.CR2",
        "many/2.cr2",
        "many/x/3.cr2",
        "many/notes.txt",
        "readme.txt",
        "loose.png",
    ):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"x")
    (validation / "many" / "no suffix").touch()
    for hidden in (train / ".DS_Store", train / "few" / ".cache", validation / ".git" / "x"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.touch()
    # By split: .cr2, .txt, loose; no suffix.
    for kind in ("ignored", "ignored", "ignored", "ignored", "one_split", "one_split", "few_images", "imbalance"):
        planted.expect(kind)
    return planted


def hang_at_it(path: str) -> str:
    """As a decoder that never returns."""
    if path.startswith("stuck"):
        time.sleep(600)
    return path.upper()


def die_of_it(path: str) -> str:
    """Work on a file, for `in_processes`, that some do not survive."""
    if "deadly" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    return path.upper()


def wait_long(path: str) -> str:
    """Work on a file that takes a while."""
    time.sleep(300)
    return path


def _plain(size: tuple[int, int]) -> bytes:
    """A PNG of one colour: little to store, and a lot to decode."""
    content = io.BytesIO()
    Image.new("1", size).save(content, "PNG")
    return content.getvalue()
