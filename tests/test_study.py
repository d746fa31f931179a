"""The study: its tasks have the answers that they say, its runs repeat themselves, its tables are worked out right."""

import csv
import random
import subprocess
import sys

import pytest
from test_finetune import EXAMPLES, environment


STUDY = EXAMPLES / "study"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import tables
    import tasks

    return tasks, tables


def check_answer(task, rounds):
    """The answer to the question of the last round, from the digits alone."""
    digits = [digit for shown, _, _ in rounds for digit in shown]
    from scans import WORDS as words

    question = rounds[-1][1]
    if task == "single":
        return words[digits[0]]
    if task == "sum":
        return words[digits[0] + digits[1]]
    if task == "same":
        (place,) = [place for place, digit in enumerate(digits[1:], start=2) if digit == digits[0]]
        return f"image {place}"
    if task in ("larger", "largest"):
        assert digits.count(max(digits)) == 1
        return f"image {digits.index(max(digits)) + 1}"
    if task == "count":
        return words[digits.count(words.index(question.split()[-1].rstrip("?")))]
    if task in ("two hops", "three hops"):
        place = 0
        for _ in range(1 if task == "two hops" else 2):
            place = digits[place] - 1
            assert place > 0
        return words[digits[place]]
    return f"image {1 if digits[0] > digits[-1] else len(digits)}"


def test_every_question_has_its_answer(study):
    tasks, _ = study
    for name, task in tasks.TASKS.items():
        answers = set()
        for seed in range(300):
            rng = random.Random(seed)
            drawn = task.draw(rng, rng.choice(task.sizes))
            assert drawn.rounds[-1][2] == check_answer(name, drawn.rounds), (name, drawn)
            answers.add(drawn.rounds[-1][2])
        assert len(answers) > 1


def test_conversations_repeat_and_no_scan_is_on_both_sides(study):
    tasks, _ = study
    sides = [tasks.StudyConversations(split, 64, 0) for split in ("train", "tuning", "test")]
    scans = [{image.tobytes() for digit in side.scans for image in digit} for side in sides]
    assert [len(each) for each in scans] == [1258, 180, 359]
    assert not scans[0] & scans[1] and not scans[0] & scans[2] and not scans[1] & scans[2]
    again = tasks.StudyConversations("train", 64, 0)
    texts_only = tasks.StudyConversations("train", 64, 0, has_images=False)
    for index in range(0, 64, 7):
        assert again[index] == sides[0][index]
        blocks = [block for message in texts_only[index]["messages"][::2] for block in message["content"]]
        assert {block["type"] for block in blocks} == {"text"}
    sizes = {len(sides[0].draw(index)[0].rounds[0][0]) for index in range(32)}
    assert len(sizes) == 1  # of one batch


def row(arm, seed, accuracy, curve):
    from tasks import TASKS

    return {
        "arm": arm, "seed": str(seed), "learning_rate": "0.002", "parameters": "10", "cpu_seconds": "5",
        "peak_mebibytes": "7", "second_question_over_first": "0.5", "points": "100;200",
        **dict.fromkeys(TASKS, str(accuracy)), **{f"{task}, curve": curve for task in TASKS},
    }  # fmt: skip


def test_tables_are_worked_out_by_hand(study):
    _, tables = study
    rows = [row("causal", seed, accuracy, "0.2;0.6") for seed, accuracy in enumerate((0.5, 0.6))]
    rows += [row("mmca, sum", seed, accuracy, "0.5;0.7") for seed, accuracy in enumerate((0.7, 0.7))]
    mean, half = tables.difference(rows, "mmca, sum", tables.MEASURES["single"])
    # Differences 0.2 and 0.1: mean 0.15, standard error 0.05, Student's t of one degree of freedom 12.706.
    assert mean == pytest.approx(0.15) and half == pytest.approx(12.706 * 0.05, rel=1e-4)
    assert tables.conversations_to(rows[0], "single", 0.4) == 150  # half way between the points
    assert tables.conversations_to(rows[2], "single", 0.4) == 100
    assert tables.conversations_to(rows[0], "single", 0.9) == float("inf")
    report = tables.format_report(rows)
    assert "| single | 55.0% ± 63.5% | 70.0% ± 0.0% |" in report and "| single | +15.0 ± 63.5 |" in report
    assert "| single, 63% | not reached | 0.2 |" in report


@pytest.mark.slow
def test_a_run_repeated_on_a_fresh_start_equals_its_line(tmp_path, study):
    _, tables = study
    lines = []
    for folder in ("first", "second"):
        command = [sys.executable, str(STUDY / "run.py"), "--quick", "--output", str(tmp_path / folder)]
        command += ["--arms", "mmca, sum", "cross"]
        for _ in range(1 + (folder == "first")):  # a second start finds everything done
            completed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400)
            assert completed.returncode == 0, completed.stderr[-2000:]
        with (tmp_path / folder / "quick.csv").open(newline="") as file:
            lines.append(list(csv.DictReader(file)))
    measured = ("cpu_seconds", "peak_mebibytes", "second_question_over_first")
    first, second = ([{k: v for k, v in line.items() if k not in measured} for line in each] for each in lines)
    assert len(first) == 2 and first == second
    tables.draw(lines[0], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0
    assert "| cross | 1 |" in tables.format_report(lines[0])


def test_wrong_arms_and_missing_files_are_named(tmp_path):
    for script, flags, message in (
        ("run.py", ["--arms", "mmca sum"], "invalid choice: 'mmca sum'"),
        ("tables.py", ["--input", str(tmp_path / "none.csv")], "none.csv; run.py writes it"),
    ):
        completed = subprocess.run(
            [sys.executable, str(STUDY / script), *flags],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=100,
        )
        assert completed.returncode == 2 and message in completed.stderr
