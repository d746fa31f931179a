"""
The published data sets that VisualChat reads, by name: where their files lie under one data root, and how their
records become conversations.

    from processing_visualchat import load_source

    dataset, report = load_source("otter_mimicit_cgd", "data")
    print(report)

Every raw record is read once and accounted for: used, or dropped for a reason. Images stay where they are; nothing is
written beside the raw data. What was read is kept by `datasets` (Arrow, memory-mapped) under a key of the files and of
this code, so a second start is instant.
"""

import difflib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from .image_archives import find_archive
from .readings import (
    Check,
    Reading,
    SourceReport,
    check_reading,
    images_are_there,
    keep_readings,
    list_below,
    load_json,
    reading_key,
    rows_of_readings,
)
from .source_converters import (
    Conversation,
    Dropped,
    blend,
    convert_aokvqa,
    convert_coco_caption,
    convert_llava,
    convert_mimicit,
    convert_minigpt4,
    convert_ocr_vqa,
    convert_sparkles,
    group_mimicit,
)


@dataclass(frozen=True)
class Source:
    """
    A published data set.

    Args:
        name (`str`): How it is called.
        annotations (`tuple` of `str`): Its files of records under the data root.
        images (`str`): The folder of its images, or the file that holds them as base64.
        read (`Callable`): From the contents of its files by name, `images`, and what tells whether images are there,
            to [`Reading`]s.
        homepage (`str`): Where to get it.
        attribution (`str`): Whom to cite.
        licence (`str`): The terms of its records and images, as their authors state them; no legal advice.
    """

    name: str
    annotations: tuple[str, ...]
    images: str
    read: Callable[[dict[str, Any], str, Check], Iterator[Reading]]
    homepage: str
    attribution: str
    licence: str


def load_source(name: str, data_root: str | Path, check_files: bool = True) -> tuple[Dataset, SourceReport]:
    """
    Reads a source.

    Args:
        name (`str`): One of [`SOURCES`].
        data_root (`str` or `Path`): The folder under which the data sets lie.
        check_files (`bool`, *optional*, defaults to `True`): Drops conversations of which an image is not there.

    Returns:
        A `datasets.Dataset` with the columns `messages` (JSON text, image paths absolute), `images` (their names under
        the data root), `where` and `num_records` (raw records that it stands for); and the [`SourceReport`].

    Raises:
        `ValueError`: an unknown name, a file that is not JSON or of another schema, or a source of which nothing is
            left.
        `FileNotFoundError`: the data root, or a file of the source, is not there.
    """
    source = get_source(name)
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"No data root at {root}.")
    for file in source.annotations:
        if not (root / file).is_file():
            raise FileNotFoundError(
                f"The source {name} reads {file}; there is no file at {root / file}. See {source.homepage}."
            )
    if source.images.endswith(".json") and find_archive(root / source.images) is None:
        raise FileNotFoundError(
            f"The source {name} has its images in {source.images}; there is no file at {root / source.images}, nor as "
            f"parquet beside it. See {source.homepage}."
        )
    if not source.images.endswith(".json") and not (root / source.images).is_dir():
        raise FileNotFoundError(
            f"The source {name} has its images in {source.images}; there is no folder at {root / source.images}. See "
            f"{source.homepage}."
        )
    options = {"name": name, "root": str(root.resolve()), "check_files": check_files, "key": _key(source, root)}
    return keep_readings(name, _generate_rows, options)


def get_source(name: str) -> Source:
    """A source by its name; a `ValueError` names the nearest ones."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(str(name), SOURCES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are {', '.join(SOURCES)}."
        raise ValueError(f"There is no source {name!r}. {hint}")
    return SOURCES[name]


def read_source(source: Source, data_root: Path, check_files: bool = True) -> Iterator[Reading]:
    """What became of every record of a source, file after file."""
    root = data_root.resolve()
    contents = {file: load_json(root / file) for file in source.annotations}
    are_there = partial(images_are_there, root=root) if check_files else lambda images: True
    yield from source.read(contents, source.images, are_there)


def _generate_rows(name: str, root: str, check_files: bool, key: str) -> Iterator[dict]:
    yield from rows_of_readings(read_source(SOURCES[name], Path(root), check_files), root)


def _key(source: Source, root: Path) -> str:
    """What tells these files, read by this code, from others."""
    folders = {root / source.images, *((root / file).parent.parent / "images" for file in source.annotations)}
    archives = {find_archive(folder) or folder for folder in folders if folder.suffix == ".json"}
    files = [*(root / file for file in source.annotations), *list_below(folders), *sorted(archives)]
    return reading_key(files, "sources.py", "source_converters.py")


def _expect(contents: Any, kind: type, file: str, key: str | None = None) -> Any:
    """The records of a file, of the right type."""
    if key is not None:
        contents = contents.get(key) if isinstance(contents, dict) else None
    if not isinstance(contents, kind):
        where = f"under {key!r}" if key else "at its top"
        raise ValueError(f"{file} has another schema: {where} it should have a {kind.__name__}.")
    return contents


def _read_list(convert: Callable[[Any, str], Conversation | Dropped], key: str | None = None):
    def read(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
        for file, contents in files.items():
            for index, record in enumerate(_expect(contents, list, file, key)):
                yield check_reading(Reading(f"{file}, record {index}", 1, convert(record, images)), are_there)

    return read


def _read_sparkles(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        folder = f"{file.partition('/')[0]}/images"
        yield from _read_list(convert_sparkles)({file: contents}, folder, are_there)


def _read_mimicit(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        instructions = _expect(contents, dict, file, "data")
        for group in group_mimicit(instructions):
            outcome = convert_mimicit([instructions[name] for name in group], images)
            yield check_reading(Reading(f"{file}, {group[0]}", len(group), outcome), are_there)


def _read_ocr_vqa(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    for file, contents in files.items():
        for image_id, record in _expect(contents, dict, file).items():
            yield check_reading(
                Reading(f"{file}, {image_id}", 1, convert_ocr_vqa(image_id, record, images)), are_there
            )


def _read_blend(files: dict[str, Any], images: str, are_there: Check) -> Iterator[Reading]:
    """A pair of CGD with the LLaVA records that it takes; what no pair takes is dropped."""
    *llava_files, pairs_file = files
    about: dict[str, list[Conversation]] = {}
    places: dict[int, str] = {}
    for reading in _read_list(convert_llava)({file: files[file] for file in llava_files}, images, are_there):
        if isinstance(reading.outcome, Conversation):
            about.setdefault(reading.outcome.images[0], []).append(reading.outcome)
            places[id(reading.outcome)] = reading.where
        else:
            yield reading
    rng = random.Random(BLEND_SEED)
    for reading in _read_mimicit({pairs_file: files[pairs_file]}, images, are_there):
        outcome, num_records, pair = reading.outcome, reading.num_records, reading.outcome
        if isinstance(pair, Conversation):
            num_waiting = sum(len(about.get(image, ())) for image in pair.images)
            outcome = blend(pair, about, rng)
            num_records += num_waiting - sum(len(about.get(image, ())) for image in pair.images)
        yield Reading(reading.where, num_records, outcome)
    for conversation in (conversation for waiting in about.values() for conversation in waiting):
        yield Reading(places[id(conversation)], 1, Dropped("no pair speaks of its image"))


BLEND_SEED = 0
COCO = "coco/train2017"
COCO_IMAGES = "images (COCO): Flickr terms of use"
LLAVA_FILES = ("llava/detail_23k.json", "llava/complex_reasoning_77k.json", "llava/conversation_58k.json")
LLAVA = (
    "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    "Liu et al., Visual Instruction Tuning, arXiv 2304.08485",
    f"CC BY 4.0 (earlier copies: CC BY-NC 4.0) and the terms of OpenAI; {COCO_IMAGES}",
)
MIMICIT = (
    "https://huggingface.co/datasets/pufanyi/MIMICIT",
    "Li et al., MIMIC-IT: Multi-Modal In-Context Instruction Tuning, arXiv 2306.05425",
    "MIT, with an agreement to research use alone; images: terms of",
)


def _mimicit(name: str, images: str, origin: str) -> Source:
    file, (homepage, attribution, licence) = f"MIMIC-IT/{name.upper()}_instructions.json", MIMICIT
    return Source(
        f"otter_mimicit_{name}", (file,), images, _read_mimicit, homepage, attribution, f"{licence} {origin}"
    )


SOURCES = {
    source.name: source
    for source in (
        Source("llava", LLAVA_FILES[:2], COCO, _read_list(convert_llava), *LLAVA),
        Source("llava_dial", LLAVA_FILES[2:], COCO, _read_list(convert_llava), *LLAVA),
        _mimicit("cgd", COCO, "COCO (Flickr)"),
        Source(
            "llava_otter_blend",
            (*LLAVA_FILES, "MIMIC-IT/CGD_instructions.json"),
            COCO,
            _read_blend,
            f"{LLAVA[0]} and {MIMICIT[0]}",
            f"{LLAVA[1]}; {MIMICIT[1]}",
            f"{LLAVA[2]}; MIMIC-IT: MIT, with an agreement to research use alone",
        ),
        _mimicit("sd", "MIMIC-IT/SD.json", "Spot-the-Diff"),
        _mimicit("sn", "MIMIC-IT/SN.json", "ScanNet, not commercial"),
        _mimicit("tvc", "MIMIC-IT/TVC.json", "TVQA"),
        _mimicit("vst", "MIMIC-IT/VST.json", "VIST"),
        Source(
            "sparkles_dialogue",
            tuple(f"SparklesDialogue{part}/annotations/SparklesDialogue{part}.json" for part in ("CC", "VG")),
            "SparklesDialogueCC/images",
            _read_sparkles,
            "https://github.com/HYPJUDY/Sparkles",
            "Huang et al., Sparkles: Unlocking Chats Across Multiple Images, arXiv 2308.16463",
            "terms of OpenAI; images: Conceptual Captions, and Visual Genome (CC BY 4.0)",
        ),
        Source(
            "aokvqa",
            ("aokvqa/annotations/aokvqa_v1p0_train.json",),
            COCO,
            _read_list(convert_aokvqa),
            "https://allenai.org/project/a-okvqa",
            "Schwenk et al., A-OKVQA, arXiv 2206.01718",
            f"CC BY 4.0; {COCO_IMAGES}",
        ),
        Source(
            "coco_caption",
            ("coco_caption/dataset.json",),
            "coco/2014",
            _read_list(convert_coco_caption, "images"),
            "https://cs.stanford.edu/people/karpathy/deepimagesent/",
            "Chen et al., Microsoft COCO Captions, arXiv 1504.00325; split: Karpathy and Fei-Fei, arXiv 1412.2306",
            f"CC BY 4.0, of the split not stated; {COCO_IMAGES}",
        ),
        Source(
            "ocr_vqa",
            ("OCR_VQA/dataset.json",),
            "OCR_VQA/images",
            _read_ocr_vqa,
            "https://ocr-vqa.github.io",
            "Mishra et al., OCR-VQA: Visual Question Answering by Reading Text in Images, ICDAR 2019",
            "not stated; images: book covers",
        ),
        Source(
            "minigpt4",
            ("cc_sbu_align/filter_cap.json",),
            "cc_sbu_align/image",
            _read_list(convert_minigpt4, "annotations"),
            "https://huggingface.co/datasets/Vision-CAIR/cc_sbu_align",
            "Zhu et al., MiniGPT-4, arXiv 2304.10592",
            "BSD 3-Clause; images: Conceptual Captions and SBU",
        ),
    )
}
