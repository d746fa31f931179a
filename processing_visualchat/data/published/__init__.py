"""
The published datasets by name, one file for each dataset or family.

    dataset, report = load_source("otter_mimicit_cgd", "data")
    print(report)

Files are read where their authors put them under one data root. Every raw record is read once and accounted for: used,
or dropped for a reason. Images stay in place, nothing is written beside the raw data, and the rows are cached.
"""

import difflib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset

from ..files import parse_json
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


_ALL = (LLAVA, LLAVA_DIAL, CGD, BLEND, *OTHERS, SPARKLES, AOKVQA, COCO_CAPTION, OCR_VQA, MINIGPT4)
SOURCES: dict[str, PublishedSource] = {source.name: source for source in _ALL}


def get_source(name: str) -> PublishedSource:
    """A published dataset by name; a `ValueError` suggests the nearest names."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(str(name), SOURCES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are {', '.join(SOURCES)}."
        raise ValueError(f"There is no source {name!r}. {hint}")
    return SOURCES[name]


def load_source(
    name: str, data_root: str | Path, control_tokens: Sequence[str] = ()
) -> tuple[Dataset, IngestionReport]:
    """
    Reads a published dataset.

    Args:
        name (`str`): One of [`SOURCES`].
        data_root (`str` or `Path`): The folder that contains the datasets.
        control_tokens (`Sequence[str]`, *optional*): Special tokens; a record with one in its text is dropped.

    Returns:
        A `datasets.Dataset` with the columns `messages` (image paths absolute), `images` (references as text, relative
        to the data root), `where` and `members` (all raw records, of several); and the [`IngestionReport`].

    Raises:
        `ValueError`: an unknown name, a file that is not JSON or of another schema, or no conversation left.
        `FileNotFoundError`: the data root, or a file of the dataset, does not exist.
    """
    source = get_source(name)
    root = Path(data_root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {data_root}.")
    for file in source.annotations:
        if not (root / file).is_file():
            raise FileNotFoundError(
                f"The source {name} reads {file}; there is no file at {root / file}. See {source.homepage}."
            )
    files, images = [root / file for file in source.annotations], root / source.images
    is_archive = images.suffix == ".json"
    if not (find_archive(images) if is_archive else images.is_dir()):
        kind, sibling = ("file", ", nor as parquet beside it") if is_archive else ("folder", "")
        raise FileNotFoundError(
            f"The source {name} has its images in {source.images}; there is no {kind} at {images}{sibling}. "
            f"See {source.homepage}."
        )
    archives = [images, images.with_suffix(".parquet")] if is_archive else []
    options = {"name": name, "root": str(root), "control_tokens": [*control_tokens]}
    return ingest(name, read_source, root, [*files, *archives], options)


def read_source(name: str, root: str, control_tokens: Sequence[str] = ()) -> Iterator[IngestedRecord]:
    """The outcome of every record, file after file; image paths are relative to the data root, which is absolute."""
    source = SOURCES[name]
    files = {file: Path(root, file) for file in source.annotations}
    contents = {file: parse_json(path.read_bytes(), str(path)) for file, path in files.items()}
    return source.read(contents, source.images, partial(check_record, root=root, control_tokens=control_tokens))
