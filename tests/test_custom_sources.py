"""Conversations of one's own: every shape, every kind of file, and the Hub; every record accounted for."""

import base64
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import draw_picture, make_processor
from datasets import Dataset, Image
from hub_stand_in import HubStandIn
from test_finetune import EXAMPLES, environment

from processing_visualchat import (
    CustomSource,
    DataCollatorForVisualChat,
    load_conversations,
    load_custom_source,
    validate_conversation,
)
from processing_visualchat.data.conversation import Conversation, Dropped
from processing_visualchat.data.schemas import convert_record


def text(words):
    return {"type": "text", "text": words}


def image(path):
    return {"type": "image", "path": path}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(words):
    return {"role": "assistant", "content": words}


def share(*turns, **fields):
    return {"conversations": [{"from": who, "value": words} for who, words in turns], **fields}


def indexed(index):
    return {"type": "image", "index": index}


BRIEF = {"role": "system", "content": "Be brief."}
ONE = [user(image("a.png"), text("What is it?")), assistant("A dog.")]
A = "a.png"
ASKED = [("human", "<image>What is it?"), ("gpt", "A dog.")]
ENCODED = base64.b64encode(bytes(range(256))).decode()
SHAPES = {
    "ours": ({"messages": ONE}, ONE, ()),
    "a bare list": (ONE, ONE, ()),
    "LLaVA": (share(("human", "<image>\nWhat is it?"), ("gpt", "A dog."), id="1", image="a.png"), ONE, ()),
    "roles in messages, tags in text": (
        {"messages": [user("<image>What is it?"), assistant("A dog.")], "images": ["a.png"]},
        ONE,
        (),
    ),
    "empty image blocks": (
        {"messages": [user({"type": "image"}, text("What is it?")), assistant("A dog.")], "images": ["a.png"]},
        ONE,
        (),
    ),
    "OpenAI": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user(text("And"), {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
                {"role": "assistant", "content": [text("A cat.")]},
            ]
        },
        [
            {"role": "system", "content": "Be brief."},
            user(text("And"), {"type": "image", "url": "https://x.org/a.png"}),
            assistant("A cat."),
        ],
        (),
    ),
    "images in the middle of words": (
        share(("human", "Is <image> above <image>?"), ("gpt", "Yes."), image=["a.png", "b.png"]),
        [user(text("Is "), image("a.png"), text(" above "), image("b.png"), text("?")), assistant("Yes.")],
        (),
    ),
    "data URI and base64": (
        share(("human", "<image><image>Same?"), ("gpt", "No."), images=[f"data:image/png;base64,{ENCODED}", ENCODED]),
        [
            user(
                {"type": "image", "base64": f"data:image/png;base64,{ENCODED}"},
                {"type": "image", "base64": ENCODED},
                text("Same?"),
            ),
            assistant("No."),
        ],
        (),
    ),
    "text alone": (share(("system", "Hm."), ("user", "1 + 1?"), ("assistant", "2")), None, ()),
    "tag missing": (
        share(("human", "What is it?"), ("gpt", "A dog."), image="a.png"),
        ONE,
        ("images without an <image> tag put in front",),
    ),
    "tag repeated": (
        share(("human", "<image>What is it?"), ("gpt", "A dog."), ("human", "<image>Sure?"), ("gpt", "Yes."), image=A),
        [*ONE, user("Sure?"), assistant("Yes.")],
        ("a repeated <image> tag left out",),
    ),
    "no last answer": (
        share(("human", "<image>What is it?"), ("gpt", "A dog."), ("human", "And <image>?"), image=["a.png", "b.png"]),
        ONE,
        ("a question without an answer left out",),
    ),
    "an empty answer keeps its image": (
        share(("human", "<image>Hm?"), ("gpt", " "), ("human", "<image>And?"), ("gpt", "B."), image=[A, "b.png"]),
        [user(image("a.png"), image("b.png"), text("And?")), assistant("B.")],
        ("a round without an answer left out", "questions in a row joined"),
    ),
    "images named twice": ({"messages": ONE, "images": ["a.png"]}, ONE, ()),
    "messages as text": ({"messages": json.dumps(ONE)}, ONE, ()),
    "empty messages beside conversations": (
        share(*ASKED, messages=[], image={"path": A, "bytes": None}),
        ONE,
        (),
    ),
    "roles that are null": (
        {
            "conversations": [{"role": None, "content": None, "from": who, "value": words} for who, words in ASKED],
            "image": A,
        },
        ONE,
        (),
    ),
    "base64 that is short": (
        {"messages": [user({"type": "image", "base64": "abcd"}, text("?")), assistant("x")]},
        [user({"type": "image", "base64": "abcd"}, text("?")), assistant("x")],
        (),
    ),
    "first turn from the assistant": (
        share(("gpt", "Hello!"), ("human", "<image>What is it?"), ("gpt", "A dog."), image="a.png"),
        ONE,
        ("an answer without a question left out",),
    ),
    "a system message beside the messages": (
        share(("human", "Hi"), ("gpt", "Hm."), system="Be brief."),
        [BRIEF, user("Hi"), assistant("Hm.")],
        (),
    ),
    "two system messages": (
        {"messages": [BRIEF, user("Hi"), assistant("Hm.")], "system": "Be long."},
        [BRIEF, user("Hi"), assistant("Hm.")],
        ("a system message beside the messages left out",),
    ),
    "blocks with an index": (
        {"messages": [user(indexed(1), indexed(0), text("Same?")), assistant("No.")], "images": [A, "b.png"]},
        [user(image("b.png"), image("a.png"), text("Same?")), assistant("No.")],
        (),
    ),
    "numbered placeholders": (
        share(("human", "<image2>\n<image1>\nSame as <image2>?"), ("gpt", "No."), images=[A, "b.png"]),
        [user(image("b.png"), image("a.png"), text("Same as "), image("b.png"), text("?")), assistant("No.")],
        (),
    ),
    "numbers from 0": (
        share(("human", "<|image_1|><|image_0|>Same?"), ("gpt", "No."), images=[A, "b.png"]),
        [user(image("b.png"), image("a.png"), text("Same?")), assistant("No.")],
        (),
    ),
    "placeholders of others": (
        share(("human", "<ImageHere><|image|><image>?"), ("gpt", "No."), images=[A, "b.png", "c.png"]),
        [user(image("a.png"), image("b.png"), image("c.png"), text("?")), assistant("No.")],
        (),
    ),
    "paths in the text": (
        share(("user", "Picture 1: <img>a.png</img>\nWhat is it?"), ("assistant", "A dog.")),
        ONE,
        (),
    ),
    "answers without a loss": (
        {
            "messages": [
                *[user("1?"), {**assistant("One."), "weight": 0}],
                *[user("2?"), {**assistant("Two."), "loss": False}],
                *[user("3?"), {**assistant("Three."), "weight": 1}],
            ]
        },
        [
            *[user("1?"), {**assistant("One."), "weight": 0}],
            *[user("2?"), {**assistant("Two."), "weight": 0}],
            *[user("3?"), assistant("Three.")],
        ],
        (),
    ),
    "columns with numbers": (
        share(("human", "<image><image>Same?"), ("gpt", "No."), image_10="b.png", image_2=A, image_3=None),
        [user(image("a.png"), image("b.png"), text("Same?")), assistant("No.")],
        (),
    ),
    "image is the first of images": (
        share(("human", "<image><image>Same?"), ("gpt", "No."), image=A, images=[A, "b.png"]),
        [user(image("a.png"), image("b.png"), text("Same?")), assistant("No.")],
        (),
    ),
    "media that are null": (share(*ASKED, image=A, videos=[], audio={"path": None, "bytes": None}), ONE, ()),
    "prompt and completion": (
        {
            "prompt": [user({"type": "image"}, text("What is it?")), assistant("Hm."), user("So?")],
            "completion": [assistant("A dog.")],
            "images": [A],
        },
        [*ONE[:1], {**assistant("Hm."), "weight": 0}, user("So?"), assistant("A dog.")],
        (),
    ),
    "prompt and completion as text": ({"prompt": "Hi", "completion": "Hm."}, [user("Hi"), assistant("Hm.")], ()),
    "the Cauldron": (
        {
            "images": [A],
            "texts": [
                {"user": "What is it?", "assistant": "A dog.", "source": "x"},
                {"user": "Sure?", "assistant": "Yes.", "source": "x"},
            ],
        },
        [*ONE, user("Sure?"), assistant("Yes.")],
        (),
    ),
    "query and response": (
        {"query": "Sure?", "response": "Yes.", "history": [["<image>What is it?", "A dog."]], "images": [A]},
        [*ONE, user("Sure?"), assistant("Yes.")],
        (),
    ),
    "instruction, input and output": (
        {"instruction": "What is", "input": "it?", "output": "A dog.", "images": [A], "system": "Be brief."},
        [BRIEF, user(image("a.png"), text("What is\nit?")), assistant("A dog.")],
        (),
    ),
    "image bytes in blocks": (
        {"messages": [user({"type": "image", "image": {"bytes": ENCODED}}, text("?")), assistant("x")]},
        [user({"type": "image", "base64": ENCODED}, text("?")), assistant("x")],
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "expected", "repairs"), SHAPES.values(), ids=SHAPES)
def test_shapes_become_conversations(record, expected, repairs):
    before = json.dumps(record)
    outcome = convert_record(record)
    assert isinstance(outcome, Conversation), outcome
    if expected is None:
        expected = [{"role": "system", "content": "Hm."}, user("1 + 1?"), assistant("2")]
    assert outcome.messages() == expected and outcome.repairs == repairs
    validate_conversation(outcome.messages())
    assert json.dumps(record) == before, "the record was changed"


DROPS = {
    "not a record": (7, "no messages and no conversations"),
    "other keys": ({"text": "x"}, "no messages and no conversations"),
    "no turns": ({"messages": []}, "no messages and no conversations"),
    "a turn of another type": ({"messages": ["x"]}, "a turn without a known role or without content"),
    "an unknown role": (share(("narrator", "x")), "a turn without a known role or without content"),
    "no content": ({"messages": [{"role": "user"}]}, "a turn without a known role or without content"),
    "an unknown block": (
        {"messages": [user({"type": "video"}), assistant("x")]},
        "a block of type 'video'",
    ),
    "no answer": (share(("human", "Hm?")), "no question with an answer"),
    "more tags than images": (
        share(("human", "<image><image><image>?"), ("gpt", "x"), image=["a.png", "b.png"]),
        "images and <image> tags of different number",
    ),
    "more images than tags": (
        share(("human", "<image>?"), ("gpt", "x"), image=["a.png", "b.png"]),
        "images and <image> tags of different number",
    ),
    "other images beside those in the messages": (
        {"messages": ONE, "image": "b.png"},
        "images in the messages and others beside them",
    ),
    "a video": (share(*ASKED, image=A, videos=["a.mp4"]), "the key videos, which is not read"),
    "a sound": (share(*ASKED, image=A, audio_path="a.wav"), "the key audio_path, which is not read"),
    "a video in the text": (
        share(("human", "<image><video>?"), ("gpt", "x"), image=A),
        "the placeholder <video>, which is not read",
    ),
    "a box in the answer": (
        share(("human", "<image>?"), ("gpt", "At <|box_start|>(1, 2)"), image=A),
        "the placeholder <|box_start|>, which is not read",
    ),
    "a reference to an object": (
        share(("human", "<image><ref-object>?"), ("gpt", "<bbox>"), image=A),
        "the placeholder <ref-object>, which is not read",
    ),
    "images of another name": (
        share(("human", "?"), ("gpt", "x"), image_path=A),
        "the key image_path, which is not read",
    ),
    "two different images": (
        share(*ASKED, image=A, images=["b.png"]),
        "different images in the columns images, image",
    ),
    "an index out of range": (
        {"messages": [user(indexed(1), text("?")), assistant("x")], "images": [A]},
        "images and <image> tags of different number",
    ),
    "tags with and without a number": (
        share(("human", "<image1><image>?"), ("gpt", "x"), images=[A, "b.png"]),
        "images and <image> tags of different number",
    ),
    "a system message of blocks": (share(*ASKED, image=A, system=[1]), "a system message that is not text"),
    "no loss at all": ({"messages": [user("Hi"), {**assistant("x"), "weight": 0}]}, "no answer with a loss"),
    "a weight between": (
        {"messages": [user("Hi"), {**assistant("x"), "weight": 0.5}]},
        "an answer with a weight other than 0 and 1",
    ),
    "an answer that is not wanted": (
        {"prompt": "Hi", "completion": "x", "label": False},
        "an answer marked as not wanted",
    ),
    "an image that is a number": (
        share(("human", "<image>?"), ("gpt", "x"), image=[5]),
        "an image without a path, a URL or base64 text",
    ),
}


@pytest.mark.parametrize(("record", "reason"), DROPS.values(), ids=DROPS)
def test_what_cannot_be_used_is_dropped_for_a_reason(record, reason):
    assert convert_record(record) == Dropped(reason)


def picture(seed):
    data = io.BytesIO()
    draw_picture(seed).save(data, "PNG")
    return data.getvalue()


def asked(*images):
    return share(("human", "<image>" * len(images) + "Hm?"), ("gpt", "Ah."), image=list(images))


@pytest.fixture
def root(tmp_path):
    """The same few records as JSON lines, JSON and parquet, with faults."""
    folder = tmp_path / "mine"
    (folder / "pictures").mkdir(parents=True)
    for seed in range(3):
        (folder / "pictures" / f"{seed}.png").write_bytes(picture(seed))
    (tmp_path / "secret.png").write_bytes(picture(9))
    encoded = base64.urlsafe_b64encode(picture(5)).decode()
    records = [
        asked("pictures/0.png"),
        asked("pictures/1.png", "pictures/2.png"),
        asked("pictures/gone.png"),
        asked("../secret.png"),
        asked(str(tmp_path / "secret.png")),
        asked(str(folder / "pictures/0.png")),
        asked(f"data:image/png;base64,{encoded}"),
        asked("data:image/png;base64," + base64.b64encode(b"no image" * 20).decode()),
        {"nothing": 1},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "train.jsonl").write_text("\n".join([lines[0], "{broken", "", *lines[1:]]))
    (folder / "test.jsonl").write_text(lines[0])
    (folder / "list.json").write_text(json.dumps(records))
    return tmp_path


@pytest.mark.parametrize(("path", "num_records"), [("mine/train.jsonl", 10), ("mine/list.json", 9)])
def test_files_are_read_and_every_record_is_accounted_for(root, path, num_records):
    dataset, report = load_custom_source(CustomSource("mine", path), root)
    assert report.read == num_records == report.used + sum(report.dropped.values())
    broken_line = {"a line that is not JSON": 1} if num_records == 10 else {}
    assert report.dropped == broken_line | {
        "an image is not there": 1,
        "image path outside of its folder": 2,
        "a file in place of an image that Pillow cannot read": 1,
        "no messages and no conversations": 1,
    }
    images = dataset["images"][:]
    assert images[:3] == [["mine/pictures/0.png"], ["mine/pictures/1.png", "mine/pictures/2.png"], images[0]]
    assert images[3][0].startswith("inline:") and len(images) == 4
    lines = [(line["file"], line["record"], line["image"]) for line in report.list_dropped()]
    assert (path, "line 5" if broken_line else "record 2", "mine/pictures/gone.png") in lines
    assert len(set(lines)) == len(lines) == report.num_dropped
    batch = DataCollatorForVisualChat(make_processor(), max_broken=0)(list(dataset))
    assert len(batch["pixel_values"]) == 5
    again, _ = load_custom_source(CustomSource("mine", path), root)
    assert again._fingerprint == dataset._fingerprint


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))


def test_no_name_leads_out_of_the_folder(root):
    """Neither through a reference that looks like an archive's, nor through what looks like base64 and is a path."""
    (root / "secret").write_bytes(picture(9))
    write_lines(
        root / "mine" / "odd.jsonl",
        asked(f"{root}/mine/odd.jsonl#/../../../secret.png"),
        asked("odd.jsonl#/../../../secret.png"),
        asked("/" * 300 + str(root / "secret")),
        {"messages": [user({"type": "image", "base64": "/" * 300 + str(root / "secret")}, text("?")), assistant("x")]},
        asked("pictures/0.png"),
    )
    dataset, report = load_custom_source(CustomSource("odd", "mine/odd.jsonl"), root)
    assert dataset["images"][:] == [["mine/pictures/0.png"]] and report.read == 5
    collator = DataCollatorForVisualChat(make_processor(), max_broken=9)
    hidden = {"messages": [user({"type": "image", "base64": str(root / "secret")}, text("?")), assistant("x")]}
    with pytest.warns(UserWarning, match="left out"):
        assert "pixel_values" not in collator([hidden])


def test_one_odd_record_does_not_take_the_others_along(root):
    (root / "mine" / "list.json").write_text("[]")
    names = ["a\0/b.png", "x" * 300 + "/b.png", "x" * 300 + ".json#1", "list.json#1", "train.jsonl#0.0"]
    write_lines(root / "mine" / "odd.jsonl", *map(asked, names), asked("pictures/0.png"))
    with (root / "mine" / "odd.jsonl").open("a") as file:
        file.write("\n" + "[" * 100_000 + "\n" + '{"id": 1' + "0" * 5000 + "}")
    dataset, report = load_custom_source(CustomSource("odd", "mine/odd.jsonl"), root)
    assert report.dropped == {"an image is not there": 5, "a line that is not JSON": 2} and len(dataset) == 1


def test_images_that_come_later_are_noticed_in_any_folder(root):
    write_lines(root / "mine" / "deep.jsonl", asked("a/b/c/new.png"), asked("pictures/0.png"), asked("store.json#k"))
    (root / "mine" / "a" / "b" / "c").mkdir(parents=True)
    assert load_custom_source(CustomSource("deep", "mine/deep.jsonl"), root)[1].used == 1
    (root / "mine" / "a" / "b" / "c" / "new.png").write_bytes(picture(1))
    assert load_custom_source(CustomSource("deep", "mine/deep.jsonl"), root)[1].used == 2
    (root / "mine" / "store.json").write_text(json.dumps({"k": base64.b64encode(picture(2)).decode()}))
    assert load_custom_source(CustomSource("deep", "mine/deep.jsonl"), root)[1].used == 3
    (root / "mine" / "pictures" / "0.png").unlink()
    assert load_custom_source(CustomSource("deep", "mine/deep.jsonl"), root)[1].used == 2


def test_common_layouts_are_read(root):
    """JSON lines named .json, a description beside the data, an image folder with dots in its path, links."""
    lines = root / "hub" / "snapshot"
    write_lines(root / "blobs" / "abc", asked("0.png"), asked("1.png"))
    lines.mkdir(parents=True)
    (lines / "train.json").symlink_to(root / "blobs" / "abc")
    (lines / "dataset_infos.json").write_text("{}")
    for images in ("mine/pictures", "hub/../mine/pictures"):
        dataset, _ = load_custom_source(CustomSource("hub", "hub/snapshot", images=images), root)
        assert dataset["images"][:] == [["mine/pictures/0.png"], ["mine/pictures/1.png"]]
    (root / "link").symlink_to(root / "mine")
    assert load_custom_source(CustomSource("linked", str(root / "link/test.jsonl")), root / "link")[1].used == 1
    columns = {"id": ["7"], "base64": ["x"], **{key: [value] for key, value in asked("x").items() if key != "image"}}
    Dataset.from_dict({**columns, "images": [[{"bytes": picture(0), "path": None}]]}).to_parquet(root / "wide.parquet")
    assert load_custom_source(CustomSource("wide", "wide.parquet"), root)[1].used == 1


def test_json_lines_may_have_other_roles(root):
    turns = [{"role": "human", "content": "Hm?"}, {"role": "gpt", "content": "Ah."}]
    write_lines(root / "roles.jsonl", {"messages": turns}, turns)
    rows = load_conversations(root / "roles.jsonl", make_processor())
    assert rows["messages"][:] == [[user("Hm?"), assistant("Ah.")]] * 2


def test_a_folder_to_evaluate_on_gives_its_own_split(root, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from training_data import choose_split

    write_lines(root / "llava" / "talk.jsonl", asked("0.png"))
    wanted = ["validation", "test"]
    assert choose_split(root / "mine", wanted) == "test" and choose_split(root / "mine", ["train"]) == "train"
    assert choose_split(root / "llava", wanted) == "train", "the only one there is"
    with pytest.raises(SystemExit, match="has no data for validation or test; it has no data"):
        choose_split(root / "mine" / "pictures", wanted)


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json"])
def test_a_file_to_train_on_may_have_its_images_elsewhere(root, monkeypatch, name):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from training_data import load_file

    records = [asked("0.png"), asked(str(root / "mine/pictures/1.png"))]
    data = "\n".join(map(json.dumps, records)) if "jsonl" in name else json.dumps(records)
    path = root / "notes" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    arguments = SimpleNamespace(overlong="error", max_length=None, check_images=True, image_root=None)
    with pytest.raises((FileNotFoundError, ValueError), match=r"the image 0.png|image path outside of its folder"):
        load_file(path, arguments, make_processor(), ["train"])
    arguments.image_root = root / "mine" / "pictures"
    assert len(load_file(path, arguments, make_processor(), ["train"])) == 2


def test_parquet_that_breaks_in_the_middle_is_named(root):
    table = {"conversations": [asked("x")["conversations"]] * 500, "image": ["pictures/0.png"] * 500}
    path = root / "mine" / "rows.parquet"
    Dataset.from_dict({**table, "time": [2**62] * 500}).to_parquet(path)
    assert load_custom_source(CustomSource("rows", "mine/rows.parquet"), root)[1].used == 500
    data = bytearray(path.read_bytes())
    data[30:400] = b"\xff" * 370
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.parquet is not whole parquet"):
        load_custom_source(CustomSource("rows", "mine/rows.parquet"), root)


def test_a_folder_has_splits_and_a_pattern_has_files(root):
    assert load_custom_source(CustomSource("mine", "mine", split="test"), root)[1].read == 1
    assert load_custom_source(CustomSource("mine", "mine"), root)[1].read == 19
    assert load_custom_source(CustomSource("mine", "mine/*.jsonl"), root)[1].read == 11
    (root / "other").mkdir()
    (root / "other" / "talk.jsonl").write_text(json.dumps(asked("0.png")))
    dataset, _ = load_custom_source(CustomSource("other", "other", images="mine/pictures"), root)
    assert dataset[0]["images"] == ["mine/pictures/0.png"]


def test_parquet_holds_its_images(root):
    """As `datasets` writes them, in a column of one image or of several; broken ones are dropped."""
    rows = {
        "conversations": [asked(*["x"] * count)["conversations"] for count in (1, 2, 1)],
        "images": [[picture(0)], [picture(1), picture(2)], [b"no image"]],
    }
    columns = Dataset.from_dict(
        {**rows, "images": [[{"bytes": data, "path": None} for data in row] for row in rows["images"]]}
    )
    columns.to_parquet(root / "mine" / "many.parquet")
    single = Dataset.from_dict(
        {"messages": [[user("Hm?"), assistant("Ah.")]], "image": [{"bytes": picture(3), "path": None}]}
    )
    single.cast_column("image", Image()).to_parquet(root / "mine" / "one.parquet")
    dataset, report = load_custom_source(CustomSource("mine", "mine/many.parquet"), root)
    assert report.dropped == {"a file in place of an image that Pillow cannot read": 1} and report.used == 2
    assert dataset["images"][:] == [["mine/many.parquet#0.0"], ["mine/many.parquet#1.0", "mine/many.parquet#1.1"]]
    (one,) = load_custom_source(CustomSource("one", "mine/one.parquet"), root)[0]
    assert one["images"] == ["mine/one.parquet#0.0"]
    batch = DataCollatorForVisualChat(make_processor(), max_broken=0)([*dataset, one])
    expected = make_processor().image_processor([draw_picture(seed) for seed in range(4)], return_tensors="pt")
    assert (batch["pixel_values"] == expected["pixel_values"]).all()


FROM_THE_HUB = """
import sys
sys.path[:0] = sys.argv[2:]
from conftest import make_processor
from processing_visualchat import DataCollatorForVisualChat, CustomSource, load_custom_source
dataset, report = load_custom_source(CustomSource("theirs", hub="user/chats"), sys.argv[1])
print(report.read, report.used, len(DataCollatorForVisualChat(make_processor())([dataset[0]])["pixel_values"]))
load_custom_source(CustomSource("theirs", hub="user/none"), sys.argv[1])
"""


def test_a_data_set_comes_from_the_hub(root):
    with HubStandIn() as hub:
        files = {path.name: path.read_bytes() for path in (root / "mine").glob("*.jsonl")}
        hub.files["user/chats"] = files | {f"pictures/{seed}.png": picture(seed) for seed in range(3)}
        completed = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(root), str(Path(__file__).parent)],
            env={**environment(), "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(root / "cache")},
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert completed.stdout.split() == ["10", "3", "1"], completed.stderr[-2000:]
    assert "cannot be downloaded from the Hub, dataset user/none. Is the name right" in completed.stderr


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (CustomSource("mine", "nowhere.jsonl"), FileNotFoundError, "mine has no file at .*nowhere.jsonl"),
        (
            CustomSource("mine", "mine", split="night"),
            FileNotFoundError,
            "no split night in .*; it has the splits test, train",
        ),
        (CustomSource("mine", "mine/*.jsonl", split="test"), ValueError, "the split test, which only a folder has"),
        (CustomSource("mine", "m*/../*.jsonl"), ValueError, "which leads out of"),
        (CustomSource("mine", "mine/pictures"), FileNotFoundError, "it has no data files"),
        (CustomSource("mine", "secret.png"), ValueError, "it can be one of .jsonl, .json, .tar, .parquet, .arrow"),
        (CustomSource("mine", "../x.jsonl"), ValueError, "which leads out of"),
        (CustomSource("mine", "mine/train.jsonl", images="none"), FileNotFoundError, "has its images in .*none"),
        (CustomSource("mine", "half.json"), ValueError, "not whole JSON.*download complete"),
        (CustomSource("mine", "dict.json"), ValueError, "not a list of records at its top, but a dict"),
        (CustomSource("mine", "half.parquet"), ValueError, "not whole parquet"),
        (CustomSource("mine", "nothing.jsonl"), ValueError, "Nothing is left of the source mine"),
    ],
    ids=lambda value: value.path if isinstance(value, CustomSource) else "",
)
def test_what_is_wrong_with_a_source_is_named(root, source, error, message):
    (root / "half.json").write_text('[{"messages": ')
    (root / "dict.json").write_text("{}")
    (root / "half.parquet").write_bytes(b"PAR1 and no more")
    (root / "nothing.jsonl").write_text("{}\n")
    with pytest.raises(error, match=message):
        load_custom_source(source, root)
