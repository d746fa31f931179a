"""What the page of `web_demo.py` looks like: its components, and how a conversation is shown in them."""

import copy
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from modeling_visualchat.conversation_edits_visualchat import iterate_images
from processing_visualchat import load_conversations, load_image
from processing_visualchat.image_loading_visualchat import decode_base64


CSS = """
.gradio-container {width: 100% !important; max-width: 1280px !important; margin: 0 auto !important}
#title h1 {margin: 0; font-size: 1.3rem}
#title p {margin: 0; opacity: .7; font-size: .85rem}
#chatbot {height: calc(100dvh - 190px) !important; min-height: 340px}
#chatbot .placeholder {text-align: center}
#chatbot .example {border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg)}
#chatbot .message:has(.html) {border: 0 !important; background: none !important; box-shadow: none; padding: 0}
#chatbot .message-row:has(.component) + .message-buttons:not(:has([aria-label=Retry])),
#chatbot .message-row:has(.component) + .message-buttons [aria-label=Edit] {display: none}
#chatbot .grid-wrap {height: auto !important; min-height: 0; max-height: none; padding: 2px 0}
#chatbot .grid-container {display: flex; flex-wrap: wrap; gap: 6px}
#chatbot .gallery-item {width: auto}
#chatbot .thumbnail-item {width: 104px; height: 104px}
#chatbot .thumbnail-item img {margin: 0; height: 100%}
#images .grid-wrap {min-height: 110px; max-height: 36dvh}
.caption-label {font-weight: 600; font-size: .7rem !important; max-width: none !important; padding: 1px 6px !important}
.usage {opacity: .75; font-size: .75rem !important; line-height: 1.35}
@media (max-width: 640px) {
    .gradio-container .main.fillable.app {padding: 8px !important}
    #title p {display: none}
    #chatbot {height: calc(100dvh - 150px) !important}
    #chatbot .thumbnail-item {width: 84px; height: 84px}
}
"""
# Fonts are those of the system: nothing on the page comes from another server.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
LOOK: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "footer_links": [],
    "ssr_mode": False,
    "max_file_size": "50mb",
}
PLACEHOLDER = "### Show images, and ask about them\nUpload, paste or drop as many as you like, now or later."
SMALL: dict[str, Any] = {"size": "sm", "min_width": 100}  # buttons
HINT = "Choose an image to replace or remove it. Its number stays its own."


@dataclass(frozen=True)
class Page:
    """The components that events read and change."""

    chatbot: gr.Chatbot
    box: gr.MultimodalTextbox
    images: gr.Gallery
    replace: gr.UploadButton
    remove: gr.Button
    undo: gr.Button
    reset: gr.Button
    max_new_tokens: gr.Slider
    temperature: gr.Slider
    save: gr.Button
    saved: gr.File
    load: gr.UploadButton
    chat: gr.State  # the conversation
    chosen: gr.State  # the number of an image

    def show(self, messages: list[dict]) -> dict:
        """Shows a conversation."""
        images = gr.Gallery(show_images(messages), selected_index=None)
        return {self.chatbot: show_messages(messages), self.images: images, **self.choose(None)}

    def choose(self, number: int | None) -> dict:
        """Shows which image is chosen."""
        name, is_chosen = f" image {number}" if number else "", number is not None
        return {
            self.chosen: number,
            self.replace: gr.UploadButton(f"Replace{name}", interactive=is_chosen),
            self.remove: gr.Button(f"Remove{name}", interactive=is_chosen),
        }

    def generation_options(self, inputs: dict) -> dict[str, Any]:
        """The settings as arguments of `generate`."""
        degree = inputs[self.temperature]
        sampling = {"do_sample": True, "temperature": degree} if degree else {"do_sample": False}
        return {"max_new_tokens": int(inputs[self.max_new_tokens]), **sampling}


def make_page(name: str, examples: list[dict], max_new_tokens: int, temperature: float) -> Page:
    """Lays the page out in the current Blocks."""
    gr.Markdown(f"# VisualChat\n{name}", elem_id="title")
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            chatbot = gr.Chatbot(
                elem_id="chatbot",
                show_label=False,
                editable="all",
                buttons=["copy"],
                placeholder=PLACEHOLDER,
                examples=copy.deepcopy(examples) or None,  # which it changes
                allow_tags=False,
                group_consecutive_messages=False,  # in a group with images, words cannot be edited
            )
            box = gr.MultimodalTextbox(
                elem_id="box",
                show_label=False,
                placeholder="Ask, paste or drop images",
                file_count="multiple",
                file_types=["image"],
                max_plain_text_length=100_000,
                autofocus=True,
            )
        with gr.Column(scale=1, min_width=260):
            images = gr.Gallery(
                elem_id="images",
                show_label=False,
                interactive=False,
                allow_preview=False,
                columns=2,
                object_fit="cover",
                buttons=[],
            )
            gr.Markdown(HINT, elem_classes="usage")
            with gr.Row():
                replace = gr.UploadButton(
                    "Replace", elem_id="replace", file_types=["image"], **SMALL, interactive=False
                )
                remove = gr.Button("Remove", elem_id="remove", **SMALL, interactive=False)
            with gr.Row():
                undo = gr.Button("Undo", elem_id="undo", **SMALL)
                reset = gr.Button("New chat", elem_id="reset", **SMALL)
            with gr.Accordion("Settings", open=False):
                tokens = gr.Slider(1, max(2048, max_new_tokens), max_new_tokens, step=1, label="Max new tokens")
                degree = gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: most likely tokens")
            with gr.Accordion("Save and open", open=False):
                save = gr.Button("Save", elem_id="save", **SMALL)
                saved = gr.File(elem_id="saved", label="The conversation, with its images", visible=False)
                load = gr.UploadButton("Open", elem_id="load", file_types=[".json", ".jsonl"], **SMALL)
    parts = chatbot, box, images, replace, remove, undo, reset, tokens, degree, save, saved, load
    return Page(*parts, gr.State(), gr.State())


def show_images(messages: list[dict]) -> list[tuple[str, str]]:
    """The images of a conversation and their numbers, for a gallery."""
    return [(content[place]["path"], f"Image {number}") for number, content, place in iterate_images(messages)]


def show_messages(messages: list[dict]) -> list[dict]:
    """A conversation for a chatbot: images, words, and what an answer took to compute, are messages there."""
    return [shown for _, shown in _shown(messages)]


def message_places(messages: list[dict]) -> list[int]:
    """For each message of a chatbot, the place of its message in the conversation."""
    return [place for place, _ in _shown(messages)]


def _shown(messages: list[dict]) -> list[tuple[int, dict[str, Any]]]:
    shown: list[tuple[int, dict[str, Any]]] = []
    for place, message in enumerate(messages):
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts: list[Any] = []
        if pictures := show_images([message]):
            parts.append(gr.Gallery(pictures, show_label=False, container=False, buttons=[], render=False))
        parts.append("\n".join(block["text"] for block in blocks if block["type"] == "text"))
        if usage := message.get("usage"):
            parts.append(gr.HTML(f"<div class='usage'>{html.escape(usage)}</div>", render=False))
        shown += [(place, {"role": message["role"], "content": part}) for part in parts if part]
    return shown


def unpack(messages: list[dict]) -> None:
    """Writes the images of a saved conversation to files; a `ValueError` for paths and URLs, which are not opened."""
    for message in messages:
        message.pop("usage", None)
    for number, content, place in iterate_images(messages):
        if (data := decode_base64(content[place].get("base64"))) is None:
            raise ValueError(f"Image {number} is not in the file; open one that this page has saved.")
        path = save_pil_to_cache(load_image(data), get_upload_folder(), format="png")
        content[place] = {"type": "image", "path": path, "number": number}


def read_examples(path: str | None, checkpoint: str, processor: Any) -> list[dict]:
    """The first questions of conversations; by default, of those that a checkpoint brings along."""
    found = [Path(path)] if path else [*Path(checkpoint).glob("examples.jsonl")]
    try:
        conversations = [each["messages"] for file in found for each in load_conversations(file, processor)]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --examples: {error}") from error
    questions = [next(each["content"] for each in messages if each["role"] == "user") for messages in conversations]
    return [
        {
            "text": " ".join(block["text"] for block in content if block["type"] == "text"),
            "files": [block["path"] for block in content if block["type"] == "image"],
        }
        for content in questions
    ]
