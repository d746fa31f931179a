"""
MMIU: multiple choice about up to 32 images, of 7 kinds of relations and 52 tasks.

    {"task": "spot_the_diff", "question": "…", "context": "… A: …\nB: …", "options": "A: …\nB: …", "output": "B",
     "input_image_path": ["./Low-level-semantic/spot_the_diff/spot_the_diff_0_0.jpg", …]}
"""

from functools import partial
from pathlib import Path

from ..records import Example, Round, Suite
from .source import LETTERS, RawRecord, read_records, suite_loader


COLUMNS = ("task", "question", "context", "options", "output", "input_image_path")
INSTRUCTION = "Please answer the option directly like A,B,C,D..."
# Whose question comes before the context, in the published evaluation.
QUESTION_FIRST = {
    "person_reid", "multiple_image_captioning", "spot_the_similarity", "face_retrieval", "sketch2image_retrieval",
    "handwritten_retrieval", "spot_the_diff", "image2image_retrieval", "vehicle_retrieval", "text2image_retrieval",
    "general_action_recognition", "video_captioning", "next_img_prediction", "temporal_ordering",
    "meme_vedio_understanding", "action_quality_assessment", "temporal_localization", "mevis",
    "ravens_progressive_matrices", "threed_indoor_recognition", "point_tracking", "threed_cad_recognition",
    "single_object_tracking",
}  # fmt: skip


def _convert(record: RawRecord, root: Path) -> Example:
    paths = record.texts("input_image_path")
    images = [record.image(path, root) for path in paths]
    task, choices = record.text("task"), _split_options(record)
    question, context = record.text("question").strip(), record.text("context").strip()
    parts = (question, context) if task in QUESTION_FIRST else (context, question)
    content = (*(image.block() for image in images), {"type": "text", "text": "\n".join([*parts, INSTRUCTION])})
    rounds = (Round(content, (record.letter(record.text("output"), len(choices)),), choices),)
    key = f"{record.file.name.partition('.')[0]}-{record.number}"  # records have no id
    return Example(key, rounds, groups={"task": task, "relation": Path(paths[0]).parts[0]})


def _split_options(record: RawRecord) -> tuple[str, ...]:
    """The options of text with one on each line, or on several."""
    options: list[str] = []
    for line in record.text("options").strip().splitlines():
        letter = LETTERS[len(options) : len(options) + 1]
        if letter and line.lstrip().startswith((f"{letter}:", f"{letter}.", f"({letter})")):
            options.append(line.lstrip().removeprefix("(").removeprefix(letter).lstrip(":.)").strip())
        elif options:
            options[-1] = f"{options[-1]}\n{line}".strip()
    if len(options) < 2:
        raise record.fault(f"has the options {record.fields['options']!r:.60}", "lines with A:, B: and so on")
    return tuple(options)


MMIU = Suite(
    name="mmiu",
    description=(
        "11,698 questions with 77,659 images, below the folder that is given, where its zip files were unpacked. The "
        "order of question and context in each task is the published one. License: CC BY 4.0 (not verified)."
    ),
    reference="Meng et al., MMIU, arXiv 2408.02718",
    load=suite_loader(
        "mmiu", ["all.json", "test-*.parquet", "*.parquet"], _convert, partial(read_records, columns=COLUMNS)
    ),
    metrics=("choice",),
    source="FanqingM/MMIU-Benchmark",
    max_new_tokens=16,
)
