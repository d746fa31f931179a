"""A handful of evaluation conversations that are answered at each evaluation, as text and as a picture."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from drawn_chats import Chat, draw_chats
from transformers import Trainer
from transformers.trainer_utils import has_length

from processing_visualchat.conversation_visualchat import is_image
from processing_visualchat.data.batch_facts import place_of
from processing_visualchat.data.conversation import messages_of
from processing_visualchat.evaluation.answering import Answerer, AnswerOptions, Item
from processing_visualchat.evaluation.pictures import open_picture
from processing_visualchat.evaluation.records import Example, Round, SuiteError


SAMPLES = "_samples"  # folder of the answers; what begins with _ is not pushed to the Hub


class Samples:
    """
    Conversations that are answered greedily, with the model's own answers as history.

    Args:
        dataset: The evaluation data: the conversations are spread over them, or the first ones of a stream. Those with
            an image that cannot be used are left out.
        processor (`VisualChatProcessor`): The processor of the model.
        number (`int`): Their number.
        max_new_tokens (`int`, *optional*, defaults to 64): Maximum tokens of an answer.
    """

    def __init__(self, dataset: Any, processor: Any, number: int, max_new_tokens: int = 64):
        if has_length(dataset):
            size = len(dataset)
            taken = [dataset[place * size // number] for place in range(min(number, size))]
        else:
            taken = list(islice(dataset, number))
        read = [read_example(example, place) for place, example in enumerate(taken)]
        self.examples = [example for example in read if example is not None]
        self.processor, self.options = processor, AnswerOptions(max_new_tokens=max_new_tokens)

    def answer(self, trainer: Trainer, model: Any) -> None:
        """Answers in all processes, as weights may be sharded; the first one writes `step-N.md` and `step-N.png`."""
        if not self.examples:
            return
        answerer = Answerer(model, self.processor, self.options, len(self.examples), Path())
        answerer.memory = None  # it would take a checksum of the weights, which may be elsewhere
        answered = [line["rounds"] for line in answerer.answer([Item(example) for example in self.examples])]
        if trainer.is_world_process_zero():
            folder = Path(trainer.args.output_dir) / SAMPLES
            folder.mkdir(parents=True, exist_ok=True)
            name = f"step-{trainer.state.global_step}"
            (folder / f"{name}.md").write_text(format_answers(name, self.examples, answered))
            draw_chats([*map(read_chat, self.examples, answered)], folder / f"{name}.png")


def read_example(example: dict, number: int) -> Example | None:
    """An example of the training data as one of an evaluation; `None` if an image of it cannot be used."""
    messages = [{**each, "content": as_blocks(each["content"])} for each in messages_of(example)]
    system = messages.pop(0)["content"][0]["text"] if messages[0]["role"] == "system" else None
    rounds = [
        Round(tuple(question["content"]), (answer["content"][0]["text"],))
        for question, answer in zip(messages[::2], messages[1::2])
    ]
    key = place_of(example, number)
    try:
        for block in (block for asked in rounds for block in asked.content if is_image(block)):
            open_picture(block, key)
    except SuiteError:
        return None
    return Example(key, tuple(rounds), system)


def as_blocks(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def format_answers(title: str, examples: Sequence[Example], answered: Sequence[list[dict]]) -> str:
    """Questions, answers and references in Markdown."""
    lines = [f"# {title}"]
    for example, rounds in zip(examples, answered):
        lines.append(f"## {example.key}")
        for asked in rounds:
            answer = asked["answer"] or asked.get("fault", "")
            lines += [f"**Question**: {asked['question']}", f"**Answer**: {answer}"]
            lines.append(f"**Expected**: {asked['references'][0]}")
    return "\n\n".join(lines) + "\n"


def read_chat(example: Example, rounds: list[dict]) -> Chat:
    """An answered conversation, to be drawn."""
    shown = []
    for asked in example.rounds:
        question = " ".join(block["text"] for block in asked.content if not is_image(block))
        images = [open_picture(block, example.key).image for block in asked.content if is_image(block)]
        shown.append((question, images, asked.references[0]))
    return shown, [asked["answer"] for asked in rounds]
