"""The VisualChat processor and what feeds it, registered with transformers' `AutoProcessor` on import."""

from transformers import AutoProcessor

from configuration_visualchat import VisualChatConfig

from .conversation_files import load_conversations
from .conversation_visualchat import validate_conversation
from .data_collator import OVERLONG, DataCollatorForVisualChat
from .image_loading_visualchat import load_image
from .mixture import Mixture, Recipe, load_mixture, read_recipe
from .processing_visualchat import VisualChatProcessor
from .sources import SOURCES, SourceReport, load_source


AutoProcessor.register(VisualChatConfig, VisualChatProcessor, exist_ok=True)

__all__ = [
    "OVERLONG",
    "SOURCES",
    "DataCollatorForVisualChat",
    "Mixture",
    "Recipe",
    "SourceReport",
    "VisualChatProcessor",
    "load_conversations",
    "load_image",
    "load_mixture",
    "load_source",
    "read_recipe",
    "validate_conversation",
]
