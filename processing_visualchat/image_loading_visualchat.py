"""Opens images in any mode and turns them into RGB, right side up."""

import base64
import binascii
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import load_image as load_image_from_url


def load_image(source) -> Image.Image:
    """
    Opens one image, decodes all of it and converts it to RGB.

    Grey, palette and CMYK images become RGB, 16-bit and float ones are scaled to 8 bits, transparent ones are put on
    white, and an EXIF orientation is applied.

    Args:
        source (`str`, `Path`, `bytes`, `PIL.Image.Image` or array):
            A path, an http(s) address, a `data:` URI or base64 text, an encoded file in memory, an image, or an array
            of shape (height, width) or (height, width, channels).

    Returns:
        `PIL.Image.Image`: the image in mode RGB.

    Raises:
        `FileNotFoundError`: no file at a path.
        `ValueError`: the file is empty, truncated, not an image, or too large to be one (a decompression bomb).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if isinstance(source, (str, Path)) and str(source).startswith(("http://", "https://")):
        return _to_rgb(load_image_from_url(str(source)))
    if isinstance(source, bytes):
        return _decode(source, "The image in memory")
    if isinstance(source, (str, Path)):
        text = str(source)
        if not text.startswith("data:") and (path := Path(text.removeprefix("file://"))) and _is_file(path):
            return _decode(path.read_bytes(), f"The image file {path}")
        if (data := _from_base64(text)) is not None:
            return _decode(data, "The image given as base64")
        raise FileNotFoundError(
            f"No image file at {text[:200]}; check the path, or the folder that it is relative to."
        )
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source))
    raise ValueError(
        f"An image must be a path, an address, bytes, a PIL image or an array, got {type(source).__name__}."
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, as base64 text is
        return False


def _from_base64(text: str) -> bytes | None:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif len(text) < 64:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes); replace it or leave it out.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} has too many pixels to be opened safely ({error}); scale it down first.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read; it begins with {data[:8]!r}.") from error
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"{name} is truncated or broken ({error}); replace it or leave it out.") from error
    return _to_rgb(image)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"An image array must be (height, width) or (height, width, channels), got {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        array = array * 255.0 if array.max() <= 1.0 else array
    elif array.dtype == np.uint16:
        array = array / 257.0
    return _to_rgb(Image.fromarray(array.round().clip(0, 255).astype(np.uint8)))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit integers cover 0 to 65535; wider ones and floats are stretched from least to greatest value."""
    values = np.asarray(image).astype(np.float64)
    low, high = (0.0, 65535.0) if values.min() >= 0 and 255 < values.max() <= 65535 else (values.min(), values.max())
    if image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        low, high = 0.0, 1.0
    elif values.min() >= 0 and values.max() <= 255 and image.mode != "I;16":
        low, high = 0.0, 255.0
    return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
