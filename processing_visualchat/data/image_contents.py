"""The contents of all images of a mixture, cached once read; and those that a checkpoint was trained on."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Features, Value
from transformers.utils import cached_file

from .files import ARCHIVE_SUFFIXES, cache_rows
from .images import ImageContent, ImageReference, find_archive


FEATURES = Features({"name": Value("string"), "digest": Value("string"), "fault": Value("string")})
CHUNK = 1000  # images that one process reads in a row
TRAINING_IMAGES = "training_images.json"  # beside a checkpoint


def read_image_contents(names: Iterable[str], root: Path, check_images: bool = True) -> dict[str, ImageContent]:
    """
    Reads every image once, or finds the cached result, by references as text, relative to the root. A URL is not
    downloaded. `check_images` decodes them, to find the broken ones and to tell them apart by their pixels.
    """
    root = root.resolve()
    references = {name: ImageReference.parse(name).under(root) for name in sorted(set(names))}
    contents = {  # an image inside its record was decoded when that was read, and is named by its pixels
        name: ImageContent(image.key) if image.kind == "inline" else image.examine(check_images)
        for name, image in references.items()
        if not image.is_local
    }
    files = [name for name in references if name not in contents]
    if not files:
        return contents
    paths = {Path(references[name].path) for name in files}
    paths = {find_archive(path) or path if path.suffix in ARCHIVE_SUFFIXES else path for path in paths}
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    num_proc = max(min(os.cpu_count() or 1, len(files) // CHUNK), 1)
    options = {"names": chunks, "root": str(root), "check_images": check_images}
    rows = cache_rows(_generate_contents, FEATURES, options, sorted(paths), num_proc)
    for name, *content in zip(*(rows.data.column(name).to_pylist() for name in FEATURES)):
        contents[name] = ImageContent(*content)
    return contents


def _generate_contents(names: list[list[str]], root: str, check_images: bool) -> Iterator[dict]:
    for name in (name for chunk in names for name in chunk):
        content = ImageReference.parse(name).under(root).examine(check_images)
        yield {"name": name, "digest": content.digest, "fault": content.fault if check_images else ""}


def save_training_images(digests: Iterable[str], folder: str | Path) -> None:
    """Writes beside a checkpoint the digests, see [`digest_pixels`], of the images that it was trained on."""
    (Path(folder) / TRAINING_IMAGES).write_text(json.dumps({"images": sorted({*digests})}, indent=0) + "\n")


def load_training_images(checkpoint: str) -> set[str] | None:
    """The digests of the images that a checkpoint, a folder or a name on the Hub, was trained on, if it tells."""
    try:
        file = cached_file(checkpoint, TRAINING_IMAGES, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # neither a folder nor a name on the Hub
        return None
    return None if file is None else set(json.loads(Path(file).read_text())["images"])
