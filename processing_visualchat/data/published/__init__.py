"""
The published datasets by name, one file for each dataset or family.

    dataset, report = load_source("otter_mimicit_cgd", "data")
    print(report)

Files are read where their authors put them under one data root. Every raw record is read once and accounted for: used,
or dropped for a reason. Images stay in place, nothing is written beside the raw data, and the rows are cached.
"""

import difflib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset

from ..files import list_below, parse_json
from ..images import find_archive
from ..ingestion import IngestedRecord, IngestionReport, check_record, ingest
from .aokvqa import AOKVQA
from .coco_caption import COCO_CAPTION
from .llava import LLAVA, LLAVA_DIAL
from .llava_otter_blend import BLEND
from .mimicit import CGD, OTHERS
from .minigpt4 import MINIGPT4
from .ocr_vqa import OCR_VQA
from .source import PublishedSource
from .sparkles import SPARKLES


SOURCES: dict[str, PublishedSource] = {
    source.name: source
    for source in (
        LLAVA, LLAVA_DIAL, CGD, BLEND, *OTHERS, SPARKLES, AOKVQA, COCO_CAPTION, OCR_VQA, MINIGPT4
    )
}  # fmt: skip


def get_source(name: str) -> PublishedSource:
    """A published dataset by name; a `ValueError` suggests the nearest names."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(str(name), SOURCES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are {', '.join(SOURCES)}."
        raise ValueError(f"There is no source {name!r}. {hint}")
    return SOURCES[name]


def load_source(name: str, data_root: str | Path) -> tuple[Dataset, IngestionReport]:
    """
    Reads a published dataset.

    Args:
        name (`str`): One of [`SOURCES`].
        data_root (`str` or `Path`): The folder that contains the datasets.

    Returns:
        A `datasets.Dataset` with the columns `messages` (image paths absolute), `images` (references as text, relative
        to the data root), `where` and `num_records` (raw records of the conversation); and the [`IngestionReport`].

    Raises:
        `ValueError`: an unknown name, a file that is not JSON or of another schema, or no conversation left.
        `FileNotFoundError`: the data root, or a file of the dataset, does not exist.
    """
    source = get_source(name)
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {root}.")
    images = root / source.images
    missing = [f"reads {file}; there is no file at {root / file}" for file in source.annotations
               if not (root / file).is_file()]  # fmt: skip
    if images.suffix != ".json" and not images.is_dir():
        missing.append(f"has its images in {source.images}; there is no folder at {images}")
    elif images.suffix == ".json" and find_archive(images) is None:
        missing.append(f"has its images in {source.images}; there is no file at {images}, nor as parquet beside it")
    if missing:
        raise FileNotFoundError(f"The source {name} {missing[0]}. See {source.homepage}.")
    options = {"name": name, "root": str(root.resolve())}
    return ingest(name, _read, root.resolve(), _find_files(source, root), options)


def read_source(source: PublishedSource, data_root: Path) -> Iterator[IngestedRecord]:
    """The outcome of every record, file after file; image paths are relative to the data root."""
    root = data_root.resolve()
    contents = {file: parse_json((root / file).read_bytes(), str(root / file)) for file in source.annotations}
    yield from source.read(contents, source.images, partial(check_record, root=root))


def _read(name: str, root: str) -> Iterator[IngestedRecord]:
    return read_source(SOURCES[name], Path(root))


def _find_files(source: PublishedSource, root: Path) -> list[Path]:
    """All files and folders that the rows depend on."""
    folders = {root / source.images, *((root / file).parent.parent / "images" for file in source.annotations)}
    archives = {find_archive(folder) or folder for folder in folders if folder.suffix == ".json"}
    return [*(root / file for file in source.annotations), *list_below(folders), *sorted(archives)]
