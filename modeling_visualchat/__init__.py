"""The VisualChat models and multi-modal causal attention, registered with transformers' Auto classes on import."""

from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .attention_types_visualchat import ATTENTION_OPTIONS, ATTENTION_TYPES, AttentionType
from .attention_visualchat import MultiModalCausalAttention, mmca_attention, mmca_attention_reference
from .cache_visualchat import ConversationCache
from .chat_session_visualchat import ChatSession
from .configuration_visualchat import VERSION, VisualChatConfig
from .image_memory_visualchat import ImageMemory
from .image_states_visualchat import ImageStates
from .modeling_visualchat import VisualChatForConditionalGeneration, VisualChatModel, VisualChatPreTrainedModel
from .projector_visualchat import PROJECTORS, register_projector, vision_feature_size
from .qwen_vision_visualchat import VisualChatQwenVisionModel
from .vision_cache_visualchat import VisionFeatureCache


AutoModel.register(VisualChatConfig, VisualChatModel, exist_ok=True)
AutoModelForImageTextToText.register(VisualChatConfig, VisualChatForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VisualChatConfig, VisualChatForConditionalGeneration, exist_ok=True)

__version__ = VERSION
__all__ = [
    "ATTENTION_OPTIONS",
    "ATTENTION_TYPES",
    "PROJECTORS",
    "AttentionType",
    "ChatSession",
    "ConversationCache",
    "ImageMemory",
    "ImageStates",
    "MultiModalCausalAttention",
    "VisionFeatureCache",
    "VisualChatForConditionalGeneration",
    "VisualChatModel",
    "VisualChatPreTrainedModel",
    "VisualChatQwenVisionModel",
    "mmca_attention",
    "mmca_attention_reference",
    "register_projector",
    "vision_feature_size",
]
