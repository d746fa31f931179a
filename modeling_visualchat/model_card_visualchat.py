"""
The model card of a checkpoint: a template with marked sections, which training and evaluation fill in.

It travels with a checkpoint, since pushing is a method of the model; the template, which is no code, does not.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from .attention_types_visualchat import IMAGE_SCOPES, get_attention_type


CARD = "README.md"  # beside a checkpoint
TEMPLATE = Path(__file__).with_name("hub_card.md")
CHECKPOINT = re.compile(r'^checkpoint = "(.+)"$', re.MULTILINE)  # in the code of a card: the name that it loads


class VisualChatCard(ModelCard):
    """
    A model card with marked sections. A section holds the text of the template, which says what is missing, or blocks:
    one for each training run, or suite of an evaluation. What is outside of the marks is the owner's, and stays.

        <!-- results -->
        <!-- results: blink -->
        …
        <!-- /results: blink -->
        <!-- /results -->
    """

    text: str

    def read(self, section: str) -> dict[str, str]:
        """The blocks of a section by their keys."""
        found = re.findall(rf"<!-- {section}: ([^\n]+) -->\n(.*?)\n<!-- /{section}: \1 -->", self.text, re.DOTALL)
        return dict(found)

    def write(self, section: str, key: str, text: str) -> None:
        """
        Adds a block to a section, in place of an earlier one of its key, or of the text of the template; empty text
        removes it.
        """
        blocks = {key: text for key, text in {**self.read(section), key: text}.items() if text}
        marked = (f"<!-- {section}: {key} -->\n{text}\n<!-- /{section}: {key} -->" for key, text in blocks.items())
        if blocks:
            self._fill(section, "\n\n".join(marked) + "\n")
        else:
            self.reset(section)

    def reset(self, section: str) -> None:
        """Restores the text of the template in a section."""
        match = _section(section).search(TEMPLATE.read_text(encoding="utf-8"))
        self._fill(section, match[1] if match else "")

    def _fill(self, section: str, content: str) -> None:
        marked = f"<!-- {section} -->\n{content}<!-- /{section} -->"
        if _section(section).search(self.text):
            self.text = _section(section).sub(lambda _: marked, self.text, count=1)
        else:  # a card of the owner's own
            self.text = f"{self.text.rstrip()}\n\n{marked}\n"

    def rename(self, name: str) -> None:
        """Gives the checkpoint another name, in the title and in the code that loads it."""
        if known := CHECKPOINT.search(self.text):
            places = re.compile(rf'^(# |checkpoint = "){re.escape(known[1])}("?)$', re.MULTILINE)
            self.text = places.sub(lambda place: f"{place[1]}{name}{place[2]}", self.text)
        if self.data.eval_results:
            self.data.model_name = name

    def save(self, filepath: str | Path) -> None:
        """Writes the card under a temporary name and renames it."""
        part = Path(filepath).with_name(f"{Path(filepath).name}.part")
        super().save(part)
        part.replace(filepath)


def _section(name: str) -> re.Pattern:
    return re.compile(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", re.DOTALL)


def make_card(model: Any, name: str) -> VisualChatCard:
    """
    The card of a model from the template, with what is known from the model itself.

    Args:
        model (`VisualChatForConditionalGeneration`): The model; its weights are not read.
        name (`str`): The repository, or the folder, that the code of the card loads.
    """
    card = fill_placeholders(VisualChatCard.load(TEMPLATE), model, name)
    config, parts = model.config, model.model
    names = (part._name_or_path for part in (config.vision_config, config.text_config))
    card.data.base_model = [name for name in names if is_on_hub(name)] or None
    size = getattr(config.vision_config, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = f" of {height} x {width} pixels" if height and width else ""
    added = get_attention_type(config).added_layers
    lines = [
        f"- Vision tower: {_describe_part(config.vision_config, parts.vision_tower)}",
        f"- Projector: `{config.projector_type}`{_count([parts.multi_modal_projector])}",
        f"- Language model: {_describe_part(config.text_config, parts.language_model, model.lm_head)}",
        *([f"- Added layers: `{added.part}`{_count([getattr(parts, added.part)])}"] if added is not None else []),
        f'- Attention type: `attention_type="{config.attention_type}"`, described below',
    ]
    card.write("model", "parts", "\n".join(lines))
    length = getattr(config.text_config, "max_position_embeddings", None)
    limit = f"; at most {length:,} tokens in a conversation" if length else ""
    num_bytes = sum(count_parameters(each) * each.element_size() for each in set(model.parameters()))
    card.write(
        "cost",
        "inference",
        f"- Weights: {num_bytes / 2**20:,.1f} MiB in {str(model.dtype).removeprefix('torch.')}\n"
        f"- An image{pixels} takes {config.image_seq_length:,} tokens{limit}",
    )
    return card


def fill_placeholders(card: VisualChatCard, model: Any, name: str) -> VisualChatCard:
    """Replaces `{repo_id}` and `{attention}`, in the template or in a copy of it."""
    description = get_attention_type(model.config).description + IMAGE_SCOPES[model.config.image_scope]
    card.text = card.text.replace("{repo_id}", name).replace("{attention}", description)
    return card


def count_parameters(*parts: nn.Module | nn.Parameter) -> int:
    """The number of parameters, shared ones once, and of partitioned ones (ZeRO-3) the whole."""
    parameters: Iterable[Any] = {
        each for part in parts for each in (part.parameters() if isinstance(part, nn.Module) else [part])
    }
    return sum(getattr(each, "ds_numel", each.numel()) for each in parameters)


def is_on_hub(name: str) -> bool:
    """Whether a name reads as one on the Hub, `owner/name`, and is no local folder or file."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def describe_origin(name: str) -> str:
    """A checkpoint that something was made from: a link to the Hub, or the name of its folder."""
    return f"[{name}](https://huggingface.co/{name})" if is_on_hub(name) else f"`{Path(name).name}`"


def _describe_part(config: Any, *modules: nn.Module) -> str:
    """The name of a pretrained part, if it has one, its type and its number of parameters."""
    name = config._name_or_path
    return f"{f'{describe_origin(name)}, ' if name else ''}type `{config.model_type}`{_count(modules)}"


def _count(modules: Iterable[nn.Module]) -> str:
    """The number of parameters as text; none for quantized weights, several of which share a number."""
    modules = list(modules)
    if not all(each.is_floating_point() for module in modules for each in module.parameters()):
        return ""
    return f", {count_parameters(*modules):,} parameters"
