"""The outputs of the models."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class VisualChatModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`VisualChatModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, text hidden)`, *optional*):
            The projected features of the images of this call.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VisualChatCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`VisualChatForConditionalGeneration`]: `CausalLMOutputWithPast` with the features of the images.

    The loss is next-token cross-entropy over the labels that are not -100, in training zero if all are. There are no
    logits with `skip_logits`. The layers of a [`ConversationCache`] hold the keys and values of text only. Attentions,
    of the `eager` kernel, are those of MMCA, the two softmaxes summed with `merge="sum"`.
    """

    image_hidden_states: torch.Tensor | None = None
