"""
What generation with images needs beyond transformers' `GenerationMixin`.

MMCA has to know which of the past and current tokens are images. The model's forward takes `mm_token_type_ids` for all
of them, as it takes `attention_mask`; here they are rebuilt in every step from the ids, whatever the cache. Images are
encoded once, before the first step. Of a conversation that goes on with its cache, only the images of the new tokens
are used.
"""

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .attention_visualchat import create_mmca_masks


class VisualChatGenerationMixin(GenerationMixin):
    """Generation for [`VisualChatForConditionalGeneration`]."""

    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """
        See `GenerationMixin.generate`; images are passed as `pixel_values`.

        A conversation that goes on with its cache (`past_key_values`) takes all the tokens so far, and either all the
        images so far or those of the new tokens alone.
        """
        embeds, has_images = kwargs.get("inputs_embeds"), kwargs.keys() & {"pixel_values", "mm_encoder_outputs"}
        if embeds is not None and has_images and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = self.model.get_placeholder_mask(None, embeds).long()
        return super().generate(inputs, **kwargs)

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
        if encoder_outputs and encoder_outputs.get("image") is not None:
            is_image = self._image_positions(input_ids, model_kwargs)
            features = self._features_of_new_tokens(encoder_outputs["image"].pooler_output, is_image, model_kwargs)
            repeated = [feature for row in features for _ in range(expand_size) for feature in row]
            encoder_outputs = {"image": BaseModelOutputWithPooling(pooler_output=repeated)} if repeated else None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoder_outputs:
            model_kwargs["mm_encoder_outputs"] = encoder_outputs
        return input_ids, model_kwargs

    def _image_positions(self, input_ids: torch.Tensor | None, model_kwargs: dict) -> torch.Tensor:
        if input_ids is not None and input_ids.numel() > 0:
            return input_ids == self.config.image_token_id
        return model_kwargs["mm_token_type_ids"].bool()

    def _features_of_new_tokens(
        self, features, is_image: torch.Tensor, model_kwargs: dict
    ) -> list[list[torch.Tensor]]:
        """The features of each row's images beyond the cache, from those of all images or of these alone."""
        cache = model_kwargs.get("past_key_values")
        num_past = 0 if cache is None else int(cache.get_seq_length())
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and is_image.shape[1] < attention_mask.shape[1]:
            num_past = 0  # only the new tokens were passed
        length = self.config.image_seq_length
        num_images = (is_image.sum(dim=1) // length).tolist()
        num_cached = (is_image[:, :num_past].sum(dim=1) // length).tolist()
        passes_all = len(features) == sum(num_images)
        if not passes_all and len(features) != sum(num_images) - sum(num_cached):
            raise ValueError(
                f"The tokens hold {sum(num_images)} images, {sum(num_cached)} of them in the cache; {len(features)} "
                f"were passed. Pass all {sum(num_images)}, or the {sum(num_images) - sum(num_cached)} new ones."
            )
        rows, start = [], 0
        for total, cached in zip(num_images, num_cached):
            num_passed = total if passes_all else total - cached
            rows.append(list(features[start : start + num_passed])[num_passed - (total - cached) :])
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
        if embeds is None and num_queries > 1 and mm_encoder_outputs:
            # By what the tokens hold, not by the iteration: an assistant model is never told of a first one.
            has_images = bool((ids == self.config.image_token_id).any())
            model_inputs["mm_encoder_outputs"] = mm_encoder_outputs if has_images else None
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
