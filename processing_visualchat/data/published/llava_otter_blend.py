"""
The LLaVA-Otter blend (section 4.2 of arXiv 2309.14327): conversations about each image of a pair, then about the pair.
"""

import random
from collections.abc import Iterator
from typing import Any

from ..conversation import Conversation, Dropped, Turn
from ..images import ImageReference
from ..ingestion import IngestedRecord
from .llava import LLAVA, LLAVA_DIAL
from .mimicit import CGD
from .source import COCO, Check, PublishedSource


SEED = 0

Waiting = dict[ImageReference, list[Conversation]]  # the unused conversations about each image


def blend(pair: Conversation, about: Waiting, rng: random.Random) -> Conversation | Dropped:
    """
    One or more of the conversations `about` the first image of a pair, any number about the second, then the pair's
    own rounds. An image is shown once, when it first comes up. Those that are used are removed from `about`.
    """
    if len(pair.images) < 2:
        return Dropped("no pair of images")
    *first, last = pair.images
    if any(not about.get(image) for image in first):
        return Dropped("no LLaVA conversation about an image")
    members = []
    for image in pair.images:
        waiting = about.get(image, [])
        members += [waiting.pop(0) for _ in range(rng.randint(0 if image == last else 1, len(waiting)))]
    members.append(pair)
    shown: set[ImageReference] = set()
    turns = []
    for role, content, _ in (turn for member in members for turn in member.turns):
        turns.append(Turn(role, [block for block in content if block not in shown]))
        shown.update(block for block in content if isinstance(block, ImageReference))
    repairs = (repair for member in (pair, *members) for repair in member.repairs)
    return Conversation(turns, tuple(dict.fromkeys(repairs)))


def _read(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
    """A pair of CGD with the LLaVA records that it uses; unused records are dropped."""
    *llava_files, pairs_file = files
    about: Waiting = {}
    sources: dict[int, str] = {}
    for record in LLAVA.read({file: files[file] for file in llava_files}, images, check):
        if isinstance(record.outcome, Conversation):
            about.setdefault(record.outcome.images[0], []).append(record.outcome)
            sources[id(record.outcome)] = record.where
        else:
            yield record
    rng = random.Random(SEED)
    for record in CGD.read({pairs_file: files[pairs_file]}, images, check):
        outcome, num_records = record.outcome, record.num_records
        if isinstance(outcome, Conversation):
            pair_images = outcome.images
            num_waiting = sum(len(about.get(image, ())) for image in pair_images)
            outcome = blend(outcome, about, rng)
            num_records += num_waiting - sum(len(about.get(image, ())) for image in pair_images)
        yield check(IngestedRecord(record.where, num_records, outcome))
    for conversation in (conversation for waiting in about.values() for conversation in waiting):
        yield IngestedRecord(sources[id(conversation)], 1, Dropped("no pair contains its image"))


BLEND = PublishedSource(
    name="llava_otter_blend",
    annotations=(*LLAVA.annotations, *LLAVA_DIAL.annotations, *CGD.annotations),
    images=COCO,
    read=_read,
    homepage=f"{LLAVA.homepage} and {CGD.homepage}",
    attribution=f"{LLAVA.attribution}; {CGD.attribution}",
    license=f"{LLAVA.license}; MIMIC-IT: {CGD.license}",
)
