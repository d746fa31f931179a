"""Opens images in any mode and turns them into RGB, right side up."""

import base64
import binascii
import contextlib
import io
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError


# What Pillow's decoders raise on files that are cut off or damaged.
DECODING_ERRORS = (
    OSError, SyntaxError, EOFError, ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError,
    struct.error,
)  # fmt: skip
SHORTEST_BASE64 = 64  # characters; a path that does not exist is shorter than any picture


def load_image(source) -> Image.Image:
    """
    Opens one image, decodes all of it and converts it to RGB: images of 10, 12, 14 or 16 bits and floats are scaled to
    8 bits, transparent ones are put on white, and an EXIF orientation is applied.

    Args:
        source (`str`, `Path`, `bytes`, `PIL.Image.Image` or array): A path, an http(s) URL, a `data:` URI or base64
            text, an encoded file in memory, an image, or an array (height, width) or (height, width, channels).

    Returns:
        `PIL.Image.Image`: the image in mode RGB.

    Raises:
        `FileNotFoundError`: no file at a path.
        `ValueError`: the file is empty, truncated, not an image, or too large to be one (a decompression bomb).
    """
    if isinstance(source, Image.Image):
        return _convert(source, "The image")
    if isinstance(source, bytes):
        return _decode(source, "The image in memory")
    if isinstance(source, (str, Path)):
        return _decode(*_read(str(source)))
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    raise ValueError(f"An image must be a path, a URL, bytes, a PIL image or an array, got {type(source).__name__}.")


def _read(text: str) -> tuple[bytes, str]:
    """The encoded image at a URL or path, or in base64 text, maybe broken into lines; and its name in errors."""
    if text.startswith(("http://", "https://")):
        try:
            response = httpx.get(text, follow_redirects=True, timeout=30).raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"The image at {text} cannot be downloaded: {error}.") from error
        return response.content, f"The image at {text}"
    is_uri, path = text.startswith("data:"), text.removeprefix("file://")
    if not is_uri and os.path.isfile(path):
        return Path(path).read_bytes(), f"The image file {path}"
    encoded = "".join((text.partition(",")[2] if is_uri else text).split())
    if len(encoded) >= SHORTEST_BASE64 and (data := decode_base64(encoded)) is not None:
        return data, "The image given as base64"
    raise FileNotFoundError(f"No image file at {text[:200]}; check the path, or the folder that it is relative to.")


def decode_base64(text: Any) -> bytes | None:
    """Base64 of either alphabet, with or without padding and line breaks, to bytes; `None` for anything else."""
    text = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    if not isinstance(text, str):
        return None
    text = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes); replace it or leave it out.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} has too many pixels to be opened safely ({error}); scale it down first.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read; it begins with {data[:8]!r}.") from error
    except DECODING_ERRORS as error:
        raise ValueError(f"{name} is broken ({error}); replace it or leave it out.") from error
    return _convert(image, name)


def _convert(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except DECODING_ERRORS as error:
        raise ValueError(f"{name} is truncated or broken ({error}); replace it or leave it out.") from error
    # An orientation that cannot be read is none.
    with contextlib.suppress(*DECODING_ERRORS):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Values of more than 8 bits in 8, by the range that they use: the least of the usual ones, or their own."""
    low, high = values.min(), values.max()
    is_wide = (values.dtype.kind, values.itemsize) == ("u", 2)  # no camera writes 8 bits in 16
    ranges = ((not is_wide, 255.0), *((True, 2.0**bits - 1) for bits in (10, 12, 14, 16)))
    limits = [1.0] if high <= 1 and np.issubdtype(values.dtype, np.floating) else []
    limits += [limit for is_possible, limit in ranges if is_possible and high <= limit]
    low, high = (0.0, limits[0] if limits else float(high)) if low >= 0 else (float(low), float(high))
    return ((values.astype(np.float64) - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(f"An image array must be (height, width) or (height, width, 1, 3 or 4), got {array.shape}.")
    if array.dtype == bool or (np.issubdtype(array.dtype, np.floating) and array.max() <= 1.0):
        array = array * 255.0
    elif array.dtype == np.uint16:
        array = _to_8_bits(array)
    return _convert(Image.fromarray(np.round(array).clip(0, 255).astype(np.uint8)), "The array")
