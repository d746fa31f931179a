"""The images of requests: data URIs and base64 text, checked before they are decoded."""

import io
import re
import warnings
from collections.abc import Iterable

from PIL import Image

from processing_visualchat.image_loading_visualchat import DECODING_ERRORS, decode_base64, load_image

from .errors import ApiError


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
DATA_URI = re.compile(r"data:(?P<type>[\w.+-]*/?[\w.+-]*)(?:;[\w-]+=[\w-]+)*(?P<base64>;base64)?,", re.ASCII)
MIME_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp", "image/tiff")


def invalid_image(message: str, param: str | None = None) -> ApiError:
    """The error of an image that cannot be used."""
    return ApiError(400, message, param, "invalid_image")


def decode_text(text: str, param: str | None = None) -> bytes:
    """The encoded image in a data URI or in base64 text."""
    if text.startswith("data:"):
        header = DATA_URI.match(text[:200])
        if header is None or not header["base64"]:
            raise invalid_image(f"The data URI {text[:40]!r} is not of the form data:image/png;base64,…", param)
        if header["type"].lower() not in MIME_TYPES:
            raise invalid_image(f"A data URI of type {header['type']!r}; use one of {', '.join(MIME_TYPES)}.", param)
        text = text[header.end() :]
    data = decode_base64(text)
    if not data:
        raise invalid_image(f"Neither a data URI nor base64 text: {text[:40]!r}.", param)
    return data


def read_size(data: bytes, param: str | None = None) -> tuple[int, int]:
    """
    The width and height of an encoded image, from its header.

    Raises:
        [`ApiError`]: the data are no image of a format in `FORMATS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise invalid_image("The image has too many pixels to be opened safely; scale it down.", param) from None
    except DECODING_ERRORS:
        raise invalid_image(f"Not an image, or of a format other than {', '.join(FORMATS)}.", param) from None


def open_images(images: Iterable[tuple[bytes, str]], max_pixels: int) -> list[Image.Image]:
    """
    Decodes encoded images, of an animated one its first frame, if all of them together have no more than `max_pixels`.

    Args:
        images (`Iterable[tuple[bytes, str]]`): Images, and their fields in the request. What is the same object is
            decoded once.
        max_pixels (`int`): Maximum pixels.
    """
    images = list(images)
    sizes = {id(data): read_size(data, param) for data, param in images}
    total = sum(width * height for width, height in sizes.values())
    if total > max_pixels:
        raise invalid_image(f"The images have {total:,} pixels, and {max_pixels:,} are allowed; scale them down.")
    opened: dict[int, Image.Image] = {}
    for data, param in images:
        if id(data) not in opened:
            try:
                opened[id(data)] = load_image(data)
            except ValueError as error:
                raise invalid_image(str(error), param) from error
    return [opened[id(data)] for data, _ in images]
