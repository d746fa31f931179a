"""The evaluation suites: small copies in their published formats, first examples by hand, and faults."""

import io
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import draw_picture
from pyarrow import parquet

from processing_visualchat import validate_conversation
from processing_visualchat.data.images import ImageReference
from processing_visualchat.evaluation.metrics import METRICS
from processing_visualchat.evaluation.records import Example, Round, SuiteError
from processing_visualchat.evaluation.suites import SUITES, get_suite, source


def png(seed):
    buffer = io.BytesIO()
    draw_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def embedded(seed):
    """An image in a table, as `datasets` writes it."""
    return {"bytes": png(seed), "path": None}


def text(words):
    return {"type": "text", "text": words}


def inline(seed):
    return ImageReference.from_bytes(png(seed)).block()


def path(file):
    return {"type": "image", "path": str(file)}


def write_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(png(0))


def write_json(file, contents):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents))


def write_lines(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_table(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(records), file)


# What is published, in small: for each suite its file, how it is written, its records and its image files.
ORIGINAL = {
    "cats1": [
        ["Describe them.", "./eval/eval_data/images/cats/a.jpg ./eval/eval_data/images/cats/b.jpg"],
        ["Are they alike? "],
    ],
    "tech_ceos2.1aa": [["Who is it?", "./eval/eval_data/images/cats/b.jpg"]],
}
ORIGINAL_FILE = "eval/eval_data/{}.json"
MMDU = {
    "0": {
        "id": "d1",
        "image": ["/data/mmdu_pics/a.jpg", "mmdu_pics/b.jpg", "mmdu_pics/c.jpg"],
        "conversations": [
            {"from": "user", "value": "<ImageHere><ImageHere>\nCompare Image 1 with Image 2."},
            {"from": "assistant", "value": "The first is darker."},
            {"from": "user", "value": "Now <ImageHere>, please."},
            {"from": "assistant", "value": "It is bright."},
        ],
    }
}
SPARKLES = [
    {
        "evaluation_id": 7,
        "dialogue": [
            {
                "role": "user",
                "content": "Is IMAGE#12<Img><ImageHere></Img> like IMAGE#9<Img><ImageHere></Img>?",
                "images": [{"image_id": "12", "caption": "A dog."}, {"image_id": 9, "caption": "A cat."}],
            },
            {"role": "assistant", "content": "IMAGE#9's cat is not like the dog."},
            {
                "role": "user",
                "content": "And IMAGE#3<Img><ImageHere></Img> beside IMAGE#12?",
                "images": [{"image_id": "3", "caption": "A bus."}],
            },
            {"role": "assistant", "content": "IMAGE#3 shows a bus."},
        ],
    }
]
BLINK = [
    {
        "idx": "val_Counting_1", "sub_task": "Counting", "question": "How many?",
        "prompt": "How many?\nSelect from the following choices.\n(A) 1\n(B) 2", "choices": ["1", "2"],
        "answer": "(B)", "image_1": embedded(1), "image_2": embedded(2), "image_3": None, "image_4": None,
    }
]  # fmt: skip
MUIRBENCH = [
    {
        "idx": 5, "task": "Visual Retrieval", "image_relation": "Independent", "image_type": "Photography",
        "question": "Which image is like <image>?", "options": ["<image>", "<image>", "None of the choices provided"],
        "answer": "B", "image_list": [embedded(1), embedded(2), embedded(3)], "counterpart_idx": 6,
    },
    {
        "idx": 6, "task": "Counting", "image_relation": "Narrative", "image_type": "Photography",
        "question": "How many?", "options": ["One", "Two"], "answer": "A", "image_list": [embedded(1), embedded(2)],
        "counterpart_idx": 5,
    },
]  # fmt: skip
MANTIS = [
    {
        "id": "mantis_eval_0", "question_type": "multi-choice", "question": "Which is larger, <image> or that?",
        "images": [embedded(1), embedded(2)], "options": ["(A) The first", "The second"], "answer": "A",
        "data_source": "web", "category": "size",
    },
    {
        "id": "mantis_eval_1", "question_type": "short-answer", "question": "What is on <image>?",
        "images": [embedded(3)], "options": [], "answer": "a bus ", "data_source": "web", "category": "objects",
    },
]  # fmt: skip
MMIU = [
    {
        "task": task, "visual_input_component": "natural image", "source": "web",
        "options": "A: 1 0\n0 1\n\nB: the second\n", "question": "Which?", "output": output,
        "context": "Look.\nSelect from the following choices.\nA: the first\nB: the second\n",
        "input_image_path": ["./Low-level-semantic/diff/0.jpg", "./Low-level-semantic/diff/1.jpg"],
    }
    for task, output in (("forensic_detection_blink", "B"), ("spot_the_diff", "A"))
]  # fmt: skip
NLVR2 = [
    {"identifier": f"test1-4-0-{number}", "sentence": "Two dogs.", "label": label, "left_url": "x", "synset": "dog"}
    for number, label in enumerate(("True", "False"))
]
NIAH = {
    "id": 3, "images_list": ["a.jpg", "b.jpg"], "context": "Once <image> upon</s> a time. <image> The end.",
    "question": "Which image fits?", "answer": 1,
    "meta": {"placed_depth": [0.2, 0.6], "context_length": 5200, "num_images": 2, "needles": ["x"], "choices": None,
             "choices_image_path": ["c.jpg", "d.jpg"]},
}  # fmt: skip
MILEBENCH = {
    "meta_data": {"question_type": "multi-choice", "task_instruction": ["Answer.", "Choose."]},
    "data": [
        {
            "sample_id": 4, "task_instruction_id": 1, "response": "left", "image_quantity_level": "Few",
            "task_instance": {"context": "First {image#1}, then {image#2}: where?", "choice_list": ["Right", "Left"],
                              "images_path": ["a.jpg", "b.jpg"]},
        }
    ],
}  # fmt: skip

DEFAULT = {name: (ORIGINAL_FILE.format(name), write_json, ORIGINAL, ("eval/eval_data/images/cats", "a.jpg", "b.jpg"))
           for name in ("eval_single", "eval_comprehensive", "eval_robustness")}  # fmt: skip
SPARKLES_FILE = "SparklesEval/annotations/sparkles_evaluation_sparkleseval_annotations.json"
PUBLISHED = DEFAULT | {
    "mmdu": ("benchmark.json", write_json, MMDU, ("mmdu_pics", "a.jpg", "b.jpg", "c.jpg")),
    "sparkles_eval": (SPARKLES_FILE, write_json, SPARKLES, ("SparklesEval/images", "12.jpg", "9.jpg", "3.jpg")),
    "blink": ("Counting/val-00000-of-00001.parquet", write_table, BLINK, ()),
    "muirbench": ("data/test-00000-of-00001.parquet", write_table, MUIRBENCH, ()),
    "mantis_eval": ("mantis_eval/test-00000-of-00001.parquet", write_table, MANTIS, ()),
    "mmiu": ("all.json", write_json, MMIU, ("Low-level-semantic/diff", "0.jpg", "1.jpg")),
    "nlvr2": ("data/test1.json", write_lines, NLVR2, ("images/test1", "test1-4-0-img0.png", "test1-4-0-img1.png")),
    "mm_niah": (
        "mm_niah_val/annotations/reasoning-image.jsonl", write_lines, [NIAH],
        ("mm_niah_val/images", "a.jpg", "b.jpg", "c.jpg", "d.jpg"),
    ),
    "milebench": ("StateChange/StateChange.json", write_json, MILEBENCH, ("StateChange/images", "a.jpg", "b.jpg")),
}  # fmt: skip


def publish(name, root, records=None):
    """Writes the small copy of a suite, maybe with other records; returns its file."""
    file, write, own, images = PUBLISHED[name]
    if images:
        write_images(root / images[0], *images[1:])
    write(root / file, own if records is None else records)
    return root / file


def load(name, root):
    return list(get_suite(name).load(root))


def expected_first(name, root):
    """The first example of each suite, by hand."""
    letter = "Answer with the option's letter from the given choices directly."
    cats, niah, mile = (
        root / folder for folder in ("eval/eval_data/images/cats", "mm_niah_val/images", "StateChange")
    )
    if name.startswith("eval_"):
        return Example(
            "cats1",
            (
                Round((path(cats / "a.jpg"), path(cats / "b.jpg"), text("Describe them."))),
                Round((text("Are they alike?"),)),
            ),
            groups={"task": "cats"},
        )
    pictures = root / "mmdu_pics"
    vg = root / "SparklesEval/images"
    return {
        "mmdu": Example(
            "d1",
            (
                Round(
                    (path(pictures / "a.jpg"), path(pictures / "b.jpg"), text("Compare Image 1 with Image 2.")),
                    ("The first is darker.",),
                ),
                Round((text("Now "), path(pictures / "c.jpg"), text(", please.")), ("It is bright.",)),
            ),
        ),
        "sparkles_eval": Example(
            "7",
            (
                Round(
                    (text("Is "), path(vg / "12.jpg"), text(" like "), path(vg / "9.jpg"), text("?")),
                    ("Image 2's cat is not like the dog.",),
                ),
                Round((text("And "), path(vg / "3.jpg"), text(" beside Image 1?")), ("Image 3 shows a bus.",)),
            ),
        ),
        "blink": Example(
            "val_Counting_1",
            (Round((inline(1), inline(2), text(BLINK[0]["prompt"])), ("B",), ("1", "2")),),
            groups={"task": "Counting"},
        ),
        "muirbench": Example(
            "5",
            (
                Round(
                    (
                        text("Question: Which image is like "), inline(1), text("?\nChoices:\n(A) "), inline(2),
                        text("\n(B) "), inline(3),
                        text("\n(C) None of the choices provided\nHint: Please provide the correct option letter, "
                             "such as A, B, C, D, directly.\nAnswer:"),
                    ),
                    ("B",),
                    ("Image 2", "Image 3", "None of the choices provided"),
                ),
            ),
            groups={"task": "Visual Retrieval", "relation": "Independent"},
        ),
        "mantis_eval": Example(
            "mantis_eval_0",
            (
                Round(
                    (
                        inline(1), text("Which is larger, "), inline(2),
                        text(f" or that?\n(A) The first\n(B) The second\n{letter}"),
                    ),
                    ("A",),
                    ("The first", "The second"),
                ),
            ),
            groups={"task": "multi-choice", "category": "size"},
        ),
        "mmiu": Example(
            "all-0",
            (
                Round(
                    (
                        path(root / "Low-level-semantic/diff/0.jpg"), path(root / "Low-level-semantic/diff/1.jpg"),
                        text("Look.\nSelect from the following choices.\nA: the first\nB: the second\nWhich?\n"
                             "Please answer the option directly like A,B,C,D..."),
                    ),
                    ("B",),
                    ("1 0\n0 1", "the second"),
                ),
            ),
            groups={"task": "forensic_detection_blink", "relation": "Low-level-semantic"},
        ),
        "nlvr2": Example(
            "test1-4-0-0",
            (
                Round(
                    (
                        path(root / "images/test1/test1-4-0-img0.png"), path(root / "images/test1/test1-4-0-img1.png"),
                        text("The first image is the left one, the second the right one. Is this statement about them "
                             f"true?\nTwo dogs.\n(A) True\n(B) False\n{letter}"),
                    ),
                    ("A",),
                    ("True", "False"),
                ),
            ),
            groups={"label": "True"},
        ),
        "mm_niah": Example(
            "reasoning-image-3",
            (
                Round(
                    (
                        text("Once "), path(niah / "a.jpg"), text(" upon a time. "), path(niah / "b.jpg"),
                        text(" The end.\nWhich image fits?\nA. "), path(niah / "c.jpg"), text("\nB. "),
                        path(niah / "d.jpg"), text(f"\n{letter}"),
                    ),
                    ("B",),
                    ("Image 3", "Image 4"),
                ),
            ),
            groups={"task": "reasoning-image", "depth": "0.4-0.6", "context": "4k"},
        ),
        "milebench": Example(
            "StateChange-4",
            (
                Round(
                    (
                        text("Choose.\nFirst "), path(mile / "images/a.jpg"), text(", then "),
                        path(mile / "images/b.jpg"),
                        text(": where?\nChoice list: \nA. Right\nB. Left\nYour answer is:"),
                    ),
                    ("B",),
                    ("Right", "Left"),
                ),
            ),
            groups={"task": "StateChange", "category": "temporal", "image_quantity": "Few"},
        ),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_as_published(name, tmp_path):
    file = publish(name, tmp_path)
    examples = load(name, tmp_path)
    assert examples[0] == expected_first(name, tmp_path)
    assert len(examples) == len(MILEBENCH["data"] if name == "milebench" else PUBLISHED[name][2])
    assert set(SUITES[name].metrics) <= set(METRICS)
    assert [example.key for example in load(name, file)] == [example.key for example in examples]
    for example in examples:
        for each in example.rounds:
            validate_conversation([{"role": "user", "content": list(each.content)}])


def test_later_examples(tmp_path):
    """What the first ones do not show: no placeholder, a short answer, the other order, a false statement."""
    names = ("eval_robustness", "muirbench", "mantis_eval", "mmiu", "nlvr2")
    for name in names:
        publish(name, tmp_path / name)
    second = {name: load(name, tmp_path / name)[1] for name in names}
    assert second["eval_robustness"].groups == {"task": "tech_ceos"}
    assert second["muirbench"].rounds[0].content[:2] == (inline(1), inline(2)) and second["muirbench"].num_images == 2
    question = (text("What is on "), inline(3), text("?\nAnswer the question using a single word or phrase."))
    assert second["mantis_eval"].rounds == (Round(question, ("a bus",)),)
    assert second["mmiu"].rounds[0].content[2]["text"].startswith("Which?\nLook.\n")
    assert second["nlvr2"].rounds[0].references == ("B",)


def test_other_tasks_of_mm_niah(tmp_path):
    publish("mm_niah", tmp_path)
    folder = tmp_path / "mm_niah_val/annotations"
    words = NIAH | {"answer": "oak", "meta": NIAH["meta"] | {"choices_image_path": None, "placed_depth": 1.0}}
    counts = words | {"answer": [1, 0], "meta": words["meta"] | {"context_length": 900}}
    choices = NIAH | {"answer": 0, "meta": words["meta"] | {"choices": ["oak", "elm"]}}
    write_lines(folder / "reasoning-text.jsonl", [words])
    write_lines(folder / "counting-text.jsonl", [counts])
    write_lines(folder / "retrieval-image.jsonl", [choices])
    assert [example.key for example in load("mm_niah", tmp_path)] == ["reasoning-image-3", "reasoning-text-3"]
    text_task, counting, retrieval = (
        load("mm_niah", folder / f"{task}.jsonl")[0] for task in ("reasoning-text", "counting-text", "retrieval-image")
    )
    assert text_task.rounds[0].references == ("oak",) and not text_task.rounds[0].choices
    assert text_task.rounds[0].content[-1]["text"].endswith("\nAnswer the question using a single word or phrase.")
    assert text_task.groups["depth"] == "0.8-1.0"
    assert counting.rounds[0].references == ("[1, 0]",) and counting.groups["context"] == "below 1k"
    assert retrieval.rounds[0].references == ("A",) and retrieval.rounds[0].choices == ("oak", "elm")


def test_all_datasets_of_milebench_are_read_and_gpr1200_by_text(tmp_path):
    publish("milebench", tmp_path)
    shutil.copytree(tmp_path / "StateChange/images", tmp_path / "GPR1200/images")
    shutil.copytree(tmp_path / "StateChange/images", tmp_path / "ALFRED/images")
    options = [f"class {number}" for number in range(30)]
    sample = MILEBENCH["data"][0]
    many = sample | {"response": "class 27", "task_instance": sample["task_instance"] | {"choice_list": options}}
    write_json(tmp_path / "GPR1200/GPR1200.json", MILEBENCH | {"data": [many]})
    told = sample | {"response": "It goes left.", "task_instruction_id": 0}
    meta = {"question_type": "open-ended", "task_instruction": {"0": "Tell."}}
    write_json(tmp_path / "ALFRED/ALFRED.json", {"meta_data": meta, "data": [told]})
    write_json(tmp_path / "ALFRED/ALFRED_combined_1.json", {"meta_data": meta, "data": [told]})
    alfred, gpr1200, _ = load("milebench", tmp_path)
    assert alfred.key == "ALFRED-4" and alfred.rounds[0].references == ("It goes left.",)
    assert alfred.rounds[0].content[0] == text("Tell.\nFirst ") and alfred.groups["category"] == "semantic"
    assert gpr1200.rounds[0].references == ("class 27",) and gpr1200.rounds[0].choices == ()
    assert "\nclass 26\nclass 27\n" in gpr1200.rounds[0].content[-1]["text"]


def test_nlvr2_as_a_table(tmp_path):
    row = {"question_id": "test1-4-0-0", "question": "Two dogs.", "answer": "False"}
    images = {"left_image": embedded(1), "right_image": embedded(2)}
    write_table(tmp_path / "data/unbalanced_test_public-00000-of-00001.parquet", [row | images])
    write_table(tmp_path / "data/balanced_test_public-00000-of-00001.parquet", [row | images])
    (example,) = load("nlvr2", tmp_path)
    assert example.key == "test1-4-0-0" and example.rounds[0].references == ("B",)
    assert example.rounds[0].content[:2] == (inline(1), inline(2))


def test_a_suite_of_the_hub_is_downloaded_with_links(tmp_path, monkeypatch):
    """As in the cache of the Hub, whose files are links out of the snapshot."""
    publish("mmiu", tmp_path / "blobs")
    snapshot = tmp_path / "snapshots/1"
    for file in (tmp_path / "blobs").rglob("*.*"):
        link = snapshot / file.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(file, link)
    asked = []
    monkeypatch.setattr(source, "snapshot_download", lambda name, repo_type: asked.append(name) or str(snapshot))
    assert len(load("mmiu", "FanqingM/MMIU-Benchmark")) == 2 and asked == ["FanqingM/MMIU-Benchmark"]


def change(records, value, *place):
    """Records in which the value at a place is another one, or left out."""
    records = json.loads(json.dumps(records, default=lambda data: data.hex()))
    at = records
    for key in place[:-1]:
        at = at[key]
    if value is LEFT_OUT:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return records


LEFT_OUT = object()


def change_row(rows, **values):
    return [{key: value for key, value in (rows[0] | values).items() if value is not LEFT_OUT}]


FAULTS = {  # suite, records, and what the error has to say beside the file
    "original: an image that is missing": ("eval_single", change(ORIGINAL, ["a", "./images/x.jpg"], "cats1", 0), [
        "'cats1' shows", "images/x.jpg: an image is not there"]),
    "original: an image outside": ("eval_single", change(ORIGINAL, ["a", "../../../x.jpg"], "cats1", 0), [
        "'cats1' names the image ../../../x.jpg; expected a path below"]),
    "original: another round": ("eval_single", change(ORIGINAL, "Why?", "cats1", 1), [
        "'cats1' has the round 'Why?'; expected [question] or [question, image paths]"]),
    "original: another layout": ("eval_single", [1], ["has a list at its top; expected an object"]),
    "mmdu: too few images": ("mmdu", change(MMDU, ["mmdu_pics/a.jpg"], "0", "image"), [
        "'0' has 3 placeholders <ImageHere> and 1 images; expected as many"]),
    "mmdu: no images": ("mmdu", change(MMDU, LEFT_OUT, "0", "image"), [
        "'0' has no image but id, conversations; expected image as list"]),
    "mmdu: turns out of order": ("mmdu", change(MMDU, "user", "0", "conversations", 1, "from"), [
        "'0' has turns of ['user', 'user', 'user', 'assistant']; expected user and assistant in turn"]),
    "sparkles: an unknown image": ("sparkles_eval", change(SPARKLES, "See IMAGE#5.", 0, "dialogue", 3, "content"), [
        "record 0 names IMAGE#5; expected an image that was introduced"]),
    "sparkles: other images": ("sparkles_eval", change(SPARKLES, [], 0, "dialogue", 2, "images"), [
        "record 0 introduces the images ['3'] in the text and [] beside it; expected the same"]),
    "blink: an answer that is withheld": ("blink", change_row(BLINK, answer="hidden"), [
        "row 0 has the answer 'hidden'; expected a letter from A to B"]),
    "blink: an answer outside of the options": ("blink", change_row(BLINK, answer="(C)"), [
        "row 0 has the answer '(C)'; expected a letter from A to B"]),
    "blink: an unknown layout": ("blink", change_row(BLINK, prompt=LEFT_OUT), ["row 0 has no prompt but"]),
    "blink: no image": ("blink", change_row(BLINK, image_1=None, image_2=None), ["row 0 has no image"]),
    "blink: a broken image": ("blink", change_row(BLINK, image_1={"bytes": b"<html>", "path": None}), [
        "row 0 shows inline:", "an HTML page in place of an image; expected an image"]),
    "muirbench: too few images": ("muirbench", change_row(MUIRBENCH, image_list=[embedded(1)]), [
        "row 0 has 3 placeholders <image> and 1 images; expected as many"]),
    "muirbench: an empty option": ("muirbench", change_row(MUIRBENCH, options=["a", None]), [
        "row 0 has options ['a', None]; expected texts"]),
    "muirbench: more options than letters": ("muirbench", change_row(MUIRBENCH, options=["a"] * 27), [
        "row 0 has 27 options; expected at most 26"]),
    "mantis: too few images": ("mantis_eval", change_row(MANTIS, question="<image><image><image>?"), [
        "row 0 has 3 placeholders <image> and 2 images"]),
    "mantis: another type": ("mantis_eval", change_row(MANTIS, question_type="essay"), [
        "row 0 has the question_type 'essay'; expected multi-choice or short-answer"]),
    "mmiu: options without letters": ("mmiu", change(MMIU, "yes or no", 1, "options"), [
        "record 1 has the options 'yes or no'; expected lines with A:, B:"]),
    "mmiu: an answer outside of the options": ("mmiu", change(MMIU, "D", 1, "output"), [
        "record 1 has the answer 'D'; expected a letter from A to B"]),
    "nlvr2: another label": ("nlvr2", change(NLVR2, "Maybe", 1, "label"), [
        "line 2 has the label 'Maybe'; expected True or False"]),
    "nlvr2: one identifier twice": ("nlvr2", [NLVR2[0], NLVR2[0]], [
        "line 2 has the key test1-4-0-0 of", "line 1; expected one of its own"]),
    "nlvr2: missing images": ("nlvr2", change(NLVR2, "test1-9-0-0", 0, "identifier"), [
        "line 1 shows", "test1-9-0-img0.png: an image is not there"]),
    "mm_niah: too few images": ("mm_niah", [NIAH | {"images_list": ["a.jpg"]}], [
        "line 1 has 2 placeholders <image> and 1 images; expected as many"]),
    "mm_niah: an answer outside of the options": ("mm_niah", [NIAH | {"answer": 2}], [
        "line 1 has the answer 2; expected the index of one of 2 options"]),
    "mm_niah: a withheld answer": (
        "mm_niah", change([NIAH | {"answer": None}], None, 0, "meta", "choices_image_path"), [
        "line 1 has the answer None; expected text, a number or a list; those of test are withheld"]),
    "mm_niah: depths of another form": ("mm_niah", change([NIAH], [3], 0, "meta", "placed_depth"), [
        "line 1, meta has placed_depth [3]; expected numbers from 0 to 1"]),
    "milebench: too few images": (
        "milebench", change(MILEBENCH, ["a.jpg"], "data", 0, "task_instance", "images_path"), [
        "record 0 has 2 placeholders <image> and 1 images; expected as many"]),
    "milebench: an answer outside of the options": ("milebench", change(MILEBENCH, "up", "data", 0, "response"), [
        "record 0 has the response 'up'; expected one of its 2 options"]),
    "milebench: an unknown instruction": ("milebench", change(MILEBENCH, 2, "data", 0, "task_instruction_id"), [
        "record 0 has the task_instruction_id 2; expected one of 2"]),
    "milebench: another type": ("milebench", change(MILEBENCH, "essay", "meta_data", "question_type"), [
        "meta_data has the question_type 'essay'; expected open-ended or multi-choice"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_record_and_what_was_expected(fault, tmp_path):
    name, records, expected = FAULTS[fault]
    file = publish(name, tmp_path, records)
    with pytest.raises(SuiteError) as error:
        load(name, tmp_path)
    for words in (str(file), *expected):
        assert words in str(error.value)


def test_files_that_are_missing_or_broken(tmp_path, monkeypatch):
    def fault(name, root):
        with pytest.raises(SuiteError) as error:
            load(name, root)
        return str(error.value)

    assert fault("blink", tmp_path) == f"The suite blink has no file in {tmp_path}; expected val-*.parquet."
    assert fault("blink", tmp_path / "none").startswith(f"The suite blink is not at {tmp_path / 'none'}; expected")

    def offline(name, repo_type):
        raise OSError("no connection")

    monkeypatch.setattr(source, "snapshot_download", offline)
    assert "can it be downloaded from the Hub, dataset user/name." in fault("blink", "user/name")

    table = publish("blink", tmp_path)
    table.write_bytes(table.read_bytes()[:-50])
    assert f"{table} is not whole parquet" in fault("blink", tmp_path)
    lines = publish("nlvr2", tmp_path)
    lines.write_text('{"identifier": "test1-4-0-0"\n{}}\n')
    assert str(lines) in fault("nlvr2", lines)
    twice = publish("eval_single", tmp_path)
    twice.write_text('{"a": [["Why?"]], "a": [["How?"]]}')
    assert fault("eval_single", twice) == f"{twice} has the key 'a' more than once; expected one record for each."
    empty = publish("sparkles_eval", tmp_path, [])
    assert fault("sparkles_eval", empty) == f"The suite sparkles_eval has no record in {empty}; expected at least one."
    dialogues = publish("mmdu", tmp_path / "mmdu")
    shutil.rmtree(tmp_path / "mmdu/mmdu_pics")
    (tmp_path / "mmdu/mmdu_pics.zip").touch()
    assert fault("mmdu", dialogues).endswith("an image is not there; expected an image, are mmdu_pics.zip unpacked.")
    plain = tmp_path / "all.csv"
    plain.touch()
    assert fault("mmiu", plain).startswith(f"{plain} cannot be read; expected one of .jsonl, .json")
    other = tmp_path / "Other/Other.json"
    write_json(other, MILEBENCH)
    assert fault("milebench", other).startswith(f"{other} is in the folder Other; expected one of ActionLocalization")


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(ValueError, match="no suite 'blnk'; did you mean blink"):
        get_suite("blnk")


def test_examples_are_read_one_by_one(tmp_path):
    """A fault of the second record does not keep the first one back."""
    publish("mmiu", tmp_path, change(MMIU, "D", 1, "output"))
    examples = get_suite("mmiu").load(Path(tmp_path))
    assert next(examples).key == "all-0"
    with pytest.raises(SuiteError, match="record 1"):
        next(examples)
