"""Loads the pretrained parts of a VisualChat model: a vision encoder and a language model, from wherever they lie."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .configuration_visualchat import NUM_PERCEIVER_QUERIES


IMAGE_TOKEN = "<image>"


def load_vision_tower(vision: str | PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    Args:
        vision (`str` or `PreTrainedModel`): Name or folder of an encoder, alone or one half of a dual encoder such as
            CLIP, or an encoder that is loaded already.
        dtype (`torch.dtype`, *optional*): Of the weights; by default that of the checkpoint.
    """
    if isinstance(vision, PreTrainedModel):
        return vision if dtype is None else vision.to(dtype)
    config = AutoConfig.from_pretrained(vision)
    config = getattr(config, "vision_config", config)
    return AutoModel.from_pretrained(vision, config=config, dtype=dtype or "auto")


def load_language_model(text: str | PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    Args:
        text (`str` or `PreTrainedModel`): Name or folder of a causal language model, a `.gguf` file, or a model that
            is loaded already.
        dtype (`torch.dtype`, *optional*): Of the weights; by default that of the checkpoint, float32 for GGUF.
    """
    if isinstance(text, PreTrainedModel):
        return text if dtype is None else text.to(dtype)
    folder, gguf = split_gguf(text)
    if not gguf:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, quantization_config=GgufConfig(dequantize=True), **gguf
    )
    # The weights are plain by now; a model that says otherwise could not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def split_gguf(text: str) -> tuple[str, dict[str, str]]:
    """A path for `from_pretrained` and its keyword arguments: a `.gguf` file is a folder and a file in it."""
    path = Path(text)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(text), {})


def placeholder_token_id(text: str | PreTrainedModel) -> int:
    """The id that `<image>` has in the tokenizer of a language model, or will have once the processor adds it."""
    if isinstance(text, PreTrainedModel):
        return text.config.vocab_size
    folder, gguf = split_gguf(text)
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    return tokenizer.get_vocab().get(IMAGE_TOKEN, len(tokenizer))


def image_features_length(vision_config: PreTrainedConfig, config_kwargs: dict) -> int:
    """How many tokens the projector yields for one image, found by a run of the encoder without weights."""
    if config_kwargs.get("projector_type") == "perceiver":
        return NUM_PERCEIVER_QUERIES
    size, channels = vision_config.image_size, vision_config.num_channels
    with torch.device("meta"):
        features = AutoModel.from_config(vision_config)(torch.zeros(1, channels, size, size)).last_hidden_state
    return features.shape[1] - (config_kwargs.get("vision_feature_select_strategy") == "default")
