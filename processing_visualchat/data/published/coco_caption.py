"""
COCO captions, Karpathy's train and restval splits: the first caption that is not empty.

    {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "restval",
                 "sentences": [{"raw": "A dog."}, …]}, …]}

The images of both years lie in one folder, or in the folder `filepath` inside it.
"""

from typing import Any

from ..conversation import Conversation, Dropped, Round
from .source import COCO_IMAGES, PublishedSource, get_field, list_reader, locate_image, remove_tag, to_sentence


def convert_coco_caption(record: Any, folder: str) -> Conversation | Dropped:
    split = get_field(record, "split", str)
    if split not in ("train", "restval"):
        return Dropped(f"split {split}")
    captions = [get_field(sentence, "raw", str) for sentence in get_field(record, "sentences", list) or ()]
    caption = next(filter(None, map(remove_tag, captions)), None)
    if caption is None:
        return Dropped("no caption")
    image = locate_image(folder, get_field(record, "filename", str) or "")
    if isinstance(image, Dropped):
        return image
    question = "Please describe the image in one sentence."
    return Conversation.from_rounds([Round([image], question, to_sentence(caption))])


def _list_forms(record: Any) -> list:
    folder, name = (get_field(record, key, str) for key in ("filepath", "filename"))
    return [record, {**record, "filename": f"{folder}/{name}"}] if folder and name else [record]


COCO_CAPTION = PublishedSource(
    name="coco_caption",
    annotations=("coco_caption/dataset.json",),
    images="coco/2014",
    read=list_reader(convert_coco_caption, "images", _list_forms),
    homepage="https://cs.stanford.edu/people/karpathy/deepimagesent/",
    attribution="Chen et al., Microsoft COCO Captions, arXiv 1504.00325; split: Karpathy and Fei-Fei, arXiv 1412.2306",
    license=f"CC BY 4.0, of the split not stated; {COCO_IMAGES}",
)
