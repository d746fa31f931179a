"""Runs that are interrupted and resumed: killed, stopped, on a full disk, with other processes; and those refused."""

import importlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_picture, make_model, make_processor
from forked_runs import OUTPUTS
from safetensors.torch import load_file
from test_finetune import environment, finetune_error, image, losses, message
from test_remote_code import REPOSITORY
from training_arguments import FinetuneError
from training_resume import RECORD, check_checkpoint, describe_run, find_fault, list_differences, list_sizes


CONFIG = REPOSITORY / "examples" / "configs" / "finetune.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two models of one architecture, one of another, and two files of records of equal size."""
    folder = tmp_path_factory.mktemp("data")
    for name, model in (
        ("model", make_model()),
        ("other_weights", make_model(seed=1)),
        ("other_config", make_model(tie_word_embeddings=True)),
    ):
        model.save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    draw_picture(0).save(folder / "0.png")
    for name, word in (("train", "red"), ("other", "tan")):
        record = {"messages": [message(image("0.png")), message(word, "assistant")]}
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 4)
        (folder / f"{name}.yaml").write_text(f"data_root: {folder}\nsources: [{{name: x, path: {name}.jsonl}}]")
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text((folder / f"{name}.jsonl").read_text().replace("0.png", "../0.png"))
    return folder


def parse(flags, monkeypatch):
    script = importlib.import_module("finetune")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    return script.parse_arguments([*map(str, flags)], script.FinetuneArguments, "", script.DIGITS_CONFIG)


def write_record(folder, described, sharding="plain training", processes=1):
    """A checkpoint with the record of a run."""
    (folder / "states").mkdir(parents=True)
    for name in ("model.safetensors", "states/optimizer.pt", "latest"):
        (folder / name).write_bytes(bytes(10))
    record = {"run": described, "files": list_sizes(folder), "sharding": sharding, "processes": processes}
    (folder / RECORD).write_text(json.dumps(record))
    (folder / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--model", "other_weights"], ["content of model.safetensors of --model: "]),
        (["--model", "other_config"], ["config.tie_word_embeddings: false in the checkpoint, true now"]),
        (["--trainable", "projector"], ['trainable: ["input_embeddings", "multi_modal_projector"] in the checkpoint']),
        (["--lora", "language_model", "--lora_r", "4"], ["lora: null in", "lora_r: 16 in the checkpoint, 4 now"]),
        (["--attention_type", "causal"], ['attention_type: null in the checkpoint, "causal" now']),
        (["--train_file", "other/train.jsonl"], ["content of train.jsonl: "]),
        (["--train_file", "other.jsonl"], ["content of other.jsonl: null in", "content of train.jsonl: "]),
        (["--seed", "1", "--packing", "true"], ["packing: false in the checkpoint, true now", "seed: 42 in"]),
        (["--max_length", "100"], ["max_length: 4096 in the checkpoint, 100 now"]),
        (
            ["--per_device_train_batch_size", "2"],
            ["(processes x per_device_train_batch_size x gradient_accumulation_steps): 128 in the checkpoint, 256"],
        ),
    ],
    ids=lambda value: value[0].strip("-") if value[0].startswith("--") else "",
)
def test_another_model_or_other_data_are_refused_with_what_differs(tmp_path, monkeypatch, data, flags, messages):
    monkeypatch.chdir(data)
    run = ["--config", CONFIG, "--model", "model", "--train_file", "train.jsonl", "--output_dir", tmp_path / "out"]
    write_record(tmp_path / "out" / "checkpoint-2", describe_run(*parse(run, monkeypatch)))
    error = finetune_error(monkeypatch, *run, *flags, "--resume_from_checkpoint", "true")
    assert "checkpoint-2 was made by another run" in error and f"--model {tmp_path}" in error
    assert all(message in error for message in messages), error
    assert not (tmp_path / "out" / "trainable_parameters.md").exists()  # nothing was loaded


def test_a_mixture_may_move_and_not_change(tmp_path, monkeypatch, data):
    """Paths, and arguments of neither the model nor the order, may differ."""
    shutil.copytree(data, tmp_path / "moved")
    flags = ["--config", CONFIG, "--output_dir", tmp_path / "out"]

    def describe(folder, name="train", *others):
        flagged = ["--model", folder / "model", "--mixture", folder / f"{name}.yaml", "--data_root", folder, *others]
        return describe_run(*parse([*flags, *flagged], monkeypatch))

    described = describe(data)
    assert describe(tmp_path / "moved", "train", "--learning_rate", "0.1", "--num_train_epochs", "9") == described
    differences = [*list_differences(described, describe(data, "other"))]
    assert [each.split(":")[0] for each in differences] == [
        "content of other.jsonl", "content of train.jsonl", "mixture.sources.x.path",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (("DeepSpeed ZeRO-2", 2), (3, 2), "saved by DeepSpeed ZeRO-2 on 2 processes, .* DeepSpeed ZeRO-3 on 2 proc"),
        (
            ("DeepSpeed ZeRO-2", 2),
            (2, 1),
            r"be resumed by DeepSpeed ZeRO-2 on 1 process\. Resume it as it was; .* pass --model",
        ),
        (("plain training", 1), (3, 1), "saved by plain training on 1 process, .* by DeepSpeed ZeRO-3"),
        (("DeepSpeed ZeRO-3", 1), (None, 1), "saved by DeepSpeed ZeRO-3 on 1 process, .* by plain training"),
        (("plain training", 2), (None, 1), ""),
    ],
    ids=["stage", "processes", "from plain", "to plain", "processes without sharding"],
)
def test_sharded_states_are_resumed_as_they_were_saved(tmp_path, capsys, before, now, message):
    write_record(tmp_path, {}, *before)
    deepspeed = now[0] and SimpleNamespace(config={"zero_optimization": {"stage": now[0]}})
    training_arguments = SimpleNamespace(hf_deepspeed_config=deepspeed, world_size=now[1])
    if message:
        with pytest.raises(FinetuneError, match=message):
            check_checkpoint(str(tmp_path), {}, training_arguments)
    else:
        check_checkpoint(str(tmp_path), {}, training_arguments)
        assert "is of 2 processes, and is resumed on 1: batches" in capsys.readouterr().out


def test_a_checkpoint_is_whole_with_all_its_files_only(tmp_path):
    write_record(tmp_path, {})
    assert find_fault(tmp_path) == ""
    (tmp_path / "README.md").write_text("An evaluation adds to the card.")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert path.name in find_fault(tmp_path)
        path.unlink()
        assert path.name in find_fault(tmp_path)
        path.write_bytes(content)
    assert find_fault(tmp_path) == ""


DEMO = [
    "--max_steps", "20", "--per_device_train_batch_size", "4", "--logging_steps", "3", "--save_strategy", "steps",
    "--save_steps", "1", "--save_total_limit", "2", "--resume_from_checkpoint", "auto",
]  # fmt: skip


class Runs:
    """Runs of a script by `forked_runs.py`."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("forked_runs.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.server = subprocess.Popen(command, text=True, env=environment(), **pipes)

    def __call__(self, output, *flags, script="finetune", **job):
        """What `forked_runs.py` says of a run, and what the run printed."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        job |= {"script": script, "flags": [*map(str, flags), OUTPUTS[script], str(output)], "log": str(log)}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return {**json.loads(self.server.stdout.readline()), "log": log.read_text()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.server.stdin.close()
    runs.server.wait()


@pytest.fixture(scope="module")
def straight(runs):
    """The demo without interruption."""
    ended = runs(runs.folder / "straight", *DEMO)
    assert ended["codes"] == [0], ended["log"]
    return runs.folder / "straight"


def result(folder, name="model.safetensors"):
    """The weights and losses of a finished run."""
    return load_file(folder / name), torch.tensor(losses(folder))


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(runs, straight):
    """At seeded moments, some of which are within a save; between two saves there are about a hundred moments."""
    rng, output, num_cut = random.Random(0), runs.folder / "killed", 0
    for _ in range(20):
        job = {"signal": signal.SIGKILL, "moment": rng.randrange(1, 200), "delay": rng.random() / 100}
        ended = runs(output, *DEMO, **job)
        assert ended["codes"] == [-signal.SIGKILL], ended["log"]
        num_cut += any(map(find_fault, output.glob("checkpoint-*")))
    for _ in range(2):  # to its end, and then there is no step left
        ended = runs(output, *DEMO)
        assert ended["codes"] == [0] and num_cut >= 5, ended["log"]
        torch.testing.assert_close(result(output), result(straight), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.processes
def test_stopped_runs_continue_on_other_numbers_of_processes(runs, straight):
    """Two processes, one, and two again: with the same batch, the same run."""
    output, two = runs.folder / "stopped", ["--per_device_train_batch_size", "2"]
    for flags, num_processes in ((two, 2), ([], 1)):
        stop = {"processes": num_processes, "signal": signal.SIGTERM, "step": 12}
        ended = runs(output, *DEMO, "--save_steps", "50", *flags, **stop)
        assert ended["codes"] == [143] * num_processes, ended["log"]
        step = max(int(path.name[11:]) for path in output.glob("checkpoint-*"))
        assert f"Stopped by SIGTERM after step {step}; the checkpoint is {output}/checkpoint-{step}" in ended["log"]
    ended = runs(output, *DEMO, *two, processes=2)
    assert ended["codes"] == [0, 0] and "is of 1 process, and is resumed on 2" in ended["log"], ended["log"]
    torch.testing.assert_close(result(output), result(straight), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_is_stopped_within_an_evaluation_or_an_accumulated_batch(runs, data):
    """Before the first step, and in its middle; dropout goes on with the random numbers that it would have had."""
    flags = [
        "--config", CONFIG, "--model", data / "model", "--train_file", data / "train.jsonl", "--eval_file",
        data / "train.jsonl", "--eval_on_start", "true", "--gradient_accumulation_steps", "2", "--logging_steps", "3",
        "--lora", "language_model", "--lora_dropout", "0.5", "--resume_from_checkpoint", "auto",
        "--num_train_epochs", "2",
    ]  # fmt: skip
    outputs = [runs.folder / "evaluated", runs.folder / "stopped in an evaluation"]
    assert runs(outputs[0], *flags)["codes"] == [0]
    for number, step in ((1, 0), (11, 2)):  # the first prediction; the first half of the third training step
        ended = runs(outputs[1], *flags, signal=signal.SIGTERM, step=number)
        assert ended["codes"] == [143] and f"Stopped by SIGTERM after step {step};" in ended["log"], ended["log"]
    ended = runs(outputs[1], *flags)
    assert ended["codes"] == [0], ended["log"]
    results = [result(output, "adapter_model.safetensors") for output in outputs]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.processes
def test_a_full_disk_leaves_the_last_checkpoint(runs, straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        ended = runs(disk / "out", *DEMO)
        (kept,) = (disk / "out").glob("checkpoint-*")
        assert ended["codes"] == [1] and not find_fault(kept)
        assert re.search(
            rf"it needs about \d.* MiB, and \d.* MiB are free. The last whole .* is {kept}\.", ended["log"]
        )
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_generation_continues_and_two_processes_give_the_same_answers(runs, data):
    """Killed while it writes its settings, and twice within its batches; the last line is then torn."""
    folder = runs.folder / "generated"
    folder.mkdir()
    records = [{"messages": [message(image("0.png") if number % 2 else "?" * (number + 1))]} for number in range(24)]
    records.insert(4, {"messages": [message([{"type": "image", "path": "nowhere.png"}])]})
    (data / "questions.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    flags = [data / "model", "--input", data / "questions.jsonl", "--max_new_tokens", "5", "--batch_size", "2"]
    straight, killed, two = (folder / f"{name}.jsonl" for name in ("straight", "killed", "two"))
    ended = runs(straight, *flags, script="generate")
    assert ended["codes"] == [3] and "24 conversations answered, 1 failed" in ended["log"], ended["log"]
    parts, counts = Path(f"{killed}.parts") / "answers.jsonl", []
    for moment in (1, 9, 9):
        ended = runs(killed, *flags, script="generate", signal=signal.SIGKILL, moment=moment)
        assert ended["codes"] == [-signal.SIGKILL] and not killed.exists(), ended["log"]
        counts.append(len(parts.read_text().splitlines()) if parts.exists() else 0)
    with parts.open("a") as file:
        file.write('{"id": "line')
    assert counts[0] == 0 < counts[1] < counts[2] < 24
    for output in (killed, two):
        ended = runs(output, *flags, script="generate", processes=2)
        assert ended["codes"] == [3, 0] and ended["log"].count(" answered, ") == 1, ended["log"]
        assert output.read_bytes() == straight.read_bytes()
    assert not [*folder.glob("*.parts/answers-*")]
