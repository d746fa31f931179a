"""
Talks to a saved VisualChat checkpoint in the terminal: several rounds, images by path, answers streamed.

    python examples/chat.py CHECKPOINT [--image PATH …]

CHECKPOINT is a folder or a name on the Hub. At the prompt:

    /image PATH …    show one or more images with the next question
    /new             start a new conversation
    /quit            leave
"""

import contextlib
import os
import shlex
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from transformers import DynamicCache, TextStreamer, logging

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor, load_image


with contextlib.suppress(ImportError):  # not everywhere; it gives input() line editing and a history
    import readline  # noqa: F401


class AnswerStreamer(TextStreamer):
    """Prints an answer as it comes, without the space that it begins with."""

    is_first = True

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.lstrip() if self.is_first else text
        self.is_first = self.is_first and not text
        super().on_finalized_text(text, stream_end)


class Chat:
    """
    One conversation with a model: the messages so far, and the keys and values of all of it but the last answer's end.

    Args:
        model (`VisualChatForConditionalGeneration`): The model.
        processor (`VisualChatProcessor`): Its processor.
        max_new_tokens (`int`): The longest answer, in tokens.
    """

    def __init__(self, model, processor, max_new_tokens: int = 256):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.start_anew()

    def start_anew(self) -> None:
        self.messages = []
        self.forget_cache()

    def forget_cache(self) -> None:
        """What is computed anew with the next question."""
        self.cache = DynamicCache(config=self.model.config.text_config)
        self.cached_ids = torch.zeros(1, 0, dtype=torch.long)

    def ask(self, question: str, images: list[str], streamer=None) -> str:
        """Adds a round to the conversation and returns the answer; nothing is kept of a round that fails."""
        content = [{"type": "image", "path": path} for path in images]
        content += [{"type": "text", "text": question}] if question else []
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        ids = inputs["input_ids"].cpu()
        num_shared = self.cache.get_seq_length()
        if not torch.equal(ids[:, :num_shared], self.cached_ids[:, :num_shared]):
            # The answer was tokenized in another way than it was generated.
            self.forget_cache()
        generated = self.model.generate(
            **inputs, past_key_values=self.cache, max_new_tokens=self.max_new_tokens, streamer=streamer
        )
        answer = self.processor.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
        self.cached_ids = generated.cpu()
        self.messages = [*messages, {"role": "assistant", "content": answer or "(nothing)"}]
        return answer


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or name of a checkpoint")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], help="images to show with the first question"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="the longest answer, in tokens")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    try:
        model = VisualChatForConditionalGeneration.from_pretrained(arguments.checkpoint).eval()
        processor = VisualChatProcessor.from_pretrained(arguments.checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"chat.py: error: {arguments.checkpoint} cannot be loaded: {error}") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    chat = Chat(model, processor, arguments.max_new_tokens)
    images = show(arguments.image)
    print("Ask a question. /image PATH shows an image with it, /new starts again, /quit leaves.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            chat.start_anew()
            images = []
        elif line.split(maxsplit=1)[:1] == ["/image"]:
            try:
                images += show(shlex.split(line)[1:])
            except ValueError as error:
                print(f"error: {error}; put a path with quotes or spaces in double quotes")
        elif line.startswith("/"):
            print(f"Unknown command {line.split()[0]}; there are /image, /new and /quit.")
        elif line:
            try:
                chat.ask(line, images, AnswerStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True))
                images = []
            except (OSError, ValueError) as error:
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\n(stopped; the round is not kept)")
                chat.forget_cache()


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
