"""The evaluation: metrics by hand, the same answers however they are made, and nothing that is wrong kept back."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, draw_picture, make_model, make_processor
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_finetune import EXAMPLES, deepspeed, environment
from test_suites import publish
from transformers import AutoProcessor

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat.data.image_contents import save_training_images
from processing_visualchat.data.images import ImageReference
from processing_visualchat.evaluation import (
    METRICS,
    ROBUSTNESS,
    SUITES,
    Example,
    Judge,
    Round,
    Suite,
    SuiteError,
    evaluate,
    score_answers,
    update_card,
)
from processing_visualchat.evaluation.answering import SeededSampling
from processing_visualchat.evaluation.edits import load_edits
from processing_visualchat.evaluation.metrics import Answer
from processing_visualchat.evaluation.robustness import perturb, rename_images
from processing_visualchat.evaluation.statistics import ScoredRound, average, break_down
from processing_visualchat.evaluation.text_matching import find_choice, normalize


CHOICES = ("a cat", "a black cat", "two dogs", "a bird")


def image(name):
    return {"type": "image", "path": str(name)}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures, a file of conversations of one to three rounds, and a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(5):
        draw_picture(index).save(folder / f"{index}.png")
    lines = []
    for index in range(10):
        messages = []
        for number in range(1 + index % 3):
            pictures = [image(f"{(index + number + place) % 5}.png") for place in range(index % 2 + (number == 0))]
            messages += [
                {"role": "user", "content": [*pictures, text(f"What is number {index}?" + index * "?")]},
                {"role": "assistant", "content": f"Answer {index} {number}"},
            ]
        lines.append({"messages": messages})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_model().save_pretrained(folder / "checkpoint")
    make_processor().save_pretrained(folder / "checkpoint")
    return folder


def run(data, output, suite="jsonl", file="test.jsonl", **options):
    options = {"max_new_tokens": 6, "batch_size": 4, **options}
    return evaluate(data / "checkpoint", suite, data / file, output, **options)


def read(folder, name="answers.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The output of an uninterrupted evaluation."""
    folder = tmp_path_factory.mktemp("straight")
    run(data, folder)
    return folder


@pytest.mark.parametrize(
    "words, expected",
    [
        ("There are Two cats, on the 1,000.5 m²!", "there are 2 cats on 1000.5 m²"),
        ("-3 well-known  U.S. words", "-3 well known us words"),
        ("None of them's here.", "0 of thems here"),
        *(("A", "a"), ("+", "+"), ("The", "the"), ("", "")),
    ],
)
def test_text_is_normalized_as_in_vqa(words, expected):
    assert normalize(words) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        *(("B", 1), ("(b)", 1), ("b.", 1), ("B) a dog", 1), ("B. black", 1), ("A", 0), ("A: x", 0)),
        *(("The answer is (C).", 2), ("Option D", 3), ("The answer is A. No: the answer is B", 1)),
        *(("a bird", 3), ("Two dogs.", 2), ("A cat", 0), ("I choose (D) here", 3)),
        *(("It is a black cat.", 1), ("I see two dogs there", 2), ("the answer is a cat", 0)),
        *(("A nice thing, so C", 2), ("C because", 2)),
        # Nothing, or more than one.
        *(("A and B", None), ("I think so", None), ("a dog", None), ("", None), ("E", None), ("(A) or (B)", None)),
    ],
)
def test_the_option_that_an_answer_names(answer, expected):
    assert find_choice(answer, CHOICES) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        *(
            ('It is closest to the point labeled "C".', 2),
            ("The point is labeled D", 3),
            ("It is Point A, I think", 0),
        ),
        *(("the corresponding one is point b", 1), ("The point cannot be determined.", None)),
    ],
)
def test_options_that_differ_in_their_letter(answer, expected):
    assert find_choice(answer, ("Point A", "Point B", "Point C", "Point D")) == expected


def test_each_metric_gives_values_worked_out_by_hand():
    def score(name, *answers):
        return METRICS[name].score(answers)

    assert score("exact_match", Answer("Two.", ("three", "2")), Answer("two cats", ("2",)), Answer("x")) == [
        1,
        0,
        None,
    ]
    assert score("contains", Answer("It has two cats.", ("2 cats",)), Answer("12", ("2",))) == [1, 0]
    assert score("choice", Answer("b", ("B",), CHOICES), Answer("a bird", ("A bird",), CHOICES)) == [1, 1]
    assert score("choice", Answer("?", ("B",), CHOICES), Answer("b", ("B",))) == [0, None]
    scores = ((-4.0, 4, -2.0), (-3.0, 1, -1.0))  # means -1 and -3, sums -4 and -3, letters -2 and -1
    likely = Answer("", ("A",), ("aaaa", "b"), option_scores=scores)
    assert [score(f"choice_likelihood{form}", likely) for form in ("", "_sum")] == [[1], [0]]
    assert score("letter_likelihood", likely) == [0] and score("letter_likelihood", Answer("a", ("A",), ("x",))) == [
        None
    ]
    # kitten and sitting differ in 3 of 7 characters; ab and ac in half of them, which is too far.
    assert score("anls", Answer("Kitten", ("sitting", "x"))) == [pytest.approx(4 / 7)]
    assert score("anls", Answer("ab", ("ac",)), Answer("", ("a",))) == [0, 0]
    # "the cat sat" in "the cat just sat down": precision 3/3, recall 3/5.
    assert score("rouge_l", Answer("the cat sat", ("the cat just sat down", "no"))) == [pytest.approx(0.75)]
    # All words are those of the reference, without the article: 10, the highest value.
    cider = score(
        "cider", Answer("a red big round ball", ("red big round ball",)), Answer("x", ("some thing",)), Answer("x")
    )
    assert cider == [pytest.approx(10), 0, None]
    assert score("cider", Answer("red", ("red",))) == [None]  # how rare a word is cannot be counted in one answer
    assert score("judge", Answer("x", verdict=0.7), Answer("x")) == [0.7, None]
    # Text is not compared with the letter of an option, nor is nothing equal to anything.
    of_choice = Answer("a bird", ("A",), CHOICES)
    assert [score(name, of_choice) for name in ("exact_match", "contains", "anls", "rouge_l", "cider")] == [[None]] * 5
    assert score("exact_match", Answer("", ("A",)), Answer("the", ("a",)), Answer("-", ("+",))) == [0, 0, 0]


def test_means_are_of_rounds_and_intervals_of_conversations():
    """Many rounds of one conversation are one observation."""
    rounds = [ScoredRound("a", 1.0, (("round", str(number)),)) for number in range(1, 12)]
    rounds += [ScoredRound("b", 0.0, (("round", "1"),)), ScoredRound("b", None, (("round", "2"),))]
    found = average(rounds)
    assert (found.mean, found.low, found.high) == (11 / 12, 0, 1)
    assert (found.num_rounds, found.num_conversations, found.num_missing) == (12, 2, 1)
    assert average(rounds) == found and average(rounds[:11]).low is None and average([rounds[-1]]) is None
    by_round = break_down(rounds)["by"]["round"]
    assert list(by_round) == [str(number) for number in range(1, 12)] and by_round["1"]["mean"] == 0.5
    many = [ScoredRound(str(number), float(number % 4 == 0)) for number in range(400)]
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5  # of a share of a quarter
    interval = average(many)
    assert interval.low == pytest.approx(0.25 - error, abs=0.01) and interval.high == pytest.approx(
        0.25 + error, abs=0.01
    )
    # Tasks of 100 and 300 rounds weigh equally: (1 + 0.25) / 2, not 0.4375; only one of them varies.
    tasks = [ScoredRound(f"easy {number}", 1.0, (("task", "easy"),)) for number in range(100)]
    tasks += [ScoredRound(f"hard {number}", float(number % 4 == 0), (("task", "hard"),)) for number in range(300)]
    found = break_down(tasks, "task")
    assert found["all"]["mean"] == 0.4375 and found["mean_over"]["mean"] == 0.625
    error = 1.96 * (0.25 * 0.75 / 300) ** 0.5 / 2
    assert found["mean_over"]["low"] == pytest.approx(0.625 - error, abs=0.01)
    assert found["mean_over"]["high"] == pytest.approx(0.625 + error, abs=0.01)


def test_batched_answers_are_those_of_a_chat(data, straight):
    """Left padding, the image memory and other conversations in the batch change nothing."""
    model = VisualChatForConditionalGeneration.from_pretrained(data / "checkpoint").eval()
    for line, source in zip(read(straight), read(data, "test.jsonl"), strict=True):
        session = model.start_chat(make_processor(), max_new_tokens=6)
        for asked, message in zip(line["rounds"], source["messages"][::2], strict=True):
            content = [{**block, "path": str(data / block["path"])} if "path" in block else block
                       for block in message["content"]]  # fmt: skip
            plain = [*session.messages, {"role": "user", "content": content}]
            for earlier in plain:
                if earlier["role"] == "assistant":
                    earlier["content"] = re.sub("<(image|eos|pad)>", r"< \1>", earlier["content"])
            assert session.answer(plain) == asked["answer"]
    assert len({asked["answer"] for line in read(straight) for asked in line["rounds"]}) > 3


def test_later_rounds_see_the_references_if_asked_for(data, straight, tmp_path):
    run(data, tmp_path / "out", history="references")
    own, given = ([line["rounds"] for line in read(folder)] for folder in (straight, tmp_path / "out"))
    assert [rounds[0]["answer"] for rounds in own] == [rounds[0]["answer"] for rounds in given]
    assert [rounds[1:] for rounds in own] != [rounds[1:] for rounds in given]
    model, processor = make_model(), make_processor()
    messages = read(data, "test.jsonl")[1]["messages"][:3]
    for message in messages[::2]:
        message["content"] = [{**block, **({"path": str(data / block["path"])} if "path" in block else {})}
                              for block in message["content"]]  # fmt: skip
    assert model.start_chat(processor, max_new_tokens=6).answer(messages) == given[1][1]["answer"]


def test_an_interrupted_evaluation_continues_to_the_same_end(data, straight, tmp_path, monkeypatch):
    from processing_visualchat.evaluation import answer_file

    batches, write = [], answer_file.append

    def stop(file, lines):
        batches.append(file)
        if len(batches) == 3:
            raise KeyboardInterrupt
        write(file, lines)

    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path)
    answers = tmp_path / "answers.jsonl"
    whole = answers.read_text().splitlines(keepends=True)
    assert len(whole) == 8
    answers.write_text("".join(whole[:6]) + whole[6][:30])  # the last line is torn
    run(data, tmp_path)
    for name in ("answers.jsonl", "metrics.json", "results.md", "index.html"):
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name


def test_an_evaluation_with_other_settings_is_refused_with_what_differs(data, straight, tmp_path):
    before = (straight / "answers.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"another run: history was 'own', is 'references'\. Choose another"):
        run(data, straight, history="references")
    for name in ("test.jsonl", "0.png", "1.png", "2.png", "3.png", "4.png"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    make_model(seed=1).save_pretrained(tmp_path / "checkpoint")
    make_processor().save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"another run: weights was '\w+', is '\w+'\. Choose"):
        run(tmp_path, straight)
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    processor.chat_template = processor.chat_template.replace("Question", "Ask")
    shutil.copytree(data / "checkpoint", tmp_path / "checkpoint", dirs_exist_ok=True)
    processor.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"another run: processor was '\w+', is '\w+'\. Choose"):
        run(tmp_path, straight)
    make_model(seed=1).save_pretrained(tmp_path / "checkpoint")
    make_processor().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "changed.jsonl").write_text((data / "test.jsonl").read_text().replace("number 3", "number three"))
    with pytest.raises(ValueError, match=r"another run: weights .*; examples was"):
        run(tmp_path, straight, file="changed.jsonl")
    assert (straight / "answers.jsonl").read_bytes() == before
    for name in ("answers.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    (tmp_path / "answers.jsonl").write_bytes(before.replace(b'{"id"', b"{id", 1))
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1 is not JSON; remove it"):
        score_answers(tmp_path)


def evaluate_in_a_process(*flags, launcher=(), **options):
    command = [sys.executable, *launcher, str(EXAMPLES / "evaluate.py"), *map(str, flags)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_process_and_two_processes_give_what_one_does(data, straight, tmp_path):
    flags = [data / "checkpoint", "--suite", "jsonl", "--data", data / "test.jsonl", "--output", tmp_path / "out"]
    flags += ["--max_new_tokens", "6", "--batch_size", "4"]
    process = evaluate_in_a_process(*flags)
    deadline = time.time() + 120
    while not (tmp_path / "out" / "answers.jsonl").is_file() or not read(tmp_path / "out"):
        assert process.poll() is None and time.time() < deadline, "no answer was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(read(tmp_path / "out")) < 10
    port = deepspeed(2)[1][-1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
    process = evaluate_in_a_process(*flags, launcher=launcher)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert output.count("jsonl, ") == 1 and "exact_match" in output
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (straight / "answers.jsonl").read_bytes()
    assert not list((tmp_path / "out").glob("answers-*"))
    # All over again, in two processes from the start.
    process = evaluate_in_a_process(*flags[:-5], tmp_path / "two", *flags[-4:], launcher=launcher)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert (tmp_path / "two" / "answers.jsonl").read_bytes() == (straight / "answers.jsonl").read_bytes()


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(data, straight, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, options in zip(folders, ({"batch_size": 3}, {"batch_size": 10}, {"seed": 1})):
        run(data, folder, temperature=0.9, top_p=0.95, **options)
    first, second, third = map(read, folders)
    assert first == second and first != third and first != read(straight)
    probabilities = torch.tensor([0.2, 0.3, 0.5])
    noisy = SeededSampling([str(number) for number in range(4000)])(None, probabilities.log().expand(4000, 3))
    frequencies = noisy.argmax(dim=1).bincount(minlength=3) / 4000
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.03)


def test_the_options_get_the_log_probability_that_the_model_gives_them(data, tmp_path):
    model, processor = make_model(), make_processor()
    content = (image(data / "0.png"), text("Which?"))
    first = Round((text("Hi"),), ("Hello",))
    rounds = (first, Round(content, ("B",), ("no", "maybe so", "y")))
    suite = Suite("mine", "", "", lambda source: iter([Example("1", rounds)]), ("choice", "choice_likelihood"))
    arguments = {"processor": processor, "history": "references", "max_new_tokens": 4, "batch_size": 4}
    results = evaluate(model, suite, "mine", tmp_path, **arguments)
    found = read(tmp_path)[0]["rounds"][1]["option_scores"]
    for index, (total, count, letter) in enumerate(found):
        for answer, value in ((rounds[1].choices[index], total), ("ABC"[index], letter)):
            messages = [
                {"role": "user", "content": [*first.content]}, {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": [*content]},
            ]  # fmt: skip
            options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            start = processor.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"].shape[
                1
            ]
            whole = processor.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **options)
            with torch.no_grad():
                logits = model(**whole).logits[0].log_softmax(dim=-1)
            ids = whole["input_ids"][0]
            expected = sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert value == pytest.approx(expected, abs=1e-3)
        assert count == len(rounds[1].choices[index]) + 2  # a token a byte, the space before it, and the end
    assert results["scores"]["choice_likelihood"]["all"]["num_rounds"] == 1
    best = max(range(3), key=lambda index: found[index][0] / found[index][1])
    assert results["scores"]["choice_likelihood"]["all"]["mean"] == (best == 1)
    with pytest.raises(ValueError, match="another run: scores_options was True, is False"):
        evaluate(model, suite, "mine", tmp_path, metrics=["choice"], **arguments)
    again = score_answers(tmp_path, ["letter_likelihood", "choice_likelihood_sum"])
    assert list(again["scores"]) == ["letter_likelihood", "choice_likelihood_sum"]


def test_a_question_longer_than_the_model_reads_is_counted_and_wrong(data, tmp_path):
    turns = [text("x" * 1100), text("short")]
    options = {"x": (), "A": ("one", "two")}
    examples = [
        Example(f"{place} {right}", (Round((turn,), (right,), choices),))
        for place, turn in enumerate(turns)
        for right, choices in options.items()
    ]
    metrics = ("exact_match", "contains", "anls", "choice", "choice_likelihood", "letter_likelihood")
    suite = Suite("mine", "", "", lambda source: iter(examples), metrics, source="here", max_new_tokens=2)
    results = evaluate(make_model(attention_type="causal"), suite, None, tmp_path, processor=make_processor())
    assert results["num_faults"] == 2 and "2 questions were too long" in " ".join(results["notes"])
    rounds = [line["rounds"][0] for line in read(tmp_path)]
    assert rounds[0]["answer"] == "" and "the model reads 1,024" in rounds[0]["fault"] and rounds[2]["answer"]
    for metric in metrics:
        assert results["scores"][metric]["all"]["num_rounds"] == 2
        assert metric == "anls" or results["scores"][metric]["all"]["mean"] <= 0.5  # that of two which has an answer


@pytest.mark.parametrize(
    "words, expected",
    [
        ("Is image 1 darker than the second image?", "Is image 2 darker than the first image?"),
        ("Image 2 and the First picture", "Image 1 and the Second picture"),
        ("The left image shows a dog", "The right image shows a dog"),
        ("What changed?", "What changed?"),
        ("Which is darker, the first or the second?", "Which is darker, the second or the first?"),
        (
            "The first image is the left one, the second the right one. True? The left image is red.",
            "The first image is the left one, the second the right one. True? The right image is red.",
        ),
        *(
            (words, None)
            for words in ("Images 1 and 2", "the first dog", "which is left?", "the last image", "image 3", "image B")
        ),
        ("Is the 2nd image darker than the 1st?", "Is the 1st image darker than the 2nd?"),
        *((words, None) for words in ("What is next?", "the source image", "the top photo", "the 1st dog")),
    ],
)
def test_references_to_images_follow_a_swap(words, expected):
    assert rename_images(words, {1: 2, 2: 1}, is_pair=True) == expected


def test_each_robustness_test_changes_what_it_says_and_leaves_out_what_it_cannot():
    a, b, c, d = (image(f"{name}.png") for name in "abcd")
    pair = Example(
        "pair", (Round((a, b, text("Is image 1 red?")), ("image 1",)), Round((text("And image 2?"),), ("no",)))
    )
    single = Example("single", (Round((text("What?"), c), ("x",)),))
    labels = (text("Image 1:"), a, text("Image 2:"), b, text("Which image is red?"))
    labelled = Example("labelled", (Round(labels, ("2",)),))
    words = Example("words", (Round((text("Hi"),), ("x",)),))
    count = Example("count", (Round((a, text("How many images are there?")), ("1",)),))
    order = Example("order", (Round((a, b, text("Which comes first?")), ("x",)),))
    between = Example("between", (Round((a, text("turns into"), d, text("How?")), ("x",)),))
    examples = [pair, single, labelled, words, order, between]
    found = {name: {example.key: example for example in perturb(name, examples)} for name in ROBUSTNESS}
    assert {name: [*changed] for name, changed in found.items()} == {
        "swap": ["pair", "labelled"],
        "distractor": ["pair", "single", "labelled", "order", "between"],
        "wrong_image": ["pair", "single", "labelled", "order", "between"],
        "removed": ["pair", "single", "labelled", "order", "between"],
        "question_first": ["pair", "order"],
        "question_last": ["single"],
    }
    assert [*perturb("distractor", [pair, count, single])][1].key == "single"  # one more would be counted
    options = (text("Which is red?\nA. "), a, text("\nB. "), b, text("\nAnswer:"))
    assert [*perturb("distractor", [Example("options", (Round(options, ("A",)),)), single])] == [
        found["distractor"]["single"]
    ]  # it would be an option
    swapped = found["swap"]["pair"].rounds
    assert swapped[0].content == (b, a, text("Is image 2 red?")) and swapped[0].references == ("image 2",)
    assert swapped[1].content == (text("And image 1?"),)
    assert found["swap"]["labelled"].rounds[0].content == (labels[0], b, labels[2], a, labels[4])
    assert found["swap"]["labelled"].rounds[0].references == ("1",)
    distracted = found["distractor"]["pair"].rounds
    assert distracted[0].content == (a, b, c, text("About images 1 to 2: Is image 1 red?"))
    assert distracted[1].content == (text("About images 1 to 2: And image 2?"),)
    assert found["distractor"]["single"].rounds[0].content == (text("About image 1: What?"), c, a)
    assert found["wrong_image"]["pair"].rounds[0].content == (c, c, text("Is image 1 red?"))
    assert found["wrong_image"]["between"].rounds[0].content[0] == c  # not of an example that shows `a` too
    assert found["removed"]["pair"].rounds[0].content == (a, text("Is image 1 red?"))
    assert found["question_first"]["pair"].rounds[0].content == (text("Is image 1 red?"), a, b)
    assert found["question_last"]["single"].rounds[0].content == (c, text("What?"))


@pytest.mark.parametrize(
    "question, choices, reference, expected",
    [
        ("Which image is red?", (), "2", "1"),
        ("Which image is red?", (), "Image 2.", "Image 1."),
        ("Which images are red?", (), "1 and 2", None),
        ("What number is in image 1?", (), "2", "2"),  # not the number of an image
        ("Which is larger?", (), "the first", "the second"),
        ("Which is larger?", ("the first", "the second"), "A", "A"),
        ("Which is larger?", ("the first", "the second"), "the first", "the second"),
        ("What is different?", ("less cars", "there are now two people"), "A", None),
        ("What is different?", (), "The people on the sidewalk are gone.", None),
        ("What is different?", (), "More cars in image 1", "More cars in image 2"),
    ],
)
def test_what_is_right_follows_a_swap(question, choices, reference, expected):
    content = (image("a.png"), image("b.png"), text(question))
    swapped = perturb("swap", [Example("1", (Round(content, (reference,), choices),))])
    assert [example.rounds[0].references for example in swapped] == ([] if expected is None else [(expected,)])
    assert not swapped or swapped[0].rounds[0].choices == choices[::-1]


def test_robustness_is_scored_beside_the_same_conversations(data, tmp_path):
    results = run(data, tmp_path, robustness=["removed", "swap"], limit=4)
    assert results["num_conversations"] == 4 and set(results["robustness"]) == {"removed", "swap"}
    removed = results["robustness"]["removed"]
    assert removed["num_conversations"] + removed["num_left_out"] == 4
    assert removed["scores"]["exact_match"]["difference"]["mean"] == 0
    assert len(read(tmp_path)) == 4 + sum(each["num_conversations"] for each in results["robustness"].values())
    assert "left out" in (tmp_path / "results.md").read_text()


STEPS = [
    {"ask": "What is it?", "images": ["0.png"], "references": ["a cat"]},
    {"ask": "And this?", "images": ["1.png"]},
    {"replace_image": 1, "image": "2.png"},
    {"edit_question": 2, "question": "And what is that?"},
    {"swap_images": [1, 2]},
    {"ask": "Why?"},
    {"remove_image": 2},
    {"move_round": [3, 1]},
    {"remove_round": 1},
]


def test_edits_recompute_only_what_follows_them(data, tmp_path):
    (data / "edits.jsonl").write_text(json.dumps({"key": "one", "steps": STEPS}) + "\n")
    results = run(data, tmp_path, "edits", "edits.jsonl", max_new_tokens=3)
    rounds = read(tmp_path)[0]["rounds"]
    assert [asked["step"] for asked in rounds] == [next(iter(step)) for step in STEPS]
    assert all(asked["is_same"] for asked in rounds)
    first, second, replaced, edited, *_ = rounds
    # By hand, a token a byte and the image: nothing is known at first.
    prompt = "You are a powerful vision-language assistant.\n\n### Image 1: \n### Question: What is it?\n### Answer:"
    assert first["tokens"] == first["tokens_anew"] == len(prompt) + IMAGE_SEQ_LENGTH
    # The new round, its image, and at most the answer before it, whose text may have other tokens.
    new = "\n\n### Image 2: \n### Question: And this?\n### Answer:"
    assert (
        len(new) + IMAGE_SEQ_LENGTH
        <= second["tokens"]
        <= len(f" {first['answer']}{new}".encode()) + 1 + IMAGE_SEQ_LENGTH
    )
    # Text from the replaced image on, and the new image, but not the other one.
    before = "You are a powerful vision-language assistant.\n\n### Image 1: "
    assert replaced["tokens"] == replaced["tokens_anew"] - len(before) - IMAGE_SEQ_LENGTH
    assert edited["tokens"] < replaced["tokens"] and rounds[4]["tokens"] < rounds[4]["tokens_anew"] - len(before)
    total = results["tokens"]["all"]
    assert total["steps"] == 9 and total["tokens"] == sum(asked["tokens"] for asked in rounds)
    assert total["same"] == 1 and 0 < total["share"] < 0.7 and results["tokens"]["swap_images"]["steps"] == 1
    assert results["scores"]["exact_match"]["all"]["num_rounds"] == 1
    assert [asked["num_images"] for asked in rounds] == [1, 2, 2, 2, 2, 2, 1, 1, 1]
    assert "tokens computed" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "steps, message",
    [
        ([{"ask": "x"}, {"rotate_image": 1}], r"step 2 has the keys rotate_image; expected one of ask, replace_image"),
        (
            [{"ask": "x"}, {"replace_image": 1, "image": "0.png"}],
            r"line 1, step 2 does not fit .*: there is no image 1",
        ),
        ([{"ask": "x"}, {"remove_round": 1}], r"step 2 does not fit the conversation: it is the only question"),
        ([{"ask": "x", "images": ["../0.png"]}], r"step 1 shows '../0.png'; expected the path of an image below"),
        ([{"ask": "x", "image": "0.png"}], r"step 1 has the key 'image'; expected ask, images, references"),
        ([{"ask": "x"}, {"move_round": 1}], r"step 2 does not fit the conversation: 1 is not a list of two numbers"),
        ([{"ask": "x"}, {"edit_question": 1}], r"step 2 has question None; expected text"),
        (
            [{"remove_round": 1}],
            r"step 1 does not fit the conversation: there is no question 1; the conversation has 0",
        ),
        ("x", r"broken.jsonl, line 1 has no list of steps"),
    ],
)
def test_a_file_of_edits_in_another_format_is_refused(data, steps, message):
    (data / "broken.jsonl").write_text(json.dumps({"steps": steps}) + "\n")
    with pytest.raises(SuiteError, match=message):
        list(load_edits(data / "broken.jsonl"))
    for key, value, message in (("groups", {"level": 1}, "expected {'name': 'value'"), ("system", 1, "expected text")):
        (data / "broken.jsonl").write_text(json.dumps({"steps": [{"ask": "x"}], key: value}) + "\n")
        with pytest.raises(SuiteError, match=f"line 1 has the .*{message}"):
            list(load_edits(data / "broken.jsonl"))


@pytest.mark.parametrize("name", sorted(SUITES.keys() - {"jsonl", "edits"}))
def test_each_published_suite_is_answered_and_scored(name, tmp_path):
    root = publish(name, tmp_path / "data")
    options = {"max_new_tokens": 2, "robustness": [*ROBUSTNESS]}
    results = evaluate(make_model(), name, root, tmp_path / "out", processor=make_processor(), **options)
    deciding = results["scores"].get(results["metrics"][0]) if results["metrics"] else None
    assert (deciding is None) == (SUITES[name].metrics == ("judge",))
    assert deciding is None or deciding["num_missing"] < results["num_rounds"]
    assert results["num_faults"] == 0 and results["robustness"]["removed"]["num_left_out"] == 0
    assert all(line["images"] for line in read(tmp_path / "out") if line["variant"] == "plain")
    assert ("mean_over" in (deciding or {})) == (name == "blink")


class JudgeServer(BaseHTTPRequestHandler):
    """Replies by what the question asks for; counts the requests."""

    requests: list[str] = []
    is_well = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.requests.append(prompt)
        tries = self.requests.count(prompt)
        reply = "It is fine.\nScore: 7"
        if "number 1?" in prompt and not self.is_well:
            reply = "Score: eleven" if tries < 3 else "**Score: 10/10**"
        if "number 2?" in prompt and not self.is_well:
            reply = "I would rather not. Score: 12"
        status = 500 if "number 3?" in prompt and not self.is_well else 200
        if "number 4?" in prompt and tries == 1:
            status = 429
        message = {
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}]
        }
        data = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], **message})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "0.2")
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args):
        pass


def test_a_judge_is_asked_again_and_never_silently_zero(data, straight, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("answers.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", "wise", retries=1, timeout=20)
    try:
        results = score_answers(tmp_path, ["judge"], judge)
        lines = read(tmp_path, "judge.jsonl")
        # Conversations 0 to 9 have one, two and three rounds in turn: number 2 has three, number 3 one.
        assert len(lines) == 19 and results["judge"] == {"model": "wise", "missing": 4, "open": 0}
        found = results["scores"]["judge"]
        assert found["all"]["mean"] == pytest.approx((13 * 0.7 + 2 * 1.0) / 15) and found["num_missing"] == 4
        assert any("no score to 4 answers" in note for note in results["notes"])
        of = {line["id"]: line for line in lines}
        assert [reply.get("fault") is None for reply in of["plain/line 2"]["replies"]] == [False, False, True]
        assert of["plain/line 3"]["score"] is None and len(of["plain/line 3"]["replies"]) == 3
        assert "InternalServerError" in of["plain/line 4"]["replies"][0]["fault"]
        assert len(of["plain/line 4"]["replies"]) == 1 and len(of["plain/line 5"]["replies"]) == 1  # busy, then well
        assert "Reference answer: Answer 0 0" in of["plain/line 1"]["prompt"] and of["plain/line 1"]["model"] == "wise"
        monkeypatch.setattr(JudgeServer, "is_well", True)
        JudgeServer.requests.clear()
        results = score_answers(tmp_path, ["judge"], judge)
        assert len(JudgeServer.requests) == 4 and results["judge"]["missing"] == 0
    finally:
        server.shutdown()
        server.server_close()
    nobody = Judge(judge.url, "absent", attempts=1, retries=0, timeout=2)
    results = score_answers(tmp_path, ["judge"], nobody)
    assert results["scores"]["judge"]["all"] is None and results["judge"]["missing"] == 19


def test_unknown_names_are_answered_with_the_nearest(data, tmp_path, monkeypatch, capsys):
    for options, message in (
        ({"suite": "jsnl"}, "no suite 'jsnl'; did you mean jsonl"),
        ({"metrics": ["exact"]}, "no metric 'exact'; did you mean exact_match"),
        ({"robustness": ["swop"]}, "no robustness test 'swop'; did you mean swap"),
        ({"history": "both"}, "history is 'both'; use own or references"),
        ({"metrics": ["judge"]}, "needs a judge model; give --judge_url"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evaluate as script

    for flags, message in (
        (["--suite", "blnk"], "There is no suite 'blnk'; did you mean blink? There are blink"),
        (["--suite", "jsonl"], "The suite jsonl is read from local files; name them with --data"),
        (["--suite", "jsonl", "--data", tmp_path / "no.jsonl"], "There is no file"),
        (["--suite", "jsonl", "--judge_url", "x"], "--judge_url and --judge_model require each other"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(data / "checkpoint"), *map(str, flags)])
        with pytest.raises(SystemExit, match="2"):
            script.main()
        assert f"evaluate.py: error: {message}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--score_only", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "holds no answers.jsonl with settings.json" in capsys.readouterr().err


def test_a_file_with_a_fault_is_named(data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(SuiteError, match=r"a.jsonl, line 1 has no question with an answer"):
        run(data, tmp_path / "out", file=tmp_path / "a.jsonl")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    chat = [{"role": "user", "content": [image("broken.png"), text("x")]}, {"role": "assistant", "content": "y"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(SuiteError, match=r"plain/line 1 shows an image that cannot be used: .* is not an image"):
        run(data, tmp_path / "out", file=tmp_path / "b.jsonl")


def test_own_conversations_have_options_references_and_groups(data, tmp_path):
    def write(*extras):
        chat = [{"role": "user", "content": "Which is it?"}, {"role": "assistant", "content": "B"}]
        lines = [json.dumps({"messages": chat, **extra}) + "\n" for extra in extras]
        (tmp_path / "own.jsonl").write_text("".join(lines))
        return tmp_path / "own.jsonl"

    options = {"choices": ["a cat", "a dog"], "groups": {"task": "animals"}}
    file = write(options, {"references": ["a dog"], "groups": {"task": "words"}}, {})
    results = run(data, tmp_path / "out", file=file, metrics=["choice", "choice_likelihood", "exact_match", "cider"])
    assert [results["scores"][name]["all"]["num_rounds"] for name in results["metrics"]] == [1, 1, 2, 2]
    assert {*results["scores"]["exact_match"]["by"]["task"]} == {"words"}
    assert "| words | 1 | - |" in (tmp_path / "out" / "results.md").read_text()
    assert [line["rounds"][0]["references"] for line in read(tmp_path / "out")][1] == ["B", "a dog"]
    results = run(data, tmp_path / "text", file=write({}), metrics=["exact_match", "choice"])
    assert any("choice has no score: no question has options" in note for note in results["notes"])
    for extra, message in (
        ({"choices": "a cat"}, "has choices 'a cat'; expected a list of texts"),
        ({"choices": ["a cat"]}, "has the answer 'B'; expected a letter or text of its choices"),
        ({"groups": ["x"]}, r"has the groups \['x'\]; expected"),
        ({"groups": {"round": "x"}}, "has a group 'round', by which results are broken down"),
    ):
        with pytest.raises(SuiteError, match=message):
            run(data, tmp_path / "out", file=write(extra))


def test_a_checkpoint_without_the_weights_of_a_tower_is_refused(data, tmp_path):
    make_model().save_pretrained(tmp_path / "checkpoint")
    make_processor().save_pretrained(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if "vision_tower" not in key}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d\d weights.*vision_tower.*name a complete checkpoint"):
        evaluate(tmp_path / "checkpoint", "jsonl", data / "test.jsonl", tmp_path / "out")


def test_images_that_were_trained_on_are_counted(data, straight, tmp_path):
    results = score_answers(straight)
    assert results["trained_on"] is None and "not known" in " ".join(results["notes"])
    digests = [ImageReference.parse(str(data / f"{number}.png")).digest() for number in (1, 3)]
    for name in ("answers.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    try:
        save_training_images([*digests, "of another image"], data / "checkpoint")
        results = score_answers(tmp_path)
    finally:
        (data / "checkpoint" / "training_images.json").unlink()
    assert results["trained_on"] == {"num_images": 5, "num_trained_on": 2}
    assert "WARNING: 2 of 5 images were trained on." in (tmp_path / "results.md").read_text()


def test_results_go_to_the_model_card_in_place_of_earlier_ones(data, straight, tmp_path, monkeypatch, capsys):
    """Numbers are those of metrics.json; text outside of the marked sections stays."""
    import evaluate as script

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(data / "checkpoint", checkpoint)
    shutil.copytree(straight, output)
    flags = ["evaluate.py", str(checkpoint), "--score_only", "--output", str(output), "--update_card"]
    monkeypatch.setattr(sys, "argv", flags)
    script.main()
    assert f"The model card: {checkpoint / 'README.md'}" in capsys.readouterr().out
    results = json.loads((output / "metrics.json").read_text())
    card = ModelCard.load(checkpoint / "README.md")
    means = {name: round(score["all"]["mean"], 4) for name, score in results["scores"].items()}
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == means
    assert {(each.dataset_type, each.dataset_name) for each in card.data.eval_results} == {
        ("test.jsonl", "jsonl, test.jsonl")
    }
    assert "On 10 conversations, 19 rounds. Answers are greedy, of at most 6 tokens; each round sees the" in card.text
    assert f"| anls | {results['scores']['anls']['all']['mean']:.3f} | " in card.text and "not measured" in card.text

    (checkpoint / "README.md").write_text(str(card).replace("## Use", "My own words.\n\n## Use"))
    results = run(data, tmp_path / "part", robustness=["wrong_image"], limit=2, metrics=["anls"])
    update_card(tmp_path / "part", checkpoint)
    card = ModelCard.load(checkpoint / "README.md")
    plain, wrong = card.data.eval_results
    assert (plain.dataset_config, wrong.dataset_config) == (None, "wrong_image")
    assert wrong.metric_value == round(results["robustness"]["wrong_image"]["scores"]["anls"]["all"]["mean"], 4)
    assert plain.dataset_args == {"limit": 2} and card.data.model_name == "checkpoint"
    assert "My own words." in card.text and "On the first 2 conversations" in card.text
    assert card.text.count("### jsonl, test.jsonl\n") == 1 and "- `wrong_image`: other images;" in card.text
    update_card(output, checkpoint)
    assert "wrong_image`: other" not in (checkpoint / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "someone/model", "--suite", "blink", "--update_card"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "The model card of someone/model cannot be updated, since it is not a folder" in capsys.readouterr().err


class PageParser(HTMLParser):
    """The elements of a page, and whether all are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.classes, self.images = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.classes += (attributes.get("class") or "").split()
        if tag == "img":
            self.images.append(attributes["src"])
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_shows_every_conversation_and_needs_no_network(straight):
    page = (straight / "index.html").read_text()
    parser = PageParser()
    parser.feed(page)
    assert parser.open == [] and parser.classes.count("conversation") == 10 and parser.classes.count("round") == 19
    assert len(parser.images) == sum(len(line["images"]) for line in read(straight))
    assert all(source.startswith("data:image/jpeg;base64,") for source in parser.images)
    assert "http" not in page and "<script" not in page and 'name="viewport"' in page
    assert "Answer 9 0" in page and parser.classes.count("wrong") == 19 and 'id="show-wrong"' in page
    less = score_answers(straight, ["contains"], page_size=3)
    assert "3 of 10 conversations" in (straight / "index.html").read_text() and less["metrics"] == ["contains"]
    score_answers(straight)
