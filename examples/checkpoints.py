"""What the scripts share that make a VisualChat checkpoint from other checkpoints."""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from modeling_visualchat import ATTENTION_OPTIONS, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


def add_attention_options(parser: ArgumentParser, **defaults: str) -> None:
    """Adds a flag for each field of [`VisualChatConfig`] that chooses the attention."""
    for option, values in ATTENTION_OPTIONS.items():
        default = defaults.get(option, values[0])
        parser.add_argument(f"--{option}", default=default, choices=values, help=f"by default {default}")
    parser.add_argument("--cross_layer_interval", type=int, default=4, help="decoder layers per cross-attention layer")


def attention_options(arguments: Namespace) -> dict[str, Any]:
    """The values of these flags."""
    options = (*ATTENTION_OPTIONS, "cross_layer_interval")
    return {option: getattr(arguments, option) for option in options}


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
