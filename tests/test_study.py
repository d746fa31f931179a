"""The study: its tasks have the answers that they say, its runs repeat themselves, its tables are worked out right."""

import csv
import random
import re
import runpy
import subprocess
import sys

import pytest
from test_finetune import EXAMPLES, environment
from test_remote_code import REPOSITORY


STUDY = EXAMPLES / "study"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import tables
    import tasks

    return tasks, tables


def answer_from(question, digits):
    """The answer to a question, from its words and the digits shown so far."""
    from scans import WORDS as words

    places = [int(number) - 1 for number in re.findall(r"image (\d)", question)]
    named = [words.index(word) for word in re.findall(r"\w+", question) if word in words]
    shown = [digits[place] for place in places]
    if question.startswith("digit of"):
        return words[shown[0]]
    if question.startswith("larger of"):
        assert shown[0] != shown[1]
        return str(places[shown[1] > shown[0]] + 1)
    if question.startswith("sum of") or " plus " in question:
        return words[sum(shown or named)]
    if question.startswith("how many"):
        return words[digits.count(named[0])]
    if question.startswith("follow"):
        for _ in range(1 if "once" in question else 2):
            places.append(digits[places[-1]] - 1)
        assert len(set(places)) == len(places) and min(places) >= 0
        return words[digits[places[-1]]]
    if question == "even or odd?":
        return ("even", "odd")[digits[-1] % 2]
    if question == "what is it?":
        return "digit"
    wanted = {"same": shown, "largest": [max(digits)], "which": named}[re.match(r"\w+", question)[0]]
    (place,) = [place for place, digit in enumerate(digits) if digit in wanted and place not in places]
    return str(place + 1)


def answers_of(rounds):
    """Question, answer and right answer of each round."""
    digits = []
    for shown, (question, answer) in rounds:
        digits += shown
        yield question, answer, answer_from(question, digits)


def test_every_question_has_its_answer(study):
    tasks, _ = study
    for task in tasks.TASKS.values():
        answers = set()
        for seed in range(300):
            rng = random.Random(seed)
            rounds = task.draw(rng, rng.choice(task.sizes))
            assert all(answer == right for _, answer, right in answers_of(rounds)), rounds
            answers.add(rounds[-1][1][1])
        assert len(answers) > 1


def test_training_asks_on_about_the_same_images(study):
    tasks, _ = study
    conversations = tasks.StudyConversations("train", 64 * 32, 0)
    asked = set()
    for index in range(0, len(conversations), 3):
        rounds, _ = conversations.draw(index)
        triples = list(answers_of(rounds))
        assert all(answer == right for _, answer, right in triples), rounds
        questions = [question for question, _, _ in triples if "plus" not in question and "even" not in question]
        assert len(set(questions)) == len(questions) and len(rounds) <= tasks.NUM_QUESTIONS
        asked |= {re.sub(r"\d", "N", re.sub("|".join(tasks.WORDS), "N", question)) for question in questions}
    assert len(asked) == 10  # eight kinds about images, "which shows", and what starts the tasks with images apart


def test_training_starts_with_few_images(study):
    tasks, _ = study
    conversations = tasks.StudyConversations("train", 100 * 32, 0)
    sizes = [len(conversations.draw(32 * batch)[0][0][0]) for batch in range(100)]
    assert max(sizes[:5]) == 1 and max(sizes[:20]) < 8 and max(sizes[int(100 * tasks.CURRICULUM) :]) == 8


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
    sizes = {len(sides[0].draw(index)[0][0][0]) for index in range(32, 64)}
    assert len(sizes) == 1  # of one batch


def row(arm, seed, accuracy, curve):
    from tasks import TASKS

    return {
        "arm": arm, "seed": str(seed), "learning_rate": "0.002", "parameters": "10", "cpu_seconds": "5",
        "peak_mebibytes": "7", "second_question_over_first": "0.5", "points": "100;200", "seconds": "3;5",
        **dict.fromkeys(TASKS, str(accuracy)), **{f"{task}, curve": curve for task in TASKS},
    }  # fmt: skip


def test_tables_are_worked_out_by_hand(study):
    _, tables = study
    rows = [row("causal", seed, accuracy, "0.2;0.6") for seed, accuracy in enumerate((0.5, 0.6))]
    rows += [row("mmca, sum", seed, accuracy, "0.5;0.7") for seed, accuracy in enumerate((0.7, 0.7))]
    mean, half = tables.difference(rows, "mmca, sum", tables.accuracy("single"))
    # Differences 0.2 and 0.1: mean 0.15, standard error 0.05, Student's t of one degree of freedom 12.706.
    assert mean == pytest.approx(0.15) and half == pytest.approx(12.706 * 0.05, rel=1e-4)
    assert tables.spent_to(rows[0], "single", 0.4) == 150  # half way between the points
    assert tables.spent_to(rows[0], "single", 0.4, "seconds") == 4
    assert tables.spent_to(rows[2], "single", 0.4) == 100
    assert tables.spent_to(rows[0], "single", 0.9) == float("inf")
    report = tables.format_report(rows)
    assert "| causal | 55% | 55% | 55% | 55% | 55.0% ± 63.5% |  |" in report
    assert "| mmca, sum | 70% | 70% | 70% | 70% | 70.0% ± 0.0% | +15.0 ± 63.5 |" in report
    assert "| single | 10.0% | 55.0% ± 63.5% | 70.0% ± 0.0% |" in report and "| single | +15.0 ± 63.5 |" in report
    assert "| single, 63% | not reached | 0.2, 4 s |" in report


def test_the_pages_say_what_the_runs_gave(study):
    _, tables = study
    report = tables.format_report(tables.read_rows(STUDY / "results.csv"))
    assert (STUDY / "results.md").read_text() == report
    of_pretrained = tables.format_report(tables.read_rows(STUDY / "pretrained.csv"))
    assert (STUDY / "pretrained.md").read_text() == of_pretrained
    summary = [line for line in of_pretrained.split("## Accuracy")[0].splitlines() if line.startswith("| ")]
    assert len(summary) == 5 and set(summary) <= set((STUDY / "README.md").read_text().splitlines())
    for page in ("README.md", "hub_card.md"):
        in_page = [line for line in (REPOSITORY / page).read_text().splitlines() if line.startswith("| mmca, ")]
        assert len(in_page) == 5 and set(in_page) <= set(report.splitlines())


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
    measured = ("cpu_seconds", "seconds", "peak_mebibytes", "second_question_over_first")
    first, second = ([{k: v for k, v in line.items() if k not in measured} for line in each] for each in lines)
    assert len(first) == 2 and first == second
    tables.draw(lines[0], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 0
    assert "| cross | 1 |" in tables.format_report(lines[0])


def test_wrong_arms_and_missing_files_are_named(tmp_path, study, monkeypatch, capsys):
    for script, flags, message in (
        ("run.py", ["--arms", "mmca sum"], "invalid choice: 'mmca sum'"),
        ("tables.py", ["--input", str(tmp_path / "none.csv")], "none.csv; run.py and pretrained.py write it"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as refused:
            runpy.run_path(str(STUDY / script), run_name="__main__")
        assert refused.value.code == 2 and message in capsys.readouterr().err
