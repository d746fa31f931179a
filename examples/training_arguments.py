"""The arguments of `finetune.py`: flags override a YAML file, and conflicts are found before anything is loaded."""

import difflib
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_token
from training_processes import start_deepspeed
from transformers import HfArgumentParser, TrainingArguments


PATHS = ("model", "train_file", "eval_file", "mixture", "deepspeed")  # arguments that may name files
DATA_FLAGS = ("--model", "--train_file", "--mixture")  # without any of them, the digits demo runs


class FinetuneError(SystemExit):
    """Ends the script with a message instead of a traceback."""

    def __init__(self, message: str):
        super().__init__(f"{Path(sys.argv[0]).name}: error: {message}")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows every default."""


class TrainingArgumentParser(HfArgumentParser):
    """Reports an error without listing more than a hundred flags before it."""

    def error(self, message: str):
        raise FinetuneError(f"{message} (see --help)")


def parse_arguments(argv: list[str], finetune_class: type, description: str, demo_config: Path) -> tuple:
    """
    Parses and checks the command line.

    Args:
        argv (`list[str]`): The command line, without the name of the script.
        finetune_class (`type`): Dataclass of the arguments that `TrainingArguments` does not have.
        description (`str`): What `--help` shows first.
        demo_config (`Path`): Configuration file of the demo, used if no flag names a configuration, a model or data.

    Returns:
        An instance of `finetune_class`, and `TrainingArguments`.

    Raises:
        `FinetuneError`: an unknown flag or key, a value out of range, or flags that exclude each other.
    """
    config_parser = ArgumentParser(add_help=False)
    config_parser.add_argument("--config", type=Path, help="YAML file of arguments; flags override it.")
    known, flags = config_parser.parse_known_args(argv)
    parser = TrainingArgumentParser(
        (finetune_class, TrainingArguments),
        parents=[config_parser],
        description=description,
        formatter_class=HelpFormatter,
    )
    names = {flag.split("=")[0] for flag in flags}
    config_path = demo_config if known.config is None and names.isdisjoint(DATA_FLAGS) else known.config
    defaults = {"enable_jit_checkpoint": True} | ({} if torch.accelerator.is_available() else {"use_cpu": True})
    if config_path is not None:
        defaults |= read_recipe(config_path, {action.dest for action in parser._actions})
    deepspeed_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    deepspeed_parser.add_argument("--deepspeed", default=defaults.get("deepspeed"))
    chosen, others = deepspeed_parser.parse_known_args(flags)
    if chosen.deepspeed == "none":  # instead of the file that a recipe names
        flags, chosen.deepspeed = others, None
    parser.set_defaults(**{**defaults, "deepspeed": chosen.deepspeed})
    if chosen.deepspeed is not None:
        start_deepspeed(use_cpu=defaults.get("use_cpu", False) or "--use_cpu" in flags)
    arguments, training_arguments = parse_values(parser, flags)
    conflicts = find_conflicts(arguments, training_arguments) + find_data_conflicts(arguments)
    conflicts += find_deepspeed_conflicts(arguments, training_arguments) + find_saving_conflicts(training_arguments)
    for conflict in conflicts:
        parser.error(conflict)
    training_arguments.remove_unused_columns = False  # the collator reads the columns, not the model
    if training_arguments.ddp_find_unused_parameters is None:
        training_arguments.ddp_find_unused_parameters = True  # no loss reads the last layers of a vision tower
    return arguments, training_arguments


def parse_recipe(config_path: Path, finetune_class: type, overrides: dict[str, Any]) -> tuple:
    """
    A recipe as [`parse_arguments`] reads it, but no process is started, and no GPU has to be there.

    Returns:
        An instance of `finetune_class`, `TrainingArguments`, and the path of the DeepSpeed file or `None`.
    """
    parser = TrainingArgumentParser((finetune_class, TrainingArguments))
    values = read_recipe(config_path, {action.dest for action in parser._actions}) | overrides
    deepspeed, is_half = values.pop("deepspeed", None), values.pop("fp16", False)
    parser.set_defaults(**{"output_dir": "unused", **values, "use_cpu": True})
    arguments, training_arguments = parse_values(parser, [])
    training_arguments.fp16 = is_half
    for conflict in find_conflicts(arguments, training_arguments):
        parser.error(conflict)
    return arguments, training_arguments, deepspeed


def parse_values(parser: TrainingArgumentParser, flags: list[str]) -> tuple:
    """Both instances, from flags and the defaults of a parser."""
    try:
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[:2]
    except ValueError as error:  # of TrainingArguments, or of a DeepSpeed file that cannot be read
        parser.error(str(error))


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """
    The arguments in a YAML file. Files may be named relative to its folder, and its key `base` is another such file,
    which it overrides.

    Raises:
        `FinetuneError`: no such file, no YAML, or an unknown argument.
    """
    if not path.is_file():
        raise FinetuneError(f"no configuration file at {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise FinetuneError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise FinetuneError(f"{path} holds no arguments, as in `learning_rate: 0.001`, but a {type(values).__name__}")
    base = values.pop("base", None)
    if unknown := sorted(map(str, values.keys() - known)):
        hints = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {hints[0]}?)" if hints else ""
        raise FinetuneError(f"{path} has the unknown argument {', '.join(unknown)}{hint}")
    for name in PATHS:
        if isinstance(values.get(name), str) and (path.parent / values[name]).exists():
            values[name] = str(path.parent / values[name])
    return values if base is None else read_recipe(path.parent / base, known) | values


def find_data_conflicts(arguments) -> list[str]:
    """Messages about a model without data, or data without a model."""
    has_model = arguments.model is not None
    has_data = arguments.train_file is not None or arguments.mixture is not None
    conditions = (
        (
            has_model != has_data,
            "--model and --train_file (or --mixture) require each other; without both, the digits demo runs",
        ),
        (
            has_model and str(arguments.model).endswith(".json"),
            f"--model {arguments.model} is a configuration, for examples/plan.py, and has no weights: pass --model "
            "with a checkpoint, which examples/join.py makes of two pretrained parts",
        ),
    )
    return [message for is_conflict, message in conditions if is_conflict]


def find_conflicts(arguments, training_arguments: TrainingArguments) -> list[str]:
    """Messages about arguments that exclude or require each other, in the order of the table."""
    has_model = arguments.model is not None
    selections = arguments.trainable or ()
    trains_decoder = any("language_model" in each for each in selections)
    trains_tower = any("vision_tower" in each for each in (*selections, *(arguments.lora or ())))
    chosen = [name for name in ("trainable", "lora", "learning_rates", "weight_decays") if getattr(arguments, name)]
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    conditions = (
        (
            training_arguments.label_smoothing_factor,
            "label_smoothing_factor is not supported: for vision-language models, the label smoothing of Trainer "
            "compares each token with itself instead of the next one; leave it at 0",
        ),
        (
            arguments.mixture and (arguments.train_file or arguments.eval_file),
            "--mixture has training and evaluation data; leave out --train_file and --eval_file",
        ),
        (arguments.data_root and not arguments.mixture, "--data_root requires --mixture"),
        (
            arguments.image_root and not arguments.train_file,
            "--image_root requires --train_file; a source of a mixture has the key images",
        ),
        (
            arguments.eval_file and not has_model,
            "--eval_file requires --model and --train_file; the digits demo has its own evaluation",
        ),
        (
            arguments.packing and not has_model,
            "--packing requires --model; the conversations of the digits demo all have the same length",
        ),
        (
            chosen and not has_model,
            f"--{', --'.join(chosen)} requires --model; the digits demo trains all parameters in one way",
        ),
        (
            arguments.group_by_image and not has_model,
            "--group_by_image requires --model; the conversations of the digits demo have images of their own",
        ),
        (
            arguments.group_by_image and training_arguments.train_sampling_strategy != "random",
            "--group_by_image and --train_sampling_strategy both decide the order of the data; leave one out",
        ),
        (
            arguments.max_per_image is not None and (arguments.max_per_image < 1 or not arguments.group_by_image),
            f"--max_per_image {arguments.max_per_image} is a number from 1 up and requires --group_by_image true",
        ),
        (
            arguments.vision_features and (not has_model or trains_tower),
            "--vision_features requires --model and a frozen vision tower; leave it out, or remove vision_tower from "
            "--trainable and --lora",
        ),
        (
            arguments.quantization and trains_decoder,
            f"--quantization {arguments.quantization} requires a frozen decoder; train it by --lora language_model "
            "instead of --trainable",
        ),
        (
            arguments.lora_target and not arguments.lora,
            "--lora_target requires --lora language_model, vision_tower or both",
        ),
        (
            arguments.frozen_dtype in ("bfloat16", "float16")
            and not (training_arguments.bf16 or training_arguments.fp16),
            f"--frozen_dtype {arguments.frozen_dtype} requires --bf16 true or --fp16 true: weights of two dtypes meet "
            "in a layer",
        ),
        (
            has_model and arguments.projector_type,
            "--projector_type is for the digits demo; a checkpoint has its own",
        ),
        (
            training_arguments.world_size != num_processes,
            f"{num_processes} processes were started and each trains a model of its own. On a CPU, start them with "
            "`accelerate launch --use_deepspeed --num_processes N … --deepspeed FILE`, or with torchrun",
        ),
    )
    return [message for is_conflict, message in conditions if is_conflict]


def find_deepspeed_conflicts(arguments, training_arguments: TrainingArguments) -> list[str]:
    """Messages about a DeepSpeed file that contradicts the arguments, before a model is loaded."""
    deepspeed = getattr(training_arguments, "hf_deepspeed_config", None)
    if deepspeed is None:
        return []
    name, mismatches = training_arguments.deepspeed, [each.removeprefix("- ds ") for each in deepspeed.mismatches]
    by_group = [each for each in ("learning_rates", "weight_decays") if getattr(arguments, each)]
    stage = deepspeed.config.get("zero_optimization", {}).get("stage", 0)
    conditions = (
        (
            mismatches,
            f'{name} contradicts the arguments: {"; ".join(mismatches)}. Set these keys of the file to "auto", or the '
            "arguments to the same values",
        ),
        (
            by_group and "optimizer" in deepspeed.config,
            f"{name} has an optimizer of its own, with one learning rate for all parameters: remove its key optimizer "
            f"for --{', --'.join(by_group)}",
        ),
        (
            arguments.quantization and stage == 3,
            f"{name} partitions the weights (ZeRO-3), which --quantization does not support; take stage 2 or lower",
        ),
    )
    return [message for is_conflict, message in conditions if is_conflict]


def find_saving_conflicts(training_arguments: TrainingArguments) -> list[str]:
    """Messages about checkpoints that would be incomplete, and about a push to the Hub that would be refused."""
    deepspeed = getattr(training_arguments, "hf_deepspeed_config", None)
    zero = {} if deepspeed is None else deepspeed.config.get("zero_optimization", {})
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    has_token = training_arguments.hub_token is not None or get_token() is not None
    conditions = (
        (
            zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"),
            f"{training_arguments.deepspeed} would write checkpoints without weights: set "
            '"stage3_gather_16bit_weights_on_model_save" to true in its "zero_optimization"',
        ),
        (
            uses_fsdp and os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT",
            "the file of accelerate would write checkpoints without weights: set fsdp_state_dict_type to "
            "FULL_STATE_DICT in its fsdp_config",
        ),
        (
            training_arguments.push_to_hub and not has_token,
            "--push_to_hub requires a token that may write to the Hub: run `hf auth login`, or set HF_TOKEN or "
            "--hub_token",
        ),
    )
    return [message for is_conflict, message in conditions if is_conflict]
