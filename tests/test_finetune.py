"""`finetune.py` as users run it: flags, invalid input, resuming, custom data, DeepSpeed, and the chat that follows."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_picture, make_model, make_processor
from huggingface_hub import ModelCard
from published_data import write_published_data
from test_remote_code import REPOSITORY
from transformers import LlamaConfig

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat, ImageReference, load_conversations
from processing_visualchat.data.image_contents import load_training_images


EXAMPLES = REPOSITORY / "examples"
DATA_ARGUMENTS = (
    "model", "train_file", "eval_file", "mixture", "data_root", "packing", "trainable", "vision_features",
    "attention_type", "merge", "image_attention", "cross_layer_interval", "projector_type", "image_root",
    "lora", "lora_target", "learning_rates", "weight_decays", "frozen_dtype", "quantization",
    "group_by_image", "max_per_image",
)  # fmt: skip
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def finetune(*flags, launcher=(), check=True, timeout=400):
    """Runs `accelerate launch examples/finetune.py`."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher,
        str(EXAMPLES / "finetune.py"),
        *map(str, flags),
    ]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout)
    if check:
        assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-4000:]
    return completed


def finetune_directly(*flags):
    """Runs the script without the launcher, which adds nothing to an error."""
    command = [sys.executable, str(EXAMPLES / "finetune.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400)


def finetune_error(monkeypatch, *flags):
    """What the script ends with in this process: a process of its own takes seconds to start."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("finetune")
    monkeypatch.setattr(script, "set_cpu_threads", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    with pytest.raises((SystemExit, ValueError)) as ended:
        script.main()
    return str(ended.value)


def read_logs(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder):
    return [entry["loss"] for entry in read_logs(folder) if "loss" in entry]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Custom data: pictures, JSON lines that name them by relative paths, and a checkpoint to train."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    lines = []
    for index in range(8):
        draw_picture(index).save(folder / "pictures" / f"{index}.png")
        image = {"type": "image", "path": f"pictures/{index}.png"}
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
                    {"role": "assistant", "content": f"Number {index}."},
                ]
            }
        )
    lines.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_model().save_pretrained(folder / "checkpoint")
    make_processor().save_pretrained(folder / "checkpoint")
    return folder


@pytest.mark.slow
@pytest.mark.processes
def test_the_default_runs_and_leaves_everything(tmp_path):
    output = tmp_path / "out"
    completed = finetune(*SHORT, "--output_dir", output)
    for name in (
        "accuracy.txt",
        "README.md",
        "chats.png",
        "loss.png",
        "model.safetensors",
        "processor_config.json",
        "modeling_visualchat.py",
    ):
        assert (output / name).stat().st_size > 0, name
    for name in ("README.md", "model.safetensors", "processor_config.json", "modeling_visualchat.py"):
        assert (output / "checkpoint-2" / name).stat().st_size > 0, name
    table = (output / "accuracy.txt").read_text()
    card = ModelCard.load(output / "README.md")
    assert table in card.text and "Run 1 started from new weights." in card.text
    assert [each.dataset_config for each in card.data.eval_results] == ["all about one image", "all across two images"]
    assert "what is their sum?" in table and "all across two images" in table and table in completed.stdout
    assert f"python examples/chat.py {output}" in completed.stdout
    assert len(losses(output)) == 2
    for resume in ([], ["--resume_from_checkpoint", "false"]):
        again = finetune_directly(*SHORT, "--output_dir", output, *resume)
        assert again.returncode != 0 and "exists and is not empty" in again.stderr
    picture = next((output / "pictures").iterdir())
    assert len(load_conversations(output / "examples.jsonl", make_processor())) == 3
    lines = [
        "what digit is it?",
        f"/image {output}/nowhere.png",
        f"/image {picture}",
        "and this?",
        "/what",
        "/list",
        "/edit 1 which digit?",
        f"/replace 2 {picture}",
        "/remove 7",
        "/reset",
        "Hi",
    ]
    chat = subprocess.run(
        [
            sys.executable, str(EXAMPLES / "chat.py"), str(output), "--image", str(picture),
            "--image_memory", str(tmp_path / "memory"),
        ],
        input="\n".join([*lines, "/quit"]),
        capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr[-2000:]
    assert (
        "128 x 128" in chat.stdout
        and "error: No image file at" in chat.stdout
        and "Unknown command /what" in chat.stdout
        and f"image 2: {picture}" in chat.stdout
        and "There is no image 7; the images of the conversation: 1, 2" in chat.stdout
    )
    assert len(list((tmp_path / "memory").iterdir())) == 1  # the same picture twice


def deepspeed(stage):
    """Flags of the script and of the launcher for two processes that partition the parameters."""
    flags = ["--deepspeed", EXAMPLES / "configs" / f"zero{stage}.json"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return flags, ["--use_deepspeed", "--num_processes", "2", "--main_process_port", str(port)]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_with_deepspeed_run_the_main_job(tmp_path):
    flags, launcher = deepspeed(3)
    finetune(*SHORT, "--output_dir", tmp_path / "out", *flags, launcher=launcher)
    assert "all across two images" in (tmp_path / "out" / "accuracy.txt").read_text()
    assert len(losses(tmp_path / "out")) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 processes with ZeRO-3 on " in card
    assert re.search(r"\| trained \| (\d{3},\d{3}) of \1 parameters", card)
    weights = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert not any("model.model" in name for name in weights)
    projection = weights["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert projection.shape == (128, 128) and 0.055 < projection.std() < 0.065  # drawn as the configuration says


@pytest.mark.slow
@pytest.mark.processes
def test_custom_data_trains_only_trainable_modules(tmp_path, data):
    flags = [
        "--config", EXAMPLES / "configs" / "finetune.yaml",
        "--model", data / "checkpoint", "--train_file", data / "train.jsonl",
        "--eval_file", data / "train.jsonl", "--max_length", "400", "--per_device_train_batch_size", "3",
        "--gradient_accumulation_steps", "1", "--logging_steps", "1", "--num_train_epochs", "2",
        "--samples", "0",
    ]  # fmt: skip
    output = tmp_path / "out"
    finetune(*flags, "--output_dir", output)
    pictures = {ImageReference.parse(str(data / "pictures" / f"{index}.png")).digest() for index in range(8)}
    assert load_training_images(str(output)) == pictures
    before = VisualChatForConditionalGeneration.from_pretrained(data / "checkpoint").state_dict()
    after = VisualChatForConditionalGeneration.from_pretrained(output).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        "model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias",
        "model.multi_modal_projector.norm.weight", "model.multi_modal_projector.norm.bias",
        "model.language_model.embed_tokens.weight",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
def test_a_mixture_trains_on_two_processes(tmp_path, data):
    """Long conversations are shortened by whole rounds, and images come from files and from base64."""
    root = write_published_data(tmp_path / "published")
    (tmp_path / "mixture.yaml").write_text(
        "eval_share: 0.4\nsources:\n"
        + "".join(f"  - {{name: {name}, concatenate: 2}}\n" for name in ("llava_dial", "otter_mimicit_sd", "aokvqa"))
    )
    flags, launcher = deepspeed(2)
    completed = finetune(
        "--config", EXAMPLES / "configs" / "finetune.yaml", "--model", data / "checkpoint",
        "--mixture", tmp_path / "mixture.yaml", "--data_root", root, "--overlong", "drop_first_rounds",
        "--max_length", "300", "--num_train_epochs", "1", "--gradient_accumulation_steps", "1",
        "--save_strategy", "no", "--logging_steps", "1", "--output_dir", tmp_path / "out", *flags, launcher=launcher,
    )  # fmt: skip
    assert completed.stdout.count("otter_mimicit_sd: 3 records read") == 1 and "eval_loss" in completed.stdout
    sources = {key for logs in read_logs(tmp_path / "out") for key in logs if key.startswith("loss_source/")}
    assert sources == {f"loss_source/{name}" for name in ("llava_dial", "otter_mimicit_sd", "aokvqa")}


def write_custom_data(folder):
    """Conversations in the schema of LLaVA with one picture each, one with a broken picture, and one far too long."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
    records = []
    for number in range(12):
        draw_picture(number % 4).save(folder / f"{number % 4}.png")
        records.append({"conversations": turns, "image": f"{number % 4}.png"})
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    long = [turns[0], {"from": "gpt", "value": "y" * 900}]
    records += [{"conversations": turns, "image": "broken.png"}, {"conversations": long, "image": "0.png"}]
    (folder / "own.json").write_text(json.dumps(records))
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, records)))


@pytest.mark.slow
@pytest.mark.processes
def test_packs_train_and_the_vision_tower_runs_once_per_image(tmp_path, data):
    write_custom_data(tmp_path)
    completed = finetune(
        "--config", EXAMPLES / "configs" / "finetune.yaml", "--model", data / "checkpoint",
        "--train_file", tmp_path / "own.json", "--packing", "true", "--overlong", "skip", "--max_length", "300",
        "--vision_features", tmp_path / "features", "--check_images", "false", "--num_train_epochs", "2",
        "--gradient_accumulation_steps", "1", "--save_strategy", "no", "--logging_steps", "1",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "own.json: 14 records read, 14 used" in completed.stdout
    assert "14 conversations in 8 packs of up to 300 tokens" in completed.stdout, completed.stdout
    assert len(list((tmp_path / "features").iterdir())) == 4
    assert "{'shortened': 0, 'skipped': 2, 'broken': 2}" in completed.stdout
    assert len(losses(tmp_path / "out")) == 16


@pytest.mark.slow
@pytest.mark.processes
def test_a_stream_trains_on_two_processes(tmp_path, data):
    write_custom_data(tmp_path)
    recipe = tmp_path / "stream.yaml"
    shutil.copy(tmp_path / "own.jsonl", tmp_path / "own_too.jsonl")
    recipe.write_text("streaming: true\neval_share: 0.5\nsources: [{name: own, path: own*.jsonl}]")
    flags, launcher = deepspeed(2)
    common = [
        "--config", EXAMPLES / "configs" / "finetune.yaml", "--model", data / "checkpoint", "--mixture", recipe,
        "--data_root", tmp_path, "--overlong", "skip", "--max_length", "300", "--gradient_accumulation_steps", "1",
        "--save_strategy", "no", "--logging_steps", "1",
    ]  # fmt: skip
    completed = finetune(*common, "--max_steps", "20", "--output_dir", tmp_path / "out", *flags, launcher=launcher)
    assert len(losses(tmp_path / "out")) == 20 and "eval_loss" in completed.stdout
    assert all("loss_source/own" in logs for logs in read_logs(tmp_path / "out") if "loss" in logs)
    refused = finetune(*common, "--output_dir", tmp_path / "other", check=False)
    assert "set the number of steps with --max_steps" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is not supported"),
        (["--attention_type", "crossed"], "argument --attention_type.*: invalid choice: 'crossed'"),
        (["--projector_type", "conv"], "argument --projector_type.*: invalid choice: 'conv'"),
        (["--config", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["--train_file", "x.jsonl"], r"--model and --train_file \(or --mixture\) require each other"),
        (["--max_step", "1", "--nonsense", "2"], "nonsense"),
        (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
        (["--data_root", "x"], "--data_root requires --mixture"),
        (["--packing", "true"], "--packing requires --model"),
        (["--vision_features", "x"], "--vision_features requires --model and a frozen vision tower"),
        (["--mixture", "x.yaml", "--data_root", "x"], r"--model and --train_file \(or --mixture\) require each other"),
        (["--mixture", "x.yaml", "--train_file", "x"], "leave out --train_file and --eval_file"),
        (["--overlong", "cut"], "invalid choice: 'cut'"),
        (["--trainable", "lm_head"], "--trainable requires --model"),
        (["--model", "x", "--mixture", "x.yaml", "--image_root", "x"], "--image_root requires --train_file"),
        (["--eval_file", "x.jsonl"], "--eval_file requires --model and --train_file"),
        (["--group_by_image", "true"], "--group_by_image requires --model"),
        (["--max_per_image", "2"], "--max_per_image 2 is a number from 1 up and requires --group_by_image true"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_are_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, flags, message):
    output = tmp_path / "out"
    error = finetune_error(monkeypatch, *flags, "--output_dir", output)
    assert re.search(message, error) and not output.exists()
    assert "usage:" not in capsys.readouterr().err


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from training_arguments import find_conflicts

    arguments = SimpleNamespace(**dict.fromkeys(DATA_ARGUMENTS))
    training_arguments = SimpleNamespace(label_smoothing_factor=0.0, world_size=1)
    assert find_conflicts(arguments, training_arguments) == []
    monkeypatch.setenv("WORLD_SIZE", "3")
    (conflict,) = find_conflicts(arguments, training_arguments)
    assert conflict.startswith("3 processes were started and each trains a model of its own")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("form", ["own.jsonl", "own.json", "mixture", "evaluation"])
def test_over_length_conversations_are_refused_before_the_first_step(tmp_path, monkeypatch, form, packing):
    """With the first records' names, their number and the flag, wherever the data come from."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from training_data import FinetuneError, load_data

    def record(answer):
        return json.dumps({"messages": [message("Hi"), message(answer, "assistant")]})

    lines = [record("y" * (400 if number % 5 == 2 else 4)) for number in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(["", *lines]))
    (tmp_path / "own.json").write_text(f"[{','.join(lines)}]")
    (tmp_path / "short.jsonl").write_text(lines[0])
    (tmp_path / "mixture.yaml").write_text("sources: [{name: own, path: own.json}]\neval_share: 0.0")
    arguments = SimpleNamespace(
        mixture=tmp_path / "mixture.yaml" if form == "mixture" else None, data_root=str(tmp_path), check_images=True,
        train_file=str(tmp_path / ("short.jsonl" if form == "evaluation" else form)),
        eval_file=str(tmp_path / "own.json") if form == "evaluation" else None, packing=packing, overlong="error",
        image_root=None, group_by_image=False, max_per_image=None,
    )  # fmt: skip
    training_arguments = SimpleNamespace(train_sampling_strategy="random", seed=0, data_seed=None)
    collator = DataCollatorForVisualChat(make_processor(), 300)
    with pytest.raises(FinetuneError, match=r"4 of 20 conversations have more than 300 tokens") as refused:
        load_data(arguments, training_arguments, collator)
    first = "own.jsonl, line 4 (" if form == "own.jsonl" else "own.json, record "
    assert first in str(refused.value) and "Set --overlong to drop_first_rounds" in str(refused.value)
    assert str(refused.value).count(" tokens)") == 3
    arguments.overlong = "skip"
    train_dataset, eval_dataset, *_ = load_data(arguments, training_arguments, collator)
    assert len(train_dataset) >= 1 and (form != "evaluation" or len(eval_dataset) == 16)


def test_a_checkpoint_of_another_model_type_is_refused(tmp_path, monkeypatch):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "data.jsonl").write_text("{}")
    flags = ["--model", tmp_path / "llama", "--train_file", tmp_path / "data.jsonl"]
    error = finetune_error(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    assert "configuration of a 'llama' model, not of a 'visualchat' one" in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_of_a_configuration_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "wrong.yaml").write_text("learning_rte: 1\n")
    error = finetune_error(monkeypatch, "--config", tmp_path / "wrong.yaml", "--output_dir", tmp_path / "out")
    assert "wrong.yaml has the unknown argument learning_rte" in error


def message(content, role="user"):
    return {"role": role, "content": content}


def image(path):
    return [{"type": "image", "path": path}, {"type": "text", "text": "What is it?"}]


ANSWER = message("A thing.", "assistant")


@pytest.mark.parametrize(
    ("line", "error", "expected"),
    [
        ('{"messages": [', ValueError, r"data.jsonl, line 2 is not JSON: Expecting value at column"),
        ({"text": "Hi"}, ValueError, "line 2 has no messages; it has the keys text"),
        ({"messages": [ANSWER]}, ValueError, "line 2 has no question with an answer"),
        (
            {"messages": [message("a <image> b"), ANSWER]},
            ValueError,
            "line 2 has 1 places for images, .* and 0 images",
        ),
        (
            {"messages": [message(image("gone.png")), ANSWER]},
            FileNotFoundError,
            "line 2 names the image gone.png; there is no file",
        ),
        (
            {"messages": [message(image("broken.png")), ANSWER]},
            ValueError,
            "line 2: The image file .*broken.png is not an image",
        ),
        (
            {"messages": [message([{"type": "image"}]), ANSWER]},
            ValueError,
            "line 2 has 1 places for images, .* and 0 images",
        ),
        ({"messages": [message([{"type": "image", "path": 7}]), ANSWER]}, ValueError, "line 2 has an image without a"),
        (
            {"messages": [message([{"type": "image", "base64": "!"}]), ANSWER]},
            ValueError,
            "line 2: The image inside its record is not base64 text: '!'",
        ),
        ({"messages": [message("Hi")]}, ValueError, "line 2 has no question with an answer"),
        (
            {"messages": [message("Hi"), message("A.<eos>", "assistant")]},
            ValueError,
            "line 2 is invalid: The conversation, message 1 holds a literal <eos>",
        ),
        (b'{"messages": "\xff"}', ValueError, "line 2 is not UTF-8 text: invalid start byte"),
    ],
    ids=[
        "broken JSON",
        "no messages",
        "no user",
        "literal mark",
        "missing image",
        "not an image",
        "no source",
        "path not a text",
        "broken base64",
        "no answer",
        "special token",
        "not UTF-8",
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path, line, error, expected):
    (tmp_path / "broken.png").write_text("words")
    good = json.dumps({"messages": [message("Hi"), ANSWER]})
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "data.jsonl").write_bytes(good.encode() + b"\n" + line + b"\n")
    with pytest.raises(error, match=expected):
        load_conversations(tmp_path / "data.jsonl", make_processor())


def test_a_data_file_that_holds_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No data file at"):
        load_conversations(tmp_path / "gone.jsonl", make_processor())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation"):
        load_conversations(tmp_path / "empty.jsonl", make_processor())


def test_image_paths_are_relative_to_the_data_file(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dataset = load_conversations(data / "train.jsonl", make_processor())
    assert len(dataset) == 9
    first = dataset[0]["messages"]
    assert first[0]["content"][0]["path"] == str(data / "pictures" / "0.png")
    for block in (
        {"type": "image", "url": "pictures/1.png"},
        {"type": "image_url", "image_url": {"url": "pictures/1.png"}},
    ):
        line = {"messages": [message([block]), ANSWER]}
        (data / "other.jsonl").write_text(json.dumps(line))
        read = load_conversations(data / "other.jsonl", make_processor())[0]["messages"]
        assert read[0]["content"] == [{"type": "image", "path": str(data / "pictures" / "1.png")}]
