"""The VisualChat processor and what feeds it, registered with transformers' `AutoProcessor` on import."""

from transformers import AutoProcessor

from configuration_visualchat import VisualChatConfig

from .conversation_files import load_conversations
from .conversation_visualchat import validate_conversation
from .data_collator import OVERLONG, DataCollatorForVisualChat
from .image_loading_visualchat import load_image
from .mixture import Ingredient, Mixture, Recipe, load_mixture, read_recipe
from .own_sources import OwnSource, load_own_source
from .packing import measure_lengths, pack_conversations
from .processing_visualchat import VisualChatProcessor
from .readings import SourceReport
from .sources import SOURCES, load_source
from .streaming import stream_mixture


AutoProcessor.register(VisualChatConfig, VisualChatProcessor, exist_ok=True)

__all__ = [
    "OVERLONG",
    "SOURCES",
    "DataCollatorForVisualChat",
    "Ingredient",
    "Mixture",
    "OwnSource",
    "Recipe",
    "SourceReport",
    "VisualChatProcessor",
    "load_conversations",
    "load_image",
    "load_mixture",
    "load_own_source",
    "load_source",
    "measure_lengths",
    "pack_conversations",
    "read_recipe",
    "stream_mixture",
    "validate_conversation",
]
