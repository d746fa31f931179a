"""
Talks to a saved VisualChat checkpoint in the terminal: several rounds, images by path, answers streamed.

    python examples/chat.py CHECKPOINT [--image PATH …] [--image_memory FOLDER]

CHECKPOINT is a folder or a name on the Hub. At the prompt:

    /image PATH …      show one or more images with the next question
    /list              the conversation so far, with the numbers of its questions and images
    /replace N PATH    show another image in place of image N, and answer the last question again
    /remove N          take image N away, and answer the last question again
    /edit N TEXT       ask question N in other words, and answer the last question again
    /new               start a new conversation
    /quit              leave

What has been computed is kept: a change costs the text after it, and an image is computed once, with --image_memory
once on this machine.
"""

import contextlib
import copy
import os
import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from transformers import TextStreamer, logging

from modeling_visualchat import ConversationCache, ImageMemory, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor, load_image


with contextlib.suppress(ImportError):  # not everywhere; it gives input() line editing and a history
    import readline  # noqa: F401


COMMANDS = ("/image", "/list", "/replace", "/remove", "/edit", "/new", "/quit")


class AnswerStreamer(TextStreamer):
    """Prints an answer as it comes, without the space that it begins with."""

    is_first = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.lstrip() if self.is_first else text
        self.is_first = self.is_first and not text
        super().on_finalized_text(text, stream_end)


class Chat:
    """
    One conversation with a model, which may be changed in any place; only what follows a change is computed anew.

    Args:
        model (`VisualChatForConditionalGeneration`): The model.
        processor (`VisualChatProcessor`): Its processor.
        max_new_tokens (`int`): The longest answer, in tokens.
        image_memory (`ImageMemory`, *optional*): Where images are looked up before they are computed.
    """

    def __init__(self, model, processor, max_new_tokens: int = 256, image_memory: ImageMemory | None = None):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.image_memory = image_memory
        self.start_anew()

    def start_anew(self) -> None:
        self.messages = []
        self.cache = ConversationCache()

    def ask(self, question: str, images: list[str], streamer=None) -> str:
        """Adds a round to the conversation and returns the answer; nothing is kept of a round that fails."""
        content = [{"type": "image", "path": path} for path in images]
        content += [{"type": "text", "text": question}] if question else []
        return self._answer([*self.messages, {"role": "user", "content": content}], streamer)

    def replace_image(self, number: int, path: str, streamer=None) -> str:
        """Shows another image in place of one, counted from 1, and answers the last question again."""
        messages = copy.deepcopy(self.messages)
        content, index = _find(messages, "image", number)
        content[index] = {"type": "image", "path": path}
        return self._answer(messages[:-1], streamer)

    def remove_image(self, number: int, streamer=None) -> str:
        """Takes an image away, counted from 1, and answers the last question again."""
        messages = copy.deepcopy(self.messages)
        content, index = _find(messages, "image", number)
        if len(content) == 1:
            raise ValueError(f"Image {number} is all that its round says; nothing would be left of it.")
        del content[index]
        return self._answer(messages[:-1], streamer)

    def edit_question(self, number: int, question: str, streamer=None) -> str:
        """Asks a question, counted from 1, in other words, and answers the last question again."""
        messages = copy.deepcopy(self.messages)
        content, index = _find(messages, "text", number)
        content[index] = {"type": "text", "text": question}
        return self._answer(messages[:-1], streamer)

    def describe(self) -> str:
        """The conversation with the numbers of its questions and images."""
        lines, counts = [], {"image": 0, "text": 0}
        for message in self.messages:
            if message["role"] == "assistant":
                lines.append(f"    {message['content']}")
                continue
            for block in message["content"]:
                counts[block["type"]] += 1
                name = "image" if block["type"] == "image" else "question"
                lines.append(f"{name} {counts[block['type']]}: {block.get('path') or block.get('text')}")
        return "\n".join(lines) or "(nothing so far)"

    def _answer(self, messages: list[dict], streamer) -> str:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        generated = self.model.generate(
            **inputs,
            past_key_values=self.cache,
            image_memory=self.image_memory,
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
        )
        answer = self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer or "(nothing)"}]
        return answer


def _find(messages: list[dict], kind: str, number: int) -> tuple[list, int]:
    """The blocks that an image or a text of the user stands among, and where."""
    places = [
        (message["content"], index)
        for message in messages
        if message["role"] == "user"
        for index, block in enumerate(message["content"])
        if block["type"] == kind
    ]
    if not 1 <= number <= len(places):
        name = "image" if kind == "image" else "question"
        raise ValueError(f"There is no {name} {number}; the conversation has {len(places)}. /list shows them.")
    return places[number - 1]


def run_command(chat: Chat, line: str, streamer) -> None:
    """Carries out `/replace`, `/remove` or `/edit`."""
    command, *words = line.split(maxsplit=2)
    usage = {"/replace": "/replace N PATH", "/remove": "/remove N", "/edit": "/edit N TEXT"}[command]
    if len(words) != len(usage.split()) - 1 or not words[0].isdecimal():
        raise ValueError(f"write {usage}")
    if command == "/replace":
        if paths := show(shlex.split(words[1])[:1]):
            chat.replace_image(int(words[0]), paths[0], streamer)
    elif command == "/remove":
        chat.remove_image(int(words[0]), streamer)
    else:
        chat.edit_question(int(words[0]), words[1], streamer)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or name of a checkpoint")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], help="images to show with the first question"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="the longest answer, in tokens")
    parser.add_argument("--image_memory", help="folder that keeps what is computed of images for the next time")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    try:
        model = VisualChatForConditionalGeneration.from_pretrained(arguments.checkpoint).eval()
        processor = VisualChatProcessor.from_pretrained(arguments.checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"chat.py: error: {arguments.checkpoint} cannot be loaded: {error}") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    memory = None
    if model.model.keeps_apart():
        memory = ImageMemory(folder=arguments.image_memory)
    elif arguments.image_memory:
        raise SystemExit("chat.py: error: --image_memory: this model cannot use an image memory")
    chat = Chat(model, processor, arguments.max_new_tokens, memory)
    images = show(arguments.image)
    print("Ask a question. /image PATH shows an image with it, /list what there is to change, /quit leaves.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = line.split(maxsplit=1)[0] if line.startswith("/") else ""
        streamer = AnswerStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            if command == "/quit":
                return
            if command == "/new":
                chat.start_anew()
                images = []
            elif command == "/image":
                images += show(shlex.split(line)[1:])
            elif command == "/list":
                print(chat.describe())
            elif command in ("/replace", "/remove", "/edit"):
                run_command(chat, line, streamer)
            elif command:
                print(f"Unknown command {command}; there are {', '.join(COMMANDS)}.")
            elif line:
                chat.ask(line, images, streamer)
                images = []
        except (OSError, ValueError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped; this is not kept)")


def show(paths: list[str]) -> list[str]:
    """Those of the images that can be opened; says so of each."""
    readable = []
    for path in map(os.path.expanduser, paths):
        try:
            image = load_image(path)
        except (OSError, ValueError) as error:
            print(f"error: {error}")
            continue
        print(f"[{path}: {image.width} x {image.height}]")
        readable.append(path)
    return readable


if __name__ == "__main__":
    main()
