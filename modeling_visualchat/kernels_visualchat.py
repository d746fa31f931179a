"""
One masked softmax over keys, on the kernels that MMCA is available on.
Masks are boolean: `True` where a query attends.

Dimensions: B batch, S keys, Q queries, H query heads, K key/value heads (K divides H), D head size.
"""

import torch
from torch import nn


def sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """One masked softmax by PyTorch's fused kernel: (B, H, Q, D) and no weights. A row without a key is zero."""
    has_key = mask.any(dim=-1, keepdim=True)
    output = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask | ~has_key,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.masked_fill(~has_key, 0.0), None


def eager_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One masked softmax spelled out: (B, H, Q, D) and the weights (B, H, Q, S). A row without a key is zero."""
    queries_per_key = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(queries_per_key, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    has_key = mask.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(mask | ~has_key), float("-inf")).softmax(dim=-1, dtype=torch.float32)
    weights = weights.masked_fill(~has_key, 0.0).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0.0)
    return weights @ value, weights


KERNELS = {"sdpa": sdpa_kernel, "eager": eager_kernel}
