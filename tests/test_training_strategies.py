"""
The demo's model under every strategy, on one and two processes: the same losses and gradients, also where one process
has images and the other has none, and checkpoints that are complete in the middle of training.
"""

import json
import os
import runpy
import socket
import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from digits.conversations import OF_ONE, OF_TWO, converse
from digits.model import build_digits_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from study.scans import load_scans
from test_finetune import EXAMPLES, environment, losses
from test_merge_adapter import merge
from test_remote_code import CODE, HIDE_PACKAGES, REPOSITORY
from transformers import AutoModelForImageTextToText, AutoProcessor, logging

from modeling_visualchat.model_card_visualchat import CARD
from processing_visualchat import load_image


STEPS, MIDDLE = 10, 5
# Of each step, the images in the conversations of both processes.
STEPS_OF_IMAGES = ["12", "01", "10", "00", "21", "02", "11", "00", "20", "12"]
UNREAD = "model.vision_tower.post_layernorm"  # by any loss; it is trained, and does not move
ACCUMULATION, CHECKPOINTING = "--gradient_accumulation_steps", "--activation_checkpointing"
VARIANTS = {
    "frozen": ["--trainable", f"+{UNREAD}", ACCUMULATION, "2", CHECKPOINTING, "true"],
    "lora": ["--lora", "language_model", "vision_tower", ACCUMULATION, "1"],
}
SAMPLED = [("zero3", 2, "frozen"), ("fsdp2", 2, "frozen")]  # runs that write answers, with weights in both processes
NOT_DISTRIBUTED = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def fsdp2():
    """The environment that `accelerate launch` makes of fsdp2.yaml, on a CPU."""
    words = ["--config_file", str(EXAMPLES / "configs" / "fsdp2.yaml"), "--mixed_precision", "no", "finetune.py"]
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    variables = prepare_multi_gpu_env(launched)
    names = [name for name in variables if name.startswith(("ACCELERATE_", "FSDP_"))]
    return {name: variables[name] for name in names} | {"ACCELERATE_TORCH_DEVICE": "cpu"}


# Flags, and a function that makes environment variables.
STRATEGIES = {
    "plain": ([], lambda: NOT_DISTRIBUTED),
    "ddp": ([], dict),
    **{f"zero{stage}": (["--deepspeed", f"{EXAMPLES}/configs/zero{stage}.json"], dict) for stage in (1, 2, 3)},
    "fsdp2": ([], fsdp2),
}
RUNS = [("plain", 1), *((strategy, number) for number in (1, 2) for strategy in list(STRATEGIES)[1:])]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The model of the demo, and conversations about its scans in JSON lines."""
    folder = tmp_path_factory.mktemp("demo")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build_digits_model()
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    lines = []
    for number, num_images in enumerate(map(int, "".join(STEPS_OF_IMAGES))):
        chosen = load_scans()[0][2 * number : 2 * number + 2]
        question = (OF_ONE if num_images == 1 else OF_TWO)[number % 2]
        shown, digits = [scan for scan, _ in chosen[:num_images]], [digit for _, digit in chosen]
        messages = converse([(shown, question, digits[: max(num_images, 1)] if question in OF_ONE else digits)])
        for place, block in enumerate(messages[0]["content"][:num_images]):
            block["path"] = f"{number}-{place}.png"
            load_image(block.pop("image")).save(folder / block["path"])
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "eval.jsonl").write_text("\n".join(lines[2:4]))
    return folder


def command(demo, strategy, num_processes, variant):
    """The flags and the environment of a run; on two processes, it writes a checkpoint in the middle."""
    flags, variables = STRATEGIES[strategy]
    batch_size = 2 // num_processes
    words = [
        "--config", EXAMPLES / "configs" / "finetune.yaml", "--model", demo / "checkpoint", "--max_length", 400,
        "--train_file", demo / "train.jsonl", "--eval_file", demo / "eval.jsonl", "--max_steps", STEPS,
        "--per_device_train_batch_size", batch_size, "--per_device_eval_batch_size", batch_size,
        "--train_sampling_strategy", "sequential", "--logging_steps", 1, "--save_steps", MIDDLE,
        "--save_strategy", "steps" if num_processes == 2 else "no", "--cpu_threads", 1, "--disable_tqdm", "true",
        "--output_dir", demo / f"{strategy}-{num_processes}-{variant}", *flags, *VARIANTS[variant],
        "--samples", int((strategy, num_processes, variant) in SAMPLED),
    ]  # fmt: skip
    return [*map(str, words)], variables()


def start(folder, commands, num_processes):
    """Starts processes that run commands together; returns them with the files of their output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = environment() | {"WORLD_SIZE": f"{num_processes}", "LOCAL_WORLD_SIZE": f"{num_processes}"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, str(REPOSITORY / "tests" / "finetune_commands.py"), json.dumps(commands)]
    for rank in range(num_processes):
        output, variables = folder / f"output-{num_processes}-{rank}.txt", {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        with output.open("w") as file:
            yield subprocess.Popen(script, env=shared | variables, stdout=file, stderr=subprocess.STDOUT), output


@pytest.fixture(scope="module")
def folder(demo):
    """The folder in which all runs have ended, each in a folder of its own; what hangs is ended."""
    started = []
    for number in (1, 2):
        chosen = [(*run, variant) for run in RUNS for variant in VARIANTS if run[1] == number]
        started += start(demo, [command(demo, *run) for run in chosen], number)
    try:
        failed = [output.read_text()[-3000:] for process, output in started if process.wait(timeout=400)]
    finally:
        for process, _ in started:
            process.kill()
    assert not failed, "\n".join(failed)
    return demo


def history(folder, name):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry[name] for entry in entries if name in entry])


pytestmark = [pytest.mark.slow, pytest.mark.processes]
by_variant = pytest.mark.parametrize("variant", VARIANTS)
by_run = pytest.mark.parametrize("strategy, num_processes", RUNS, ids=lambda value: str(value))


@by_variant
@by_run
def test_losses_and_gradients_are_those_of_one_process(folder, strategy, num_processes, variant):
    run, plain = folder / f"{strategy}-{num_processes}-{variant}", folder / f"plain-1-{variant}"
    assert len(losses(plain)) == STEPS
    for name in ("loss", "grad_norm", "eval_loss", "loss_source/train.jsonl", "eval_loss_round/1"):
        torch.testing.assert_close(history(run, name), history(plain, name), rtol=1e-4, atol=1e-4)


@by_run
def test_frozen_weights_do_not_move_by_one_bit(folder, strategy, num_processes):
    before = load_file(folder / "checkpoint" / "model.safetensors")
    after = load_file(folder / f"{strategy}-{num_processes}-frozen" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))}
    assert before.keys() == after.keys()
    assert all(name.startswith(("model.multi_modal_projector.", "model.language_model.embed_")) for name in moved)
    assert len(moved) == 5


# What a checkpoint holds, beside what Trainer resumes from.
REPOSITORY_FILES = {
    "frozen": {"config.json", "generation_config.json", "model.safetensors", *CODE},
    "lora": {"adapter_config.json", "adapter_model.safetensors", "processing_visualchat.py"},
}
PROCESSOR_FILES = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def checkpoint(folder, strategy, variant):
    return folder / f"{strategy}-2-{variant}" / f"checkpoint-{MIDDLE}"


def first_messages(folder):
    """Of the first conversation, which shows an image."""
    messages = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["messages"]
    messages[0]["content"][0]["path"] = str(folder / "0-0.png")
    return messages


def logits(path, folder):
    """Those of a checkpoint for the first conversation."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    messages = first_messages(folder)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


@by_variant
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_checkpoint_in_the_middle_is_a_complete_repository(folder, strategy, variant):
    saved, expected = checkpoint(folder, strategy, variant), checkpoint(folder, "ddp", variant)
    assert REPOSITORY_FILES[variant] | PROCESSOR_FILES <= {path.name for path in saved.iterdir()}
    card = ModelCard.load(saved / CARD)
    assert f"| steps | {MIDDLE} optimizer steps" in card.text
    assert f'checkpoint = "{saved.parent.name}/{saved.name}"' in card.text
    assert card.data.library_name == ("peft" if variant == "lora" else "transformers")
    assert ("for `checkpoint`, which `from_pretrained` loads" in card.text) == (variant == "lora")
    torch.testing.assert_close(logits(saved, folder), logits(expected, folder), rtol=1e-3, atol=1e-3)


OPEN = """
import json, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
messages, folders = json.loads(sys.argv[1]), sys.argv[2:]
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    print(json.dumps(model(**inputs).logits.tolist()))
"""


def test_checkpoints_open_without_the_packages(folder, tmp_path, monkeypatch):
    """Those in the middle of training with sharded weights, an adapter, and that adapter merged."""
    sharded = [checkpoint(folder, strategy, "frozen") for strategy in ("zero3", "fsdp2")]
    adapter, merged = checkpoint(folder, "zero3", "lora"), tmp_path / "merged"
    merge(monkeypatch, adapter, merged)
    folders = [*sharded, adapter, merged]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [sys.executable, "-I", "-c", HIDE_PACKAGES + OPEN, json.dumps(first_messages(folder)), *map(str, folders)],
        capture_output=True, text=True, env=variables, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    opened = [torch.tensor(json.loads(line)) for line in completed.stdout.splitlines()[-len(folders) :]]
    for path, actual in zip(folders, opened):
        torch.testing.assert_close(actual, logits(path, folder), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(opened[-1], opened[-2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", ["zero3-2-frozen/checkpoint-5", "fsdp2-2-lora/checkpoint-5", "zero3-2-frozen"])
def test_the_chat_opens_what_an_interrupted_and_a_finished_run_leave(folder, monkeypatch, capsys, run):
    lines = iter(["what digit is it?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "argv", ["chat.py", str(folder / run), "--image", str(folder / "0-0.png")])
    monkeypatch.setattr(logging, "set_verbosity_error", lambda: None)
    runpy.run_path(str(EXAMPLES / "chat.py"), run_name="__main__")
    assert "8 x 8]" in capsys.readouterr().out and next(lines, None) is None
