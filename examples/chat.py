"""
Talks to a saved VisualChat checkpoint in the terminal: several rounds, images by path, answers streamed.

    python examples/chat.py CHECKPOINT [--image PATH …] [--image_memory FOLDER]

CHECKPOINT is a folder or a name on the Hub. `/help` lists the commands; paths and globs, also dropped on the terminal,
are images of the next question. Any image, question or answer may change later: only what follows is computed again,
and an image is computed once; with --image_memory, once on this machine. Ctrl-C stops an answer, which stays as far as
it is; Ctrl-D leaves.
"""

import glob
import os
import shlex
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlparse

from loading import add_image_memory_arguments, add_model_arguments, load_model, make_image_memory
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from transformers import TextStreamer, logging

from modeling_visualchat import ChatSession, ImageMemory
from processing_visualchat import load_image


class AnswerStreamer(TextStreamer):
    """Prints an answer token by token, without its leading space."""

    is_first = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.lstrip() if self.is_first else text
        self.is_first = self.is_first and not text
        super().on_finalized_text(text, stream_end)


@dataclass
class Chat:
    """What is between the lines that are typed and a session."""

    session: ChatSession
    images: list[str] = field(default_factory=list)  # of the next question
    shows_speed: bool = False
    is_over: bool = False

    def run(self, line: str) -> None:
        """Runs a line: a command, images of the next question, or a question. Errors are printed."""
        try:
            name, _, rest = line.partition(" ")
            if name in COMMANDS:
                COMMANDS[name].run(self, rest.strip())
            elif paths := find_paths(line):
                self.show(paths)
            elif line.startswith("/"):
                print(f"Unknown command {name}; /help lists them.")
            elif line:
                images, self.images = self.images, []
                try:
                    self.answer(lambda streamer: self.session.ask(line, images, streamer))
                except BaseException:
                    self.images = images
                    raise
        except (OSError, ValueError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped before the answer began; this round is not kept)")

    def answer(self, ask: Callable[[AnswerStreamer], str]) -> None:
        """Prints an answer as it comes, and what it took to compute."""
        before = self.session.usage
        with stops_on_interrupt(self.session):
            ask(AnswerStreamer(self.session.processor.tokenizer, skip_prompt=True, skip_special_tokens=True))
        usage = self.session.usage
        if usage is None or usage is before:
            return print("(nothing to answer again)")
        reason = {"stopped": " (stopped)", "length": " (at the maximum length)"}.get(usage.finish_reason, "")
        print(f"[{usage}{'; ' + usage.speed if self.shows_speed else ''}]{reason}")

    def show(self, paths: list[str]) -> None:
        """Shows images with the next question, those that can be opened."""
        for path in paths:
            try:
                image = load_image(path)
            except (OSError, ValueError) as error:
                print(f"error: {error}")
                continue
            print(f"[{path}: {image.width} x {image.height}]")
            self.images.append(path)

    def edit(self, text: str, name: str, value: str | None = None) -> None:
        """Runs an edit with one number, and a value of its own, or with two numbers."""
        number, _, rest = text.partition(" ")
        numbers = text.split()
        usage = next(f"{key} {each.usage}" for key, each in COMMANDS.items() if each.edit == name)
        is_pair = name in ("swap_images", "move_round")
        if is_pair and len(numbers) == 2 and all(map(str.isdecimal, numbers)):
            change: dict = {name: [int(each) for each in numbers]}
        elif not is_pair and number.isdecimal() and bool(rest.strip()) == (value is not None):
            change = {name: int(number)} | ({} if value is None else {value: rest.strip()})
        else:
            raise ValueError(f"write {usage}")
        if value == "image":
            paths = find_paths(rest) or [rest.strip()]
            load_image(paths[0])
            change["image"] = paths[0]
        self.answer(lambda streamer: self.session.edit(streamer, **change))

    def list_messages(self) -> None:
        """Prints the conversation with the numbers of its questions and images."""
        print(describe(self.session.messages))

    def list_images(self) -> None:
        """Prints the images of the conversation, and of the next question."""
        lines = [line for line in describe(self.session.messages).splitlines() if line.startswith("image ")]
        print("\n".join([*lines, *(f"next: {path}" for path in self.images)]) or "(no images)")

    def save(self, path: str) -> None:
        """Saves the conversation with its images."""
        self.session.save(path := required(path, "/save FILE"))
        print(f"Saved to {path}.")

    def load(self, path: str) -> None:
        """Continues a saved conversation."""
        self.session.load(required(path, "/load FILE"))
        self.list_messages()

    def undo(self) -> None:
        """Takes the last change back."""
        self.session.undo()
        self.list_messages()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.session.reset()
        self.images = []

    def toggle_speed(self) -> None:
        """Shows, or no longer shows, how fast answers come."""
        self.shows_speed = not self.shows_speed
        print(f"Speed is {'shown' if self.shows_speed else 'not shown'} after each answer.")

    def leave(self) -> None:
        """Ends the program."""
        self.is_over = True


@dataclass(frozen=True)
class Command:
    """A command of the terminal."""

    usage: str  # what follows its name
    help: str
    run: Callable[[Chat, str], None]
    edit: str | None = None  # the edit that it makes


def edit_command(usage: str, help: str, name: str, value: str | None = None) -> Command:
    """A command that edits the conversation."""
    return Command(usage, help, lambda chat, text: chat.edit(text, name, value), name)


COMMANDS = {
    "/image": Command(
        "PATH …", "show images with the next question", lambda chat, text: chat.show(find_paths(text, True))
    ),
    "/images": Command("", "the images, with their numbers", lambda chat, text: chat.list_images()),
    "/list": Command("", "the conversation so far", lambda chat, text: chat.list_messages()),
    "/replace": edit_command("N PATH", "another image in the place of image N", "replace_image", "image"),
    "/remove": edit_command("N", "remove image N; the others keep their numbers", "remove_image"),
    "/swap": edit_command("N M", "exchange the places of two images", "swap_images"),
    "/edit": edit_command("N TEXT", "other words in question N", "edit_question", "question"),
    "/answer": edit_command("N TEXT", "other words in the answer to question N", "edit_answer", "answer"),
    "/drop": edit_command("N", "remove question N, its images and its answer", "remove_round"),
    "/move": edit_command("N M", "question N, its images and answer become question M", "move_round"),
    "/retry": Command("", "answer the last question again", lambda chat, text: chat.answer(chat.session.retry)),
    "/undo": Command("", "take the last change back", lambda chat, text: chat.undo()),
    "/system": Command(
        "TEXT",
        "the instruction that the conversation begins with",
        lambda chat, text: chat.answer(lambda streamer: chat.session.edit(streamer, system=text)),
    ),
    "/save": Command("FILE", "save the conversation with its images", Chat.save),
    "/load": Command("FILE", "continue a saved conversation", Chat.load),
    "/speed": Command("", "show how fast answers come", lambda chat, text: chat.toggle_speed()),
    "/reset": Command("", "start a new conversation", lambda chat, text: chat.reset()),
    "/help": Command("", "this list", lambda chat, text: print(list_commands())),
    "/quit": Command("", "leave the program", lambda chat, text: chat.leave()),
}


def list_commands() -> str:
    """The commands and what they do."""
    return "\n".join(f"  {name + ' ' + each.usage:<18} {each.help}" for name, each in COMMANDS.items())


def required(text: str, usage: str) -> str:
    """The path in a text; a `ValueError` if there is none."""
    paths = shlex.split(text)
    if len(paths) != 1:
        raise ValueError(f"write {usage}")
    return os.path.expanduser(paths[0])


def find_paths(line: str, is_list: bool = False) -> list[str]:
    """
    The image files that a line names: paths, quoted or escaped as a terminal drops them, `file://` URLs and globs.
    Empty if any other word is in it, unless the line is known to be a list of paths.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe in a question
        words = [line]
    paths: list[str] = []
    for word in words:
        path = unquote(urlparse(word).path) if word.startswith("file://") else os.path.expanduser(word)
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not found and not is_list:
            return []
        paths += found or [word]
    return paths


def describe(messages: list[dict]) -> str:
    """The conversation with the numbers of its questions and images."""
    lines, number = [], 0
    for message in messages:
        if message["role"] != "user":
            lines.append(f"{'system: ' if message['role'] == 'system' else '    '}{message['content']}")
            continue
        number += 1
        images = [block for block in message["content"] if block["type"] != "text"]
        lines += [
            f"image {block['number']}: {block.get('path') or block.get('name') or 'a picture'}" for block in images
        ]
        texts = [block["text"] for block in message["content"] if block["type"] == "text"]
        lines.append(f"question {number}: {' '.join(texts) or '(only images)'}")
    return "\n".join(lines) or "(nothing so far)"


@contextmanager
def stops_on_interrupt(session: ChatSession):
    """Ctrl-C stops the answer, and a second time also the computation before its first token."""

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class CommandCompleter(Completer):
    """Completes the name of a command, and a path behind it."""

    def get_completions(self, document, complete_event):
        name, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            commands = [command for command in COMMANDS if name and command.startswith(name)]
            yield from (Completion(command, -len(name)) for command in commands)
        elif name in COMMANDS and COMMANDS[name].usage.split()[-1:] in (["PATH"], ["FILE"], ["…"]):
            yield from PathCompleter(expanduser=True).get_completions(Document(rest.split(" ")[-1]), complete_event)


def make_prompt() -> Callable[[], str]:
    """Reads a line: with history, editing and completion in a terminal, else plainly."""
    if not sys.stdin.isatty():
        return lambda: input("> ")
    folder = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        history: FileHistory | InMemoryHistory = FileHistory(str(folder / "visualchat_history"))
    except OSError:
        history = InMemoryHistory()
    prompt = PromptSession(history=history, completer=CommandCompleter())
    return lambda: prompt.prompt("> ", complete_while_typing=False)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], help="images to show with the first question"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum number of tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely tokens")
    parser.add_argument("--max_images", type=int, help="maximum images; beyond, the first rounds are dropped")
    add_image_memory_arguments(parser)
    parser.add_argument("--speed", action="store_true", help="show how fast answers come")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    model, processor = load_model(arguments)
    options = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {}
    session = model.start_chat(
        processor,
        make_image_memory(model, arguments, ImageMemory),
        max_images=arguments.max_images,
        overflow="drop_first_rounds",
        max_new_tokens=arguments.max_new_tokens,
        **options,
    )
    chat = Chat(session, shows_speed=arguments.speed)
    chat.show([path for each in arguments.image for path in find_paths(shlex.quote(each), True)])
    print("Ask a question. /image PATH shows an image with it, /help lists the commands, /quit leaves.")
    read = make_prompt()
    while not chat.is_over:
        try:
            chat.run(read().strip())
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            continue  # the line is dropped


if __name__ == "__main__":
    main()
