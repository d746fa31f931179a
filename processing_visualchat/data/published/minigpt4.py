"""
The second-stage captions of MiniGPT-4 (cc_sbu_align).

    {"annotations": [{"image_id": "2", "caption": "A quiet lake."}, …]}
"""

from typing import Any

from ..conversation import Conversation, Dropped, Round
from ..images import ImageReference
from .source import PublishedSource, get_field, get_image_id, list_reader, remove_tag


def convert_minigpt4(record: Any, folder: str) -> Conversation | Dropped:
    image_id, caption = get_image_id(record), get_field(record, "caption", str)
    if image_id is None:
        return Dropped("an image without an id")
    if not caption or not caption.strip():
        return Dropped("no caption")
    image = ImageReference("file", f"{folder}/{image_id}.jpg")
    return Conversation.from_rounds([Round([image], "Please describe the image in detail.", remove_tag(caption))])


MINIGPT4 = PublishedSource(
    name="minigpt4",
    annotations=("cc_sbu_align/filter_cap.json",),
    images="cc_sbu_align/image",
    read=list_reader(convert_minigpt4, "annotations"),
    homepage="https://huggingface.co/datasets/Vision-CAIR/cc_sbu_align",
    attribution="Zhu et al., MiniGPT-4, arXiv 2304.10592",
    license="BSD 3-Clause; images: Conceptual Captions and SBU",
)
