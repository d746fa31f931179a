"""
What generation with images needs beyond transformers' `GenerationMixin`.

MMCA has to know which of the past and current tokens are images. The model's forward takes `mm_token_type_ids` for all
of them, as it takes `attention_mask`; here they are rebuilt in every step from the ids, whatever the cache. Images are
encoded once, before the first step. Of a conversation that goes on with its cache, only the images of the new tokens
are used.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_visualchat import create_mmca_masks
from .cache_visualchat import ConversationCache, keeps_apart
from .image_memory_visualchat import ImageMemory, describe_switches, fingerprint_image
from .image_states_visualchat import ImageStates
from .streams_visualchat import rotary_limit


# Arguments that choose what the projector reads, instead of the configuration.
VISION_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")


class VisualChatGenerationMixin(GenerationMixin):
    """Generation for [`VisualChatForConditionalGeneration`]."""

    def generate(self, inputs: torch.Tensor | None = None, *, image_memory: ImageMemory | None = None, **kwargs):
        """
        See `GenerationMixin.generate`; images are passed as `pixel_values`.

        A conversation that goes on with its cache (`past_key_values`) takes all the tokens so far, and either all the
        images so far or those of the new tokens alone. It may also take the new tokens alone, with an `attention_mask`
        and `mm_token_type_ids` of all tokens so far.

        With a [`ConversationCache`], all tokens and all images, the conversation need not go on where it stopped: what
        has changed since `generate` filled it, a message or an image of any round, the model or its adapters, is
        found, and computed anew from there; so is all that `generate` does not know of a cache that it filled. What
        `forward` has cached is trusted, and a weight written through `.data` is not seen: take a new cache then.

        Args:
            inputs (`torch.Tensor` of shape `(B, Q)`, *optional*): Token ids; also `input_ids`.
            image_memory (`ImageMemory`, *optional*): Where images are looked up before they are computed; not used by
                assisted and prompt-lookup decoding.
            kwargs: As in `GenerationMixin.generate`.

        Raises:
            `ValueError`: tokens, modalities or images that do not fit the cache, a cache that is kept together with
                assisted or prompt-lookup decoding, or a model that cannot use an image memory.
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
        config = kwargs.get("generation_config") or self.generation_config
        is_kept = keeps_apart(cache) or kwargs.get("return_dict_in_generate", config.return_dict_in_generate)
        tokens = self._tell_apart(ids, pixel_values, cache, kwargs) if is_kept else None
        if keeps_apart(cache):
            self._crop_to_shared(cache, tokens, ids if embeds is None else embeds, kwargs)
        num_past = 0 if cache is None else int(cache.get_seq_length())
        if num_past > 0 and is_drafting:
            raise ValueError(
                "Assisted and prompt-lookup decoding start from an empty cache; leave out past_key_values."
            )
        if embeds is not None:
            has_images = kwargs.keys() & {"pixel_values", "mm_encoder_outputs", "image_states"}
            if has_images and kwargs.get("mm_token_type_ids") is None:
                kwargs["mm_token_type_ids"] = self.model.get_placeholder_mask(None, embeds).long()
        elif is_drafting:
            kwargs.pop("mm_token_type_ids", None)  # the ids tell, and an assistant may know text alone
        elif ids is not None:
            kwargs["mm_token_type_ids"] = self._all_mm_token_type_ids(ids, num_past, kwargs)
        if num_past > 0 and pixel_values is not None:
            # Before they are encoded: an image in the cache costs nothing.
            rows = self._of_new_tokens(pixel_values, kwargs["mm_token_type_ids"].bool(), num_past)
            images = [image for row in rows for image in row]
            kwargs.pop("pixel_values")
            kwargs |= {"pixel_values": torch.stack(images)} if images else {}
        if image_memory is not None and not is_drafting and kwargs.get("pixel_values") is not None:
            pixel_values = kwargs.pop("pixel_values").to(self.device)
            kwargs["image_states"] = image_memory.read(self.model, pixel_values)
        outputs = super().generate(inputs, **kwargs)
        self._note_generated(outputs, cache, tokens, 0 if ids is None else ids.shape[1])
        return outputs

    def _tell_apart(self, input_ids, pixel_values, cache: Any, kwargs: dict) -> list[list] | None:
        """
        What stands at each position (B lists): a text token's id, an image's fingerprint and the place in it, or
        `None` for padding. Nothing if that cannot be told of every position.

        Raises:
            `ValueError`: new images alone, after text that is not that of the cache.
        """
        attention_mask = kwargs.get("attention_mask")
        others = ("inputs_embeds", "mm_encoder_outputs", "image_states", "position_ids")
        if input_ids is None or any(kwargs.get(name) is not None for name in others):
            return None
        is_image, length = input_ids == self.config.image_token_id, self.config.image_seq_length
        known: list[list] = [[] for _ in input_ids]
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            # New tokens alone, after those that the cache knows.
            num_past = attention_mask.shape[1] - input_ids.shape[1]
            known = (cache.tokens if keeps_apart(cache) else None) or []
            if [len(row) for row in known] != len(input_ids) * [num_past]:
                return None
            input_ids = nn.functional.pad(input_ids, (num_past, 0))
        num_tokens = 0 if pixel_values is None else len(pixel_values) * length
        if int(is_image.sum()) != num_tokens:
            num_past = len(cache.tokens[0]) if keeps_apart(cache) and cache.tokens else 0
            num_past = min(num_past, int(cache.get_seq_length())) if num_past else 0
            if num_past == 0 or len(cache.tokens) != len(input_ids) or int(is_image[:, num_past:].sum()) != num_tokens:
                return None
            known = [row[:num_past] for row in cache.tokens]
            kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            for row, ids, mask in zip(known, input_ids.tolist(), kept.tolist()):
                for old, token, is_kept in zip(row, ids, mask):
                    expected = self.config.image_token_id if isinstance(old, tuple) else old
                    if (expected is None) == bool(is_kept) or (is_kept and token != expected):
                        raise ValueError(
                            "The conversation has changed before the end of its cache: pass all its images, not the "
                            "new ones alone."
                        )
        options = [kwargs.get(name) for name in VISION_OPTIONS]
        names = [(fingerprint_image(image), str(options)) for image in pixel_values] if num_tokens else []
        images = iter([(name, place) for name in names for place in range(length)])
        masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for old, ids, mask in zip(known, input_ids.tolist(), masks.tolist()):
            new = [next(images) if token == self.config.image_token_id else token for token in ids[len(old) :]]
            rows.append(old + [token if is_kept else None for token, is_kept in zip(new, mask[len(old) :])])
        return rows

    def _crop_to_shared(self, cache: ConversationCache, tokens: list[list] | None, inputs, kwargs: dict) -> None:
        """
        Leaves of a cache what serves the conversation that is passed.

        Raises:
            `ValueError`: a cache of another model, state of it or number of rows, and not all tokens and images.
        """
        state = self._describe_state()
        num_images = len(kwargs["pixel_values"]) if kwargs.get("pixel_values") is not None else 0
        is_whole = tokens is not None and (
            inputs.shape[1] == len(tokens[0])
            and num_images * self.config.image_seq_length
            == sum(isinstance(token, tuple) for row in tokens for token in row)
        )
        if cache.get_seq_length() > 0:
            config = kwargs.get("generation_config") or self.generation_config
            sizes = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
            num_rows = len(inputs) * max(1, *(size or 1 for size in sizes))
            is_other = cache.made_by not in (None, state) or cache.num_rows not in (len(inputs), num_rows)
            # Filled by `generate`, but with rows or inputs of which it is not known what they hold.
            is_other = is_other or (tokens is not None and cache.tokens is None and cache.made_by is not None)
            if is_other and not is_whole:
                raise ValueError(
                    "The cache was filled by another model, by another state of this one or for another number of "
                    "rows. Pass all tokens and all images, or an empty cache."
                )
            if is_other:
                cache.reset()
            elif tokens is not None and cache.tokens is not None:
                num_shared, limit = _num_shared(cache.tokens, tokens), rotary_limit(self.config.text_config)
                if num_shared < cache.get_seq_length() and limit is not None and cache.get_seq_length() >= limit:
                    num_shared = 0  # those keys were rotated for a longer text
                cache.crop(min(0, num_shared - cache.get_seq_length()))
            if cache.get_seq_length() > 0 and cache.num_rows == len(inputs) < num_rows:
                cache.batch_repeat_interleave(num_rows // len(inputs))
        cache.tokens, cache.made_by = tokens, state

    def _describe_state(self) -> tuple:
        """What tells this model, and the state that it is in, from another."""
        weights = [
            (id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in self.model.parameters()
        ]
        return id(self.model), describe_switches(self.model), hash(tuple(weights)), hash(self.config.to_json_string())

    def _note_generated(self, outputs, cache: Any, tokens: list[list] | None, num_passed: int) -> None:
        """Completes what a cache knows of its tokens by those that were generated."""
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        if not isinstance(outputs, torch.Tensor):
            cache = outputs.get("past_key_values", cache)
        if not keeps_apart(cache):
            return
        if tokens is None or len(sequences) != len(tokens) or cache.num_rows != len(tokens):
            cache.tokens, cache.made_by = None, self._describe_state()
            return
        cache.made_by = self._describe_state()
        end = num_passed + cache.get_seq_length() - len(tokens[0])
        cache.tokens = [row + new for row, new in zip(tokens, sequences[:, num_passed:end].tolist())]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """By default a cache that keeps text and images apart, where the model can use one."""
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
            and self.model.keeps_apart()
        ):
            model_kwargs["past_key_values"] = ConversationCache()
            generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _all_mm_token_type_ids(self, input_ids: torch.Tensor, num_past: int, kwargs: dict) -> torch.Tensor:
        """The modality of all tokens so far, from the ids or, where only new ones are passed, as it was given."""
        attention_mask, given = kwargs.get("attention_mask"), kwargs.get("mm_token_type_ids")
        num_tokens = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        if input_ids.shape[1] >= num_tokens or num_past == 0:
            return (input_ids == self.config.image_token_id).long()
        if given is None or given.shape[1] != num_tokens:
            raise ValueError(
                f"Only new tokens were passed, after {num_past} in the cache: mm_token_type_ids has to cover all "
                f"{num_tokens}, as attention_mask does, or pass all the tokens so far."
            )
        return given

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # A placeholder stands for an image that somebody passes; the model has none to give.
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
        """Leaves out the images that are in the cache, and repeats those of a row with it (for beams and returns)."""
        encoder_outputs = model_kwargs.pop("mm_encoder_outputs", None)
        image_states: ImageStates | None = model_kwargs.pop("image_states", None)
        has_features = bool(encoder_outputs) and encoder_outputs.get("image") is not None
        if has_features or image_states is not None:
            cache = model_kwargs.get("past_key_values")
            num_past = 0 if cache is None else int(cache.get_seq_length())
            mm_token_type_ids = model_kwargs.get("mm_token_type_ids")
            is_image = (
                input_ids == self.config.image_token_id if mm_token_type_ids is None else mm_token_type_ids.bool()
            )
            features = encoder_outputs["image"].pooler_output if has_features else ()
            images = range(len(features) if image_states is None else len(image_states.index))
            rows = self._of_new_tokens(images, is_image, num_past)
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

    def _of_new_tokens(self, images, is_image: torch.Tensor, num_past: int) -> list[list]:
        """Each row's images (pixels or numbers) beyond the cache, from those of all images or of these alone."""
        length = self.config.image_seq_length
        num_images = (is_image.sum(dim=1) // length).tolist()
        num_cached = (is_image[:, :num_past].sum(dim=1) // length).tolist()
        passes_all = len(images) == sum(num_images)
        if not passes_all and len(images) != sum(num_images) - sum(num_cached):
            raise ValueError(
                f"The tokens hold {sum(num_images)} images, {sum(num_cached)} of them in the cache; {len(images)} "
                f"were passed. Pass all {sum(num_images)}, or the {sum(num_images) - sum(num_cached)} new ones."
            )
        rows, start = [], 0
        for total, cached in zip(num_images, num_cached):
            num_passed = total if passes_all else total - cached
            rows.append(list(images[start : start + num_passed])[num_passed - (total - cached) :])
            start += num_passed
        return rows

    def create_masks_for_generate(self, config, attention_mask, **kwargs):
        """MMCA needs the modality of the past too, so `prepare_inputs_for_generation` makes its masks afterwards."""
        if self.config.attention_type == "mmca":
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
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if embeds is None and num_queries > 1 and (mm_encoder_outputs or image_states):
            # By what the tokens hold, not by the iteration: an assistant model is never told of a first one.
            has_images = bool((ids == self.config.image_token_id).any())
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs if has_images else None
            model_inputs["image_states"] = image_states if has_images else None
        elif embeds is not None and image_states is not None:
            model_inputs["image_states"] = image_states
        if self.config.attention_type != "mmca":
            return model_inputs

        if input_ids.shape[1] == num_past + num_queries:
            mm_token_type_ids = (input_ids == self.config.image_token_id).long()
        elif mm_token_type_ids is not None:
            # Drafted and generated tokens are text.
            num_missing = num_past + num_queries - mm_token_type_ids.shape[1]
            mm_token_type_ids = nn.functional.pad(mm_token_type_ids, (0, max(num_missing, 0)))
            mm_token_type_ids = mm_token_type_ids[:, : num_past + num_queries]
        if isinstance(past_key_values, Cache) and past_key_values.is_compileable and mm_token_type_ids is not None:
            shape = torch.empty((mm_token_type_ids.shape[0], num_queries, 0), dtype=self.dtype, device=self.device)
            model_inputs["attention_mask"] = create_mmca_masks(
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


def _num_shared(old: list[list], new: list[list]) -> int:
    """How many positions of a cache serve a new conversation: up to the first change, and short of its last token."""
    num_shared = min(len(old[0]), len(new[0]) - 1) if len(old) == len(new) else 0
    for old_row, new_row in zip(old, new):
        changes = (place for place in range(num_shared) if old_row[place] != new_row[place])
        num_shared = next(changes, num_shared)
    # Never from the middle of an image.
    while num_shared > 0 and any(isinstance(row[num_shared], tuple) and row[num_shared][1] > 0 for row in new):
        num_shared -= 1
    return num_shared
