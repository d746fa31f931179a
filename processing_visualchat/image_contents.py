"""What images are, whatever they are called: a digest of their bytes, and whether they are whole; kept once read."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value

from .image_archives import digest_of, find_archive, open_archive, open_training_image, split_archived
from .readings import is_file_name, reading_key


FEATURES = Features({"name": Value("string"), "digest": Value("string"), "is_broken": Value("bool")})
CHUNK = 1000  # images that one process reads in a row


@dataclass(frozen=True)
class ImageContent:
    """
    Args:
        digest (`str`): What tells its bytes from those of another image.
        is_broken (`bool`): Whether it is not there, cannot be read, or is one pixel wide or high.
    """

    digest: str
    is_broken: bool = False


def read_image_contents(names: Iterable[str], root: Path, check_images: bool = True) -> dict[str, ImageContent]:
    """
    Reads every image once; a second call finds what the first has kept.

    Args:
        names (`Iterable` of `str`): Images, named under the root. One at an address is told apart by its address.
        root (`Path`): The data root.
        check_images (`bool`, *optional*, defaults to `True`): Decodes them, to find the broken ones.
    """
    names = sorted(set(names))
    contents = {name: ImageContent(name.removeprefix("inline:")) for name in names if not is_file_name(name)}
    files = [name for name in names if is_file_name(name)]
    if not files:
        return contents
    root = root.resolve()
    paths = {root / (split_archived(name) or [name])[0] for name in files}
    paths = {find_archive(path) or path if path.suffix in (".json", ".parquet") else path for path in paths}
    options = {
        "names": [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)],
        "root": str(root),
        "check_images": check_images,
        "key": reading_key(sorted(paths), "image_contents.py", "image_loading_visualchat.py"),
    }
    num_proc = min(os.cpu_count() or 1, len(files) // CHUNK)
    rows = Dataset.from_generator(_generate_contents, features=FEATURES, gen_kwargs=options, num_proc=max(num_proc, 1))
    for name, *content in zip(*(rows.data.column(name).to_pylist() for name in FEATURES)):
        contents[name] = ImageContent(*content)
    return contents


def _generate_contents(names: list[list[str]], root: str, check_images: bool, key: str) -> Iterator[dict]:
    for name in (name for chunk in names for name in chunk):
        content = {"name": name, "digest": name, "is_broken": check_images}
        with contextlib.suppress(OSError, ValueError, KeyError):  # a broken image stays one
            archived = split_archived(name)
            if archived is None:
                data = (Path(root) / name).read_bytes()
            else:
                data = open_archive(os.path.join(root, archived[0]))[archived[1]]
            content["digest"] = digest_of(data)
            if check_images:
                open_training_image(data)
                content["is_broken"] = False
        yield content
