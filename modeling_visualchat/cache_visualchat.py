"""
The cache of a conversation, text and images apart.

The layers of a [`ConversationCache`] hold the keys and values of text alone, and `images` holds those of images, so a
new token reads each of the two as it is: no mask, no key of the other kind, and no copy of the images in every step.
"""

from typing import Any, TypeGuard

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .plan_visualchat import IMAGE, PADDING, TEXT, MMCAPlan, count_places, take


class ConversationCache(DynamicCache):
    """
    Keys and values of conversations, for a decoder without sliding windows. `generate` makes one by itself; make one
    to keep a conversation:

    ```python
    >>> cache = ConversationCache()
    >>> model.generate(**inputs, past_key_values=cache)
    ```

    Attributes:
        images (`DynamicCache`): Of each layer the keys, rotated, and the values of all images, (B, K, I, D).
        kinds (`torch.Tensor` of shape `(B, S)`): `PADDING`, `TEXT` or `IMAGE`, for each position; on the CPU.
        places (`torch.Tensor` of shape `(B, S)`): For each position its place in the block of its kind; on the CPU.
        tokens (`list` of B lists of S, *optional*): What stands at each position: the id of a text token, or what
            tells an image from another. Set by `generate`, which finds by it what of a conversation has changed.
        made_by (*optional*): What tells the model and its state from another, set by `generate` too.
    """

    def __init__(self):
        super().__init__()
        self.images = DynamicCache()
        self.kinds = self.places = torch.zeros(0, 0, dtype=torch.long)
        self.tokens: list[list] | None = None
        self.made_by: Any = None
        self.is_interleaved = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of positions, of text, images and padding."""
        return super().get_seq_length(layer_idx) if self.is_interleaved else self.kinds.shape[1]

    @property
    def num_rows(self) -> int:
        """The number of conversations."""
        return len(self.layers[0].keys) if self.is_interleaved and self.layers else len(self.kinds)

    @property
    def num_text_places(self) -> int:
        """Length of the text block."""
        return count_places(self.places, self.kinds, TEXT)

    @property
    def num_image_places(self) -> int:
        """Length of the image block."""
        return count_places(self.places, self.kinds, IMAGE)

    def prepare(self, batch_size: int) -> None:
        """Drops what a forward pass has left that did not come to its end."""
        if self.kinds.shape[1] == 0:
            for layer in self.layers:
                layer.reset()
            self.images = DynamicCache()
            self.kinds = self.places = torch.zeros(batch_size, 0, dtype=torch.long)
        _cut(self, self.num_text_places)
        _cut(self.images, self.num_image_places)

    def add_images(self, plan: MMCAPlan, num_layers: int) -> None:
        """Takes over the images of a plan, layer by layer, each row's after those that it has."""
        if plan.images is None:
            return
        num_old = (self.kinds == IMAGE).sum(dim=1)
        num_new = (plan.kinds == IMAGE).sum(dim=1)
        num_places = self.num_image_places
        order = torch.zeros(len(num_old), int((num_old + num_new).max()), dtype=torch.long)
        for row, (old, new) in enumerate(zip(num_old.tolist(), num_new.tolist())):
            order[row, :old] = torch.arange(old)
            order[row, old : old + new] = torch.arange(new) + num_places
        is_plain = bool((order == torch.arange(order.shape[1])).all())
        for layer in range(num_layers):
            keys, values = self.images.update(*plan.images(layer), layer)
            if not is_plain:
                self.images.layers[layer].keys = take(keys.transpose(1, 2), order).transpose(1, 2)
                self.images.layers[layer].values = take(values.transpose(1, 2), order).transpose(1, 2)

    def of_images(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the images of a layer, each (B, K, I, D)."""
        states = self.images.layers[layer]
        return states.keys, states.values

    def commit(self, plan: MMCAPlan) -> None:
        """Counts the positions of a plan as cached, once the decoder is through with them."""
        self.kinds = torch.cat([self.kinds, plan.kinds], dim=1)
        self.places = torch.cat([self.places, plan.places], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last positions; `tokens_to_remove` is their number, negated."""
        if tokens_to_remove > 0:
            raise ValueError(f"Pass the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length == 0:
            self.reset()
            return
        self.tokens = None if self.tokens is None else [row[:length] for row in self.tokens]
        if self.is_interleaved:
            super().crop(tokens_to_remove)
            return
        self.kinds, self.places = self.kinds[:, :length], self.places[:, :length]
        _cut(self, self.num_text_places)
        _cut(self.images, self.num_image_places)

    def interleave(self, cache: DynamicCache | None = None) -> None:
        """
        Puts text and images into the order of the conversation: into another, empty cache, or in place, after which
        this cache is like any other.
        """
        if self.is_interleaved:
            return
        num_images = self.num_image_places
        order = (self.places + (self.kinds == TEXT) * num_images) * (self.kinds != PADDING)
        is_padding = self.kinds == PADDING
        for index, layer in enumerate(self.layers):
            states = [(layer.keys, layer.values)]
            if num_images:
                states.insert(0, self.of_images(index))
            keys, values = (_in_order(list(blocks), order, is_padding) for blocks in zip(*states))
            if cache is None:
                layer.keys, layer.values = keys, values
            else:
                cache.update(keys, values, index)
        if cache is None:
            self.images, self.is_interleaved = DynamicCache(), True
            self.kinds = self.places = self.kinds[:, :0]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the rows of the beams that go on."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx.cpu())
        if self.images.layers:
            self.images.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        num_rows = self.num_rows
        super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(num_rows).repeat_interleave(repeats))
        self.images.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        rows = torch.arange(self.num_rows)[indices.cpu()]
        super().batch_select_indices(indices)
        self._select_rows(rows)
        self.images.batch_select_indices(indices)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.images = DynamicCache()
        self.kinds = self.places = torch.zeros(0, 0, dtype=torch.long)
        self.tokens, self.made_by, self.is_interleaved = None, None, False

    def _select_rows(self, rows: torch.Tensor) -> None:
        self.tokens = None  # which go with rows of `generate`, not with beams
        if not self.is_interleaved:
            self.kinds, self.places = self.kinds[rows], self.places[rows]


def keeps_apart(cache: Any) -> TypeGuard[ConversationCache]:
    """Whether this is a [`ConversationCache`], that of remote code included, which is another class."""
    return any(base.__name__ == ConversationCache.__name__ for base in type(cache).__mro__)


def _cut(cache: Cache, length: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


def _in_order(blocks: list[torch.Tensor], order: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Blocks (B, K, …, D) side by side to (B, K, S, D) in the order (B, S) of positions, zero at padding."""
    states = take(torch.cat(blocks, dim=2).transpose(1, 2), order).transpose(1, 2)
    return states.masked_fill(is_padding.to(states.device)[:, None, :, None], 0.0)
