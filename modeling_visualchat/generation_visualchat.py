"""
Generation with images, on transformers' `GenerationMixin`.

MMCA has to know which of the past and current tokens are images. The model's forward takes `mm_token_type_ids` for all
of them, as it takes `attention_mask`; here they are rebuilt in every step from the ids, whatever the cache. Images are
encoded once, before the first step. When a conversation continues with its cache, only the images of the new tokens
are used.
"""

import itertools
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_types_visualchat import get_attention_type
from .cache_visualchat import ConversationCache, is_conversation_cache, split_by_row
from .image_memory_visualchat import ImageMemory
from .image_states_visualchat import ImageStates
from .key_rotation_visualchat import rotary_limit
from .route_visualchat import num_past
from .weights_key_visualchat import frozen, image_key, known_key


# Arguments that hold images.
IMAGE_INPUTS = ("pixel_values", "mm_encoder_outputs", "image_states")
# Arguments that select the vision features, instead of the configuration.
VISION_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")


class VisualChatGenerationMixin(GenerationMixin):
    """Generation for [`VisualChatForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *, image_memory: ImageMemory | None = None, **kwargs):
        """
        See `GenerationMixin.generate`; images are passed as `pixel_values`.

        A conversation that continues with its cache (`past_key_values`) takes all the tokens so far, and either all
        the images so far or those of the new tokens only. It may also take the new tokens only, with an
        `attention_mask` and `mm_token_type_ids` of all tokens so far. Tokens and images have to be those of a
        [`ConversationCache`], and the weights those that filled it; to edit a conversation, use a [`ChatSession`].

        Args:
            inputs (`torch.Tensor` of shape `(B, Q)`, *optional*): Token ids; also `input_ids`.
            image_memory (`ImageMemory`, *optional*): Where images are looked up before they are computed; not used by
                assisted and prompt-lookup decoding.
            kwargs: As in `GenerationMixin.generate`.

        Raises:
            `ValueError`: tokens, modalities or images that do not fit the cache, a kept cache together with assisted
                or prompt-lookup decoding, or a model that cannot use an image memory.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in IMAGE_INPUTS}
        ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
        cache: Any = kwargs.get("past_key_values")
        num_cached = num_past(cache)
        is_drafting = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None
        self._check_options(kwargs, image_memory, is_drafting)
        if get_attention_type(self.config).added_layers is not None:
            self._check_text(ids, embeds, kwargs)
        if is_drafting:
            kwargs.pop("mm_token_type_ids", None)  # derived from the ids; an assistant may be text-only
            return super().generate(inputs, **kwargs)
        if embeds is None and ids is not None:
            kwargs["mm_token_type_ids"] = self._all_mm_token_type_ids(ids, num_cached, kwargs)
        elif embeds is not None and kwargs.get("mm_token_type_ids") is None and kwargs.keys() & IMAGE_INPUTS:
            kwargs["mm_token_type_ids"] = self.model.get_placeholder_mask(None, embeds).long()
        repeats = 1
        with frozen(self.model):
            if is_conversation_cache(cache):
                self._check_model(cache)
                repeats = self._check_cache(cache, ids, embeds, kwargs) if num_cached > 0 else 1
            self._replace_images(kwargs, num_cached, image_memory)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return super().generate(inputs, **kwargs)

    def _check_options(self, kwargs: dict, image_memory: ImageMemory | None, is_drafting: bool) -> None:
        """Raises a `ValueError` for arguments that do not go together."""
        cache: Any = kwargs.get("past_key_values")
        if cache is not None and kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False does not go with past_key_values; leave out one of them.")
        if is_drafting and num_past(cache) > 0:
            raise ValueError(
                "Assisted and prompt-lookup decoding start from an empty cache; leave out past_key_values."
            )
        chosen = [name for name in VISION_OPTIONS if kwargs.get(name) not in (None, getattr(self.config, name))]
        if chosen and (image_memory is not None or cache is not None):
            raise ValueError(
                f"{' and '.join(chosen)} cannot be chosen for one call with an image memory or a kept cache; set it "
                "in the configuration."
            )
        if kwargs.get("guidance_scale") not in (None, 1) and get_attention_type(self.config).needs_token_types:
            raise ValueError(
                "guidance_scale needs a second text without images, which transformers runs without telling which of "
                'its tokens are images; leave it out, or use attention_type="causal".'
            )

    def _check_text(self, ids, embeds, kwargs: dict) -> None:
        """Raises a `ValueError` unless each row ends with text, where images are no tokens of the decoder."""
        is_image = kwargs.get("mm_token_type_ids") if embeds is not None else ids == self.config.image_token_id
        if isinstance(is_image, torch.Tensor) and bool(is_image[:, -1].any()):
            raise ValueError(
                f"A prompt ends with an image. With attention_type={self.config.attention_type!r} the next token is "
                "predicted by the last token of text, which has not read that image: let text follow it."
            )
        config = kwargs.get("generation_config") or self.generation_config
        if (name := kwargs.get("cache_implementation") or config.cache_implementation) is not None:
            raise ValueError(
                f"cache_implementation={name!r} has no place for images that are no tokens of the decoder, as with "
                f"attention_type={self.config.attention_type!r}; leave it out for a ConversationCache."
            )

    def _check_model(self, cache: ConversationCache) -> None:
        """Raises a `ValueError` if another model has filled a cache; one that `generate` made itself has no key."""
        if cache.get_seq_length() > 0 and cache.model_key is None:
            return
        key = known_key(self.model)
        if cache.get_seq_length() > 0 and (key is None or key != cache.model_key):
            raise ValueError(
                "The weights, adapters, hooks or dtype of the model are not those that filled the cache, or are "
                "unknown (offloaded, hooked); pass an empty cache, or use a ChatSession, which does."
            )
        cache.model_key = key or "unknown"

    def _replace_images(self, kwargs: dict, num_cached: int, image_memory: ImageMemory | None) -> None:
        """Replaces the images among the arguments, in any form, by the states of those that are not in the cache."""
        given = {name: kwargs.pop(name) for name in IMAGE_INPUTS if kwargs.get(name) is not None}
        options = {name: kwargs.pop(name) for name in VISION_OPTIONS if kwargs.get(name) is not None}
        pixel_values = given.pop("pixel_values", None)
        states = self.model.resolve_images(**given)
        images = pixel_values if states is None else states.index
        if images is None:
            return
        if kwargs.get("mm_token_type_ids") is None:
            raise ValueError("There are images, but no tokens; pass input_ids, as the processor returns them.")
        new = self._find_new_images(len(images), kwargs["mm_token_type_ids"].bool(), num_cached)
        if states is not None and new:
            states = states.select(new)
        elif pixel_values is not None and new and image_memory is not None:
            states = image_memory.get_states(self.model, pixel_values[new].to(self.device))
        elif pixel_values is not None and new:
            states = self.model.resolve_images(pixel_values[new], **given, **options)
        kwargs |= {"image_states": states} if new else {}

    def _check_cache(self, cache: ConversationCache, ids, embeds, kwargs: dict) -> int:
        """
        Checks by a `ValueError` that rows, tokens and images so far are those of a cache, and that something is new.
        Returns how often its rows have to be repeated, for beams or returns.
        """
        if embeds is not None:
            raise ValueError(
                "inputs_embeds cannot be compared with the tokens of the cache; pass input_ids, or an empty cache."
            )
        num_inputs = len(ids)
        config = kwargs.get("generation_config") or self.generation_config
        sizes = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
        num_rows = num_inputs * max(1, *(size or 1 for size in sizes))
        if cache.num_rows not in (num_inputs, num_rows):
            raise ValueError(
                f"The cache holds {cache.num_rows} rows, and {num_inputs} were passed (or {num_rows} with their beams "
                "and returns); pass the conversations of the cache, or an empty cache."
            )
        mask = kwargs.get("attention_mask")
        limit = rotary_limit(self.config.text_config)
        if limit is not None and max(cache.longest, (ids if mask is None else mask).shape[1]) > limit:
            raise ValueError(
                f"Beyond {limit} tokens the rotary embedding of the decoder changes its frequencies, also those of "
                "the cache; start from an empty cache, or use a ChatSession, which does."
            )
        if mask is None or ids.shape[1] >= mask.shape[1]:  # not the new tokens only
            self._check_tokens(cache, ids, kwargs)
        return num_rows // cache.num_rows

    def _check_tokens(self, cache: ConversationCache, ids: torch.Tensor, kwargs: dict) -> None:
        """Raises a `ValueError` that names the first token, position or image that differs from those of a cache."""
        mask, num_cached = kwargs.get("attention_mask"), cache.get_seq_length()
        is_image = ids == self.config.image_token_id
        if (pixel_values := kwargs.get("pixel_values")) is None:
            states = self.model.resolve_images(**{name: kwargs.get(name) for name in IMAGE_INPUTS})
            passed = [] if states is None else states.image_keys()
        else:
            passed = [image_key(image) for image in pixel_values]
        new = self._find_new_images(len(passed), is_image, num_cached)
        keys = split_by_row(passed, is_image) if len(new) < len(passed) else None
        if (positions := kwargs.get("position_ids")) is None:
            positions = (torch.ones_like(ids) if mask is None else mask).cumsum(dim=-1) - 1
        positions = positions if positions.shape == ids.shape else None
        differs = cache.compare(ids, keys, self.config.image_token_id, mask, positions).nonzero()
        if len(differs):
            row, place = differs[0].tolist()
            token, known = int(ids[row, place]), int(cache.token_ids[row * (cache.num_rows // len(ids)), place])
            what = f"Token {place} of row {row} is {token}, and the cache holds {known} there"
            if token == known != self.config.image_token_id:
                what = f"Token {place} of row {row} has another position than in the cache"
            elif token == known:
                num_before = int((ids[row, :place] == token).sum()) // self.config.image_seq_length
                what = f"Image {num_before + 1} of row {row} differs from the one in the cache, or in its form"
            raise ValueError(f"{what}. Pass an empty cache, or edit conversations with a ChatSession.")
        if ids.shape[1] <= num_cached:
            raise ValueError(
                f"The cache holds {num_cached} tokens and {ids.shape[1]} were passed: there is nothing new to "
                "compute. Crop the cache, or pass an empty one."
            )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """By default a [`ConversationCache`], where the model can use one."""
        is_usual = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH)
        is_usual = is_usual or generation_mode == GenerationMode.BEAM_SAMPLE
        wants_dynamic = generation_config.use_cache and generation_config.cache_implementation is None
        records = generation_config.output_attentions or generation_config.output_hidden_states
        is_plain = is_usual and not records and generation_config.prefill_chunk_size is None
        has_no_other = get_attention_type(self.config).added_layers is not None
        states: ImageStates | None = model_kwargs.get("image_states")
        if states is not None and generation_config.prefill_chunk_size is not None:
            # Chunks may cut through an image, which transformers does with features.
            model_kwargs.pop("image_states")
            features = list(states.expand(states.features))
            model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        if (
            model_kwargs.get("past_key_values") is None
            and wants_dynamic
            and (is_plain or has_no_other)
            and self.model.supports_conversation_cache()
        ):
            model_kwargs["past_key_values"] = ConversationCache()
            generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _all_mm_token_type_ids(self, input_ids: torch.Tensor, num_cached: int, kwargs: dict) -> torch.Tensor:
        """The modality of all tokens so far, from the ids or, where only new ones are passed, as it was given."""
        attention_mask, given = kwargs.get("attention_mask"), kwargs.get("mm_token_type_ids")
        num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if input_ids.shape[1] >= num_tokens:
            return (input_ids == self.config.image_token_id).long()
        if given is None or given.shape[1] != num_tokens:
            raise ValueError(
                f"Only new tokens were passed, after {num_cached} in the cache: mm_token_type_ids has to cover all "
                f"{num_tokens}, as attention_mask does, or pass all the tokens so far."
            )
        if num_cached + input_ids.shape[1] != num_tokens:
            raise ValueError(
                f"The cache holds {num_cached} tokens and {input_ids.shape[1]} new ones were passed; attention_mask "
                f"and mm_token_type_ids cover all {num_tokens}. Pass the cache that holds the others, or all tokens."
            )
        return given

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # A placeholder stands for an image, which the model cannot generate.
        suppressed = {*(generation_config.suppress_tokens or ()), self.config.image_token_id}
        generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ):
        """Repeats the images of each row with it, for beams and returns."""
        image_states: ImageStates | None = model_kwargs.pop("image_states", None)
        if image_states is not None:
            is_new = model_kwargs["mm_token_type_ids"][:, num_past(model_kwargs.get("past_key_values")) :] > 0
            rows = split_by_row(range(len(image_states.index)), is_new)
            image_states = image_states.select([image for row in rows for _ in range(expand_size) for image in row])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if image_states is None else {**model_kwargs, "image_states": image_states}

    def _find_new_images(self, num_images: int, is_image: torch.Tensor, num_cached: int) -> list[int]:
        """Which of the images passed, all so far or the new ones only, are not in the cache."""
        totals = (is_image.sum(dim=1) // self.config.image_seq_length).tolist()
        cached = (is_image[:, :num_cached].sum(dim=1) // self.config.image_seq_length).tolist()
        num_new = sum(totals) - sum(cached)
        if num_images not in (sum(totals), num_new):
            raise ValueError(
                f"The tokens hold {sum(totals)} images, {sum(cached)} of them in the cache; {num_images} were passed. "
                f"Pass all {sum(totals)}, or the {num_new} new ones."
            )
        if num_images == num_new:
            return list(range(num_images))
        rows = zip(itertools.accumulate(totals), totals, cached)
        return [image for end, total, old in rows for image in range(end - total + old, end)]

    def create_masks_for_generate(self, config, attention_mask, **kwargs):
        """Masks that need the modality of the past are made by `prepare_inputs_for_generation`."""
        if get_attention_type(self.config).needs_token_types:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        """Adds the modality of past and current tokens, or the finished masks for a cache of fixed size."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        embeds, ids = model_inputs.get("inputs_embeds"), model_inputs.get("input_ids")
        num_queries, num_cached = (ids if embeds is None else embeds).shape[1], num_past(past_key_values)
        if embeds is None and (kwargs.get("mm_encoder_outputs") or kwargs.get("image_states")):
            # Decided by the tokens, not by the iteration: an assistant model gets no first one.
            is_possible = is_first_iteration or num_queries > 1
            if not is_possible or not bool((ids == self.config.image_token_id).any()):
                model_inputs["mm_encoder_outputs"] = model_inputs["image_states"] = None
        if not get_attention_type(self.config).needs_token_types:
            return model_inputs

        if input_ids.shape[1] == num_cached + num_queries:
            mm_token_type_ids = (input_ids == self.config.image_token_id).long()
        elif mm_token_type_ids is not None:
            # Drafted and generated tokens are text.
            num_missing = num_cached + num_queries - mm_token_type_ids.shape[1]
            mm_token_type_ids = nn.functional.pad(mm_token_type_ids, (0, max(num_missing, 0)))
            mm_token_type_ids = mm_token_type_ids[:, : num_cached + num_queries]
        if isinstance(past_key_values, Cache) and past_key_values.is_compileable and mm_token_type_ids is not None:
            shape = torch.empty((mm_token_type_ids.shape[0], num_queries, 0), dtype=self.dtype, device=self.device)
            create_masks: Any = get_attention_type(self.config).create_masks
            model_inputs["attention_mask"] = create_masks(
                self.config,
                shape,
                mm_token_type_ids.to(self.device),
                attention_mask,
                past_key_values,
                model_inputs.get("position_ids"),
            )
        else:
            model_inputs["mm_token_type_ids"] = mm_token_type_ids
        return model_inputs
