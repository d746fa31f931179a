"""The digest of every image of a mixture, and whether it is broken; cached once read."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value

from .images import ImageReference, digest_of, find_archive, is_usable
from .ingestion import cache_key


FEATURES = Features({"name": Value("string"), "digest": Value("string"), "is_broken": Value("bool")})
CHUNK = 1000  # images that one process reads in a row


@dataclass(frozen=True)
class ImageContent:
    """The digest of an image, see [`ImageReference`], and whether it is missing, unreadable or a single pixel wide."""

    digest: str
    is_broken: bool = False


def read_image_contents(names: Iterable[str], root: Path, check_images: bool = True) -> dict[str, ImageContent]:
    """
    Reads every image once, or finds the cached result.

    Args:
        names (`Iterable` of `str`): Image references as text, relative to the root. A URL is not downloaded.
        root (`Path`): The data root.
        check_images (`bool`, *optional*, defaults to `True`): Decodes them, to find the broken ones.
    """
    root = root.resolve()
    references = {name: ImageReference.parse(name).under(root) for name in sorted(set(names))}
    contents = {name: ImageContent(image.digest()) for name, image in references.items() if not image.is_local}
    files = [name for name in references if name not in contents]
    if not files:
        return contents
    paths = {Path(references[name].path) for name in files}
    paths = {find_archive(path) or path if path.suffix in (".json", ".parquet") else path for path in paths}
    options = {
        "names": [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)],
        "root": str(root),
        "check_images": check_images,
        "key": cache_key(sorted(paths)),
    }
    num_proc = min(os.cpu_count() or 1, len(files) // CHUNK)
    rows = Dataset.from_generator(_generate_contents, features=FEATURES, gen_kwargs=options, num_proc=max(num_proc, 1))
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
