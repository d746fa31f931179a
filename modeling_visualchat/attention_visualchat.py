r"""
Multi-modal causal attention (MMCA; section 4.1 of arXiv 2309.14327), exactly.

In the paper's form, a text token attends to every earlier token through two softmaxes over disjoint keys, one over the
text up to itself and one over the images before it, and the two results are summed; a set without a key contributes
exactly zero. An image token attends only to itself, so its output is its own value vector:

    out_i = softmax_{j<=i, text}(scaling * q_i k_j) V_text + softmax_{j<i, image}(scaling * q_i k_j) V_image   (text)
    out_i = v_i                                                                                               (image)

`attention_types_visualchat.py` draws the pattern, with all images for every head. Padding is never attended to, and
the output of a padding query is zero. Two departures from the original implementation, on purpose: text before the
first image gets nothing from images (there: a uniform softmax over past and future), and an image token does not
attend to earlier text (there: it does).

Three fields of [`VisualChatConfig`] vary the pattern. New models have `merge="joint"` and `image_scope="half"`, which
answered more questions about several images in `examples/study`; the paper's form is `"sum"` and `"all"`:

- `merge="joint"` weights the two softmaxes of a text token by their shares of the joint normaliser (D-Attn, arXiv
  2502.01906), which is one softmax over text and images: its mass is 1, that of the sum is 2.
- `image_attention="image"` lets an image token attend to all tokens of its own image (MIMIC, arXiv 2601.07812);
  `"self_and_text"`, for old checkpoints, to itself and, in a softmax of its own, to earlier text.
- `image_scope="last"` lets a text token read only the last image before it, as in Flamingo (arXiv 2204.14198, section
  3.1.3); `"half"` does so in every second head, and the others read all images ([`split_heads`]). For `I I T T I T`,
  rows are queries, 1 is a joint softmax and s the token itself:

          heads 1, 3, …     heads 2, 4, …
      I | s . . . . .       s . . . . .
      I | . s . . . .       . s . . . .
      T | . 1 1 . . .       1 1 1 . . .
      T | . 1 1 1 . .       1 1 1 1 . .
      I | . . . . s .       . . . . s .
      T | . . 1 1 1 1       1 1 1 1 1 1

[`MultiModalCausalAttention`] replaces the attention function of every layer of an unmodified decoder, on one of two
routes with the same result:

- Masked, always possible. The whole pattern is one boolean mask with two channels, (B, 2, Q, S), channel 0 for the
  text softmax and channel 1 for the image softmax. An image query has no key in channel 0 and itself in channel 1, and
  a softmax over one key is 1. A joint merge takes one softmax over both channels, and heads in two halves have four
  channels. transformers' own mask functions make the mask once a forward pass, so caches, padding and sliding windows
  are theirs.
- In two streams (`two_streams_visualchat.py`), wherever decoder and cache allow it: images go through the decoder
  first and text reads their keys and values. No work is done for image queries, and with a sum no masked-out block is
  touched; a joint merge masks within the blocks of text that read several images.

Dimensions: B batch, S keys (past and current), Q queries, H query heads, K key/value heads (K divides H), D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_masks_for_generate,
    find_packed_sequence_indices,
    or_masks,
    padding_mask_function,
    prepare_padding_mask,
)
from transformers.utils import torch_compilable_check

from .kernels_visualchat import channels_of, join_heads, mask_of_heads, sdpa_kernel, split_heads


def mmca_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    merge: str = "sum",
    image_attention: str = "self",
    image_scope: str = "all",
) -> torch.Tensor:
    """
    MMCA written out row by row from its definition, in at least float32. The measure of every faster form.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, D)`): Queries, the last Q of the S positions.
        key (`torch.Tensor` of shape `(B, K, S, D)`): Keys.
        value (`torch.Tensor` of shape `(B, K, S, D)`): Values.
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`): 0 for text, 1 for image.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for a token to keep, 0 for padding.
        scaling (`float`, *optional*, defaults to `D ** -0.5`): Factor on the scores.
        merge (`str`, *optional*, defaults to `"sum"`): How text and images add up, `"sum"` or `"joint"`.
        image_attention (`str`, *optional*, defaults to `"self"`): What an image token attends to: `"self"`, `"image"`
            or `"self_and_text"`. An image is a run of image tokens.
        image_scope (`str`, *optional*, defaults to `"all"`): The images that text reads: `"all"`, the `"last"` one, or
            in `"half"` of the heads the last one and in the others all.

    Returns:
        `torch.Tensor` of shape `(B, H, Q, D)` in the dtype of `query`.

    Raises:
        `ValueError`: shapes that do not fit together.
    """
    _check_shapes(query, key, value, mm_token_type_ids, attention_mask)
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries_per_key = num_heads // key.shape[1]
    image_ids = number_images(mm_token_type_ids)

    rows = []
    for b in range(batch_size):
        for h in range(num_heads):
            number = h % queries_per_key if queries_per_key > 1 else h  # among the heads that share a key, if some do
            reads_last = image_scope == "last" or (image_scope == "half" and number % 2 == 0)
            keys, values = key[b, h // queries_per_key].to(dtype), value[b, h // queries_per_key].to(dtype)
            for i in range(num_keys - num_queries, num_keys):
                kept = [j for j in range(num_keys) if attention_mask is None or attention_mask[b, j]]
                text = [j for j in kept if j <= i and not mm_token_type_ids[b, j]]
                image = [j for j in kept if j < i and mm_token_type_ids[b, j]]
                own_image = [j for j in kept if image_ids[b, j] == image_ids[b, i]]
                if image and reads_last:
                    image = [j for j in image if image_ids[b, j] == image_ids[b, image[-1]]]
                if i not in kept:
                    key_sets = []
                elif mm_token_type_ids[b, i]:
                    key_sets = {"self": [[i]], "image": [own_image], "self_and_text": [[i], text]}[image_attention]
                else:
                    key_sets = [text, image] if merge == "sum" else [text + image]
                row = torch.zeros(head_dim, dtype=dtype, device=query.device)
                for key_set in filter(None, key_sets):
                    scores = keys[key_set] @ query[b, h, i - (num_keys - num_queries)].to(dtype) * scaling
                    row = row + scores.softmax(dim=0) @ values[key_set]
                rows.append(row)
    return torch.stack(rows).view(query.shape).to(query.dtype)


def mmca_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    merge: str = "sum",
    image_attention: str = "self",
    image_scope: str = "all",
) -> torch.Tensor:
    """
    MMCA on PyTorch's scaled dot product attention. Takes, returns and raises what [`mmca_attention_reference`] does.
    """
    _check_shapes(query, key, value, mm_token_type_ids, attention_mask)
    if image_scope == "half":
        parts = [
            mmca_attention(*heads, mm_token_type_ids, attention_mask, scaling, merge, image_attention, scope)
            for heads, scope in zip(split_heads(query, key, value), ("last", "all"))
        ]
        return join_heads(parts, key.shape[1])
    num_queries, num_keys = query.shape[2], key.shape[2]
    kept = None if attention_mask is None else attention_mask.bool()
    pattern = mmca_mask_function(mm_token_type_ids, kept, None, image_attention, None, image_scope)
    reach = causal_mask_function
    if image_attention == "image":
        reach = or_masks(reach, own_image_function(number_images(mm_token_type_ids)))
    mask = mmca_mask(
        batch_size=query.shape[0],
        q_length=num_queries,
        kv_length=num_keys,
        q_offset=num_keys - num_queries,
        mask_function=and_masks(reach, pattern),
        attention_mask=kept,
        device=query.device,
    )
    return sdpa_kernel(query, key, value, mask if merge == "sum" else join_channels(mask), scaling)[0]


def join_channels(mask: torch.Tensor) -> torch.Tensor:
    """The keys (B, 2, …, Q, S) of two softmaxes as those of one, (B, 1, …, Q, S)."""
    return mask.any(dim=1, keepdim=True)


def number_images(mm_token_type_ids: torch.Tensor, image_seq_length: int | None = None) -> torch.Tensor:
    """For each token (B, S) the number of its image in its row, -1 for text; without a length, an image is a run."""
    is_image = mm_token_type_ids.bool()
    if image_seq_length is None:
        numbers = (is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]).cumsum(dim=1) - 1
    else:
        numbers = (is_image.cumsum(dim=1) - 1) // image_seq_length
    return numbers.masked_fill(~is_image, -1)


def own_image_function(image_ids: torch.Tensor) -> Callable:
    """A mask function of transformers: whether query and key belong to one image, by its number (B, T)."""
    last = image_ids.shape[1] - 1

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        query_id, key_id = image_ids[batch_idx, q_idx.clamp(max=last)], image_ids[batch_idx, kv_idx.clamp(max=last)]
        return (query_id == key_id) & (query_id >= 0) & (kv_idx <= last)

    return mask_function


def window_function(attention_mask: torch.Tensor, window: int) -> Callable:
    """
    A mask function of transformers: whether a key lies in a sliding window that counts the tokens of a row (B, T) and
    not its padding, which lies between the rounds of a batch of kept conversations.
    """
    numbers, last = attention_mask.long().cumsum(dim=1), attention_mask.shape[1] - 1

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        distance = numbers[batch_idx, q_idx.clamp(max=last)] - numbers[batch_idx, kv_idx.clamp(max=last)]
        return (kv_idx <= q_idx) & (distance < window)

    return mask_function


def mmca_mask_function(
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    image_attention: str = "self",
    image_ids: torch.Tensor | None = None,
    image_scope: str = "all",
) -> Callable:
    """
    The part of MMCA that is not plain causality, as a mask function of transformers: `(batch, head, query, key)`
    indices, absolute in the conversation, to whether the query attends. Head 0 is the text softmax, head 1 the image
    softmax. Modalities, padding (1 for a token to keep), the conversation of each token of packed rows and the number
    of its image (by default a run of image tokens) are (B, T).
    """
    is_image = mm_token_type_ids.bool()
    is_kept = None if attention_mask is None else attention_mask.bool()
    last = is_image.shape[1] - 1
    image_ids = number_images(is_image) if image_ids is None else image_ids
    own_image = own_image_function(image_ids)
    last_image = image_ids.cummax(dim=1).values if image_scope == "last" else image_ids

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        # A static cache has room beyond the last token; causality masks what is there.
        query_idx, key_idx = q_idx.clamp(max=last), kv_idx.clamp(max=last)
        is_image_key = is_image[batch_idx, key_idx]
        allowed = is_image_key == (head_idx == 1)
        reads = own_image(batch_idx, head_idx, q_idx, kv_idx) if image_attention == "image" else q_idx == kv_idx
        if image_attention == "self_and_text":
            reads = reads | ~is_image_key
        allowed = allowed & (~is_image[batch_idx, query_idx] | reads)
        if image_scope == "last":
            is_last = last_image[batch_idx, query_idx] == image_ids[batch_idx, key_idx]
            allowed = allowed & (~is_image_key | is_last)
        if is_kept is not None:
            allowed = allowed & is_kept[batch_idx, query_idx]
        if sequence_ids is not None:
            allowed = allowed & (sequence_ids[batch_idx, query_idx] == sequence_ids[batch_idx, key_idx])
        return allowed

    return mask_function


def mmca_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor:
    """
    The mask interface registered with transformers for MMCA: evaluates a mask function that may tell two heads apart,
    to (B, 2, Q, S), or to (B, 1, Q, S) for one that knows no modality, of a decoder that is called with text only.
    """
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding_mask is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding_mask))
    batch_idx = torch.arange(batch_size, device=device)[:, None, None, None]
    head_idx = torch.arange(2, device=device)[None, :, None, None]
    q_idx = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    kv_idx = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    return mask_function(batch_idx, head_idx, q_idx, kv_idx).expand(batch_size, -1, q_length, kv_length)


def check_coverage(mm_token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises a `ValueError` unless both are of past and current tokens."""
    if attention_mask is not None and attention_mask.shape != mm_token_type_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it has to cover past and current tokens, "
            f"{tuple(mm_token_type_ids.shape)}."
        )


def create_mmca_masks(
    config: Any,
    inputs_embeds: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    The MMCA masks (B, 2, Q, S) of one forward pass by a [`VisualChatConfig`], by layer type where the decoder has
    several (full, sliding). With `image_scope="half"` those of both halves of the heads, (B, 4, Q, S).

    Modalities and padding cover past and current tokens; a restart of positions (B, Q) marks a packed sequence.

    Raises:
        `ValueError`: a mask of other tokens, or an image that is cut where its tokens attend to each other.
    """
    check_coverage(mm_token_type_ids, attention_mask)
    beyond_window = []  # what a window, as transformers makes it, would leave out
    image_ids = number_images(mm_token_type_ids, config.image_seq_length)
    if config.image_attention == "image":
        beyond_window.append(own_image_function(image_ids))
        check_whole_images(mm_token_type_ids[:, : -inputs_embeds.shape[1]], config.image_seq_length)
        check_whole_images(mm_token_type_ids[:, -inputs_embeds.shape[1] :], config.image_seq_length)
    sequence_ids = None
    if position_ids is not None and attention_mask is None and past_key_values is None:
        # Here and not in transformers, which would hand positions to the mask function where it needs indices.
        sequence_ids = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
    window = getattr(config.text_config, "sliding_window", None)
    if window is not None and attention_mask is not None:
        beyond_window.append(window_function(attention_mask, window))
    masks: list[Any] = []
    for scope in ("last", "all") if config.image_scope == "half" else (config.image_scope,):
        pattern = mmca_mask_function(
            mm_token_type_ids, attention_mask, sequence_ids, config.image_attention, image_ids, scope
        )
        masks.append(
            create_masks_for_generate(
                config=config.text_config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                or_mask_function=or_masks(*beyond_window) if beyond_window else None,
                and_mask_function=pattern,
            )
        )
    if isinstance(masks[0], dict):
        return {name: torch.cat([mask[name] for mask in masks], dim=1) for name in masks[0]}
    return torch.cat(masks, dim=1)


def check_whole_images(mm_token_type_ids: torch.Tensor, image_seq_length: int) -> None:
    """Raises a `ValueError` if a row (B, Q) ends or begins within an image."""
    counts = mm_token_type_ids.bool().sum(dim=1)
    torch_compilable_check(
        (counts % image_seq_length == 0).all(),
        lambda: (
            f"A row holds {int(counts.max())} image tokens, which are not whole images of {image_seq_length}. With "
            'image_attention="image" the tokens of an image attend to each other: pass images whole, and no '
            "prefill_chunk_size."
        ),
    )


class PlanNotDeliveredError(RuntimeError):
    """The layers of a decoder do not pass keyword arguments on to their attention function."""


class MultiModalCausalAttention:
    """
    MMCA as an attention function of transformers, for every layer of a decoder.

    Args:
        kernel (`Callable`): Computes masked softmaxes: [`sdpa_kernel`] or [`eager_kernel`].
        merge (`str`, *optional*, defaults to `"sum"`): `"sum"`, or `"joint"` for one softmax over text and images.
    """

    def __init__(self, kernel: Callable, merge: str = "sum"):
        self.kernel = kernel
        self.merge = merge

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        layer_plan: Any = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            module (`nn.Module`): The attention layer that calls.
            query (`torch.Tensor` of shape `(B, H, Q, D)`): Queries, rotated.
            key, value (`torch.Tensor` of shape `(B, K, S, D)`): Keys, rotated, and values, with those of the cache.
            attention_mask (`torch.Tensor` of shape `(B, C, Q, S)`): With 1, 2 or 4 channels, see [`mmca_mask`] and
                [`create_mmca_masks`].
            layer_plan (`TwoStreamPlan` or `ImageStream`, *optional*): How queries, all of text or all of images,
                attend instead.

        Returns:
            The output of shape `(B, Q, H, D)`, and the summed weights `(B, H, Q, S)` where the kernel yields them.
        """
        if attention_mask is None:
            raise ValueError(f"{type(module).__name__} called multi-modal causal attention without a mask.")
        if not (softcap is None and s_aux is None and position_bias is None):
            raise ValueError(
                f"{type(module).__name__} caps its scores, has sinks or a position bias; MMCA is not defined with "
                "these."
            )
        if layer_plan is not None:
            return layer_plan.attend(module, query, key, value, scaling, dropout), None
        if attention_mask.numel() == 0:
            raise PlanNotDeliveredError(f"{type(module).__name__} does not pass keyword arguments on.")
        has_halves = attention_mask.shape[1] == 4
        if has_halves and self.kernel is sdpa_kernel:
            heads, masks = split_heads(query, key, value, module), attention_mask.split(2, dim=1)
            outputs = [self._attend(*each, mask, scaling, dropout)[0] for each, mask in zip(heads, masks)]
            return join_heads(outputs, key.shape[1]).transpose(1, 2).contiguous(), None
        # A kernel that yields weights computes those of all heads at once: what is returned is what the output is of.
        mask = mask_of_heads(attention_mask, query, key, module) if has_halves else attention_mask
        output, weights = self._attend(query, key, value, mask, scaling, dropout)
        return output.transpose(1, 2).contiguous(), weights

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        channels: torch.Tensor,
        scaling: float | None,
        dropout: float,
    ) -> tuple[Any, Any]:
        mask = channels if self.merge == "sum" else join_channels(channels)
        output, weights = self.kernel(query, key, value, mask, scaling, dropout)
        if dropout > 0.0 and channels.shape[1] > 1:
            # Image tokens read no text, and nothing of what they read is dropped.
            is_image = ~channels_of(channels)[0].any(dim=-1, keepdim=True)
            output = torch.where(is_image, self.kernel(query, key, value, mask, scaling)[0], output)
        return output, weights


def check_decoder(config: PreTrainedConfig) -> None:
    """Refuses a decoder in which MMCA would not be exact, by a `ValueError` with the reason, before it is built."""
    decoder_class = MODEL_MAPPING.get(type(config), None)
    layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
    reason = common_refusal(config)
    if reason is not None:
        pass
    elif getattr(config, "rope_parameters", None) is None:
        reason = "its positions are not rotary, so an image would depend on where it stands"
    elif unset := [name for name in layer_types if config.rope_parameters.get(name, {}) is None]:
        reason = f"the rotary embedding of its layers of type {unset[0]} is not configured"
    elif not decoder_class._supports_sdpa:
        reason = "its attention is more than a softmax over keys (sinks, or scores that are capped)"
    elif hasattr(config, "keep_window_size"):
        reason = "its attention chooses keys by itself"
    refuse_decoder(config, "multi-modal causal attention", reason)


def common_refusal(config: PreTrainedConfig) -> str | None:
    """Why a decoder can carry no attention type but its own, or `None`."""
    decoder_class = MODEL_MAPPING.get(type(config), None)
    layer_types = sorted(set(getattr(config, "layer_types", None) or ()))
    other_layer_types = [name for name in layer_types if name not in ("full_attention", "sliding_attention")]
    if decoder_class is None:
        return "transformers does not know its model class"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not decoder_class._supports_attention_backend:
        return "it does not take its attention from transformers' attention interface"
    if other_layer_types:
        return f"its layers of type {', '.join(other_layer_types)} mix tokens by other means than softmax attention"
    if config.model_type == "modernbert-decoder":
        return "its scores come from a prediction head before the output layer, which VisualChat has no place for"
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its layers read the token ids beside the embeddings, which an image does not have"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    return None


def refuse_decoder(config: PreTrainedConfig, what: str, reason: str | None) -> None:
    """Raises a `ValueError` that names the decoder, if there is a reason."""
    if reason is None:
        return
    decoder_class = MODEL_MAPPING.get(type(config), None)
    name = type(config).__name__.removesuffix("Config") if decoder_class is None else decoder_class.__name__
    raise ValueError(
        f"The decoder {name} (model type {config.model_type!r}) cannot carry {what}: {reason}. "
        'Use a Llama-style decoder, or attention_type="causal".'
    )


def _check_shapes(query, key, value, mm_token_type_ids, attention_mask) -> None:
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    if key.shape != value.shape or key.shape[0] != batch_size or key.shape[3] != head_dim:
        raise ValueError(
            f"query (B, H, Q, D), key and value (B, K, S, D) do not fit together: {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}."
        )
    if num_heads % key.shape[1]:
        raise ValueError(f"The {key.shape[1]} key/value heads do not divide the {num_heads} query heads.")
    if num_queries > num_keys:
        raise ValueError(f"The {num_queries} queries are more than the {num_keys} positions that they end.")
    for name, ids in (("mm_token_type_ids", mm_token_type_ids), ("attention_mask", attention_mask)):
        if ids is not None and ids.shape != (batch_size, num_keys):
            raise ValueError(f"{name} must have shape {(batch_size, num_keys)}, got {tuple(ids.shape)}.")
