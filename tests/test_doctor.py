"""The doctor on real processes and files: every record accounted for, and nothing that is wrong kept back."""

import json
import re
import subprocess
import sys

import pytest
from conftest import draw_picture, make_processor
from published_data import write_published_data
from test_finetune import EXAMPLES, environment

from processing_visualchat import DatasetSpec, MixtureConfig, load_mixture
from processing_visualchat.data.tables import format_table
from processing_visualchat.doctor.diagnosis import compare_images, examine
from processing_visualchat.doctor.samples import draw_sample


PAPER = EXAMPLES / "configs" / "paper_set2.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_published_data(tmp_path_factory.mktemp("data"))


def run_doctor(*flags, cwd):
    command = [sys.executable, "-m", "processing_visualchat.doctor", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=200)


def test_the_paper_mixture_is_read_and_written_down(root, tmp_path):
    completed = run_doctor(PAPER, "--data_root", root, "--samples", 9, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-2000:]
    rows = [line.split() for line in completed.stdout.splitlines()]
    counts = {row[0]: list(map(int, row[1:])) for row in rows if len(row) == 7 and row[1].isdigit()}
    assert set(counts) == {ingredient.name for ingredient in load_mixture(PAPER, root).reports} | {"all"}
    for read, used, repaired, dropped, _, _ in counts.values():
        assert read == used + dropped and repaired <= used
    # By hand: eight records in the two files, of which five and three are there, four of them of no use.
    assert counts["llava"][:4] == [8, 4, 2, 4]
    assert ["random", "order,", "padded"] in [row[:3] for row in rows] and ["packed"] in [row[:1] for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "visualchat-doctor/dropped.jsonl").read_text().splitlines()]
    assert {"source": "llava", "where": "llava/detail_23k.json, record 3", "reason": "an image is not there"} in lines
    assert len(lines) == counts["all"][3]
    page = (tmp_path / "visualchat-doctor/report.html").read_text()
    assert page.count('class="sample"') == 9 and page.count("data:image/png;base64,") == 1
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert " A dog.&lt;/s&gt;" in marked and not any("Question" in text for text in marked)
    assert "http" not in re.sub(r"title=\"[^\"]*\"", "", page).replace("https://", "http://").split("<h2>Terms")[0]


def test_strictness_and_what_cannot_be_read_are_exit_statuses(root, tmp_path):
    strict = run_doctor(PAPER, "--data_root", root, "--strict", "--skip_images", cwd=tmp_path)
    assert strict.returncode == 1 and "records are dropped, and --strict allows none" in strict.stderr
    nothing = run_doctor("nowhere.yaml", cwd=tmp_path)
    assert nothing.returncode == 2 and "doctor: error: No mixture at nowhere.yaml" in nothing.stderr
    (tmp_path / "clean.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]})
    )
    clean = run_doctor("clean.jsonl", "--strict", cwd=tmp_path)
    assert clean.returncode == 0, clean.stderr[-2000:]
    assert "1 conversations to train on" in clean.stdout
    (tmp_path / "llava").mkdir()  # a folder may have the name of a published source
    (tmp_path / "clean.jsonl").rename(tmp_path / "llava" / "data.jsonl")
    assert run_doctor("llava", cwd=tmp_path).returncode == 0


def test_one_run_finds_all_sources_that_are_missing(root, tmp_path):
    (tmp_path / "mixture.yaml").write_text(
        "sources: [{name: llava_dial}, {name: mine, path: gone.jsonl}, {name: theirs, path: gone.json}]"
    )
    diagnosis = examine(tmp_path / "mixture.yaml", root)
    assert set(diagnosis.failures) == {"mine", "theirs"} and len(diagnosis.problems) == 2
    assert [report.name for report in diagnosis.mixture.reports] == ["llava_dial"]
    assert "PROBLEM: mine cannot be read: The source mine has no file at" in str(diagnosis)
    draw_picture(0, (1, 5)).save(root / "thin.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    (root / "thin.json").write_text(json.dumps([{"conversations": turns, "image": "thin.png"}]))
    thin = examine(MixtureConfig((DatasetSpec("thin", "thin.json"), DatasetSpec("llava_dial"))), root)
    assert list(thin.failures) == ["thin"] and [report.name for report in thin.mixture.reports] == ["llava_dial"]
    with pytest.raises(ValueError, match=r"No source can be read.*\n.*gone.jsonl"):
        examine(MixtureConfig((DatasetSpec("mine", "gone.jsonl"),)), root)


def test_images_on_both_sides_and_duplicates_are_found_by_content(tmp_path):
    for name in ("a", "b", "c", "d"):
        draw_picture(int(name in "cd") + int(name == "d")).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    records = [{"conversations": turns, "image": f"{name}.png"} for name in "abcd"]
    (tmp_path / "x.json").write_text(json.dumps(records))
    config = MixtureConfig((DatasetSpec("mine", "x.json"),), eval_share=0.0)
    mixture = load_mixture(config, tmp_path)
    assert compare_images(mixture) == ([["a.png", "b.png"]], [])
    order = [example["images"][0] for example in mixture.train]
    mixture.evaluation = mixture.train.select([order.index("b.png"), order.index("c.png")])
    mixture.train = mixture.train.select([order.index("a.png"), order.index("d.png")])
    assert compare_images(mixture)[1] == [["a.png", "b.png"]]


def test_samples_show_what_is_learned_token_by_token(chat):
    processor = make_processor()
    sample = draw_sample({"messages": chat, "images": [], "where": ["here"]}, processor)
    assert "".join(text for text, _ in sample.pieces) == processor.apply_chat_template(chat)
    learned = [text for text, is_learned in sample.pieces if is_learned]
    assert learned == [" It's a circle.<eos>", " The colors are different.<eos>"]
    # One token a byte, and one for the end.
    assert sample.num_learned == sum(len(text.removesuffix("<eos>")) + 1 for text in learned)
    assert list(map(str, sample.images)) == [
        block["path"] for turn in chat[::2] for block in turn["content"] if "path" in block
    ]


def test_tables_align():
    rows = [("name", "count"), ("a", 1), ("long name", 1000)]
    assert format_table(rows) == "name       count\na              1\nlong name   1000"
