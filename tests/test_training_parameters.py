"""What is trained: presets, patterns, LoRA, groups with a learning rate each, and the table of it."""

import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_picture, make_model, make_processor, pixels, tokens
from safetensors.torch import load_file
from test_finetune import finetune_error
from training_arguments import FinetuneError, find_deepspeed_conflicts, find_saving_conflicts
from training_parameters import (
    TABLE_NAME,
    GroupedTrainer,
    GroupOptions,
    choose_parameters,
    group_of,
    tabulate_parameters,
)
from transformers import AutoProcessor, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat, load_conversations


PROJECTOR, TABLE = "model.multi_modal_projector.", "model.language_model.embed_tokens."
DECODER, TOWER = "model.language_model.", "model.vision_tower."
COMMON = [
    "--use_cpu", "true", "--max_steps", "2", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true",
]  # fmt: skip
UNREAD = "post_layernorm"  # the tower's pooled output is not read


def arguments(**values):
    """The arguments of finetune.py that say what is trained."""
    defaults = {
        "trainable": None, "lora": None, "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target": None,
        "learning_rates": None, "weight_decays": None, "frozen_dtype": "float32", "quantization": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | values)


def training_arguments(folder, **values):
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", max_steps=2, remove_unused_columns=False,
        per_device_train_batch_size=2, learning_rate=0.01, **values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two conversations about pictures, as JSON lines, and a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(2):
        draw_picture(index).save(folder / f"{index}.png")
        content = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Number {index}."}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    make_model().save_pretrained(folder / "checkpoint")
    make_processor().save_pretrained(folder / "checkpoint")
    return folder


def train(model, chosen, data, folder, **values):
    """Two steps of Trainer; returns it with the parameters as they were before."""
    model = choose_parameters(model, chosen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = training_arguments(folder, **values)
    trainer = GroupedTrainer(
        model=model,
        group_options=GroupOptions.from_arguments(chosen, settings),
        args=settings,
        train_dataset=load_conversations(data / "train.jsonl", make_processor()),
        data_collator=DataCollatorForVisualChat(make_processor(), 400),
    )
    trainer.train()
    return trainer, before


@pytest.mark.parametrize(
    ("selection", "trained"),
    [
        (None, (PROJECTOR, TABLE)),
        (["projector"], (PROJECTOR,)),
        (["projector+embeddings"], (PROJECTOR, TABLE)),
        (["+language_model"], (PROJECTOR, DECODER)),
        (["projector+vision_tower"], (PROJECTOR, TOWER)),
        (["+lm_head"], (PROJECTOR, TABLE, "lm_head.")),
        (["projector", "model.language_model.layers.1.self_attn"], (PROJECTOR, DECODER + "layers.1.self_attn.")),
        (["*.layers.?.mlp.up_proj.weight"], (DECODER + "layers.0.mlp.up_proj", DECODER + "layers.1.mlp.up_proj")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_is_selected_moves_and_nothing_else_does_by_one_bit(tmp_path, data, selection, trained):
    model = make_model()
    trainer, before = train(model, arguments(trainable=selection), data, tmp_path)
    after = dict(trainer.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))}
    assert moved == {name for name in before if name.startswith(trained) and UNREAD not in name}
    frozen = [name for name in before if not after[name].requires_grad]
    assert set(frozen).isdisjoint(moved) and len(frozen) + len(moved) <= len(before)


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.parametrize("towers", [["language_model"], ["vision_tower"], ["language_model", "vision_tower"]])
def test_lora_trains_pairs_and_whole_parts_and_the_adapter_holds_both(tmp_path, data, towers, tied):
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "base")
    trainer, before = train(model, arguments(lora=towers), data, tmp_path / "out")
    after = dict(trainer.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if after[name].requires_grad}
    assert all("lora_" in name or ".modules_to_save." in name for name in moved)
    groups = {name: group_of(model, name) for name in moved}
    assert set(groups.values()) == {"lora", "projector", "embeddings"}
    adapted = {
        tower
        for tower in ("language_model", "vision_tower")
        for name in moved
        if f"{tower}." in name and groups[name] == "lora"
    }
    assert adapted == set(towers)
    trainer.save_model()
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": tokens(3, "I", 9), "pixel_values": pixels(0)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_lora_layers_are_those_that_match():
    model = choose_parameters(
        make_model(), arguments(lora=["language_model"], lora_target=["q_proj", "*.0.mlp.up_proj"])
    )
    pairs = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    layers = {f"{DECODER}layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert pairs == layers | {f"{DECODER}layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainable": ["projecter"]}, "Unknown trainable part 'projecter' (did you mean 'projector'?); choose from"),
        ({"trainable": ["+language_modle"]}, "did you mean 'language_model'?"),
        (
            {"trainable": [f"{DECODER}layer.0.*"]},
            f"matches the pattern '{DECODER}layer.0.*'; the nearest are {DECODER}layers.0.",
        ),
        ({"lora": ["decoder"]}, "--lora is for language_model and vision_tower, not for decoder"),
        (
            {"lora": ["language_model"], "lora_target": ["query_proj"]},
            f"no linear layer of language_model matches --lora_target query_proj; the nearest are {DECODER}layers.",
        ),
        (
            {"lora": ["language_model"], "trainable": ["+language_model"]},
            "--trainable language_model: it would train the tower as a whole too",
        ),
        (
            {"lora": ["vision_tower"], "trainable": ["model.lang*"]},
            "--trainable model.lang*: patterns are not supported with it",
        ),
    ],
    ids=str,
)
def test_what_does_not_exist_is_named_with_the_nearest(values, message):
    with pytest.raises(FinetuneError) as refused:
        choose_parameters(make_model(), arguments(**values))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rates": ["embedding=1e-4"]}, "unknown group 'embedding' (did you mean 'embeddings'?)"),
        ({"weight_decays": {"lora": "much"}}, "--weight_decays lora='much' is not a number"),
        ({"learning_rates": ["lora"]}, "--learning_rates lora='' is not a number"),
    ],
    ids=str,
)
def test_wrong_groups_are_named(tmp_path, values, message):
    with pytest.raises(FinetuneError) as refused:
        GroupOptions.from_arguments(arguments(**values), training_arguments(tmp_path))
    assert message in str(refused.value)


def test_each_group_has_its_learning_rate_and_weight_decay_through_the_schedule(tmp_path, data):
    """Biases and norms never decay; the schedule scales every learning rate alike."""
    chosen = arguments(
        trainable=["+language_model"], learning_rates={"language_model": 1e-4}, weight_decays=["projector=0.1"]
    )
    trainer, _ = train(
        make_model(),
        chosen,
        data,
        tmp_path,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        weight_decay=0.01,
    )
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == sum(each.requires_grad for each in trainer.model.parameters())
    assert found[f"{PROJECTOR}linear.weight"] == pytest.approx((0.005, 0.1))
    assert found[f"{PROJECTOR}linear.bias"] == found[f"{PROJECTOR}norm.weight"] == pytest.approx((0.005, 0.0))
    assert found[f"{TABLE}weight"] == pytest.approx((0.005, 0.01))
    assert found[f"{DECODER}layers.1.mlp.up_proj.weight"] == pytest.approx((5e-5, 0.01))
    assert found[f"{DECODER}norm.weight"] == pytest.approx((5e-5, 0.0))


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
def test_the_table_counts_by_group_and_says_what_is_tied(tmp_path, tied):
    chosen = arguments(learning_rates={"embeddings": 1e-4})
    model = choose_parameters(make_model(tie_word_embeddings=tied), chosen)
    table = tabulate_parameters(model, GroupOptions.from_arguments(chosen, training_arguments(tmp_path)))
    words = 259 * 32
    projector, tower = 32 * 32 + 3 * 32, sum(each.numel() for each in model.model.vision_tower.parameters())
    decoder = sum(each.numel() for each in model.model.language_model.parameters()) - words
    tables = words if tied else 2 * words
    assert table.splitlines()[:7] == [
        "| group | parameters | trained | learning rate | weight decay |",
        "| --- | --- | --- | --- | --- |",
        f"| projector | {projector:,} | {projector:,} | 0.01 | 0 |",
        f"| embeddings | {tables:,} | {words:,} | 0.0001 | 0 |",
        f"| language_model | {decoder:,} | 0 |  |  |",
        f"| vision_tower | {tower:,} | 0 |  |  |",
        f"| total | {projector + tables + decoder + tower:,} | {projector + words:,} |  |  |",
    ]
    said = "one table (tied): training the input trains the output too" if tied else "the output (lm_head) frozen"
    assert said in table


def test_lora_from_the_command_line_prints_and_saves_the_table(tmp_path, data, monkeypatch, capsys):
    flags = [
        "--lora",
        "language_model",
        "--trainable",
        "projector",
        "--learning_rates",
        "lora=2e-4",
        "embeddings=1e-4",
    ]
    run_finetune(monkeypatch, *COMMON, *data_flags(data), "--output_dir", tmp_path / "out", *flags)
    table = (tmp_path / "out" / TABLE_NAME).read_text()
    assert "| lora | 14,848 | 14,848 | 0.0002 | 0 |" in table and table in capsys.readouterr().out
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["r"] == 16 and adapter["modules_to_save"] == ["model.multi_modal_projector"]
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| trained | 15,968 of 64,928 parameters: projector, lora |" in card
    assert "| learning rate | 5e-05 (lora 0.0002, embeddings 0.0001), linear" in card


def test_frozen_weights_in_bfloat16_stay_so_and_trained_ones_are_float32(tmp_path, data, monkeypatch):
    dtypes = ["--frozen_dtype", "bfloat16", "--bf16", "true"]
    run_finetune(monkeypatch, *COMMON, *data_flags(data), "--output_dir", tmp_path / "out", *dtypes)
    before = VisualChatForConditionalGeneration.from_pretrained(data / "checkpoint", dtype=torch.bfloat16).state_dict()
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in after.items():
        is_trained = name.startswith((PROJECTOR, TABLE))
        assert weight.dtype == (torch.float32 if is_trained else torch.bfloat16), name
        assert is_trained or torch.equal(weight, before[name]), name


def data_flags(data):
    return ["--model", data / "checkpoint", "--train_file", data / "train.jsonl", "--max_length", "400"]


def run_finetune(monkeypatch, *flags):
    """The script in this process, which saves the seconds that another takes to start."""
    script = importlib.import_module("finetune")
    monkeypatch.setattr(script, "set_cpu_threads", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    script.main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--quantization", "4bit", "--trainable", "+language_model"],
            "--quantization 4bit requires a frozen decoder",
        ),
        (["--lora_target", "q_proj"], "--lora_target requires --lora"),
        (["--frozen_dtype", "bfloat16"], "--frozen_dtype bfloat16 requires --bf16 true or --fp16 true"),
        (["--vision_features", "x", "--lora", "vision_tower"], "requires --model and a frozen vision tower"),
        (["--lora", "decoder"], "--lora is for language_model and vision_tower, not for decoder"),
        (["--learning_rates", "head=1"], "unknown group 'head'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_arguments_that_exclude_each_other_are_named(tmp_path, data, monkeypatch, flags, message):
    output = tmp_path / "out"
    assert message in finetune_error(monkeypatch, *data_flags(data), *flags, "--output_dir", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True}},
            r"train_micro_batch_size_per_gpu=4 vs hf per_device_train_batch_size=2; gradient_clipping=0.5 vs hf "
            r"max_grad_norm=1.0; bf16.enabled=True vs hf bf16\|bf16_full_eval=False. Set these keys of the file to",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "has an optimizer of its own, .* remove its key"),
        (
            {"zero_optimization": {"stage": 3}},
            "partitions the weights .ZeRO-3., which --quantization does not support",
        ),
        ({"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}, None),
    ],
    ids=["values", "optimizer", "quantized", "auto"],
)
def test_a_deepspeed_file_that_contradicts_the_arguments_is_refused(tmp_path, content, message):
    settings = training_arguments(tmp_path)
    settings.deepspeed, settings.hf_deepspeed_config = "zero.json", HfTrainerDeepSpeedConfig(content)
    settings.hf_deepspeed_config.trainer_config_process(settings)
    chosen = arguments(learning_rates=["lora=1e-4"], quantization="4bit" if message and "quant" in message else None)
    conflicts = find_deepspeed_conflicts(chosen, settings)
    assert len(conflicts) == bool(message)
    assert not message or re.fullmatch(f"zero.json .*{message}.*", conflicts[0])


@pytest.mark.parametrize(
    ("values", "zero", "variables", "message"),
    [
        (
            {"push_to_hub": True},
            {},
            {},
            "--push_to_hub requires a token that may write to the Hub: run `hf auth login`",
        ),
        ({"push_to_hub": True, "hub_token": "hf_x"}, {}, {}, None),
        (
            {},
            {"stage": 3},
            {},
            'zero.json would write checkpoints without weights: set "stage3_gather_16bit_weights_on',
        ),
        ({}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, {}, None),
        ({}, {"stage": 2}, {}, None),
        ({}, {}, {"ACCELERATE_USE_FSDP": "true"}, "set fsdp_state_dict_type to FULL_STATE_DICT"),
        ({}, {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, None),
    ],
    ids=str,
)
def test_a_run_that_would_save_no_weights_or_not_push_is_refused(
    tmp_path, monkeypatch, values, zero, variables, message
):
    settings = training_arguments(tmp_path, **values)
    settings.deepspeed, settings.hf_deepspeed_config = (
        "zero.json",
        HfTrainerDeepSpeedConfig({"zero_optimization": zero}),
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("training_arguments.get_token", lambda: None)
    conflicts = find_saving_conflicts(settings)
    assert len(conflicts) == bool(message) and (not message or message in conflicts[0])
