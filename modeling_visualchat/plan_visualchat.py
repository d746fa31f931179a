"""
MMCA without masks: text and images in two streams, planned once a forward pass.

An image token reads only itself, so images need no place in the conversation while the decoder runs: they go through
it first, each on its own (`image_states_visualchat.py`), and leave their keys and values at every layer. Then the text
goes through, and reads those. Image queries cost nothing. Drawn for `I I T T I T`, the images in front (rows are the
queries that are computed, t = text on text, i = text on image):

    T | i i .  t . .
    T | i i .  t t .
    T | i i i  t t t

Text on text is plain causal attention, and each run of text between two images reads a prefix of the image keys, so
nothing is masked. Rows of a batch are padded at the ends of the two blocks, where neither causality nor a prefix
reaches; only text that goes on after such padding, on a kept cache, needs a mask. Of a row that packs several
conversations each has a plan of its own, over its part of the two blocks.

Dimensions: B rows, Q current positions, T text places and I image places (the most that a row has), H query heads, K
key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .kernels_visualchat import sdpa_kernel


PADDING, TEXT, IMAGE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class MMCAPlan:
    """
    Where the text of a batch is, and what it reads.

    Args:
        kinds (`torch.Tensor` of shape `(B, Q)`): `PADDING`, `TEXT` or `IMAGE`, for each position; on the CPU.
        places (`torch.Tensor` of shape `(B, Q)`): For each position its place in the block of its kind, those of the
            cache counted; on the CPU.
        order (`torch.Tensor` of shape `(B, T)`): For each place of the current text the position it is taken from.
        runs (`list` of B lists of `(start, end, num_keys)`): The runs of current text between images, and how many
            image keys stand before them.
        num_past (`int`): Text places of the cache.
        text_mask (`torch.Tensor` of shape `(B, 1, T, past + T)`, *optional*): `True` where text reads text; without
            one it reads all text before it.
        image_mask (`torch.Tensor` of shape `(B, 1, 1, I)`, *optional*): `True` where a row's single text token reads
            images, if rows differ in that.
        images (`Callable`, *optional*): From the index of a layer to the image keys and values, each (B, K, I, D).
        packed (`list` of B lists of [`MMCAPlan`], *optional*): Of rows that pack several sequences, the plan of each
            sequence, in place of `runs`.
    """

    kinds: torch.Tensor
    places: torch.Tensor
    order: torch.Tensor
    runs: list[list[tuple[int, int, int]]]
    num_past: int = 0
    text_mask: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None
    images: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)
    packed: "list[list[MMCAPlan]] | None" = field(default=None, repr=False)

    def take_text(self, states: torch.Tensor) -> torch.Tensor:
        """(B, Q, …) of all positions to (B, T, …) of the text."""
        return take(states, self.order)

    def put_back(self, text: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """
        (B, T, …) of the text to (B, Q, …) of all positions, zero at padding and, unless they are given, at images.

        Args:
            text (`torch.Tensor` of shape `(B, T, …)`): Of the text places.
            image (`torch.Tensor` of shape `(image positions, …)`, *optional*): Row by row, in order.
        """
        is_text = (self.kinds == TEXT).to(text.device)
        places = (self.places - self.num_past).to(text.device).masked_fill(~is_text, 0)
        states = take(text, places) * is_text.view(*is_text.shape, *[1] * (text.ndim - 2))
        if image is None:
            return states
        is_image = (self.kinds == IMAGE).to(text.device)
        return states.masked_scatter(is_image.view(*is_image.shape, *[1] * (text.ndim - 2)), image.to(states.dtype))

    def attend(self, module: nn.Module, query, key, value, scaling: float | None, dropout: float) -> torch.Tensor:
        """What a layer of the decoder computes of the text: (B, H, T, D) to (B, T, H, D)."""
        image_key, image_value = None, None
        if self.images is not None:
            layer: Any = module.layer_idx
            image_key, image_value = (states.to(query.device) for states in self.images(layer))
        return planned_attention(query, key, value, image_key, image_value, self, scaling, dropout)


def plan_mmca(
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_places: torch.Tensor | None = None,
    past_kinds: torch.Tensor | None = None,
    images: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> MMCAPlan:
    """
    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, Q)`): 0 for text, 1 for image, of the current positions.
        attention_mask (`torch.Tensor` of shape `(B, Q)`, *optional*): 1 to keep, 0 for padding.
        past_places (`torch.Tensor` of shape `(B, past)`, *optional*): Places of the cached positions.
        past_kinds (`torch.Tensor` of shape `(B, past)`, *optional*): Kinds of the cached positions.
        images (`Callable`, *optional*): See [`MMCAPlan`].
        sequence_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Of packed rows, which sequence a position is in;
            without padding and without a cache.
    """
    is_image = mm_token_type_ids.cpu().bool()
    is_kept = torch.ones_like(is_image) if attention_mask is None else attention_mask.cpu().bool()
    kinds = is_kept * (1 + is_image.long())
    if past_places is None or past_kinds is None:
        past_places = past_kinds = kinds[:, :0]
    num_past = count_places(past_places, past_kinds, TEXT)
    num_past_images = (past_kinds == IMAGE).sum(dim=1).tolist()
    texts = [row.nonzero()[:, 0] for row in kinds == TEXT]
    num_text = max(1, *map(len, texts))

    order = torch.zeros(len(texts), num_text, dtype=torch.long)
    places = torch.zeros_like(kinds)
    runs = []
    for index, (text, past_images) in enumerate(zip(texts, num_past_images)):
        image = (kinds[index] == IMAGE).nonzero()[:, 0]
        order[index, : len(text)] = text
        places[index, text] = torch.arange(len(text)) + num_past
        places[index, image] = torch.arange(len(image)) + past_images
        # How many of the image keys each text token may see; a run ends where that number changes.
        num_keys, lengths = torch.searchsorted(image, text).add(past_images).unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        runs.append(list(zip((ends - lengths).tolist(), ends.tolist(), num_keys.tolist())))

    device = mm_token_type_ids.device
    text_mask = None
    if num_past > 0:
        is_past_text = torch.zeros(len(texts), num_past, dtype=torch.bool)
        row, position = (past_kinds == TEXT).nonzero(as_tuple=True)
        is_past_text[row, past_places[row, position]] = True
        if num_text > 1 or not bool(is_past_text.all()):
            # A place beyond a row's text reads itself too: nothing is made of it, but it must not be without a key.
            causal = torch.ones(num_text, num_text, dtype=torch.bool).tril().expand(len(texts), -1, -1)
            past = is_past_text[:, None].expand(-1, num_text, -1)
            text_mask = torch.cat([past, causal], dim=-1)[:, None].to(device)
    image_mask = None
    if num_text == 1 and any(row != runs[0] for row in runs):
        num_keys = torch.tensor([row[0][2] if row else 0 for row in runs])
        num_images = int((torch.tensor(num_past_images) + (kinds == IMAGE).sum(dim=1)).max())
        image_mask = (torch.arange(num_images) < num_keys[:, None])[:, None, None].to(device)
    packed = None if sequence_ids is None else [_plan_packed(*row) for row in zip(is_image, sequence_ids.cpu())]
    return MMCAPlan(kinds, places, order.to(device), runs, num_past, text_mask, image_mask, images, packed)


def _plan_packed(is_image: torch.Tensor, sequence_ids: torch.Tensor) -> list[MMCAPlan]:
    """The plans of the sequences of one row, each (Q,)."""
    lengths = sequence_ids.unique_consecutive(return_counts=True)[1].tolist()
    return [plan_mmca(sequence[None]) for sequence in is_image.split(lengths)]


def count_places(places: torch.Tensor, kinds: torch.Tensor, kind: int) -> int:
    """How many places the block of a kind has."""
    is_kind = kinds == kind
    return int(places[is_kind].max()) + 1 if bool(is_kind.any()) else 0


def planned_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor | None,
    image_value: torch.Tensor | None,
    plan: MMCAPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    The text part of MMCA, no masked-out block touched.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`): Queries of the current text, rotated.
        key (`torch.Tensor` of shape `(B, K, past + T, D)`): Keys of the text, rotated.
        value (`torch.Tensor` of shape `(B, K, past + T, D)`): Values of the text.
        image_key (`torch.Tensor` of shape `(B, K, I, D)`, *optional*): Keys of the images, rotated.
        image_value (`torch.Tensor` of shape `(B, K, I, D)`, *optional*): Values of the images.
        plan (`MMCAPlan`): The plan of the batch.

    Returns:
        `torch.Tensor` of shape `(B, T, H, D)`.
    """
    if plan.packed is not None:
        return _packed_attention(query, key, value, image_key, image_value, plan.packed, scaling, dropout)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    attend = nn.functional.scaled_dot_product_attention
    is_causal = plan.text_mask is None and plan.num_past == 0
    output = attend(query, key, value, attn_mask=plan.text_mask, is_causal=is_causal, **options)
    if image_key is None or image_value is None:
        return output.transpose(1, 2).contiguous()
    if plan.image_mask is not None:
        read = sdpa_kernel(query, image_key, image_value, plan.image_mask, scaling, dropout)[0]
        return (output + read).transpose(1, 2).contiguous()

    def read_images(query, image_key, image_value, runs) -> torch.Tensor:
        """(b, H, T, D) of rows that have the same runs, laid out as (b, T, H, D)."""
        lengths = [num_keys for _, _, num_keys in runs if num_keys > 0]
        if not lengths:
            return torch.zeros_like(query, dtype=output.dtype).transpose(1, 2)
        prefixes = iter(zip(_Prefixes.apply(image_key, *lengths), _Prefixes.apply(image_value, *lengths)))
        sizes = [end - start for start, end, _ in runs]
        rest = query.shape[2] - sum(sizes)
        pieces = []
        for (_, _, num_keys), piece in zip([*runs, (0, 0, 0)], query.split([*sizes, rest], dim=2)):
            read = attend(piece, *next(prefixes), **options) if num_keys > 0 else None
            pieces.append(torch.zeros_like(piece, dtype=output.dtype) if read is None else read)
        return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1)

    if all(runs == plan.runs[0] for runs in plan.runs):
        return read_images(query, image_key, image_value, plan.runs[0]).add_(output.transpose(1, 2))
    rows = zip(query.split(1), image_key.split(1), image_value.split(1), plan.runs)
    return torch.cat([read_images(*row) for row in rows]).add_(output.transpose(1, 2))


def _packed_attention(query, key, value, image_key, image_value, packed, scaling, dropout) -> torch.Tensor:
    """Row by row and sequence by sequence, each on its own part of the text and of the images."""
    rows = []
    for row, plans in enumerate(packed):
        num_texts = [int((plan.kinds == TEXT).sum()) for plan in plans]
        num_images = [int((plan.kinds == IMAGE).sum()) for plan in plans]
        texts = zip(*(_split(states[row : row + 1], num_texts) for states in (query, key, value)))
        images: Any = [(None, None)] * len(plans)
        if image_key is not None:
            images = zip(*(_split(states[row : row + 1], num_images) for states in (image_key, image_value)))
        parts = []
        for plan, (text_query, text_key, text_value), (part_key, part_value) in zip(plans, texts, images):
            if text_query.shape[2] == 0:
                continue
            if part_key is not None and part_key.shape[2] == 0:
                part_key = part_value = None
            part = (text_query, text_key, text_value, part_key, part_value)
            parts.append(planned_attention(*part, plan, scaling, dropout))
        padding = query.shape[2] - sum(num_texts)
        parts += [query.new_zeros(1, padding, query.shape[1], value.shape[3])] if padding else []
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def _split(states: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """(1, heads, L, D) in parts of these lengths; what is left over belongs to none."""
    return list(states.split([*lengths, states.shape[2] - sum(lengths)], dim=2))[: len(lengths)]


class _Prefixes(torch.autograd.Function):
    """The first n keys, for several n; their gradients are summed in one buffer instead of one for each n."""

    @staticmethod
    def forward(states: torch.Tensor, *lengths: int) -> tuple[torch.Tensor, ...]:
        return tuple(states[:, :, :length] for length in lengths)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.shape, ctx.lengths = inputs[0].shape, inputs[1:]

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        nothing = [None] * len(ctx.lengths)
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            padded = [nn.functional.pad(part, (0, 0, 0, ctx.shape[2] - part.shape[2])) for part in gradients]
            return torch.stack(padded).sum(dim=0), *nothing
        total = gradients[0].new_zeros(ctx.shape)
        for length, gradient in zip(ctx.lengths, gradients):
            total[:, :, :length] += gradient
        return total, *nothing


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, …) at the places (B, L) of each row: (B, L, …)."""
    return states[torch.arange(index.shape[0], device=states.device)[:, None], index.to(states.device)]
