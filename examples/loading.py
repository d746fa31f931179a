"""What a front end loads, and its flags: a checkpoint, on one or several devices, and an image memory."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any, TypeVar

import torch
from transformers import BitsAndBytesConfig

from modeling_visualchat import ImageMemory
from modeling_visualchat.quantized_states_visualchat import BITS
from modeling_visualchat.trainable_parts_visualchat import ADDED_PARTS
from processing_visualchat import VisualChatProcessor
from processing_visualchat.evaluation.evaluation import load_complete


Memory = TypeVar("Memory", bound=ImageMemory)
# By value of `--quantize` and `--quantization`.
QUANTIZATIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
# Prefixes of paths.
NOT_QUANTIZED = ["lm_head", *(f"model.{part}" for part in ("vision_tower", "multi_modal_projector", *ADDED_PARTS))]


def count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def quantization_config(name: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantization of the decoder by bitsandbytes; its products are computed in a dtype."""
    quantization: dict[str, Any] = QUANTIZATIONS[name]
    if name == "4bit":
        quantization = {**quantization, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(llm_int8_skip_modules=NOT_QUANTIZED, **quantization)


def add_model_arguments(parser: ArgumentParser) -> None:
    """Adds the checkpoint, and flags that say how it is loaded."""
    parser.add_argument("checkpoint", help="folder or name of a checkpoint or a LoRA adapter")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the weights; by default (auto) that of the checkpoint",
    )
    parser.add_argument("--quantize", choices=list(QUANTIZATIONS), help="quantize the decoder by bitsandbytes")
    parser.add_argument("--gpus", type=int, help="number of GPUs to spread the layers over; 0 for the CPU")
    parser.add_argument(
        "--max_memory",
        nargs="+",
        metavar="DEVICE=SIZE",
        help="memory of each device for weights, as in 0=20GiB 1=20GiB cpu=60GiB; layers that fit on none are refused",
    )


def load_model(arguments: Namespace) -> tuple[Any, VisualChatProcessor]:
    """
    The model of [`add_model_arguments`], frozen, in evaluation mode and on its devices, and its processor.

    Raises:
        `SystemExit`: a checkpoint that cannot be loaded or lacks weights, or flags that do not fit the machine.
    """
    try:
        options = loading_options(arguments)
        model = load_complete(arguments.checkpoint, **options)
        processor = VisualChatProcessor.from_pretrained(arguments.checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {arguments.checkpoint} cannot be loaded: {error}") from error
    if "device_map" not in options and arguments.gpus != 0 and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    model.eval().freeze()
    return model, processor


def loading_options(arguments: Namespace) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`; a `ValueError` for flags that do not fit the machine."""
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if arguments.gpus is not None and not 0 <= arguments.gpus <= there:
        raise ValueError(f"--gpus {arguments.gpus} is asked for, and this machine has {there}")
    options: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.quantize is not None:
        dtype = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        options["quantization_config"] = quantization_config(arguments.quantize, dtype)
    if arguments.max_memory:
        options |= {"device_map": "auto", "max_memory": read_memory(arguments.max_memory)}
    elif (arguments.gpus or 0) > 1:
        sizes = {device: torch.accelerator.get_memory_info(device)[0] for device in range(arguments.gpus)}
        options |= {"device_map": "auto", "max_memory": sizes}
    return options


def read_memory(sizes: list[str]) -> dict[int | str, str]:
    """`["0=20GiB", "cpu=60GiB"]` as accelerate takes it."""
    memory: dict[int | str, str] = {}
    for size in sizes:
        device, equals, value = size.partition("=")
        if not equals or not value or not (device.isdecimal() or device in ("cpu", "disk")):
            raise ValueError(f"--max_memory {size} is not a size of a device, as in 0=20GiB or cpu=60GiB")
        memory[int(device) if device.isdecimal() else device] = value
    return memory


def add_image_memory_arguments(parser: ArgumentParser) -> None:
    """Adds flags that say how images are kept."""
    parser.add_argument("--image_memory", metavar="FOLDER", help="folder that caches image states across runs")
    parser.add_argument(
        "--image_memory_bits",
        type=int,
        choices=BITS,
        help="keep keys and values of images in so many bits, by torchao; by default as they are computed",
    )


def make_image_memory(model: Any, arguments: Namespace, memory_class: type[Memory]) -> Memory | None:
    """
    The image memory of [`add_image_memory_arguments`], `None` for a model that cannot use one.

    Raises:
        `SystemExit`: flags that such a model has no use for, a path that is not a folder, or torchao is missing.
    """
    options = {"folder": arguments.image_memory, "bits": arguments.image_memory_bits}
    if not model.model.supports_conversation_cache():
        for flag, value in zip(("--image_memory", "--image_memory_bits"), options.values()):
            if value is not None:
                raise SystemExit(f"error: {flag} {value}: this model cannot use an image memory; leave it out")
        return None
    try:
        return memory_class(**options)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: the image memory cannot be made: {error}") from error
