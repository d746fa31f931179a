"""
MMCA without masks: the tokens sorted by modality once, at the decoder's input, and planned once a forward pass.

The result of MMCA depends on the modality and the position of a token, not on its place in the tensor. With the images
of a row first and its text after, every layer sees contiguous slices: plain causal attention for text on text, and a
prefix of the image keys for each run of text. Image queries cost nothing. Drawn for `I I T T I T`, sorted to
`I I I | T T T` (rows are the queries that are computed, t = text on text, i = text on image):

    T | i i .  t . .
    T | i i .  t t .
    T | i i i  t t t

Rows of a batch are padded inside the two blocks, at their ends, where neither causality nor a prefix reaches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class MMCAPlan:
    """
    The order of a batch, and what its text reads of its images.

    Args:
        order (`torch.Tensor` of shape `(B, L)`): For each place of the sorted rows the position it is taken from.
        places (`torch.Tensor` of shape `(B, S)`): For each position its place in the sorted rows.
        num_image_places (`int`): Length of the image block; the text block is the rest of L.
        runs (`list` of B lists of `(start, end, num_keys)`): The runs of text between images: places in the text
            block, and how many image keys stand before them.
        is_kept (`torch.Tensor` of shape `(B, S)`, *optional*): `False` for padding, which is restored as zero.
    """

    order: torch.Tensor
    places: torch.Tensor
    num_image_places: int
    runs: list[list[tuple[int, int, int]]]
    is_kept: torch.Tensor | None = None

    def sort(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, …) in the order of the conversation to (B, L, …), images first."""
        return _take(states, self.order)

    def restore(self, states: torch.Tensor) -> torch.Tensor:
        """(B, L, …), images first, to (B, S, …) in the order of the conversation."""
        states = _take(states, self.places)
        if self.is_kept is None:
            return states
        is_padding = ~self.is_kept.to(states.device).view(*self.is_kept.shape, *[1] * (states.ndim - 2))
        return states.masked_fill(is_padding, 0.0)


def plan_mmca(mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MMCAPlan:
    """
    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`): 0 for text, 1 for image.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 to keep, 0 for padding.
    """
    num_positions = mm_token_type_ids.shape[1]
    is_image = mm_token_type_ids.cpu().bool()
    is_kept = torch.ones_like(is_image) if attention_mask is None else attention_mask.cpu().bool()
    images = [row.nonzero()[:, 0] for row in is_image & is_kept]
    texts = [row.nonzero()[:, 0] for row in ~is_image & is_kept]
    num_image_places = max(len(row) for row in images)
    num_text_places = max(1, *(len(row) for row in texts))

    order = torch.zeros(len(images), num_image_places + num_text_places, dtype=torch.long)
    places = torch.zeros(len(images), num_positions, dtype=torch.long)
    runs = []
    for row, (image, text) in enumerate(zip(images, texts)):
        order[row, : len(image)] = image
        order[row, num_image_places : num_image_places + len(text)] = text
        places[row, image] = torch.arange(len(image))
        places[row, text] = torch.arange(len(text)) + num_image_places
        # How many of the image keys each text token may see; a run ends where that number changes.
        num_keys, lengths = torch.searchsorted(image, text).unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        runs.append(list(zip((ends - lengths).tolist(), ends.tolist(), num_keys.tolist())))
    device = mm_token_type_ids.device
    has_padding = not bool(is_kept.all())
    return MMCAPlan(
        order.to(device), places.to(device), num_image_places, runs, is_kept.to(device) if has_padding else None
    )


def planned_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: MMCAPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    MMCA on sorted tokens, no masked-out block touched and no image query computed.

    Args:
        query (`torch.Tensor` of shape `(B, H, L, D)`): Queries, sorted and rotated.
        key (`torch.Tensor` of shape `(B, K, L, D)`): Keys, sorted and rotated.
        value (`torch.Tensor` of shape `(B, K, L, D)`): Values, sorted.
        plan (`MMCAPlan`): The plan of the batch.

    Returns:
        `torch.Tensor` of shape `(B, L, H, D)`, sorted.
    """
    cut, groups = plan.num_image_places, query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": groups > 1}
    attend = nn.functional.scaled_dot_product_attention
    text_query, image_key, image_value = query[:, :, cut:], key[:, :, :cut], value[:, :, :cut]
    text_output = attend(text_query, key[:, :, cut:], value[:, :, cut:], is_causal=True, **options)
    own_value = image_value if groups == 1 else image_value.repeat_interleave(groups, dim=1)

    def assemble(rows: slice, runs: list[tuple[int, int, int]]) -> torch.Tensor:
        pieces, done = [own_value[rows]], 0
        for start, end, num_keys in runs:
            piece = text_output[rows, :, start:end]
            if num_keys > 0:
                keys, values = image_key[rows, :, :num_keys], image_value[rows, :, :num_keys]
                piece = piece + attend(text_query[rows, :, start:end], keys, values, **options)
            pieces.append(piece)
            done = end
        pieces.append(text_output[rows, :, done:])
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1)

    if all(runs == plan.runs[0] for runs in plan.runs):
        return assemble(slice(None), plan.runs[0])
    return torch.cat([assemble(slice(row, row + 1), runs) for row, runs in enumerate(plan.runs)])


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(index.shape[0], device=states.device)[:, None], index.to(states.device)]
