"""The reader of conversation files: the same faulty files with faults dropped and raised."""

import base64
import gzip
import io
import json
import tarfile
from dataclasses import replace

import pytest
from conftest import draw_picture, make_processor
from datasets import Dataset, DatasetDict
from PIL import Image
from test_custom_sources import asked, assistant, image, picture, share, text, user

from processing_visualchat import (
    CustomSource,
    DataCollatorForVisualChat,
    DatasetSpec,
    MixtureConfig,
    load_conversations,
    load_custom_source,
    load_mixture,
    read_mixture_config,
    stream_mixture,
)
from processing_visualchat.data.conversation import Conversation, Dropped
from processing_visualchat.data.readers import read_conversations
from processing_visualchat.doctor.diagnosis import examine


FAULTS = {
    "other keys": ({"text": "Hi"}, "no messages and no conversations", "has no messages; it has the keys text"),
    "no question": (
        {"messages": [assistant("A.")]},
        "no question with an answer",
        "has no question with an answer",
    ),
    "no answer": (
        {"messages": [user("Hi")]},
        "no question with an answer",
        "has no question with an answer",
    ),
    "literal tag": (
        {"messages": [user("a <image>"), assistant("A.")]},
        "images and <image> tags of different number",
        "has 1 places for images, 1 of them different, and 0 images",
    ),
    "missing image": (
        {"messages": [user(image("gone.png"), text("?")), assistant("A.")]},
        "an image is not there",
        "names the image gone.png; there is no file at",
    ),
    "tags": (
        asked("a.png", "a.png") | {"images": ["a.png"] * 3},
        "images and <image> tags of different number",
        "has 2 places for images, 2 of them different, and 3 images",
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
        with pytest.raises(ValueError, match=r"is one of .jsonl, .json, .tar, .parquet, .arrow"):
            list(read_conversations(tmp_path / "a.png", is_strict=is_strict))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_format_is_read_strictly(tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(picture(0))
    path = tmp_path / f"data{suffix}"
    write(path, [{"messages": [user(image("a.png"), text("?")), assistant("A.")]}] * 2)
    rows = load_conversations(path, make_processor())
    assert rows["messages"][:] == [[user(image(str(tmp_path / "a.png")), text("?")), assistant("A.")]] * 2


OUTSIDE = ("../a.png", "{folder}/a.png", "{folder}/mine/linked.png")
LINKED = ("linked.png", "linked/a.png")


@pytest.fixture
def outside(tmp_path):
    """A folder for data, beside an image that two links in it lead to."""
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "linked").symlink_to(tmp_path)
    (tmp_path / "mine" / "linked.png").symlink_to(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", [*OUTSIDE, *LINKED])
def test_no_image_is_read_outside_of_its_folder(outside, suffix, name):
    path = outside / "mine" / f"data{suffix}"
    write(path, [{"messages": [user(image(name.format(folder=outside)), text("?")), assistant("A.")]}])
    with pytest.raises(ValueError, match="names an image outside of its folder; name one that holds all images"):
        load_conversations(path, make_processor())
    with pytest.raises(ValueError, match="image path outside of its folder"):
        load_custom_source(CustomSource("mine", f"mine/data{suffix}"), outside)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_folder_that_is_named_may_hold_images_anywhere(outside, suffix, name):
    path = outside / "mine" / f"data{suffix}"
    write(path, [{"messages": [user(image(name.format(folder=outside)), text("?")), assistant("A.")]}])
    assert len(load_conversations(path, make_processor(), image_root=outside)) == 1
    for images in ("..", str(outside)):
        config = MixtureConfig((DatasetSpec("x", path.name, images=images),), eval_share=0.0)
        for examples in (load_mixture(config, path.parent).train, list(stream_mixture(config, path.parent)[0])):
            assert DataCollatorForVisualChat(make_processor(), max_broken=0)(list(examples))["pixel_values"].any()


REPAIRS = {
    "a second answer": ([("human", "Hi"), ("gpt", "A"), ("gpt", "B")], "an answer without a question left out"),
    "an empty answer": (
        [("human", "Hi"), ("gpt", " "), ("human", "So"), ("gpt", "B")],
        "a round without an answer left out",
    ),
    "no last answer": ([("human", "Hi"), ("gpt", "A"), ("human", "So")], "a question without an answer left out"),
    "a repeated tag": ([("human", "<image><image>"), ("gpt", "A")], "a repeated <image> tag left out"),
    "no tag": ([("human", "Hi"), ("gpt", "A")], "images without an <image> tag put in front"),
}


@pytest.mark.parametrize(("turns", "repair"), REPAIRS.values(), ids=REPAIRS)
def test_a_repair_is_noted_or_raised(tmp_path, turns, repair):
    (tmp_path / "a.png").write_bytes(picture(0))
    write(tmp_path / "data.jsonl", [share(*turns, **({"image": "a.png"} if "tag" in repair else {}))])
    (read,) = read_conversations(tmp_path / "data.jsonl")
    assert read.outcome.repairs == (repair,)
    with pytest.raises(ValueError, match=f"line 1 would need a repair: {repair}"):
        load_conversations(tmp_path / "data.jsonl", make_processor())


@pytest.mark.parametrize("is_inline", [False, True])
def test_one_pixel_is_refused_in_every_schema(tmp_path, is_inline):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    encoded = base64.b64encode((tmp_path / "dot.png").read_bytes()).decode()
    write(tmp_path / "data.jsonl", [asked(f"data:image/png;base64,{encoded}" if is_inline else "dot.png")])
    with pytest.raises(ValueError, match="has 1 x 1 pixels; it shows nothing"):
        load_conversations(tmp_path / "data.jsonl", make_processor())


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_file_may_be_compressed(tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(picture(0))
    write(tmp_path / f"data{suffix}", [asked("a.png")] * 2)
    path = tmp_path / f"data{suffix}.gz"
    path.write_bytes(gzip.compress((tmp_path / f"data{suffix}").read_bytes()))
    assert len(load_conversations(path, make_processor())) == 2
    assert load_custom_source(CustomSource("mine", path.name), tmp_path)[1].used == 2
    (tmp_path / f"data{suffix}").unlink()
    assert load_custom_source(CustomSource("folder", "."), tmp_path)[1].used == 2
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"data{suffix}.gz is not (a whole file|whole JSON)"):
        list(read_conversations(path))


def test_a_saved_data_set_is_read(tmp_path):
    """As `save_to_disk` writes it, with its images inside, of a row and of a block."""
    rows = {
        "images": [[{"bytes": picture(0), "path": None}, {"bytes": picture(1), "path": None}]],
        "texts": [[{"user": "Same?", "assistant": "No."}]],
    }
    blocks = [{"type": "image", "image": {"bytes": picture(2)}, "text": None}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": [text("A dog.")]}]
    DatasetDict({"train": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")
    Dataset.from_list([{"messages": messages}]).save_to_disk(tmp_path / "blocks")
    Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "blocks.parquet")
    spec = [DatasetSpec(path, path) for path in ("saved", "blocks", "blocks.parquet")]
    config = MixtureConfig(tuple(spec), eval_share=0.0)
    for examples in (list(load_mixture(config, tmp_path).train), list(stream_mixture(config, tmp_path)[0])):
        examples.sort(key=lambda example: example["where"])
        batch = DataCollatorForVisualChat(make_processor(), max_broken=0)(examples)
        expected = make_processor().image_processor([draw_picture(seed) for seed in (2, 2, 0, 1)], return_tensors="pt")
        assert (batch["pixel_values"] == expected["pixel_values"]).all()
    (tmp_path / "half.arrow").write_bytes(next((tmp_path / "blocks").glob("*.arrow")).read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"half.arrow is not whole arrow"):
        list(read_conversations(tmp_path / "half.arrow"))


def test_the_samples_of_a_web_dataset_are_read(tmp_path):
    """With images in the order of their names in the record, or of the archive; a video is not read."""
    turns = asked("x", "x")["conversations"]
    samples = {
        "0.json": json.dumps({"conversations": turns, "image": ["0.b.png", "0.a.png"]}).encode(),
        "0.a.png": picture(0),
        "0.b.png": picture(1),
        "in/1.png": picture(2),
        "in/1.json": json.dumps(share(("human", "Hm?"), ("gpt", "Ah."), image=["1.png"])).encode(),
        "2.mp4": b"video",
        "2.json": json.dumps({"conversations": turns[1:]}).encode(),
    }
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as archive:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    config = MixtureConfig((DatasetSpec("x", "data.tar.gz"),), eval_share=0.0)
    mixture = load_mixture(config, tmp_path)
    assert mixture.reports[0].dropped == {"the key video, which is not read": 1}
    with pytest.warns(UserWarning, match="the key video, which is not read"):
        streamed = list(stream_mixture(config, tmp_path)[0])
    for examples in (list(mixture.train), streamed):
        examples.sort(key=lambda example: example["where"])
        batch = DataCollatorForVisualChat(make_processor(), max_broken=0)(examples)
        expected = make_processor().image_processor([draw_picture(seed) for seed in (1, 0, 2)], return_tensors="pt")
        assert (batch["pixel_values"] == expected["pixel_values"]).all()
    assert load_custom_source(CustomSource("folder", "."), tmp_path)[1].used == 2
    (tmp_path / "half.tar").write_bytes(gzip.decompress((tmp_path / "data.tar.gz").read_bytes())[:1000])
    with pytest.raises(ValueError, match=r"half.tar is not a whole file"):
        list(read_conversations(tmp_path / "half.tar"))


def test_columns_may_have_other_names(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    record = {"chat": share(("human", "[IMG] What is it?"), ("gpt", "A dog."))["conversations"], "pic": "a.png"}
    write(tmp_path / "data.jsonl", [{**record, "persona": "Be brief.", "video": "a.mp4"}])
    columns = {"chat": "messages", "pic": "images", "persona": "system", "[IMG]": "placeholder", "video": "ignored"}
    (read,) = read_conversations(tmp_path / "data.jsonl", columns=columns)
    expected = [user(image(str(tmp_path / "a.png")), text("What is it?")), assistant("A dog.")]
    assert read.outcome.messages() == [{"role": "system", "content": "Be brief."}, *expected]
    assert read.outcome.repairs == ()
    (tmp_path / "mix.yaml").write_text(f"sources: [{{name: x, path: data.jsonl, columns: {json.dumps(columns)}}}]")
    config = replace(read_mixture_config(tmp_path / "mix.yaml"), eval_share=0.0)
    for examples in (load_mixture(config, tmp_path).train, list(stream_mixture(config, tmp_path)[0])):
        assert examples[0]["messages"] == read.outcome.messages()
    for wrong, message in (
        ("chat", "columns of x is 'chat'; use names in the file"),
        ({"a": "b"}, "has the unknown b"),
    ):
        with pytest.raises(ValueError, match=message):
            DatasetSpec("x", "data.jsonl", columns=wrong)
    with pytest.raises(ValueError, match="llava is a published source; it takes no columns"):
        DatasetSpec("llava", columns=columns)


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


def test_a_special_token_in_the_text_drops_a_record_in_every_reading(tmp_path):
    """It would end the answer there, and training with it."""
    good, bad = ([user(text(words)), assistant("A.")] for words in ("Hi", "Hi<eos>"))
    write(tmp_path / "data.jsonl", [{"messages": messages} for messages in (good, bad, good)])
    config, processor = MixtureConfig((DatasetSpec("x", "data.jsonl"),), eval_share=0.0), make_processor()
    (report,) = load_mixture(config, tmp_path, processor=processor).reports
    assert dict(report.dropped) == {"a special token in its text": 1} and report.used == 2
    assert report.examples == {"a special token in its text": "data.jsonl, line 2"}
    with pytest.warns(UserWarning, match="1 record left out: {'a special token in its text': 1}"):
        assert len(list(stream_mixture(config, tmp_path, processor=processor)[0])) == 2
    assert examine(config, tmp_path, processor).num_dropped == 1
    with pytest.raises(ValueError, match=r"line 2 is invalid: .* holds a literal <eos> in its text"):
        load_conversations(tmp_path / "data.jsonl", processor)
    assert load_mixture(config, tmp_path).reports[0].used == 3  # without a processor, nothing is known of its tokens


@pytest.mark.parametrize("max_length", [None, 400])
def test_an_over_length_conversation_of_a_stream_is_named(tmp_path, max_length):
    messages = [user(text("Hi" * 900)), assistant("A.")]
    write(tmp_path / "data.jsonl", [{"messages": messages}])
    config = MixtureConfig((DatasetSpec("x", "data.jsonl"),), eval_share=0.0)
    examples = list(stream_mixture(config, tmp_path)[0])
    collator = DataCollatorForVisualChat(make_processor(), max_length)
    with pytest.raises(ValueError, match=r"data.jsonl, line 1 has \d+ tokens, more than max_length=.*--overlong of"):
        collator(examples)
