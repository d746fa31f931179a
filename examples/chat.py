"""
Talks to a saved VisualChat checkpoint in the terminal: several rounds, images by path, answers streamed.

    python examples/chat.py CHECKPOINT [--image PATH …] [--image_memory FOLDER]

CHECKPOINT is a folder or a name on the Hub. At the prompt:

    /image PATH …      show one or more images with the next question
    /list              the conversation so far, with the numbers of its questions and images
    /replace N PATH    replace image N, and answer the last question again
    /remove N          remove image N, and answer the last question again
    /edit N TEXT       change the text of question N, and answer the last question again
    /new               start a new conversation
    /quit              leave the program

A change computes only the text after it again, and an image is computed once; with --image_memory, once on this
machine.
"""

import contextlib
import os
import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from transformers import TextStreamer, logging

from modeling_visualchat import ChatSession, ImageMemory, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor, load_image


with contextlib.suppress(ImportError):  # not everywhere; it gives input() line editing and a history
    import readline  # noqa: F401


COMMANDS = ("/image", "/list", "/replace", "/remove", "/edit", "/new", "/quit")


class AnswerStreamer(TextStreamer):
    """Prints an answer token by token, without its leading space."""

    is_first = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.lstrip() if self.is_first else text
        self.is_first = self.is_first and not text
        super().on_finalized_text(text, stream_end)


def describe(messages: list[dict]) -> str:
    """The conversation with the numbers of its questions and images."""
    lines, counts = [], {"image": 0, "text": 0}
    for message in messages:
        if message["role"] == "assistant":
            lines.append(f"    {message['content']}")
            continue
        for block in message["content"]:
            counts[block["type"]] += 1
            name = "image" if block["type"] == "image" else "question"
            lines.append(f"{name} {counts[block['type']]}: {block.get('path') or block.get('text')}")
    return "\n".join(lines) or "(nothing so far)"


def run_command(session: ChatSession, line: str, streamer) -> None:
    """Runs `/replace`, `/remove` or `/edit`."""
    command, *words = line.split(maxsplit=2)
    usage = {"/replace": "/replace N PATH", "/remove": "/remove N", "/edit": "/edit N TEXT"}[command]
    if len(words) != len(usage.split()) - 1 or not words[0].isdecimal():
        raise ValueError(f"write {usage}")
    if command == "/replace":
        if paths := show(shlex.split(words[1])[:1]):
            session.replace_image(int(words[0]), paths[0], streamer)
    elif command == "/remove":
        session.remove_image(int(words[0]), streamer)
    else:
        session.edit_question(int(words[0]), words[1], streamer)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or name of a checkpoint")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], help="images to show with the first question"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum number of tokens of an answer")
    parser.add_argument("--image_memory", help="folder that caches image states across runs")
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
    if model.model.supports_conversation_cache():
        memory = ImageMemory(folder=arguments.image_memory)
    elif arguments.image_memory:
        raise SystemExit("chat.py: error: --image_memory: this model cannot use an image memory")
    session = model.start_chat(processor, memory, max_new_tokens=arguments.max_new_tokens)
    images = show(arguments.image)
    print("Ask a question. /image PATH shows an image with it, /list shows the conversation, /quit leaves.")
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
                session.reset()
                images = []
            elif command == "/image":
                images += show(shlex.split(line)[1:])
            elif command == "/list":
                print(describe(session.messages))
            elif command in ("/replace", "/remove", "/edit"):
                run_command(session, line, streamer)
            elif command:
                print(f"Unknown command {command}; there are {', '.join(COMMANDS)}.")
            elif line:
                session.ask(line, images, streamer)
                images = []
        except (OSError, ValueError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped; this round is not kept)")


def show(paths: list[str]) -> list[str]:
    """Prints which images can be opened, and returns their paths."""
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
