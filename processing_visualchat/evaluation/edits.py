"""
The suite of edits: conversations in which images and turns are replaced, removed and reordered in the middle.

A file has one conversation on every line:

    {"key": "cats-1", "system": "Answer in one word.", "steps": [
        {"ask": "What is it?", "images": ["cat.png"], "references": ["a cat"]},
        {"ask": "And this?", "images": ["dog.png"], "references": ["a dog"]},
        {"replace_image": 1, "image": "bird.png", "references": ["a dog"]},
        {"edit_question": 2, "question": "What was the first?", "references": ["a bird"]}]}

`ask` adds a question, with the images shown before it, if there are any. Every other step edits the conversation so
far, and its last question is answered again:

    {"replace_image": N, "image": PATH}     another image in the place of image N
    {"remove_image": N}                     without image N
    {"swap_images": [N, M]}                 image N in the place of image M, and M in that of N
    {"edit_question": N, "question": TEXT}  other words in question N
    {"edit_answer": N, "answer": TEXT}      other words in the answer to question N
    {"remove_round": N}                     without question N, its images and its answer
    {"move_round": [N, M]}                  question N, with its images and its answer, becomes question M

Images and questions are counted from 1 in the conversation as it is at that step. `references` are answers of which
each is right after the step; without them, only tokens are counted. `key` (by default the number of the line),
`system` and `groups` (`{"name": "value"}`, to break results down by) are optional. Image paths are relative to the
file, and do not leave its folder. The first step is an `ask`; earlier answers stay as they were given.

What is scored: the answers, as in any suite; and the tokens that pass the decoder before each answer begins, of text
and images, in one continued [`ChatSession`] with an image memory, against a new session without one that is given the
same messages.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.generation.streamers import BaseStreamer

from modeling_visualchat.conversation_edits_visualchat import EDITS, VALUES, EditError, Messages, apply_edit

from ..conversation_visualchat import is_image
from ..data.files import describe_json_error
from ..data.images import ImageReference
from .answering import Answerer, Item, describe, describe_round
from .records import Example, Round, Suite, SuiteError, check_groups


WITH = {"ask": "images", **VALUES}  # other keys of a step


def load_edits(source: str | Path) -> Iterator[Example]:
    """The conversations of a file in the format above; a [`SuiteError`] names line, step and what was expected."""
    file = Path(os.path.abspath(source))
    if not file.is_file():
        raise SuiteError(f"There is no file {file}; name a file of edits with --data, in the format of edits.py.")
    keys: set[str] = set()
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.name}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SuiteError(f"{where} {describe_json_error(error)}.") from error
            if not isinstance(record, dict) or not isinstance(record.get("steps"), list) or not record["steps"]:
                raise SuiteError(f"{where} has no list of steps; expected {{'steps': [{{'ask': …}}, …]}}.")
            key = str(record.get("key", number))
            if key in keys:
                raise SuiteError(f"{where} has the key {key} of an earlier line; expected one of its own.")
            keys.add(key)
            steps = [_read_step(step, f"{where}, step {place}", file) for place, step in enumerate(record["steps"], 1)]
            system = record.get("system")
            if not isinstance(system, str | None):
                raise SuiteError(f"{where} has the system instruction {system!r:.80}; expected text.")
            example = Example(key, tuple(steps), system, check_groups(record.get("groups"), where))
            _try_edits(example, where)
            yield example
    if not keys:
        raise SuiteError(f"{file} holds no conversation; write one on every line.")


def _read_step(step: Any, where: str, file: Path) -> Round:
    names = [name for name in ("ask", *EDITS) if isinstance(step, dict) and name in step]
    if len(names) != 1:
        found = f"has the keys {', '.join(map(str, step))}" if isinstance(step, dict) else f"is {step!r:.80}"
        raise SuiteError(f"{where} {found}; expected one of ask, {', '.join(EDITS)}.")
    name = names[0]
    allowed = {name, "references", WITH.get(name, name)}
    if unknown := sorted(step.keys() - allowed):
        raise SuiteError(f"{where} has the key {unknown[0]!r}; expected {', '.join(sorted(allowed))}.")
    required = ("image", "question") if name != "ask" else ()
    for key in required:
        if WITH.get(name) == key and not (isinstance(step.get(key), str) and step[key]):
            raise SuiteError(f"{where} has {key} {step.get(key)!r}; expected text.")
    references = step.get("references", [])
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise SuiteError(f"{where} has references {references!r:.80}; expected a list of texts.")
    if name != "ask":
        edit = {key: value for key, value in step.items() if key != "references"}
        if name == "replace_image":
            edit["image"] = _resolve(step["image"], where, file)
        return Round((), tuple(references), edit=edit)
    if not isinstance(step["ask"], str) or not step["ask"] or not isinstance(step.get("images", []), list):
        raise SuiteError(f"{where} asks {step['ask']!r:.80}; expected text, and a list of images.")
    images = [_resolve(image, where, file) for image in step.get("images", [])]
    return Round((*images, {"type": "text", "text": step["ask"]}), tuple(references))


def _resolve(image: Any, where: str, file: Path) -> dict[str, Any]:
    reference = ImageReference.from_source(image)
    found = reference and reference.resolve(str(file.parent))
    if found is None or not found.exists():
        raise SuiteError(f"{where} shows {image!r:.200}; expected the path of an image below {file.parent}.")
    return found.block()


def _try_edits(example: Example, where: str) -> None:
    """Applies all steps to messages without real answers; a [`SuiteError`] names the one that does not fit."""
    messages: Messages = []
    for number, step in enumerate(example.rounds, 1):
        if step.edit is None:
            messages = [*messages, {"role": "user", "content": [*step.content]}]
        else:
            try:
                messages = apply_edit(messages, step.edit)[:-1]
            except EditError as error:
                raise SuiteError(f"{where}, step {number} does not fit the conversation: {error}.") from error
        messages = [*messages, {"role": "assistant", "content": "?"}]


class PromptCounter(BaseStreamer):
    """The tokens that had passed the decoder when the first token of an answer came, of those being counted."""

    def __init__(self, counts: list[int]):
        self.counts, self.num_calls, self.num_tokens = counts, 0, 0

    def put(self, value) -> None:
        self.num_calls += 1
        if self.num_calls == 2:  # the first call passes the question
            self.num_tokens = sum(self.counts)

    def end(self) -> None:
        pass


def answer_with_edits(answerer: Answerer, item: Item) -> dict[str, Any]:
    """The line of `answers.jsonl` of a conversation with edits."""
    model, example = answerer.model, item.example
    sessions = [
        model.start_chat(answerer.processor, memory, **answerer.generate_options())
        for memory in (answerer.make_memory(), None)
    ]
    messages: Messages = []
    if example.system is not None:
        messages.append({"role": "system", "content": answerer.to_plain(example.system)})
    images: list[str] = []
    rounds = []
    for step in example.rounds:
        if step.edit is None:
            content, digests = answerer.open_content(step.content, item)
            messages = [*messages, {"role": "user", "content": content}]
            images += digests
        else:
            edit = dict(step.edit)
            if "image" in edit:
                picture = answerer.open(edit["image"], item)
                edit["image"] = picture.block
                images.append(picture.digest)
            edit |= {key: answerer.to_plain(edit[key]) for key in ("question", "answer") if key in edit}
            messages = apply_edit(messages, edit)[:-1]
        fault, answers, num_tokens = answerer.find_fault(messages), ["", ""], [0, 0]
        for place, session in enumerate(sessions if not fault else ()):
            if place == 1:
                session.reset()
            with model.model.count_tokens() as counts:
                counter = PromptCounter(counts)
                answers[place] = session.answer(messages, counter)
            num_tokens[place] = counter.num_tokens
        num_images = sum(is_image(block) for message in messages for block in message["content"])
        line = describe_round(step, answers[0], num_images, fault) | {"num_shown": len(images)}
        shown = {key: value for key, value in (step.edit or {}).items() if key != "image"}
        line |= {"question": json.dumps(shown) if step.edit else line["question"]}
        line |= {"step": next(iter(step.edit)) if step.edit else "ask", "tokens": num_tokens[0]}
        rounds.append({**line, "tokens_anew": num_tokens[1], "is_same": answers[0] == answers[1]})
        answer = step.references[0] if answerer.options.history == "references" and step.references else answers[0]
        answer = answerer.to_plain(answer) or "(nothing)"
        messages = [*messages, {"role": "assistant", "content": answer}]
    return describe(item, images, rounds)


def sum_up_tokens(lines: list[dict]) -> dict[str, dict[str, float]]:
    """
    For each kind of step, and all: answered steps, tokens computed and anew, their share, and the share of equal
    answers.
    """
    kinds: dict[str, list[dict]] = {}
    for step in (step for line in lines for step in line["rounds"] if "tokens" in step and "fault" not in step):
        for kind in ("all", step["step"]):
            kinds.setdefault(kind, []).append(step)
    sums = {}
    for kind, steps in kinds.items():
        computed, anew = (sum(step[name] for step in steps) for name in ("tokens", "tokens_anew"))
        same = sum(step["is_same"] for step in steps) / len(steps)
        share = computed / anew if anew else 0.0
        sums[kind] = {"steps": len(steps), "tokens": computed, "tokens_anew": anew, "share": share, "same": same}
    return sums


EDITS_SUITE = Suite(
    name="edits",
    description="Conversations in which images and turns are replaced, removed and reordered in the middle",
    reference="processing_visualchat/evaluation/edits.py",
    load=load_edits,
    metrics=("exact_match", "contains", "anls"),
)
