"""The images of an evaluation: opened once, told apart by their pixels, and kept small for the page."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..conversation_visualchat import is_image
from ..data.images import ImageReference, digest_pixels
from ..data.pages import encode_thumbnail
from ..image_loading_visualchat import load_image
from .records import SuiteError


THUMBNAILS = "thumbnails"


class Picture(NamedTuple):
    """An open image and the digest of its pixels."""

    image: Image.Image
    digest: str

    @property
    def block(self) -> dict[str, Any]:
        """The image as a block of a message."""
        return {"type": "image", "image": self.image}


def open_picture(block: dict[str, Any], where: str) -> Picture:
    """Opens the image of a block; a [`SuiteError`] names the example if it cannot be used."""
    reference = ImageReference.from_block(block)
    try:
        image = load_image(block["image"]) if reference is None else reference.open()
    except (ValueError, OSError, KeyError) as error:
        raise SuiteError(f"{where} shows an image that cannot be used: {error}") from error
    return Picture(image, digest_pixels(image))


def describe_block(block: dict[str, Any]) -> str:
    """What tells a block from others, without opening a file: its text, or the path and size of its image."""
    if not is_image(block):
        return block["text"]
    reference = ImageReference.from_block(block)
    if reference is None:
        return digest_pixels(load_image(block["image"]))
    if reference.is_local and Path(reference.path).is_file():
        file = Path(reference.path)
        return f"{file.name} {reference.key} {file.stat().st_size}"
    return str(reference)


def save_thumbnail(picture: Picture, folder: Path) -> None:
    """Writes a small JPEG of an image, named by its pixels, unless it is there."""
    file = folder / f"{picture.digest}.jpg"
    if file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{picture.digest}.{os.getpid()}.part"
    part.write_bytes(encode_thumbnail(picture.image))
    part.replace(file)
