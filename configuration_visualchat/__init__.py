"""The VisualChat configuration, registered with transformers' `AutoConfig` on import."""

from transformers import AutoConfig

from .configuration_visualchat import VERSION, VisualChatConfig, attention_defaults
from .qwen_vision_configuration_visualchat import VisualChatQwenVisionConfig


AutoConfig.register("visualchat", VisualChatConfig, exist_ok=True)

__version__ = VERSION
__all__ = ["VisualChatConfig", "VisualChatQwenVisionConfig", "attention_defaults"]
