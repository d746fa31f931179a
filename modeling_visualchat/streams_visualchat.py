"""
Two streams through one decoder: images first, each on its own, and then the text, which reads what they leave behind.

This is the form of MMCA that [`VisualChatModel`] takes by itself wherever it can: no work for image queries, nothing
masked, an image that occurs twice computed once, and nothing of the last layer but keys and values for images. The
layers of the decoder are called twice in a forward pass, and so are hooks on them.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_visualchat import MMCA_PREFIX, PlanNotDeliveredError
from .cache_visualchat import ConversationCache, keeps_apart
from .image_states_visualchat import ImageStates, KeyRotation, hooks_of, place_images, read_images
from .plan_visualchat import IMAGE, plan_mmca


# What is recorded layer by layer would be of one stream alone.
RECORDED_OUTPUTS = ("output_attentions", "output_hidden_states")


class TwoStreamMixin:
    """What [`VisualChatModel`] needs to take images and text through its decoder apart."""

    config: Any
    language_model: Any
    training: bool
    get_image_features: Any
    get_input_embeddings: Any
    _choose_attention: Any
    # Whether the decoder can be served so, and how it rotates keys: found out when the first images come.
    _takes_plans = True
    _key_rotation: KeyRotation | None = None

    def keeps_apart(self) -> bool:
        """Whether text and images of a conversation of any length can be cached apart."""
        text_config = self.config.text_config
        return (
            self._takes_plans
            and self.config.attention_type == "mmca"
            and text_config._attn_implementation == MMCA_PREFIX + "sdpa"
            and getattr(text_config, "sliding_window", None) is None
            and _is_fresh_and_plain(DynamicCache(config=text_config))
            and self._try_plans(self.get_input_embeddings().weight)
        )

    def read_images(self, pixel_values: torch.Tensor) -> ImageStates:
        """
        Takes images as far as no conversation matters: through the vision tower, the projector and the decoder. What
        comes out can be passed as `image_states` wherever these images are spoken of.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels.

        Raises:
            `ValueError`: a model that cannot read images apart from the conversation.
        """
        images = ImageStates.of_features(list(self.get_image_features(pixel_values).pooler_output))
        self._choose_attention(self.language_model.config)
        implementation = self.config.text_config._attn_implementation
        embedding = self.get_input_embeddings().weight
        like = images.features if embedding.is_meta else embedding
        if implementation != MMCA_PREFIX + "sdpa" or not self._try_plans(embedding):
            raise ValueError(
                "Images can be read apart from a conversation only with multi-modal causal attention on the sdpa "
                f"kernel, in a decoder whose keys can be rotated alone; this is {type(self.language_model).__name__} "
                f"with {implementation!r}."
            )
        return self._read_images(images, like, needs_outputs=False)

    def _can_plan(self, embeds, kwargs, sequence_ids, attention_mask, position_ids, past_key_values) -> bool:
        """Whether these inputs can go through the decoder apart."""
        text_config = self.config.text_config
        window = getattr(text_config, "sliding_window", None)
        return (
            self._takes_plans
            and text_config._attn_implementation == MMCA_PREFIX + "sdpa"
            and not torch.compiler.is_compiling()
            and (window is None or _longest(embeds, sequence_ids) < window)
            and not any(kwargs.get(name, getattr(text_config, name, False)) for name in RECORDED_OUTPUTS)
            and (sequence_ids is None or past_key_values is None)
            and _turns_alike(text_config, embeds, position_ids, past_key_values)
            and self._serves(past_key_values, kwargs)
            and not (self.training and _checkpoints_reentrantly(self.language_model))
            and self._try_plans(embeds)
        )

    def _serves(self, cache: Any, kwargs: dict) -> bool:
        text_config = self.config.text_config
        if cache is None and not kwargs.get("use_cache", text_config.use_cache):
            return True
        if keeps_apart(cache):
            return not cache.is_interleaved and self.keeps_apart()
        return _is_fresh_and_plain(DynamicCache(config=text_config) if cache is None else cache)

    def _try_plans(self, embeds: torch.Tensor) -> bool:
        """Whether the decoder passes plans on and keys can be rotated alone; tried out once."""
        is_tried = self._key_rotation is not None and self._key_rotation.decoder is self.language_model
        if self._takes_plans and not is_tried:
            self._choose_attention(self.language_model.config)
            like = torch.empty(0, dtype=embeds.dtype) if embeds.is_meta else embeds
            with contextlib.suppress(PlanNotDeliveredError):
                self._key_rotation = KeyRotation.find(self.language_model, self._decode, like)
            self._takes_plans = self._key_rotation is not None
        return self._takes_plans

    def _run_planned(
        self,
        embeds: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        images: ImageStates | None,
        blank_features: torch.Tensor | None,
        skip_image_outputs: bool,
        sequence_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Runs the decoder on images and text apart, and puts its output into the order of the conversation.

        Args:
            embeds (`torch.Tensor` of shape `(B, Q, hidden)`): Of the text; at images only read without `images`.
            mm_token_type_ids (`torch.Tensor` of shape `(B, past + Q)`): 0 for text, 1 for image.
            images (`ImageStates`, *optional*): The images of these tokens, read or not yet.
            blank_features (`torch.Tensor` of shape `(length, hidden)`, *optional*): An image to run and to ignore.
            skip_image_outputs (`bool`): Whether the output may be zero at images.
            sequence_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Of packed rows, see [`find_packed`].
            attention_mask (`torch.Tensor` of shape `(B, past + Q)`, *optional*): 1 to keep, 0 for padding.
            position_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): A cache that [`_serves`].
        """
        assert self._key_rotation is not None
        if past_key_values is None and kwargs.get("use_cache", self.config.text_config.use_cache):
            past_key_values = ConversationCache()
        cache: Any = past_key_values
        if cache is not None and not keeps_apart(cache):
            cache = ConversationCache()
        kwargs["use_cache"] = cache is not None
        num_past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + embeds.shape[1], device=embeds.device)[None]
        position_ids = position_ids.expand(embeds.shape[:2])
        mm_token_type_ids = mm_token_type_ids[:, num_past:]
        attention_mask = None if attention_mask is None else attention_mask[:, num_past:]

        is_image = mm_token_type_ids.cpu().bool()
        if images is None and bool(is_image.any()):
            images = ImageStates(embeds[is_image.to(embeds.device)][None], [0])
        if images is not None and len(images.token_index()) != int(is_image.sum()):
            raise ValueError(
                f"mm_token_type_ids marks {int(is_image.sum())} of the current tokens as images; the images take "
                f"{len(images.token_index())}."
            )
        if images is not None and (not images.keys or (images.outputs is None and not skip_image_outputs)):
            # An image that occurs once is rotated where it is computed.
            positions = None if images.has_repeats() else position_ids[is_image.to(position_ids.device)]
            images = self._read_images(images, embeds, not skip_image_outputs, positions)
        if blank_features is not None:
            blank = self._read_images(ImageStates(blank_features[None], [0]), embeds, not skip_image_outputs)
            read = [*blank.keys, *blank.values, *([] if blank.outputs is None else [blank.outputs])]
            embeds = embeds + 0.0 * sum(states.sum().to(embeds.device) for states in read)

        past = (None, None)
        if cache is not None:
            cache.prepare(embeds.shape[0])
            past = (cache.places, cache.kinds)
        plan = plan_mmca(mm_token_type_ids, attention_mask, *past, sequence_ids=sequence_ids)
        if images is not None:
            plan = replace(plan, images=place_images(images, plan.kinds, is_image, position_ids, self._key_rotation))
        if cache is not None:
            cache.add_images(plan, self._key_rotation.num_layers)
            plan = replace(plan, images=cache.of_images if cache.images.layers else None)
        outputs = self._decode(plan.take_text(embeds), plan.take_text(position_ids), plan, cache, **kwargs)
        if cache is not None:
            cache.commit(plan)
            if cache is not past_key_values:
                cache.interleave(past_key_values)
        outputs.past_key_values = past_key_values
        image_outputs = None
        if images is not None and images.outputs is not None:
            tokens = images.outputs.flatten(0, 1)[images.token_index().to(images.outputs.device)]
            image_outputs = tokens[(plan.kinds == IMAGE)[is_image].to(tokens.device)]
        outputs.last_hidden_state = plan.put_back(outputs.last_hidden_state, image_outputs)
        return outputs

    def _decode(self, embeds, position_ids, plan, past_key_values=None, **kwargs) -> BaseModelOutputWithPast:
        """Runs the decoder with a plan in place of masks."""
        no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=embeds.device)
        layer_types = getattr(self.config.text_config, "layer_types", None)
        kwargs.setdefault("use_cache", past_key_values is not None)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=no_mask if layer_types is None else dict.fromkeys(layer_types, no_mask),
            position_ids=position_ids,
            past_key_values=past_key_values,
            mmca_plan=plan,
            **kwargs,
        )

    def _read_images(
        self,
        images: ImageStates,
        like: torch.Tensor,
        needs_outputs: bool,
        positions: torch.Tensor | None = None,
    ) -> ImageStates:
        assert self._key_rotation is not None
        images = replace(images, features=images.features.to(like.device, like.dtype))
        is_watched = _is_watched(self.language_model, self.training)
        positions = None if positions is None else positions.view(images.features.shape[:2])
        return read_images(self._decode, images, self._key_rotation, is_watched, needs_outputs, positions)


def find_packed(embeds, attention_mask, position_ids) -> torch.Tensor | None:
    """Of rows that pack several sequences, which one each position is in (B, Q): told by positions that start anew."""
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return None
    return find_packed_sequence_indices(position_ids.expand(embeds.shape[:2]))


def _longest(embeds: torch.Tensor, sequence_ids: torch.Tensor | None) -> int:
    """The length of the longest sequence."""
    if sequence_ids is None:
        return embeds.shape[1]
    return max(int(row.unique_consecutive(return_counts=True)[1].max()) for row in sequence_ids)


def _turns_alike(text_config, embeds: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether the two streams see the same rotary frequencies, which some embeddings choose by the length they see."""
    limit = rotary_limit(text_config)
    if limit is None:
        return True
    length = (0 if cache is None else cache.get_seq_length()) + embeds.shape[1]
    if position_ids is not None:
        length = int(position_ids.max()) + 1
    return length < limit


def rotary_limit(text_config) -> int | None:
    """The length from which on a rotary embedding changes its frequencies, if it is of a kind that does."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    kinds = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    default = getattr(text_config, "original_max_position_embeddings", None) or text_config.max_position_embeddings
    return min((kind.get("original_max_position_embeddings") or default for kind in kinds), default=None)


def _is_fresh_and_plain(cache: Cache) -> bool:
    """Whether a cache is empty and keeps all that it is given, in the order given."""
    return (
        isinstance(cache, DynamicCache)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and (cache.get_seq_length() == 0)
    )


def _checkpoints_reentrantly(decoder: nn.Module) -> bool:
    """Whether gradients reach a layer by its positional arguments alone."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in decoder.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def _is_watched(decoder: nn.Module, is_training: bool) -> bool:
    """Whether somebody counts on every layer being run to its end: hooks, or gradient checkpointing."""
    if is_training and getattr(decoder, "is_activation_checkpointing", False):
        return True
    return any(hooks_of(part) or hasattr(part, "_hf_hook") for part in decoder.modules())
