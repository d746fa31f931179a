"""
A sum of masked softmaxes over keys, on the kernels that MMCA is available on.

Masks are boolean, (B, C, Q, S) with one softmax a channel, or (B, C, H, Q, S) where the heads differ: `True` where a
query attends. A row without a key gives zero.

Dimensions: B batch, S keys, Q queries, H query heads, K key/value heads (K divides H), D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


HALVES = (slice(0, None, 2), slice(1, None, 2))  # of heads, where they read unlike images


def confine(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """
    Keys and values in which a position that is not finite is zero, and which queries attend to one (B, 1 or H, Q, 1),
    whose output is NaN: a weight of zero would carry it to all others, to another conversation of a packed row too.
    Not in a step of decoding, where a copy of the cache would cost as much as attention.
    """
    if mask.shape[-2] == 1:
        return key, value, None
    sums = key.sum(dim=(1, 3), dtype=torch.float32) + value.sum(dim=(1, 3), dtype=torch.float32)
    faulty = ~sums.isfinite()  # (B, S)
    if not torch.compiler.is_compiling() and faulty.device.type == "cpu" and not faulty.any():
        return key, value, None
    key, value = (states.masked_fill(faulty[:, None, :, None], 0.0) for states in (key, value))
    reads = [(channel & faulty[:, None, None]).any(dim=-1, keepdim=True) for channel in channels_of(mask)]
    return key, value, torch.stack(reads).any(dim=0)


def channels_of(mask: torch.Tensor) -> list[torch.Tensor]:
    """The channels of a mask, each (B, 1 or H, Q, S)."""
    return [channel if channel.ndim == 4 else channel[:, None] for channel in mask.unbind(1)]


def sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """By PyTorch's fused kernel, a call for each channel: (B, H, Q, D) and no weights."""
    key, value, is_faulty = confine(key, value, mask)
    output: Any = 0
    for channel in channels_of(mask):
        has_key = channel.any(dim=-1, keepdim=True)
        softmax = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=channel | ~has_key,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output = output + softmax.masked_fill(~has_key, 0.0)
    return output if is_faulty is None else output.masked_fill(is_faulty, float("nan")), None


def eager_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spelled out: (B, H, Q, D) and the summed weights (B, H, Q, S)."""
    key, value, is_faulty = confine(key, value, mask)
    queries_per_key = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(queries_per_key, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    total: Any = 0
    for channel in channels_of(mask):
        has_key = channel.any(dim=-1, keepdim=True)
        weights = scores.masked_fill(~(channel | ~has_key), float("-inf")).softmax(dim=-1, dtype=torch.float32)
        total = total + weights.masked_fill(~has_key, 0.0).to(query.dtype)
    total = nn.functional.dropout(total, p=dropout, training=dropout > 0.0)
    output = total @ value
    return output if is_faulty is None else output.masked_fill(is_faulty, float("nan")), total


def split_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, module: Any = None
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    The heads in two halves, each with its keys and values: every second query head of those that share a key head, or
    where none do, every second head.

    Raises:
        `ValueError`: heads of a decoder layer, if it is given, that tensor parallelism has divided unevenly.
    """
    num_key_heads = key.shape[1]
    queries_per_key = query.shape[1] // num_key_heads
    if queries_per_key > 1:
        grouped = query.unflatten(1, (num_key_heads, queries_per_key))
        return [(grouped[:, :, half].flatten(1, 2), key, value) for half in HALVES]
    num_heads = getattr(getattr(module, "config", None), "num_attention_heads", num_key_heads)
    if num_heads != num_key_heads and num_key_heads % 2:
        raise ValueError(
            f'image_scope="half" cannot divide the {num_heads} heads of {type(module).__name__} among processes that '
            f"hold {num_key_heads} each: use half as many processes, so that each holds an even number."
        )
    return [(query[:, half], key[:, half], value[:, half]) for half in HALVES]


def join_heads(halves: Sequence[torch.Tensor], num_key_heads: int, dim: int = 1) -> torch.Tensor:
    """What [`split_heads`] has divided, with its heads along a dimension."""
    num_heads = sum(half.shape[dim] for half in halves)
    num_groups = num_key_heads if num_heads > num_key_heads else 1
    first, second = (half.unflatten(dim, (num_groups, -1)) for half in halves)
    joined = first.new_empty(*first.shape[: dim + 1], num_heads // num_groups, *first.shape[dim + 2 :])
    heads = [slice(None)] * (dim + 1)
    for half, states in zip(HALVES, (first, second)):
        joined[(*heads, half)] = states
    return joined.flatten(dim, dim + 1)


def mask_of_heads(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, module: Any = None) -> torch.Tensor:
    """The four channels (B, 4, Q, S) of two halves of the heads as two channels of each head, (B, 2, H, Q, S)."""
    halves = split_heads(query, key, key, module)
    spread = [
        channels[:, :, None].expand(-1, -1, queries.shape[1], -1, -1)
        for channels, (queries, *_) in zip(mask.split(2, dim=1), halves)
    ]
    return join_heads(spread, key.shape[1], dim=2)


KERNELS = {"sdpa": sdpa_kernel, "eager": eager_kernel}
