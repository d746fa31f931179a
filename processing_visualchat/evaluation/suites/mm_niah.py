"""
MM-NIAH: needles in documents of text and images; by default the tasks that need several of them.

    {"id": 0, "context": "… <image> …", "question": "…", "images_list": ["a.jpg", …], "answer": 2, "meta": {
        "placed_depth": [0.1, 0.6], "context_length": 5000, "choices": ["…"], "choices_image_path": null, …}}
"""

import bisect
import json
from pathlib import Path
from typing import Any

from ..records import Example, Round, Suite
from .source import IMAGE_TAG, LETTERS, WITH_LETTER, WITH_PHRASE, RawRecord, interleave, read_records, suite_loader


LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64)  # thousands of tokens, the published bins


def _convert(record: RawRecord, root: Path) -> Example:
    task = record.file.name.partition(".")[0]
    folder = record.file.parent.parent / "images"
    context, question, meta = record.text("context"), record.text("question"), record.record("meta")
    paths = record.fields.get("images_list")
    if not isinstance(paths, list):
        raise record.fault(f"has images_list {paths!r:.60}", "a list of paths")
    num_tags = context.count(IMAGE_TAG) + question.count(IMAGE_TAG)
    if num_tags != len(paths):
        raise record.fault(f"has {num_tags} placeholders {IMAGE_TAG} and {len(paths)} images", "as many")
    answer, options, shown = record.fields.get("answer"), [], []
    if meta.fields.get("choices"):
        options = choices = meta.options("choices")
    elif meta.fields.get("choices_image_path"):
        shown = meta.options("choices_image_path")
        options = [IMAGE_TAG] * len(shown)
        choices = [f"Image {len(paths) + number}" for number in range(1, len(shown) + 1)]
    else:
        choices = []
    # The published evaluation removes the end-of-sequence token.
    lines = [f"{context.replace('</s>', '')}\n{question}"]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    lines.append(WITH_LETTER if choices else WITH_PHRASE)
    images = [record.image(path, folder) for path in [*paths, *shown]]
    reference = _read_answer(record, answer, len(choices))
    content = interleave(record, "\n".join(lines), images)
    groups = {"task": task, "depth": _find_depth(meta), "context": _find_length(meta)}
    key = f"{task}-{record.get('id', int, str)}"
    return Example(key, (Round(content, (reference,), tuple(choices)),), groups=groups)


def _read_answer(record: RawRecord, answer: Any, num_choices: int) -> str:
    if num_choices:
        if not isinstance(answer, int) or not 0 <= answer < num_choices:
            raise record.fault(f"has the answer {answer!r:.60}", f"the index of one of {num_choices} options")
        return LETTERS[answer]
    if isinstance(answer, list) and answer:
        return json.dumps(answer)
    if not isinstance(answer, (str, int)) or not str(answer).strip():
        raise record.fault(f"has the answer {answer!r:.60}", "text, a number or a list; those of test are withheld")
    return str(answer).strip()


def _find_depth(meta: RawRecord) -> str:
    """The published bin of the mean depth of the needles, a fifth of the document."""
    depths = meta.get("placed_depth", list, float, int)
    depths = depths if isinstance(depths, list) else [depths]
    if not all(isinstance(depth, (float, int)) and 0 <= depth <= 1 for depth in depths):
        raise meta.fault(f"has placed_depth {depths!r:.60}", "numbers from 0 to 1")
    bin = min(int(sum(depths) / len(depths) * 5), 4)
    return f"{bin / 5:.1f}-{(bin + 1) / 5:.1f}"


def _find_length(meta: RawRecord) -> str:
    """The published bin of the length of the document."""
    index = bisect.bisect_right(LENGTHS, meta.get("context_length", int) / 1000)
    return f"{LENGTHS[index - 1]}k" if index else "below 1k"


MM_NIAH = Suite(
    name="mm_niah",
    description=(
        "Documents of up to 72k tokens with needles in text or images, split val: reasoning-text and reasoning-image, "
        "which need several needles; any other task as its file. The published scores are `choice` and, for text, "
        "`contains`; of a list (counting) they count the equal items, which no metric here does. License not verified."
    ),
    reference="Wang et al., Needle In A Multimodal Haystack, arXiv 2406.07230",
    load=suite_loader(
        "mm_niah", ["mm_niah_val/annotations/reasoning-*.jsonl", "reasoning-*.jsonl"], _convert, read_records
    ),
    metrics=("choice", "contains", "exact_match"),
    source="OpenGVLab/MM-NIAH",
    max_new_tokens=32,
)
