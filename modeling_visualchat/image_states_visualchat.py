"""
Image states: per-layer keys and values of images, which do not depend on the conversation.

An image token attends only to its own image, so its hidden states depend only on the image; its keys also depend on
their position, by rotation. [`ImageStream`] takes images through an unmodified decoder, each at the positions 0, 1, 2,
…, and records the keys and values of each layer. [`PlacedImages`] places them in conversations.

Dimensions: N images of a batch, U unique images among them, `length` tokens an image, K key/value heads, D head size.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .key_rotation_visualchat import KeyRotation
from .skip_queries_visualchat import SkipQueryProjections
from .weights_key_visualchat import image_key


@dataclass(frozen=True, eq=False)
class ImageStates:
    """
    The images of a batch, each unique one once.

    Args:
        features (`torch.Tensor` of shape `(U, length, text hidden)`): Projected features, the decoder's input.
        index (`list` of N `int`): For each image of the batch its index among the unique images.
        keys (`list` of `torch.Tensor` of shape `(U, K, length, D)`): For each layer, or lists of U tensors; empty
            before the decoder has processed the images.
        values (`list` of `torch.Tensor` of shape `(U, K, length, D)`): For each layer, or lists of U tensors.
        outputs (`torch.Tensor` of shape `(U, length, text hidden)`, *optional*): The decoder's output.
        is_rotated (`bool`): Whether the keys are rotated to positions of one conversation.
        pixel_values (`torch.Tensor` of shape `(U, channels, height, width)`, *optional*): What the images are told
            apart by; without, their features.
    """

    features: torch.Tensor
    index: list[int]
    keys: Sequence[Sequence[torch.Tensor]] = field(default_factory=list, repr=False)
    values: Sequence[Sequence[torch.Tensor]] = field(default_factory=list, repr=False)
    outputs: torch.Tensor | None = field(default=None, repr=False)
    is_rotated: bool = False
    pixel_values: torch.Tensor | None = field(default=None, repr=False)

    def select(self, images: list[int]) -> "ImageStates":
        """The batch of these images, in this order; nothing is copied."""
        return replace(self, index=[self.index[image] for image in images])

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """(U, …) to (N, …)."""
        if not self.has_repeats:
            return states
        return states[torch.tensor(self.index, device=states.device)]

    def image_keys(self) -> list[str]:
        """The key of each image of the batch, see [`image_key`]."""
        keys = [image_key(image) for image in (self.features if self.pixel_values is None else self.pixel_values)]
        return [keys[number] for number in self.index]

    @property
    def has_repeats(self) -> bool:
        """Whether the batch differs from the unique images in order."""
        return self.index != list(range(len(self.features)))

    def token_index(self) -> torch.Tensor:
        """For each image token of the batch, in order, its row among the tokens of the unique images."""
        length = self.features.shape[1]
        return (torch.tensor(self.index)[:, None] * length + torch.arange(length)).flatten()

    def check_tokens(self, is_image: torch.Tensor) -> None:
        """Raises a `ValueError` unless the image tokens (B, Q) are as many as those of the images."""
        if len(self.token_index()) != int(is_image.sum()):
            raise ValueError(
                f"mm_token_type_ids marks {int(is_image.sum())} of the current tokens as images; the images take "
                f"{len(self.token_index())}."
            )


def same_images(pixel_values: torch.Tensor) -> list[int]:
    """For each image (N, …) its index among the unique images."""
    if len(pixel_values) < 2:
        return list(range(len(pixel_values)))
    flat = pixel_values.detach().flatten(1)
    sums = list(zip(*(part.sum(dim=1, dtype=torch.float64).tolist() for part in (flat, flat[:, ::7]))))
    # Equal sums are rare but for equal images, and are told apart by content.
    repeated = {pair for pair, count in Counter(sums).items() if count > 1}
    keys = [(pair, image_key(image) if pair in repeated else "") for pair, image in zip(sums, flat)]
    numbers: dict[tuple, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def self_attention(query, key, value, scaling: float | None) -> torch.Tensor:
    """An image token that attends only to itself returns its value: (N, K, length, D) to (N, length, H, D)."""
    groups = query.shape[1] // value.shape[1]
    value = value if groups == 1 else value.repeat_interleave(groups, dim=1)
    return value.transpose(1, 2).contiguous()


def own_image_attention(query, key, value, scaling: float | None) -> torch.Tensor:
    """Image tokens that attend to all tokens of their image: (N, H or K, length, D) to (N, length, H, D)."""
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous()


class ImageStream:
    """The plan of the image stream, for the attention of an attention type: records the keys and values of layers."""

    def __init__(self, attention: Callable[..., torch.Tensor] = self_attention):
        self.attention = attention
        self.is_within = attention is not self_attention  # whether image tokens attend to each other
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.num_calls = 0

    def positions(self, features: torch.Tensor) -> torch.Tensor:
        """Where images (N, length, hidden) stand that are computed apart from a conversation, (N, length)."""
        return torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])

    def attend(self, module: nn.Module, query, key, value, scaling: float | None, dropout: float) -> torch.Tensor:
        """The attention of the images in one decoder layer: (N, H, length, D) to (N, length, H, D)."""
        layer: Any = module.layer_idx
        self.num_calls += 1
        # With gradient checkpointing the layer is recomputed in the backward pass.
        self.keys.setdefault(layer, key)
        self.values.setdefault(layer, value)
        return self.attention(query, key, value, scaling)


def run_image_stream(
    decode: Callable[..., Any],
    states: ImageStates,
    stream: ImageStream,
    rotation: KeyRotation,
    position_ids: torch.Tensor | None = None,
    skips_queries: bool = False,
) -> ImageStates:
    """
    Takes images with features only through a decoder, at positions (U, length) if given, else at 0, 1, 2, …. Query
    projections are left out if asked for, see [`SkipQueryProjections`].
    """
    is_rotated = position_ids is not None
    if position_ids is None:
        position_ids = stream.positions(states.features)
    skip: AbstractContextManager = SkipQueryProjections(rotation.decoder) if skips_queries else nullcontext()
    with skip:
        outputs = decode(states.features, position_ids, stream).last_hidden_state
    layers = range(rotation.num_layers)
    keys: Any = [stream.keys[layer] for layer in layers]
    values: Any = [stream.values[layer] for layer in layers]
    return replace(states, keys=keys, values=values, outputs=outputs, is_rotated=is_rotated)
