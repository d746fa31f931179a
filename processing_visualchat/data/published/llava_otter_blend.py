"""
The LLaVA-Otter blend (section 4.2 of arXiv 2309.14327): conversations about each image of a pair, then about the pair.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..conversation import Conversation, Dropped, Turn
from ..images import ImageReference
from ..ingestion import IngestedRecord
from .llava import LLAVA, LLAVA_DIAL
from .mimicit import CGD
from .source import COCO, Check, PublishedSource


SEED = 0

About = dict[ImageReference, dict[str, Conversation]]  # the conversations about each image, by file and record


def draw(images: Sequence[ImageReference], about: About, rng: random.Random) -> dict[str, Conversation] | Dropped:
    """One or more of the conversations about the first image of a pair, and any number about the second."""
    if len(images) < 2:
        return Dropped("no pair of images")
    if any(image not in about for image in images[:-1]):
        return Dropped("no LLaVA conversation about an image")
    drawn: dict[str, Conversation] = {}
    for image in images:
        known = about.get(image, {})
        drawn |= rng.sample([*known.items()], rng.randint(int(image != images[-1]), len(known)))
    return drawn


def blend(pair: Conversation, drawn: Iterable[Conversation]) -> Conversation:
    """Conversations about the images of a pair, then its own rounds; each image is shown once, at first."""
    members = [*drawn, pair]
    shown: set[ImageReference] = set()
    turns = []
    for role, content, _ in (turn for member in members for turn in member.turns):
        turns.append(Turn(role, [block for block in content if block not in shown]))
        shown.update(block for block in content if isinstance(block, ImageReference))
    repairs = (repair for member in (pair, *members) for repair in member.repairs)
    return Conversation(turns, tuple(dict.fromkeys(repairs)))


def _read(files: dict[str, Any], images: str, check: Check) -> Iterator[IngestedRecord]:
    """Each pair of CGD with LLaVA records, which several pairs may use; a record that none uses is dropped."""
    *llava_files, pairs_file = files
    about: About = {}
    for record in LLAVA.read({file: files[file] for file in llava_files}, images, check):
        if isinstance(record.outcome, Conversation):
            about.setdefault(record.outcome.images[0], {})[record.where] = record.outcome
        else:
            yield record
    rng = random.Random(SEED)
    used: set[str] = set()
    for record in CGD.read({pairs_file: files[pairs_file]}, images, check):
        pair = record.outcome
        if isinstance(pair, Conversation):
            drawn = draw(pair.images, about, rng)
            if isinstance(drawn, Dropped):
                record = replace(record, outcome=drawn)
            else:
                num_records = record.num_records + sum(where not in used for where in drawn)
                blended = blend(pair, drawn.values())
                record = check(IngestedRecord(record.where, num_records, blended, (*record.members, *drawn)))
                used |= drawn.keys()
        yield record
    for where in (where for known in about.values() for where in known if where not in used):
        yield IngestedRecord(where, 1, Dropped("no pair contains its image, or none has drawn it"))


BLEND = PublishedSource(
    name="llava_otter_blend",
    annotations=(*LLAVA.annotations, *LLAVA_DIAL.annotations, *CGD.annotations),
    images=COCO,
    read=_read,
    homepage=f"{LLAVA.homepage} and {CGD.homepage}",
    attribution=f"{LLAVA.attribution}; {CGD.attribution}",
    license=f"{LLAVA.license}; MIMIC-IT: {CGD.license}",
)
