"""Writes a VisualChat checkpoint, for the scripts that make one from other checkpoints."""

import tempfile
from pathlib import Path

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


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
