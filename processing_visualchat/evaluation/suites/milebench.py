"""
MileBench: long contexts of many images; a folder for each of its 29 datasets.

    ALFRED/images, and ALFRED/ALFRED.json:
    {"meta_data": {"question_type": "open-ended", "task_instruction": ["…", …]}, "data": [
        {"sample_id": 0, "task_instruction_id": 3, "response": "…", "image_quantity_level": "Few", "task_instance": {
            "context": "{image#1} Step 1: … {image#2} …", "images_path": ["a.jpg", "b.jpg"], "choice_list": ["…"]}}]}
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..records import Example, Round, Suite
from .source import IMAGE_TAG, LETTERS, RawRecord, interleave, name_images, read_object, suite_loader, to_record


CATEGORIES = {
    "temporal": "ActionLocalization ActionPrediction ActionSequence CharacterOrder CounterfactualInference "
    "EgocentricNavigation MovingAttribute MovingDirection ObjectExistence ObjectInteraction ObjectShuffle "
    "SceneTransition StateChange",
    "semantic": "ALFRED CLEVR-Change DocVQA IEdit MMCoQA MultiModalQA nuscenes OCR-VQA SlideVQA Spot-the-Diff TQA "
    "WebQA WikiVQA",
    "diagnostic": "TextNeedleInAHaystack ImageNeedleInAHaystack GPR1200",
}
DATASETS = {name: category for category, names in CATEGORIES.items() for name in names.split()}
PLACEHOLDER = re.compile(r"\{(?:image|table)#\d+\}")
TYPES = ("open-ended", "multi-choice")


def _read(file: Path) -> Iterator[RawRecord]:
    """The records, each with the instruction and the question type that the file has for it."""
    top = RawRecord(str(file), read_object(file), file)
    meta, name = top.record("meta_data"), file.parent.name
    instructions, question_type = meta.get("task_instruction", list, dict), meta.text("question_type")
    if name not in DATASETS:
        raise top.fault(f"is in the folder {name}", f"one of {', '.join(DATASETS)}")
    if question_type not in TYPES:
        raise meta.fault(f"has the question_type {question_type!r}", " or ".join(TYPES))
    by_id = instructions if isinstance(instructions, dict) else {str(i): text for i, text in enumerate(instructions)}
    for index, record in enumerate(top.get("data", list)):
        found = to_record(f"{file}, record {index}", record, file)
        instruction = by_id.get(str(found.get("task_instruction_id", int, str)))
        if not isinstance(instruction, str):
            raise found.fault(
                f"has the task_instruction_id {found.fields['task_instruction_id']!r}", f"one of {len(by_id)}"
            )
        yield RawRecord(found.where, found.fields | {"instruction": instruction, "question_type": question_type}, file)


def _convert(record: RawRecord, root: Path) -> Example:
    name, task = record.file.parent.name, record.record("task_instance")
    paths, context = task.texts("images_path"), task.text("context")
    images = [record.image(path, record.file.parent / "images") for path in paths]
    choices: tuple[str, ...] = ()
    reference = str(record.get("response", str, int, float)).strip()
    lines = [record.fields["instruction"], context]
    if record.fields["question_type"] == "multi-choice":
        options = tuple(str(option).strip() for option in task.get("choice_list", list))
        matches = [index for index, option in enumerate(options) if option.casefold() == reference.casefold()]
        if not matches:
            raise record.fault(f"has the response {reference!r:.60}", f"one of its {len(options)} options")
        # GPR1200 has more options than letters, and lists them without.
        has_letters = name != "GPR1200"
        labels = [f"{letter}. " for letter in LETTERS] if has_letters else [""] * len(options)
        if len(options) > len(labels):
            raise record.fault(f"has {len(options)} options", f"at most {len(LETTERS)}")
        lines += ["Choice list: ", *(f"{label}{option}" for label, option in zip(labels, options)), "Your answer is: "]
        named = name_images([_tag(option) for option in options], _tag(context).count(IMAGE_TAG))
        choices, reference = (named, LETTERS[matches[0]]) if has_letters else ((), named[matches[0]])
    content = interleave(record, _tag("\n".join(lines)), images)
    groups = {"task": name, "category": DATASETS[name], "image_quantity": record.text("image_quantity_level")}
    key = f"{name}-{record.get('sample_id', int, str)}"
    return Example(key, (Round(content, (reference,), choices),), groups=groups)


def _tag(text: str) -> str:
    """Text with the same tag in all places of images, which are shown in the order of the places."""
    return PLACEHOLDER.sub(IMAGE_TAG, text)


MILEBENCH = Suite(
    name="milebench",
    description=(
        "29 datasets with the published prompts. The published scores are `choice` for multiple choice, `contains` "
        "for the needle tasks and MMCoQA, and `rouge_l` for the others; GPR1200, with more options than letters, has "
        "the text of an option as its reference. License: CC BY and other open ones of its sources."
    ),
    reference="Song et al., MileBench, arXiv 2404.18532",
    load=suite_loader("milebench", ["*.json"], _convert, _read, is_read=lambda file: file.stem == file.parent.name),
    metrics=("choice", "rouge_l", "contains"),
    source="FreedomIntelligence/MileBench",
    max_new_tokens=512,
)
