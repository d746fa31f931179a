"""Mixtures: no image on both sides, nothing used twice, and the same for the same seed anywhere."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from conftest import draw_picture, make_processor
from datasets import Dataset
from PIL import Image
from published_data import encoded, write_published_data
from test_finetune import EXAMPLES, environment

from processing_visualchat import (
    DataCollatorForVisualChat,
    DatasetSpec,
    MixtureConfig,
    load_mixture,
    load_source,
    measure_lengths,
    pack_conversations,
    read_mixture_config,
    validate_conversation,
)
from processing_visualchat.data.image_contents import read_image_contents
from processing_visualchat.data.images import ImageReference
from processing_visualchat.data.lengths import count_tokens
from processing_visualchat.data.mixture import choose, group


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_published_data(tmp_path_factory.mktemp("data"))
    # The same picture under another name, in another source.
    (root / "SparklesDialogueVG/images/7.jpg").write_bytes((root / "coco/train2017/000000000003.jpg").read_bytes())
    return root


def contents(mixed, root):
    digests = set()
    for example in mixed:
        for image in example["images"]:
            digests.add(hashlib.sha256(ImageReference.parse(image).under(root).read()).hexdigest())
    return digests


@pytest.mark.parametrize("seed", range(6))
def test_no_image_is_on_both_sides_and_no_conversation_twice(root, seed):
    config = read_mixture_config(EXAMPLES / "configs" / "paper_set2.yaml")
    mixture = load_mixture(MixtureConfig(config.sources, seed=seed, max_images=3, eval_share=0.4), root)
    assert len(mixture.train) > 0 and len(mixture.evaluation) > 0
    assert not contents(mixture.train, root) & contents(mixture.evaluation, root)
    used = Counter()
    for side in (mixture.train, mixture.evaluation):
        for example in side:
            validate_conversation(example["messages"])
            assert len(example["images"]) <= 3
            used.update(example["where"])
    assert max(used.values()) == 2  # llava's own and in the blend, which is a source of its own
    for report, ingredient in zip(mixture.reports, config.sources):
        assert report.name == ingredient.name and report.read == report.used + sum(report.dropped.values())
    assert sum(map(sum, mixture.sizes.values())) == len(mixture.train) + len(mixture.evaluation)
    assert str(mixture).splitlines()[-1].split()[-2:] == [str(len(mixture.train)), str(len(mixture.evaluation))]
    batch = DataCollatorForVisualChat(make_processor())([mixture.train[0], mixture.evaluation[0]])
    assert len(batch["input_ids"]) == 2


ANYWHERE = """
import json, sys
from processing_visualchat import load_mixture
mixture = load_mixture(sys.argv[1], sys.argv[2])
print(json.dumps([[example["where"] for example in side] for side in (mixture.train, mixture.evaluation)]))
"""


def test_the_same_seed_gives_the_same_mixture_in_any_process(root):
    command = [sys.executable, "-c", ANYWHERE, str(EXAMPLES / "configs" / "paper_set1.yaml"), str(root)]
    outputs = []
    for hash_seed in ("1", "2"):
        completed = subprocess.run(
            command, capture_output=True, text=True, env={**environment(), "PYTHONHASHSEED": hash_seed}, timeout=100
        )
        assert completed.returncode == 0, completed.stderr[-2000:]
        outputs.append(json.loads(completed.stdout.splitlines()[-1]))
    here = load_mixture(EXAMPLES / "configs" / "paper_set1.yaml", root)
    assert outputs == 2 * [[[example["where"] for example in side] for side in (here.train, here.evaluation)]]


def test_too_many_images_are_counted_as_dropped(root):
    (report,) = load_mixture(
        MixtureConfig((DatasetSpec("otter_mimicit_sd"),), max_images=1, eval_share=0.0), root
    ).reports
    assert report.dropped["more than 1 images"] == 1 and report.read == report.used + sum(report.dropped.values())


def test_own_conversations_mix_with_published_ones(root, tmp_path):
    """A picture of COCO under another name stays on one side; broken and thin images are found."""
    own = root / "own"
    own.mkdir(exist_ok=True)
    shutil.copy(root / "coco/train2017/000000000001.jpg", own / "mine.png")
    draw_picture(50, (1, 7)).save(own / "thin.png")
    (own / "cut.jpg").write_bytes((own / "mine.png").read_bytes()[:300])
    records = [
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}], "image": image}
        for image in ("mine.png", "thin.png", "cut.jpg")
    ]
    (own / "data.json").write_text(json.dumps(records))
    (tmp_path / "mixture.yaml").write_text(
        f"data_root: {root}\nmax_images: 4\neval_share: 0.3\n"
        "sources: [{name: llava_dial}, {name: mine, path: own/data.json}]"
    )
    config = read_mixture_config(tmp_path / "mixture.yaml")
    for seed in range(4):
        mixture = load_mixture(replace(config, seed=seed))
        report = mixture.reports[1]
        faults = {"an image one pixel wide or high": 1, "an image that is truncated or broken": 1}
        assert report.dropped == faults and report.used == 1
        assert len(list(report.list_dropped())) == 2 and report.read == 3
        assert not contents(mixture.train, root) & contents(mixture.evaluation, root)
        assert len(mixture.train) + len(mixture.evaluation) == mixture.reports[0].conversations + 1
    with pytest.raises(ValueError, match="an image one pixel wide or high"):
        (own / "broken.json").write_text(json.dumps(records[1:]))
        load_mixture(replace(config, sources=(DatasetSpec("mine", "own/broken.json"),)))
    with pytest.raises(FileNotFoundError, match="No data root at nowhere"):
        load_mixture(config, "nowhere")


def asked(image=None, question="What?"):
    turns = [{"from": "human", "value": f"<image>{question}" if image else question}, {"from": "gpt", "value": "x"}]
    return {"conversations": turns, **({"image": image} if image else {})}


def load_records(folder, records, check_images=True, **options):
    """The sides of records, and the report; the evaluation has three tenths."""
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = MixtureConfig((DatasetSpec("x", "x.jsonl"),), **{"eval_share": 0.3, **options})
    mixture = load_mixture(config, folder, check_images)
    return *(
        [where for example in side for where in example["where"]] for side in (mixture.train, mixture.evaluation)
    ), mixture


def test_the_same_pixels_in_another_format_are_one_image(tmp_path):
    """Saved anew, and inside a record; without a look at the images, files are told apart by their bytes."""
    records = []
    for number in range(40):
        picture = draw_picture(number, (12, 12))
        for suffix in ("png", "bmp", "tiff"):
            picture.save(tmp_path / f"{number}.{suffix}")
        inline = base64.b64encode((tmp_path / f"{number}.tiff").read_bytes()).decode()
        records += [asked(f"{number}.png"), asked(f"{number}.bmp"), asked(f"data:image/tiff;base64,{inline}")]
    train, evaluation, mixture = load_records(tmp_path, records)
    number_of = {f"x.jsonl, line {line}": (line - 1) // 3 for line in range(1, 121)}
    sides = [{number_of[where] for where in side} for side in (train, evaluation)]
    assert len(train) + len(evaluation) == 120 and len(sides[1]) == 12 and not sides[0] & sides[1]
    assert len({content.digest for content in mixture.contents.values()}) == 40
    mixture = load_records(tmp_path, records[::3] + records[1::3], check_images=False)[2]
    assert len({content.digest for content in mixture.contents.values()}) == 80


def test_the_same_text_is_on_one_side(tmp_path):
    records = [asked(question=f"{number % 40}?") for number in range(80)]
    train, evaluation, _ = load_records(tmp_path, records)
    sides = [{int(where.split()[-1]) % 40 for where in side} for side in (train, evaluation)]
    assert len(evaluation) == 24 and not sides[0] & sides[1]


def test_each_fault_of_an_image_has_its_reason(tmp_path):
    """Each dropped record is one line, which names file, record, image and reason."""
    draw_picture(0).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    encoded_good = base64.b64encode(good).decode()
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    draw_picture(0, (1, 9)).save(tmp_path / "thin.png")
    (tmp_path / "folder.png").mkdir()
    files = {
        "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(99),
        "drawn.svg": b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "page.jpg": b"\n<!DOCTYPE html><html>404</html>",
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\n",
        "empty.png": b"", "cut.png": good[:60], "words.png": b"words",
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    expected = {
        "heic.jpg": "an image in HEIC", "drawn.svg": "an image in SVG", "page.jpg": "an HTML page",
        "lfs.png": "a Git LFS pointer", "empty.png": "an empty image file", "cut.png": "an image that is truncated",
        "words.png": "a file in place of an image", "bomb.png": "an image with too many pixels",
        "thin.png": "an image one pixel wide", "folder.png": "a folder in place of an image",
        "gone.png": "an image is not there", encoded_good + "!" + encoded_good * 3: "an image of broken base64",
        "data:image/png;base64,!!": "an image of broken base64", "../out.png": "image path outside of its folder",
    }  # fmt: skip
    (tmp_path / "x.jsonl").touch()
    lines = [json.dumps(asked(image)).encode() for image in expected] + ['{"messages": "é"}'.encode("latin-1"), b"{"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines, json.dumps(asked("good.png")).encode()]))
    mixture = load_mixture(MixtureConfig((DatasetSpec("x", "x.jsonl"),), eval_share=0.0), tmp_path)
    dropped = {line["record"]: line for line in mixture.reports[0].list_dropped()}
    for number, (image, reason) in enumerate(expected.items(), start=1):
        line = dropped.pop(f"line {number}")
        assert line["reason"].startswith(reason), line
        assert line["file"] == "x.jsonl" and (line["image"] == image or len(image) > 20)
    assert [line["reason"] for line in dropped.values()] == ["a line that is not UTF-8", "a line that is not JSON"]
    assert len({*expected.values()}) == 13 and mixture.reports[0].used == 1


def list_cache():
    return {path: path.stat().st_mtime_ns for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")}


def test_what_lies_beside_the_data_does_not_invalidate_its_cache(root, tmp_path, monkeypatch):
    """A page of the doctor, a checkpoint; only what is read counts, and the cache does not grow."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [asked(f"pictures/{number}.png") for number in range(9)] + [asked("pictures/gone.png")]
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for number in range(9):
        draw_picture(number).save(folder / f"pictures/{number}.png")

    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, records)))

    def start():
        mixture = load_mixture(MixtureConfig((DatasetSpec("x", "x.jsonl"),)), folder)
        load_source("llava", root)
        load_source("otter_mimicit_vst", root)
        pack_conversations(measure_lengths(mixture.train, make_processor()), 500)
        return mixture.reports[0].used, list_cache()

    used, cache = start()
    assert used == 9 and cache
    for place in (folder, folder / "pictures", root, root / "coco/train2017"):
        for name in ("visualchat-doctor/report.html", "checkpoint-1/config.json", "notes.json", "x.png"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("{}")
    assert start() == (9, cache)
    draw_picture(9).save(folder / "pictures/gone.png")
    used, more = start()
    assert used == 10 and more != cache
    (folder / "pictures/gone.png").unlink()
    for turn in range(4):  # what has changed is replaced
        os.utime(folder / "x.jsonl", (turn, turn))
        used, again = start()
        rows = [path for path in again if "visualchat-lengths" not in path.name]
        assert used == 9 and len(rows) <= len(more)
    assert start()[1] == again


def test_what_is_dropped_takes_no_place_in_the_split(tmp_path):
    """Ninety images of one conversation that is too long do not fill the share of the evaluation."""
    for number in range(100):
        draw_picture(number).save(tmp_path / f"{number}.png")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]
    records = [{"conversations": turns, "images": [f"{number}.png"]} for number in range(10)]
    records.append({"conversations": turns, "images": [f"{number}.png" for number in range(10, 100)]})
    (tmp_path / "x.json").write_text(json.dumps(records))
    mixture = load_mixture(MixtureConfig((DatasetSpec("x", "x.json"),), eval_share=0.1), tmp_path)
    assert (len(mixture.train), len(mixture.evaluation)) == (9, 1)
    few = DatasetSpec("x", "x.json", samples=0.01, weight=0.01)
    assert len(load_mixture(MixtureConfig((few,), eval_share=0.0), tmp_path).train) == 1


def test_only_conversations_with_the_same_system_message_are_joined(tmp_path):
    def record(system):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
        return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}

    (tmp_path / "x.json").write_text(json.dumps([record(system) for system in ["A"] * 20 + ["B"] * 20 + [""] * 20]))
    mixture = load_mixture(MixtureConfig((DatasetSpec("x", "x.json", concatenate=3),), eval_share=0.0), tmp_path)
    rounds = 0
    for example in mixture.train:
        validate_conversation(example["messages"])
        rounds += sum(message["role"] == "user" for message in example["messages"])
    assert rounds == 60 > len(mixture.train)


def test_an_archive_that_is_parquet_is_read_anew_when_it_changes(tmp_path):
    digests = set()
    for seed in range(2):
        Dataset.from_dict({"id": ["k"], "base64": [encoded(seed)]}).to_parquet(tmp_path / "A.parquet")
        digests.add(read_image_contents(["A.json#k"], tmp_path)["A.json#k"].digest)
    assert len(digests) == 2


def test_weights_say_how_often_an_epoch_goes_through_a_source(root):
    def count(weight, **options):
        ingredient = DatasetSpec("llava", weight=weight, **options)
        mixture = load_mixture(MixtureConfig((ingredient,), eval_share=0.4), root)
        return Counter(where for example in mixture.train for where in example["where"]), len(mixture.evaluation)

    once, num_eval = count(1)
    assert set(once.values()) == {1} and num_eval > 0 and len(once) >= 1
    assert count(3) == (Counter(dict.fromkeys(once, 3)), num_eval)
    assert count(3, concatenate=2)[0] == Counter(dict.fromkeys(once, 3))
    more, _ = count(2.5)
    assert sum(more.values()) == 2 * len(once) + round(0.5 * len(once)) and set(more.values()) <= {2, 3}
    assert sum(count(0.5)[0].values()) == round(0.5 * len(once))


def test_a_measured_mixture_packs(root):
    processor = make_processor()
    mixture = load_mixture(EXAMPLES / "configs" / "paper_set2.yaml", root)
    measured = measure_lengths(mixture.train, processor)
    first = mixture.train[0]["messages"]
    answers = "".join(message["content"] for message in first[1::2]).encode()
    num_trained = len(answers) + 2 * (len(first) // 2)  # the space before and the token after each
    expected = {"length": count_tokens(first, processor), "num_trained": num_trained, "num_rounds": len(first) // 2}
    assert measured[0] == {**mixture.train[0], **expected}
    assert [len(example["images"]) for example in measured] == measured["num_images"][:]
    packs = pack_conversations(measured, 900)
    seen = [tuple(example["where"]) for pack in packs for example in pack["pack"]]
    assert sorted(seen) == sorted(tuple(example["where"]) for example in mixture.train)
    assert len(packs) < len(mixture.train)
    batch = DataCollatorForVisualChat(processor, 900, "skip", packing=True)([packs[0]])
    assert batch["input_ids"].shape == (1, packs[0]["length"])


def test_groups_use_everything_once_and_stay_within_limits():
    counts = [1, 2, 0, 3, 1, 1, 8, 1, 1] * 20
    groups = list(group(range(len(counts)), 3, 4, random.Random(0), counts.__getitem__))
    assert [place for places in groups for place in places] == list(range(len(counts)))
    assert all(sum(counts[place] for place in places) <= 4 or len(places) == 1 for places in groups)
    assert {len(places) for places in groups} == {1, 2, 3}
    alone = group(range(len(counts)), 1, 4, random.Random(0), counts.__getitem__)
    assert list(alone) == [[place] for place in range(len(counts))]


def test_samples_are_all_a_number_or_a_share():
    for samples, expected in {"all": 10, 3: 3, 30: 10, 0.25: 2, 1.0: 10}.items():
        chosen = choose(range(10), samples, random.Random(0))
        assert len(set(chosen)) == len(chosen) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "is not YAML"),
        ("- 1", "is not a mapping"),
        ("seed: 1", "needs a list of sources"),
        ("sources: []", "A mixture needs sources"),
        ("sources: [{name: lava}]", "There is no source 'lava'. Did you mean llava"),
        ("sources: [{samples: 1}]", "has no name"),
        ("sources: [{name: llava, weigth: 1}]", "unknown key weigth; there are name, path, hub, revision"),
        ("sources: [{name: llava, samples: 1.5}]", "use all, a number, or a share between 0 and 1"),
        ("sources: [{name: llava, samples: none}]", "samples of llava is 'none'"),
        ("sources: [{name: llava, concatenate: 0}]", "use a number from 1 up"),
        ("sources: [{name: llava}, {name: llava}]", "names llava more than once"),
        ("sources: [{name: llava}]\neval_share: 1", "eval_share is 1; use a share from 0 to below 1"),
        ("sources: [{name: llava}]\nmax_images: 0", "max_images is 0; use a number from 1 up"),
        ("sources: [{name: llava, weight: 0}]", "weight of llava is 0; use a number above 0"),
        ("sources: [{name: llava, images: x}]", "llava is a published source; it takes no images"),
        ("sources: [{name: llava, path: x}]", "llava is the name of a published source"),
        ("sources: [{name: llava}]\nsede: 0", "unknown key sede; there are sources, seed"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(tmp_path, text, message):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mixture_config(tmp_path / "mixture.yaml")
    with pytest.raises(FileNotFoundError, match="No mixture at"):
        read_mixture_config(tmp_path / "gone.yaml")


def test_the_configs_that_come_along_are_valid():
    configs = [
        read_mixture_config(path)
        for path in sorted((EXAMPLES / "configs").glob("*.yaml"))
        if "sources" in path.read_text()
    ]
    assert len(configs) == 3
    assert [ingredient.concatenate for ingredient in configs[1].sources] == [3, 2, 1, 1, 1, 1, 1, 1, 1]
