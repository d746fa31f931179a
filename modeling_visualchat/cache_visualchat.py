"""
The cache of a conversation, with text and images in separate blocks.

The layers of a [`ConversationCache`] hold the keys and values of text only, and `image_cache` holds those of images:
a new token reads each block as it is: no mask, and no copy of the images in every step.
"""

from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .plan_visualchat import IMAGE, PADDING, TEXT, TwoStreamPlan, count_slots, take


UNKNOWN_ID, PADDING_ID = -1, -2


class ConversationCache(DynamicCache):
    """
    Keys and values of conversations. `generate` makes one where the model can use it; make one to keep a conversation:

    ```python
    >>> cache = ConversationCache()
    >>> model.generate(**inputs, past_key_values=cache)
    ```

    The next call passes all tokens so far, with all images or the new ones only, and computes what is new. Tokens and
    images that differ from those in the cache are an error; [`ChatSession`] edits conversations.

    Attributes:
        image_cache (`DynamicCache`): Of each layer the keys, rotated, and the values of all images, (B, K, I, D).
        token_types (`torch.Tensor` of shape `(B, S)`): `PADDING`, `TEXT` or `IMAGE`, for each position; on the CPU.
        slots (`torch.Tensor` of shape `(B, S)`): The slot of each position in the block of its type; on the CPU.
        token_ids (`torch.Tensor` of shape `(B, S)`): The id at each position, `PADDING_ID` for padding, `UNKNOWN_ID`
            for an embedding; on the CPU.
        image_keys (`list` of B lists of `str`, *optional*): The keys of the images of each row, as far as `generate`
            passed them.
    """

    def __init__(self):
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.image_cache = DynamicCache()
        self.token_types = self.slots = self.token_ids = torch.zeros(0, 0, dtype=torch.long)
        self.image_keys: list[list[str]] | None = None
        self.is_interleaved = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of positions, of text, images and padding."""
        return super().get_seq_length(layer_idx) if self.is_interleaved else self.token_types.shape[1]

    @property
    def num_rows(self) -> int:
        """The number of conversations."""
        return len(self.layers[0].keys) if self.is_interleaved and self.layers else len(self.token_types)

    @property
    def num_text_slots(self) -> int:
        """Length of the text block."""
        return count_slots(self.slots, self.token_types, TEXT)

    @property
    def num_image_slots(self) -> int:
        """Length of the image block."""
        return count_slots(self.slots, self.token_types, IMAGE)

    def prepare(self, batch_size: int) -> None:
        """Drops what an interrupted forward pass has left behind."""
        if self.token_types.shape[1] == 0:
            self.layers.clear()
            self.image_cache = DynamicCache()
            self.token_types = self.slots = torch.zeros(batch_size, 0, dtype=torch.long)
        _cut(self, self.num_text_slots)
        _cut(self.image_cache, self.num_image_slots)

    def add_images(self, plan: TwoStreamPlan, num_layers: int) -> None:
        """Appends the images of a plan to the images of each row, layer by layer."""
        if plan.image_keys_values is None:
            return
        num_old = (self.token_types == IMAGE).sum(dim=1)
        num_new = (plan.token_types == IMAGE).sum(dim=1)
        num_slots = self.num_image_slots
        order = torch.zeros(len(num_old), int((num_old + num_new).max()), dtype=torch.long)
        for row, (old, new) in enumerate(zip(num_old.tolist(), num_new.tolist())):
            order[row, :old] = torch.arange(old)
            order[row, old : old + new] = torch.arange(new) + num_slots
        is_plain = bool((order == torch.arange(order.shape[1])).all())
        for layer in range(num_layers):
            keys, values = self.image_cache.update(*plan.image_keys_values(layer), layer)
            if not is_plain:
                self.image_cache.layers[layer].keys = take(keys.transpose(1, 2), order).transpose(1, 2)
                self.image_cache.layers[layer].values = take(values.transpose(1, 2), order).transpose(1, 2)

    def image_keys_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the images of a layer, each (B, K, I, D)."""
        states = self.image_cache.layers[layer]
        return states.keys, states.values

    def commit(self, plan: TwoStreamPlan) -> None:
        """Counts the positions of a plan as cached, once the decoder has processed them."""
        self.token_types = torch.cat([self.token_types, plan.token_types], dim=1)
        self.slots = torch.cat([self.slots, plan.slots], dim=1)

    def note_tokens(
        self, input_ids: torch.Tensor | None, num_new: int, attention_mask: torch.Tensor | None = None
    ) -> None:
        """Records the ids (B, Q) of the positions cached last; the mask (B, S) tells padding."""
        num_old = self.get_seq_length() - num_new
        ids = torch.full((self.num_rows, num_new), UNKNOWN_ID) if input_ids is None else input_ids.cpu()
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask[:, -num_new:].cpu() == 0, PADDING_ID)
        old = self.token_ids if len(self.token_ids) == len(ids) else torch.empty(len(ids), 0, dtype=torch.long)
        old = nn.functional.pad(old, (0, max(0, num_old - old.shape[1])), value=UNKNOWN_ID)
        self.token_ids = torch.cat([old[:, :num_old], ids], dim=1)

    def keep_shared(
        self,
        input_ids: torch.Tensor,
        image_keys: list[list[str]],
        image_token_id: int,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """
        Crops the cache to what it shares with other conversations: up to the first change of a token or an image,
        never into an image, and short of the last token, which has to predict the next one.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`): Their token ids.
            image_keys (`list` of B lists of `str`): The keys of their images.
            image_token_id (`int`): Id of the placeholder.
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 to keep, 0 for padding.
        """
        ids = input_ids.cpu()
        if attention_mask is not None:
            ids = ids.masked_fill(attention_mask.cpu() == 0, PADDING_ID)
        known = self.image_keys or [[] for _ in ids]
        if len(self.token_ids) != len(ids):
            self.reset()
            return
        length = min(self.token_ids.shape[1], ids.shape[1] - 1)
        differs = self.token_ids[:, :length] != ids[:, :length]
        starts = []
        for row, keys in enumerate(image_keys):
            places = (ids[row] == image_token_id).nonzero()[:, 0].tolist()
            size = len(places) // max(1, len(keys))
            starts.append([(places[number * size], size) for number in range(len(keys))])
            for number, (start, _) in enumerate(starts[row]):
                if start < length and known[row][number : number + 1] != keys[number : number + 1]:
                    differs[row, start] = True
        changed = differs.any(dim=0).nonzero()
        num_shared = int(changed[0]) if len(changed) else length
        images = [image for row in starts for image in row]
        while inside := [start for start, size in images if start < num_shared < start + size]:
            num_shared = min(inside)
        self.crop(min(0, num_shared - self.get_seq_length()))
        if self.get_seq_length() > 0:
            counts = [sum(start < num_shared for start, _ in row) for row in starts]
            self.image_keys = [keys[:count] for keys, count in zip(image_keys, counts)]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last positions; `tokens_to_remove` is their number, negated."""
        if tokens_to_remove > 0:
            raise ValueError(f"Pass the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length == 0:
            self.reset()
            return
        self.token_ids, self.image_keys = self.token_ids[:, :length], None
        if self.is_interleaved:
            _cut(self, length)
            return
        self.token_types, self.slots = self.token_types[:, :length], self.slots[:, :length]
        _cut(self, self.num_text_slots)
        _cut(self.image_cache, self.num_image_slots)

    def interleave(self, cache: DynamicCache | None = None) -> None:
        """
        Puts text and images into the order of the conversation: into another, empty cache, or in place, after which
        this cache is like any other.
        """
        if self.is_interleaved:
            return
        _cut(self, self.num_text_slots)
        _cut(self.image_cache, self.num_image_slots)
        num_images = self.num_image_slots
        order = (self.slots + (self.token_types == TEXT) * num_images) * (self.token_types != PADDING)
        is_padding = self.token_types == PADDING
        for index, layer in enumerate(self.layers):
            states = [(layer.keys, layer.values)]
            if num_images:
                states.insert(0, self.image_keys_values(index))
            keys, values = (_in_order(list(blocks), order, is_padding) for blocks in zip(*states))
            if cache is None:
                layer.keys, layer.values = keys, values
            else:
                cache.update(keys, values, index)
        if cache is None:
            self.image_cache, self.is_interleaved = DynamicCache(), True
            self.token_types = self.slots = self.token_types[:, :0]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the rows of the beams that continue."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx.cpu())
        if self.image_cache.layers:
            self.image_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        num_rows = self.num_rows
        super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(num_rows).repeat_interleave(repeats))
        self.image_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        rows = torch.arange(self.num_rows)[indices.cpu()]
        super().batch_select_indices(indices)
        self._select_rows(rows)
        self.image_cache.batch_select_indices(indices)

    def reset(self) -> None:
        """Forgets everything."""
        self.layers.clear()
        self._forget()

    def _select_rows(self, rows: torch.Tensor) -> None:
        if len(self.token_ids):
            self.token_ids = self.token_ids[rows]
        if self.image_keys is not None:
            self.image_keys = [self.image_keys[row] for row in rows.tolist()]
        if not self.is_interleaved:
            self.token_types, self.slots = self.token_types[rows], self.slots[rows]


def is_conversation_cache(cache: Any) -> TypeGuard[ConversationCache]:
    """Whether this is a [`ConversationCache`]; that of remote code is another class of the same name."""
    return any(base.__name__ == ConversationCache.__name__ for base in type(cache).__mro__)


def _cut(cache: Cache, length: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


def _in_order(blocks: list[torch.Tensor], order: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Blocks (B, K, …, D) side by side to (B, K, S, D) in the order (B, S) of positions, zero at padding."""
    states = take(torch.cat(blocks, dim=2).transpose(1, 2), order).transpose(1, 2)
    return states.masked_fill(is_padding.to(states.device)[:, None, :, None], 0.0)
