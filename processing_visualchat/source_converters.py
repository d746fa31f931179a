"""
Raw records of published data sets to conversations: one pure function a schema.

A converter opens no file and keeps nothing, so what becomes of a record can be written out by hand. It gets one
record, already parsed (or, of MIMIC-IT, the records of one conversation), and returns a [`Conversation`] or, with the
reason, a [`Dropped`]. Images are named by their paths under the data root, or `archive.json#id` where a data set keeps
them in one file. Whatever is odd about a record is either mended, and noted, or drops it.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


Round = tuple[list[str], str, str]  # images, question, answer


@dataclass(frozen=True)
class Conversation:
    """
    Args:
        rounds (`list` of `(images, question, answer)`): The images first shown in a round, its question, its answer.
        repairs (`tuple` of `str`): What was mended.
    """

    rounds: list[Round]
    repairs: tuple[str, ...] = ()

    @property
    def images(self) -> list[str]:
        """All images, in the order in which they are shown."""
        return [image for images, _, _ in self.rounds for image in images]

    def messages(self) -> list[dict]:
        """The one form of a conversation, see [`validate_conversation`]."""
        messages: list[dict] = []
        for images, question, answer in self.rounds:
            content = [{"type": "image", "path": image} for image in images]
            content += [{"type": "text", "text": question}] if question else []
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return messages


@dataclass(frozen=True)
class Dropped:
    """A record that cannot be used, and the reason, the same for all of its kind."""

    reason: str


def convert_llava(record: Any, folder: str) -> Conversation | Dropped:
    """LLaVA-Instruct: `{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, …]}`, one image."""
    image, turns = _get(record, "image", str), _get(record, "conversations", list)
    if image is None or turns is None:
        return Dropped("no image or no conversations")
    turns = [(_get(turn, "from", str), _get(turn, "value", str)) for turn in turns]
    if any(speaker not in ("human", "gpt") or text is None for speaker, text in turns):
        return Dropped("a turn without a known speaker or without text")
    repairs: list[str] = []
    if sum(text.count(IMAGE_TAG) for _, text in turns) != 1:
        repairs.append("image tag repeated or missing")
    roles = {"human": "user", "gpt": "assistant"}
    pairs = _pair([(roles[speaker], _without_tag(text)) for speaker, text in turns], repairs)
    if not pairs:
        return Dropped("no question with an answer")
    path = _safe_path(folder, image)
    if path is None:
        return Dropped("image path outside of its folder")
    rounds = [([] if index else [path], question, answer) for index, (question, answer) in enumerate(pairs)]
    return Conversation(rounds, tuple(repairs))


def group_mimicit(instructions: dict[str, Any]) -> list[list[str]]:
    """
    The records of MIMIC-IT that form one conversation each: those that name one another in `rel_ins_ids`, in either
    direction, and speak of the same images. Every record is in one group exactly; a group begins with its first.
    """
    partners: dict[str, list[str]] = {name: [] for name in instructions}
    for name, record in instructions.items():
        for other in _get(record, "rel_ins_ids", list) or ():
            if not isinstance(other, str) or other not in instructions or other == name:
                continue
            if _which_images(record) == _which_images(instructions[other]):
                partners[name].append(other)
                partners[other].append(name)
    groups, used = [], set()
    for name in instructions:
        group, waiting = [], [name]
        while waiting:
            member = waiting.pop(0)
            if member not in used:
                used.add(member)
                group.append(member)
                waiting += partners[member]
        groups += [group] if group else []
    return groups


def convert_mimicit(records: Sequence[Any], archive: str) -> Conversation | Dropped:
    """
    MIMIC-IT: `{"instruction", "answer", "image_ids", "rel_ins_ids"}`, the records of one conversation.

    Args:
        records (`Sequence`): As [`group_mimicit`] groups them.
        archive (`str`): Where the images are: a JSON file of base64, or for CGD the folder of COCO.
    """
    repairs: list[str] = []
    ids = _image_ids(records[0])
    if ids is None:
        return Dropped("image_ids is not a list of names")
    images = []
    for image_id in ids:
        if archive.endswith(".json"):
            # Some copies of the instructions leave out what the image file has.
            whole = re.sub(r"^(SN_IMG_scene\d+_\d+)_(\d+)$", r"\1_color_\2", image_id)
            images.append(f"{archive}#{whole}")
        elif match := re.fullmatch(r"CGD_IMG_0*(\d{1,12})", image_id):
            images.append(f"{archive}/{int(match[1]):012d}.jpg")
        else:
            return Dropped("image id of an unknown form")
    images = list(dict.fromkeys(images))
    rounds: list[Round] = []
    for record in records:
        question, answer = _get(record, "instruction", str), _get(record, "answer", str)
        if question is None or answer is None or not _without_tag(answer) or not _without_tag(question):
            repairs.append("a round without question or answer left out")
            continue
        if IMAGE_TAG in question:
            repairs.append("image tag in the instruction")
        rounds.append(([] if rounds else images, _without_tag(question), _without_tag(answer)))
    if not rounds:
        return Dropped("no question with an answer")
    return Conversation(rounds, tuple(dict.fromkeys(repairs)))


def convert_sparkles(record: Any, folder: str) -> Conversation | Dropped:
    """
    SparklesDialogue: `{"dialogue": [{"role", "content", "images": [{"image_id"}, …]}, …]}`. `IMAGE#14` becomes
    `image 1`, the number that the image has in the conversation.
    """
    dialogue = _get(record, "dialogue", list)
    if not dialogue:
        return Dropped("no dialogue")
    numbers: dict[str, int] = {}
    rounds: list[Round] = []
    question: tuple[list[str], str] | None = None
    repairs: list[str] = []
    for turn in dialogue:
        role, text = _get(turn, "role", str), _get(turn, "content", str)
        expected = "user" if question is None else "assistant"
        if role != expected or text is None or not text.strip():
            return Dropped("user and assistant do not take turns")
        new = []
        for image in _get(turn, "images", list) or ():
            image_id = _name(image)
            if not re.fullmatch(r"\w+", image_id):
                return Dropped("an image without an id")
            if image_id not in numbers:
                numbers[image_id] = len(numbers) + 1
                new.append(f"{folder}/{image_id}.jpg")
        if role == "assistant" and new:
            return Dropped("the assistant shows an image")
        named = _name_images(_without_tag(text), numbers)
        if named is None:
            return Dropped("an image is named that is not shown")
        if not named:
            return Dropped("user and assistant do not take turns")
        if question is None:
            question = (new, named)
        else:
            rounds.append((*question, named))
            question = None
    if question is not None:
        repairs.append("a question without an answer left out")
    if not rounds:
        return Dropped("no question with an answer")
    return Conversation(rounds, tuple(repairs))


def convert_aokvqa(record: Any, folder: str) -> Conversation | Dropped:
    """A-OKVQA: the question asks to choose and to give the reason; the answer is the choice and the rationales."""
    split = _get(record, "split", str)
    if split != "train":
        return Dropped(f"split {split}")
    image_id, question = _get(record, "image_id", int), _get(record, "question", str)
    choices, correct = _get(record, "choices", list), _get(record, "correct_choice_idx", int)
    if image_id is None or not question or not choices or correct is None or not 0 <= correct < len(choices):
        return Dropped("no image, question or correct choice")
    rationales = _get(record, "rationales", list) or []
    rationales = [_without_tag(text) for text in rationales if isinstance(text, str) and _without_tag(text)]
    if not rationales:
        return Dropped("no rationale")
    choices = [_without_tag(str(choice)) for choice in choices]
    asked = f"{_without_tag(question)} Choose from {', '.join(map(str, choices))}, and give the reason."
    answer = " ".join([f"{_capitalised(str(choices[correct]))}.", *map(_sentence, rationales)])
    return Conversation([([f"{folder}/{image_id:012d}.jpg"], asked, answer)])


def convert_coco_caption(record: Any, folder: str) -> Conversation | Dropped:
    """COCO captions in Karpathy's splits: train and restval; the first caption that is not empty."""
    split = _get(record, "split", str)
    if split not in ("train", "restval"):
        return Dropped(f"split {split}")
    filepath, filename = _get(record, "filepath", str), _get(record, "filename", str)
    captions = [_get(sentence, "raw", str) for sentence in _get(record, "sentences", list) or ()]
    captions = [_without_tag(caption) for caption in captions if caption and _without_tag(caption)]
    if not captions:
        return Dropped("no caption")
    path = _safe_path(folder, f"{filepath}/{filename}") if filepath and filename else None
    if path is None:
        return Dropped("image path outside of its folder")
    return Conversation([([path], "Please describe the image in one sentence.", _sentence(captions[0]))])


def convert_ocr_vqa(image_id: str, record: Any, folder: str) -> Conversation | Dropped:
    """OCR-VQA: the rounds of one book cover; split 1 is train."""
    split = _get(record, "split", int)
    if split != 1:
        return Dropped(f"split {split}")
    questions, answers = _get(record, "questions", list) or [], _get(record, "answers", list) or []
    path = _safe_path(folder, f"{image_id}.jpg")
    if path is None:
        return Dropped("image path outside of its folder")
    repairs = ["questions and answers of different number"] if len(questions) != len(answers) else []
    rounds: list[Round] = []
    for question, answer in zip(questions, answers):
        answer = str(answer) if isinstance(answer, (str, int, float)) else ""
        if not isinstance(question, str) or not _without_tag(question) or not _without_tag(answer):
            repairs.append("a round without question or answer left out")
            continue
        rounds.append(([] if rounds else [path], _without_tag(question), _without_tag(answer)))
    if not rounds:
        return Dropped("no question with an answer")
    return Conversation(rounds, tuple(dict.fromkeys(repairs)))


def convert_minigpt4(record: Any, folder: str) -> Conversation | Dropped:
    """cc_sbu_align: `{"image_id", "caption"}`."""
    image_id, caption = _name(record), _get(record, "caption", str)
    if not re.fullmatch(r"\w+", image_id):
        return Dropped("an image without an id")
    if not caption or not caption.strip():
        return Dropped("no caption")
    return Conversation(
        [([f"{folder}/{image_id}.jpg"], "Please describe the image in detail.", _without_tag(caption))]
    )


def blend(pair: Conversation, about: dict[str, list[Conversation]], rng: random.Random) -> Conversation | Dropped:
    """
    The LLaVA-Otter blend (section 4.2 of arXiv 2309.14327): before a pair of images is spoken of together, one or more
    conversations about the first of them, and any number about the second. An image is shown once, when it is first
    spoken of.

    Args:
        pair (`Conversation`): Of CGD.
        about (`dict`): For each image the conversations of LLaVA about it that are not used yet; those that are used
            are taken out.
        rng (`random.Random`): Chooses how many.
    """
    *first, last = pair.images or [""]
    if not first:
        return Dropped("no pair of images")
    if any(not about.get(image) for image in first):
        return Dropped("no LLaVA conversation about an image")
    rounds: list[Round] = []
    repairs = list(pair.repairs)
    for image in (*first, last):
        waiting = about.get(image, [])
        for _ in range(rng.randint(0 if image == last else 1, len(waiting))):
            conversation = waiting.pop(0)
            repairs += conversation.repairs
            rounds += conversation.rounds
    shown: set[str] = set()
    once: list[Round] = []
    for images, question, answer in [*rounds, *pair.rounds]:
        once.append(([image for image in images if image not in shown], question, answer))
        shown.update(images)
    return Conversation(once, tuple(dict.fromkeys(repairs)))


IMAGE_TAG = "<image>"
# The whole id: `IMAGE#14` is not the beginning of `IMAGE#1417`.
SHOWN_IMAGE = r"IMAGE#(\w+)(?:\s*<Img>\s*<ImageHere>\s*</Img>)?"


def _get(record: Any, key: str, kind: type) -> Any:
    """A field of the right type, or `None`."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _without_tag(text: str) -> str:
    return re.sub(rf"\s*{IMAGE_TAG}\s*", "\n", text).strip()


def _pair(turns: list[tuple[str, str]], repairs: list[str]) -> list[tuple[str, str]]:
    """Questions with their answers; what has no other half is left out, and noted."""
    pairs: list[tuple[str, str]] = []
    question: str | None = None
    for role, text in turns:
        if role == "user":
            if question is not None:
                repairs.append("a question without an answer left out")
            question = text if text or not pairs else None
            if question is None:
                repairs.append("a round without a question left out")
        elif question is None:
            repairs.append("an answer without a question left out")
        elif not text:
            repairs.append("a round without an answer left out")
            question = None
        else:
            pairs.append((question, text))
            question = None
    if question is not None:
        repairs.append("a question without an answer left out")
    return pairs


def _which_images(record: Any) -> list[str] | None:
    """Image ids by which records can be compared: the numbers of CGD come with 12 digits or with 16."""
    ids = _image_ids(record)
    return ids and [re.sub(r"^CGD_IMG_0*(?=\d)", "CGD_IMG_", image_id) for image_id in ids]


def _image_ids(record: Any) -> list[str] | None:
    ids = record.get("image_ids") if isinstance(record, dict) else None
    if ids is None:
        return []
    return ids if isinstance(ids, list) and all(isinstance(image_id, str) for image_id in ids) else None


def _name_images(text: str, numbers: dict[str, int]) -> str | None:
    """`IMAGE#14<Img><ImageHere></Img>` to `image 1`; nothing if an image is named that was not shown."""
    if any(image_id not in numbers for image_id in re.findall(SHOWN_IMAGE, text)):
        return None

    def name(match: re.Match) -> str:
        starts = re.search(r"(^|[.!?]\s+)$", text[: match.start()]) is not None
        gap = " " if re.match(r"\w", text[match.end() :]) else ""
        return f"{'Image' if starts else 'image'} {numbers[match[1]]}{gap}"

    return re.sub(SHOWN_IMAGE, name, text).strip()


def _name(record: Any) -> str:
    """The id of an image, which some copies give as a number."""
    image_id = record.get("image_id") if isinstance(record, dict) else None
    return str(image_id) if isinstance(image_id, (str, int)) and not isinstance(image_id, bool) else ""


def _safe_path(folder: str, name: str) -> str | None:
    """A path below its folder, or nothing."""
    path = PurePosixPath(name)
    is_odd = path.is_absolute() or ".." in path.parts or not path.name or re.search(r"\.(json|parquet)#", name)
    return None if is_odd else f"{folder}/{path}"


def _capitalised(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    text = _capitalised(text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
