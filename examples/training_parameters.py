"""What `finetune.py` trains: parts, presets and patterns, LoRA, and a learning rate and weight decay per group."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from loading import quantization_config
from peft import LoraConfig, get_peft_model
from torch import nn
from training_arguments import FinetuneError
from transformers import Trainer, TrainingArguments

from modeling_visualchat.trainable_parts_visualchat import (
    ADDED_PARTS,
    TRAINABLE_PARTS,
    nearest,
    select_parts,
    split_selection,
)


GROUPS = ("projector", "embeddings", "language_model", "vision_tower", "lora")
TOWERS = ("language_model", "vision_tower")  # LoRA is available for
TABLE_NAME = "trainable_parameters.md"  # in the output folder


def loading_options(arguments, training_arguments: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: the dtype of the frozen weights, and the quantization of the decoder."""
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.frozen_dtype)}
    if arguments.quantization is not None:
        compute_dtype = torch.bfloat16 if training_arguments.bf16 else torch.float32
        options["quantization_config"] = quantization_config(arguments.quantization, compute_dtype)
    return options


def choose_parameters(model: Any, arguments, casts: bool = True, seed: int = 0) -> Any:
    """
    Sets what is trained, and adds LoRA layers, drawn from the seed, if asked for. Trained weights are in float32,
    unless DeepSpeed, which has master weights of its own, casts them.

    Returns:
        The model, within a `PeftModel` if it has LoRA layers.

    Raises:
        `FinetuneError`: an unknown part, or a pattern that matches nothing.
    """
    selections = tuple(arguments.trainable or ())
    try:
        if arguments.lora:
            model = add_lora(model, selections, arguments, seed)
        else:
            model.set_trainable(*selections)
    except ValueError as error:
        raise FinetuneError(str(error)) from None
    for parameter in model.parameters():
        if casts and parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def add_lora(model: Any, selections: tuple[str, ...], arguments, seed: int) -> Any:
    """The model in a `PeftModel` with LoRA in the linear layers of towers; its adapter holds other trained parts."""
    if set(arguments.lora) - set(TOWERS):
        raise FinetuneError(f"--lora is for {' and '.join(TOWERS)}, not for {', '.join(arguments.lora)}")
    paths = {id(module): path for path, module in model.named_modules()}
    saved = []
    for name in [name for each in selections or ("",) for name in split_selection(each)]:
        parts = select_parts(model, name)
        if not parts or set(parts) & set(arguments.lora):
            reason = "patterns are not supported with it" if not parts else "it would train the tower as a whole too"
            raise FinetuneError(f"--lora does not go with --trainable {name}: {reason}; name other parts")
        for module in (TRAINABLE_PARTS[part](model) for part in parts):
            modules = module.children() if isinstance(module, nn.ModuleDict) else [module]
            saved += [paths[id(each)] for each in modules]
    names = linear_layers(model, arguments.lora)
    targets = [name for name in names if matches(name, arguments.lora_target)]
    if not targets:
        patterns = " ".join(arguments.lora_target)
        raise FinetuneError(
            f"no linear layer of {' or '.join(arguments.lora)} matches --lora_target {patterns}; the nearest are "
            f"{', '.join(nearest(patterns, names))}"
        )
    model.requires_grad_(False)
    table = paths[id(model.get_input_embeddings())]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=join_names(targets, names),
        modules_to_save=saved or None,
        ensure_weight_tying=model.config.tie_word_embeddings and table in saved,
    )
    with torch.random.fork_rng(devices=[]):  # loading draws more numbers under ZeRO-3
        torch.default_generator.manual_seed(seed)
        return get_peft_model(model, config)


def linear_layers(model: Any, towers: list[str]) -> list[str]:
    """The paths of the linear layers in the numbered layers of towers."""
    prefixes = tuple(f"model.{tower}." for tower in towers)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefixes) and isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    ]


def matches(name: str, patterns: list[str] | None) -> bool:
    """Whether a path matches a pattern, or ends with it; without patterns, every path does."""
    return patterns is None or any(fnmatchcase(name, pattern) or name.endswith(f".{pattern}") for pattern in patterns)


def join_names(chosen: list[str], names: list[str]) -> str:
    """A regular expression for paths, with one alternative for all layers where each has been chosen."""
    forms = sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in chosen})
    expression = "|".join(forms)
    if [name for name in names if re.fullmatch(expression, name)] != chosen:
        expression = "|".join(map(re.escape, chosen))
    return expression


@dataclass
class GroupOptions:
    """The learning rate and the weight decay of each group."""

    learning_rate: float
    weight_decay: float
    learning_rates: Mapping[str, float]
    weight_decays: Mapping[str, float]

    @classmethod
    def from_arguments(cls, arguments, training_arguments: TrainingArguments) -> "GroupOptions":
        """
        Raises:
            `FinetuneError`: a group that does not exist, or a value that is no number.
        """
        options = (read_values(name, getattr(arguments, name)) for name in ("learning_rates", "weight_decays"))
        return cls(training_arguments.learning_rate, training_arguments.weight_decay, *options)

    def of(self, group: str) -> tuple[float, float]:
        """The learning rate and the weight decay of a group."""
        learning_rate = self.learning_rates.get(group, self.learning_rate)
        return learning_rate, self.weight_decays.get(group, self.weight_decay)


def read_values(flag: str, values: Mapping[str, float] | list[str] | None) -> dict[str, float]:
    """`{group: value}` of a configuration file, or `group=value` flags."""
    pairs = values.items() if isinstance(values, Mapping) else [each.partition("=")[::2] for each in values or ()]
    read = {}
    for group, value in pairs:
        if group not in GROUPS:
            hint = nearest(group, GROUPS, 1)[0]
            raise FinetuneError(
                f"--{flag} has the unknown group {group!r} (did you mean {hint!r}?); choose from {', '.join(GROUPS)}"
            )
        try:
            read[group] = float(value)
        except (TypeError, ValueError):
            raise FinetuneError(f"--{flag} {group}={value!r} is not a number, as in {group}=0.0001") from None
    return read


def group_of(model: Any, name: str) -> str:
    """The group of a parameter of a model, by its name."""
    if "lora_" in name:
        return "lora"
    if any(f"model.{part}." in name for part in ("multi_modal_projector", *ADDED_PARTS)):
        return "projector"
    if "model.vision_tower." in name:
        return "vision_tower"
    table = model._tied_weights_keys["lm_head.weight"].removesuffix("weight")  # the input embeddings
    return "embeddings" if table in name or "lm_head." in name else "language_model"


def count(parameter: torch.Tensor) -> int:
    """The number of elements of a parameter, also of one that is sharded by ZeRO-3 or quantized."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def counted_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, without the originals that PEFT keeps of the parts that an adapter holds."""
    return ((name, each) for name, each in model.named_parameters() if ".original_module." not in name)


def trained_groups(model: Any) -> list[str]:
    """The groups of which parameters are trained."""
    found = {group_of(model, name) for name, each in counted_parameters(model) if each.requires_grad}
    return [group for group in GROUPS if group in found]


def tabulate_parameters(model: Any, options: GroupOptions) -> str:
    """A Markdown table of what is trained, by group, and which of it is tied."""
    rows, total = [], [0, 0]
    for group in GROUPS:
        parameters = [each for name, each in counted_parameters(model) if group_of(model, name) == group]
        numbers = [sum(map(count, parameters)), sum(count(each) for each in parameters if each.requires_grad)]
        total = [sum(pair) for pair in zip(total, numbers)]
        rates = [f"{value:g}" for value in options.of(group)] if numbers[1] else ["", ""]
        if parameters:
            rows.append([group, *(f"{number:,}" for number in numbers), *rates])
    rows.append(["total", *(f"{number:,}" for number in total), "", ""])
    header = ["group", "parameters", "trained", "learning rate", "weight decay"]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    lines += ["", f"{total[1] / total[0]:.2%} of the parameters are trained; weights and biases of norms never decay."]
    return "\n".join([*lines, *describe_ties(model)])


def describe_ties(model: Any) -> list[str]:
    """What is said about input and output embeddings: one table, or two."""
    is_trained = [
        any(each.requires_grad for each in layer.parameters())
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if model.config.tie_word_embeddings:
        effect = "training the input trains the output too" if any(is_trained) else "neither is trained"
        return [f"Input and output embeddings are one table (tied): {effect}."]
    words = ["trained" if each else "frozen" for each in is_trained]
    return [f"Input and output embeddings are two tables: the input is {words[0]}, the output (lm_head) {words[1]}."]


def report_parameters(model: Any, options: GroupOptions, training_arguments: TrainingArguments) -> None:
    """Prints the table of what is trained and saves it in the output folder, in the first process."""
    if training_arguments.process_index == 0:
        table = tabulate_parameters(model, options)
        print(table)
        folder = Path(training_arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TABLE_NAME).write_text(table + "\n")


class GroupedTrainer(Trainer):
    """Trainer with a learning rate and a weight decay for each group of parameters."""

    def __init__(self, *args, group_options: GroupOptions, **kwargs):
        super().__init__(*args, **kwargs)
        self.group_options = group_options
        self.group_names: list[str] = []  # of the parameter groups of the optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, its parameter groups split further; biases and norms have no weight decay."""
        is_new, model = self.optimizer is None, self.model if model is None else model
        optimizer = super().create_optimizer(model)
        if is_new and isinstance(optimizer, torch.optim.Optimizer):
            decay = set(self.get_decay_parameter_names(model))
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups: dict[tuple, dict] = {}
            for place, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    name = names[id(parameter)]
                    group_name = group_of(self.model, name)
                    learning_rate, weight_decay = self.group_options.of(group_name)
                    weight_decay *= name in decay
                    key = (place, group_name, weight_decay)
                    options = {**group, "params": [], "lr": learning_rate, "weight_decay": weight_decay}
                    groups.setdefault(key, options)["params"].append(parameter)
            optimizer.param_groups[:] = groups.values()
            self.group_names = [name for _, name, _ in groups]
        return optimizer
