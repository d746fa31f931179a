"""
Prints the number of parameters of models by part, built without memory from their configurations.

    python examples/count_parameters.py examples/configs/models/*.json

A configuration is a file or the folder of a checkpoint. The language model includes its embeddings and its head; what
is trainable is so by default: the projector and the input embeddings.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import nn

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration


def count_parameters(config: VisualChatConfig) -> dict[str, int]:
    """The number of parameters of each part, of the whole, and of what is trainable by default."""
    with torch.device("meta"):
        model = VisualChatForConditionalGeneration(config).set_trainable()

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for parameter in {p for module in modules for p in module.parameters()})

    parts = model.model
    return {
        "vision tower": count(parts.vision_tower),
        "projector": count(parts.multi_modal_projector),
        "language model": count(parts.language_model, model.lm_head),
        "total": count(model),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="configurations of VisualChat models")
    rows = [
        (path.stem, count_parameters(VisualChatConfig.from_pretrained(path))) for path in parser.parse_args().configs
    ]
    print(f"| model | {' | '.join(rows[0][1])} |")
    print("|---" * (1 + len(rows[0][1])) + "|")
    for name, counts in rows:
        print(f"| {name} | {' | '.join(f'{number:,}' for number in counts.values())} |")


if __name__ == "__main__":
    main()
