"""VisualChat: a vision tower, a projector and a causal language model, joined by multi-modal causal attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, torch_compilable_check
from transformers.utils.output_capturing import select_hidden_states

from .attention_visualchat import (
    MMCA_PREFIX,
    check_coverage,
    check_decoder,
    create_mmca_masks,
    mmca_implementation,
)
from .cache_visualchat import keeps_apart
from .configuration_visualchat import VisualChatConfig
from .generation_visualchat import VisualChatGenerationMixin
from .hub_visualchat import push_repository
from .image_states_visualchat import ImageStates, has_dropout, same_images
from .parts_visualchat import (
    image_shape,
    load_language_model,
    load_vision_tower,
    placeholder_token_id,
    vision_sequence_length,
)
from .projector_visualchat import PROJECTORS, PerceiverProjector
from .streams_visualchat import TwoStreamMixin, find_packed
from .vision_cache_visualchat import VisionFeatureCache


# Parts that `set_trainable` knows, and where they live in `VisualChatForConditionalGeneration`.
TRAINABLE_PARTS = {
    "vision_tower": lambda model: model.model.vision_tower,
    "multi_modal_projector": lambda model: model.model.multi_modal_projector,
    "language_model": lambda model: model.model.language_model,
    "input_embeddings": lambda model: model.get_input_embeddings(),
    "lm_head": lambda model: model.lm_head,
}


@dataclass
class VisualChatModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`VisualChatModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, text hidden)`, *optional*):
            The projected features of the images of this call.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VisualChatCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`VisualChatForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Next-token cross-entropy over the labels that are not -100; in training zero if all are.
        logits (`torch.Tensor` of shape `(B, Q, vocabulary)`, *optional*):
            Scores before the softmax, at the positions that `logits_to_keep` asks for; none with `skip_logits`.
        past_key_values (`Cache`, *optional*):
            Keys and values of every layer; the layers of a [`ConversationCache`] hold those of text alone.
        hidden_states (`tuple[torch.Tensor]`, *optional*):
            Hidden states of the language model, each (B, Q, text hidden).
        attentions (`tuple[torch.Tensor]`, *optional*):
            Attention weights of the `eager` kernel, each (B, H, Q, S); the two softmaxes of MMCA summed.
        image_hidden_states (`torch.Tensor` of shape `(images, image_seq_length, text hidden)`, *optional*):
            The projected features of the images of this call.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class VisualChatPreTrainedModel(PreTrainedModel):
    """What both models share: weights, kernels and pushing to the Hub."""

    config_class = VisualChatConfig
    config: VisualChatConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PerceiverProjector):
            init.normal_(module.queries, std=0.02)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """
        Picks the attention kernel of both towers, or of each by a `dict` with `"vision_config"` and `"text_config"`.
        The mathematics stays: with `attention_type="mmca"` the language model computes MMCA on the kernel chosen.

        Raises:
            `ValueError`: a kernel on which MMCA is not available.
        """
        requested: Any = attn_implementation
        if self.config.attention_type == "mmca":
            if not isinstance(requested, dict):
                kernel = requested.removeprefix(MMCA_PREFIX)
                requested = {"": kernel, "vision_config": kernel, "text_config": kernel}
            if "text_config" in requested:
                requested = {**requested, "text_config": mmca_implementation(requested["text_config"])}
        super().set_attn_implementation(requested, allow_all_kernels=allow_all_kernels)

    def save_pretrained(self, save_directory, **kwargs):
        """As in `PreTrainedModel.save_pretrained`; the configurations of the parts say their dtype too."""
        for part in (self.config.vision_config, self.config.text_config):
            part.dtype = self.dtype
        return super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, *, processor=None, card: str | None = None, **kwargs) -> str:
        """
        Uploads the model to the Hub; with a processor, one complete repository in one commit.

        Args:
            repo_id (`str`): Repository, as in `"user/name"`.
            processor (`VisualChatProcessor`, *optional*): The processor of the model.
            card (`str`, *optional*): Path of the model card to upload as README.md; by default our own.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`,
                `max_shard_size` and `tags`, as in `PreTrainedModel.push_to_hub`.

        Returns:
            `str`: the address of the commit.
        """
        if processor is None:
            return super().push_to_hub(repo_id, **kwargs)
        return push_repository(self, processor, repo_id, card=card, **kwargs)


class VisualChatModel(TwoStreamMixin, VisualChatPreTrainedModel):
    """
    The vision tower, the projector and the language model without its head.

    Attributes:
        vision_cache ([`VisionFeatureCache`], *optional*): Keeps what a frozen vision tower makes of images.
    """

    vision_cache: VisionFeatureCache | None = None

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        if config.attention_type == "mmca":
            check_decoder(config.text_config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config)
        # Before the decoder is built, so that no way of loading leaves it with a plain kernel.
        self._choose_attention(config.text_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _choose_attention(self, text_config) -> None:
        """Whatever kernel was asked for, and by whatever way, the attention stays of `config.attention_type`."""
        implementation = text_config._attn_implementation
        if self.config.attention_type == "mmca":
            if implementation is None or not implementation.startswith(MMCA_PREFIX):
                text_config._attn_implementation = mmca_implementation(implementation)
        elif implementation is not None and implementation.startswith(MMCA_PREFIX):
            text_config._attn_implementation = implementation.removeprefix(MMCA_PREFIX)

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
            `(image_seq_length, text hidden)` an image. Images that are the same are computed once, and share it. With
            a `vision_cache` there is only that.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        kwargs.pop("return_dict", None)
        layers = [layer] if isinstance(layer, int) else layer
        differs = has_dropout(self.vision_tower) or pixel_values.requires_grad
        number = list(range(len(pixel_values))) if differs else same_images(pixel_values)
        first = [number.index(image) for image in range(max(number, default=-1) + 1)]
        if len(first) < len(pixel_values):
            pixel_values = pixel_values[torch.tensor(first, device=pixel_values.device)]
        cache = None if pixel_values.requires_grad or kwargs else self.vision_cache
        if cache is not None and cache.serves(self.vision_tower):
            features = cache.read(self, pixel_values, layers, strategy)
            outputs = BaseModelOutputWithPooling(last_hidden_state=None)
        else:
            outputs, features = self.run_vision_tower(pixel_values, layers, strategy, **kwargs)
        projected = list(self.multi_modal_projector(features))
        if len(first) < len(number) and outputs.hidden_states is not None:
            index = torch.tensor(number, device=features.device)
            outputs.last_hidden_state = outputs.last_hidden_state[index]
            outputs.hidden_states = tuple(
                None if states is None else states[index] for states in outputs.hidden_states
            )
        outputs.pooler_output = [projected[image] for image in number]
        return outputs

    def run_vision_tower(self, pixel_values: torch.Tensor, layers: list[int], strategy: str, **kwargs) -> tuple:
        """
        Takes different images through the vision tower.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels.
            layers (`list[int]`): The layers that are read.
            strategy (`str`): `"full"`, or `"default"` to leave out the first token.

        Returns:
            The output of the vision tower, and the features `(N, length, layers x vision hidden)`.
        """
        is_frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and (pixel_values.requires_grad or not is_frozen)):
            outputs = self._run_vision_tower(pixel_values, vision_feature_layer=layers, **kwargs)
        features = torch.cat([outputs.hidden_states[index] for index in layers], dim=-1)
        return outputs, features[:, 1:] if strategy == "default" else features

    @select_hidden_states("vision_feature_layer")
    def _run_vision_tower(self, pixel_values: torch.Tensor, vision_feature_layer: list[int], **kwargs):
        return self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Where the image tokens are, from the ids or, without ids, from embeddings equal to the placeholder's.

        Args:
            input_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Token ids.
            inputs_embeds (`torch.Tensor` of shape `(B, Q, hidden)`, *optional*): Read when there are no ids.
            image_features (`torch.Tensor` of shape `(images, image_seq_length, hidden)`, *optional*):
                When given, its number of rows has to match.

        Returns:
            `torch.Tensor` of shape `(B, Q)`, `True` at image tokens.

        Raises:
            `ValueError`: the number of placeholders is not the number of feature rows.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        elif inputs_embeds is None or self.config.image_token_id >= self.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"Without input_ids, image tokens are those with the embedding of id {self.config.image_token_id}, "
                "and there is none; pass input_ids."
            )
        else:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(dim=-1)
        if image_features is not None:
            num_rows = image_features.shape[0] * image_features.shape[1]
            torch_compilable_check(
                mask.sum() == num_rows,
                lambda: (
                    f"The text holds {int(mask.sum())} image tokens, the images give {num_rows}. One image takes "
                    f"{self.config.image_seq_length} tokens (config.image_seq_length); build text and pixel_values "
                    "with one call of the processor, and pass only the images of the new tokens."
                ),
            )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: Any = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_states: ImageStates | None = None,
        skip_image_outputs: bool = False,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> VisualChatModelOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Token ids, or `inputs_embeds` instead.
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
                The images of these tokens, over the whole batch, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(B, past + Q)`, *optional*): 1 to keep, 0 for padding.
            position_ids (`torch.Tensor` of shape `(B, Q)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): Keys and values of the past.
            inputs_embeds (`torch.Tensor` of shape `(B, Q, hidden)`, *optional*): Instead of `input_ids`.
            mm_token_type_ids (`torch.Tensor` of shape `(B, past + Q)`, *optional*):
                0 for text, 1 for image, past tokens included. Needed with a past; otherwise read off the ids.
            mm_encoder_outputs (`dict`, *optional*): Features under `"image"`, as [`get_image_features`] returns them.
            image_states (`ImageStates`, *optional*): The images as [`read_images`] returns them, instead of pixels.
            skip_image_outputs (`bool`, *optional*, defaults to `False`): Nobody reads `last_hidden_state` at images;
                it may be zero there.

        Returns:
            [`VisualChatModelOutputWithPast`]

        Raises:
            `ValueError`: inputs that contradict each other, or a past of unknown modality.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (pixel_values, encoded, image_states)) > 1:
            raise ValueError('Pass only one of pixel_values, mm_encoder_outputs["image"] and image_states.')
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)
        if encoded is not None and len(encoded.pooler_output) > 0:
            image_states = ImageStates.of_features(list(encoded.pooler_output))
        blank_features = None
        if image_states is None and self._needs_an_image(past_key_values):
            # Every rank runs the same modules in the same order, also one whose batch has no image: sharded
            # parameters are gathered together. The blank image adds exactly zero.
            blank_features = self._features_of_a_blank_image()

        image_features = None if image_states is None else image_states.expand(image_states.features)
        is_image: Any = None
        if input_ids is not None or image_features is not None:
            is_image = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
        embeds = self._embed(input_ids, is_image, image_features) if inputs_embeds is None else inputs_embeds
        if blank_features is not None:
            embeds = embeds + 0.0 * blank_features.sum().to(embeds.device)
        sequence_ids = find_packed(embeds, attention_mask, position_ids)
        if past_key_values is None and (self.training or sequence_ids is not None):
            # Nobody reads the cache of a training step, and of packed rows there is no one conversation to go on with;
            # with a cache, a decoder would not tell them apart.
            kwargs["use_cache"] = kwargs.get("use_cache", False) and self.training
        self._choose_attention(self.language_model.config)
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        is_planned, needs_masks = False, self.config.attention_type == "mmca" and not _is_prepared(attention_mask)
        if needs_masks:
            mm_token_type_ids = self._complete_mm_token_type_ids(
                mm_token_type_ids, is_image, past_key_values, embeds.shape[1]
            )
            check_coverage(mm_token_type_ids, inputs["attention_mask"])
            is_planned = self._can_plan(embeds, kwargs, sequence_ids, **inputs)
        if is_planned:
            outputs = self._run_planned(
                embeds,
                mm_token_type_ids,
                image_states,
                blank_features,
                skip_image_outputs,
                sequence_ids,
                **inputs,
                **kwargs,
            )
        else:
            if keeps_apart(past_key_values):
                past_key_values.interleave()
            if needs_masks:
                masks = create_mmca_masks(self.config.text_config, embeds, mm_token_type_ids, **inputs)
                inputs["attention_mask"] = masks
            if image_features is not None:
                features = image_features.to(embeds.device, embeds.dtype)
                embeds = embeds.masked_scatter(is_image.unsqueeze(-1), features)
            outputs = self.language_model(inputs_embeds=embeds, **inputs, **kwargs)
        return VisualChatModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _embed(self, input_ids, is_image, image_features) -> torch.Tensor:
        """Embeddings (B, Q, hidden), at images of no meaning yet."""
        if image_features is None and input_ids.shape[1] > 1:
            torch_compilable_check(
                ~is_image.any(),
                "The text holds image tokens, but there are no images. Pass pixel_values, as the processor "
                "returns them.",
            )
        # The placeholder's own embedding is never read, so its id may even lie outside the table.
        return self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))

    def _needs_an_image(self, past_key_values: Cache | None) -> bool:
        """Whether the vision tower has to run without images all the same."""
        if self.training and torch.is_grad_enabled() and self._learns_from_images_alone():
            return True  # the loss has to hang together with what learns, as optimizers and samplers expect
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return False
        # Under ZeRO-3 also in evaluation; no rank has images beyond the first step of generation.
        is_sharded = hasattr(next(self.vision_tower.parameters()), "ds_id")
        return self.training or (is_sharded and _num_past(past_key_values) == 0)

    def _learns_from_images_alone(self) -> bool:
        """Whether only what images go through learns."""
        if any(parameter.requires_grad for parameter in self.language_model.parameters()):
            return False
        parts = (self.vision_tower, self.multi_modal_projector)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def _features_of_a_blank_image(self) -> torch.Tensor:
        shape = image_shape(self.config.vision_config)
        blank = torch.zeros(1, *shape, device=self.device, dtype=self.vision_tower.dtype)
        return self.get_image_features(blank).pooler_output[0]

    def _complete_mm_token_type_ids(self, mm_token_type_ids, is_image, past_key_values, num_queries):
        """The modality of past and current tokens: as given, or read off the current ones when there is no past."""
        num_past = _num_past(past_key_values)
        if mm_token_type_ids is None:
            if num_past > 0 or is_image is None:
                unknown = f"for the {num_past} tokens in the cache" if num_past else "from embeddings alone"
                raise ValueError(
                    f"Which tokens are images cannot be told {unknown}: pass mm_token_type_ids of shape "
                    f"(batch, {num_past + num_queries}), 0 for text and 1 for image, covering past and current tokens "
                    "as attention_mask does."
                )
            return is_image.long()
        if mm_token_type_ids.shape[1] != num_past + num_queries:
            raise ValueError(
                f"mm_token_type_ids covers {mm_token_type_ids.shape[1]} tokens; it has to cover the {num_past} tokens "
                f"in the cache and the {num_queries} current ones, as attention_mask does."
            )
        return mm_token_type_ids


class VisualChatForConditionalGeneration(VisualChatPreTrainedModel, VisualChatGenerationMixin):
    """
    VisualChat with its language model head: training, generation and chat.

    Example:

    ```python
    >>> from modeling_visualchat import VisualChatForConditionalGeneration
    >>> from processing_visualchat import VisualChatProcessor

    >>> model = VisualChatForConditionalGeneration.from_pretrained("checkpoint")
    >>> processor = VisualChatProcessor.from_pretrained("checkpoint")
    >>> messages = [{"role": "user", "content": [
    ...     {"type": "image", "path": "cat.png"}, {"type": "text", "text": "please describe the image."}]}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    >>> ids = model.generate(**inputs, max_new_tokens=50)
    >>> processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.model = VisualChatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        image_token_id: int | None = None,
        dtype: torch.dtype | None = None,
        **config_kwargs,
    ) -> "VisualChatForConditionalGeneration":
        """
        Joins a vision encoder and a language model. The projector is new; it and the input embeddings are trainable,
        all else is frozen (see [`set_trainable`]).

        Args:
            vision (`str` or `PreTrainedModel`): Name or folder of a checkpoint, or a loaded encoder.
            text (`str` or `PreTrainedModel`): Name or folder of a checkpoint, a `.gguf` file, or a loaded model.
            image_token_id (`int`, *optional*): Id of the placeholder; by default the one that `<image>` has, or is
                given, in the tokenizer of `text`. A loaded language model has no tokenizer and needs it.
            dtype (`torch.dtype`, *optional*): Of all weights; by default that of the language model.
            config_kwargs: Further fields of [`VisualChatConfig`]. The length of an image is by default what the
                encoder yields for an image of its image processor.

        Raises:
            `ValueError`: a decoder that cannot carry MMCA, one that is itself multi-modal, an output layer with a
                bias, or no `image_token_id` for a loaded language model.
        """
        causal_lm = load_language_model(text, dtype)
        dtype = causal_lm.dtype
        vision_tower = load_vision_tower(vision, dtype)
        lm_head = causal_lm.get_output_embeddings()
        if getattr(lm_head, "bias", None) is not None:
            raise ValueError(f"{type(causal_lm).__name__} has an output layer with a bias; VisualChat carries none.")
        if image_token_id is None:
            image_token_id = placeholder_token_id(text)
        if "image_seq_length" not in config_kwargs and config_kwargs.get("projector_type") != "perceiver":
            num_tokens = vision_sequence_length(vision, vision_tower.config)
            skips_first = config_kwargs.get("vision_feature_select_strategy") == "default"
            config_kwargs["image_seq_length"] = num_tokens - skips_first
        config = cls.config_class(
            vision_config=vision_tower.config,
            text_config=causal_lm.config,
            image_token_id=image_token_id,
            **config_kwargs,
        )
        with torch.device("meta"):
            model = cls(config)
        projector = PROJECTORS[config.projector_type](config).to(dtype)
        projector.apply(model._init_weights)
        causal_lm.config = config.text_config
        causal_lm.base_model.set_attn_implementation(config.text_config._attn_implementation)
        model.model.vision_tower = vision_tower
        model.model.multi_modal_projector = projector
        model.model.language_model = causal_lm.base_model
        model.lm_head = lm_head
        model.tie_weights()
        model.generation_config = causal_lm.generation_config
        if image_token_id >= config.text_config.vocab_size:
            model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        model.set_trainable()
        return model.eval()

    def set_trainable(self, *parts: str) -> "VisualChatForConditionalGeneration":
        """
        Names what learns; everything else is frozen.

        Args:
            parts (`str`): Any of `"vision_tower"`, `"multi_modal_projector"`, `"language_model"` (its embeddings
                included), `"input_embeddings"`, `"lm_head"`. By default the projector and the input embeddings, as in
                arXiv 2309.14327. Tied embeddings are one table: to train the input is to train the output.

        Raises:
            `ValueError`: an unknown part.
        """
        parts = parts or ("multi_modal_projector", "input_embeddings")
        if unknown := sorted(set(parts) - TRAINABLE_PARTS.keys()):
            raise ValueError(f"Unknown trainable part {', '.join(unknown)}; choose from {', '.join(TRAINABLE_PARTS)}.")
        self.requires_grad_(False)
        for part in parts:
            TRAINABLE_PARTS[part](self).requires_grad_(True)
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`VisualChatModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_states: ImageStates | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> VisualChatCausalLMOutputWithPast:
        """
        Takes what [`VisualChatModel.forward`] takes, and:

        Args:
            labels (`torch.Tensor` of shape `(B, Q)`, *optional*): The ids to predict, -100 where there is no loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): The last positions to score; 0 is all.
            skip_logits (`bool`, *optional*): With labels, score only the positions that have one, for the loss, and
                return no logits. By default so in training, unless `logits_to_keep` asks for some.

        Returns:
            [`VisualChatCausalLMOutputWithPast`]
        """
        targets = None
        if skip_logits is None:
            skip_logits = self.training and _keeps_all(logits_to_keep)
        if labels is not None and skip_logits:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        ids = mm_token_type_ids if input_ids is None else input_ids == self.config.image_token_id
        reads_images = ids is None or self._reads_images(ids.bool(), targets, logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            image_states=image_states,
            skip_image_outputs=not reads_images,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )
        if targets is not None:
            is_target = (targets != -100).to(outputs.last_hidden_state.device)
            hidden_states = outputs.last_hidden_state[is_target]
        else:
            hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self._scale_logits(self.lm_head(hidden_states))
        loss = None
        can_tell = self.training and not torch.compiler.is_compiling()
        if labels is not None and can_tell and not bool((labels[:, 1:] != -100).any()):
            loss = logits[:0].float().sum()  # zero, as of a batch of which nothing could be used
        elif targets is not None:
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=targets.to(is_target.device)[is_target],
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        elif labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VisualChatCausalLMOutputWithPast(
            loss=loss,
            logits=logits if targets is None else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    @staticmethod
    def _reads_images(is_image, targets, logits_to_keep) -> bool:
        """Whether the output at some image token is scored."""
        if targets is not None:
            return bool((is_image[:, -targets.shape[1] :] & (targets != -100).to(is_image.device)).any())
        if _keeps_all(logits_to_keep) or not isinstance(logits_to_keep, int):
            return True
        return bool(is_image[:, -logits_to_keep:].any())

    def _scale_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What some decoders (Gemma, Granite, Cohere) do to their logits, read off their configuration."""
        text_config = self.config.text_config
        if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(text_config, "logit_scale", None)) is not None:
            logits = logits * factor
        return logits


def _keeps_all(logits_to_keep: int | torch.Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


def _num_past(past_key_values: Cache | None) -> int:
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _is_prepared(attention_mask: torch.Tensor | dict[str, torch.Tensor] | None) -> bool:
    """Whether this is a finished mask already, as generation makes it for a cache of fixed size."""
    if attention_mask is None or isinstance(attention_mask, dict):
        return attention_mask is not None
    if attention_mask.ndim == 2:
        return False
    if attention_mask.ndim == 4 and attention_mask.shape[1] == 2:
        return True
    raise ValueError(
        "attention_mask must have shape (batch, tokens) with 1 to keep and 0 for padding, "
        f"got {tuple(attention_mask.shape)}."
    )


VisualChatModel.register_for_auto_class("AutoModel")
VisualChatForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VisualChatForConditionalGeneration", "VisualChatModel", "VisualChatPreTrainedModel"]
