"""Image features: from pixels, through the vision tower and the projector, to what the decoder reads."""

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import select_hidden_states

from .image_states_visualchat import ImageStates, same_images
from .vision_cache_visualchat import VisionFeatureCache
from .weights_key_visualchat import has_dropout


class ImageFeaturesMixin:
    """The part of [`VisualChatModel`] before the decoder."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    vision_cache: VisionFeatureCache | None = None

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Encodes and projects images.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): Preprocessed pixels.
            vision_feature_layer (`int` or `list[int]`, *optional*): Overrides the configuration.
            vision_feature_select_strategy (`str`, *optional*): Overrides the configuration.

        Returns:
            The output of the vision tower, its `pooler_output` a list with one tensor
            `(image_seq_length, text hidden)` an image. With a `vision_cache`, only `pooler_output` is set.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        layers = [layer] if isinstance(layer, int) else layer
        cache = None if pixel_values.requires_grad or kwargs else self.vision_cache
        if cache is not None and cache.supports(self.vision_tower):
            features = cache.get_features(self, pixel_values, layers, strategy)
            outputs = BaseModelOutputWithPooling(last_hidden_state=None)
        else:
            outputs, features = self.run_vision_tower(pixel_values, layers, strategy, **kwargs)
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def encode_images(self, pixel_values: torch.Tensor, **kwargs) -> ImageStates:
        """The projected features of images, equal ones computed once; takes what [`get_image_features`] takes."""
        differs = has_dropout(self.vision_tower) or pixel_values.requires_grad
        index = list(range(len(pixel_values))) if differs else same_images(pixel_values)
        first = [index.index(number) for number in range(max(index) + 1)]
        unique = pixel_values if len(first) == len(pixel_values) else pixel_values[first]
        features = torch.stack(self.get_image_features(unique, **kwargs).pooler_output)
        return ImageStates(features, index, pixel_values=unique)

    def run_vision_tower(self, pixel_values: torch.Tensor, layers: list[int], strategy: str, **kwargs) -> tuple:
        """
        Takes images (N, channels, height, width) through the vision tower, without a graph where it is frozen.

        Returns:
            Its output, and the features `(N, length, layers x vision hidden)` of the layers; a strategy `"default"`
            leaves out the first token.
        """
        is_frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (pixel_values.requires_grad or not is_frozen)):
            outputs = self._run_vision_tower(pixel_values, vision_feature_layer=layers, **kwargs)
        features = torch.cat([outputs.hidden_states[index] for index in layers], dim=-1)
        return outputs, features[:, 1:] if strategy == "default" else features

    @select_hidden_states("vision_feature_layer")
    def _run_vision_tower(self, pixel_values: torch.Tensor, vision_feature_layer: list[int], **kwargs):
        return self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)

    def resolve_images(
        self,
        pixel_values=None,
        mm_encoder_outputs=None,
        image_states=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
    ) -> ImageStates | None:
        """The [`ImageStates`] of a call, from the one form in which images were passed; `None` without images."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (pixel_values, encoded, image_states)) > 1:
            raise ValueError('Pass only one of pixel_values, mm_encoder_outputs["image"] and image_states.')
        if pixel_values is not None and len(pixel_values) > 0:
            return self.encode_images(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        if encoded is not None and len(encoded.pooler_output) > 0:
            features = torch.stack(list(encoded.pooler_output))
            return ImageStates(features, list(range(len(features))))
        return image_states
