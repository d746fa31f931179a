"""
MIMIC-IT: instructions about one or more images, with related ones that continue the conversation.

    {"meta": …, "data": {"SD_INS_1": {"instruction": "What changed?", "answer": "The car left.",
                                      "image_ids": ["SD_IMG_1_1", "SD_IMG_1_2"], "rel_ins_ids": ["SD_INS_2"]}, …}}
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from networkx import Graph, bfs_edges

from ..conversation import Conversation, Dropped
from ..images import ImageReference
from ..ingestion import IngestedRecord
from .source import COCO, IMAGE_TAG, Check, PublishedSource, expect, filter_rounds, get_field


ORIGINS = {
    "cgd": "COCO (Flickr)",
    "sd": "Spot-the-Diff",
    "sn": "ScanNet, not commercial",
    "tvc": "TVQA",
    "vst": "VIST",
}


def group_mimicit(instructions: dict[str, Any]) -> list[list[str]]:
    """
    Groups the records of one conversation each: those that name one another in `rel_ins_ids`, in either direction, and
    have the same images. Every record is in exactly one group, which begins with its first record.
    """
    related = Graph()
    related.add_nodes_from(instructions)
    for name, record in instructions.items():
        for other in get_field(record, "rel_ins_ids", list) or ():
            is_known = isinstance(other, str) and other in instructions
            if is_known and _comparable_ids(record) == _comparable_ids(instructions[other]):
                related.add_edge(name, other)
    groups: list[list[str]] = []
    used: set[str] = set()
    for name in instructions:
        if name not in used:
            groups.append([name, *(member for _, member in bfs_edges(related, name))])
            used.update(groups[-1])
    return groups


def convert_mimicit(records: Sequence[Any], archive: str) -> Conversation | Dropped:
    """A group of [`group_mimicit`], with images in an archive or, for CGD, in the folder of COCO."""
    ids = _get_image_ids(records[0])
    if ids is None:
        return Dropped("image_ids is not a list of names")
    images = []
    for image_id in ids:
        if archive.endswith(".json"):
            # Some copies of the instructions leave out a part of the id.
            key = re.sub(r"^(SN_IMG_scene\d+_\d+)_(\d+)$", r"\1_color_\2", image_id)
            images.append(ImageReference("archive", archive, key))
        elif match := re.fullmatch(r"CGD_IMG_0*(\d{1,12})", image_id):
            images.append(ImageReference("file", f"{archive}/{int(match[1]):012d}.jpg"))
        else:
            return Dropped("image id of an unknown form")
    pairs = [(get_field(record, "instruction", str), get_field(record, "answer", str)) for record in records]
    repairs = ["image tag in the instruction"] if any(IMAGE_TAG in (question or "") for question, _ in pairs) else []
    different = list(dict.fromkeys(images))
    repairs += ["an image that is named twice shown once"] if len(different) < len(images) else []
    return filter_rounds(pairs, different, repairs)


def _comparable_ids(record: Any) -> list[str] | None:
    """Image ids without leading zeros: the numbers of CGD have 12 digits or 16."""
    ids = _get_image_ids(record)
    return ids and [re.sub(r"^CGD_IMG_0*(?=\d)", "CGD_IMG_", image_id) for image_id in ids]


def _get_image_ids(record: Any) -> list[str] | None:
    ids = record.get("image_ids") if isinstance(record, dict) else None
    if ids is None:
        return []
    return ids if isinstance(ids, list) and all(isinstance(image_id, str) for image_id in ids) else None


def read_mimicit(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
    for file, contents in files.items():
        instructions = expect(contents, dict, file, "data")
        for group in group_mimicit(instructions):
            outcome = convert_mimicit([instructions[name] for name in group], images)
            members = tuple(f"{file}, {name}" for name in group)
            yield check(IngestedRecord(members[0], len(group), outcome, members))
        for name in getattr(instructions, "repeated", ()):
            yield IngestedRecord(f"{file}, {name}", 1, Dropped("an id that a later record has too"))


CGD, *OTHERS = (
    PublishedSource(
        name=f"otter_mimicit_{name}",
        annotations=(f"MIMIC-IT/{name.upper()}_instructions.json",),
        images=COCO if name == "cgd" else f"MIMIC-IT/{name.upper()}.json",
        read=read_mimicit,
        homepage="https://huggingface.co/datasets/pufanyi/MIMICIT",
        attribution="Li et al., MIMIC-IT: Multi-Modal In-Context Instruction Tuning, arXiv 2306.05425",
        license=f"MIT, with an agreement to research use only; images: terms of {origin}",
    )
    for name, origin in ORIGINS.items()
)
