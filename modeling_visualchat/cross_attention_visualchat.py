"""
Gated cross-attention to images: the attention type `"cross"`.

The decoder runs on the text only, with its own causal attention. Before every `cross_layer_interval`-th of its layers
the text reads all images shown before it, in a layer of its own (Flamingo, arXiv 2204.14198, section 3.1.2):

    h_i <- h_i + tanh(gate) W_o softmax_{j<i, image}(scaling * q_i k_j) V_image,  q = W_q norm(h)                (text)
                                                                k, v = W_k norm(features), W_v norm(features)  (image)

The gate starts at zero, so that the model starts as the bare language model on the text. An image token is no token of
the decoder: positions count text only, and an image's keys and values, one pair for each of these layers, depend on
nothing but the image. A text token before the first image reads nothing, and nothing is added to it.

With n for `cross_layer_interval`, the layers stand before the decoder layers n - 1, 2n - 1, …, counted from 0, as in
OpenFlamingo (arXiv 2308.01390); IDEFICS, which gave the field its name, places them before 0, n, 2n, …, where the
first one reads by embeddings. Departures from Flamingo, on purpose: no gated feed-forward follows, since it would
change text before any image; by default a token reads all earlier images, and with `image_scope="last"` only the last
one, as in Flamingo; no resampler belongs to it, which is the projector's part. Keys have no positions, so a token that
reads several images cannot tell them apart by their order; with `"last"`, the text behind each image can.

The cross-attention runs in hooks on the decoder layers, which are handed the images by a keyword argument: the decoder
stays as it is, with its own kernels, masks, adapters and gradient checkpointing.

Dimensions: B rows, Q current positions, T text slots and I image slots (the largest number of a row), H query heads, K
key/value heads, D head size.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_visualchat import common_refusal, refuse_decoder, window_function
from .cache_visualchat import ConversationCache, is_conversation_cache, plan_call
from .image_states_visualchat import ImageStates
from .placed_images_visualchat import LayerImages, PlacedImages, in_place, place_images
from .plan_visualchat import PADDING, TEXT, TwoStreamPlan, attend_to_images, find_packed, take


def cross_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """
    What a cross-attention layer reads, before its output projection and gate, written out row by row in at least
    float32: a text token the images before it, an image token nothing.

    Args:
        query (`torch.Tensor` of shape `(B, H, S, D)`): Queries; those of image tokens are not read.
        key (`torch.Tensor` of shape `(B, K, S, D)`): Keys; those of text tokens are not read.
        value (`torch.Tensor` of shape `(B, K, S, D)`): Values; those of text tokens are not read.
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`): 0 for text, 1 for image.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 1 for a token to keep, 0 for padding.
        scaling (`float`, *optional*, defaults to `D ** -0.5`): Factor on the scores.
        num_tokens (`int`, *optional*): The last image tokens that are read, those of one image; by default all.

    Returns:
        `torch.Tensor` of shape `(B, H, S, D)` in the dtype of `query`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    kept = torch.ones_like(mm_token_type_ids) if attention_mask is None else attention_mask
    rows = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            keys, values = key[b, h // groups].to(dtype), value[b, h // groups].to(dtype)
            for i in range(query.shape[2]):
                images = [j for j in range(i) if mm_token_type_ids[b, j] and kept[b, j]][-(num_tokens or 0) :]
                if mm_token_type_ids[b, i] or not kept[b, i] or not images:
                    rows.append(torch.zeros(query.shape[3], dtype=dtype, device=query.device))
                else:
                    scores = keys[images] @ query[b, h, i].to(dtype) * scaling
                    rows.append(scores.softmax(dim=0) @ values[images])
    return torch.stack(rows).view(query.shape).to(query.dtype)


class ImageKeysValues(nn.Module):
    """The keys and values of images for one cross-attention layer."""

    def __init__(self, text_config: Any, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.norm = _norm(text_config)
        self.k_proj = nn.Linear(text_config.hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(text_config.hidden_size, num_heads * head_dim, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected features (U, length, text hidden) to keys and values, each (U, K, length, D)."""
        features = self.norm(features)
        keys, values = (
            project(features).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        return keys, values


class GatedCrossAttention(GradientCheckpointingLayer):
    """
    One gated cross-attention layer, with the widths and heads of the decoder's attention.

    Without biases, and without a feed-forward part, so that text which reads no image is exactly as it was.
    """

    def __init__(self, text_config: Any):
        super().__init__()
        num_heads = text_config.num_attention_heads
        num_key_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
        self.head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
        self.attention_dropout = getattr(text_config, "attention_dropout", 0.0)
        self.norm = _norm(text_config)
        self.q_proj = nn.Linear(text_config.hidden_size, num_heads * self.head_dim, bias=False)
        self.images = ImageKeysValues(text_config, num_key_heads, self.head_dim)
        self.o_proj = nn.Linear(num_heads * self.head_dim, text_config.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def init_own_parameters(self) -> None:
        """Closes the gate."""
        init.zeros_(self.gate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_key: torch.Tensor | None,
        image_value: torch.Tensor | None,
        images: LayerImages | None,
        plan: TwoStreamPlan,
    ) -> torch.Tensor:
        """
        The text (B, T, hidden) after it has read the images, with keys and values (B, K, I, D) or by reference;
        without images, or where none was shown before, exactly as it was.
        """
        query = self.q_proj(self.norm(hidden_states)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if image_key is not None and image_value is not None:
            images = in_place(image_key, image_value).of_layer(0, query)
        if images is None:
            states = 0.0 * query.transpose(1, 2)  # every parameter keeps a gradient
        else:
            dropout = self.attention_dropout if self.training else 0.0
            states = attend_to_images(query, images, plan, None, dropout)
        return hidden_states + self.gate.tanh().to(query.dtype) * self.o_proj(states.flatten(2))


def _norm(text_config: Any) -> nn.RMSNorm:
    return nn.RMSNorm(text_config.hidden_size, eps=getattr(text_config, "rms_norm_eps", 1e-6))


def build_cross_attention(config: Any) -> nn.ModuleDict:
    """The cross-attention layers of a [`VisualChatConfig`], by the index of the decoder layer that they precede."""
    interval, num_layers = config.cross_layer_interval, config.text_config.num_hidden_layers
    places = range(interval - 1, num_layers, interval)
    if not places:
        raise ValueError(
            f"cross_layer_interval={interval} leaves a decoder of {num_layers} layers without cross-attention; choose "
            f"one between 1 and {num_layers}."
        )
    return nn.ModuleDict({str(place): GatedCrossAttention(config.text_config) for place in places})


def check_cross_decoder(config: PreTrainedConfig) -> None:
    """Refuses a decoder that cannot carry cross-attention, by a `ValueError` with the reason, before it is built."""
    refuse_decoder(config, "cross-attention", common_refusal(config))


@dataclass(eq=False)
class ImageReads:
    """What the decoder layers are handed in one forward pass: which of them follow a cross-attention layer."""

    layers: dict[nn.Module, tuple[int, GatedCrossAttention]]  # by the decoder layer that follows, with their number
    plan: TwoStreamPlan
    images: PlacedImages | None
    num_read: int = field(default=0, init=False)

    def read(self, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The text (B, T, hidden) in front of a decoder layer."""
        if layer not in self.layers:
            return hidden_states
        self.num_read += 1
        number, cross_attention = self.layers[layer]
        if self.images is None:
            return cross_attention(hidden_states, None, None, None, self.plan)
        images = self.images.of_layer(number, hidden_states)
        # With reentrant gradient checkpointing, what has a gradient has to be an argument.
        keys_values = images.keys_values() if torch.is_grad_enabled() else (None, None)
        return cross_attention(hidden_states, *keys_values, images, self.plan)


def read_images_before_layer(layer: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
    """The hook on every decoder layer; it keeps the images from the layer itself."""
    reads: ImageReads | None = keywords.pop("image_reads", None)
    if reads is None:
        return None
    return (reads.read(layer, arguments[0]), *arguments[1:]), keywords


def _hook_layers(model: Any) -> dict[nn.Module, tuple[int, GatedCrossAttention]]:
    """The `layers` of [`ImageReads`]; all those of the decoder have [`read_images_before_layer`] after that."""
    decoder = model.language_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(decoder).__name__} cannot carry cross-attention: it has no list of layers.")
    for layer in layers:
        names = [getattr(hook, "__name__", None) for hook in layer._forward_pre_hooks.values()]
        if read_images_before_layer.__name__ not in names:
            layer.register_forward_pre_hook(read_images_before_layer, with_kwargs=True)
    cross_attention = enumerate(model.cross_attention.items())
    return {layers[int(place)]: (number, layer) for number, (place, layer) in cross_attention}


def compute_cross_states(model: Any, states: ImageStates, like: torch.Tensor) -> ImageStates:
    """Images with the keys and values of every cross-attention layer, in the dtype and on the device of `like`."""
    states = replace(states, features=states.features.to(like.device, like.dtype))
    computed = [layer.images(states.features) for layer in model.cross_attention.values()]
    return replace(states, keys=[keys for keys, _ in computed], values=[values for _, values in computed])


@torch.compiler.disable
def run_with_cross_attention(model: Any, inputs: Any) -> BaseModelOutputWithPast:
    """
    Runs the decoder of a [`VisualChatModel`] on the text of a call, [`DecoderInputs`], and scatters its outputs to
    the positions of the conversation. An image token gets the output of the last text token before it, which is what
    predicts the text after the image; zero if there is none.

    Raises:
        `ValueError`: a cache that has no place for images, a finished mask, or a decoder whose layers are not given
            further arguments.
    """
    text_config, kwargs = model.config.text_config, dict(inputs.kwargs)
    cache, embeds = inputs.past_key_values, inputs.embeds
    sequence_ids = None
    if cache is None:
        sequence_ids = find_packed(embeds, inputs.attention_mask, inputs.position_ids)
    if cache is None and sequence_ids is None and kwargs.get("use_cache", text_config.use_cache):
        cache = ConversationCache()
    _check(inputs, cache, text_config)
    kwargs.pop("use_cache", None)
    plan, is_image, position_ids = plan_call(cache, inputs, sequence_ids)
    states = _image_states(model, inputs, is_image)
    placed, unread = None, list[torch.Tensor]()
    if states is not None:
        placed = place_images(states, plan, is_image, position_ids)
        unread = [keys for layer in (*states.keys, *states.values) for keys in layer]
    if inputs.blank_features is not None:
        blank = compute_cross_states(model, ImageStates(inputs.blank_features[None], [0]), embeds)
        unread = [keys for layer in (*blank.keys, *blank.values) for keys in layer]
    if cache is not None:
        cache.add_images(placed)
        placed = cache.placed_images
    reads_images = any(run.end_key > run.first_key for runs in plan.runs for run in runs)
    embeds = plan.gather_text(embeds)
    if unread and not reads_images and torch.is_grad_enabled():
        embeds = embeds + 0.0 * sum(states.sum().to(embeds.device) for states in unread)

    # Parameters that are sharded are gathered by all ranks together, whether or not one has images.
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.cross_attention.parameters())
    layers = _hook_layers(model) if reads_images or unread or is_sharded else {}
    is_limited = model.config.image_scope == "last"
    read_plan = plan.limit_to_last_image(model.config.image_seq_length) if is_limited else plan
    reads = ImageReads(layers, read_plan, placed if reads_images else None)
    text_mask = _text_mask(text_config, plan, cache, embeds)
    if cache is None and sequence_ids is None and inputs.position_ids is not None:
        # Without a mask, the decoder would take gaps in the positions for packed conversations.
        text_mask = torch.ones_like(plan.order)
    outputs = model.language_model(
        inputs_embeds=embeds,
        attention_mask=text_mask,
        position_ids=_text_positions(plan, position_ids),
        past_key_values=None if cache is None else cache.text_cache,
        **({"image_reads": reads} if layers else {}),
        use_cache=cache is not None,
        **kwargs,
    )
    if reads.num_read != len(layers):
        raise ValueError(
            f"{type(model.language_model).__name__} cannot carry cross-attention: its layers are not given further "
            'keyword arguments, by which the images reach them. Use a Llama-style decoder, or attention_type="causal".'
        )
    if cache is not None:
        cache.commit(plan)
    outputs.past_key_values = cache
    outputs.last_hidden_state = _scatter(plan, outputs.last_hidden_state, sequence_ids)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(_scatter(plan, each, sequence_ids) for each in outputs.hidden_states)
    return outputs


def _check(inputs: Any, cache: Any, text_config: Any) -> None:
    """Raises a `ValueError` for what cross-attention cannot do."""
    if cache is not None and (not is_conversation_cache(cache) or cache.is_interleaved):
        raise ValueError(
            f"A {type(cache).__name__} has no place for the images of cross-attention, which are no tokens of the "
            "decoder; pass a ConversationCache, or none."
        )
    mask = inputs.attention_mask
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise ValueError(
            "Cross-attention takes an attention_mask of shape (batch, past and current tokens), 1 to keep and 0 for "
            f"padding, and no finished masks; got {type(mask).__name__ if isinstance(mask, dict) else mask.shape}."
        )
    if inputs.kwargs.get("output_attentions", getattr(text_config, "output_attentions", False)):
        raise ValueError(
            "output_attentions is not possible with cross-attention: images are no tokens of the decoder, so its "
            "attentions are not between the tokens of the conversation."
        )


def _image_states(model: Any, inputs: Any, is_image: torch.Tensor) -> ImageStates | None:
    """The images of a call with their keys and values, computed here unless they are known."""
    states, embeds = inputs.image_states, inputs.embeds
    if states is None and bool(is_image.any()):
        states = ImageStates(embeds[is_image.to(embeds.device)][None], [0])
    if states is None:
        return None
    states.check_tokens(is_image)
    return states if states.keys else compute_cross_states(model, states, embeds)


def _text_positions(plan: TwoStreamPlan, position_ids: torch.Tensor) -> torch.Tensor:
    """Positions (B, Q) to those of the text slots (B, T), which count no image; a row continues beyond its text."""
    num_images = torch.zeros(plan.order.shape, dtype=torch.long)
    lengths = torch.zeros(plan.order.shape[0], 1, dtype=torch.long)
    for row, runs in enumerate(plan.runs):
        for run in runs:
            num_images[row, run.start : run.end] = run.end_key - run.first_key
            lengths[row] = run.end
    slots = torch.arange(plan.order.shape[1])
    last = (lengths - 1).clamp(min=0).minimum(slots)
    positions = plan.gather_text(position_ids) - num_images.to(position_ids.device)
    return take(positions, last) + (slots - last).to(positions.device)


def _text_mask(text_config: Any, plan: TwoStreamPlan, cache: Any, embeds: torch.Tensor) -> Any:
    """The mask of the decoder: 2-D where the text of a cache is padded, else none. Text beyond a row needs no mask."""
    kept = None if plan.text_mask is None else plan.text_mask[:, 0, -1]
    if kept is None or bool(kept.all()):
        return None
    window = getattr(text_config, "sliding_window", None)
    if window is None or kept.shape[1] <= window:
        return kept.long()
    kernel = text_config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"Rows with unequal numbers of text tokens cannot continue beyond a sliding window of {window} tokens "
            f"with attn_implementation={kernel!r}: padding would count as tokens. Use sdpa or eager."
        )
    return create_masks_for_generate(
        config=text_config,
        inputs_embeds=embeds,
        attention_mask=kept.long(),
        past_key_values=cache.text_cache,
        or_mask_function=window_function(kept, window),
    )


def _scatter(plan: TwoStreamPlan, text: torch.Tensor, sequence_ids: torch.Tensor | None) -> torch.Tensor:
    """(B, T, hidden) of text slots to (B, Q, hidden): each position gets its last text, of its own sequence."""
    last = (plan.token_types == TEXT).cumsum(dim=1) - 1
    is_known = (plan.token_types != PADDING) & (last >= 0)
    last = last.clamp(min=0)
    if sequence_ids is not None:
        is_known &= take(plan.gather_text(sequence_ids), last).cpu() == sequence_ids.cpu()
    return take(text, last) * is_known[..., None].to(text.device)
