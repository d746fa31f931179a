"""
The two-stream route through the decoder: images first, each on its own, then the text, which reads their keys and
values.

No work is done for image queries, with a sum nothing is masked, and an image that occurs twice is computed once. The
layers of the decoder are called twice in a forward pass, and so are hooks on them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_types_visualchat import get_attention_type
from .attention_visualchat import check_whole_images
from .cache_visualchat import ConversationCache, is_conversation_cache, plan_call
from .image_states_visualchat import ImageStates, ImageStream, run_image_stream
from .key_rotation_visualchat import DecoderProbe, probe_decoder, run_with_plan
from .placed_images_visualchat import place_images
from .plan_visualchat import IMAGE
from .route_visualchat import DecoderInputs, is_checkpointed, masked_route_reason


class TwoStreamMixin:
    """What [`VisualChatModel`] needs to take images and text through its decoder in two streams."""

    config: Any
    language_model: Any
    training: bool
    encode_images: Any
    get_input_embeddings: Any
    _choose_attention: Any
    _probe: tuple[tuple, DecoderProbe] | None = None
    _token_counts: list[int] | None = None

    @property
    def probe(self) -> DecoderProbe:
        """What two streams can do with the decoder and the attention type, tried once on a small replica."""
        tried = (self.language_model, get_attention_type(self.config))
        if self._probe is None or self._probe[0] != tried or not self._probe[1].is_final:
            self._choose_attention(self.language_model.config)
            self._probe = (tried, probe_decoder(self.language_model, self._make_stream))
        return self._probe[1]

    def _make_stream(self) -> ImageStream:
        form = get_attention_type(self.config).two_streams
        return ImageStream() if form is None else ImageStream(form.image_attention)

    def supports_conversation_cache(self) -> bool:
        """Whether a conversation of any length can be kept in a [`ConversationCache`] with separate blocks."""
        has_layers = get_attention_type(self.config).added_layers is not None
        return has_layers or masked_route_reason(self, None) is None

    def supports_image_memory(self) -> bool:
        """Whether images can be computed apart from a conversation, by [`compute_image_states`]."""
        return self._no_image_states_reason() is None

    def compute_image_states(self, pixel_values: torch.Tensor) -> ImageStates:
        """
        The part of images (N, channels, height, width) that does not depend on the conversation: vision tower,
        projector, and per-layer keys and values of the decoder. The result can be passed as `image_states` in any
        conversation with these images.

        Raises:
            `ValueError`: a model that cannot compute images apart from a conversation.
        """
        if (reason := self._no_image_states_reason()) is not None:
            raise ValueError(
                "Images can be computed apart from a conversation only with multi-modal causal attention on the sdpa "
                f"kernel, in a decoder whose keys can be rotated late; {reason}."
            )
        states = self.encode_images(pixel_values)
        added_layers = get_attention_type(self.config).added_layers
        if added_layers is not None:
            return added_layers.compute_images(self, states, self._like(states))
        return self._run_image_stream(states, self._like(states))

    def _no_image_states_reason(self) -> str | None:
        attention_type = get_attention_type(self.config)
        if attention_type.added_layers is not None:
            return None
        self._choose_attention(self.language_model.config)
        implementation, form = self.config.text_config._attn_implementation, attention_type.two_streams
        if form is None or implementation != attention_type.implementation(form.kernel):
            return f"attn_implementation is {implementation!r}"
        return self.probe.no_two_streams or self.probe.no_late_rotation

    def _like(self, states: ImageStates) -> torch.Tensor:
        """A tensor of the dtype and on the device of the decoder's inputs."""
        embedding = self.get_input_embeddings().weight
        return states.features if embedding.is_meta else embedding

    def _run_image_stream(
        self, states: ImageStates, like: torch.Tensor, positions: torch.Tensor | None = None
    ) -> ImageStates:
        """Images through the decoder, in the dtype and on the device of `like`; at positions (tokens,) if given."""
        states = replace(states, features=states.features.to(like.device, like.dtype))
        positions = None if positions is None else positions.view(states.features.shape[:2])
        rotation: Any = self.probe.rotation
        # A layer that is recomputed in the backward pass has to repeat the same operations.
        skips = self.probe.skips_queries and not is_checkpointed(self.language_model, self.training)
        return run_image_stream(self._decode, states, self._make_stream(), rotation, positions, skips)

    @contextlib.contextmanager
    def count_tokens(self) -> Iterator[list[int]]:
        """Lists the tokens of every pass through the decoder within, of text and of images; padding counts too."""
        counts: list[int] = []
        self._token_counts = counts
        try:
            yield counts
        finally:
            self._token_counts = None

    def _note_tokens(self, embeds: torch.Tensor) -> None:
        if self._token_counts is not None:
            self._token_counts.append(embeds.shape[:2].numel())

    def _decode(self, embeds, position_ids, plan, past_key_values=None, **kwargs) -> BaseModelOutputWithPast:
        self._note_tokens(embeds)
        return run_with_plan(self.language_model, embeds, position_ids, plan, past_key_values, **kwargs)

    def _forward_two_streams(self, inputs: DecoderInputs) -> BaseModelOutputWithPast:
        """Runs the decoder on images and on text, and scatters its outputs to the positions of the conversation."""
        embeds, kwargs = inputs.embeds, dict(inputs.kwargs)
        past_key_values = inputs.past_key_values
        if past_key_values is None and kwargs.get("use_cache", self.config.text_config.use_cache):
            past_key_values = ConversationCache()
        cache: Any = past_key_values
        if cache is not None and not is_conversation_cache(cache):
            cache = ConversationCache()
        kwargs["use_cache"] = cache is not None
        plan, is_image, position_ids = plan_call(cache, inputs, inputs.sequence_ids)
        states: Any = self._image_states(inputs, is_image, position_ids)
        if inputs.blank_features is not None:
            blank = self._run_image_stream(ImageStates(inputs.blank_features[None], [0]), embeds)
            computed: list[Any] = [*blank.keys, *blank.values, blank.outputs]
            embeds = embeds + 0.0 * sum(tensor.sum().to(embeds.device) for tensor in computed)

        form: Any = get_attention_type(self.config).two_streams
        plan = replace(plan, text_attention=form.text_attention)
        placed = None
        if states is not None:
            placed = place_images(states, plan, is_image, position_ids, self.probe.rotation)
        if cache is not None:
            cache.add_images(placed)
            placed = cache.placed_images
        plan = replace(plan, images=placed)
        if self.config.image_scope != "all" and placed is not None:
            limited = plan.limit_to_last_image(self.config.image_seq_length)
            plan = limited if self.config.image_scope == "last" else replace(plan, limited=limited)
        outputs = self._decode(plan.gather_text(embeds), plan.gather_text(position_ids), plan, cache, **kwargs)
        if cache is not None:
            cache.commit(plan)
            if cache is not past_key_values:
                cache.interleave(past_key_values)
        outputs.past_key_values = past_key_values
        image_outputs = None
        if states is not None:
            tokens = states.outputs.flatten(0, 1)[states.token_index().to(states.outputs.device)]
            image_outputs = tokens[(plan.token_types == IMAGE)[is_image].to(tokens.device)]
        outputs.last_hidden_state = plan.scatter(outputs.last_hidden_state, image_outputs)
        return outputs

    def _image_states(
        self, inputs: DecoderInputs, is_image: torch.Tensor, position_ids: torch.Tensor
    ) -> ImageStates | None:
        """The images of a call with their keys and values, computed here unless they are known."""
        states, is_within = inputs.image_states, self._make_stream().is_within
        if states is None and bool(is_image.any()):
            embeds = inputs.embeds[is_image.to(inputs.embeds.device)]
            if is_within:
                check_whole_images(is_image, self.config.image_seq_length)
            embeds = embeds.unflatten(0, (-1, self.config.image_seq_length if is_within else len(embeds)))
            states = ImageStates(embeds, list(range(len(embeds))))
        if states is None:
            return None
        states.check_tokens(is_image)
        positions = position_ids[is_image.to(position_ids.device)].view(len(states.index), -1)
        is_apart = not is_within or bool((positions.diff(dim=1) == 1).all())
        if states.keys:
            if not is_apart:
                raise ValueError(
                    "The positions of an image's tokens have to follow each other where they attend to each other and "
                    "the image was computed apart from the conversation."
                )
            return states
        if states.has_repeats and is_apart and self.probe.no_late_rotation is None:
            return self._run_image_stream(states, inputs.embeds)
        # An image that occurs once is rotated where it is computed.
        states = ImageStates(states.expand(states.features), list(range(len(states.index))))
        return self._run_image_stream(states, inputs.embeds, positions)
