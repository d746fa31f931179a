"""Tiny models, a tiny processor and drawn pictures: nothing here needs a network."""

import random

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


IMAGE_TOKEN_ID = 2
VOCAB_SIZE = 259
IMAGE_SEQ_LENGTH = 5  # 8 by 8 pixels in patches of 4, and the class token

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}

# Windows short enough to cut into the conversations of the tests.
TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=16, head_dim=8),
    "qwen2": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention"]
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]),
}

PAPER = {"merge": "sum", "image_scope": "all"}  # MMCA as in the paper, and not as in new models


def make_config(decoder: str = "llama", **kwargs) -> VisualChatConfig:
    vision_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text_config = TEXT_CONFIGS[decoder]()
    if "tie_word_embeddings" in kwargs:
        text_config.tie_word_embeddings = kwargs["tie_word_embeddings"]
    return VisualChatConfig(
        **{"vision_config": vision_config, "text_config": text_config, "image_token_id": IMAGE_TOKEN_ID, **kwargs}
    )


def make_model(decoder: str = "llama", seed: int = 0, **kwargs) -> VisualChatForConditionalGeneration:
    """A random model whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = VisualChatForConditionalGeneration(make_config(decoder, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.15)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after `<pad>`, `<eos>` and `<image>`."""
    special = ["<pad>", "<eos>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<image>"],
        model_max_length=1024,
    )


def make_processor() -> VisualChatProcessor:
    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return VisualChatProcessor(image_processor, make_tokenizer(), image_seq_length=IMAGE_SEQ_LENGTH)


def draw_picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture with a shape or two, different for every seed."""
    rng = random.Random(seed)
    picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        pen.ellipse(
            [x, y, x + rng.randrange(3, 12), y + rng.randrange(3, 12)], fill=tuple(rng.choices(range(256), k=3))
        )
    return picture


def tokens(*parts, seed: int = 0) -> torch.Tensor:
    """Ids of one row: a number is as many random text tokens, "I" is one image."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        if part == "I":
            ids += [IMAGE_TOKEN_ID] * IMAGE_SEQ_LENGTH
        else:
            ids += torch.randint(3, VOCAB_SIZE, (part,), generator=generator).tolist()
    return torch.tensor([ids])


def pixels(*seeds: int) -> torch.Tensor:
    """Random pixel values, the same for the same seeds."""
    return torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(100 + seed)) for seed in seeds])


def pad_left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch of rows of unequal length."""
    length = max(row.shape[1] for row in rows)
    return {
        "input_ids": torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows]),
        "attention_mask": torch.cat(
            [torch.nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows]
        ),
    }


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """Three pictures on disk and a conversation of two rounds about them."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index in range(3):
        paths.append(str(folder / f"{index}.png"))
        draw_picture(index).save(paths[-1])
    first = [{"type": "image", "path": paths[0]}, {"type": "text", "text": "please describe the image."}]
    second = [{"type": "image", "path": path} for path in paths[1:]]
    second.append({"type": "text", "text": "What's the difference between the three?"})
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "It's a circle."},
        {"role": "user", "content": second},
        {"role": "assistant", "content": "The colors are different."},
    ]


def interrupt(monkeypatch, mlp, place=0):
    """Interrupts the call number `place` of an MLP, without a change of the model that its key would tell."""
    calls, linear = [], torch.nn.functional.linear

    def stop(states, weight, *args):
        if weight is mlp.down_proj.weight:
            calls.append(states)
            if len(calls) > place:
                raise KeyboardInterrupt
        return linear(states, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", stop)
