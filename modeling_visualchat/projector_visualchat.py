"""
Projectors from the vision tower to the language model.

All take (images, patches, vision hidden) to (images, image_seq_length, text hidden). A custom projector is a class
like [`LinearProjector`] under `@register_projector(name)`; its name is the value of `VisualChatConfig.projector_type`.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_visualchat import VisualChatConfig


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
        self.norm = nn.LayerNorm(config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(features))


@register_projector("mlp")
class MLPProjector(nn.Module):
    """Two linear layers with an activation between them, the projector of LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(vision_feature_size(config), hidden_size)
        self.activation = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))


class EncoderLayer(nn.Module):
    """A pre-norm transformer block in which `features` attend to `context`, or to themselves."""

    def __init__(self, hidden_size: int, hidden_act: str):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads(hidden_size), batch_first=True)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), ACT2FN[hidden_act], nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, features: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        queries = self.attention_norm(features)
        context = queries if context is None else context
        features = features + self.attention(queries, context, context, need_weights=False)[0]
        return features + self.mlp(self.mlp_norm(features))


@register_projector("vit")
class ViTProjector(nn.Module):
    """One encoder layer over the patches, then linear and LayerNorm (arXiv 2309.14327, section 3)."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        self.encoder = EncoderLayer(vision_feature_size(config), config.projector_hidden_act)
        self.projection = LinearProjector(config)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(self.encoder(features))


@register_projector("perceiver")
class PerceiverProjector(nn.Module):
    """`image_seq_length` learned queries that read the patches, then linear and LayerNorm."""

    def __init__(self, config: VisualChatConfig):
        super().__init__()
        hidden_size = vision_feature_size(config)
        self.queries = nn.Parameter(torch.empty(cast(int, config.image_seq_length), hidden_size))
        self.context_norm = nn.LayerNorm(hidden_size)
        self.encoder = EncoderLayer(hidden_size, config.projector_hidden_act)
        self.projection = LinearProjector(config)

    def init_own_parameters(self) -> None:
        """Draws the queries."""
        init.normal_(self.queries, std=0.02)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.projection(self.encoder(queries, self.context_norm(features)))


def vision_feature_size(config: VisualChatConfig) -> int:
    """Width of the features that a projector reads: the tower's, times the number of layers taken."""
    num_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return config.vision_config.hidden_size * num_layers


def num_heads(hidden_size: int) -> int:
    """Heads of at least 64, the largest number of them that divides the width."""
    return next(heads for heads in range(max(1, hidden_size // 64), 0, -1) if hidden_size % heads == 0)
