"""
Projectors from the vision tower to the language model.

All take (images, patches, vision hidden) to (images, image_seq_length, text hidden). A custom projector is a class
like [`LinearProjector`] under `@register_projector(name)`; its name is the value of `VisualChatConfig.projector_type`.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_visualchat import VisualChatConfig
from .resampler_visualchat import Resampler


EPS = 1e-12  # of the LayerNorms of arXiv 2309.14327's projectors, in the original implementation
PROJECTORS: dict[str, type[nn.Module]] = {}


def register_projector(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a projector class, built from a [`VisualChatConfig`], under a value of `projector_type`."""

    def register(projector: type[nn.Module]) -> type[nn.Module]:
        PROJECTORS[name] = projector
        return projector

    return register


def projector_class(name: str) -> type[nn.Module]:
    """The class of a projector; a `ValueError` for an unknown name."""
    if name not in PROJECTORS:
        raise ValueError(
            f"Unknown projector_type={name!r}; choose one of {', '.join(PROJECTORS)}, or register a class with "
            "register_projector."
        )
    return PROJECTORS[name]


@register_projector("linear")
class LinearProjector(nn.Module):
    """Linear and LayerNorm, the projector of arXiv 2309.14327 (section 3)."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.linear = nn.Linear(vision_feature_size(config), config.text_config.hidden_size)
        self.norm = nn.LayerNorm(config.text_config.hidden_size, eps=EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(features))


@register_projector("mlp")
class MLPProjector(nn.Module):
    """Two linear layers with an activation between them, the projector of LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(vision_feature_size(config), hidden_size, bias=bias)
        self.activation = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))


@register_projector("vit")
class ViTProjector(nn.Module):
    """
    One encoder layer over the patches, then linear and LayerNorm (arXiv 2309.14327, section 3).

    The layer is that of CLIP ViT-L/14 with `projector_hidden_act="quick_gelu"`. The original implementation takes the
    heads and the MLP of the tower at hand; here they are of size 64 and of four times the width for every tower, since
    not every configuration states them.

    Raises:
        `ValueError`: the vision tower resamples.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        check_not_resampled(config)
        self.encoder = EncoderLayer(vision_feature_size(config), config.projector_hidden_act)
        self.projection = LinearProjector(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(self.encoder(features))


class EncoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads(hidden_size, 64), batch_first=True)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), ACT2FN[hidden_act], nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        states = self.attention_norm(features)
        features = features + self.attention(states, states, states, need_weights=False)[0]
        return features + self.mlp(self.mlp_norm(features))


@register_projector("perceiver")
class PerceiverProjector(nn.Module):
    """
    `image_seq_length` learned queries on a square grid that read the patches (see [`Resampler`]), then LayerNorm and
    linear, all as wide as the language model and with heads of 128, as in the original implementation of
    arXiv 2309.14327.

    The patches form a square; tokens before them (class, registers) are read without a position. The original
    implementation leaves out the class token of CLIP, as `vision_feature_select_strategy="default"` does.

    Raises:
        `ValueError`: the vision tower resamples, or the queries form no square.
    """

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        check_not_resampled(config)
        num_queries, width = cast(int, config.image_seq_length), config.text_config.hidden_size
        grid_size = math.isqrt(num_queries)
        if grid_size**2 != num_queries:
            raise ValueError(
                f"The queries of the 'perceiver' projector form a square; image_seq_length={num_queries} does not: "
                f"choose {grid_size**2} or {(grid_size + 1) ** 2}."
            )
        heads = num_heads(width, 128)
        self.resampler = Resampler(grid_size, width, heads, vision_feature_size(config), patch_bias=True, eps=EPS)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.linear = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        size = math.isqrt(features.shape[1])
        return self.linear(self.norm(self.resampler(features, (size, size))))


def check_not_resampled(config: VisualChatConfig) -> None:
    """Refuses a vision tower that resamples, for a projector that reads patches."""
    num_query_tokens = getattr(config.vision_config, "num_query_tokens", None)
    if num_query_tokens is not None:
        raise ValueError(
            f"projector_type={config.projector_type!r} reads the patches of an image, and the vision tower "
            f"({config.vision_config.model_type!r}) has resampled them to {num_query_tokens} tokens that have no "
            "place in the image: choose 'linear' or 'mlp'."
        )


def vision_feature_size(config: VisualChatConfig) -> int:
    """Width of the features that a projector reads: the tower's, times the number of layers taken."""
    num_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    width = getattr(config.vision_config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"The configuration of the vision tower ({config.vision_config.model_type!r}) has no hidden_size, the "
            "width of the features that projectors read; use a tower that yields patch features, such as CLIP's."
        )
    return width * num_layers


def num_heads(hidden_size: int, head_size: int) -> int:
    """The largest number of heads of at least a size that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // head_size), 0, -1) if hidden_size % heads == 0)
