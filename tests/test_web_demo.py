"""
The page on which a model is talked to: its events as functions, over HTTP for two people, and in a headless Chromium
where there is one.
"""

import gc
import json
import shutil
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import web_demo
from conftest import draw_picture, make_model, make_processor
from gradio_client import Client, handle_file
from web_layout import LOOK, show_images

from modeling_visualchat import ChatSession


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
NEW_TOKENS = 96
LETTERS = "abcdef "


@pytest.fixture(scope="module")
def model_and_processor():
    """A model whose answers are letters and spaces, and do not end by themselves."""
    model, processor = make_model(), make_processor()
    model.freeze()
    letters = set(processor.tokenizer(LETTERS).input_ids)
    model.generation_config.suppress_tokens = [token for token in range(259) if token not in letters]
    model.generation_config.no_repeat_ngram_size = 4
    return model, processor


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(8):
        draw_picture(index).resize((240, 160)).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(8)]


@pytest.fixture(scope="module")
def demo(model_and_processor, pictures):
    folder = Path(pictures[3]).parent
    content = [{"type": "image", "path": "3.png"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A circle."}]
    (folder / "examples.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    arguments = {"checkpoint": str(folder), "examples": None, "max_images": None, "max_caches": 8}
    arguments |= {"image_memory": None, "image_memory_bits": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        yield web_demo.make_demo(
            *model_and_processor, Namespace(**arguments, max_new_tokens=NEW_TOKENS, temperature=0.0)
        )


@pytest.fixture(scope="module")
def url(demo):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.utils.get_heartbeat_rate", lambda: 0.25)  # after which a tab is known to be closed
        _, url, _ = demo.blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **LOOK)
        yield url
        demo.blocks.close(verbose=False)


@pytest.fixture
def direct(model_and_processor):
    """A conversation without a page."""
    return ChatSession(*model_and_processor, max_new_tokens=NEW_TOKENS, do_sample=False)


def without_usage(messages):
    return [{key: value for key, value in message.items() if key != "usage"} for message in messages]


class Tab:
    """A tab of a browser, as its events call the page."""

    def __init__(self, demo, name, new_tokens=8):
        self.demo, self.request, self.values = demo, SimpleNamespace(session_hash=name), {}
        page = demo.page
        self.inputs = {page.chat: None, page.chosen: None, page.max_new_tokens: new_tokens, page.temperature: 0.0}

    @property
    def chat(self):
        return self.inputs[self.demo.page.chat]

    def update(self, updates):
        self.values |= updates
        self.inputs |= {key: value for key, value in updates.items() if key in self.inputs}

    def steps(self, name, *data, box=None, image=None):
        page = self.demo.page
        for updates in getattr(self.demo, name)(
            {**self.inputs, page.box: box, page.replace: image}, self.request, *data
        ):
            self.update(updates)
            yield updates

    def answer(self, name, *data, **inputs):
        return [*self.steps(name, *data, **inputs)]

    def change(self, name, *inputs):
        self.update(getattr(self.demo, name)(self.chat, *inputs, self.request))


def event(kind, index, value=None):
    return kind(None, {"index": index, "value": value, "previous_value": None})


def test_the_page_has_the_flags_of_an_image_memory(monkeypatch):
    models = make_model(attention_type="causal"), make_processor()
    monkeypatch.setattr(web_demo, "load_model", lambda arguments: models)
    monkeypatch.setattr("sys.argv", ["web_demo.py", "checkpoint", "--image_memory_bits", "4"])
    with pytest.raises(SystemExit, match="error: --image_memory_bits 4: this model cannot use an image memory"):
        web_demo.main()


def test_every_event_of_the_page_changes_its_conversation(demo, pictures, direct, tmp_path, recwarn):
    direct.generate_kwargs["max_new_tokens"] = 8
    tab, page = Tab(demo, "a"), demo.page
    tab.answer("ask_example", event(gr.SelectData, 0))
    direct.ask("What is it?", pictures[3:4])
    tab.answer("ask", box={"text": "And these?", "files": pictures[:2]})
    direct.ask("And these?", pictures[:2])
    assert without_usage(tab.chat.messages) == direct.messages
    assert "known: " in tab.chat.messages[1]["usage"] and "at the maximum length" in tab.chat.messages[3]["usage"]
    # A chatbot has a message for images, for words, and for what was computed.
    assert [type(shown["content"]) for shown in tab.values[page.chatbot]] == [gr.Gallery, str, str, gr.HTML] * 2
    assert [name for _, name in show_images(tab.chat.messages)] == ["Image 1", "Image 2", "Image 3"]

    tab.update(demo.choose_image(tab.chat, event(gr.SelectData, 1)))
    assert tab.values[page.replace].label == "Replace image 2"
    tab.answer("replace_image", image=pictures[2])
    direct.replace_image(2, pictures[2])
    tab.update(demo.choose_image(tab.chat, event(gr.SelectData, 2)))
    tab.answer("remove_image")
    direct.remove_image(3)
    tab.answer("edit", event(gr.EditData, [5, 0], "Which color?"))
    direct.edit_question(2, "Which color?")
    tab.answer("edit", event(gr.EditData, 2, "A square."))
    direct.edit(edit_answer=1, answer="A square.")
    assert without_usage(tab.chat.messages) == direct.messages and "usage" not in tab.chat.messages[1]
    tab.answer("retry")
    tab.change("undo")
    tab.change("undo")
    assert tab.chat.messages[1]["content"] != "A square."

    before = without_usage(tab.chat.messages)
    saved = demo.save(tab.chat).value["path"]
    tab.change("reset")
    assert tab.chat.messages == [] and demo.save(tab.chat).visible is False
    tab.change("load", saved)
    texts = [message["content"][-1]["text"] for message in tab.chat.messages if message["role"] == "user"]
    assert texts == ["What is it?", "Which color?"]
    assert [name for _, name in show_images(tab.chat.messages)] == ["Image 1", "Image 2"]
    assert [message["role"] for message in tab.chat.messages] == [message["role"] for message in before]
    tab.answer("retry")
    assert tab.chat.messages[-1]["content"] == before[-1]["content"]


def test_what_fails_is_said_and_nothing_is_lost(demo, pictures, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    tab = Tab(demo, "b")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG of nothing")
    message = {"text": "What is it?", "files": [str(tmp_path / "broken.png")]}
    tab.answer("ask", box=message)
    assert "broken.png" in said.pop() and tab.chat.messages == []
    box = tab.values[demo.page.box]
    assert box.value["text"] == "What is it?" and len(box.value["files"]) == 1 and box.submit_btn
    tab.answer("ask", box={"text": " ", "files": []})
    tab.answer("retry")
    tab.change("undo")
    assert len(said) == 3 and "nothing to take back" in said[-1]
    tab.answer("ask", box={"text": "", "files": pictures[:1]})
    before = [*tab.chat.messages]
    tab.update(demo.choose_image(tab.chat, event(gr.SelectData, 0)))
    tab.answer("remove_image")
    assert "whole content" in said[-1] and tab.chat.messages == before
    # A file of a stranger opens no files and no URLs of the server.
    for block in ({"path": pictures[0]}, {"base64": pictures[0]}, {"url": "http://127.0.0.1/x.png"}):
        content = [{"type": "image", **block}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A circle."}]
        (tmp_path / "chat.json").write_text(json.dumps({"messages": messages}))
        tab.change("load", str(tmp_path / "chat.json"))
        assert "is not in the file" in said[-1] and tab.chat.messages == before


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(demo):
    tab = Tab(demo, "c", new_tokens=900)
    texts = []
    for updates in tab.steps("ask", box={"text": "Tell me a story.", "files": []}):
        if demo.page.chatbot in updates:
            texts.append(updates[demo.page.chatbot][1]["content"])
            if len({*texts}) > 3:
                demo.stop(tab.chat)
    answer = tab.chat.messages[1]["content"]
    assert len({*texts}) > 3 and all(answer.startswith(text.strip()) for text in texts if text != "…")
    assert "stopped" in tab.chat.messages[1]["usage"] and tab.chat.usage.answer_tokens < 900
    # A tab that is closed while it is answered: what Gradio does is close the generator, and tell.
    steps = tab.steps("ask", box={"text": "And another one.", "files": []})
    next(steps), next(steps)
    steps.close()
    demo.free(tab.request)
    demo.worker.submit(lambda: None).result(60)
    assert tab.chat.usage.finish_reason == "stopped" and tab.chat.cache.get_seq_length() == 0
    del tab, steps, updates
    gc.collect()
    assert "c" not in demo.chats


def test_only_the_last_conversations_keep_their_cache(demo, pictures, direct, monkeypatch):
    monkeypatch.setattr(demo, "max_caches", 2)
    direct.generate_kwargs["max_new_tokens"] = 8
    tabs = [Tab(demo, name) for name in "def"]
    for tab in (tabs[0], tabs[1], tabs[0], tabs[2]):
        tab.answer("ask", box={"text": "What is it?", "files": pictures[:1]})
    assert [tab.chat.cache.get_seq_length() > 0 for tab in tabs] == [True, False, True]
    tabs[1].answer("ask", box={"text": "And this?", "files": pictures[1:2]})
    direct.ask("What is it?", pictures[:1])
    direct.ask("And this?", pictures[1:2])
    assert without_usage(tabs[1].chat.messages) == direct.messages
    assert tabs[1].chat.usage.cached_text_tokens == 0 and tabs[1].chat.usage.known_images > 0
    assert [tab.chat.cache.get_seq_length() > 0 for tab in tabs] == [False, True, True]
    for tab in tabs:
        demo.free(tab.request)
    demo.worker.submit(lambda: None).result(60)
    assert demo.cached == []


@pytest.mark.slow
def test_two_people_talk_at_once(demo, url, pictures, direct):
    before = demo.chats.copy()
    clients = [Client(url, verbose=False, httpx_kwargs={"timeout": 60}) for _ in range(2)]
    questions = [("What is it?", pictures[4:6]), ("And what is this?", pictures[5:6])]
    jobs = [
        client.submit({"text": text, "files": [*map(handle_file, files)]}, api_name="/ask")
        for client, (text, files) in zip(clients, questions)
    ]
    for job in jobs:
        job.result(timeout=120)
    assert all(len(job.outputs()) > 2 for job in jobs)
    chats = [demo.chats[client.session_hash] for client in clients]
    for chat, (text, files) in zip(chats, questions):
        direct.reset()
        answer = direct.ask(text, files)
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]
        assert chat.messages[0]["content"][-1]["text"] == text and chat.messages[1]["content"] == answer
    assert sum(chat.usage.new_images for chat in chats) == 2  # of three that were shown
    assert {*demo.chats} - {*before} == {client.session_hash for client in clients}
    for client in clients:
        client.close()
    deadline = time.monotonic() + 60
    while any(chat.cache.get_seq_length() for chat in chats) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(chat.cache.get_seq_length() for chat in chats)


# What a person does with a picture besides choosing it: an event with the file on the box.
GIVE = """async ([kind, url]) => {
    const data = new DataTransfer(), blob = await (await fetch(url)).blob();
    data.items.add(new File([blob], `${kind}.png`, {type: "image/png"}));
    const box = document.querySelector("#box textarea"), options = {bubbles: true, cancelable: true};
    box.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, {...options, clipboardData: data})
                                       : new DragEvent(kind, {...options, dataTransfer: data}));
}"""
# Notes every text of the newest answer.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const texts = document.querySelectorAll("#chatbot .bot .md");
        if (texts.length) window.seen.push(texts[texts.length - 1].innerText);
    }).observe(document.querySelector("#chatbot"), {subtree: true, childList: true, characterData: true});
}"""


def ask(page, text):
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def read(page, answer, number):
    """Waits until the last of the answers is that of a conversation without a page, and returns what it took."""
    page.wait_for_function(
        """([answer, number]) => {
            const answers = document.querySelectorAll("#chatbot .bot .md");
            const usages = document.querySelectorAll("#chatbot .usage");
            return answers.length === number && usages.length === number
                && answers[number - 1].innerText.trim() === answer;
        }""",
        arg=[" ".join(answer.split()), number],
        timeout=60_000,
    )
    return page.locator("#chatbot .usage").last.inner_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as in Debian's package chromium")
def test_a_person_talks_in_a_browser(demo, url, pictures, direct, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        console = []
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.on("request", lambda request: url in request.url or console.append(f"request to {request.url}"))
        page.goto(url)
        page.set_input_files("#box input[type=file]", pictures[:2])
        page.wait_for_function("document.querySelectorAll('#box img').length === 2")
        page.evaluate(WATCH)
        ask(page, "What are these?")
        usage = read(page, direct.ask("What are these?", pictures[:2]), 1)
        assert "known: 0 text tokens" in usage and "at the maximum length" in usage
        seen = [text for text in page.evaluate("[...new Set(window.seen)]") if text.strip() not in ("", "…")]
        assert len(seen) > 2 and all(seen[-1].startswith(text.strip()) for text in seen)

        for number, kind in enumerate(("paste", "drop"), 1):
            page.evaluate(GIVE, [kind, page.locator("#images img").nth(number - 1).get_attribute("src")])
            page.wait_for_function(f"document.querySelectorAll('#box img').length === {number}")
        ask(page, "And these?")
        assert " 0 images; known: 211 text tokens, 4 images" in read(page, direct.ask("And these?", pictures[:2]), 2)
        page.locator("#images button").nth(1).click()
        page.get_by_text("Replace image 2").wait_for()
        page.set_input_files("[data-testid^='Replace']", pictures[6])
        assert ", 1 image; known" in read(page, direct.replace_image(2, pictures[6]), 2)
        page.locator("#chatbot .user-row + .message-buttons [aria-label=Edit]:visible").first.click()
        page.fill("#chatbot textarea", "Which colors?")
        page.click("#chatbot [aria-label=Submit]")
        read(page, direct.edit_question(1, "Which colors?"), 2)
        page.screenshot(path=tmp_path / "page.png")
        page.set_viewport_size({"width": 390, "height": 800})
        page.screenshot(path=tmp_path / "phone.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click("#undo")
        direct.undo()
        read(page, direct.messages[-1]["content"], 2)
        assert "What are these?" in page.locator("#chatbot").inner_text()

        other = browser.new_page()
        other.goto(url)
        other.locator("#chatbot .example").wait_for()
        assert other.locator("#chatbot .message-row").count() == 0
        browser.close()
    # Chromium's own note on a field of Gradio's that would take the focus.
    assert [text for text in console if not text.startswith("Autofocus processing was blocked")] == []
