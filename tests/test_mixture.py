"""Mixtures: no image on both sides, nothing used twice, and the same for the same seed anywhere."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import draw_picture, make_processor
from datasets import Dataset
from published_data import encoded, write_published_data
from test_finetune import EXAMPLES, environment

from processing_visualchat import (
    DataCollatorForVisualChat,
    DatasetSpec,
    MixtureConfig,
    load_mixture,
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
        assert report.dropped == {"an image that is broken, or one pixel wide or high": 2} and report.used == 1
        assert len(list(report.list_dropped())) == 2 and report.read == 3
        assert not contents(mixture.train, root) & contents(mixture.evaluation, root)
        assert len(mixture.train) + len(mixture.evaluation) == mixture.reports[0].conversations + 1
    with pytest.raises(ValueError, match="broken, or one pixel"):
        (own / "broken.json").write_text(json.dumps(records[1:]))
        load_mixture(replace(config, sources=(DatasetSpec("mine", "own/broken.json"),)))
    with pytest.raises(FileNotFoundError, match="No data root at nowhere"):
        load_mixture(config, "nowhere")


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
    expected = {"length": count_tokens(first, processor), "num_rounds": len(first) // 2}
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
