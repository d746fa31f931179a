"""Loads the pretrained parts of a VisualChat model: a vision encoder and a language model, from wherever they lie."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import GgufConfig

from .qwen_vision_visualchat import VisualChatQwenVisionModel


IMAGE_TOKEN = "<image>"


def build_vision_tower(vision_config: PreTrainedConfig) -> PreTrainedModel:
    """
    A new encoder for a configuration. Ours is told by its type: in remote code, the configuration and the model are
    loaded one by one, each with a class of the configuration of its own, so `AutoModel` does not know the first.
    """
    if vision_config.model_type == VisualChatQwenVisionModel.config_class.model_type:
        return VisualChatQwenVisionModel._from_config(vision_config)
    return AutoModel.from_config(vision_config)


def load_vision_tower(vision: str | PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """An encoder, or that of a dual encoder such as CLIP, by name or folder or as it is loaded, in a dtype."""
    if isinstance(vision, PreTrainedModel):
        return _cast(vision, dtype)
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    return AutoModel.from_pretrained(vision, config=config, dtype=dtype or "auto")


def load_language_model(text: str | PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    A causal language model, by name, folder or `.gguf` file or as it is loaded, in a dtype; by default that of the
    checkpoint, float32 for GGUF. A `ValueError` refuses a model that is itself multi-modal.
    """
    if isinstance(text, PreTrainedModel):
        model = _cast(text, dtype)
    else:
        folder, gguf = split_gguf(text)
        if gguf:
            gguf |= {"quantization_config": GgufConfig(dequantize=True)}
        default_dtype = torch.float32 if gguf else "auto"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or default_dtype, **gguf)
        # The weights are plain by now; a model that says otherwise could not be saved.
        if gguf and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if model.config.get_text_config() is not model.config:
        raise ValueError(
            f"{type(model).__name__} is itself multi-modal; pass only its language model, a causal model of type "
            f"{model.config.get_text_config().model_type!r}."
        )
    return model


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Casts parameters only: buffers such as rotary frequencies, and packed weights, stay in what they need."""
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def split_gguf(text: str) -> tuple[str, dict]:
    """A path for `from_pretrained` and its keyword arguments: a `.gguf` file is a folder and a file in it."""
    path = Path(text)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(text), {})


def placeholder_token_id(text: str | PreTrainedModel) -> int:
    """The id that `<image>` has in the tokenizer of a language model, or will have once the processor adds it."""
    if isinstance(text, PreTrainedModel):
        raise ValueError(
            f"A loaded {type(text).__name__} comes without its tokenizer: pass image_token_id, the id of <image> in "
            "it (VisualChatProcessor.image_token_id)."
        )
    folder, gguf = split_gguf(text)
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    return tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))


def vision_sequence_length(vision: str | PreTrainedModel, vision_config: PreTrainedConfig) -> int:
    """
    How many tokens an encoder yields for an image as its image processor prepares it, found without weights. A
    `ValueError` refuses an encoder whose features are not as wide as its configuration says, as projectors read them.
    """
    shape = image_shape(vision_config) if isinstance(vision, PreTrainedModel) else processed_image_shape(vision)
    with torch.device("meta"):
        features = build_vision_tower(vision_config)(torch.zeros(1, *shape)).last_hidden_state
    width = getattr(vision_config, "hidden_size", None)
    if features.ndim != 3 or features.shape[2] != width:
        raise ValueError(
            f"The vision tower ({vision_config.model_type!r}) yields features of shape {tuple(features.shape)} for an "
            f"image; wanted is (1, tokens, {width}), the hidden_size of its configuration, which projectors read."
        )
    return features.shape[1]


def processed_image_shape(vision: str) -> tuple[int, int, int]:
    """Channels, height and width in pixels of what the image processor of a checkpoint yields."""
    image_processor = AutoImageProcessor.from_pretrained(vision)
    blank = Image.new("RGB", (64, 64))
    return tuple(image_processor(blank, return_tensors="pt")["pixel_values"].shape[-3:])


def image_shape(vision_config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width in pixels that an encoder is configured for."""
    size = getattr(vision_config, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError(
            f"The configuration of the vision tower ({vision_config.model_type!r}) has no fixed image_size (it is "
            f"{size!r}); set image_size in it, and image_seq_length in VisualChatConfig."
        )
    return getattr(vision_config, "num_channels", 3), height, width
