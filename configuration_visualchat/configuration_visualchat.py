"""Configuration of a VisualChat model: a vision tower, a projector and a causal language model."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .qwen_vision_configuration_visualchat import VisualChatQwenVisionConfig  # noqa: F401, registers it


# Increased with every change of the code that travels with a checkpoint: transformers tells versions apart by it.
VERSION = "0.7.0"

# `transformers serve` and the pipelines look classes up in these tables by model type.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["visualchat"] = "VisualChatForConditionalGeneration"
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["visualchat"] = "VisualChatForConditionalGeneration"

# Tokens a vision encoder yields beside its patches (class and register tokens), by model type.
NUM_EXTRA_VISION_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "vit": 1,
    "siglip_vision_model": 0,
}
NUM_PERCEIVER_QUERIES = 256


def attention_defaults(attention_type: str, image_attention: str | None = None) -> dict[str, str]:
    """
    The fields that vary an attention type, where they are not given: for MMCA what `examples/study` found best, and
    the paper's form for image tokens that read earlier text, which have no other.
    """
    if attention_type == "mmca" and image_attention != "self_and_text":
        return {"merge": "joint", "image_attention": "self", "image_scope": "half"}
    return {"merge": "sum", "image_attention": "self", "image_scope": "all"}


@strict
class VisualChatConfig(PreTrainedConfig):
    r"""
    Configuration of [`VisualChatForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-L/14 at 224 pixels):
            Configuration of the vision tower, any encoder of `AutoModel` that yields patch features.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Llama):
            Configuration of the language model, any decoder with rotary positions that takes its attention from
            transformers' attention interface.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<image>` placeholder. Its own embedding is never read.
        image_seq_length (`int`, *optional*):
            Number of tokens that one image takes in the language model. When it is not given, it follows from
            the vision configuration and the projector.
        projector_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` (linear and LayerNorm, section 3 of arXiv 2309.14327), `"mlp"` (two linear layers),
            `"vit"` (one encoder layer, then linear and LayerNorm), `"perceiver"` (256 learned queries in a
            square), or the name of a projector registered with `register_projector`.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation inside the `mlp` and `vit` projectors.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the linear layers of the `mlp` projector have a bias.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            Index of the hidden state of the vision tower to read; several are concatenated.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"full"`):
            `"full"` keeps every token of the vision tower, `"default"` leaves out the first (class) token.
        attention_type (`str`, *optional*, defaults to `"mmca"`):
            `"mmca"` (multi-modal causal attention, section 4.1 of arXiv 2309.14327), `"causal"` (the decoder's own) or
            `"cross"` (the decoder's own over text, and gated cross-attention layers to the images; section 3.1.2 of
            arXiv 2204.14198); `ATTENTION_TYPES` holds them with `merge` and `image_attention`.
        merge (`str`, *optional*, defaults to `"joint"` for `"mmca"`):
            How a text token merges text and images in `"mmca"`: the `"sum"` of two softmaxes, as in the paper, or
            `"joint"`, the two weighted by their shares of the joint normaliser (D-Attn, arXiv 2502.01906). With
            `image_attention="self_and_text"`, and in saved configurations of before version 0.7.0, `"sum"`.
        image_attention (`str`, *optional*, defaults to `"self"`):
            What an image token attends to in `"mmca"`: `"self"`, `"image"` (all tokens of its own image; MIMIC, arXiv
            2601.07812), or `"self_and_text"` (itself and earlier text, for checkpoints of the original
            implementation; an image then depends on the conversation).
        cross_layer_interval (`int`, *optional*, defaults to 4):
            For `"cross"`, a cross-attention layer stands before every layer of this number: 4 is before the 4th, the
            8th, … layer of the decoder.
        image_scope (`str`, *optional*, defaults to `"half"` for `"mmca"` and `"all"` for `"cross"`):
            The images that a text token reads in `"mmca"` and `"cross"`: `"all"` earlier ones, or only the `"last"`
            one before it, as in Flamingo; earlier ones then reach it through earlier text. In `"mmca"`, `"half"` of
            the heads reads the last one, and the others all. Where `merge` is `"sum"` by default, this is `"all"`.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether input and output embeddings are one table; taken from `text_config` when that says so.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value is not one of those allowed.
        `ValueError`: the number of tokens of an image is not given and cannot be derived.

    Example:

    ```python
    >>> from configuration_visualchat import VisualChatConfig

    >>> config = VisualChatConfig(attention_type="mmca", projector_type="linear")
    >>> config.image_seq_length  # 16 x 16 patches of 14 pixels and the class token
    257
    ```
    """

    model_type = "visualchat"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]

    vision_config: Any = None  # a dict or nothing becomes the configuration of the part
    text_config: Any = None
    image_token_id: int = 32000
    image_seq_length: int | None = None
    projector_type: str = "linear"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list[int] = -1
    vision_feature_select_strategy: Literal["full", "default"] = "full"
    attention_type: str = "mmca"
    merge: str | None = None  # `attention_defaults`, as the next
    image_attention: str | None = None
    cross_layer_interval: int = 4
    image_scope: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.image_scope = kwargs.pop("cross_image_scope", self.image_scope)  # its name in version 0.4.0
        for name, value in attention_defaults(self.attention_type, self.image_attention).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        # The whole map at once: `register_for_auto_class` remembers one class a file.
        self.auto_map = {
            "AutoConfig": "configuration_visualchat.VisualChatConfig",
            "AutoModel": "modeling_visualchat.VisualChatModel",
            "AutoModelForImageTextToText": "modeling_visualchat.VisualChatForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_visualchat.VisualChatForConditionalGeneration",
            "AutoProcessor": "processing_visualchat.VisualChatProcessor",
        }
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        if self.image_seq_length is None:
            self.image_seq_length = self._derive_image_seq_length()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As in `PreTrainedConfig.from_dict`. Where a saved model does not name `merge` and `image_scope`, they are what
        they were by default before version 0.7.0, `"sum"` and `"all"`; with another `attention_type`, its defaults.

        Raises:
            `ValueError`: the dictionary describes a model of another type.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a {model_type!r} model, not of a {cls.model_type!r} one. To build on "
                "it, join a vision encoder and a language model with "
                "VisualChatForConditionalGeneration.from_vision_text_pretrained."
            )
        saved = {"attention_type": "mmca", "merge": "sum", "image_scope": "all"} | config_dict
        if kwargs.get("attention_type", saved["attention_type"]) != saved["attention_type"]:
            saved = {name: value for name, value in saved.items() if name not in attention_defaults("mmca")}
        names = ("attention_type", *attention_defaults("mmca"))
        chosen = {name: kwargs.pop(name) for name in names if name in kwargs}
        return super().from_dict(saved | chosen, **kwargs)

    def _derive_image_seq_length(self) -> int:
        if self.projector_type == "perceiver":
            return NUM_PERCEIVER_QUERIES
        vision_config = self.vision_config
        if (num_query_tokens := getattr(vision_config, "num_query_tokens", None)) is not None:
            return num_query_tokens
        image_size, patch_size = getattr(vision_config, "image_size", None), getattr(vision_config, "patch_size", None)
        if vision_config.model_type == "dinov2_with_registers":
            num_extra_tokens = 1 + vision_config.num_register_tokens
        else:
            num_extra_tokens = NUM_EXTRA_VISION_TOKENS.get(vision_config.model_type)
        if num_extra_tokens is None or not isinstance(image_size, int) or not isinstance(patch_size, int):
            raise ValueError(
                f"image_seq_length cannot be derived for a vision tower of type {vision_config.model_type!r}: "
                "pass image_seq_length, the number of tokens that the projector yields for one image."
            )
        num_tokens = (image_size // patch_size) ** 2 + num_extra_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens

    def validate_images(self):
        """Part of `@strict` validation: an image takes at least one token, and its placeholder has an id."""
        if self.image_seq_length is not None and self.image_seq_length < 1:
            raise ValueError(f"image_seq_length must be at least 1, got {self.image_seq_length}.")
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id must not be negative, got {self.image_token_id}.")

    def validate_cross_layer_interval(self):
        """Part of `@strict` validation: layers can be counted by it."""
        if self.cross_layer_interval < 1:
            raise ValueError(f"cross_layer_interval must be at least 1, got {self.cross_layer_interval}.")

    def validate_image_scope(self):
        """Part of `@strict` validation: with causal attention, text reads everything, and halves are of MMCA."""
        if self.attention_type == "causal" and self.image_scope != "all":
            raise ValueError(f'attention_type="causal" has image_scope="all" only, got {self.image_scope!r}.')
        if self.image_scope == "half" and self.attention_type == "cross":
            raise ValueError('attention_type="cross" has image_scope="all" or "last", got "half".')
        if self.image_scope == "half" and getattr(self.text_config, "num_attention_heads", 2) < 2:
            raise ValueError('image_scope="half" needs a language model of at least two attention heads; use "all".')

    def validate_vision_feature_layer(self):
        """Part of `@strict` validation: every layer that is read exists."""
        layer = self.vision_feature_layer
        layers = layer if isinstance(layer, list) else [layer]
        num_layers = getattr(self.vision_config, "num_hidden_layers", None)
        if not layers:
            raise ValueError("vision_feature_layer must name at least one layer, got [].")
        if num_layers is not None and not all(-num_layers - 1 <= index <= num_layers for index in layers):
            raise ValueError(
                f"vision_feature_layer must lie between {-num_layers - 1} and {num_layers} for a vision tower of "
                f"{num_layers} layers, got {layer}."
            )

    def validate_resampled_features(self):
        """Part of `@strict` validation: of a tower that resamples, only its whole output is read."""
        if getattr(self.vision_config, "num_query_tokens", None) is None:
            return
        layer, strategy = self.vision_feature_layer, self.vision_feature_select_strategy
        if layer not in (-1, self.vision_config.num_hidden_layers) or strategy != "full":
            raise ValueError(
                f"A vision tower of type {self.vision_config.model_type!r} resamples its last layer, so "
                f"vision_feature_layer must be -1 and vision_feature_select_strategy 'full', got {layer} and "
                f"{strategy!r}."
            )

    def validate_projector_hidden_act(self):
        """Part of `@strict` validation: the activation of the projector is one that transformers knows."""
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"projector_hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.projector_hidden_act!r}."
            )


VisualChatConfig.register_for_auto_class()

__all__ = ["VisualChatConfig"]
