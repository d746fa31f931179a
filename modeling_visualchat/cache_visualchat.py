"""
The cache of a conversation, with text and images in separate blocks.

A [`ConversationCache`] holds the keys and values of text in its `text_cache`, and refers to those of images, of which
any number of conversations reads one copy. It has no layers of its own that could be taken for the whole conversation;
iterating over it yields keys and values in the conversation's order.
"""

import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention_visualchat import check_coverage
from .placed_images_visualchat import PlacedImages
from .plan_visualchat import IMAGE, PADDING, TEXT, TwoStreamPlan, count_slots, make_plan, take


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

    A plain cache of the same conversation, which other code may continue, is `DynamicCache(iter(cache))`.

    Attributes:
        text_cache (`DynamicCache`): Of each layer the keys, rotated, and the values of all text, (B, K, T, D).
        placed_images ([`PlacedImages`], *optional*): The images, and where they stand.
        token_types (`torch.Tensor` of shape `(B, S)`): `PADDING`, `TEXT` or `IMAGE`, for each position; on the CPU.
        slots (`torch.Tensor` of shape `(B, S)`): The slot of each position in the block of its type; on the CPU.
        token_ids (`torch.Tensor` of shape `(B, S)`): The id at each position, `PADDING_ID` for padding, `UNKNOWN_ID`
            for an embedding; on the CPU.
        position_ids (`torch.Tensor` of shape `(B, S)`): The position of each token; on the CPU.
        images (`list` of B lists of `tuple`): Of each image of a row where it begins, and its key.
        model_key (`str`, *optional*): The key of the model that fills it, if it was passed to `generate` empty.
        longest (`int`): The largest number of positions so far, also if the cache was cropped since.
    """

    def __init__(self):
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.text_cache = DynamicCache()
        self.placed_images: PlacedImages | None = None
        self.token_types = self.slots = self.token_ids = self.position_ids = torch.zeros(0, 0, dtype=torch.long)
        self.images: list[list[tuple[int, str]]] = []
        self.longest, self.is_interleaved = 0, False
        self.model_key: str | None = None

    def __iter__(self):
        if self.is_interleaved:
            yield from super().__iter__()
        else:
            self.interleave(whole := DynamicCache())
            yield from whole

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values of text, or of any token once the blocks are interleaved."""
        update = super().update if self.is_interleaved else self.text_cache.update
        return update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of positions, of text, images and padding."""
        return self.token_ids.shape[1]

    @property
    def num_rows(self) -> int:
        """The number of conversations."""
        return len(self.token_ids)

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
        length = self.get_seq_length()
        if length == 0:
            self.token_types = self.slots = torch.zeros(batch_size, 0, dtype=torch.long)
        self.token_types, self.slots = self.token_types[:, :length], self.slots[:, :length]
        self._cut_blocks()

    def add_images(self, placed: PlacedImages | None) -> None:
        """Puts the images of a call behind those of each row."""
        if placed is not None:
            placed = placed.contiguous()  # each step of decoding reads them
            self.placed_images = placed if self.placed_images is None else self.placed_images.extend(placed)

    def commit(self, plan: TwoStreamPlan) -> None:
        """Counts the positions of a plan as cached, once the decoder has processed them."""
        self.token_types = torch.cat([self.token_types, plan.token_types], dim=1)
        self.slots = torch.cat([self.slots, plan.slots], dim=1)

    def note(
        self, input_ids, position_ids: torch.Tensor, is_image: torch.Tensor, attention_mask=None, image_states=None
    ) -> None:
        """Records ids, positions and images (B, Q) of what was cached last; the mask (B, S) tells padding."""
        is_image, position_ids = is_image.cpu(), position_ids.cpu()
        num_old, num_new = self.get_seq_length(), is_image.shape[1]
        ids = torch.full(is_image.shape, UNKNOWN_ID) if input_ids is None else input_ids
        ids = mark_padding(ids, None if attention_mask is None else attention_mask[:, -num_new:])
        keys = [] if image_states is None else image_states.image_keys()
        images = find_images(is_image, split_by_row(keys, is_image))
        if num_old:
            ids, position_ids = torch.cat([self.token_ids, ids], 1), torch.cat([self.position_ids, position_ids], 1)
            new = ([(num_old + start, key) for start, key in row] for row in images)
            images = [[*row, *added] for row, added in zip(self.images, new)]
        self.token_ids, self.position_ids, self.images = ids, position_ids, images
        self.longest = max(self.longest, num_old + num_new)

    def compare(
        self, input_ids, image_keys, image_token_id: int, attention_mask=None, position_ids=None
    ) -> torch.Tensor:
        """
        Where other conversations differ from those of the cache (B, L), over the positions that both have: at another
        token or position, and where another image begins. Takes what [`keep_shared`] takes; without keys, images are
        not compared. A row of the cache may be repeated, for beams.
        """
        ids, repeats = mark_padding(input_ids, attention_mask), max(1, self.num_rows // len(input_ids))
        length = min(self.get_seq_length(), ids.shape[1])
        differs = self.token_ids[::repeats, :length] != ids[:, :length]
        if position_ids is not None:
            is_moved = self.position_ids[::repeats, :length] != position_ids[:, :length].cpu()
            differs |= is_moved & (ids[:, :length] != PADDING_ID)
        for row, images in enumerate(find_images(ids == image_token_id, image_keys or [])):
            known = dict(self.images[row * repeats])
            for start, key in images:
                if start < length:
                    differs[row, start] |= known.get(start) != key
        return differs

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
        if len(self.token_ids) != len(input_ids):
            self.reset()
            return
        is_image = input_ids.cpu() == image_token_id
        inside = is_image.clone()
        for row, images in enumerate(find_images(is_image, image_keys)):
            inside[row, [start for start, _ in images]] = False
        differs = self.compare(input_ids, image_keys, image_token_id, attention_mask).any(dim=0).nonzero()
        num_shared = int(differs[0]) if len(differs) else min(self.token_ids.shape[1], input_ids.shape[1] - 1)
        while bool(inside[:, num_shared].any()):
            num_shared -= 1
        self.crop(min(0, num_shared - self.get_seq_length()))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last positions; `tokens_to_remove` is their number, negated."""
        if tokens_to_remove > 0:
            raise ValueError(f"Pass the number of tokens to remove as a negative number, got {tokens_to_remove}.")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if length == 0:
            self.reset()
            return
        self.token_ids, self.position_ids = self.token_ids[:, :length], self.position_ids[:, :length]
        self.images = [[(start, key) for start, key in row if start < length] for row in self.images]
        if self.is_interleaved:
            _cut(self, length)
            return
        self.token_types, self.slots = self.token_types[:, :length], self.slots[:, :length]
        self._cut_blocks()

    def _cut_blocks(self) -> None:
        """Leaves in both blocks what positions stand for."""
        _cut(self.text_cache, self.num_text_slots)
        if self.placed_images is not None:
            self.placed_images = self.placed_images.cut((self.token_types == IMAGE).sum(dim=1).tolist())

    def interleave(self, cache: DynamicCache | None = None) -> None:
        """
        Puts text and images into the order of the conversation: into another, empty cache, or in place, after which
        this cache is like any other.
        """
        if self.is_interleaved:
            _cut(self, self.get_seq_length())
            return
        self._cut_blocks()
        is_padding = self.token_types == PADDING
        order = (self.slots + (self.token_types == TEXT) * self.num_image_slots) * ~is_padding
        states = []
        for number in range(max(len(self.text_cache.layers), len(getattr(self.placed_images, "keys", ())))):
            blocks = [(layer.keys, layer.values) for layer in self.text_cache.layers[number : number + 1]]
            if self.placed_images is not None:
                like = blocks[0][0] if blocks else self.placed_images.keys[number][0]
                blocks.insert(0, self.placed_images.of_layer(number, like).keys_values())
            states.append([_in_order([*parts], order, is_padding) for parts in zip(*blocks)])
        if cache is None:
            self.text_cache, self.placed_images, self.is_interleaved = DynamicCache(), None, True
            self.token_types = self.slots = self.token_types[:, :0]
        for index, (keys, values) in enumerate(states):
            (self if cache is None else cache).update(keys, values, index)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Takes the rows of the beams that continue."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx.cpu())
        self.text_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        num_rows = self.num_rows
        super().batch_repeat_interleave(repeats)
        self._select_rows(torch.arange(num_rows).repeat_interleave(repeats))
        self.text_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows."""
        rows = torch.arange(self.num_rows)[indices.cpu()]
        super().batch_select_indices(indices)
        self._select_rows(rows)
        self.text_cache.batch_select_indices(indices)

    def append_rows(self, other: "ConversationCache") -> None:
        """
        Puts the conversations of another cache of the same model behind these, which goes on with padding on the left
        of the shorter ones. An image in both stays one copy.

        Raises:
            `ValueError`: a cache of another model, or one whose blocks are interleaved.
        """
        if self.is_interleaved or other.is_interleaved or self.model_key != other.model_key:
            raise ValueError("Only conversations of the same model, with text and images apart, can be joined.")
        num_rows, num_more = self.num_rows, other.num_rows
        widths = [(each, each.get_seq_length()) for each in (self, other)]
        length, num_slots = max(width for _, width in widths), max(self.num_text_slots, other.num_text_slots)
        for layer, more in zip(self.text_cache.layers, other.text_cache.layers):
            for name in ("keys", "values"):
                blocks = [getattr(each, name) for each in (layer, more)]
                padded = [nn.functional.pad(block, (0, 0, 0, num_slots - block.shape[2])) for block in blocks]
                setattr(layer, name, torch.cat(padded))
        for name, filler in (("token_types", PADDING), ("slots", 0), ("token_ids", PADDING_ID), ("position_ids", 0)):
            blocks = [getattr(each, name) for each in (self, other)]
            padded = [nn.functional.pad(block, (length - block.shape[1], 0), value=filler) for block in blocks]
            setattr(self, name, torch.cat(padded))
        self.images = [
            [(start + length - width, key) for start, key in row] for each, width in widths for row in each.images
        ]
        self.longest = max(self.longest, other.longest)
        first, second = self.placed_images, other.placed_images
        self.placed_images = first.with_rows(0, num_more) if first else None
        self.add_images(second.with_rows(num_rows, 0) if second else None)

    def compact(self) -> None:
        """Closes the gaps in the block of text that rows of unequal length have left, and drops columns of padding."""
        is_text, first = self.token_types == TEXT, int((self.token_types != PADDING).any(dim=0).int().argmax())
        counts = is_text.sum(dim=1)
        order = torch.zeros(self.num_rows, int(counts.max()), dtype=torch.long)
        for row, count in enumerate(counts.tolist()):
            order[row, :count] = self.slots[row, is_text[row]]
        if order.shape[1] < self.num_text_slots:
            self.slots = torch.where(is_text, is_text.cumsum(dim=1) - 1, self.slots)
            for layer in self.text_cache.layers:
                layer.keys, layer.values = (
                    take(block.transpose(1, 2), order).transpose(1, 2) for block in (layer.keys, layer.values)
                )
        for name in ("token_types", "slots", "token_ids", "position_ids"):
            setattr(self, name, getattr(self, name)[:, first:])
        self.images = [[(start - first, key) for start, key in row] for row in self.images]

    def reset(self) -> None:
        """Forgets everything."""
        self.layers.clear()
        self._forget()

    def _select_rows(self, rows: torch.Tensor) -> None:
        if len(self.token_ids):
            self.token_ids, self.position_ids = self.token_ids[rows], self.position_ids[rows]
            self.images = [self.images[row] for row in rows.tolist()]
        if not self.is_interleaved:
            self.token_types, self.slots = self.token_types[rows], self.slots[rows]
            self.placed_images = None if self.placed_images is None else self.placed_images.select(rows.tolist())


def plan_call(
    cache: ConversationCache | None, inputs: Any, sequence_ids: torch.Tensor | None
) -> tuple[TwoStreamPlan, torch.Tensor, torch.Tensor]:
    """Of a call, [`DecoderInputs`], on a cache: its plan, where its images are (B, Q), and its positions (B, Q)."""
    shape, num_past = inputs.embeds.shape[:2], 0 if cache is None else cache.get_seq_length()
    position_ids = inputs.position_ids
    if position_ids is None:
        position_ids = torch.arange(num_past, num_past + shape[1], device=inputs.embeds.device)[None]
    assert inputs.mm_token_type_ids is not None
    check_coverage(inputs.mm_token_type_ids, inputs.attention_mask)
    mm_token_type_ids = inputs.mm_token_type_ids[:, num_past:]
    attention_mask = None if inputs.attention_mask is None else inputs.attention_mask[:, num_past:]
    past: tuple[Any, Any] = (None, None)
    if cache is not None:
        cache.prepare(shape[0])
        past = (cache.slots, cache.token_types)
    plan = make_plan(mm_token_type_ids, attention_mask, past[0], past[1], sequence_ids)
    return plan, mm_token_type_ids.cpu().bool(), position_ids.expand(shape)


def is_conversation_cache(cache: Any) -> TypeGuard[ConversationCache]:
    """Whether this is a [`ConversationCache`]; that of remote code is another class of the same name."""
    return any(base.__name__ == ConversationCache.__name__ for base in type(cache).__mro__)


def mark_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Ids (B, S) with `PADDING_ID` where the mask is 0, on the CPU."""
    ids = input_ids.cpu()
    return ids if attention_mask is None else ids.masked_fill(attention_mask.cpu() == 0, PADDING_ID)


def split_by_row(images: Sequence, is_image: torch.Tensor) -> list[list]:
    """Images of equal length, in the order of the batch, by the row (B, S) that shows them."""
    counts = (is_image.sum(dim=1) * len(images) // is_image.sum().clamp(min=1)).tolist()
    remaining = iter(images)
    return [list(itertools.islice(remaining, count)) for count in counts]


def find_images(is_image: torch.Tensor, image_keys: list[list[str]]) -> list[list[tuple[int, str]]]:
    """Of each image of a row (B, S) where it begins, and its key."""
    places = [row.nonzero()[:, 0].tolist() for row in is_image]
    return [list(zip(row[:: max(1, len(row) // max(1, len(keys)))], keys)) for row, keys in zip(places, image_keys)]


def _cut(cache: Cache, length: int) -> None:
    if length == 0:
        cache.layers.clear()  # layers without a position would not be repeated with the rows
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


def _in_order(blocks: list[torch.Tensor], order: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Blocks (B, K, …, D) side by side to (B, K, S, D) in the order (B, S) of positions, zero at padding."""
    states = take(torch.cat(blocks, dim=2).transpose(1, 2), order).transpose(1, 2)
    return states.masked_fill(is_padding.to(states.device)[:, None, :, None], 0.0)
