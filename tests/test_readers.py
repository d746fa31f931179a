"""The reader of conversation files: the same faulty files with faults dropped and raised."""

import json

import pytest
from conftest import make_processor
from datasets import Dataset
from test_custom_sources import asked, assistant, image, picture, text, user

from processing_visualchat import load_conversations
from processing_visualchat.data.conversation import Conversation, Dropped
from processing_visualchat.data.readers import read_conversations


FAULTS = {
    "other keys": ({"text": "Hi"}, "no messages and no conversations", "has no messages; it has the keys text"),
    "no question": ({"messages": [assistant("A.")]}, "no question with an answer", "has no user turn"),
    "no answer": ({"messages": [user("Hi")]}, "no question with an answer", "does not end with an answer"),
    "literal tag": (
        {"messages": [user("a <image>"), assistant("A.")]},
        "a round without text, or with a literal <image>",
        "holds a literal <image>",
    ),
    "missing image": (
        {"messages": [user(image("gone.png"), text("?")), assistant("A.")]},
        "an image is not there",
        "names the image gone.png; there is no file at",
    ),
    "tags": (
        asked("a.png", "a.png") | {"images": ["a.png"] * 3},
        "images and <image> tags of different number",
        "cannot be used: images and <image> tags of different number",
    ),
}


def write(path, records):
    if path.suffix == ".parquet":
        Dataset.from_dict({"messages": [json.dumps(record.get("messages", record)) for record in records]}).to_parquet(
            path
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("record", "reason", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_dropped_or_raised(tmp_path, suffix, record, reason, message):
    (tmp_path / "a.png").write_bytes(picture(0))
    path = tmp_path / f"data{suffix}"
    write(path, [asked("a.png"), record, asked("a.png")])
    outcomes = [read.outcome for read in read_conversations(path)]
    assert [type(outcome) for outcome in outcomes] == [Conversation, Dropped, Conversation]
    assert outcomes[1].reason == reason and str(outcomes[0].images[0]) == str(tmp_path / "a.png")
    where = "line 2" if suffix == ".jsonl" else "record 1"
    with pytest.raises((ValueError, FileNotFoundError), match=f"data{suffix}, {where}.* {message}"):
        list(read_conversations(path, is_strict=True))


def test_a_broken_line_is_dropped_or_raised(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(asked("a.png")) + "\n{broken\n")
    (tmp_path / "a.png").write_bytes(picture(0))
    assert [read.outcome for read in read_conversations(path)][1].reason == "a line that is not JSON"
    with pytest.raises(ValueError, match=r"line 2 is not JSON: .* at column 2\.$"):
        list(read_conversations(path, is_strict=True))
    for is_strict in (False, True):
        (tmp_path / "half.json").write_text('[{"messages": ')
        with pytest.raises(ValueError, match=r"half.json is not whole JSON"):
            list(read_conversations(tmp_path / "half.json", is_strict=is_strict))
        with pytest.raises(ValueError, match=r"is one of .jsonl, .json, .parquet"):
            list(read_conversations(tmp_path / "a.png", is_strict=is_strict))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_format_is_read_strictly(tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(picture(0))
    path = tmp_path / f"data{suffix}"
    write(path, [{"messages": [user(image("a.png"), text("?")), assistant("A.")]}] * 2)
    rows = load_conversations(path, make_processor())
    assert rows["messages"][:] == [[user(image(str(tmp_path / "a.png")), text("?")), assistant("A.")]] * 2


def test_a_file_that_the_user_names_may_have_images_anywhere(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "data.jsonl"
    write(path, [asked("../a.png"), asked(str(tmp_path / "a.png"))])
    assert [read.outcome.reason for read in read_conversations(path)] == ["image path outside of its folder"] * 2
    assert len(load_conversations(path, make_processor())) == 2


def test_messages_of_every_shape_survive_a_data_set(tmp_path):
    """Text, blocks, system messages and inline images in one column, with any character that JSON has."""
    words = 'é漢 \u2028 \x00 "quotes" \\u1234 / \U0001f600'
    records = [
        {"messages": [{"role": "system", "content": words}, user(words), assistant("1" * 40)]},
        {"messages": [user(image("a.png"), text(words)), assistant("12")]},
    ]
    (tmp_path / "a.png").write_bytes(picture(0))
    write(tmp_path / "data.jsonl", records)
    expected = [read.outcome.messages() for read in read_conversations(tmp_path / "data.jsonl", is_strict=True)]
    assert load_conversations(tmp_path / "data.jsonl", make_processor())["messages"][:] == expected
    assert expected[0] == records[0]["messages"]
