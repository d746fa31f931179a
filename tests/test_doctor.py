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
from processing_visualchat.doctor.report import write_report
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
    counts = {row[0]: list(map(int, row[1:])) for row in rows if len(row) == 7 and all(map(str.isdigit, row[1:]))}
    assert set(counts) == {ingredient.name for ingredient in load_mixture(PAPER, root).reports} | {"all"}
    for read, used, repaired, dropped, _, _ in counts.values():
        assert read == used + dropped and repaired <= used
    # By hand: eight records in the two files, of which five and three are there, four of them of no use.
    assert counts["llava"][:4] == [8, 4, 2, 4]
    assert ["random", "order,", "padded"] in [row[:3] for row in rows] and ["packed"] in [row[:1] for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "visualchat-doctor/dropped.jsonl").read_text().splitlines()]
    place = {"source": "llava", "file": "llava/detail_23k.json", "record": "record 3"}
    assert {**place, "image": "coco/train2017/000000000099.jpg", "reason": "an image is not there"} in lines
    assert len(lines) == counts["all"][3]
    page = (tmp_path / "visualchat-doctor/report.html").read_text()
    assert page.count('class="sample"') == 9 and page.count("data:image/png;base64,") == 1
    marked = re.findall(r"<mark>(.*?)</mark>", page)
    assert " A dog.&lt;/s&gt;" in marked and not any("Question" in text for text in marked)
    assert "http" not in re.sub(r"title=\"[^\"]*\"", "", page).replace("https://", "http://").split("<h2>Terms")[0]


def test_strictness_and_what_cannot_be_read_are_exit_statuses(root, tmp_path):
    strict = run_doctor(PAPER, "--data_root", root, "--strict", "--skip_images", cwd=tmp_path)
    assert (
        strict.returncode == 1
        and "22 records are dropped, 0 problems found, and --strict allows none" in strict.stderr
    )
    nothing = run_doctor("nowhere.yaml", cwd=tmp_path)
    assert nothing.returncode == 2 and "doctor: error: No mixture at nowhere.yaml" in nothing.stderr
    (tmp_path / "clean.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]})
    )
    clean = run_doctor("clean.jsonl", "--strict", cwd=tmp_path)
    assert clean.returncode == 0, clean.stderr[-2000:]
    assert "1 conversation to train on" in clean.stdout
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


def talk(answer, **more):
    return {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": answer}], **more}


def test_over_length_conversations_are_a_problem(tmp_path):
    """Named, counted, and an error with `--strict`."""
    lines = [talk(f"{number} " * (50 if number % 3 else 5)) for number in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["own.jsonl", "--max_length", 40]
    completed = run_doctor(*flags, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-2000:]
    problem = r"PROBLEM: 8 train conversations have more than 40 tokens \(own.jsonl, line \d+ \(\d+ tokens\); .*; …"
    assert re.search(problem, completed.stdout) and "Fit to train on, after a decision." in completed.stdout
    page = (tmp_path / "visualchat-doctor/report.html").read_text()
    verdict = page.index('class="verdict undecided"')
    assert verdict < page.index("8 train conversations have more than") < page.index("<table>")
    assert len(set(re.findall(r"own.jsonl, line \d+ \(\d+ tokens\)", page))) == 8
    strict = run_doctor(*flags, "--strict", cwd=tmp_path)
    assert strict.returncode == 1 and "1 problem found, and --strict allows none" in strict.stderr


def test_the_page_begins_with_a_verdict_and_names_what_is_wrong(tmp_path):
    """Tokens and shares of every source, steps and trained tokens, samples of each, broken images; on a phone too."""
    draw_picture(0).save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    image = {"images": ["good.png"]}
    for name, records in {
        "a": [talk("word " * 1500)] * 2 + [talk("x", images=["empty.png"]), talk("x", images=["gone.png"])],
        "b": [talk("word " * 500, **image)],
        **{name: [talk(f"{name} said")] for name in "cdefgh"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources = tuple(DatasetSpec(name, f"{name}.jsonl") for name in "abcdefgh")
    diagnosis = examine(MixtureConfig(sources, eval_share=0.0), tmp_path)
    head, *rows = diagnosis.share_table()
    assert [row[0] for row in rows] == list("abcdefgh") and "share" in head
    totals = [sum(row[column] for row in rows) for column in (4, 2, 3)]
    assert totals[0] == 9 and rows[0][3] == 2 * 1501 and rows[1][3] == 501
    assert rows[0][1] == f"{rows[0][2] / totals[1]:.1%}" and totals[1] == sum(diagnosis.lengths("length", "train"))
    assert {sample.source for sample in diagnosis.samples} == set("abcdefgh")
    findings = "\n".join(diagnosis.findings())
    assert f"{totals[1]:,} tokens, {totals[2]:,} of them trained on" in findings
    assert "Steps per epoch of one process: 2 padded batches of 8, or 1 pack of 4,096 tokens." in findings
    assert diagnosis.list_broken() == {"empty.png": "an empty image file", "gone.png": "an image is not there"}
    page = write_report(diagnosis, tmp_path / "out").read_text()
    order = [
        "Fit to train on: The",
        "Steps per epoch",
        ">trained<",
        "images that cannot be used",
        "sample",
        "<h2>Records",
    ]
    places = [page.index(text, page.index("</style>")) for text in [*order, "<h2>Lengths of each"]]
    assert places == sorted(places) and 'name="viewport"' in page and '<td class="number">3,0' in page


def test_repeated_conversations_and_copies_of_files_are_told(tmp_path):
    """The same text with the same pixels, in one file or in a file beside its copy in another format."""
    draw_picture(0).save(tmp_path / "a.png")
    draw_picture(0).save(tmp_path / "b.bmp")
    records = [talk("x", images=["a.png"]), talk("x", images=["b.bmp"]), *(talk(str(number)) for number in range(8))]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    diagnosis = examine(tmp_path / "own.jsonl")
    assert diagnosis.repeats == [["own.jsonl, line 1", "own.jsonl, line 2"]] and not diagnosis.problems
    assert "1 conversation repeats another: own.jsonl, line 1 = own.jsonl, line 2." in diagnosis.findings()
    assert "1 image name is a duplicate of others, by their pixels: a.png = b.bmp." in diagnosis.findings()
    (tmp_path / "own.json").write_text(json.dumps(records[2:]))
    (copy,) = examine(tmp_path).problems
    assert "own.jsonl repeats" in copy and "8 conversations are in both" in copy
    unopened = examine(tmp_path / "own.jsonl", check_images=False)
    assert not unopened.duplicates and "by their bytes, as they were not opened" in str(unopened)


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
    assert format_table(rows) == "name       count\na              1\nlong name  1,000"
