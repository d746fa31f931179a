"""What the scripts share that make a VisualChat checkpoint from other checkpoints."""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from configuration_visualchat import attention_defaults
from modeling_visualchat import ATTENTION_OPTIONS, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


def add_attention_options(parser: ArgumentParser, attention_type: str = "mmca") -> None:
    """Adds a flag for each field of [`VisualChatConfig`] that chooses the attention, with the default type."""
    helps = {option: f"by default {value} with mmca" for option, value in attention_defaults("mmca").items()}
    for option, values in ATTENTION_OPTIONS.items():
        help = helps.get(option, f"by default {attention_type}")
        parser.add_argument(f"--{option}", choices=values, help=help)
    parser.set_defaults(attention_type=attention_type)
    parser.add_argument("--cross_layer_interval", type=int, default=4, help="decoder layers per cross-attention layer")


def attention_options(arguments: Namespace) -> dict[str, Any]:
    """The values of these flags, and the defaults of the attention type for those that were not given."""
    options = (*ATTENTION_OPTIONS, "cross_layer_interval")
    given = {option: value for option in options if (value := getattr(arguments, option)) is not None}
    return attention_defaults(arguments.attention_type, arguments.image_attention) | given


def write(model: VisualChatForConditionalGeneration, processor: VisualChatProcessor, output: Path) -> None:
    """Writes a checkpoint under a temporary name, and renames it when it is complete."""
    parent, name = output.absolute().parent, output.absolute().name
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as folder:
        written = Path(folder) / name
        model.save_pretrained(written)
        processor.save_pretrained(written)
        written.rename(output)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{output}: {model.num_parameters():,} parameters, {trainable:,} of them trainable by default")
