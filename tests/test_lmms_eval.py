"""lmms-eval, from the registry and unforked: its command line runs tasks of drawn pictures on a checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import draw_picture, make_model, make_processor
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from test_finetune import environment


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: tests/requirements-lmms-eval.txt")

CHOICES = ["a cat", "two black dogs", "a bird"]
UTILS = '''
def visuals(doc):
    return doc["images"]

def messages(doc):
    """The images between the words, and an earlier round."""
    first, *rest = doc["images"]
    asked = [{"type": "image", "url": first}, {"type": "text", "text": "<pad> What is <image>?"}]
    content = [block for image in rest for block in ({"type": "text", "text": "And"}, {"type": "image", "url": image})]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
        {"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]},
    ]

def keep(doc, results):
    return {"exact_match": 0.0}
'''
TASK = """
task: {task}
dataset_path: {folder}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.visuals
doc_to_text: question
doc_to_target: answer
{rest}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
KINDS = {
    "pictures_chat": (
        "generate_until",
        "exact_match",
        "doc_to_messages: !function utils.messages\nprocess_results: !function utils.keep\n"
        'generation_kwargs: {max_new_tokens: 24, until: ["STOP"], temperature: 0, do_sample: false, num_beams: 1}',
    ),
    "pictures_simple": ("generate_until", "exact_match", "generation_kwargs: {max_new_tokens: 24}"),
    "pictures_choice": ("multiple_choice", "acc", f"doc_to_choice: {CHOICES}"),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model and its checkpoint, seven documents of one to three pictures, and the tasks that ask about them."""
    folder = tmp_path_factory.mktemp("lmms-eval")
    model, processor = make_model(), make_processor()
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    documents = {
        "images": [[draw_picture(index + place) for place in range(1 + index % 3)] for index in range(7)],
        "question": [f"What is{' <image>' * (1 + index % 3)} number {index}{'?' * index}" for index in range(7)],
        "answer": [index % 3 for index in range(7)],
    }
    features = Features({"images": Sequence(Image()), "question": Value("string"), "answer": Value("int64")})
    DatasetDict(test=Dataset.from_dict(documents, features)).save_to_disk(folder / "pictures")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "utils.py").write_text(UTILS)
    for name, (output_type, metric, rest) in KINDS.items():
        task = TASK.format(task=name, folder=folder / "pictures", output_type=output_type, metric=metric, rest=rest)
        (folder / "tasks" / f"{name}.yaml").write_text(task)
    return folder, model, processor, [dict(zip(documents, values)) for values in zip(*documents.values())]


def run(folder, names, *flags, launcher=(sys.executable, "-m")):
    """The command line of lmms-eval: for each task its results, and the answers to its documents."""
    output = folder / "-".join(names)
    command = [*launcher, "lmms_eval", "--model", "visualchat", "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={folder / 'checkpoint'},dtype=float32"]
    command += ["--tasks", ",".join(names), "--include_path", str(folder / "tasks")]
    command += ["--output_path", str(output), "--log_samples", *flags]
    settings = environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true"}
    completed = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300)
    files = [*output.rglob("*_results.json"), *(file for name in names for file in output.rglob(f"*_{name}.jsonl"))]
    # It exits with 0 after an error too.
    assert len(files) == 1 + len(names), completed.stdout[-2000:] + completed.stderr[-4000:]
    results, *samples = (file.read_text() for file in files)
    lines = [sorted(map(json.loads, each.splitlines()), key=lambda line: line["doc_id"]) for each in samples]
    answers = [[line["filtered_resps"] for line in each] for each in lines]
    return {name: (json.loads(results)["results"][name], each) for name, each in zip(names, answers)}


def picture(image):
    return {"type": "image", "image": image}


def text(words):
    return {"type": "text", "text": words}


def interleaved(document):
    """The question with each picture in the place of its `<image>`."""
    start, *pieces = document["question"].split("<image>")
    pairs = [(picture(image), text(piece)) for image, piece in zip(document["images"], pieces)]
    return [text(start), *(block for pair in pairs for block in pair)]


def chat_of(document):
    first, *rest = document["images"]
    return [
        {"role": "user", "content": [text("< pad> What is "), picture(first), text("?")]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": [block for image in rest for block in (text("And"), picture(image))]
         + [text(document["question"].replace("<image>", "< image>"))]},
    ]  # fmt: skip


def generate(model, processor, messages):
    """The answer to one conversation by itself."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def mean_loss(model, processor, document, choice):
    """The loss of an answer in training, and whether it is the greedy one."""
    messages = [{"role": "user", "content": interleaved(document)}, {"role": "assistant", "content": choice}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_labels=True
    )
    outputs = model(**inputs)
    is_answer = inputs["labels"][0, 1:] >= 0
    is_greedy = outputs.logits[0, :-1].argmax(-1)[is_answer] == inputs["labels"][0, 1:][is_answer]
    return float(outputs.loss), bool(is_greedy.all())


@pytest.mark.slow
@pytest.mark.processes
def test_a_chat_task_in_two_processes_gets_the_answers_of_single_conversations(setting):
    folder, model, processor, documents = setting
    whole = [generate(model, processor, chat_of(document)) for document in documents]
    until = next(each for answer in whole for each in answer[2:] if each.isascii() and each.isalnum())
    task = folder / "tasks" / "pictures_chat.yaml"
    task.write_text(task.read_text().replace("STOP", until))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m")
    _, answers = run(folder, ["pictures_chat"], launcher=torchrun)["pictures_chat"]
    assert answers == [answer.partition(until)[0].strip() for answer in whole]
    assert len(set(answers)) > 1 and answers != whole


@pytest.mark.slow
def test_the_simple_interface_places_images_and_compares_likelihoods(setting):
    folder, model, processor, documents = setting
    found = run(folder, ["pictures_simple", "pictures_choice"], "--force_simple")
    asked = [[{"role": "user", "content": interleaved(document)}] for document in documents]
    expected = [generate(model, processor, messages) for messages in asked]
    assert found["pictures_simple"][1] == [answer.partition("\n\n")[0].strip() for answer in expected]

    losses = [[mean_loss(model, processor, document, choice) for choice in CHOICES] for document in documents]
    results, options = found["pictures_choice"]
    to_numbers = [[float(loss) for loss, _ in each] for each in options]
    torch.testing.assert_close(torch.tensor(to_numbers), torch.tensor([[loss for loss, _ in each] for each in losses]))
    assert [[str(greedy) for _, greedy in each] for each in options] == [
        [str(greedy) for _, greedy in each] for each in losses
    ]
    best = [min(range(3), key=lambda index: each[index][0]) for each in losses]
    right = sum(document["answer"] == choice for document, choice in zip(documents, best))
    assert results["acc,none"] == pytest.approx(right / len(documents))


def test_what_cannot_be_answered_is_told(setting):
    from lmms_eval.api.instance import Instance
    from loguru import logger

    from processing_visualchat.evaluation.lmms_eval_model import VisualChat

    folder, *_, documents = setting
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        VisualChat(str(folder / "checkpoint"), batch_size="auto")
    model = VisualChat(str(folder / "checkpoint"), dtype="bfloat16", batch_size=2, device="cpu")
    assert model.answerer.model.dtype == torch.bfloat16
    model.task_dict["task"] = {"test": documents}
    warnings = []
    logger.add(warnings.append, format="{message}")

    def ask(kind, *arguments):
        metadata = {"task": "task", "doc_id": 0, "repeats": 1}
        return getattr(model, kind)([Instance(kind, (*arguments, 0, "task", "test"), 0, metadata)])

    def show(content):
        return lambda document: [{"role": "user", "content": [content]}]

    options = {"max_new_tokens": 4, "temperature": 1, "top_k": 2, "image_aspect_ratio": "pad"}
    assert isinstance(ask("generate_until", "", show(text("Hello")), options)[0], str)
    assert ask("generate_until", "", show(text("long " * 300)), options) == [""]
    assert "image_aspect_ratio" in warnings[0] and "1 questions are longer than the model reads" in warnings[-1]
    with pytest.raises(ValueError, match="shows video, and VisualChat reads text and images only"):
        ask("generate_until", "", show({"type": "video", "url": "a.mp4"}), options)
    with pytest.raises(ValueError, match=r"Document 0 of task takes 1,\d+ tokens, and the model reads 1,024"):
        ask("loglikelihood", "long " * 300, " answer", lambda document: [])
