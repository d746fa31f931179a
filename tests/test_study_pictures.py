"""The pictures of the study: read in the layout of their packages, split without overlap, asked about rightly."""

import csv
import gzip
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_finetune import EXAMPLES, environment

from modeling_visualchat import VisualChatForConditionalGeneration


STUDY = EXAMPLES / "study"
CAPTIONS = {
    "animals/cats/lion.png": "A happy lion!",
    "animals/birds/hen.png": "A brown hen.",
    "animals/wombat.png": "A wombat.",
    "animals/cartoon/tux.png": "Tux and spider - two friends.",
    "clothes/t_pants.png": "A pair of pants.",
    "food/fuji.png": "A “Fuji” apple.",
    "food/fruit/peahen.png": "An apricot (a fruit, not a stone).",
    "vehicles/nothing.png": None,
    "symbols/a.png": "A letter.",
}
CONCEPTS = ["lion", "chicken", "wombat", "trousers", "apple", "apricot"]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import picture_tasks
    import pictures

    return pictures, picture_tasks


@pytest.fixture
def paths(tmp_path):
    """A few pictures of each source, in the layout of its package."""
    cut_out = Image.new("RGBA", (40, 20))
    cut_out.paste((200, 0, 0, 255), (10, 5, 30, 15))
    for name, caption in CAPTIONS.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_out.save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=Autre chose.\n", encoding="utf-8")
    (tmp_path / "emojione").mkdir()
    for code in ("1F981", "1F414", "1F34E", "2708"):  # lion, chicken, apple, airplane
        cut_out.save(tmp_path / "emojione" / f"{code}.png")
    (tmp_path / "garments").mkdir()
    labels = np.arange(60, dtype=np.uint8) % 10
    scans = np.random.default_rng(0).integers(1, 256, (60, 28, 28), dtype=np.uint8)
    for name, header, array in (("labels-idx1", 8, labels), ("images-idx3", 16, scans)):
        with gzip.open(tmp_path / "garments" / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + array.tobytes())
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return {"noto": font, "openmoji": font} | {each: tmp_path / each for each in ("stamps", "emojione", "garments")}


def test_a_caption_names_a_concept_or_a_thing_of_its_own(study, paths):
    pictures, _ = study
    stamps = {picture.key: picture for picture in pictures.read_stamps(paths["stamps"])}
    named = [key for key in CAPTIONS if key in stamps]
    assert [stamps[key].concept for key in named] == CONCEPTS
    assert [stamps[key].kind for key in named] == ["animal", "animal", "animal", "garment", "food", "food"]
    assert len(stamps) == len(named)  # neither a picture without a caption or a thing, nor a letter


def test_pictures_are_drawn_the_same_again_and_inside(study, paths):
    pictures, _ = study
    loaded = pictures.load_pictures(paths)
    assert {picture.style for picture in loaded} == set(pictures.SOURCES)
    for picture in [next(each for each in loaded if each.style == style) for style in pictures.SOURCES]:
        first, other = picture.render(0), picture.render(1)
        assert first.size == (224, 224) and first.mode == "RGB"
        assert first.tobytes() == picture.render(0).tobytes() != other.tobytes()
        ground = np.asarray(first)[0, 0]
        assert (np.asarray(first) != ground).any() and ground.min() >= 190


def test_a_digit_is_never_mirrored(study):
    """A wedge, high at its left."""
    pictures, _ = study
    wedge = Image.new("RGBA", (60, 60))
    ImageDraw.Draw(wedge).polygon([(0, 0), (0, 60), (60, 60)], fill=(0, 0, 0, 255))
    for kind, expected in (("digit", {True}), ("animal", {True, False})):
        picture = pictures.Picture("nine", kind, "digits", "9/0", lambda: wedge)
        drawn = [np.asarray(picture.render(variant).convert("L")) < 128 for variant in range(20)]
        columns = [np.flatnonzero(each.any(axis=0)) for each in drawn]
        left = {bool(each[:, where[0]].sum() > each[:, where[-1]].sum()) for each, where in zip(drawn, columns)}
        assert left == expected


def test_no_picture_concept_or_style_is_on_both_sides(study, paths):
    pictures, _ = study
    loaded = pictures.load_pictures(paths)
    splits = pictures.split_pictures(loaded)
    keys = {split: {(each.style, each.key) for each in of_split} for split, of_split in splits.items()}
    for split, others in (("train", ("test", "concept", "style")), ("test", ("concept", "style"))):
        assert not any(keys[split] & keys[other] for other in others)
    concepts = {split: {(each.kind, each.concept) for each in of_split} for split, of_split in splits.items()}
    assert concepts["test"] <= concepts["train"] and not concepts["concept"] & concepts["train"]
    assert concepts["style"] <= concepts["train"]
    assert {each.style for each in splits["style"]} == {"openmoji"}
    assert "openmoji" not in {each.style for split in ("train", "test", "concept") for each in splits[split]}
    assert all(splits.values()) and splits == pictures.split_pictures(loaded)
    assert splits != pictures.split_pictures(loaded, seed=1)


def answer_from(question, shown):
    """The answer to a question, from its words and the pictures so far."""
    places = [int(number) - 1 for number in re.findall(r"image (\d)", question)]
    kinds, concepts = [each.kind for each in shown], [each.concept for each in shown]
    numbers = ["zero", "one", "two", "three", "four"]
    last = question.rstrip("?").split()[-1]
    if question.startswith("what is"):
        return concepts[places[0]]
    if question.startswith("what do"):
        return ", ".join(concepts)
    if question.startswith("what kind"):
        return kinds[places[0]]
    if question.startswith("which image shows"):
        (place,) = [place for place, name in enumerate(concepts) if question == f"which image shows {name}?"]
        return f"image {place + 1}"
    if question.startswith("which is of the kind"):
        (place,) = [place for place in range(len(kinds)) if place not in places and kinds[place] == kinds[places[0]]]
        return f"image {place + 1}"
    if question == "how many images?":
        return numbers[len(shown)]
    if question.startswith("how many"):
        return numbers[kinds.count(last)]
    return "yes" if kinds[places[0]] == kinds[places[1]] else "no"


def test_every_question_has_its_answer(study, paths):
    pictures, tasks = study
    splits = pictures.split_pictures(pictures.load_pictures(paths))
    for name, task in tasks.TASKS.items():
        answers = set()
        for seed in range(200):
            rng = random.Random(seed)
            rounds = task.draw(rng, tasks.Deck(splits["train"]), rng.choice(task.sizes))
            shown = []
            for pictures_of_round, (question, answer) in rounds:
                shown += pictures_of_round
                assert answer == answer_from(question, shown), (name, question)
            answers.add(rounds[-1][1][1])
        assert len(answers) > 1
    conversations = tasks.PictureConversations(splits["train"], 32, 0, batch_size=4)
    for index in range(32):
        shown = []
        for pictures_of_round, (question, answer) in conversations.draw(index)[0]:
            shown += pictures_of_round
            assert answer == answer_from(question, shown), question
    sizes = {sum(len(shown) for shown, _ in conversations.draw(index)[0]) for index in range(4)}
    assert len(sizes) == 1  # of one batch


def test_conversations_repeat_and_can_do_without_images(study, paths):
    pictures, tasks = study
    train = pictures.split_pictures(pictures.load_pictures(paths))["train"]
    first, again = (tasks.PictureConversations(train, 8, 0) for _ in range(2))
    texts = tasks.PictureConversations(train, 8, 0, has_images=False)
    for index in range(8):
        assert first[index] == again[index]
        without = [block for message in texts[index]["messages"][::2] for block in message["content"]]
        assert {block["type"] for block in without} == {"text"}
    tested = tasks.PictureConversations(train, 1, 0, "back")[0]["messages"]
    assert [message["weight"] for message in tested[1::2]] == [0] * (len(tested) // 2 - 1) + [1]


@pytest.mark.slow
def test_a_quick_run_trains_real_parts_on_pictures_and_its_checkpoint_chats(study, paths, tmp_path):
    """Two steps, and two questions a task."""
    cut_out = Image.new("RGBA", (40, 20), (0, 80, 200, 255))
    for kind, folder in (("animal", "animals"), ("food", "food")):  # enough for four of a kind among held-out ones
        for name, emoji in list(concepts_of(kind).items())[:9]:
            path = paths["stamps"] / folder / f"a_{name}.png"
            cut_out.save(path)
            path.with_suffix(".txt").write_text(f"A {name}.\n", encoding="utf-8")
            cut_out.save(paths["emojione"] / f"{ord(emoji[0]):04X}.png")
    command = [sys.executable, str(STUDY / "pretrained.py"), "--quick", "--output", tmp_path, "--parts", tmp_path]
    pictures_of = [f"{name}={path}" for name, path in paths.items()]
    command += ["--save", tmp_path / "checkpoints", "--pictures", *pictures_of]
    run = subprocess.run([*command, "--arms", "mmca, joint, half"], capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr[-2000:]
    _, tasks = study
    with (tmp_path / "pretrained_quick.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["arm"] == "mmca, joint, half" and all(0 <= float(line[name]) <= 1 for name in tasks.TESTS)
    assert 0 < int(line["trained_parameters"]) < int(line["parameters"])
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "checkpoints" / "mmca-joint-half-0")
    assert (model.config.merge, model.config.image_scope) == ("joint", "half")
    command = [sys.executable, str(STUDY / "demo.py"), tmp_path / "checkpoints" / "mmca-joint-half-0", "--chats", "1"]
    command += ["--max_new_tokens", "3", "--output", tmp_path / "demo.png", "--pictures"]
    run = subprocess.run([*command, *pictures_of], capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr[-2000:]
    assert "of 11 answers are those expected" in run.stdout and (tmp_path / "demo.png").stat().st_size > 0


def concepts_of(kind):
    from concepts import CONCEPTS

    return CONCEPTS[kind]


def test_a_missing_package_is_named(tmp_path, study, monkeypatch, capsys):
    for flags, message in (
        (["--pictures", f"stamps={tmp_path / 'none'}"], "apt install tuxpaint-stamps-default"),
        (["--pictures", "stamp=x"], "--pictures names stamp; wanted is SOURCE=PATH, of stamps, noto"),
    ):
        monkeypatch.setattr(sys, "argv", ["pretrained.py", *flags])
        with pytest.raises(SystemExit) as refused:
            runpy.run_path(str(STUDY / "pretrained.py"), run_name="__main__")
        assert refused.value.code == 2 and message in capsys.readouterr().err
