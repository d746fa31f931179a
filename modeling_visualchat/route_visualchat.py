"""
The route of a forward pass through the decoder: in two streams, or masked.

Both give the same result. Two streams do no work for image queries; the masked route is always possible. The first
condition of `ROUTE_CONDITIONS` that holds sends a call to the masked route, and is logged once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention_types_visualchat import get_attention_type, kernel_of
from .cache_visualchat import is_conversation_cache
from .image_states_visualchat import ImageStates
from .key_rotation_visualchat import rotary_limit


ROUTES = ("auto", "two_streams", "masked")


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """The inputs of the decoder in one forward pass."""

    embeds: torch.Tensor  # (B, Q, hidden); at image tokens only read without `image_states`
    input_ids: torch.Tensor | None = None  # (B, Q)
    is_image: Any = None  # (B, Q), of the current tokens
    mm_token_type_ids: torch.Tensor | None = None  # (B, past + Q): 0 for text, 1 for image
    image_states: ImageStates | None = None  # the images of these tokens
    blank_features: torch.Tensor | None = None  # (length, hidden), an image to compute and to ignore
    sequence_ids: torch.Tensor | None = None  # (B, Q), of packed rows the sequence of each position
    attention_mask: Any = None  # (B, past + Q): 1 to keep, 0 for padding; or a finished mask
    position_ids: torch.Tensor | None = None  # (B, Q)
    past_key_values: Cache | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # what the decoder gets besides


@dataclass(frozen=True)
class RouteCondition:
    """A condition under which a call takes the masked route."""

    condition: str  # in words, as in the README
    cost: str
    # From a `VisualChatModel` and the inputs, or `None` for a conversation of any length on a fresh cache, to whether
    # it holds, or to the reason in more detail.
    applies: Callable[[Any, DecoderInputs | None], bool | str | None]


def masked_route_reason(model: Any, inputs: DecoderInputs | None) -> str | None:
    """
    Why a call takes the masked route, or `None` if it goes in two streams.

    Args:
        model (`VisualChatModel`): The model.
        inputs ([`DecoderInputs`], *optional*): The call; `None` for a conversation of any length on a fresh cache.
    """
    for condition in ROUTE_CONDITIONS:
        if found := condition.applies(model, inputs):
            return found if isinstance(found, str) else condition.condition
    return None


def _has_other_kernel(model, inputs) -> bool:
    form: Any = get_attention_type(model.config).two_streams
    return kernel_of(model.config.text_config._attn_implementation) != form.kernel


def _is_finished_mask(model, inputs) -> bool:
    return inputs is not None and is_finished_mask(inputs.attention_mask)


def _records_outputs(model, inputs) -> bool:
    if inputs is None:
        return False
    names = ("output_attentions", "output_hidden_states")
    return any(inputs.kwargs.get(name, getattr(model.config.text_config, name, False)) for name in names)


def _is_window_in_reach(model, inputs) -> bool:
    window = getattr(model.config.text_config, "sliding_window", None)
    return window is not None and (inputs is None or _longest_sequence(inputs) >= window)


def _longest_sequence(inputs: DecoderInputs) -> int:
    if inputs.sequence_ids is None:
        return inputs.embeds.shape[1]
    return max(int(row.unique_consecutive(return_counts=True)[1].max()) for row in inputs.sequence_ids)


def _is_beyond_rotary_limit(model, inputs) -> bool:
    limit = rotary_limit(model.config.text_config)
    if limit is None or inputs is None:
        return False
    length = num_past(inputs.past_key_values) + inputs.embeds.shape[1]
    if inputs.position_ids is not None:
        length = int(inputs.position_ids.max()) + 1
    return length >= limit


def _continues_packed_rows(model, inputs) -> bool:
    return inputs is not None and inputs.sequence_ids is not None and inputs.past_key_values is not None


def _has_other_cache(model, inputs) -> bool:
    text_config = model.config.text_config
    cache = None if inputs is None else inputs.past_key_values
    if cache is None:
        uses_cache = inputs is None or inputs.kwargs.get("use_cache", text_config.use_cache)
        return bool(uses_cache) and not _is_fresh_and_plain(DynamicCache(config=text_config))
    if is_conversation_cache(cache):
        return cache.is_interleaved or masked_route_reason(model, None) is not None
    return not _is_fresh_and_plain(cache)


def _is_fresh_and_plain(cache: Cache) -> bool:
    """Whether a cache is empty and keeps everything, in the order given."""
    is_plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return is_plain and cache.get_seq_length() == 0


def _checkpoints_reentrantly(model, inputs) -> bool:
    """Reentrant checkpoints carry gradients through positional arguments only."""
    if not model.training:
        return False
    functions = (getattr(part, "_gradient_checkpointing_func", None) for part in model.language_model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def is_finished_mask(attention_mask: Any) -> bool:
    """Whether this is a finished mask, as generation makes it for a cache of fixed size; a `ValueError` if unknown."""
    if attention_mask is None or isinstance(attention_mask, dict):
        return attention_mask is not None
    if attention_mask.ndim == 2:
        return False
    if attention_mask.ndim == 4 and attention_mask.shape[1] in (2, 4) and attention_mask.dtype == torch.bool:
        return True
    raise ValueError(
        "attention_mask must have shape (batch, tokens) with 1 to keep and 0 for padding, or be boolean of shape "
        f"(batch, 2, queries, keys); got {tuple(attention_mask.shape)} of {attention_mask.dtype}."
    )


def is_checkpointed(decoder: nn.Module, is_training: bool) -> bool:
    """Whether layers are recomputed in the backward pass, by transformers or by a checkpoint wrapper of torch."""
    if not is_training:
        return False
    is_wrapped = any(hasattr(part, "_checkpoint_wrapped_module") for part in decoder.modules())
    return is_wrapped or bool(getattr(decoder, "is_activation_checkpointing", False))


def num_past(past_key_values: Cache | None) -> int:
    """Positions in a cache."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


MASKS = "attention over all tokens"
NO_MEMORY = f"{MASKS}; an image memory is refused"

# In order; the last one is found by trying a small replica of the decoder.
ROUTE_CONDITIONS = (
    RouteCondition(
        'an attention type without a two-stream form (`"causal"`, or `image_attention="self_and_text"`)',
        NO_MEMORY,
        lambda model, inputs: get_attention_type(model.config).two_streams is None,
    ),
    RouteCondition(
        "a kernel other than `sdpa`",
        NO_MEMORY,
        _has_other_kernel,
    ),
    RouteCondition("a static cache in `generate`, which passes finished masks", MASKS, _is_finished_mask),
    RouteCondition("`torch.compile`", MASKS, lambda model, inputs: torch.compiler.is_compiling()),
    RouteCondition("a sequence as long as the sliding window, or generation with one", MASKS, _is_window_in_reach),
    RouteCondition("recorded attentions or hidden states", MASKS, _records_outputs),
    RouteCondition("packed rows with a cache", MASKS, _continues_packed_rows),
    RouteCondition(
        "a text beyond the original length of a `dynamic` or `longrope` rotary embedding",
        MASKS,
        _is_beyond_rotary_limit,
    ),
    RouteCondition("a cache that is neither fresh nor a `ConversationCache`", MASKS, _has_other_cache),
    RouteCondition("reentrant gradient checkpointing", MASKS, _checkpoints_reentrantly),
    RouteCondition(
        "a decoder that passes no keyword arguments on, or attends more than once in a layer",
        NO_MEMORY,
        lambda model, inputs: model.probe.no_two_streams,
    ),
)
