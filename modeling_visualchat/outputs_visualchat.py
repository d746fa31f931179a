"""The outputs of the models."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


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
class VisualChatCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`VisualChatForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Next-token cross-entropy over the labels that are not -100; in training zero if all are.
        logits (`torch.Tensor` of shape `(B, Q, vocabulary)`, *optional*):
            Scores before the softmax, at the positions that `logits_to_keep` asks for; none with `skip_logits`.
        past_key_values (`Cache`, *optional*):
            Keys and values of every layer; the layers of a [`ConversationCache`] hold those of text only.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Hidden states of the language model, each (B, Q, text hidden).
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of the `eager` kernel, each (B, H, Q, S); the two softmaxes of MMCA summed.
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, text hidden)`, *optional*):
            The projected features of the images of this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None
