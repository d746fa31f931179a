"""
Converts a LLaVA checkpoint of transformers into a VisualChat checkpoint, which computes the same.

    python examples/convert_llava.py llava-hf/llava-interleave-qwen-0.5b-hf converted

The checkpoint, a name on the Hub or a folder, is one of `LlavaForConditionalGeneration`. The conversion keeps its
logits, generation config, tokenizer and chat template. `--attention_type mmca` switches to multi-modal causal
attention, with which the model has to be trained further (see examples/README.md).
"""

import copy
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoints import add_attention_options, attention_options, write
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.attention_types_visualchat import get_attention_type
from processing_visualchat import VisualChatProcessor


ARCHITECTURE = "LlavaForConditionalGeneration"
# What a decoder's own head does to its logits and LLaVA does not, with the values that leave them as they are.
PLAIN_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


def read_config(checkpoint: str) -> LlavaConfig:
    """The configuration of a checkpoint; a `ValueError` if its model is another one than LLaVA's."""
    wanted = f"wanted is 'llava' ({ARCHITECTURE})"
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"it has no configuration that transformers knows, and {wanted}: {error}") from error
    classes = config.architectures or [ARCHITECTURE]
    if config.model_type != "llava":
        raise ValueError(
            f"it is of type {config.model_type!r} ({', '.join(config.architectures or ['no class'])}), and {wanted}"
        )
    if ARCHITECTURE not in classes:
        raise ValueError(
            f"it holds a {', '.join(classes)}, in the layout of the original LLaVA code, and {wanted}. Convert it to "
            "the layout of transformers first, or take the checkpoint of the same name under llava-hf"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "its weights are quantized. Convert the checkpoint that they were made from, and load the result with a "
            "quantization_config"
        )
    return config


def read_processor(checkpoint: str, config: LlavaConfig) -> tuple[LlavaProcessor, tuple[int, ...]]:
    """The processor of a checkpoint, and the shape of its images; refuses one whose images differ in shape."""
    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(f"its processor is incomplete: {error}") from error
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"its processor is a {type(processor).__name__}, and wanted is a LlavaProcessor, which gives every image "
            "the same number of tokens"
        )
    if processor.image_token_id != config.image_token_index:
        raise ValueError(
            f"its tokenizer has {processor.image_token} as {processor.image_token_id}, its model reads images at "
            f"{config.image_token_index} (image_token_index)"
        )
    blank = [Image.new("RGB", size) for size in ((64, 64), (64, 128))]
    shapes = [processor.image_processor(image, return_tensors="pt")["pixel_values"].shape[1:] for image in blank]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "its image processor keeps the shape of images, so that their numbers of tokens differ; with VisualChat "
            "every image has the same"
        )
    return processor, tuple(shapes[0])


def load_llava(checkpoint: str) -> LlavaForConditionalGeneration:
    """The model of a checkpoint in its dtype; refuses one with missing files, missing weights or other shapes."""
    try:
        llava, report = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"its weights are incomplete: {error}") from error
    for name in ("mismatched_keys", "missing_keys"):
        if keys := sorted(report[name]):
            listed = ", ".join(str(key) for key in keys[:3])
            raise ValueError(
                f"{len(keys)} of its weights do not fit its configuration ({name.replace('_', ' ')}): {listed}"
            )
    return llava.eval()


def build_config(llava: LlavaForConditionalGeneration, shape: tuple[int, ...]) -> VisualChatConfig:
    """The configuration of the same model; `shape` is that of an image: channels, height and width in pixels."""
    config = llava.config
    features = llava.get_image_features(torch.zeros(1, *shape, dtype=llava.dtype)).pooler_output
    # Copies, since a configuration built from those of the parts would change their kernels.
    text_config = copy.deepcopy(config.text_config)
    for name in PLAIN_LOGITS.keys() & text_config.to_dict().keys():
        setattr(text_config, name, PLAIN_LOGITS[name])
    return VisualChatConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=text_config,
        image_token_id=config.image_token_index,
        image_seq_length=len(features[0]),
        projector_type="mlp",
        projector_hidden_act=config.projector_hidden_act,
        multimodal_projector_bias=config.multimodal_projector_bias,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        attention_type="causal",
        tie_word_embeddings=config.tie_word_embeddings,
    )


def move_weights(llava: LlavaForConditionalGeneration, config: VisualChatConfig) -> VisualChatForConditionalGeneration:
    """A VisualChat model of the modules of a LLaVA model; no weight is copied."""
    with torch.device("meta"):
        model = VisualChatForConditionalGeneration(config)
    model.model.vision_tower = llava.model.vision_tower
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict(), assign=True)
    model.model.language_model = llava.model.language_model
    model.lm_head = llava.lm_head
    model.tie_weights()
    model.generation_config = llava.generation_config
    return model.eval()


def convert_processor(
    processor: LlavaProcessor, config: VisualChatConfig, chat_template: str | None
) -> VisualChatProcessor:
    """The processor of the same images, tokens and, by default, template."""
    max_length = getattr(config.text_config, "max_position_embeddings", None)
    if max_length is not None:
        processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, max_length)
    return VisualChatProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_length=config.image_seq_length,
        chat_template=chat_template,
        image_token=processor.image_token,
    )


@torch.no_grad()
def convert(checkpoint: str, attention: dict[str, Any], keep_template: bool = True) -> tuple:
    """
    The VisualChat model and processor of a LLaVA checkpoint, after one conversation for which both have to give the
    same logits with causal attention.

    Args:
        checkpoint (`str`): Name or folder.
        attention (`dict`): The attention to switch to, by the fields of [`VisualChatConfig`].
        keep_template (`bool`, *optional*, defaults to `True`): Whether to keep the chat template.

    Raises:
        `ValueError`: the reason why the checkpoint cannot be converted.
    """
    llava_config = read_config(checkpoint)
    get_attention_type(SimpleNamespace(**attention)).check_decoder(llava_config.text_config)
    llava_processor, shape = read_processor(checkpoint, llava_config)
    if keep_template and llava_processor.chat_template is None:
        raise ValueError("it has no chat template; use that of VisualChat with --chat_template visualchat")
    llava = load_llava(checkpoint)
    config = build_config(llava, shape)
    template = llava_processor.chat_template if keep_template else None
    processor = convert_processor(llava_processor, config, template)
    content = [{"type": "image", "image": Image.linear_gradient("L")}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = inputs.to(llava.dtype)
    expected = llava(**{name: value for name, value in inputs.items() if name != "mm_token_type_ids"}).logits
    model = move_weights(llava, config)
    difference = float((model(**inputs).logits - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-5:
        raise ValueError(f"its logits change by {difference:.1e} of the largest, and at most 1e-5 is wanted")
    model.config.update(attention)
    model.model.add_layers(llava.dtype)
    model.set_trainable()
    return model, processor


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="name or folder of a checkpoint of LlavaForConditionalGeneration")
    parser.add_argument("output", type=Path, help="folder to write the VisualChat checkpoint to")
    add_attention_options(parser, attention_type="causal")
    parser.add_argument(
        "--chat_template",
        default="llava",
        choices=["llava", "visualchat"],
        help="the checkpoint's own or VisualChat's",
    )
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"the output {arguments.output} exists; choose another")
    try:
        keep_template = arguments.chat_template == "llava"
        model, processor = convert(arguments.checkpoint, attention_options(arguments), keep_template)
    except ValueError as error:
        parser.error(f"{arguments.checkpoint} cannot be converted: {error}")
    write(model, processor, arguments.output)


if __name__ == "__main__":
    main()
