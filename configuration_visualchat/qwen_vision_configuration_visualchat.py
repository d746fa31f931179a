"""Configuration of the Qwen-VL vision tower, registered with transformers' `AutoConfig` on import."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class VisualChatQwenVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`VisualChatQwenVisionModel`]. The defaults are the vision tower of Qwen-VL (arXiv 2308.12966),
    which arXiv 2309.14327 uses; about 1.9B parameters.

    Args:
        hidden_size (`int`, *optional*, defaults to 4096):
            Width of the output, that of the resampler (`output_dim` in Qwen-VL). Projectors read it.
        embed_dim (`int`, *optional*, defaults to 1664):
            Width of the encoder (`width` in Qwen-VL).
        intermediate_size (`int`, *optional*, defaults to 8192):
            Width of the encoder's MLP.
        num_hidden_layers (`int`, *optional*, defaults to 48):
            Number of encoder layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of heads of an encoder layer.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of an image.
        image_size (`int`, *optional*, defaults to 448):
            Height and width in pixels that images are prepared for. The model takes any multiple of `patch_size`.
        patch_size (`int`, *optional*, defaults to 14):
            Height and width of a patch in pixels.
        position_grid_size (`int`, *optional*, defaults to 16):
            Height and width of the grid of learned positions, interpolated to the patches at hand.
        query_grid_size (`int`, *optional*, defaults to 16):
            Height and width of the grid of the resampler's learned queries. Its square is the length of the output.
        resampler_head_dim (`int`, *optional*, defaults to 128):
            Size of a head of the resampler.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every LayerNorm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new weights.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a size does not divide another that it has to divide.
    """

    model_type = "visualchat_qwen_vision"
    base_config_key = "vision_config"

    hidden_size: int = 4096
    embed_dim: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    position_grid_size: int = 16
    query_grid_size: int = 16
    resampler_head_dim: int = 128
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.auto_map = {
            "AutoConfig": "qwen_vision_configuration_visualchat.VisualChatQwenVisionConfig",
            "AutoModel": "qwen_vision_visualchat.VisualChatQwenVisionModel",
        }

    @property
    def num_query_tokens(self) -> int:
        """Length of the output, whatever the size of an image; says that the tower resamples."""
        return self.query_grid_size**2

    def validate_architecture(self):
        """Part of `@strict` validation: heads divide widths, and patches the image."""
        for whole, part in (
            ("embed_dim", "num_attention_heads"),
            ("hidden_size", "resampler_head_dim"),
            ("image_size", "patch_size"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part}, got {getattr(self, whole)} and {getattr(self, part)}."
                )


# On import, so that a configuration that holds this one is read wherever its own code is.
AutoConfig.register(VisualChatQwenVisionConfig.model_type, VisualChatQwenVisionConfig, exist_ok=True)
VisualChatQwenVisionConfig.register_for_auto_class()

__all__ = ["VisualChatQwenVisionConfig"]
