"""
The plan of one forward pass in two streams: where the text tokens are, and which image keys they read.

An image token reads only its own image, so images go through the decoder first, each on its own
(`image_states_visualchat.py`), and leave their keys and values at every layer. The text follows and reads those, and
image queries cost nothing. Drawn for `I I T T I T` and `image_scope="all"`, with the image keys in front (rows are the
queries computed, t = text on text, i = text on image):

    T | i i .  t . .
    T | i i .  t t .
    T | i i i  t t t

Text on text is plain causal attention; each run of text between two images reads a slice of the image keys of its
conversation, all up to it or only the last image, so with a sum nothing is masked. A joint merge takes the runs of
several images together, by one masked call a block ([`JointBlock`]). Text and images of a row fill the slots of two
blocks from the left; unequal rows are padded on the right of each block, where neither causality nor a prefix reaches.
Only text that continues after such padding, on a kept cache, needs a mask.

Dimensions: B rows, Q current positions, T text slots and I image slots (the largest number of a row), H query heads, K
key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import find_packed_sequence_indices

from .kernels_visualchat import HALVES, join_heads, sdpa_kernel, split_heads


PADDING, TEXT, IMAGE = 0, 1, 2


class Run(NamedTuple):
    """Text slots `[start, end)` that read the image slots `[first_key, end_key)`."""

    start: int
    end: int
    first_key: int
    end_key: int


class JointBlock(NamedTuple):
    """Consecutive text slots of a row that attend to images and to text in one call, and the slots that they read."""

    text: slice
    image_keys: slice
    text_keys: slice
    mask: torch.Tensor  # (1, 1, T, I + T'): what each reads of these, images first


@dataclass(frozen=True, eq=False)
class TwoStreamPlan:
    """Where the text of a batch is, and what it reads."""

    token_types: torch.Tensor  # (B, Q): `PADDING`, `TEXT` or `IMAGE`, for each position; on the CPU
    slots: torch.Tensor  # (B, Q): the slot of each position in the block of its type, after those of the cache; CPU
    order: torch.Tensor  # (B, T): the position of each slot of the current text
    runs: list[list[Run]]  # of each row the runs of current text that read the same image keys
    text_lengths: list[list[int]] | None = None  # of packed rows, the number of text tokens of each sequence
    num_past: int = 0  # text slots of the cache
    text_mask: torch.Tensor | None = None  # (B, 1, T, past + T), `True` where text reads text; else causal
    image_mask: torch.Tensor | None = None  # (B, 1, 1, I), for single text tokens that read unlike numbers of images
    images: Any = field(default=None, repr=False)  # `PlacedImages`, what the text reads of images
    # How text reads text and images, of the attention type.
    text_attention: Callable[..., torch.Tensor] = field(default_factory=lambda: mmca_text_attention, repr=False)
    limited: "TwoStreamPlan | None" = field(default=None, repr=False)  # that of every second head, if it is another
    reads_last_image: bool = False  # only

    def gather_text(self, states: torch.Tensor) -> torch.Tensor:
        """(B, Q, …) of all positions to (B, T, …) of the text slots."""
        return take(states, self.order)

    def scatter(self, text: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, …) of text slots, and of image positions row by row, to (B, Q, …) of all, zero at padding."""
        is_text = (self.token_types == TEXT).to(text.device)
        slots = (self.slots - self.num_past).to(text.device).masked_fill(~is_text, 0)
        states = take(text, slots) * is_text.view(*is_text.shape, *[1] * (text.ndim - 2))
        if image is None:
            return states
        is_image = (self.token_types == IMAGE).to(text.device)
        return states.masked_scatter(is_image.view(*is_image.shape, *[1] * (text.ndim - 2)), image.to(states.dtype))

    def limit_to_last_image(self, image_seq_length: int) -> "TwoStreamPlan":
        """The plan in which text reads only the last image before it, as far as the cache holds it."""
        runs = []
        for row in self.runs:
            whole = [max(0, run.end_key - run.first_key - 1) // image_seq_length for run in row]  # images before it
            runs.append([run._replace(first_key=run.first_key + n * image_seq_length) for run, n in zip(row, whole)])
        mask = self.image_mask
        mask = None if mask is None else single_token_mask(runs, mask.shape[-1]).to(mask.device)
        return replace(self, runs=runs, image_mask=mask, reads_last_image=True)

    @cached_property
    def joint_blocks(self) -> list[list[JointBlock]]:
        """
        The blocks of each row: a sequence, in which what is masked out is computed too, or, if text reads one image
        only, each run of text, in which next to nothing is.
        """
        rows = []
        for row, runs in enumerate(self.runs):
            lengths = [run.end for run in runs[-1:]] if self.text_lengths is None else self.text_lengths[row]
            blocks, first = [], 0
            for length in lengths:
                sequence = [run for run in runs if first <= run.start < first + length]
                groups = [[run] for run in sequence] if self.reads_last_image else [sequence]
                blocks += [self._joint_block(group, first) for group in groups]
                first += length
            rows.append(blocks)
        return rows

    def _joint_block(self, runs: list[Run], first: int) -> JointBlock:
        """That of consecutive runs of a sequence whose text begins at a slot."""
        start, end = runs[0].start, runs[-1].end
        first_key, end_key = min(run.first_key for run in runs), max(run.end_key for run in runs)
        images = torch.zeros(end - start, end_key - first_key, dtype=torch.bool)
        for run in runs:
            images[run.start - start : run.end - start, run.first_key - first_key : run.end_key - first_key] = True
        text = torch.ones(end - start, end - first, dtype=torch.bool).tril(start - first)
        mask = torch.cat([images, text], dim=-1)[None, None].to(self.order.device)
        return JointBlock(slice(start, end), slice(first_key, end_key), slice(first, end), mask)

    @cached_property
    def joint_mask(self) -> torch.Tensor:
        """What the text of a continued conversation reads, (B, 1, T, I + past + T), images first."""
        num_rows, num_text = self.order.shape
        images = torch.zeros(num_rows, num_text, max(self.images.lengths), dtype=torch.bool)
        for row, runs in enumerate(self.runs):
            for run in runs:
                images[row, run.start : run.end, run.first_key : run.end_key] = True
        if self.text_mask is None:
            text = torch.ones(num_text, self.num_past + num_text, dtype=torch.bool).tril(self.num_past)[None]
        else:
            text = self.text_mask[:, 0].cpu()
        return torch.cat([images, text.expand(num_rows, -1, -1)], dim=-1)[:, None].to(self.order.device)

    def attend(self, module: nn.Module, query, key, value, scaling: float | None, dropout: float) -> torch.Tensor:
        """The attention of the text in one decoder layer: (B, H, T, D) to (B, T, H, D)."""
        layer: Any = module.layer_idx
        images = None if self.images is None else self.images.of_layer(layer, query)
        if self.limited is None:
            return self.text_attention(query, key, value, images, self, scaling, dropout)
        parts = []
        for plan, half, heads in zip((self.limited, self), HALVES, split_heads(query, key, value, module)):
            of_half = images
            if images is not None and heads[1].shape != key.shape:
                of_half = replace(images, heads=half)
            parts.append(self.text_attention(*heads, of_half, plan, scaling, dropout))
        return join_heads(parts, key.shape[1], dim=2)


def make_plan(
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_slots: torch.Tensor | None = None,
    past_token_types: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
) -> TwoStreamPlan:
    """
    The plan for current positions (B, Q), given the slots and token types (B, past) of cached ones, or the sequence of
    each position of packed rows, which have neither padding nor a cache.
    """
    is_image = mm_token_type_ids.cpu().bool()
    is_kept = torch.ones_like(is_image) if attention_mask is None else attention_mask.cpu().bool()
    token_types = is_kept * (1 + is_image.long())
    if past_slots is None or past_token_types is None:
        past_slots = past_token_types = token_types[:, :0]
    sequences = torch.zeros_like(token_types) if sequence_ids is None else sequence_ids.cpu()
    num_past = count_slots(past_slots, past_token_types, TEXT)
    num_past_images = (past_token_types == IMAGE).sum(dim=1).tolist()
    texts = [row.nonzero()[:, 0] for row in token_types == TEXT]
    num_text = max(1, *map(len, texts))

    order = torch.zeros(len(texts), num_text, dtype=torch.long)
    slots = torch.zeros_like(token_types)
    runs, text_lengths = [], []
    for row, (text, past_images) in enumerate(zip(texts, num_past_images)):
        image = (token_types[row] == IMAGE).nonzero()[:, 0]
        order[row, : len(text)] = text
        slots[row, text] = torch.arange(len(text)) + num_past
        slots[row, image] = torch.arange(len(image)) + past_images
        # The image keys that each text token reads: those before it, of its own sequence.
        starts = torch.searchsorted(sequences[row].contiguous(), sequences[row, text])
        first_keys = torch.searchsorted(image, starts) if sequence_ids is not None else torch.zeros_like(text)
        keys = torch.stack([starts, first_keys, torch.searchsorted(image, text) + past_images])
        (_, firsts, ends_of_keys), lengths = keys.unique_consecutive(dim=1, return_counts=True)
        ends = lengths.cumsum(0)
        bounds = (ends - lengths, ends, firsts, ends_of_keys)
        runs.append([Run(*run) for run in zip(*(bound.tolist() for bound in bounds))])
        text_lengths.append(sequences[row, text].unique_consecutive(return_counts=True)[1].tolist())

    device = mm_token_type_ids.device
    text_mask = _text_mask(past_slots, past_token_types, num_past, num_text)
    image_mask = None
    if num_text == 1 and sequence_ids is None and any(row != runs[0] for row in runs):
        num_images = int((torch.tensor(num_past_images) + (token_types == IMAGE).sum(dim=1)).max())
        image_mask = single_token_mask(runs, num_images).to(device)
    return TwoStreamPlan(
        token_types=token_types,
        slots=slots,
        order=order.to(device),
        runs=runs,
        text_lengths=None if sequence_ids is None else text_lengths,
        num_past=num_past,
        text_mask=None if text_mask is None else text_mask.to(device),
        image_mask=image_mask,
    )


def single_token_mask(runs: list[list[Run]], num_images: int) -> torch.Tensor:
    """(B, 1, 1, I): the image slots that the one text token of each row reads."""
    bounds = torch.tensor([row[0][2:] if row else (0, 0) for row in runs])
    slots = torch.arange(num_images)
    return ((slots >= bounds[:, :1]) & (slots < bounds[:, 1:]))[:, None, None]


def _text_mask(past_slots, past_token_types, num_past: int, num_text: int) -> torch.Tensor | None:
    """(B, 1, T, past + T) for text that continues after padding; `None` where plain causality is enough."""
    if num_past == 0:
        return None
    is_past_text = torch.zeros(len(past_slots), num_past, dtype=torch.bool)
    rows, positions = (past_token_types == TEXT).nonzero(as_tuple=True)
    is_past_text[rows, past_slots[rows, positions]] = True
    if num_text == 1 and bool(is_past_text.all()):
        return None
    # A slot beyond a row's text reads itself: its output is unused, but a softmax needs a key.
    causal = torch.ones(num_text, num_text, dtype=torch.bool).tril().expand(len(past_slots), -1, -1)
    return torch.cat([is_past_text[:, None].expand(-1, num_text, -1), causal], dim=-1)[:, None]


def find_packed(embeds, attention_mask, position_ids) -> torch.Tensor | None:
    """Of packed rows, the sequence of each position (B, Q), detected from resets in `position_ids`."""
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return None
    return find_packed_sequence_indices(position_ids.expand(embeds.shape[:2]))


def count_slots(slots: torch.Tensor, token_types: torch.Tensor, token_type: int) -> int:
    """Number of slots in the block of a token type."""
    is_type = token_types == token_type
    return int(slots[is_type].max()) + 1 if bool(is_type.any()) else 0


def mmca_text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    images: Any,
    plan: TwoStreamPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    The text rows of MMCA: causal attention to the text plus prefix cross-attention to the images.

    Queries of the current text (B, H, T, D), keys and values of the text (B, K, past + T, D) and, if there are any,
    the images of the layer, [`LayerImages`], to (B, T, H, D).
    """
    text = _causal_text_attention(query, key, value, plan, scaling, dropout).transpose(1, 2)
    if images is None:
        return text.contiguous()
    return attend_to_images(query, images, plan, scaling, dropout).add_(text)


def attend_to_images(
    query: torch.Tensor, images: Any, plan: TwoStreamPlan, scaling: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """
    What the text of a plan (B, H, T, D) reads of the images before it, [`LayerImages`]: (B, T, H, D). Few tokens read
    images by reference, others in a copy: of a row at a time, where rows differ and no gradient is needed.
    """
    if (reads := images.reads(plan.runs, query.shape[2])) is not None:
        return reads.attend(query, images, scaling, dropout)
    if plan.image_mask is None and not torch.is_grad_enabled() and any(row != plan.runs[0] for row in plan.runs):
        rows = []
        for row, runs in enumerate(plan.runs):
            image_key, image_value = images.row(row).keys_values()
            rows.append(prefix_cross_attention(query[row : row + 1], image_key, image_value, [runs], scaling))
        return torch.cat(rows)
    image_key, image_value = images.keys_values()
    if plan.image_mask is not None:
        output = sdpa_kernel(query, image_key, image_value, plan.image_mask, scaling, dropout)[0]
        return output.transpose(1, 2).contiguous()
    return prefix_cross_attention(query, image_key, image_value, plan.runs, scaling, dropout)


def joint_text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    images: Any,
    plan: TwoStreamPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    One softmax over images and text, for `merge="joint"`; takes and returns what [`mmca_text_attention`] does.

    It takes a call for each block of text ([`TwoStreamPlan.joint_blocks`]), with a mask over its image keys, followed
    by those of the text; rows that are alike share it. Few tokens, as in decoding, read the images by reference, and
    only their scores are joined.
    """
    if images is None:
        return _causal_text_attention(query, key, value, plan, scaling, dropout).transpose(1, 2).contiguous()
    if plan.text_lengths is None and (reads := images.reads(plan.runs, query.shape[2])) is not None:
        num_rows, num_text = query.shape[0], query.shape[2]
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, K, G, T, D)
        of_text = grouped @ key[:, :, None].mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        mask = plan.text_mask
        if mask is None:
            mask = torch.ones(num_text, key.shape[2], dtype=torch.bool, device=key.device).tril(plan.num_past)
        of_text = of_text.masked_fill(~mask if mask.ndim == 2 else ~mask[:, :, None], float("-inf"))
        of_text = of_text.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (K, G, B x T, past + T)
        scores = torch.cat([reads.scores(query, images, scaling), of_text], dim=-1)
        weights = nn.functional.dropout(scores.softmax(dim=-1, dtype=torch.float32), dropout, dropout > 0.0)
        weights = weights.to(query.dtype)
        of_images, of_text = weights.split([weights.shape[-1] - key.shape[2], key.shape[2]], dim=-1)
        of_text = of_text.unflatten(2, (num_rows, num_text)).permute(2, 0, 1, 3, 4)
        text = (of_text @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
        return reads.weigh(of_images, images).add_(text)
    image_key, image_value = images.keys_values()
    if plan.num_past > 0 or plan.text_mask is not None:
        keys, values = torch.cat([image_key, key], dim=2), torch.cat([image_value, value], dim=2)
        return sdpa_kernel(query, keys, values, plan.joint_mask, scaling, dropout)[0].transpose(1, 2).contiguous()
    are_alike = plan.text_lengths is None and all(runs == plan.runs[0] for runs in plan.runs)
    outputs = []
    for row, blocks in enumerate(plan.joint_blocks[: 1 if are_alike else None]):
        rows = slice(None) if are_alike else slice(row, row + 1)
        of_row = [
            sdpa_kernel(
                query[rows, :, block.text],
                torch.cat([image_key[rows, :, block.image_keys], key[rows, :, block.text_keys]], dim=2),
                torch.cat([image_value[rows, :, block.image_keys], value[rows, :, block.text_keys]], dim=2),
                block.mask,
                scaling,
                dropout,
            )[0]
            for block in blocks
        ]
        num_text = sum(output.shape[2] for output in of_row)
        outputs.append(torch.cat([*of_row, torch.zeros_like(query[rows, :, num_text:])], dim=2))
    return torch.cat(outputs).transpose(1, 2).contiguous()


def _causal_text_attention(query, key, value, plan: TwoStreamPlan, scaling, dropout) -> torch.Tensor:
    """(B, H, T, D): one causal call for the batch, or one for each sequence of packed rows."""
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    attend = nn.functional.scaled_dot_product_attention
    if plan.text_lengths is None:
        is_causal = plan.text_mask is None and plan.num_past == 0
        return attend(query, key, value, attn_mask=plan.text_mask, is_causal=is_causal, **options)
    rows = []
    for row, lengths in enumerate(plan.text_lengths):
        sizes = [*lengths, query.shape[2] - sum(lengths)]
        parts = zip(*(states[row : row + 1].split(sizes, dim=2) for states in (query, key, value)))
        rows.append(torch.cat([attend(q, k, v, is_causal=True, **options) for q, k, v in parts], dim=2))
    return torch.cat(rows)


def prefix_cross_attention_reference(
    query: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    runs: list[list[Run]],
    scaling: float | None = None,
) -> torch.Tensor:
    """[`prefix_cross_attention`] written out row by row, in at least float32."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // image_key.shape[1]
    output = torch.zeros(*query.shape[:3], image_value.shape[3], dtype=dtype, device=query.device)
    for row, row_runs in enumerate(runs):
        for head in range(query.shape[1]):
            keys, values = (states[row, head // groups].to(dtype) for states in (image_key, image_value))
            for run in row_runs:
                for slot in range(run.start, run.end):
                    if run.end_key > run.first_key:
                        read = slice(run.first_key, run.end_key)
                        scores = keys[read] @ query[row, head, slot].to(dtype) * scaling
                        output[row, head, slot] = scores.softmax(dim=0) @ values[read]
    return output.transpose(1, 2).to(query.dtype)


def prefix_cross_attention(
    query: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    runs: list[list[Run]],
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Cross-attention of text to images in which each run of text reads the images shown before it, without a mask.

    It takes one attention call for each run that reads an image, for all rows together if they have the same runs:
    at most one call for each image and layer, and no work on masked-out blocks. On a GPU, many short runs would be
    bound by kernel launches; there, one variable-length kernel over all runs (`cu_seqlens` of queries and keys), or
    FlexAttention with a block mask made of the runs, would compute the same in one call.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`): Queries of the text, rotated.
        image_key (`torch.Tensor` of shape `(B, K, I, D)`): Keys of the images, rotated.
        image_value (`torch.Tensor` of shape `(B, K, I, D)`): Values of the images.
        runs (`list` of B lists of [`Run`]): The image slots that each run of text slots reads; a text slot in no run,
            or in a run without keys, gets zero.
        scaling (`float`, *optional*, defaults to `D ** -0.5`): Factor on the scores.
        dropout (`float`, *optional*, defaults to 0.0): Probability to drop an attention weight.

    Returns:
        `torch.Tensor` of shape `(B, T, H, D)`.
    """
    if any(row != runs[0] for row in runs):
        rows = zip(query.split(1), image_key.split(1), image_value.split(1), runs)
        return torch.cat([prefix_cross_attention(*row[:3], [row[3]], scaling, dropout) for row in rows])
    bounds = [(run.first_key, run.end_key) for run in runs[0] if run.end_key > run.first_key]
    if not bounds:
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], image_value.shape[3])
    parts = iter(zip(_Slices.apply(image_key, bounds), _Slices.apply(image_value, bounds)))
    sizes = [run.end - run.start for run in runs[0]]
    queries = query.split([*sizes, query.shape[2] - sum(sizes)], dim=2)
    pieces = []
    for run, piece in zip([*runs[0], Run(0, 0, 0, 0)], queries):
        if run.end_key > run.first_key:
            enable_gqa = query.shape[1] != image_key.shape[1]
            piece = nn.functional.scaled_dot_product_attention(
                piece, *next(parts), dropout_p=dropout, scale=scaling, enable_gqa=enable_gqa
            )
        else:
            piece = piece.new_zeros(*piece.shape[:3], image_value.shape[3])
        pieces.append(piece.transpose(1, 2))
    return torch.cat(pieces, dim=1)


class _Slices(torch.autograd.Function):
    """Several slices of the keys; their gradients are summed in one buffer instead of in one for each slice."""

    @staticmethod
    def forward(states: torch.Tensor, bounds: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        return tuple(states[:, :, first:end] for first, end in bounds)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.shape, ctx.bounds = inputs[0].shape, inputs[1]

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if torch.is_grad_enabled():  # for a gradient of the gradient
            paddings = ((0, 0, first, ctx.shape[2] - end) for first, end in ctx.bounds)
            padded = [nn.functional.pad(part, padding) for part, padding in zip(gradients, paddings)]
            return torch.stack(padded).sum(dim=0), None
        total = gradients[0].new_zeros(ctx.shape)
        for (first, end), gradient in zip(ctx.bounds, gradients):
            total[:, :, first:end] += gradient
        return total, None


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, S, …) at the slots (B, L) of each row: (B, L, …)."""
    return states[torch.arange(index.shape[0], device=states.device)[:, None], index.to(states.device)]
