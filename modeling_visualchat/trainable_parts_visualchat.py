"""The trainable parts of a VisualChat model: by name, by preset and by pattern."""

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
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
# Short names of parts; the projector is whatever is new between the pretrained ones.
PRESETS = {"projector": ("multi_modal_projector", *ADDED_PARTS), "embeddings": ("input_embeddings",)}
DEFAULT_PRESET = "projector+embeddings"


def train_only(model: Any, selections: tuple[str, ...]) -> None:
    """Freezes all but these selections, see [`VisualChatForConditionalGeneration.set_trainable`]."""
    names = list(dict.fromkeys(name for each in selections or ("",) for name in split_selection(each)))
    selected = [parameter for name in names for parameter in select_parameters(model, name)]
    model.requires_grad_(False)
    for parameter in selected:
        parameter.requires_grad_(True)


def split_selection(selection: str) -> list[str]:
    """The names in `"projector+embeddings"`; one that starts with `+`, or is empty, has those of the default first."""
    selection = DEFAULT_PRESET + selection if selection[:1] in ("", "+") else selection
    return selection.split("+")


def select_parts(model: Any, name: str) -> list[str]:
    """The parts of a model that a name stands for; none for a pattern."""
    parts = PRESETS.get(name, (name,))
    return [
        part for part in parts if part in TRAINABLE_PARTS and (part not in ADDED_PARTS or hasattr(model.model, part))
    ]


def select_parameters(model: Any, name: str) -> Iterable[nn.Parameter]:
    """
    The parameters of a part, a preset or a pattern: a name of parameters or of a module, with `*`, `?` and `[…]`.

    Raises:
        `ValueError`: an unknown name, or a pattern that matches no parameter.
    """
    if parts := select_parts(model, name):
        return [parameter for part in parts for parameter in TRAINABLE_PARTS[part](model).parameters()]
    named = dict(model.named_parameters(remove_duplicate=False))
    if re.search(r"[.*?[]", name):
        matched = [each for path, each in named.items() if fnmatchcase(path, name) or fnmatchcase(path, f"{name}.*")]
        if matched:
            return matched
        raise ValueError(
            f"No parameter matches the pattern {name!r}; the nearest are {', '.join(nearest(name, named))}."
        )
    known = [each for each in (*PRESETS, *TRAINABLE_PARTS) if select_parts(model, each)]
    hints = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {hints[0]!r}?)" if hints else ""
    raise ValueError(
        f"Unknown trainable part {name!r}{hint}; choose from {', '.join(known)}, joined by '+', or a pattern such as "
        "'model.language_model.layers.0.*'."
    )


def nearest(pattern: str, names: Iterable[str], number: int = 3) -> list[str]:
    """The names that are most like a pattern."""
    return difflib.get_close_matches(pattern, list(names), n=number, cutoff=0.0)


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
