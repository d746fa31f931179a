"""The digits model and its processor, both created from scratch."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import ATTENTION_TYPES, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor

from .conversations import WORDS, DigitConversations, load_scans


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the text of the conversations."""
    scans, _ = load_scans()
    conversations = DigitConversations(scans, 500)
    texts = [
        f"### Image {number}: \n### Question: {block['text']}\n### Answer: {answer['content']}"
        for index in range(len(conversations))
        for messages in [conversations[index]["messages"]]
        for number, (user, answer) in enumerate(zip(messages[::2], messages[1::2]), start=1)
        for block in user["content"][-1:]
    ]
    texts += [" ".join(WORDS), "You are a powerful vision-language assistant."]
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
    attention_type: str = "mmca", projector_type: str = "linear"
) -> tuple[VisualChatForConditionalGeneration, VisualChatProcessor]:
    """
    A CLIP vision tower of two layers and a Llama of three with random weights, and their processor; the attention type
    is a key of `ATTENTION_TYPES`.
    """
    tokenizer = build_tokenizer()
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
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
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
        **ATTENTION_TYPES[attention_type].options,
        cross_layer_interval=1,
        projector_type=projector_type,
    )
    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    )
    processor = VisualChatProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    return VisualChatForConditionalGeneration._from_config(config), processor
