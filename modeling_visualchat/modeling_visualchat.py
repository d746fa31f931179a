"""VisualChat: a vision tower, a projector and a causal language model, joined by multi-modal causal attention."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .attention_types_visualchat import get_attention_type, kernel_of
from .cache_visualchat import is_conversation_cache
from .chat_session_visualchat import ChatSession
from .configuration_visualchat import VisualChatConfig
from .generation_visualchat import VisualChatGenerationMixin
from .hub_visualchat import push_repository
from .image_features_visualchat import ImageFeaturesMixin
from .image_memory_visualchat import ImageMemory
from .image_states_visualchat import ImageStates
from .outputs_visualchat import VisualChatCausalLMOutputWithPast, VisualChatModelOutputWithPast
from .parts_visualchat import (
    build_vision_tower,
    image_shape,
    load_language_model,
    load_vision_tower,
    placeholder_token_id,
    vision_sequence_length,
)
from .plan_visualchat import find_packed
from .projector_visualchat import projector_class
from .route_visualchat import ROUTES, DecoderInputs, is_finished_mask, masked_route_reason, num_past
from .trainable_parts_visualchat import image_path_parameters, train_only
from .two_streams_visualchat import TwoStreamMixin
from .weights_key_visualchat import freeze, is_quantized


logger = logging.get_logger(__name__)


class VisualChatPreTrainedModel(PreTrainedModel):
    """The base of both models: initialisation, kernels, routes and pushing to the Hub."""

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

    def post_init(self):
        super().post_init()
        # CLIP names layers of its text model too, and FSDP refuses the name of a layer that is not there.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Of modules of our own, whose parameters are not those of a layer that transformers knows.
        if (init_own_parameters := getattr(module, "init_own_parameters", None)) is not None:
            init_own_parameters()

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """
        Sets the attention kernel of both towers, or of each by a `dict` with `"vision_config"` and `"text_config"`.
        The attention type of the language model stays; a `ValueError` names a kernel on which it is not available.
        """
        attention_type = get_attention_type(self.config)
        requested: Any = attn_implementation
        if attention_type.kernels:
            if not isinstance(requested, dict):
                kernel = kernel_of(requested)
                requested = {"": kernel, "vision_config": kernel, "text_config": kernel}
            if "text_config" in requested:
                requested = {**requested, "text_config": attention_type.implementation(requested["text_config"])}
        super().set_attn_implementation(requested, allow_all_kernels=allow_all_kernels)

    def set_route(self, route: str) -> None:
        """
        Asks for a route through the decoder, for comparison; both give the same result.

        Args:
            route (`str`): `"auto"` (two streams wherever possible, the default), `"two_streams"` (an error where it is
                not possible) or `"masked"`.
        """
        if route not in ROUTES:
            raise ValueError(f"Unknown route {route!r}; choose one of {', '.join(ROUTES)}.")
        model: Any = getattr(self, "model", self)
        model.route = route

    def freeze(self) -> None:
        """
        For a server: declares that the weights stay as they are, so that an image memory, a cache of vision features
        and chat sessions take their checksum once. In-place changes and loading are still noticed; fused optimizers
        and writes through `.data` are not.
        """
        model: Any = getattr(self, "model", self)
        freeze(model)
        freeze(model.vision_tower)

    def save_pretrained(self, save_directory, **kwargs):
        """
        As in `PreTrainedModel.save_pretrained`; the configurations of the parts say their dtype too, and a sharded
        model is saved as any other.
        """
        if getattr(self, "hf_quantizer", None) is None and any(map(is_quantized, self.parameters())):
            raise ValueError(
                "The language model was quantized on its own, and would not be loaded so. Save the model before it is "
                "quantized, and load the whole of it with a quantization_config."
            )
        for part in (self.config.vision_config, self.config.text_config):
            part.dtype = self.dtype
        state_dict = kwargs.get("state_dict") or {}
        for tied, source in self.all_tied_weights_keys.items():
            if tied in state_dict:  # gathered tensors no longer share memory
                state_dict.setdefault(source, state_dict.pop(tied))
        if any(hasattr(each, "ds_id") for each in self.parameters()):
            # Loading with ZeRO-3 keeps renamings that it did not need, and saving would revert them.
            kwargs["save_original_format"] = False
        # FSDP2 gives the model a class of its own, for which there is no code in the checkpoint.
        sharded_class = type(self)
        self.__class__ = next(each for each in sharded_class.__mro__ if not each.__name__.startswith("FSDP"))
        try:
            return super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = sharded_class

    def push_to_hub(self, repo_id: str, *, processor=None, card: str | None = None, **kwargs) -> str:
        """
        Uploads the model to the Hub; with a processor, one complete repository in one commit.

        Args:
            repo_id (`str`): Repository, as in `"user/name"`.
            processor (`VisualChatProcessor`, *optional*): The processor of the model.
            card (`str`, *optional*): Path of the model card to upload as README.md. By default it is the one beside
                the checkpoint, if the model was loaded from a folder and not changed since; else the one that the
                repository has, or a new one.
            kwargs: As in `PreTrainedModel.push_to_hub`.

        Returns:
            `str`: the URL of the commit.
        """
        if processor is None:
            return super().push_to_hub(repo_id, **kwargs)
        return push_repository(self, processor, repo_id, card=card, **kwargs)


class VisualChatModel(ImageFeaturesMixin, TwoStreamMixin, VisualChatPreTrainedModel):
    """
    The vision tower, the projector and the language model without its head.

    Attributes:
        vision_cache ([`VisionFeatureCache`], *optional*): Caches the features of a frozen vision tower.
        route (`str`): See [`set_route`].
    """

    route: str = "auto"

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        attention_type = get_attention_type(config)
        attention_type.check_decoder(config.text_config)
        self.vision_tower = build_vision_tower(config.vision_config)
        self.multi_modal_projector = projector_class(config.projector_type)(config)
        # Before the decoder is built, so that no way of loading leaves it with a plain kernel.
        self._choose_attention(config.text_config)
        self.language_model = AutoModel.from_config(config.text_config)
        if attention_type.added_layers is not None:
            self.add_module(attention_type.added_layers.part, attention_type.added_layers.build(config))
        self.post_init()

    def _choose_attention(self, text_config) -> None:
        """Keeps the attention type of the decoder, whichever kernel was asked for and in whichever way."""
        attention_type = get_attention_type(self.config)
        text_config._attn_implementation = attention_type.implementation(text_config._attn_implementation)

    def add_layers(self, dtype: torch.dtype) -> None:
        """Adds the layers of the attention type, if it has any, with new weights in a dtype."""
        added_layers = get_attention_type(self.config).added_layers
        if added_layers is not None:
            added = added_layers.build(self.config).to(dtype)
            added.apply(self._init_weights)
            self.add_module(added_layers.part, added)

    def get_placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Where the image tokens (B, Q) are, from the ids or, without ids, from embeddings equal to the placeholder's.

        Raises:
            `ValueError`: the number of placeholders is not the number of rows of `image_features`, if given.
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
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: Any = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_states: ImageStates | None = None,
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
                0 for text, 1 for image, past tokens included. Required with a past; otherwise derived from the ids.
            mm_encoder_outputs (`dict`, *optional*): Features under `"image"`, as [`get_image_features`] returns them.
            image_states (`ImageStates`, *optional*): The images as [`compute_image_states`] returns them, instead of
                pixels.

        Returns:
            [`VisualChatModelOutputWithPast`]

        Raises:
            `ValueError`: inputs that contradict each other, or a past of unknown modality.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if self.config.output_attentions:  # the decoder reads its own configuration
            kwargs.setdefault("output_attentions", True)
        options = (vision_feature_layer, vision_feature_select_strategy)
        image_states = self.resolve_images(pixel_values, mm_encoder_outputs, image_states, *options)
        blank_features = self._blank_features(past_key_values) if image_states is None else None
        image_features = None if image_states is None else image_states.expand(image_states.features)
        is_image: Any = None
        if input_ids is not None or image_features is not None:
            is_image = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
        embeds = self._embed(input_ids, is_image, image_features) if inputs_embeds is None else inputs_embeds
        if image_states is None and (self.training or blank_features is not None):
            embeds = self._add_zero_of_images(embeds, blank_features)
        sequence_ids = find_packed(embeds, attention_mask, position_ids)
        if past_key_values is None and (self.training or sequence_ids is not None):
            # The cache is unused in training, and packed rows hold no single conversation to continue; with a cache,
            # a decoder would not tell their sequences apart.
            kwargs["use_cache"] = kwargs.get("use_cache", False) and self.training
        self._choose_attention(self.language_model.config)
        if get_attention_type(self.config).needs_token_types and not is_finished_mask(attention_mask):
            mm_token_type_ids = self._complete_mm_token_type_ids(
                mm_token_type_ids, is_image, past_key_values, embeds.shape[1]
            )
        inputs = DecoderInputs(
            input_ids=input_ids,
            embeds=embeds,
            is_image=is_image,
            mm_token_type_ids=mm_token_type_ids,
            image_states=image_states,
            blank_features=blank_features,
            sequence_ids=sequence_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            kwargs=kwargs,
        )
        outputs = self._run_decoder(inputs)
        return VisualChatModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _run_decoder(self, inputs: DecoderInputs) -> BaseModelOutputWithPast:
        """
        Runs the decoder on one of the two routes, or as its attention type does, and records the tokens in a
        [`ConversationCache`].
        """
        added_layers = get_attention_type(self.config).added_layers
        if added_layers is None:
            run = self._forward_two_streams if self._takes_two_streams(inputs) else self._forward_masked
            outputs = run(inputs)
        elif self.route == "auto":
            outputs = added_layers.run(self, inputs)
        else:
            raise ValueError(
                f"The route {self.route!r} was asked for, and attention_type={self.config.attention_type!r} has one "
                'of its own; set_route("auto") takes it.'
            )
        if is_conversation_cache(outputs.past_key_values):
            has_mask = isinstance(inputs.attention_mask, torch.Tensor) and inputs.attention_mask.ndim == 2
            attention_mask = inputs.attention_mask if has_mask else None
            shape, past = inputs.embeds.shape[:2], outputs.past_key_values.get_seq_length()
            is_image = torch.zeros(shape, dtype=torch.bool) if inputs.is_image is None else inputs.is_image
            position_ids = inputs.position_ids
            if position_ids is None:
                position_ids = torch.arange(past, past + shape[1])[None]
            images = inputs.image_states
            outputs.past_key_values.note(
                inputs.input_ids, position_ids.expand(shape), is_image, attention_mask, images
            )
        return outputs

    def _takes_two_streams(self, inputs: DecoderInputs) -> bool:
        if self.route == "masked":
            return False
        reason = masked_route_reason(self, inputs)
        if reason is not None and self.route == "two_streams":
            raise ValueError(f'The route "two_streams" was asked for, and is not possible: {reason}.')
        is_told = get_attention_type(self.config).two_streams is not None
        if reason is not None and is_told and not torch.compiler.is_compiling():
            logger.warning_once(f"VisualChat takes the masked route through the decoder: {reason}.")
        return reason is None

    def _forward_masked(self, inputs: DecoderInputs) -> BaseModelOutputWithPast:
        """Runs the decoder once over text and images, with the masks of the attention type or its own."""
        embeds, attention_mask = inputs.embeds, inputs.attention_mask
        self._note_tokens(embeds)
        if is_conversation_cache(inputs.past_key_values):
            inputs.past_key_values.interleave()
        if self._needs_masks(attention_mask):
            create_masks: Any = get_attention_type(self.config).create_masks
            attention_mask = create_masks(
                self.config,
                embeds,
                inputs.mm_token_type_ids,
                attention_mask,
                inputs.past_key_values,
                inputs.position_ids,
            )
        if inputs.image_states is not None:
            features = inputs.image_states.expand(inputs.image_states.features).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(inputs.is_image.unsqueeze(-1), features)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=inputs.past_key_values,
            **inputs.kwargs,
        )

    def _needs_masks(self, attention_mask: Any) -> bool:
        """Whether the attention type has masks of its own, and they are not finished yet."""
        has_masks = get_attention_type(self.config).create_masks is not None
        return has_masks and not is_finished_mask(attention_mask)

    def _embed(self, input_ids, is_image, image_features) -> torch.Tensor:
        """Embeddings (B, Q, hidden), not yet meaningful at images."""
        # Not in every step on a GPU, which would have to wait.
        if image_features is None and (input_ids.shape[1] > 1 or input_ids.device.type == "cpu"):
            torch_compilable_check(
                ~is_image.any(),
                "The text holds image tokens, but there are no images. Pass pixel_values, as the processor "
                "returns them.",
            )
        # The placeholder's own embedding is never read, so its id may even lie outside the table.
        return self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))

    def _needs_an_image(self, past_key_values: Cache | None) -> bool:
        """Whether the vision tower has to run although there are no images."""
        if not torch.distributed.is_initialized():
            return False
        # With ZeRO-3 and FSDP2 also in evaluation; no rank has images beyond the first step of generation.
        marks = ("ds_id", "device_mesh")
        is_sharded = any(hasattr(each, mark) for each in self.vision_tower.parameters() for mark in marks)
        return self.training or (is_sharded and num_past(past_key_values) == 0)

    def _blank_features(self, past_key_values: Cache | None) -> torch.Tensor | None:
        """
        The features of a blank image for a call without images, where the vision tower has to run: every rank runs the
        same modules in the same order, since sharded parameters are gathered together. It adds exactly zero.
        """
        if not self._needs_an_image(past_key_values):
            return None
        shape = image_shape(self.config.vision_config)
        blank = torch.zeros(1, *shape, device=self.device, dtype=self.vision_tower.dtype)
        return self.get_image_features(blank).pooler_output[0]

    def _add_zero_of_images(self, embeds: torch.Tensor, blank_features: torch.Tensor | None) -> torch.Tensor:
        """
        The same embeddings, but dependent on the trained parameters that only images reach. In a step without images,
        their gradients are then zero, on one process as on several, not missing: optimizers skip what has no gradient.
        """
        reached = image_path_parameters(self) if blank_features is None else [blank_features]
        return embeds + sum(0.0 * each.sum().to(embeds.device) for each in reached)

    def _complete_mm_token_type_ids(self, mm_token_type_ids, is_image, past_key_values, num_queries):
        """The modality of past and current tokens: as given, or derived from the ids when there is no past."""
        num_cached = num_past(past_key_values)
        if mm_token_type_ids is None:
            if num_cached > 0 or is_image is None:
                unknown = f"for the {num_cached} tokens in the cache" if num_cached else "from embeddings"
                raise ValueError(
                    f"Which tokens are images cannot be told {unknown}: pass mm_token_type_ids of shape "
                    f"(batch, {num_cached + num_queries}), 0 for text and 1 for image, covering past and current "
                    "tokens as attention_mask does."
                )
            return is_image.long()
        if mm_token_type_ids.shape[1] != num_cached + num_queries:
            raise ValueError(
                f"mm_token_type_ids covers {mm_token_type_ids.shape[1]} tokens; it has to cover the {num_cached} "
                f"tokens in the cache and the {num_queries} current ones, as attention_mask does."
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

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.model = VisualChatModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        table = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
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
        if "image_seq_length" not in config_kwargs:
            num_tokens = vision_sequence_length(vision, vision_tower.config)
            skips_first = config_kwargs.get("vision_feature_select_strategy") == "default"
            if config_kwargs.get("projector_type") != "perceiver":  # whose queries are as many for every tower
                config_kwargs["image_seq_length"] = num_tokens - skips_first
        config = cls.config_class(
            vision_config=vision_tower.config,
            text_config=causal_lm.config,
            image_token_id=image_token_id,
            **config_kwargs,
        )
        with torch.device("meta"):
            model = cls(config)
        projector = projector_class(config.projector_type)(config).to(dtype)
        projector.apply(model._init_weights)
        model.model.add_layers(dtype)
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
        Sets the trainable modules; everything else is frozen.

        Args:
            parts (`str`): Any of `"vision_tower"`, `"multi_modal_projector"`, `"language_model"` (its embeddings
                included), `"input_embeddings"`, `"lm_head"`, and with that attention type `"cross_attention"`. By
                default the projector and the input embeddings, as in arXiv 2309.14327, and the cross-attention. Tied
                embeddings are one table: to train the input is to train the output.

        Raises:
            `ValueError`: an unknown part.
        """
        train_only(self, parts)
        return self

    def start_chat(self, processor, image_memory: ImageMemory | None = None, **generate_kwargs) -> ChatSession:
        """See [`ChatSession`]."""
        return ChatSession(self, processor, image_memory, **generate_kwargs)

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
        if skip_logits is None:
            skip_logits = self.training and isinstance(logits_to_keep, int) and logits_to_keep == 0
        targets = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
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
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if targets is not None and skip_logits:
            is_target = targets != -100
            states, targets = states[is_target.to(states.device)], targets[is_target]
        else:
            states = slice_logits_to_keep(states, logits_to_keep)
        logits = self._scale_logits(self.lm_head(states))
        return VisualChatCausalLMOutputWithPast(
            loss=None if targets is None else self._compute_loss(logits, targets, **kwargs),
            logits=None if targets is not None and skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _compute_loss(self, logits: torch.Tensor, targets: torch.Tensor, **kwargs) -> torch.Tensor:
        """Next-token cross-entropy over the targets that are not -100; in training zero for an empty batch."""
        is_checked = self.training and not torch.compiler.is_compiling()
        if is_checked and not bool((targets != -100).any()):
            return logits[:0].float().sum()
        return self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets.to(logits.device),
            vocab_size=self.config.text_config.vocab_size,
            **kwargs,
        )

    def _scale_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The scaling of logits in some decoders (Gemma, Granite, Cohere), from their configuration."""
        text_config = self.config.text_config
        if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(text_config, "logit_scale", None)) is not None:
            logits = logits * factor
        return logits


VisualChatModel.register_for_auto_class("AutoModel")
VisualChatForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VisualChatForConditionalGeneration", "VisualChatModel", "VisualChatPreTrainedModel"]
