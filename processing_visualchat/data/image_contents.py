"""The digest of every image of a mixture, and whether it is broken; cached once read."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Features, Value

from .files import ARCHIVE_SUFFIXES, cache_rows, digest_of
from .images import ImageReference, find_archive, is_usable


FEATURES = Features({"name": Value("string"), "digest": Value("string"), "is_broken": Value("bool")})
CHUNK = 1000  # images that one process reads in a row


@dataclass(frozen=True)
class ImageContent:
    """The digest of an image, see [`ImageReference`], and whether it is missing, unreadable or a single pixel wide."""

    digest: str
    is_broken: bool = False


def read_image_contents(names: Iterable[str], root: Path, check_images: bool = True) -> dict[str, ImageContent]:
    """
    Reads every image once, or finds the cached result, by references as text, relative to the root. A URL is not
    downloaded. `check_images` decodes them, to find the broken ones.
    """
    root = root.resolve()
    references = {name: ImageReference.parse(name).under(root) for name in sorted(set(names))}
    contents = {name: ImageContent(image.digest()) for name, image in references.items() if not image.is_local}
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


def _generate_contents(names: list[list[str]], root: str, check_images: bool, key: str) -> Iterator[dict]:
    for name in (name for chunk in names for name in chunk):
        image = ImageReference.parse(name).under(root)
        try:
            data = image.read()
        except (OSError, ValueError):
            yield {"name": name, "digest": image.digest(), "is_broken": check_images}
        else:
            yield {"name": name, "digest": digest_of(data), "is_broken": check_images and not is_usable(data)}
