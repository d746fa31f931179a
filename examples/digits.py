"""
The embedded default of `finetune.py`: conversations about scans of handwritten digits, and a tiny model to learn them.

The pictures are scikit-learn's 1,797 scans (8 by 8 pixels). A conversation shows two of them, one at a time or both at
once, over several rounds, and its answers are words. Scans held out from training make the evaluation.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]


@dataclass(frozen=True)
class Question:
    """
    One kind of question about one or two digits.

    Args:
        text (`str`): What the user asks.
        num_images (`int`): How many of the images the answer depends on.
        answer (`Callable`): From the digits shown to the answer.
        num_answers (`int`): How many answers there are; one in as many is right by chance.
    """

    text: str
    num_images: int
    answer: Callable[..., str]
    num_answers: int


def name_the_larger(first: int, second: int) -> str:
    return "neither" if first == second else "the first" if first > second else "the second"


# Asked of the image just shown, and asked once two have been shown.
OF_ONE = (
    Question("what digit is it?", 1, lambda digit: WORDS[digit], 10),
    Question("is it even or odd?", 1, lambda digit: ("even", "odd")[digit % 2], 2),
)
OF_TWO = (
    Question("what digit is the first?", 1, lambda first, second: WORDS[first], 10),
    Question("what digit is the second?", 1, lambda first, second: WORDS[second], 10),
    Question("which of the two is larger?", 2, name_the_larger, 3),
    Question("what is their sum?", 2, lambda first, second: WORDS[first + second], 19),
)


def load_scans(held_out: float = 0.2, seed: int = 0) -> tuple[list, list]:
    """Scans as `(image, digit)` pairs, those to train on and those held out, each digit in the same share."""
    digits = load_digits()
    scans = [
        (Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)), int(digit))
        for pixels, digit in zip(digits.images, digits.target)
    ]
    random.Random(seed).shuffle(scans)
    train, test = [], []
    for digit in range(10):
        of_digit = [scan for scan in scans if scan[1] == digit]
        cut = round(len(of_digit) * held_out)
        test += of_digit[:cut]
        train += of_digit[cut:]
    return train, test


def converse(rounds: list[tuple[list, Question, tuple[int, ...]]]) -> list[dict]:
    """Messages of `(images, question, digits)` rounds, answers included."""
    messages = []
    for images, question, digits in rounds:
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer(*digits)})
    return messages


class DigitConversations(Dataset):
    """
    Endless variety from few scans: every conversation is drawn anew from its index and the seed.

    Args:
        scans (`list`): `(image, digit)` pairs.
        size (`int`): How many conversations.
        seed (`int`): Two data sets of one seed are equal.
    """

    def __init__(self, scans: list, size: int, seed: int = 0):
        self.scans, self.size, self.seed = scans, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = random.Random(f"{self.seed}/{index}")
        (image_a, a), (image_b, b) = rng.choice(self.scans), rng.choice(self.scans)
        together = rng.sample(OF_TWO, len(OF_TWO))
        if rng.random() < 0.5:
            rounds = [([image_a], rng.choice(OF_ONE), (a,)), ([image_b], rng.choice(OF_ONE), (b,))]
            rounds += [([], question, (a, b)) for question in together]
        else:
            rounds = [([image_a, image_b], together[0], (a, b))]
            rounds += [([], question, (a, b)) for question in together[1:]]
        return {"messages": converse(rounds)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on what the conversations say."""
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
    """A vision tower of two layers and a Llama of three, new, with the processor that fits: all of it learns."""
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
            initializer_range=0.06,  # a width of 128 wants more than the 0.02 of wide models
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        attention_type=attention_type,
        projector_type=projector_type,
    )
    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False
    )
    processor = VisualChatProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    return VisualChatForConditionalGeneration._from_config(config), processor
