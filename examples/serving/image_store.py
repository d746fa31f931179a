"""Image handles: an image is sent once, and named in messages afterwards."""

import secrets
import threading
import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field

from .errors import ApiError


@dataclass(frozen=True)
class StoredImage:
    """An encoded image."""

    data: bytes
    width: int
    height: int
    id: str = field(default_factory=lambda: f"img_{secrets.token_urlsafe(24)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def description(self) -> dict:
        """What a client learns of it."""
        size = {"width": self.width, "height": self.height, "bytes": len(self.data)}
        return {"id": self.id, "object": "image", "created": self.created, **size}


class ImageStore:
    """
    Encoded images by their owner and id. An owner finds only images of its own, and the least recently used of them
    are removed first.

    Args:
        max_bytes (`int`): Maximum bytes of the images of an owner.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._images: dict[str, OrderedDict[str, StoredImage]] = defaultdict(OrderedDict)
        self._lock = threading.Lock()

    def add(self, owner: str, image: StoredImage) -> None:
        """Stores an image; a 413 if it is larger than what an owner may store."""
        if len(image.data) > self.max_bytes:
            message = f"The image has {len(image.data):,} bytes, and {self.max_bytes:,} are stored for a key."
            raise ApiError(413, message, code="image_too_large")
        with self._lock:
            images = self._images[owner]
            images[image.id] = image
            while sum(len(each.data) for each in images.values()) > self.max_bytes:
                images.popitem(last=False)

    def get(self, owner: str, id: str, param: str | None = None) -> StoredImage:
        """An image; a 404 if there is none of this owner."""
        with self._lock:
            if id not in self._images[owner]:
                raise missing(id, param)
            self._images[owner].move_to_end(id)
            return self._images[owner][id]

    def remove(self, owner: str, id: str) -> None:
        """Removes an image; a 404 if there is none of this owner."""
        with self._lock:
            if self._images[owner].pop(id, None) is None:
                raise missing(id)


def missing(id: str, param: str | None = None) -> ApiError:
    """The error of an id that is not there, or is of another owner."""
    message = f"There is no image {id[:60]!r} of this key, or it was removed for others; send it again."
    return ApiError(404, message, param, "image_not_found")
