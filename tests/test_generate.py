"""Batch generation: the answers of a chat, in the order of the input, and a reason where there is none."""

import base64
import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import IMAGE_SEQ_LENGTH, draw_picture, make_model, make_processor
from test_custom_sources import assistant, image, share, text, user
from test_finetune import EXAMPLES

from processing_visualchat.data.conversation import Conversation, Dropped
from processing_visualchat.data.schemas import convert_record


END_TOKENS = [1, 116, 131]  # two of them are common in the answers of the random model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A checkpoint whose answers end early or late, and conversations of which some cannot be answered."""
    folder = tmp_path_factory.mktemp("data")
    model = make_model()
    model.generation_config.eos_token_id = END_TOKENS
    for each in (model, make_processor()):
        each.save_pretrained(folder / "checkpoint")
    for index in range(3):
        draw_picture(index).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *arguments: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    encoded = base64.b64encode((folder / "1.png").read_bytes()).decode()
    url = f"http://127.0.0.1:{server.server_port}/2.png"
    two = user(image("1.png"), image("2.png"), text("And these two, which are others?"))
    records = [
        {"id": 7, "messages": [user(image("0.png"), text("What is it?"))]},
        {"key": "with an answer", **share(("human", "<image>And this?"), ("gpt", "A dog."), image="1.png")},
        '{"messages": [',
        {"messages": [user(image("broken.png"), text("Is it broken?"))]},
        {"messages": [user("x" * 1100)]},
        {"messages": [user(image("0.png"), text("One?")), assistant("It is one."), two]},
        {"messages": [user({"type": "image", "base64": encoded}, text("Which is it?"))]},
        {"messages": [user(image("nowhere.png"), text("Where is it?"))]},
        {"prompt": "Hi"},
        {"messages": [user({"type": "image", "url": url}, text("Of the web?"))]},
        {"messages": [assistant("?")]},
    ]
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / "conversations.jsonl").write_text("\n".join([*lines, ""]))
    yield folder
    server.shutdown()


@pytest.fixture
def generate(data, monkeypatch, capsys):
    """Runs the script; the exit code or error, its last line, and the lines of the output."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import generate

    def run(output, *flags, checkpoint=data / "checkpoint"):
        command = [checkpoint, "--input", data / "conversations.jsonl", "--output", output, *flags]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, command), "--max_new_tokens", "6"])
        try:
            code = generate.main() or 0
        except SystemExit as ended:
            code = ended.code
        lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return code, capsys.readouterr().out.strip(), lines

    return run


def test_each_conversation_is_answered_as_in_a_chat_or_has_its_error(data, generate, tmp_path):
    output = tmp_path / "answers.jsonl"
    code, last, lines = generate(output, "--batch_size", "4")
    assert code == 3 and last == f"6 conversations answered, 5 failed: {output}"
    assert [line["id"] for line in lines] == [f"line {number}" for number in range(1, 12)]
    assert [line["key"] for line in lines] == [7, "with an answer", *[None] * 9]
    errors = {line["id"]: line["error"] for line in lines if "error" in line}
    assert errors.pop("line 3").startswith("The record is not JSON: ")
    assert "broken.png is truncated or broken" in errors.pop("line 4")
    assert errors.pop("line 5").endswith(" tokens; the model reads 1,024.")
    assert "names the image nowhere.png; there is no file at " in errors.pop("line 8")
    assert errors == {"line 11": "The record has no question."}

    model, processor = make_model(), make_processor()
    model.generation_config.eos_token_id = END_TOKENS
    records = (data / "conversations.jsonl").read_text().splitlines()
    for line, record in zip(lines, records, strict=True):
        if "error" in line:
            continue
        conversation = convert_record(json.loads(record), ends_with_question=True).under(data)
        session = model.start_chat(processor, max_new_tokens=6)
        assert session.answer(conversation.messages()) == line["answer"]
        usage = session.usage
        assert (usage.finish_reason, usage.answer_tokens) == (line["finish_reason"], line["completion_tokens"])
        assert line["images"] == len(conversation.images)
        assert line["prompt_tokens"] == usage.text_tokens + line["images"] * IMAGE_SEQ_LENGTH
    assert {line.get("finish_reason") for line in lines} == {"stop", "length", None}

    # What failed is tried again, and nothing else.
    broken = (data / "broken.png").read_bytes()
    draw_picture(3).save(data / "broken.png")
    code, last, again = generate(output, "--batch_size", "2")
    (data / "broken.png").write_bytes(broken)
    assert code == 3 and last.startswith("7 conversations answered, 4 failed: ") and again[3].pop("answer")
    assert [*again[:3], *again[4:]] == [*lines[:3], *lines[4:]]


def test_a_run_with_other_settings_is_refused_with_what_differs(generate, tmp_path):
    output = tmp_path / "answers.jsonl"
    code, last, lines = generate(output, "--limit", "2")
    assert code == 0 and last == f"2 conversations answered, 0 failed: {output}" and len(lines) == 2
    code, _, kept = generate(output, "--limit", "1", "--temperature", "0.5")
    assert code.startswith(
        f"error: {output}.parts holds the answers of another run: temperature was 0.0, is 0.5; limit"
    )
    make_model(seed=1).save_pretrained(tmp_path / "other")
    make_processor().save_pretrained(tmp_path / "other")
    code, _, _ = generate(output, "--limit", "2", checkpoint=tmp_path / "other")
    assert "another run: weights was '" in code and kept == lines
    output.with_name(f"{output.name}.parts").rename(tmp_path / "elsewhere")
    code, _, kept = generate(output, "--limit", "2")
    assert code.startswith(f"error: {output} exists, and {output}.parts, from which") and kept == lines


ASKED = {"messages": [user("Hi")]}
RECORDS = {
    "a question": (ASKED, ["Hi"]),
    "a dropped answer": ({"messages": [user("Hi"), assistant("x")]}, ["Hi"]),
    "an empty answer": ({"messages": [user("Hi"), assistant("")]}, ["Hi"]),
    "a null for an answer": (share(("human", "Hi"), ("gpt", None)), ["Hi"]),
    "a system message and a round": (
        {"system": "Be brief.", "messages": [user("Hi"), assistant("x"), user("So?")]},
        ["Be brief.", "Hi", "x", "So?"],
    ),
    "a prompt": ({"prompt": [user("Hi")]}, ["Hi"]),
    "an answer that is not wanted": ({"prompt": "Hi", "completion": "x", "label": False}, ["Hi"]),
    "a query with a history": ({"query": "So?", "history": [["Hi", "x"]]}, ["Hi", "x", "So?"]),
    "an instruction": ({"instruction": "Add", "input": "1, 2", "output": ""}, ["Add\n1, 2"]),
    "a pair without an answer": ({"texts": [{"user": "Hi", "assistant": "x"}, {"user": "So?"}]}, ["Hi", "x", "So?"]),
    "an answer only": ({"messages": [assistant("x")]}, "no question"),
    "a misspelt role": (
        {"messages": [user("Hi"), {"role": "asistant", "content": "x"}]},
        "a turn without a known role or",
    ),
}


@pytest.mark.parametrize(("record", "expected"), RECORDS.values(), ids=RECORDS)
def test_a_conversation_to_be_answered_ends_with_its_last_question(record, expected):
    outcome = convert_record(record, ends_with_question=True)
    if isinstance(outcome, Dropped):
        assert outcome.reason.startswith(expected)
    else:
        assert isinstance(outcome, Conversation) and outcome.turns[-1].role == "user"
        assert [block for turn in outcome.turns for block in turn.content] == expected and outcome.repairs == ()
