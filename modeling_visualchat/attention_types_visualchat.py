"""
The attention types of the language model: one record each, in one table.

A new type is a record in `ATTENTION_TYPES`; the model, the routes and generation read what they need from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from .attention_visualchat import (
    MMCA_DRAWING,
    MultiModalCausalAttention,
    check_decoder,
    create_mmca_masks,
    mmca_attention_reference,
    mmca_mask,
)
from .image_states_visualchat import self_attention
from .kernels_visualchat import KERNELS
from .plan_visualchat import mmca_text_attention


CAUSAL_DRAWING = """\
I | 1 . . . . .
I | 1 1 . . . .
T | 1 1 1 . . .
T | 1 1 1 1 . .
I | 1 1 1 1 1 .
T | 1 1 1 1 1 1
"""


@dataclass(frozen=True)
class TwoStreamForm:
    """An attention type whose images can be computed apart from the text."""

    image_attention: Callable[
        ..., torch.Tensor
    ]  # of image tokens, `(query, key, value, scaling)` to (N, length, H, D)
    text_attention: Callable[..., torch.Tensor]  # of text tokens, see `mmca_text_attention`
    kernel: str = "sdpa"  # the one that computes it


@dataclass(frozen=True)
class AttentionType:
    """One attention type."""

    name: str  # value of `VisualChatConfig.attention_type`
    drawing: str  # the pattern for `I I T T I T`; rows are queries, columns keys
    # Attention functions by kernel, registered with transformers as `name_kernel`; none if the decoder keeps its own.
    kernels: dict[str, Callable] = field(default_factory=dict)
    mask_interface: Callable | None = None  # evaluates mask functions, registered under the same names
    create_masks: Callable | None = None  # as `create_mmca_masks`; `None` if the decoder makes its own
    two_streams: TwoStreamForm | None = None  # the form without masks
    reference: Callable | None = None  # the definition written out, as `mmca_attention_reference`
    # Raises a `ValueError` for a decoder that cannot carry the type.
    check_decoder: Callable[[PreTrainedConfig], None] = lambda config: None

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
        return f"{self.name}_{kernel or 'sdpa'}"


ATTENTION_TYPES = {
    attention_type.name: attention_type
    for attention_type in (
        AttentionType(
            name="mmca",
            drawing=MMCA_DRAWING,
            kernels={name: MultiModalCausalAttention(kernel) for name, kernel in KERNELS.items()},
            mask_interface=mmca_mask,
            create_masks=create_mmca_masks,
            two_streams=TwoStreamForm(self_attention, mmca_text_attention),
            reference=mmca_attention_reference,
            check_decoder=check_decoder,
        ),
        AttentionType(name="causal", drawing=CAUSAL_DRAWING),
    )
}

for _type in ATTENTION_TYPES.values():
    for _kernel, _attention in _type.kernels.items():
        AttentionInterface.register(f"{_type.name}_{_kernel}", _attention)
        AttentionMaskInterface.register(f"{_type.name}_{_kernel}", _type.mask_interface)


def get_attention_type(name: str) -> AttentionType:
    """The record of an attention type; a `ValueError` for an unknown name."""
    if name not in ATTENTION_TYPES:
        raise ValueError(f"Unknown attention_type={name!r}; choose one of {', '.join(ATTENTION_TYPES)}.")
    return ATTENTION_TYPES[name]


def kernel_of(implementation: str) -> str:
    """`"mmca_sdpa"` to `"sdpa"`; the name of a kernel is its own."""
    for attention_type in ATTENTION_TYPES.values():
        if attention_type.kernels and implementation.startswith(f"{attention_type.name}_"):
            return implementation.removeprefix(f"{attention_type.name}_")
    return implementation
