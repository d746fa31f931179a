"""Streams: every conversation once, no image on both sides, the same order for the same seed; from disk and Hub."""

import base64
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.data_loader import prepare_data_loader
from conftest import draw_picture, make_processor
from datasets import Dataset
from hub_stand_in import HubStandIn
from test_custom_sources import asked, picture
from test_finetune import environment
from torch.utils.data import DataLoader

from processing_visualchat import (
    DataCollatorForVisualChat,
    DatasetSpec,
    ImageReference,
    MixtureConfig,
    load_mixture,
    pack_stream,
    stream_mixture,
)
from processing_visualchat.data.files import digest_of
from processing_visualchat.data.mixture import group


pytestmark = pytest.mark.filterwarnings("ignore:.*records? left out")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Forty conversations as JSON lines in two files, eight as parquet with images inside, and faults."""
    root = tmp_path_factory.mktemp("streamed")
    for seed in range(20):
        draw_picture(seed).save(root / f"{seed}.png")
    lines = [json.dumps(asked(f"{number % 20}.png")) for number in range(40)]
    (root / "a.jsonl").write_text("\n".join([*lines[:20], "{broken", json.dumps(asked("../x.png"))]))
    (root / "b.jsonl").write_text(
        "\n".join([*lines[20:], json.dumps(asked("gone.png")), json.dumps(asked(*["0.png"] * 9))])
    )
    rows = [{**asked("x"), "image": [{"bytes": picture(seed), "path": None}]} for seed in range(8)]
    Dataset.from_list(rows).to_parquet(root / "c.parquet")
    return root


def sources(**options):
    return (DatasetSpec("lines", "[ab].jsonl", **options), DatasetSpec("rows", "c.parquet"))


def pictures(stream):
    found = []
    for example in stream:
        for message in example["messages"]:
            for block in message["content"] if not isinstance(message["content"], str) else ():
                if block["type"] == "image":
                    found.append(ImageReference.from_block(block).open().tobytes())
    return found


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_everything_comes_once_per_pass_and_in_the_same_order_again(root, weight):
    config = MixtureConfig(sources(concatenate=2, weight=weight), eval_share=0.0, shuffle_buffer=10)
    with pytest.warns(UserWarning, match="lines: 1 record left out: {'a line that is not JSON': 1}"):
        train, evaluation = stream_mixture(config, root)
        assert evaluation is None
        first = [example["where"] for example in train]
    seen = [where for group in first for where in group]
    expected = [f"{root}/a.jsonl, line {n}" for n in range(1, 21)] + [
        f"{root}/b.jsonl, line {n}" for n in range(1, 21)
    ]
    assert sorted(seen) == sorted(int(weight) * expected + [f"{root}/c.parquet, row {n}" for n in range(8)])
    assert {len(group) for group in first} == {1, 2}
    assert [example["where"] for example in stream_mixture(config, root)[0]] == first
    other = MixtureConfig(sources(concatenate=2), seed=1, eval_share=0.0, shuffle_buffer=10)
    assert [example["where"] for example in stream_mixture(other, root)[0]] != first
    batch = DataCollatorForVisualChat(make_processor(), packing=True, max_broken=0)(list(train.take(9)))
    assert batch["input_ids"].shape[0] == 1 and len(batch["pixel_values"]) >= 9


@pytest.mark.parametrize("seed", range(3))
def test_no_image_is_on_both_sides(root, seed):
    """Also those that lie in a file here and inside of a record there."""
    train, evaluation = stream_mixture(MixtureConfig(sources(), seed=seed, eval_share=0.4), root)
    sides = [Counter(pictures(stream)) for stream in (train, evaluation)]
    assert all(sides) and not sides[0].keys() & sides[1].keys()
    assert sum(map(Counter.total, sides)) == 48


@pytest.mark.parametrize(
    ("ingredient", "message"),
    [
        (DatasetSpec("llava"), "published dataset, whose files are read whole"),
        (DatasetSpec("x", "a.jsonl", samples=0.5), "samples of x is a share"),
        (DatasetSpec("x", "a.jsonl", weight=0.5), "weight of x is 0.5, .* use a whole number of passes"),
        (DatasetSpec("x", "list.json"), "a stream reads .jsonl or .parquet or .arrow or .tar"),
    ],
    ids=["published", "share", "weight", "JSON"],
)
def test_what_a_stream_cannot_do_is_said(root, ingredient, message):
    (root / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        stream_mixture(MixtureConfig((ingredient,)), root)
    with pytest.raises(FileNotFoundError, match=r"has its images in .*nowhere"):
        stream_mixture(MixtureConfig((DatasetSpec("x", "a.jsonl", images="nowhere"),)), root)


def test_samples_are_of_the_source_and_evaluation_has_a_limit(root):
    numbered = MixtureConfig((DatasetSpec("x", "[ab].jsonl", samples=3),), eval_share=0.0)
    assert len(list(stream_mixture(numbered, root)[0])) == 3
    split = MixtureConfig((*sources(), DatasetSpec("again", "a.jsonl")), eval_share=0.5)
    assert len(list(stream_mixture(split, root, num_evaluation=4)[1])) == 4


@pytest.mark.parametrize("num_processes", [2, 4])
def test_ranks_share_out_one_order(root, num_processes):
    """As Trainer has it done; several files are not several shards."""

    def batches(count, index):
        stream = stream_mixture(MixtureConfig((DatasetSpec("x", "[ab].jsonl"),), eval_share=0.0), root)[0]
        loader = DataLoader(stream, 4 // count, collate_fn=lambda examples: [one["where"] for one in examples])
        if count > 1:
            options = {"num_processes": count, "process_index": index, "dispatch_batches": False}
            loader = prepare_data_loader(loader, put_on_device=False, **options)
        return list(loader)

    alone = batches(1, 0)
    ranks = [batches(num_processes, index) for index in range(num_processes)]
    assert [[where for batch in step for where in batch] for step in zip(*ranks)] == alone
    assert len(alone) == 10


def test_a_packed_stream_fills_rows(root):
    """Every conversation once, in rows within the limit of which all but the last of a window are full."""
    processor = make_processor()
    stream = stream_mixture(MixtureConfig(sources(), eval_share=0.0), root)[0]
    packs = list(pack_stream(stream, processor, 600))
    alone = [example["where"] for example in stream]
    assert sorted(part["where"] for pack in packs for part in pack["pack"]) == sorted(alone) and len(alone) == 48
    collator = DataCollatorForVisualChat(processor, packing=True, max_broken=0)
    lengths = [collator([pack])["input_ids"].shape[1] for pack in packs]
    assert max(lengths) <= 600 and sum(lengths) / len(lengths) > 500 > sum(lengths) / 48 * 2
    assert [pack["pack"] for pack in pack_stream(stream, processor, 600)] == [pack["pack"] for pack in packs]


def test_odd_records_and_archives_are_as_in_a_mixture(tmp_path):
    surrogate = {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "store.json").write_text(json.dumps({"k": base64.b64encode(picture(0)).decode()}))
    records = [surrogate, asked("store.json#k"), asked("store.json#none")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = MixtureConfig((DatasetSpec("x", "x.jsonl"),), eval_share=0.0)
    examples = list(stream_mixture(config, tmp_path)[0])
    mixture = load_mixture(config, tmp_path)
    assert [example["where"] for example in examples] == [[f"{tmp_path}/x.jsonl, line 2"]]
    assert [example["where"] for example in mixture.train] == [["x.jsonl, line 2"]]
    assert mixture.reports[0].dropped == {"text that is not Unicode": 1, "an image is not there": 1}
    assert len(DataCollatorForVisualChat(make_processor(), max_broken=0)(examples)["pixel_values"]) == 1


def test_a_stream_groups_and_samples_as_a_mixture_does(tmp_path):
    """The same conversations in the same groups where the order is the same, and the limits of both for any order."""
    for seed in range(9):
        draw_picture(seed).save(tmp_path / f"{seed}.png")
    records = [asked(*[f"{(number + place) % 9}.png" for place in range(number % 4)]) for number in range(60)]
    for number in range(0, 60, 7):
        records[number]["conversations"].insert(0, {"from": "system", "value": f"Be {number % 2}."})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    for weight, samples in ((1, "all"), (2, "all"), (1, 20)):
        spec = DatasetSpec("x", "x.jsonl", concatenate=3, weight=weight, samples=samples)
        config = MixtureConfig((spec,), max_images=3, eval_share=0.0, shuffle_buffer=1)
        groups = [[int(where.rpartition(" ")[2]) - 1 for where in example["where"]] for example in
                  stream_mixture(config, tmp_path)[0]]  # fmt: skip
        mixed = [where for example in load_mixture(config, tmp_path).train for where in example["where"]]
        assert sorted(Counter(number for members in groups for number in members).values()) == sorted(
            Counter(mixed).values()
        )
        rng = random.Random("0 x")
        taken = range(60 if samples == "all" else samples)
        images = [number % 4 for number in range(60)]
        systems = [number % 2 if number % 7 == 0 else None for number in range(60)]
        expected = [
            members
            for _ in range(weight)
            for members in group(taken, 3, 3, rng, images.__getitem__, systems.__getitem__)
        ]
        assert groups == expected


def test_the_side_of_an_image_is_a_rule_about_its_content(root):
    """A stream evaluates on the conversations whose images have digests below the share, and on no others."""
    config = MixtureConfig(sources(), eval_share=0.4, seed=3)
    contents = load_mixture(replace(config, eval_share=0.0), root).contents
    held_out = {
        content.digest
        for content in contents.values()
        if int(digest_of(f"3 {content.digest}".encode()), 16) < 0.4 * 2**128
    }
    train, evaluation = stream_mixture(config, root)
    for stream, is_held_out in ((train, False), (evaluation, True)):
        for example in stream:
            for block in example["messages"][0]["content"]:
                if block["type"] == "image":
                    assert (ImageReference.from_block(block).digest() in held_out) is is_held_out


FROM_THE_HUB = """
import sys
sys.path[:0] = sys.argv[1:]
from conftest import make_processor
from processing_visualchat import DataCollatorForVisualChat, DatasetSpec, MixtureConfig, stream_mixture
config = MixtureConfig((DatasetSpec("theirs", hub="user/chats"),), eval_share=0.0)
examples = list(stream_mixture(config)[0])
batch = DataCollatorForVisualChat(make_processor(), max_broken=1)(examples)
print(len(examples), len(batch["pixel_values"]))
"""


def test_the_hub_is_read_without_fetching_it_first(root, tmp_path):
    with HubStandIn() as hub:
        files = {path.name: path.read_bytes() for path in root.iterdir()}
        hub.files["user/chats"] = {**files, "test.jsonl": b"not to train on"}
        hub.files["user/chats"].pop("list.json", None)  # which another test writes
        completed = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(Path(__file__).parent)],
            env={**environment(), "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.split() == ["49", "48"]
    assert not list(tmp_path.rglob("*.parquet"))
