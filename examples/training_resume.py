"""The checkpoint that a run is resumed from: whole, and made of the same model, data and order of records."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training_arguments import FinetuneError
from training_data import SAMPLING_BY_LENGTH, list_files, print_once
from training_memory import is_fsdp
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from modeling_visualchat.model_card_visualchat import CARD
from modeling_visualchat.trainable_parts_visualchat import split_selection
from processing_visualchat import read_mixture_config
from processing_visualchat.data.tables import counted


RECORD = "training_run.json"  # in every checkpoint: what it was made of, and its files
# Arguments that have to stay as they are: those of the model, and those of the order of records.
MODEL_ARGUMENTS = (
    "projector_type",
    "quantization",
    "lora",
    "lora_r",
    "lora_alpha",
    "lora_target",
)  # and the attention
DATA_ARGUMENTS = ("max_length", "overlong", "packing", "group_by_image", "max_per_image", "check_images")
ORDER_ARGUMENTS = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last")
BATCH = "batch (processes x per_device_train_batch_size x gradient_accumulation_steps)"
MODEL_FILES = ("*.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja")
BLOCK = 2**16  # bytes
MAX_READ = 2**30  # bytes, about, for the digests of all files; of larger ones, blocks at equal distances are read
MAX_NAMED = 6  # differences in an error


def prepare_resume(arguments, training_arguments: TrainingArguments) -> tuple[str | None, dict[str, Any]]:
    """
    The checkpoint to resume from, if any, and what [`describe_run`] says of the run, in the process that saves.

    Raises:
        `FinetuneError`: there is no such checkpoint, or it is of another run.
    """
    checkpoint = find_checkpoint(training_arguments)
    if (state := training_arguments.distributed_state) is not None:
        state.wait_for_everyone()  # no process writes to the folder before all have looked
    if not training_arguments.should_save:
        return checkpoint, {}
    described = describe_run(arguments, training_arguments)
    if checkpoint is not None:
        check_checkpoint(checkpoint, described, training_arguments)
    return checkpoint, described


def find_checkpoint(training_arguments: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: for `--resume_from_checkpoint true`, the newest whole one; for `auto`, `None` if
    there is none.

    Raises:
        `FinetuneError`: no checkpoint is whole, or the output folder is not empty and the run does not resume.
    """
    folder, wanted = Path(training_arguments.output_dir), training_arguments.resume_from_checkpoint or "false"
    if wanted.lower() == "false":
        if folder.exists() and any(folder.iterdir()):
            raise FinetuneError(
                f"the output folder {folder} exists and is not empty. Choose another --output_dir, or continue from "
                "its last checkpoint with --resume_from_checkpoint true."
            )
        return None
    if wanted.lower() not in ("true", "auto"):
        if fault := find_fault(Path(wanted)):
            raise FinetuneError(f"{wanted} is no whole checkpoint of a training run: {fault}.")
        return wanted
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        if fault := find_fault(Path(checkpoint)):
            print_once(f"{checkpoint} is not whole, and is left out: {fault}")
        else:
            return checkpoint
    if wanted.lower() == "auto":
        return None
    raise FinetuneError(
        f"{folder} holds no complete checkpoint to resume from. --resume_from_checkpoint auto starts from the "
        "beginning then."
    )


def find_fault(checkpoint: Path) -> str:
    """What a checkpoint lacks; empty for a whole one. The state of Trainer is written last, after the record."""
    try:
        files = json.loads((checkpoint / RECORD).read_text())["files"]
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except OSError as error:
        return f"there is no file {error.filename}"
    except ValueError:
        return f"its {RECORD} or {TRAINER_STATE_NAME} ends in the middle"
    for name, size in files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"its {name} {'is missing' if found is None else f'has {found:,} bytes instead of {size:,}'}"
    return ""


def list_sizes(checkpoint: Path) -> dict[str, int]:
    """The size of each file of a checkpoint, but for the card, which evaluation adds to."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name not in (CARD, RECORD, TRAINER_STATE_NAME)}


def describe_run(arguments, training_arguments: TrainingArguments) -> dict[str, Any]:
    """What decides the weights that are trained and the order of records, by name, as JSON keeps it."""
    described = arguments.attention | {name: getattr(arguments, name) for name in MODEL_ARGUMENTS + DATA_ARGUMENTS}
    described |= {name: getattr(training_arguments, name) for name in ORDER_ARGUMENTS}
    described["trainable"] = sorted(name for each in arguments.trainable or [""] for name in split_selection(each))
    batch_size, num_batches = training_arguments.train_batch_size, training_arguments.gradient_accumulation_steps
    described[BATCH] = training_arguments.world_size * batch_size * num_batches
    if arguments.group_by_image or training_arguments.train_sampling_strategy in SAMPLING_BY_LENGTH:
        described |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": num_batches}
    if arguments.model is None:  # the digits demo draws conversations for at least 100 steps
        described["max_steps"] = max(training_arguments.max_steps, 100)
        return described
    files = list_files(arguments)
    if arguments.mixture is not None:
        mixture = asdict(read_mixture_config(arguments.mixture))
        mixture["sources"] = {spec["name"]: {**spec, "images": None} for spec in mixture["sources"]}
        described |= flatten({**mixture, "data_root": None}, "mixture")
    described |= describe_config(arguments.model)
    for pattern in MODEL_FILES:
        files |= {f"{path.name} of --model": path for path in sorted(Path(arguments.model).glob(pattern))}
    return described | {f"content of {name}": digest for name, digest in digest_files(files).items()}


def describe_config(model: str) -> dict[str, Any]:
    """The configuration of a checkpoint, and its commit if it is on the Hub; nothing if it has none within reach."""
    try:
        path = cached_file(model, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError:  # said where the model is loaded
        path = None
    if path is None:
        return {}
    config = json.loads(Path(path).read_text())
    commit = extract_commit_hash(path, None)
    return {**flatten(config, "config"), **({} if commit is None else {"commit of --model": commit})}


def flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested mappings as one, with keys like `config.text_config.hidden_size`."""
    flat = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        flat |= flatten(value, key) if isinstance(value, Mapping) else {key: value}
    return {key: value for key, value in flat.items() if not key.endswith("transformers_version")}


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Digests of the contents of files, by name; of large ones a sample."""
    digests = {}
    for name, path in files.items():
        size = os.path.getsize(path)
        digest = hashlib.blake2b(str(size).encode(), digest_size=8)
        stride = BLOCK * max(1, size * len(files) // MAX_READ)
        with path.open("rb") as file:
            for start in range(0, size, stride):
                file.seek(start)
                digest.update(file.read(BLOCK))
        digests[name] = digest.hexdigest()
    return digests


def describe_sharding(training_arguments: TrainingArguments) -> str:
    """How the states of a checkpoint are divided among processes."""
    deepspeed = getattr(training_arguments, "hf_deepspeed_config", None)
    if deepspeed is not None:
        return f"DeepSpeed ZeRO-{deepspeed.config.get('zero_optimization', {}).get('stage', 0)}"
    return "FSDP" if is_fsdp() else "plain training"


def read_record(checkpoint: str) -> dict[str, Any]:
    """The record of a whole checkpoint."""
    return json.loads((Path(checkpoint) / RECORD).read_text())


def check_checkpoint(checkpoint: str, described: dict[str, Any], training_arguments: TrainingArguments) -> None:
    """
    Ends a run that would not continue the one that made the checkpoint, before anything is loaded.

    Raises:
        `FinetuneError`: with what differs, and the ways on.
    """
    record = read_record(checkpoint)
    model = "MERGED, which examples/merge_adapter.py makes of it," if record["run"].get("lora") else checkpoint
    new_run = f"for a new run from its weights, pass --model {model} and another --output_dir."
    if found := [*list_differences(record["run"], json.loads(json.dumps(described)))]:
        more = [f"… and {len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else []
        raise FinetuneError(
            f"{checkpoint} was made by another run, which this one would not continue:\n  "
            + "\n  ".join(found[:MAX_NAMED] + more)
            + f"\nResume with the arguments and files of that run; {new_run}"
        )
    now = {"sharding": describe_sharding(training_arguments), "processes": training_arguments.world_size}
    before = {key: record[key] for key in now}
    if before["sharding"] != now["sharding"] or ("DeepSpeed" in before["sharding"] and before != now):
        states = [
            f"{each['sharding']} on {counted(each['processes'], 'process', 'processes')}" for each in (before, now)
        ]
        raise FinetuneError(
            f"{checkpoint} was saved by {states[0]}, and its optimizer states cannot be resumed by {states[1]}. "
            f"Resume it as it was; {new_run}"
        )
    if before != now:
        print_once(
            f"{checkpoint} is of {counted(before['processes'], 'process', 'processes')}, and is resumed on "
            f"{now['processes']}: batches, weights and optimizer are the same; dropout, if the model has any, draws "
            "other random numbers."
        )


def list_differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The keys whose values differ, with both."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key}: {json.dumps(before.get(key))} in the checkpoint, {json.dumps(now.get(key))} now"
