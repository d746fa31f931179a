"""Mixtures: no image on both sides, nothing used twice, and the same for the same seed anywhere."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from conftest import make_processor
from published_data import write_published_data
from test_finetune import EXAMPLES, environment

from processing_visualchat import DataCollatorForVisualChat, Recipe, load_mixture, read_recipe, validate_conversation
from processing_visualchat.image_archives import open_archive, split_archived
from processing_visualchat.mixture import Ingredient, choose, group, split_by_image


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
            archived = split_archived(image)
            data = open_archive(str(root / archived[0]))[archived[1]] if archived else (root / image).read_bytes()
            digests.add(hashlib.sha256(data).hexdigest())
    return digests


@pytest.mark.parametrize("seed", range(6))
def test_no_image_is_on_both_sides_and_no_conversation_twice(root, seed):
    recipe = read_recipe(EXAMPLES / "configs" / "paper_set2.yaml")
    mixture = load_mixture(Recipe(recipe.sources, seed=seed, max_images=3, eval_share=0.4), root)
    assert len(mixture.train) > 0 and len(mixture.evaluation) > 0
    assert not contents(mixture.train, root) & contents(mixture.evaluation, root)
    used = Counter()
    for side in (mixture.train, mixture.evaluation):
        for example in side:
            validate_conversation(example["messages"])
            assert len(example["images"]) <= 3
            used.update(example["where"])
    assert max(used.values()) == 2  # llava's own and in the blend, which is a source of its own
    for report, ingredient in zip(mixture.reports, recipe.sources):
        assert report.name == ingredient.name and report.read == report.used + sum(report.dropped.values())
    assert sum(map(sum, mixture.sizes.values())) == len(mixture.train) + len(mixture.evaluation)
    assert str(mixture).splitlines()[-1].split() == ["all", str(len(mixture.train)), str(len(mixture.evaluation))]
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
    (report,) = load_mixture(Recipe((Ingredient("otter_mimicit_sd"),), max_images=1, eval_share=0.0), root).reports
    assert report.dropped["more than 1 images"] == 1 and report.read == report.used + sum(report.dropped.values())


def test_images_that_are_joined_stay_together():
    images = [["a", "b"], ["b", "c"], ["d"], ["e"], ["f", "g"], [], ["c"], ["h"], []]
    sides = set()
    for seed in range(30):
        is_eval = split_by_image(images, 0.4, seed)
        train, evaluation = (
            {image for row, held_out in zip(images, is_eval) if held_out is side for image in row}
            for side in (False, True)
        )
        assert not train & evaluation and is_eval[0] == is_eval[1] == is_eval[6]
        assert len(evaluation) + sum(is_eval[index] for index in (5, 8)) <= 0.4 * 10
        sides.add(tuple(is_eval))
    assert len(sides) > 5
    assert not any(split_by_image(images, 0.0, 0)) and split_by_image([], 0.5, 0) == []


def test_groups_use_everything_once_and_stay_within_limits():
    counts = [1, 2, 0, 3, 1, 1, 8, 1, 1] * 20
    groups = group(counts, 3, 4, random.Random(0))
    assert [place for places in groups for place in places] == list(range(len(counts)))
    assert all(sum(counts[place] for place in places) <= 4 or len(places) == 1 for places in groups)
    assert {len(places) for places in groups} == {1, 2, 3}
    assert group(counts, 1, 4, random.Random(0)) == [[place] for place in range(len(counts))]


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
        ("sources: [{name: llava}]\nsede: 0", "unknown key sede; there are sources, seed"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(tmp_path, text, message):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "mixture.yaml")
    with pytest.raises(FileNotFoundError, match="No mixture at"):
        read_recipe(tmp_path / "gone.yaml")


def test_the_recipes_that_come_along_are_valid():
    recipes = [
        read_recipe(path) for path in sorted((EXAMPLES / "configs").glob("*.yaml")) if "sources" in path.read_text()
    ]
    assert len(recipes) == 3
    assert [ingredient.concatenate for ingredient in recipes[1].sources] == [3, 2, 1, 1, 1, 1, 1, 1, 1]
