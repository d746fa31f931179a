"""
Answers many conversations with a saved VisualChat checkpoint.

    python examples/generate.py CHECKPOINT --input conversations.jsonl --output answers.jsonl

With several processes: `accelerate launch --multi_gpu examples/generate.py …` on GPUs, and on a CPU
`torchrun --nproc_per_node 2 examples/generate.py …`.

The input is a file of any schema that can be trained on. The last question of each conversation is answered; an answer
that it has is left out. Conversations of similar length are answered together, the longest first. The output has a
line for each conversation, in their order: `id` (its place in the input), `key` (its own `id` or `key`), `answer`,
`finish_reason` (stop or length), `prompt_tokens`, `completion_tokens` and `images`; or the `error` of one that cannot
be answered. It is written when all are done. Until then, answers are in the folder OUTPUT.parts, from which a second
start with the same flags continues; it tries again what failed.

The exit code is 0 if every conversation is answered, 3 if some are not (1 from a launcher of several processes), and 1
if the run could not start.
"""

import itertools
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from jinja2 import TemplateError
from loading import add_image_memory_arguments, add_model_arguments, count, load_model, make_image_memory
from transformers import logging

from modeling_visualchat import ImageMemory
from modeling_visualchat.weights_key_visualchat import known_key
from processing_visualchat.conversation_visualchat import is_image, map_blocks
from processing_visualchat.data.conversation import Conversation, Dropped
from processing_visualchat.data.files import digest_file
from processing_visualchat.data.images import ImageReference
from processing_visualchat.data.ingestion import to_text
from processing_visualchat.data.readers import read_conversations
from processing_visualchat.evaluation.answer_file import LONGEST_WAIT, answer_all, check_settings, write_lines
from processing_visualchat.evaluation.answering import Answerer, AnswerOptions, Generated, make_batches


OPTIONS = ("max_new_tokens", "temperature", "top_p", "seed")  # flags that are fields of `AnswerOptions`
FREE = ("checkpoint",)  # a setting that may change: the weights are compared
SOME_FAILED = 3  # exit code


class Prompt(NamedTuple):
    """A conversation to answer."""

    id: str  # its place in the file
    key: str | int | None  # the id that it gives itself
    conversation: Conversation | Dropped


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--input", required=True, help="file of conversations to be answered")
    parser.add_argument("--output", required=True, help="file of answers, as JSON lines")
    parser.add_argument("--image_root", help="folder that image paths are relative to; by default that of the input")
    parser.add_argument("--batch_size", type=count, default=8, help="conversations that are answered together")
    parser.add_argument("--max_new_tokens", type=count, default=256, help="maximum number of tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass that is sampled from")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled answers")
    add_image_memory_arguments(parser)
    parser.add_argument("--limit", type=count, help="only the first so many conversations")
    return parser


def read_prompts(arguments: Namespace) -> list[Prompt]:
    """The conversations of the input; an error for a file that cannot be read, or holds none."""
    file, root = Path(os.path.abspath(arguments.input)), arguments.image_root
    if root is not None and not os.path.isdir(root):
        raise FileNotFoundError(f"--image_root {root} is not a folder")
    records = read_conversations(file, root and os.path.abspath(root), file.name, ends_with_question=True)
    prompts = [
        Prompt(to_text(record.where.removeprefix(f"{file.name}, ")), record.key, record.outcome)
        for record in itertools.islice(records, arguments.limit)
    ]
    if not prompts:
        raise ValueError(f"{file} holds no conversation; write one on every line.")
    return prompts


def length(prompt: Prompt, answerer: Answerer) -> int:
    """About the number of tokens of a prompt."""
    if isinstance(prompt.conversation, Dropped):
        return 0
    blocks = [block for turn in prompt.conversation.turns for block in turn.content]
    texts = [block for block in blocks if isinstance(block, str)]
    return answerer.estimate_tokens(texts, len(blocks) - len(texts))


def answer(prompts: Sequence[Prompt], answerer: Answerer) -> Iterator[dict]:
    """The lines of prompts that are answered together."""
    opened = [open_prompt(prompt, answerer) for prompt in prompts]
    rows = [row for row, (_, error) in enumerate(opened) if not error]
    options = answerer.generate_options([prompts[row].id for row in rows])
    answers = answerer.generate_counted([opened[row][0] for row in rows], **options) if rows else []
    found = dict(zip(rows, answers))
    for row, prompt in enumerate(prompts):
        line = {"id": prompt.id, "key": prompt.key}
        yield line | (describe(prompt, found[row]) if row in found else {"error": to_text(opened[row][1])})


def open_prompt(prompt: Prompt, answerer: Answerer) -> tuple[list[dict], str]:
    """The messages of a prompt with their images open, or why it cannot be answered."""
    if isinstance(prompt.conversation, Dropped):
        return [], f"The record {prompt.conversation.predicate}."
    messages = prompt.conversation.map_texts(answerer.to_plain).messages()
    try:
        if fault := answerer.find_fault(messages):
            return [], f"The conversation has {fault}."
        return map_blocks(messages, open_block), ""
    except (OSError, ValueError, TemplateError) as error:
        return [], str(error)


def describe(prompt: Prompt, answer: Generated) -> dict:
    """The fields of a line with an answer; repairs of the record are named."""
    line = {"answer": answer.text, "finish_reason": "stop" if answer.is_ended else "length"}
    line |= {"prompt_tokens": answer.num_prompt_tokens, "completion_tokens": answer.num_tokens}
    line |= {"images": len(prompt.conversation.images)}
    return line | ({"repairs": [*prompt.conversation.repairs]} if prompt.conversation.repairs else {})


def open_block(block: dict) -> dict:
    """A block of a message, with an image open."""
    reference = ImageReference.from_block(block) if is_image(block) else None
    return block if reference is None else {"type": "image", "image": reference.open()}


def run(arguments: Namespace, state: PartialState) -> list[dict]:
    """Answers all conversations, and returns the lines of the output on the main process."""
    options = AnswerOptions(**{name: getattr(arguments, name) for name in OPTIONS})
    output, folder = Path(arguments.output), Path(f"{arguments.output}.parts")
    if output.exists() and not folder.exists():
        raise FileExistsError(
            f"{output} exists, and {folder}, from which it could be continued, does not; choose another output."
        )
    if state.num_processes > 1 and ((arguments.gpus or 0) > 1 or arguments.max_memory):
        raise ValueError("--gpus and --max_memory spread a model over devices, which one process does; start one.")
    with state.main_process_first():  # images in a table are read once
        prompts = read_prompts(arguments)
    model, processor = load_model(arguments)
    memory = make_image_memory(model, arguments, ImageMemory)
    settings = {name: getattr(options, name) for name in OPTIONS} | {
        "checkpoint": arguments.checkpoint,
        "weights": known_key(model) or arguments.checkpoint,
        "input": digest_file(arguments.input),
        "image_memory_bits": arguments.image_memory_bits,
        "image_root": arguments.image_root and os.path.abspath(arguments.image_root),
        "limit": arguments.limit,
    }
    if state.is_main_process:
        check_settings(folder, settings, FREE)
    answerer = Answerer(model, processor, options, arguments.batch_size, folder, memory)
    batches = make_batches(prompts, arguments.batch_size, partial(length, answerer=answerer))
    order = {prompt.id: number for number, prompt in enumerate(prompts)}
    lines = answer_all(folder, batches, partial(answer, answerer=answerer), order, state)
    if state.is_main_process:
        write_lines(output, lines)
    return lines


def main() -> None:
    arguments = make_parser().parse_args()
    logging.set_verbosity_error()
    # On a CPU, accelerate has to be told, or every process is by itself.
    is_cpu = arguments.gpus == 0 or not torch.accelerator.is_available()
    state = PartialState(cpu=is_cpu, timeout=LONGEST_WAIT)
    try:
        lines = run(arguments, state)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    num_failed = sum("error" in line for line in lines)
    if state.is_main_process:
        print(f"{len(lines) - num_failed:,} conversations answered, {num_failed:,} failed: {arguments.output}")
    state.destroy_process_group()
    if num_failed:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()
