"""
Talks to a saved VisualChat checkpoint on a web page: several rounds, images uploaded, pasted or dropped.

    python examples/web_demo.py CHECKPOINT [--host 0.0.0.0] [--port 7860] [--examples FILE]

CHECKPOINT is a folder or a name on the Hub. Any image, question or answer may change later: only what follows is
computed again, and an image is computed once for everyone. Each browser tab has a conversation of its own; answers are
generated one after the other. The last --max_caches conversations keep their keys and values; of another one, the next
question computes its text again. When a tab is closed, its keys and values are freed, and an hour later its messages.
"""

import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from gradio.utils import get_upload_folder
from loading import add_image_memory_arguments, add_model_arguments, count, load_model, make_image_memory
from transformers import TextStreamer, logging
from web_layout import LOOK, Page, make_page, message_places, read_examples, show_messages, unpack

from modeling_visualchat import ChatSession, ImageMemory
from modeling_visualchat.conversation_edits_visualchat import iterate_images


SECONDS_BETWEEN_UPDATES = 0.1
FINISHED = {"stop": "", "stopped": "; stopped", "length": "; at the maximum length"}  # by `Usage.finish_reason`


class AnswerStreamer(TextStreamer):
    """Keeps an answer as far as it has come."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


class Chat(ChatSession):
    """The conversation of a browser tab, with what each answer took to compute."""

    pending: list[dict] | None = None  # the messages that are being answered
    running: Future | None = None  # the last answer

    def answer(self, messages: list[dict], streamer=None, num_dropped: int | None = None) -> str:
        self.pending = messages
        try:
            answer = super().answer(messages, streamer, num_dropped)
        finally:
            self.pending = None
        took = self.usage
        self.messages[-1]["usage"] = f"{took}; {took.speed}{FINISHED[took.finish_reason]}"
        return answer

    def edit_message(self, place: int, text: str, streamer: TextStreamer) -> None:
        """Changes the words of a question or an answer."""
        number = sum(message["role"] == "user" for message in self.messages[: place + 1])
        if self.messages[place]["role"] == "user":
            self.edit(streamer, edit_question=number, question=text)
        else:
            self.edit(streamer, edit_answer=number, answer=text)
            self.messages[place].pop("usage", None)

    def load(self, path: str) -> None:
        super().load(path)
        try:
            unpack(self.messages)
        except ValueError:
            self.undo()
            raise

    def halt(self) -> None:
        """Ends the answer that is being generated, if any."""
        if self.running is not None and not self.running.cancel():
            self.stop()


class Demo:
    """
    The events of the page. One thread computes, so that answers come one after the other; the keys and values of the
    least recently used conversations are freed.
    """

    blocks: gr.Blocks

    def __init__(self, page: Page, examples: list[dict], new_chat: Callable[[], Chat], max_caches: int):
        self.page, self.examples, self.new_chat, self.max_caches = page, examples, new_chat, max_caches
        self.chats: WeakValueDictionary[str, Chat] = WeakValueDictionary()
        self.cached: list[Chat] = []  # the last one used comes last; of the thread that computes
        self.worker = ThreadPoolExecutor(1)
        self.connect()

    def connect(self) -> None:
        """Connects components and events."""
        page = self.page
        shown = [page.chat, page.chosen, page.chatbot, page.box, page.images, page.replace, page.remove]
        inputs = {page.chat, page.chosen, page.max_new_tokens, page.temperature}
        progress = {"show_progress": "minimal", "show_progress_on": page.chatbot}
        answers: dict[str, Any] = {"outputs": shown, "concurrency_id": "model", **progress}
        page.box.submit(self.ask, {*inputs, page.box}, **answers)
        page.chatbot.example_select(self.ask_example, inputs, **answers)
        page.chatbot.retry(self.retry, inputs, **answers)
        page.chatbot.edit(self.edit, inputs, **answers)
        page.replace.upload(self.replace_image, {*inputs, page.replace}, **answers)
        page.remove.click(self.remove_image, inputs, **answers)
        page.undo.click(self.undo, page.chat, shown)
        gr.on([page.reset.click, page.chatbot.clear], self.reset, page.chat, shown)
        page.load.upload(self.load, [page.chat, page.load], shown)
        page.save.click(self.save, page.chat, page.saved)
        page.images.select(self.choose_image, page.chat, [page.chosen, page.replace, page.remove], queue=False)
        page.box.stop(self.stop, page.chat, queue=False)

    def open(self, chat: Chat | None, request: gr.Request) -> Chat:
        """The conversation of a tab, which begins with its first event."""
        chat = self.new_chat() if chat is None else chat
        self.chats[request.session_hash] = chat
        return chat

    def answer(self, inputs: dict, request: gr.Request, ask: Callable, message: dict | None = None) -> Iterator[dict]:
        """Shows an answer as it comes. If it fails, the page says why, and the message is in the box again."""
        page, chat = self.page, self.open(inputs[self.page.chat], request)
        chat.generate_kwargs = page.generation_options(inputs)
        streamer, shown = AnswerStreamer(chat.processor.tokenizer, skip_prompt=True, skip_special_tokens=True), None
        chat.running, asked = self.worker.submit(self.compute, ask, chat, streamer), {"value": None} if message else {}
        try:
            yield {page.chat: chat, page.box: gr.MultimodalTextbox(**asked, submit_btn=False, stop_btn=True)}
            while not chat.running.done():
                if (pending := chat.pending) is not None and (pending, streamer.text) != shown:
                    shown = pending, streamer.text
                    answer = {"role": "assistant", "content": streamer.text.lstrip() or "…"}
                    yield {page.chatbot: show_messages([*pending, answer])}
                wait([chat.running], SECONDS_BETWEEN_UPDATES)
        finally:
            chat.halt()  # where the tab is closed
        error = None if chat.running.cancelled() else chat.running.exception()
        restored = {"value": message} if error and message else {}
        box = gr.MultimodalTextbox(**restored, submit_btn=True, stop_btn=False)
        yield {page.chat: chat, page.box: box, **page.show(chat.messages)}
        tell(error)

    def compute(self, ask: Callable, chat: Chat, streamer: TextStreamer) -> None:
        """Answers, once there is room for the keys and values."""
        self.cached = [*(each for each in self.cached if each is not chat), chat]
        while len(self.cached) > self.max_caches:
            self.drop_cache(self.cached[0])
        ask(chat, streamer)

    def ask(self, inputs: dict, request: gr.Request):
        message = inputs[self.page.box]
        text, files = message["text"].strip(), message["files"]
        yield from self.answer(inputs, request, lambda chat, streamer: chat.ask(text, files, streamer), message)

    def ask_example(self, inputs: dict, request: gr.Request, example: gr.SelectData):
        yield from self.ask({**inputs, self.page.box: self.examples[example.index]}, request)

    def retry(self, inputs: dict, request: gr.Request):
        yield from self.answer(inputs, request, Chat.retry)

    def edit(self, inputs: dict, request: gr.Request, edit: gr.EditData):
        index = edit.index if isinstance(edit.index, int) else edit.index[0]
        place = message_places(inputs[self.page.chat].messages)[index]
        yield from self.answer(inputs, request, lambda chat, streamer: chat.edit_message(place, edit.value, streamer))

    def replace_image(self, inputs: dict, request: gr.Request):
        number, path = inputs[self.page.chosen], inputs[self.page.replace]
        yield from self.answer(inputs, request, lambda chat, streamer: chat.replace_image(number, path, streamer))

    def remove_image(self, inputs: dict, request: gr.Request):
        number = inputs[self.page.chosen]
        yield from self.answer(inputs, request, lambda chat, streamer: chat.remove_image(number, streamer))

    def change(self, chat: Chat | None, request: gr.Request, change: Callable[[Chat], None]) -> dict:
        """Changes a conversation without an answer, after the one that is being generated."""
        chat = self.open(chat, request)
        if chat.running is not None:
            chat.halt()
            wait([chat.running])
        try:
            change(chat)
        except (OSError, ValueError) as error:
            tell(error)
        return {self.page.chat: chat, **self.page.show(chat.messages)}

    def undo(self, chat: Chat | None, request: gr.Request):
        return self.change(chat, request, Chat.undo)

    def reset(self, chat: Chat | None, request: gr.Request):
        return self.change(chat, request, Chat.reset)

    def load(self, chat: Chat | None, path: str, request: gr.Request):
        return self.change(chat, request, lambda chat: chat.load(path))

    def save(self, chat: Chat | None):
        if chat is None or not chat.messages:
            return gr.File(visible=False)
        path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "conversation.jsonl"
        chat.save(path)
        return gr.File(str(path), visible=True)

    def choose_image(self, chat: Chat, image: gr.SelectData):
        return self.page.choose([number for number, _, _ in iterate_images(chat.messages)][image.index])

    def stop(self, chat: Chat):
        chat.halt()

    def free(self, request: gr.Request) -> None:
        """Frees the keys and values of a tab that is closed or asleep; a phone may come back to its messages."""
        if (chat := self.chats.get(request.session_hash)) is not None:
            chat.halt()
            self.worker.submit(self.drop_cache, chat)

    def drop_cache(self, chat: Chat) -> None:
        """Frees keys and values; what comes next computes them again."""
        self.cached = [each for each in self.cached if each is not chat]
        chat.cache.reset()


def tell(error: BaseException | None) -> None:
    """Says on the page what its user can do about an error; any other is raised."""
    if isinstance(error, (OSError, ValueError)):
        gr.Warning(str(error))
    elif error is not None:
        raise error


def make_demo(model: Any, processor: Any, arguments: Namespace) -> Demo:
    """The page of a model."""
    memory = make_image_memory(model, arguments, ImageMemory)
    examples = read_examples(arguments.examples, arguments.checkpoint, processor)
    name = Path(arguments.checkpoint).name

    def new_chat() -> Chat:
        return Chat(model, processor, memory, max_images=arguments.max_images, overflow="drop_first_rounds")

    with gr.Blocks(title=f"VisualChat: {name}", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        page = make_page(name, examples, arguments.max_new_tokens, arguments.temperature)
        demo = Demo(page, examples, new_chat, arguments.max_caches)
        blocks.unload(demo.free)
    demo.blocks = blocks.queue(max_size=64)
    return demo


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument("--examples", help="conversations of a training file; their first questions are the examples")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="maximum number of tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely tokens")
    parser.add_argument("--max_images", type=int, help="maximum images; beyond, the first rounds are dropped")
    parser.add_argument("--max_caches", type=count, default=8, help="maximum conversations that keep keys and values")
    add_image_memory_arguments(parser)
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    demo = make_demo(*load_model(arguments), arguments)
    demo.blocks.launch(server_name=arguments.host, server_port=arguments.port, **LOOK)


if __name__ == "__main__":
    main()
