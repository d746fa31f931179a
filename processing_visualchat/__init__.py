"""The VisualChat processor and its training data, registered with transformers' `AutoProcessor` on import."""

from transformers import AutoProcessor

from configuration_visualchat import VisualChatConfig

from .conversation_visualchat import validate_conversation
from .data.collator import OVERLONG, DataCollatorForVisualChat
from .data.custom import CustomSource, load_custom_source
from .data.grouping import ImageGroupedDataset
from .data.images import ImageReference
from .data.ingestion import IngestionReport
from .data.lengths import measure_lengths
from .data.mixture import DatasetSpec, Mixture, MixtureConfig, load_mixture, read_mixture_config
from .data.packing import pack_conversations, pack_stream
from .data.published import SOURCES, load_source
from .data.readers import load_conversations
from .data.streaming import stream_mixture
from .image_loading_visualchat import load_image
from .processing_visualchat import VisualChatProcessor


AutoProcessor.register(VisualChatConfig, VisualChatProcessor, exist_ok=True)

__all__ = [
    "OVERLONG",
    "SOURCES",
    "CustomSource",
    "DataCollatorForVisualChat",
    "DatasetSpec",
    "ImageGroupedDataset",
    "ImageReference",
    "IngestionReport",
    "Mixture",
    "MixtureConfig",
    "VisualChatProcessor",
    "load_conversations",
    "load_custom_source",
    "load_image",
    "load_mixture",
    "load_source",
    "measure_lengths",
    "pack_conversations",
    "pack_stream",
    "read_mixture_config",
    "stream_mixture",
    "validate_conversation",
]
