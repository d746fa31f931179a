"""Not enough memory: found before the weights are loaded where they alone are too many, and answered with a plan."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from training_arguments import FinetuneError
from transformers import TrainingArguments


GIB = 2**30
# Of `TrainingArguments`, what a plan depends on.
PLANNED = (
    "deepspeed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "bf16", "fp16",
)  # fmt: skip


def device_memory() -> int:
    """Bytes of the device of this process; on a CPU, those of the machine."""
    if torch.accelerator.is_available():
        return torch.accelerator.get_memory_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def count_weights(folder: str) -> int:
    """The number of weights in a local checkpoint; 0 for one that is not here."""
    total = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118, it is no dict
            total += sum(torch.Size(shape).numel() for shape in shapes)
    return total


def check_memory(arguments, training_arguments: TrainingArguments) -> None:
    """
    Ends a run before it loads weights that alone need more than a device has.

    Raises:
        `FinetuneError`: with the planner's advice.
    """
    limit = device_memory() if arguments.device_memory is None else int(arguments.device_memory * GIB)
    deepspeed = getattr(training_arguments, "hf_deepspeed_config", None)
    zero = {} if deepspeed is None else deepspeed.config.get("zero_optimization", {})
    if "device" in zero.get("offload_param", {}) or arguments.quantization or is_fsdp():
        return
    has_two_bytes = training_arguments.bf16 or training_arguments.fp16
    is_narrow = arguments.frozen_dtype != "float32" or (training_arguments.deepspeed and has_two_bytes)
    shards = training_arguments.world_size if zero.get("stage") == 3 else 1
    needed = count_weights(arguments.model) * (2 if is_narrow else 4) / shards
    if needed > limit:
        raise out_of_memory(
            arguments,
            training_arguments,
            f"the weights need {needed / GIB:.1f} GiB of a device, and it has {limit / GIB:.1f}",
            limit,
        )


def is_fsdp() -> bool:
    """Whether the launcher was told to partition the model by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def memory_advice(arguments, training_arguments: TrainingArguments) -> Iterator[None]:
    """Within it, running out of memory ends the run with the planner's advice."""
    try:
        yield
    except RuntimeError as error:
        is_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_memory:
            raise
        limit = device_memory() if arguments.device_memory is None else int(arguments.device_memory * GIB)
        raise out_of_memory(arguments, training_arguments, str(error).splitlines()[0], limit) from error


def out_of_memory(arguments, training_arguments: TrainingArguments, reason: str, limit: int) -> FinetuneError:
    """An error with a reason, and in the first process with the advice of `plan.py`, which runs by itself."""
    message = f"not enough memory: {reason}."
    if training_arguments.process_index != 0:
        return FinetuneError(message)
    values = {name: value for name, value in asdict(arguments).items() if value is not None}
    values |= {name: getattr(training_arguments, name) for name in PLANNED}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values))
        devices = [f"--gpus={training_arguments.world_size}", f"--gpu-memory={limit / GIB}"]
        command = [sys.executable, str(Path(__file__).parent / "plan.py"), str(recipe), *devices, "--advice"]
        launched = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "GROUP_", "ROLE_", "TORCHELASTIC_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
        completed = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if completed.returncode:
        return FinetuneError(f"{message} See examples/plan.py for what a run needs.")
    return FinetuneError(f"{message}\n{completed.stdout.strip()}")
