"""The Qwen-VL vision tower, registered with transformers' `AutoModel` on import."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .qwen_vision_configuration_visualchat import VisualChatQwenVisionConfig
from .resampler_visualchat import Resampler, interpolate_positions


def eager_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, scaling: float, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a mask written out: the output (N, length, H, D), and the weights."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class QwenVisionAttention(nn.Module):
    """Self-attention whose fused projection holds the query, key and value of a head side by side."""

    is_causal = False

    def __init__(self, config: VisualChatQwenVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.embed_dim // config.num_attention_heads
        self.in_proj = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = self.in_proj(hidden_states).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self, *heads.chunk(3, dim=-1), None, scaling=self.head_dim**-0.5, is_causal=False, **kwargs
        )
        return self.out_proj(output.flatten(2)), weights


class QwenVisionLayer(GradientCheckpointingLayer):
    """A pre-norm encoder layer."""

    def __init__(self, config: VisualChatQwenVisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attn = QwenVisionAttention(config)
        self.ln_2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        layers = {
            "c_fc": nn.Linear(config.embed_dim, config.intermediate_size),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(config.intermediate_size, config.embed_dim),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QwenVisionEncoder(nn.Module):
    """The encoder layers, one after the other."""

    def __init__(self, config: VisualChatQwenVisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList([QwenVisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.resblocks:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class VisualChatQwenVisionModel(PreTrainedModel):
    """
    The vision tower of Qwen-VL (arXiv 2308.12966): a ViT whose patches a resampler reads. Parameter names are those
    below `transformer.visual.` in a Qwen-VL checkpoint; its last one, `proj`, is left out as in arXiv 2309.14327.

    ```python
    >>> model = AutoModel.from_pretrained("qwen_vl_vision")
    >>> model(torch.zeros(1, 3, 448, 448)).last_hidden_state.shape
    torch.Size([1, 256, 4096])
    ```
    """

    config_class = VisualChatQwenVisionConfig
    config: VisualChatQwenVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "conv1"
    _no_split_modules = ["QwenVisionLayer", "Resampler"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": QwenVisionLayer, "attentions": QwenVisionAttention}

    def __init__(self, config: VisualChatQwenVisionConfig):
        super().__init__(config)
        width, eps = config.embed_dim, config.layer_norm_eps
        self.conv1 = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.position_grid_size**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=eps)
        self.transformer = QwenVisionEncoder(config)
        self.attn_pool = Resampler(
            grid_size=config.query_grid_size,
            width=config.hidden_size,
            num_heads=config.hidden_size // config.resampler_head_dim,
            patch_width=width,
            patch_bias=False,
            eps=eps,
        )
        self.ln_post = nn.LayerNorm(config.hidden_size, eps=eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Resampler):
            module.init_own_parameters()
        elif isinstance(module, VisualChatQwenVisionModel):
            init.normal_(module.positional_embedding, std=self.config.embed_dim**-0.5)

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`):
                Preprocessed images of any size that is a multiple of the patch.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutput`], its `last_hidden_state` of shape
            `(N, num_query_tokens, hidden_size)`. Of the `hidden_states`, on request, the last is this output and the
            others are the inputs of the layers, `(N, patches, embed_dim)`.

        Raises:
            `ValueError`: height or width is not a multiple of the patch.
        """
        size, patch_size = tuple(pixel_values.shape[-2:]), self.config.patch_size
        if size[0] % patch_size or size[1] % patch_size:
            raise ValueError(
                f"Images of {size[0]} by {size[1]} pixels do not divide into patches of {patch_size} by {patch_size}: "
                f"resize them to multiples of {patch_size}, such as {self.config.image_size}."
            )
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype))
        grid = (patches.shape[2], patches.shape[3])
        hidden_states = patches.flatten(2).transpose(1, 2) + interpolate_positions(self.positional_embedding, grid)
        hidden_states = self.ln_pre(hidden_states)
        hidden_states = self.transformer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.ln_post(self.attn_pool(hidden_states, grid)))


AutoModel.register(VisualChatQwenVisionConfig, VisualChatQwenVisionModel, exist_ok=True)
VisualChatQwenVisionModel.register_for_auto_class("AutoModel")

__all__ = ["VisualChatQwenVisionModel"]
