"""
The attention types of the language model: one record each, in one table.

A new type is a record in `ATTENTION_TYPES`; the model, the routes and generation read what they need from it.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from .attention_visualchat import (
    MultiModalCausalAttention,
    check_decoder,
    create_mmca_masks,
    mmca_attention_reference,
    mmca_mask,
)
from .cross_attention_visualchat import (
    build_cross_attention,
    check_cross_decoder,
    compute_cross_states,
    cross_attention_reference,
    run_with_cross_attention,
)
from .image_states_visualchat import ImageStates, own_image_attention, self_attention
from .kernels_visualchat import KERNELS
from .plan_visualchat import joint_text_attention, mmca_text_attention


# Rows are queries, columns keys; equal marks are one softmax: 1 over text, 2 over images, s itself, i its own image,
# . = no attention. In cross-attention the softmaxes are those of a decoder layer and of a layer before it.
MMCA_DRAWING = """\
I | s . . . . .
I | . s . . . .
T | 2 2 1 . . .
T | 2 2 1 1 . .
I | . . . . s .
T | 2 2 1 1 2 1
"""
JOINT_DRAWING = """\
I | s . . . . .
I | . s . . . .
T | 1 1 1 . . .
T | 1 1 1 1 . .
I | . . . . s .
T | 1 1 1 1 1 1
"""
IMAGE_DRAWING = """\
I | i i . . . .
I | i i . . . .
T | 2 2 1 . . .
T | 2 2 1 1 . .
I | . . . . i .
T | 2 2 1 1 2 1
"""
JOINT_IMAGE_DRAWING = """\
I | i i . . . .
I | i i . . . .
T | 1 1 1 . . .
T | 1 1 1 1 . .
I | . . . . i .
T | 1 1 1 1 1 1
"""
SELF_AND_TEXT_DRAWING = """\
I | s . . . . .
I | . s . . . .
T | 2 2 1 . . .
T | 2 2 1 1 . .
I | . . 1 1 s .
T | 2 2 1 1 2 1
"""
CAUSAL_DRAWING = """\
I | 1 . . . . .
I | 1 1 . . . .
T | 1 1 1 . . .
T | 1 1 1 1 . .
I | 1 1 1 1 1 .
T | 1 1 1 1 1 1
"""
CROSS_DRAWING = """\
I | . . . . . .
I | . . . . . .
T | 2 2 1 . . .
T | 2 2 1 1 . .
I | . . . . . .
T | 2 2 1 1 2 1
"""


@dataclass(frozen=True)
class TwoStreamForm:
    """An attention type whose images can be computed apart from the text."""

    image_attention: Callable[..., torch.Tensor]  # of image tokens, as `self_attention` or `own_image_attention`
    text_attention: Callable[..., torch.Tensor]  # of text tokens, see `mmca_text_attention`
    kernel: str = "sdpa"  # the one that computes it


@dataclass(frozen=True)
class AddedLayers:
    """The layers of an attention type that adds some to the model, and runs the decoder by itself."""

    part: str  # the name of the module that holds them, in `VisualChatModel` and for `set_trainable`
    build: Callable[[Any], nn.Module]  # from a `VisualChatConfig`
    run: Callable[[Any, Any], Any]  # from a `VisualChatModel` and `DecoderInputs` to the decoder's outputs
    # From the model, `ImageStates` with features and a tensor of the dtype and device to the states with keys, values.
    compute_images: Callable[[Any, ImageStates, torch.Tensor], ImageStates]


@dataclass(frozen=True)
class AttentionType:
    """One attention type."""

    name: str  # value of `VisualChatConfig.attention_type`
    drawing: str  # the pattern for `I I T T I T`; rows are queries, columns keys
    description: str  # how it reads images, for a model card
    merge: str = "sum"  # value of `VisualChatConfig.merge`
    image_attention: str = "self"  # value of `VisualChatConfig.image_attention`
    # Attention functions by kernel, registered with transformers as `key_kernel`; none if the decoder keeps its own.
    kernels: dict[str, Callable] = field(default_factory=dict)
    mask_interface: Callable | None = None  # evaluates mask functions, registered under the same names
    create_masks: Callable | None = None  # as `create_mmca_masks`; `None` if the decoder makes its own
    two_streams: TwoStreamForm | None = None  # the form without masks
    added_layers: AddedLayers | None = None  # such a type has images in no other form
    reference: Callable | None = None  # the definition written out, as `mmca_attention_reference`
    # Raises a `ValueError` for a decoder that cannot carry the type.
    check_decoder: Callable[[PreTrainedConfig], None] = lambda config: None

    @property
    def key(self) -> str:
        """The name in `ATTENTION_TYPES`: `"mmca"` is the paper's form; others add what differs (`"mmca_joint"`)."""
        variants = [self.merge] * (self.merge != "sum") + [self.image_attention] * (self.image_attention != "self")
        return "_".join([self.name, *variants])

    @property
    def needs_token_types(self) -> bool:
        """Whether a forward pass has to know which of the past and current tokens are images."""
        return self.create_masks is not None or self.added_layers is not None

    @property
    def options(self) -> dict[str, str]:
        """The fields of [`VisualChatConfig`] that choose it, with text that reads all images in every head."""
        return {
            "attention_type": self.name,
            "merge": self.merge,
            "image_attention": self.image_attention,
            "image_scope": "all",
        }

    def implementation(self, kernel: str | None) -> str | None:
        """The `attn_implementation` of this type on a kernel, given by its own name or as another implementation."""
        kernel = None if kernel is None else kernel_of(kernel)
        if not self.kernels:
            return kernel
        if (kernel or "sdpa") not in self.kernels:
            raise ValueError(
                f"attn_implementation={kernel!r} is not available for the attention type {self.name!r}; choose one of "
                f"{sorted(self.kernels)} for the language model. The vision tower may use another, "
                'as in attn_implementation={"text_config": "sdpa", "vision_config": "flash_attention_2"}.'
            )
        return f"{self.key}_{kernel or 'sdpa'}"


INDEPENDENT = "An image therefore has the same hidden states in any conversation and at any position."
TEXT_READS = {
    "sum": "A text token attends to text and to images through two softmaxes whose results are summed",
    "joint": "A text token attends to text and to images through one softmax",
}
IMAGE_READS = {
    "self": f"an image token attends only to itself. {INDEPENDENT}",
    "image": f"an image token attends to the tokens of its own image. {INDEPENDENT}",
    "self_and_text": "an image token attends to itself and to earlier text.",
}


def _mmca(merge: str, image_attention: str, drawing: str) -> AttentionType:
    """Multi-modal causal attention with one way to merge text and images, and one pattern of image tokens."""
    text_attentions = {"sum": mmca_text_attention, "joint": joint_text_attention}
    image_attentions = {"self": self_attention, "image": own_image_attention}
    two_streams = None
    if image_attention in image_attentions:
        two_streams = TwoStreamForm(image_attentions[image_attention], text_attentions[merge])
    return AttentionType(
        name="mmca",
        drawing=drawing,
        description=f"{TEXT_READS[merge]}; {IMAGE_READS[image_attention]}",
        merge=merge,
        image_attention=image_attention,
        kernels={name: MultiModalCausalAttention(kernel, merge) for name, kernel in KERNELS.items()},
        mask_interface=mmca_mask,
        create_masks=create_mmca_masks,
        two_streams=two_streams,
        reference=partial(mmca_attention_reference, merge=merge, image_attention=image_attention),
        check_decoder=check_decoder,
    )


ATTENTION_TYPES = {
    attention_type.key: attention_type
    for attention_type in (
        _mmca("sum", "self", MMCA_DRAWING),
        _mmca("joint", "self", JOINT_DRAWING),
        _mmca("sum", "image", IMAGE_DRAWING),
        _mmca("joint", "image", JOINT_IMAGE_DRAWING),
        _mmca("sum", "self_and_text", SELF_AND_TEXT_DRAWING),
        AttentionType(
            name="causal",
            drawing=CAUSAL_DRAWING,
            description="Every token, of text or of an image, attends to all earlier ones.",
        ),
        AttentionType(
            name="cross",
            drawing=CROSS_DRAWING,
            description=(
                "The language model runs on the text; before some of its layers, the text reads earlier images in a "
                f"gated cross-attention layer. {INDEPENDENT}"
            ),
            added_layers=AddedLayers(
                "cross_attention", build_cross_attention, run_with_cross_attention, compute_cross_states
            ),
            reference=cross_attention_reference,
            check_decoder=check_cross_decoder,
        ),
    )
}
# The values of `VisualChatConfig.image_scope`, and what they say in a model card.
IMAGE_SCOPES = {
    "all": "",
    "last": " Text reads the last image before it; earlier images reach it through earlier text.",
    "half": " In every second head, text reads only the last image before it.",
}
# The values of the fields of `VisualChatConfig` that choose the attention.
ATTENTION_OPTIONS = {
    "attention_type": list(dict.fromkeys(each.name for each in ATTENTION_TYPES.values())),
    "merge": list(dict.fromkeys(each.merge for each in ATTENTION_TYPES.values())),
    "image_attention": list(dict.fromkeys(each.image_attention for each in ATTENTION_TYPES.values())),
    "image_scope": list(IMAGE_SCOPES),
}

for _type in ATTENTION_TYPES.values():
    for _kernel, _attention in _type.kernels.items():
        AttentionInterface.register(f"{_type.key}_{_kernel}", _attention)
        AttentionMaskInterface.register(f"{_type.key}_{_kernel}", _type.mask_interface)


def get_attention_type(config: Any) -> AttentionType:
    """The attention type of a [`VisualChatConfig`]; a `ValueError` for values that are unknown or do not combine."""
    for option, known in ATTENTION_OPTIONS.items():
        if (value := getattr(config, option)) not in known:
            nearest = difflib.get_close_matches(str(value), known, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"Unknown {option}={value!r}{hint}; choose one of {', '.join(known)}.")
    there = [each for each in ATTENTION_TYPES.values() if each.name == config.attention_type]
    for each in there:
        if (each.merge, each.image_attention) == (config.merge, config.image_attention):
            return each
    combinations = ", ".join(f"({each.merge!r}, {each.image_attention!r})" for each in there)
    raise ValueError(
        f"attention_type={config.attention_type!r} has no form with merge={config.merge!r} and "
        f"image_attention={config.image_attention!r}; it has (merge, image_attention): {combinations}."
    )


def kernel_of(implementation: str) -> str:
    """`"mmca_sdpa"` to `"sdpa"`; the name of a kernel is its own."""
    key, _, kernel = implementation.rpartition("_")
    return kernel if key in ATTENTION_TYPES else implementation
