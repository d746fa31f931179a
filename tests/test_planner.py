"""The planner against what training allocates, its tables and advice, and the recipes and files that it plans."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_config, make_model
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from finetune import FinetuneArguments
from planning.hours import Machine, Mixture
from planning.models import Parameters, build_model, read_config
from planning.plans import GIB, Planner, advise, cheapest, strategy_of
from planning.step_memory import Batch, simulate_step
from planning.strategies import CONFIGS, STRATEGIES, DeviceMemory
from test_finetune import EXAMPLES, environment, finetune_error
from test_training_parameters import data, data_flags  # noqa: F401, a fixture
from training_arguments import FinetuneError, parse_recipe


sys.path.insert(0, str(EXAMPLES / "benchmarks"))
from memory import BATCH, MIB, foresee, make_arguments, make_settings, measure
from memory import make_config as make_measured_config


RECIPES = sorted(CONFIGS.glob("*lora_*.yaml")) + sorted(CONFIGS.glob("visualchat_*.yaml"))
FLOAT32, MIXED = ({}, make_settings()), ({"frozen_dtype": "bfloat16"}, make_settings(bf16=True))


@pytest.mark.parametrize(
    ("size", "options", "values", "dtypes", "checkpoints"),
    [
        ("small", {}, {}, MIXED, True),
        pytest.param("deep", {}, {}, FLOAT32, True, marks=pytest.mark.slow),
        pytest.param("small", {}, {"trainable": ["+language_model"]}, FLOAT32, True, marks=pytest.mark.slow),
        pytest.param("small", {}, {"trainable": ["projector+vision_tower"]}, MIXED, False, marks=pytest.mark.slow),
        pytest.param("small", {}, {"lora": ["language_model"]}, MIXED, False, marks=pytest.mark.slow),
        pytest.param("small", {"image_attention": "self_and_text"}, {}, FLOAT32, False, marks=pytest.mark.slow),
        pytest.param("small", {"attention_type": "causal"}, {}, MIXED, True, marks=pytest.mark.slow),
        pytest.param("small", {"attention_type": "cross"}, {}, FLOAT32, False, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else "",
)
def test_what_is_foreseen_is_what_training_allocates(size, options, values, dtypes, checkpoints):
    """Within 2%, where 15% are promised; all other combinations are in benchmarks/memory.py."""
    config, arguments = make_measured_config(size, **options), make_arguments(**values, **dtypes[0])
    measured = measure(config, arguments, dtypes[1], checkpoints)
    assert measured > 5 * MIB
    assert foresee(config, arguments, dtypes[1], checkpoints) == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "checkpoints"), [(None, True), (None, False), (["+language_model"], True)], ids=str
)
def test_two_short_decoders_tell_what_a_long_one_needs(trainable, checkpoints):
    config = make_config()
    config.text_config.num_hidden_layers = 10
    planner = Planner(config, make_arguments(trainable=trainable), make_settings(), Batch(2, 60, 2))
    assert planner._shorter_lengths() == (4, 8)
    extended, whole = planner.step(False, checkpoints), planner._simulate(10, False, checkpoints, True)
    assert extended.peak == pytest.approx(whole.peak, rel=1e-3)
    assert extended.activations == pytest.approx(whole.activations, rel=1e-3)
    assert extended.flops == pytest.approx(whole.flops, rel=1e-6)


@pytest.mark.parametrize("decoder", ["qwen2", "gemma3", "smollm3"])
def test_decoders_whose_layers_differ_can_be_planned(decoder):
    config = make_config(decoder)
    step = Planner(config, make_arguments(), make_settings(), Batch(1, 12, 1)).step(False, True)
    assert step.peak > 0 and step.flops > 0


def test_operations_are_those_of_the_products():
    """A decoder without attention to speak of: two operations for each weight forward, and four backward."""
    arguments, config = make_arguments(trainable=["+language_model+lm_head"]), make_config()
    model = build_model(config, arguments)
    linear = sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))
    linear -= sum(
        each.weight.numel() for each in model.model.vision_tower.modules() if isinstance(each, torch.nn.Linear)
    )
    linear -= model.model.multi_modal_projector.linear.weight.numel()
    step = simulate_step(model, Batch(1, 2, 0))
    head = model.lm_head.weight.numel()  # only one token is followed by another
    assert step.flops == pytest.approx(6 * (2 * (linear - head) + head), rel=0.02)


def test_quantized_weights_count_as_what_they_were_and_weigh_a_quarter():
    arguments = make_arguments(lora=["language_model"], quantization="4bit", frozen_dtype="bfloat16")
    plain, quantized = (
        Parameters.of(build_model(make_measured_config("wide"), each))
        for each in (make_arguments(lora=["language_model"], frozen_dtype="bfloat16"), arguments)
    )
    assert (plain.total, plain.trained) == (quantized.total, quantized.trained)
    linear = 3 * (2 * 384**2 + 2 * 384 * 192 + 3 * 384 * 1056)
    assert plain.frozen_bytes - quantized.frozen_bytes == pytest.approx(linear * (2 - 0.5 - 1 / 64), rel=0.01)


GPU_80 = 76 * GIB


def fixed_plans(*totals):
    """Plans with these bytes on a device, each an hour longer than the one before."""
    config = make_config()
    plan = Planner(config, make_arguments(), make_settings(), Batch(1, 12, 1)).plan(
        STRATEGIES[0], False, Machine(), Mixture(10, 12, 1)
    )
    memories = [DeviceMemory(total, 0, 0, 0, 0) for total in totals]
    return [replace(plan, memory=memory, hours=place + 1.0) for place, memory in enumerate(memories)]


def test_the_cheapest_plan_is_the_fastest_that_fits():
    plans = fixed_plans(90 * GIB, 70 * GIB, 20 * GIB)
    assert cheapest(plans, GPU_80) is plans[1]
    assert cheapest([*plans[2:], replace(plans[1], hours=3.02)], GPU_80) is plans[2]
    assert cheapest(plans[:1], GPU_80) is None


@pytest.mark.slow
def test_advice_for_too_little_memory_says_what_would_be_enough():
    config = make_measured_config("wide")
    planner = Planner(config, make_arguments(trainable=["+language_model"]), make_settings(), BATCH)
    plans = planner.plans(Machine(devices=2), Mixture(1, 200, 2))
    least = min(plan.memory.total for plan in plans)
    enough = advise(planner, plans, Machine(devices=2), Mixture(1, 200, 2), 2 * least)
    assert enough.startswith("The cheapest that fits is") and "accelerate launch" in enough
    nothing = advise(planner, plans, Machine(devices=2), Mixture(1, 200, 2), 0.9 * least)
    assert nothing.startswith("Nothing fits 2 devices with 0.1 GiB. The least is ZeRO-3, weights and optimizer on")
    assert "--lora, or --quantization 4bit" in nothing


def run_plan(*arguments, check=True):
    command = [sys.executable, str(EXAMPLES / "plan.py"), *map(str, arguments)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=580)
    assert not check or completed.returncode == 0, completed.stderr[-3000:]
    return completed


@pytest.mark.slow
@pytest.mark.parametrize("size", ["7b", "70b"])
def test_the_models_of_the_paper_are_planned(size):
    page = run_plan(CONFIGS / f"visualchat_{size}.yaml", "--gpus", "8", "--gpu-memory", "80").stdout
    trained = {"7b": "8,672,998,144 parameters, 147,865,600 trained", "70b": "70,928,028,416 parameters, 295,731,200"}
    assert trained[size] in page
    rows = {tuple(row.split(" | ")[:2]): row.split(" | ")[2:] for row in page.splitlines() if row.startswith("| ")}
    weights, *_, total, _, _, hours, fits = rows["| ZeRO-3", "yes"]
    exact = {"7b": 2 * 8_672_998_144 / 8, "70b": 2 * 70_928_028_416 / 8}[size]  # in bfloat16, on eight devices
    assert float(weights) == pytest.approx(exact / GIB, abs=0.1) and fits == "yes |" and float(hours) > 0
    assert float(total) < 30
    assert rows["| DDP", "no"][-1] == {"7b": "yes |", "70b": "no |"}[size]
    cheapest = {"7b": "is DDP without", "70b": "is ZeRO-3 with"}[size]
    assert f"The cheapest that fits {cheapest} gradient checkpointing" in page


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_hyperparameters_of_the_paper(path):
    """Section 5.2 of arXiv 2309.14327, by way of finetune.yaml."""
    arguments, training, deepspeed = parse_recipe(path, FinetuneArguments, {})
    assert (training.learning_rate, training.weight_decay, training.adam_beta1, training.adam_beta2) == (
        1e-3,
        0,
        0.9,
        0.95,
    )
    assert (training.num_train_epochs, training.lr_scheduler_type, training.warmup_steps) == (6, "cosine", 0.1)
    assert (training.max_grad_norm, arguments.max_length) == (1.0, 4096)
    assert training.bf16 and training.activation_checkpointing and arguments.frozen_dtype == "bfloat16"
    size = path.stem.rpartition("_")[2]
    assert read_config(arguments).text_config.hidden_size == {"7b": 4096, "13b": 5120, "70b": 8192}[size]
    assert yaml.safe_load((CONFIGS / arguments.mixture).read_text())["max_images"] == 8
    is_lora = "lora" in path.stem
    assert arguments.lora == (["language_model"] if is_lora else None)
    assert arguments.quantization == ("4bit" if "qlora" in path.stem else None)
    assert (deepspeed is None) == (arguments.quantization is not None)


@pytest.mark.parametrize("strategy", STRATEGIES[1:], ids=lambda strategy: strategy.name)
def test_the_files_of_a_strategy_are_what_its_library_reads(strategy):
    if strategy.is_fsdp:
        assert load_config_from_file(str(CONFIGS / strategy.file)).fsdp_config["fsdp_version"] == 2
        return
    content = strategy.read()
    assert strategy_of(content) == strategy
    options = {name: value for name, value in content["zero_optimization"].items() if value != "auto"}
    config = DeepSpeedZeroConfig(**options)
    assert config.stage == strategy.stage
    assert {content[name]["enabled"] for name in ("bf16", "fp16")} == {"auto"}


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "eight_gpus_deepspeed", "two_nodes_deepspeed", "fsdp2"])
def test_the_files_of_accelerate_are_read(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == {"one_gpu": 1, "two_nodes_deepspeed": 16}.get(name, 8)
    assert config.num_machines == (2 if name.startswith("two") else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"recipe.yaml has the unknown argument learning_rat \(did you mean learning_rate"),
        ("trainable: [projector", r"recipe.yaml is not YAML: while parsing a flow sequence"),
        ("- 1", r"recipe.yaml holds no arguments, as in `learning_rate: 0.001`, but a list"),
        ("base: gone.yaml", r"no configuration file at .*gone.yaml"),
        ("learning_rate: much", r"argument --learning_rate.*: invalid float value: 'much'"),
        ("{model: x, quantization: 4bit, trainable: [+language_model]}", "requires a frozen decoder"),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(FinetuneError) as refused:
        parse_recipe(tmp_path / "recipe.yaml", FinetuneArguments, {})
    assert re.search(message, str(refused.value)), refused.value


def test_a_recipe_overrides_its_base_and_names_files_relative_to_itself(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 0.5\nmax_length: 7\nmixture: sets/mine.yaml\n")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mine.yaml").write_text("")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nmax_length: 8\nmodel: user/name\n")
    arguments, training, deepspeed = parse_recipe(tmp_path / "recipe.yaml", FinetuneArguments, {})
    assert (training.learning_rate, arguments.max_length, deepspeed) == (0.5, 8, None)
    assert arguments.mixture == str(tmp_path / "sets" / "mine.yaml") and arguments.model == "user/name"


def test_a_configuration_instead_of_a_checkpoint_is_refused(tmp_path, monkeypatch):
    flags = ["--config", CONFIGS / "qlora_7b.yaml", "--output_dir", tmp_path / "out", "--data_root", tmp_path]
    error = finetune_error(monkeypatch, *flags)
    assert "qwen_vl_llama2_7b.json is a configuration, for examples/plan.py, and has no weights" in error


@pytest.mark.slow
def test_too_little_memory_ends_a_run_with_the_planners_advice(tmp_path, data, monkeypatch):  # noqa: F811
    make_model().save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    error = finetune_error(monkeypatch, *data_flags(data), "--output_dir", output, "--device_memory", "0.0001")
    assert "not enough memory: the weights need 0.0 GiB of a device, and it has 0.0.\nNothing fits 1 devices" in error
    assert "Less memory: a lower --max_length" in error and not output.exists()
