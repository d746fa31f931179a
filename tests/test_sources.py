"""The thirteen published sources: what becomes of every record, written out by hand."""

import base64
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_processor
from PIL import Image
from published_data import (
    BOOKS,
    CAPTIONS,
    CGD,
    DETAIL,
    DIALOGUES,
    REASONING,
    SPARKLES_CC,
    aokvqa,
    encoded,
    write_published_data,
)

from processing_visualchat import SOURCES, DataCollatorForVisualChat, load_source, validate_conversation
from processing_visualchat.data.conversation import Conversation, Dropped, Round
from processing_visualchat.data.images import ImageReference
from processing_visualchat.data.published import read_source
from processing_visualchat.data.published.llava import convert_llava
from processing_visualchat.data.published.llava_otter_blend import BLEND, blend, draw
from processing_visualchat.data.published.mimicit import group_mimicit


COCO = "coco/train2017/{:012d}.jpg".format
CGD_FILE = "MIMIC-IT/CGD_instructions.json"
CAPTION_THIS = "Please describe the image in one sentence."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_published_data(tmp_path_factory.mktemp("data"))


def rounds_of(conversation):
    """Images, question and answer of every round."""
    rounds = []
    for question, answer in zip(conversation.turns[::2], conversation.turns[1::2]):
        images = [str(block) for block in question.content if not isinstance(block, str)]
        words = [block for block in question.content if isinstance(block, str)]
        assert question.role == "user" and answer.role == "assistant" and len(words) <= 1
        rounds.append((images, "".join(words), *answer.content))
    return rounds


def talk(*rounds):
    return Conversation.from_rounds([Round([*map(ImageReference.parse, images)], *said) for images, *said in rounds])


EXPECTED = {
    "llava": (
        [
            [([COCO(1)], "What is shown?", "A bus.")],
            [([COCO(2)], "Describe\nit.", "A dog.")],
            [([COCO(3)], "No tag here?", "None.")],
            [([COCO(1)], "Why?", "Because.")],
        ],
        {
            "an image is not there": 1, "image path outside of its folder": 1, "no image or no conversations": 1,
            "no question with an answer": 1,
        },
        {"image tag repeated or missing": 2},
    ),
    "llava_dial": (
        [
            [([COCO(1)], "First?", "One."), ([], "Second?", "Two.")],
            [([COCO(2)], "What?", "That.")],
        ],
        {"a turn without a known speaker or without text": 1},
        {"a question without an answer left out": 1, "an answer without a question left out": 1},
    ),
    "otter_mimicit_cgd": (
        [
            [
                ([COCO(1), COCO(2)], "What changed? (CGD_1)", "The bus left."),
                ([], "What changed? (CGD_2)", "A dog came."),
            ],
            [([COCO(3), COCO(4)], "What changed? (CGD_3)", "Other images.")],
        ],
        {"an image is not there": 1, "image id of an unknown form": 1},
        {},
    ),
    "otter_mimicit_sd": (
        [
            [(["MIMIC-IT/SD.json#SD_IMG_1_1", "MIMIC-IT/SD.json#SD_IMG_1_2"], "What changed?", "The car left.")],
            [([], "Say so.", "It is text alone.")],
        ],
        {"no question with an answer": 1},
        {"image tag in the instruction": 1},
    ),
    "otter_mimicit_sn": (
        [
            [
                (
                    [f"MIMIC-IT/SN.json#SN_IMG_scene0000_00_color_{frame}" for frame in ("000000", "000100")],
                    "What changed? (SN_1)",
                    "A room.",
                )
            ]
        ],
        {},
        {},
    ),
    "otter_mimicit_tvc": (
        [[(["MIMIC-IT/TVC.json#TVC_IMG_castle_s01e01_seg01_clip_00_00001"], "What changed? (TVC_1)", "A talk.")]],
        {},
        {},
    ),
    "otter_mimicit_vst": (
        [[([f"MIMIC-IT/VST.json#VST_IMG_{number}" for number in (1, 2, 3)], "What changed? (VST_1)", "A story.")]],
        {"an image is not there": 1},
        {},
    ),
    "sparkles_dialogue": (
        [
            [
                (
                    ["SparklesDialogueCC/images/14.jpg", "SparklesDialogueCC/images/1417.jpg"],
                    "Compare image 1 and image 2.",
                    "Image 1 is darker. Image 2 is not.",
                ),
                (["SparklesDialogueCC/images/15.jpg"], "And image 3, beside image 2?", "It is as dark as image 1."),
            ],
            [(["SparklesDialogueVG/images/7.jpg"], "What is image 1?", "Image 1 is a cat.")],
        ],
        {
            "an image is named that is not shown": 1, "user and assistant do not take turns": 1,
            "an image is not there": 1, "no dialogue": 1,
        },
        {"a question without an answer left out": 1},
    ),
    "aokvqa": (
        [
            [
                (
                    [COCO(1)],
                    "What is he awaiting? Choose from bus, cab, train, dog, and give the reason.",
                    "Cab. He stands at a curb with luggage. A cab comes.",
                )
            ]
        ],
        {"split test": 1, "no image, question or correct choice": 1, "no rationale": 1},
        {},
    ),
    "coco_caption": (
        [
            [(["coco/2014/COCO_train2014_000000000001.jpg"], CAPTION_THIS, "A dog runs.")],
            [(["coco/2014/val2014/COCO_val2014_000000000002.jpg"], CAPTION_THIS, "A cat.")],
        ],
        {"split val": 1, "split test": 1, "no caption": 1},
        {},
    ),
    "ocr_vqa": (
        [[(["OCR_VQA/images/0001.jpg"], "Who wrote this?", "A. Author")]],
        {"split 2": 1, "split 3": 1, "an image is not there": 1, "image path outside of its folder": 1},
        {"questions and answers of different number": 1, "a round without question or answer left out": 1},
    ),
    "minigpt4": (
        [[(["cc_sbu_align/image/2.jpg"], "Please describe the image in detail.", "A quiet lake.")]],
        {"no caption": 1, "an image without an id": 1},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_every_record_is_accounted_for(name, root):
    conversations, dropped, repaired = EXPECTED[name]
    outcomes = [record.outcome for record in read_source(name, str(root.resolve()))]
    assert [rounds_of(outcome) for outcome in outcomes if isinstance(outcome, Conversation)] == conversations
    dataset, report = load_source(name, root)
    assert (report.dropped, report.repaired) == (dropped, repaired)
    assert report.read == report.used + sum(report.dropped.values())
    assert report.conversations == len(conversations) == len(dataset)
    for row, rounds in zip(dataset, conversations):
        messages = row["messages"]
        validate_conversation(messages)
        assert row["images"] == [image for images, _, _ in rounds for image in images]
        paths = [block["path"] for message in messages for block in message["content"] if "path" in block]
        assert paths == [str(root / image) for image in row["images"]]
    for reason, where in report.examples.items():
        assert where.startswith(SOURCES[name].annotations) and (not reason or reason in str(report))


def test_there_are_thirteen():
    assert len(SOURCES) == 13 and set(SOURCES) - set(EXPECTED) == {"llava_otter_blend"}


def test_the_blend_shows_each_image_once_and_reuses_conversations(root):
    dataset, report = load_source("llava_otter_blend", root)
    assert (
        report.read
        == len(DETAIL) + len(REASONING) + len(DIALOGUES) + len(CGD)
        == report.used + sum(report.dropped.values())
    )
    assert report.dropped["an image is not there"] == 2 and report.dropped["image id of an unknown form"] == 1
    said = Counter()
    for row in dataset:
        messages = row["messages"]
        validate_conversation(messages)
        assert len(set(row["images"])) == len(row["images"])
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        said.update(answers)
        for pair in ("The bus left.", "Other images."):
            if pair in answers:
                assert answers.index(pair) > 0  # first a conversation about the first image
    assert said["The bus left."] == said["A dog came."] == 1 and said["Other images."] == 1
    first = next(row for row in dataset if "The bus left." in str(row["messages"]))
    assert first["images"] == [COCO(1), COCO(2)]
    assert dataset["messages"][:] == load_source("llava_otter_blend", root)[0]["messages"][:]


def test_rounds_of_related_records_are_used_once():
    assert group_mimicit(CGD) == [["CGD_1", "CGD_2"], ["CGD_3"], ["CGD_4"], ["CGD_5"]]


def test_related_records_find_each_other_in_either_direction():
    """Also where one has image ids of 12 digits and the other of 16; what is absent or names itself is passed over."""

    def record(digits, *related, images=(1, 2)):
        return {"image_ids": [f"CGD_IMG_{image:0{digits}d}" for image in images], "rel_ins_ids": list(related)}

    records = {
        "a": record(12, "gone", "a"),
        "b": record(12, images=(3, 4)),
        "c": record(16, "d", "a"),
        "d": record(12, "b", None),
    }
    assert group_mimicit(records) == [["a", "c", "d"], ["b"]]


def test_whole_ids_are_matched():
    """IMAGE#14 is not the beginning of IMAGE#1417."""
    rounds = EXPECTED["sparkles_dialogue"][0][0]
    assert "17" not in rounds[0][1] + rounds[0][2] and "IMAGE" not in str(rounds)
    assert "IMAGE#1417" in SPARKLES_CC[0]["dialogue"][0]["content"]


def test_nothing_is_written_beside_the_raw_data(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for name in SOURCES:
        load_source(name, root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_changed_file_is_read_anew(tmp_path):
    root = write_published_data(tmp_path)
    assert load_source("aokvqa", root)[1].read == 4
    (root / "aokvqa/annotations/aokvqa_v1p0_train.json").write_text(json.dumps([aokvqa(), aokvqa()]))
    assert load_source("aokvqa", root)[1].read == 2


@pytest.mark.parametrize("name", ["otter_mimicit_sd", "ocr_vqa", "llava_otter_blend"])
def test_a_collated_batch_has_the_images(name, root):
    """From files and from base64, of either alphabet."""
    dataset, _ = load_source(name, root)
    batch = DataCollatorForVisualChat(make_processor())(list(dataset))
    assert len(batch["pixel_values"]) == sum(map(len, dataset["images"]))
    assert (batch["labels"] != -100).any(dim=1).all() and torch.isfinite(batch["pixel_values"]).all()


def test_an_archive_may_be_parquet(tmp_path):
    from datasets import Dataset

    root = write_published_data(tmp_path)
    archive = root / "MIMIC-IT/VST.json"
    images = json.loads(archive.read_text())
    Dataset.from_dict({"id": list(images), "base64": list(images.values())}).to_parquet(
        archive.with_suffix(".parquet")
    )
    archive.unlink()
    dataset, report = load_source("otter_mimicit_vst", root)
    assert report.used == 1 and len(DataCollatorForVisualChat(make_processor())(list(dataset))["pixel_values"]) == 3


def test_what_is_missing_or_broken_is_named(tmp_path):
    root = write_published_data(tmp_path)
    with pytest.raises(ValueError, match=r"There is no source 'lava_dial'. Did you mean llava_dial"):
        load_source("lava_dial", root)
    with pytest.raises(ValueError, match=r"There is no source 'zzz'. There are llava, "):
        load_source("zzz", root)
    with pytest.raises(FileNotFoundError, match="No data root at"):
        load_source("llava", root / "nowhere")
    file = root / "llava/detail_23k.json"
    whole = file.read_text()
    file.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"detail_23k.json is not whole JSON: .* at line 1, column"):
        load_source("llava", root)
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"detail_23k.json has another schema: at its top it should have a list"):
        load_source("llava", root)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"The source llava reads llava/detail_23k.json; .* See https://"):
        load_source("llava", root)
    (root / "MIMIC-IT/TVC.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has its images in MIMIC-IT/TVC.json; .* nor as parquet beside it"):
        load_source("otter_mimicit_tvc", root)
    (root / "OCR_VQA/dataset.json").write_text(json.dumps({"0004": BOOKS["0004"]}))
    with pytest.raises(ValueError, match=r"Nothing is left of the source ocr_vqa(.|\n)*an image is not there"):
        load_source("ocr_vqa", root)


ODD_RECORDS = [None, 7, "text", [], {}, {"image": 3}, {"image": "x.jpg", "conversations": [None]}]


@pytest.mark.parametrize("record", ODD_RECORDS, ids=str)
def test_a_record_of_any_type_is_dropped_and_not_a_crash(record):
    wrapped = {"images": [record], "annotations": [record], "data": {"x": record}}
    schemas = {"coco_caption": wrapped, "minigpt4": wrapped, "ocr_vqa": {"x": record}}
    for name, source in SOURCES.items():
        contents = {
            file: schemas.get(name, wrapped if file.startswith("MIMIC-IT") else [record])
            for file in source.annotations
        }
        records = list(source.read(contents, source.images, lambda record: record))
        assert len(records) == len(contents) and all(isinstance(record.outcome, Dropped) for record in records)


def test_a_blend_takes_what_is_about_its_images():
    pair = talk((["a", "b"], "Compare.", "Same."))
    a, b = pair.images

    about = {
        image: {f"{image}{n}": talk(([str(image)], f"{image}{n}?", "Yes.")) for n in range(3)} for image in (a, b)
    }
    assert draw([a, b], {b: about[b]}, random.Random(0)) == Dropped("no LLaVA conversation about an image")
    sizes = set()
    for seed in range(99):
        drawn = draw([a, b], about, random.Random(seed))
        of_first = [name for name in drawn if name.startswith("a")]
        assert len(of_first) >= 1 and list(drawn)[: len(of_first)] == of_first
        blended = blend(pair, drawn.values())
        assert [question for _, question, _ in rounds_of(blended)] == [*(f"{name}?" for name in drawn), "Compare."]
        assert blended.images == [a, b] and rounds_of(blended)[0][0] == ["a"]
        sizes.add((len(of_first), len(drawn) - len(of_first)))
    assert sizes == {(first, second) for first in (1, 2, 3) for second in range(4)}


def test_as_many_pairs_are_blended_as_the_paper_has(tmp_path):
    """The paper's numbers by 40: 157,712 conversations about 81,479 of 118,287 images, and 70,940 pairs."""
    rng = random.Random(0)
    about = rng.sample(range(1, 2958), 2037)
    about += rng.choices(about, k=3942 - len(about))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    for file in BLEND.annotations:
        write(tmp_path, file, [])
    write(tmp_path, BLEND.annotations[0], [{"image": f"{image:012d}.jpg", "conversations": turns} for image in about])
    pairs = [rng.sample(range(1, 2958), 2) for _ in range(1773)]
    said = {"instruction": "?", "answer": "!", "rel_ins_ids": []}
    ids = {str(place): [f"CGD_IMG_{image:012d}" for image in pair] for place, pair in enumerate(pairs)}
    write(tmp_path, CGD_FILE, {"data": {place: {**said, "image_ids": pair} for place, pair in ids.items()}})
    (tmp_path / "coco/train2017").mkdir(parents=True)
    for image in range(1, 2958):
        (tmp_path / f"coco/train2017/{image:012d}.jpg").touch()
    dataset, report = load_source("llava_otter_blend", tmp_path)
    assert len(dataset) == report.conversations == sum(first in set(about) for first, _ in pairs)
    assert abs(len(dataset) / 1773 - 48869 / 70940) < 0.03
    assert (
        report.read == 3942 + 1773 == report.used + report.num_dropped == report.used + len([*report.list_dropped()])
    )
    members = Counter(where for row in dataset for where in row["members"])
    assert len(members) == report.used
    _, count, said, _ = next(reason for reason in report.reasons() if reason[0] == "reused")
    reused = [uses for uses in members.values() if uses > 1]
    assert count == len(reused) and said.endswith(f"on average, at most {max(reused)}")
    # A conversation that is dropped later takes with it only the records that no other one uses.
    for row in dataset.select(range(500)):
        report.drop(row, "later")
    rest = {where for row in dataset.select(range(500, len(dataset))) for where in row["members"]}
    assert report.used == len(rest) and report.read == report.used + report.num_dropped
    dropped = Counter((line["file"], line["record"]) for line in report.list_dropped())
    assert len(dropped) == report.num_dropped and max(dropped.values()) == 1


def test_paths_stay_under_their_folder():
    for image in ("/etc/passwd", "../x.jpg", "a/../../x.jpg"):
        record = {"image": image, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
        assert convert_llava(record, "coco") == Dropped("image path outside of its folder")
    assert Path(COCO(1)).name == "000000000001.jpg"


def test_an_id_and_an_image_that_come_twice_are_counted(tmp_path):
    root = write_published_data(tmp_path)
    path = root / "MIMIC-IT/VST_instructions.json"
    record = {"instruction": "What?", "answer": "A.", "image_ids": ["VST_IMG_1", "VST_IMG_1"], "rel_ins_ids": []}
    path.write_text('{"data": {"a": 1, "b": %s, "a": %s}}' % ((json.dumps(record),) * 2))
    dataset, report = load_source("otter_mimicit_vst", root)
    assert report.read == 3 and report.used == len(dataset) == 2
    assert report.dropped == {"an id that a later record has too": 1}
    assert report.repaired == {"an image that is named twice shown once": 2}


def write(root, file, contents):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(contents))


def test_odd_texts_never_reach_a_batch(tmp_path):
    """Literal tags, rounds without text and text that is not Unicode, in every schema that has them."""
    root = write_published_data(tmp_path)
    turns = [("human", "<image>What?"), ("gpt", "A <image> b."), ("human", "<image>"), ("gpt", "Yes.")]
    record = {"image": "000000000001.jpg", "conversations": [{"from": who, "value": text} for who, text in turns]}
    write(root, "llava/conversation_58k.json", [record])
    write(root, "aokvqa/annotations/aokvqa_v1p0_train.json", [aokvqa(choices=["<image>a", "<image>b"])])
    book = {"questions": ["Who<image>?", "<image>"], "answers": ["<image>A", "B"], "split": 1}
    write(root, "OCR_VQA/dataset.json", {"0001": book, "\ud800": book})
    images = [{"image_id": "14"}]
    dialogue = [
        {"role": "user", "content": "IMAGE#14<Img> <ImageHere></Img>17 years?", "images": images},
        {"role": "assistant", "content": "IMAGE#14<Img><ImageHere></Img>and no <image>."},
    ]
    write(root, "SparklesDialogueCC/annotations/SparklesDialogueCC.json", [{"dialogue": dialogue}])
    expected = {
        "llava_dial": [([COCO(1)], "What?", "A\nb.")],
        "aokvqa": None,
        "ocr_vqa": [(["OCR_VQA/images/0001.jpg"], "Who\n?", "A")],
        "sparkles_dialogue": [(["SparklesDialogueCC/images/14.jpg"], "Image 1 17 years?", "Image 1 and no\n.")],
    }
    for name, rounds in expected.items():
        dataset, report = load_source(name, root)
        first = next(iter(read_source(name, str(root.resolve())))).outcome
        assert rounds is None or rounds_of(first) == rounds
        assert "<image>" not in str(dataset["messages"][:]) and report.used >= 1
        DataCollatorForVisualChat(make_processor())(list(dataset))


def test_a_fault_after_a_thousand_clean_records_is_counted(tmp_path):
    root = write_published_data(tmp_path)
    answer = {"from": "gpt", "value": "!"}
    clean = {"image": "000000000001.jpg", "conversations": [{"from": "human", "value": "<image>?"}, answer]}
    faulty = {**clean, "conversations": [{"from": "human", "value": "?"}, answer]}
    write(root, "llava/conversation_58k.json", [clean] * 1500 + [faulty])
    report = load_source("llava_dial", root)[1]
    assert (report.read, report.used, report.repaired) == (1501, 1501, {"image tag repeated or missing": 1})
    write(root, "llava/conversation_58k.json", [])
    with pytest.raises(ValueError, match="Nothing is left of the source llava_dial"):
        load_source("llava_dial", root)


def test_images_of_captions_lie_in_one_folder_or_in_two(tmp_path):
    """As `test_every_record_is_accounted_for` has them in both; one that is in neither is named with both."""
    root = write_published_data(tmp_path)
    name = "COCO_val2014_000000000002.jpg"
    (root / "coco/2014/val2014" / name).unlink()
    report = load_source("coco_caption", root)[1]
    places = f"coco/2014/{name} or coco/2014/val2014/{name}"
    assert [line["image"] for line in report.list_dropped() if line["image"]] == [places]
    assert f"an image is not there (as in coco_caption/dataset.json, record 1: {places})" in str(report)
    outside = {**CAPTIONS[0], "filepath": "..", "filename": "../../secret.jpg"}
    write(root, "coco_caption/dataset.json", {"images": [CAPTIONS[0], outside]})
    report = load_source("coco_caption", root)[1]
    assert report.dropped == {"image path outside of its folder": 1} and report.used == 1
    assert [line["image"] for line in report.list_dropped()] == ["../../secret.jpg"]


def test_every_dropped_record_is_one_line(root):
    """Also each of several that form one conversation."""
    for name in SOURCES:
        report = load_source(name, root)[1]
        lines = [*report.list_dropped()]
        assert len({(line["file"], line["record"]) for line in lines}) == len(lines) == report.num_dropped
        assert {line["file"] for line in lines} <= {*SOURCES[name].annotations}
        assert all(line["image"] for line in lines if line["reason"].startswith(("an image is not", "image path")))
        assert Counter(line["reason"] for line in lines) == report.dropped


def test_a_split_may_be_text(tmp_path):
    root = write_published_data(tmp_path)
    books = {str(split): {**BOOKS["0001"], "split": split} for split in ("1", "3", None, True)}
    write(root, "OCR_VQA/dataset.json", {**books, "0001": {**BOOKS["0001"], "split": "1"}})
    report = load_source("ocr_vqa", root)[1]
    assert report.dropped == {"split 3": 1, "split None": 1, "split True": 1, "an image is not there": 1}


def test_broken_archived_images_are_named_by_their_fault(tmp_path):
    """Not base64, cut off, one pixel, null, and words that would be a path or an address."""
    root = write_published_data(tmp_path)
    good, picture = encoded(0), io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "GIF")
    values = {
        "good": good, "null": None, "cut": good[: len(good) // 2], "words": "!!!!", "empty": "",
        "pixel": base64.b64encode(picture.getvalue()).decode(),
        "path": str(root / "coco/train2017/000000000001.jpg"), "address": "http://127.0.0.1:9/a.png",
    }  # fmt: skip
    write(root, "MIMIC-IT/VST.json", values)
    record = {"instruction": "?", "answer": "!", "rel_ins_ids": []}
    data = {name: {**record, "image_ids": [name]} for name in values}
    write(root, "MIMIC-IT/VST_instructions.json", {"data": data})
    dataset, report = load_source("otter_mimicit_vst", root)
    assert dataset["images"][:] == [["MIMIC-IT/VST.json#good"]]
    assert report.dropped == {
        "an image of broken base64 text": 4, "an image that is truncated or broken": 1, "an empty image file": 1,
        "an image one pixel wide or high": 1,
    }  # fmt: skip


def test_images_that_come_or_go_are_noticed(tmp_path):
    root = write_published_data(tmp_path)
    picture = (root / "coco/train2017/000000000001.jpg").read_bytes()
    for name, file in {
        "llava": "coco/train2017/000000000099.jpg",
        "sparkles_dialogue": "SparklesDialogueVG/images/8.jpg",
        "ocr_vqa": "OCR_VQA/images/0004.jpg",
    }.items():
        before = load_source(name, root)[1].used
        (root / file).write_bytes(picture)
        assert load_source(name, root)[1].used == before + 1
    used = load_source("coco_caption", root)[1].used
    (root / "coco/2014/val2014/COCO_val2014_000000000002.jpg").unlink()
    assert load_source("coco_caption", root)[1].used == used - 1
    used = load_source("otter_mimicit_vst", root)[1].used
    write(root, "MIMIC-IT/VST.json", {f"VST_IMG_{number}": encoded(0) for number in (1, 2, 3, 77)})
    assert load_source("otter_mimicit_vst", root)[1].used == used + 1


def test_odd_names_of_images(tmp_path):
    root = write_published_data(tmp_path)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    names = ["a.json#b", ".", "", "000000000001.jpg"]
    write(root, "llava/conversation_58k.json", [{"image": name, "conversations": turns} for name in names])
    assert load_source("llava_dial", root)[1].dropped == {"image path outside of its folder": 3}
    ids = [[f"CGD_IMG_{1:012d}"] * 2, ["CGD_IMG_" + "1" * 5000]]
    data = {str(place): {"instruction": "?", "answer": "!", "image_ids": row} for place, row in enumerate(ids)}
    write(root, "MIMIC-IT/CGD_instructions.json", {"data": data})
    report = load_source("otter_mimicit_cgd", root)[1]
    assert (report.used, report.dropped) == (1, {"image id of an unknown form": 1})
    (root / "llava/conversation_58k.json").write_text(json.dumps(DIALOGUES))
    records = list(read_source("llava_otter_blend", str(root.resolve())))
    assert sum(record.num_records for record in records) == len(DETAIL) + len(REASONING) + len(DIALOGUES) + 2
    assert Dropped("no pair of images") in [record.outcome for record in records]
