"""
Generation with images, on transformers' `GenerationMixin`.

MMCA has to know which of the past and current tokens are images. The model's forward takes `mm_token_type_ids` for all
of them, as it takes `attention_mask`; here they are rebuilt in every step from the ids, whatever the cache. Images are
encoded once, before the first step. When a conversation continues with its cache, only the images of the new tokens
are used.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_types_visualchat import get_attention_type
from .cache_visualchat import ConversationCache, is_conversation_cache
from .image_memory_visualchat import ImageMemory
from .image_states_visualchat import ImageStates
from .route_visualchat import num_past
from .weights_key_visualchat import image_key


# Arguments that select the vision features, instead of the configuration.
VISION_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")


class VisualChatGenerationMixin(GenerationMixin):
    """Generation for [`VisualChatForConditionalGeneration`]."""

    def generate(self, inputs: torch.Tensor | None = None, *, image_memory: ImageMemory | None = None, **kwargs):
        """
        See `GenerationMixin.generate`; images are passed as `pixel_values`.

        A conversation that continues with its cache (`past_key_values`) takes all the tokens so far, and either all
        the images so far or those of the new tokens only. It may also take the new tokens only, with an
        `attention_mask` and `mm_token_type_ids` of all tokens so far. Tokens and images have to be those of the cache,
        and the weights those that filled it; to edit a conversation, use a [`ChatSession`].

        Args:
            inputs (`torch.Tensor` of shape `(B, Q)`, *optional*): Token ids; also `input_ids`.
            image_memory (`ImageMemory`, *optional*): Where images are looked up before they are computed; not used by
                assisted and prompt-lookup decoding.
            kwargs: As in `GenerationMixin.generate`.

        Raises:
            `ValueError`: tokens, modalities or images that do not fit the cache, a kept cache together with assisted
                or prompt-lookup decoding, or a model that cannot use an image memory.
        """
        ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
        cache, pixel_values = kwargs.get("past_key_values"), kwargs.get("pixel_values")
        is_drafting = kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None
        if cache is not None and kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False does not go with past_key_values; leave out one of them.")
        if image_memory is not None and (named := [name for name in VISION_OPTIONS if kwargs.get(name) is not None]):
            raise ValueError(
                f"{' and '.join(named)} cannot be chosen for one call with an image memory; set it in the "
                "configuration."
            )
        num_cached = num_past(cache)
        if num_cached > 0 and is_drafting:
            raise ValueError(
                "Assisted and prompt-lookup decoding start from an empty cache; leave out past_key_values."
            )
        num_repeats = 1
        if num_cached > 0 and is_conversation_cache(cache):
            passed: Any = ids if embeds is None else embeds
            num_repeats = self._check_rows(cache, len(passed), kwargs)
            if ids is not None:
                _check_tokens(cache, ids, kwargs.get("attention_mask"))
        if embeds is not None:
            has_images = kwargs.keys() & {"pixel_values", "mm_encoder_outputs", "image_states"}
            if has_images and kwargs.get("mm_token_type_ids") is None:
                kwargs["mm_token_type_ids"] = self.model.get_placeholder_mask(None, embeds).long()
        elif is_drafting:
            kwargs.pop("mm_token_type_ids", None)  # derived from the ids; an assistant may be text-only
        elif ids is not None:
            kwargs["mm_token_type_ids"] = self._all_mm_token_type_ids(ids, num_cached, kwargs)
        image_keys = cache.image_keys if is_conversation_cache(cache) and pixel_values is None else None
        if pixel_values is not None and ids is not None and not is_drafting:
            # Before they are encoded: an image in the cache costs nothing.
            is_image = kwargs["mm_token_type_ids"].bool()
            rows, num_old = self._new_images(pixel_values, is_image, num_cached)
            if is_conversation_cache(cache):
                image_keys = self._check_images(cache, pixel_values, rows, num_old)
            if num_cached > 0:
                images = [image for row in rows for image in row]
                kwargs.pop("pixel_values")
                kwargs |= {"pixel_values": torch.stack(images)} if images else {}
        if image_memory is not None and not is_drafting and kwargs.get("pixel_values") is not None:
            pixel_values = kwargs.pop("pixel_values").to(self.device)
            kwargs["image_states"] = image_memory.get_states(self.model, pixel_values)
        if cache is not None and num_repeats > 1:
            cache.batch_repeat_interleave(num_repeats)
        outputs = super().generate(inputs, **kwargs)
        if is_conversation_cache(cache):
            has_rows = image_keys is not None and len(image_keys) == cache.num_rows
            cache.image_keys = image_keys if has_rows else None
        return outputs

    def _check_rows(self, cache: ConversationCache, num_inputs: int, kwargs: dict) -> int:
        """
        How often the rows of a cache have to be repeated for beams or returns.

        Raises:
            `ValueError`: a cache of another number of rows.
        """
        config = kwargs.get("generation_config") or self.generation_config
        sizes = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
        num_rows = num_inputs * max(1, *(size or 1 for size in sizes))
        if cache.num_rows not in (num_inputs, num_rows):
            raise ValueError(
                f"The cache holds {cache.num_rows} rows, and {num_inputs} were passed (or {num_rows} with their beams "
                "and returns); pass the conversations of the cache, or an empty cache."
            )
        return num_rows // cache.num_rows

    def _check_images(self, cache: ConversationCache, images, rows: list[list], num_old: list[int]):
        """
        The keys of all images of each row.

        Raises:
            `ValueError`: an image that differs from that of the cache.
        """
        known = cache.image_keys or [[] for _ in rows]
        repeats = max(1, len(known) // len(rows))
        keys, start = [], 0
        for row, (new, old) in enumerate(zip(rows, num_old)):
            kept = known[row * repeats][:old]
            if len(images) > sum(map(len, rows)):  # all images so far, not the new ones only
                passed = [image_key(image) for image in images[start : start + old]]
                start += old + len(new)
                if len(kept) == old and passed != kept:
                    number = next(index for index, pair in enumerate(zip(passed, kept)) if pair[0] != pair[1])
                    raise ValueError(
                        f"Image {number + 1} of row {row} differs from the one in the cache. Pass an empty cache, or "
                        "edit conversations with a ChatSession."
                    )
                kept = passed
            keys.append([*kept, *(image_key(image) for image in new)] if len(kept) == old else None)
        return None if None in keys else keys

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """By default a [`ConversationCache`], where the model can use one."""
        is_usual = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH)
        is_usual = is_usual or generation_mode == GenerationMode.BEAM_SAMPLE
        wants_dynamic = generation_config.use_cache and generation_config.cache_implementation in (None, "dynamic")
        records = generation_config.output_attentions or generation_config.output_hidden_states
        if (
            model_kwargs.get("past_key_values") is None
            and is_usual
            and wants_dynamic
            and not records
            and generation_config.prefill_chunk_size is None
            and self.model.supports_conversation_cache()
        ):
            model_kwargs["past_key_values"] = ConversationCache()
            generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _all_mm_token_type_ids(self, input_ids: torch.Tensor, num_cached: int, kwargs: dict) -> torch.Tensor:
        """The modality of all tokens so far, from the ids or, where only new ones are passed, as it was given."""
        attention_mask, given = kwargs.get("attention_mask"), kwargs.get("mm_token_type_ids")
        num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if input_ids.shape[1] >= num_tokens or num_cached == 0:
            return (input_ids == self.config.image_token_id).long()
        if given is None or given.shape[1] != num_tokens:
            raise ValueError(
                f"Only new tokens were passed, after {num_cached} in the cache: mm_token_type_ids has to cover all "
                f"{num_tokens}, as attention_mask does, or pass all the tokens so far."
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
        """Drops the images that are in the cache, and repeats those of a row with it (for beams and returns)."""
        encoder_outputs = model_kwargs.pop("mm_encoder_outputs", None)
        image_states: ImageStates | None = model_kwargs.pop("image_states", None)
        has_features = bool(encoder_outputs) and encoder_outputs.get("image") is not None
        if has_features or image_states is not None:
            mm_token_type_ids = model_kwargs.get("mm_token_type_ids")
            is_image = (
                input_ids == self.config.image_token_id if mm_token_type_ids is None else mm_token_type_ids.bool()
            )
            features = encoder_outputs["image"].pooler_output if has_features else ()
            images = range(len(features) if image_states is None else len(image_states.index))
            rows, _ = self._new_images(images, is_image, num_past(model_kwargs.get("past_key_values")))
            repeated = [image for row in rows for _ in range(expand_size) for image in row]
            if image_states is not None:
                image_states = image_states.select(repeated) if repeated else None
            elif repeated:
                pooler_output = [features[image] for image in repeated]
                encoder_outputs = {"image": BaseModelOutputWithPooling(pooler_output=pooler_output)}
            else:
                encoder_outputs = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoder_outputs:
            model_kwargs["mm_encoder_outputs"] = encoder_outputs
        if image_states is not None:
            model_kwargs["image_states"] = image_states
        return input_ids, model_kwargs

    def _new_images(self, images, is_image: torch.Tensor, num_cached: int) -> tuple[list[list], list[int]]:
        """
        Each row's images (pixels or numbers) beyond the cache, from all images or from these only; and how many images
        each row has in the cache.
        """
        length = self.config.image_seq_length
        num_images = (is_image.sum(dim=1) // length).tolist()
        num_old = (is_image[:, :num_cached].sum(dim=1) // length).tolist()
        passes_all = len(images) == sum(num_images)
        if not passes_all and len(images) != sum(num_images) - sum(num_old):
            raise ValueError(
                f"The tokens hold {sum(num_images)} images, {sum(num_old)} of them in the cache; {len(images)} "
                f"were passed. Pass all {sum(num_images)}, or the {sum(num_images) - sum(num_old)} new ones."
            )
        rows, start = [], 0
        for total, old in zip(num_images, num_old):
            num_passed = total if passes_all else total - old
            rows.append(list(images[start : start + num_passed])[num_passed - (total - old) :])
            start += num_passed
        return rows, num_old

    def create_masks_for_generate(self, config, attention_mask, **kwargs):
        """Masks that need the modality of the past are made by `prepare_inputs_for_generation`."""
        if get_attention_type(self.config.attention_type).create_masks is not None:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_states: ImageStates | None = None,
        **kwargs,
    ) -> dict:
        """Adds the modality of past and current tokens, or the finished masks for a cache of fixed size."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        embeds, ids = model_inputs.get("inputs_embeds"), model_inputs.get("input_ids")
        num_queries = embeds.shape[1] if embeds is not None else ids.shape[1]
        num_cached = num_past(past_key_values)
        if embeds is None and num_queries > 1 and (mm_encoder_outputs or image_states):
            # Decided by the tokens, not by the iteration: an assistant model gets no first one.
            has_images = bool((ids == self.config.image_token_id).any())
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs if has_images else None
            model_inputs["image_states"] = image_states if has_images else None
        elif embeds is not None and image_states is not None:
            model_inputs["image_states"] = image_states
        create_masks = get_attention_type(self.config.attention_type).create_masks
        if create_masks is None:
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
            model_inputs["attention_mask"] = create_masks(
                self.config.text_config,
                shape,
                mm_token_type_ids.to(self.device),
                attention_mask,
                past_key_values,
                model_inputs.get("position_ids"),
            )
        else:
            model_inputs["mm_token_type_ids"] = mm_token_type_ids
        return model_inputs


def _check_tokens(cache: ConversationCache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raises a `ValueError` if the tokens so far are not those of the cache; new tokens only are not compared."""
    num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
    if input_ids.shape[1] < num_tokens or len(cache.token_ids) % len(input_ids) or len(cache.token_ids) == 0:
        return
    known = cache.token_ids[:: len(cache.token_ids) // len(input_ids)]
    length = min(known.shape[1], input_ids.shape[1])
    known, passed = known[:, :length], input_ids[:, :length].cpu()
    differs = (known != passed) & (known >= 0)
    if attention_mask is not None:
        differs &= attention_mask[:, :length].cpu().bool()
    if bool(differs.any()):
        row, place = differs.nonzero()[0].tolist()
        raise ValueError(
            f"Token {place} of row {row} is {int(passed[row, place])}, and the cache holds {int(known[row, place])} "
            "there. Pass an empty cache, or edit conversations with a ChatSession."
        )
    if input_ids.shape[1] <= cache.get_seq_length():
        raise ValueError(
            f"The cache holds {cache.get_seq_length()} tokens and {input_ids.shape[1]} were passed: there is nothing "
            "new to compute. Crop the cache, or pass an empty one."
        )
