"""The trainable parts of a VisualChat model, by name."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import nn

from .attention_types_visualchat import ATTENTION_TYPES


# The parts that attention types add.
ADDED_PARTS = [each.added_layers.part for each in ATTENTION_TYPES.values() if each.added_layers is not None]
# Of a `VisualChatForConditionalGeneration`.
TRAINABLE_PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "vision_tower": attrgetter("model.vision_tower"),
    "multi_modal_projector": attrgetter("model.multi_modal_projector"),
    "language_model": attrgetter("model.language_model"),
    "input_embeddings": lambda model: model.get_input_embeddings(),
    "lm_head": attrgetter("lm_head"),
    **{part: attrgetter(f"model.{part}") for part in ADDED_PARTS},
}


def train_only(model: Any, parts: tuple[str, ...]) -> None:
    """Freezes all but these parts, see [`VisualChatForConditionalGeneration.set_trainable`]."""
    added = [part for part in ADDED_PARTS if hasattr(model.model, part)]
    parts = parts or ("multi_modal_projector", "input_embeddings", *added)
    there = [part for part in TRAINABLE_PARTS if part not in ADDED_PARTS or part in added]
    if unknown := sorted(set(parts) - set(there)):
        raise ValueError(f"Unknown trainable part {', '.join(unknown)}; choose from {', '.join(there)}.")
    model.requires_grad_(False)
    for part in parts:
        TRAINABLE_PARTS[part](model).requires_grad_(True)


def trained_parts(model: Any) -> list[str]:
    """The parts of a `VisualChatForConditionalGeneration` whose parameters are all trainable."""
    there = [part for part in TRAINABLE_PARTS if part not in ADDED_PARTS or hasattr(model.model, part)]
    return [part for part in there if all(each.requires_grad for each in TRAINABLE_PARTS[part](model).parameters())]


def trains_image_path_only(model: Any) -> bool:
    """Whether a `VisualChatModel` trains only parts that nothing but an image reaches."""
    if any(parameter.requires_grad for parameter in model.language_model.parameters()):
        return False
    added = [getattr(model, part) for part in ADDED_PARTS if hasattr(model, part)]
    parts = (model.vision_tower, model.multi_modal_projector, *added)
    return any(parameter.requires_grad for part in parts for parameter in part.parameters())
