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


def image_path_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters of a `VisualChatModel` that nothing but an image reaches."""
    added = [getattr(model, part) for part in ADDED_PARTS if hasattr(model, part)]
    parts = (model.vision_tower, model.multi_modal_projector, *added)
    return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
