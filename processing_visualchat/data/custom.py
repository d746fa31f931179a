"""
Custom datasets: a file, a folder or a dataset of the Hub, of any schema in `schemas.py`.

Image paths are relative to the file, or to a folder that is named. Images inside parquet files stay there. Splits of a
folder are told by the names of its files, with the keywords of `datasets`.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset
from datasets.data_files import SPLIT_KEYWORDS
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .conversation import Conversation, Dropped
from .files import suffix_of
from .ingestion import IngestedRecord, IngestionReport, ingest
from .readers import RECORDS, read_conversations


METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # of `datasets`


@dataclass(frozen=True)
class CustomSource:
    """
    A custom dataset.

    Args:
        name (`str`): Its name in reports.
        path (`str`, *optional*): A file, a folder, or a pattern like `train-*.parquet`, under the data root or in the
            repository.
        hub (`str`, *optional*): A dataset on the Hub, `user/name`, which is downloaded as a whole.
        revision (`str`, *optional*): Its branch, tag or commit.
        split (`str`, *optional*, defaults to `"train"`): The split of a folder.
        images (`str`, *optional*): The folder that image paths are relative to and do not leave, neither by `..` nor
            by links; by default that of each file.
        columns (`dict`, *optional*): Other names of columns, or of placeholders in the text: the name in the file, and
            one of `messages`, `images`, `system`, `question`, `answer`, `history`, `placeholder` or `ignored`.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    split: str = "train"
    images: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def load_custom_source(
    source: CustomSource, data_root: str | Path, control_tokens: Sequence[str] = ()
) -> tuple[Dataset, IngestionReport]:
    """
    Reads a custom dataset, with paths relative to the data root; returns what [`load_source`] returns.

    Raises:
        `ValueError`: no download, a file that is broken or unsupported, or no conversation left.
        `FileNotFoundError`: there is no file.
    """
    root = Path(os.path.abspath(data_root))
    base = root if source.hub is None else _download(source)
    files, images = find_files(source, base), find_images(source, base)
    # What is downloaded is links to the folder beside it.
    links = "" if source.hub is None else str(base.parent.parent)
    options: dict[str, Any] = {"files": [*map(str, files)], "root": str(root), "images": images}
    options |= {"links": links, "columns": source.columns, "control_tokens": [*control_tokens]}
    return ingest(source.name, _read, root, files, options)


def _read(
    files: list[str],
    root: str,
    images: str | None,
    links: str,
    columns: dict[str, str],
    control_tokens: Sequence[str],
) -> Iterator[IngestedRecord]:
    for file in map(Path, files):
        name = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
        options: dict[str, Any] = {"columns": columns, "links": links, "control_tokens": control_tokens}
        for record in read_conversations(file, images, name, **options):
            yield replace(record, outcome=_examine_inline(record.outcome))


def _examine_inline(outcome: Conversation | Dropped) -> Conversation | Dropped:
    """Names the images inside a record by their pixels; or drops it, if one cannot be used."""
    contents = {image: image.examine() for image in outcome.images if image.kind == "inline"}
    if faulty := [image for image, content in contents.items() if content.fault]:
        return Dropped(contents[faulty[0]].fault, images=(faulty[0],))
    if isinstance(outcome, Dropped):
        return outcome
    return outcome.map_images(lambda image: replace(image, key=contents[image].digest) if image in contents else image)


def find_files(source: CustomSource, base: Path) -> list[Path]:
    """The files of a dataset; an error if there is none, or one that is unsupported or outside of `base`."""
    path = _find_below(base, source.path or "", source.name)
    if not path.is_dir() and source.split != "train":
        raise ValueError(f"The source {source.name} asks for the split {source.split}, which only a folder has.")
    if path.is_file():
        files = [path]
    elif path.is_dir():
        splits = find_splits(path)
        if source.split not in splits:
            found = f"it has the splits {', '.join(sorted(splits))}" if splits else "it has no data files"
            raise FileNotFoundError(f"The source {source.name} has no split {source.split} in {path}; {found}.")
        files = splits[source.split]
    else:
        files = sorted(found for found in base.glob(str(path.relative_to(base))) if found.is_file())
    if not files:
        raise FileNotFoundError(f"The source {source.name} has no file at {path}.")
    for file in files:
        if suffix_of(file.name) not in RECORDS:
            raise ValueError(f"The source {source.name} has the file {file}; it can be one of {', '.join(RECORDS)}.")
    return files


def find_images(source: CustomSource, base: Path) -> str | None:
    """The image folder that a dataset names, if any; a `FileNotFoundError` if it does not exist."""
    if source.images is None:
        return None
    images = Path(os.path.normpath(base / source.images))
    if not images.is_dir():
        raise FileNotFoundError(f"The source {source.name} has its images in {images}; there is no such folder.")
    return str(images)


def _find_below(base: Path, name: str, source: str) -> Path:
    path = Path(os.path.normpath(base / name))
    if not path.is_relative_to(base) or (".." in PurePosixPath(name).parts and has_magic(name)):
        raise ValueError(f"The source {source} has the path {name}, which leads out of {base}.")
    return path


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, see [`group_by_split`]."""
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {split: [folder / name for name in files] for split, files in group_by_split(names).items()}


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """The data files among the files of a folder, by split; a file whose name has no keyword is for training."""
    splits: dict[str, list[str]] = {}
    known = [path for path in map(PurePosixPath, sorted(names)) if suffix_of(path.name) in RECORDS]
    # Beside other files, an archive is one of images.
    tables = [path for path in known if suffix_of(path.name) != ".tar"] or known
    for path in tables:
        is_hidden = any(part.startswith(".") for part in path.parts) or path.name.startswith("cache-")
        if not is_hidden and path.name not in METADATA:
            words = set(re.split(r"[^a-z]+", str(path).lower()))
            found = (str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords))
            splits.setdefault(next(found, "train"), []).append(str(path))
    return splits


def _download(source: CustomSource) -> Path:
    try:
        return Path(snapshot_download(source.hub, repo_type="dataset", revision=source.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"The source {source.name} cannot be downloaded from the Hub, dataset {source.hub}. Is the name right, "
            f"and are you logged in if it is private or gated? {error}"
        ) from error
