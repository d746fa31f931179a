"""A tiny model and its processor, both created from scratch."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<image>"],
        model_max_length=1024,
    )


def build_model(
    texts: list[str], num_layers: int, hidden_size: int = 128, chat_template: str | None = None, **config_kwargs
) -> tuple[VisualChatForConditionalGeneration, VisualChatProcessor]:
    """
    A CLIP vision tower of two layers and a Llama with random weights, and their processor.

    Args:
        texts (`list[str]`): What the tokenizer is trained on.
        num_layers (`int`): Layers of the Llama.
        hidden_size (`int`, *optional*, defaults to 128): Its width, in 4 heads.
        chat_template (`str`, *optional*): By default that of the processor.
        config_kwargs: Fields of [`VisualChatConfig`], as the attention type.
    """
    tokenizer = build_tokenizer(texts)
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.06,  # the default of 0.02 is for wider models
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **config_kwargs,
    )
    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    )
    processor = VisualChatProcessor(
        image_processor, tokenizer, image_seq_length=config.image_seq_length, chat_template=chat_template
    )
    return VisualChatForConditionalGeneration._from_config(config), processor
