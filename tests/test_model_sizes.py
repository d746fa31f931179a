"""The models of the paper's sizes: their parts add up, and one layer of each shape runs."""

from pathlib import Path

import pytest
import torch
from test_finetune import EXAMPLES
from transformers.initialization import no_init_weights

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration


CONFIGS = sorted((EXAMPLES / "configs" / "models").glob("*.json"))
VOCABULARY = 32001  # that of LLaMA-2 and the placeholder of an image


def clip_l14():
    width, patches = 1024, 16 * 16
    layer = 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 4 * width
    return 3 * 14 * 14 * width + width + (patches + 1) * width + 4 * width + 24 * layer


def qwen_vl():
    width, mlp, output = 1664, 8192, 4096
    layer = 4 * (width * width + width) + 2 * mlp * width + mlp + width + 4 * width
    resampler = 256 * output + width * output + 4 * (output * output + output) + 4 * output
    return 3 * 14 * 14 * width + 256 * width + 2 * width + 48 * layer + resampler + 2 * output


def llama_2(width, mlp, layers, key_width):
    layer = 2 * width * width + 2 * width * key_width + 3 * width * mlp + 2 * width
    return 2 * VOCABULARY * width + layers * layer + width


def linear(width, new_width):
    return width * new_width + new_width + 2 * new_width


# The vision tower, the width of its output, the language model, and its width.
SIZES = {
    "clip_l14_llama2_7b": (clip_l14(), 1024, llama_2(4096, 11008, 32, 4096), 4096),
    "qwen_vl_llama2_7b": (qwen_vl(), 4096, llama_2(4096, 11008, 32, 4096), 4096),
    "qwen_vl_llama2_13b": (qwen_vl(), 4096, llama_2(5120, 13824, 40, 5120), 5120),
    "qwen_vl_llama2_70b": (qwen_vl(), 4096, llama_2(8192, 28672, 80, 1024), 8192),
}
PUBLISHED = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}  # of LLaMA-2, without the placeholder


def test_the_parts_have_their_parameters(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plan

    monkeypatch.setattr("sys.argv", ["plan.py", "--parameters", *map(str, CONFIGS)])
    plan.main()
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| model | vision tower | projector | language model | total | trainable |"
    counts = {}
    for row in table[2:]:
        name, *numbers = row.strip("| ").split(" | ")
        counts[name] = [int(number.replace(",", "")) for number in numbers]
    assert counts.keys() == SIZES.keys()
    for name, (tower, tower_width, language_model, width) in SIZES.items():
        projector = linear(tower_width, width)
        total, trainable = tower + projector + language_model, projector + VOCABULARY * width
        assert counts[name] == [tower, projector, language_model, total, trainable], name
        assert language_model - 2 * width == PUBLISHED[name.rpartition("_")[2]]
    assert "\n".join(table) in (EXAMPLES / "README.md").read_text()


def one_layer(path: Path) -> VisualChatForConditionalGeneration:
    """A model with one layer of each tower and few words, its weights a million random numbers again and again."""
    config = VisualChatConfig.from_pretrained(path)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    config.text_config.vocab_size, config.image_token_id = 16, 15
    with no_init_weights():
        model = VisualChatForConditionalGeneration(config).eval()
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            scaled = numbers * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else numbers.abs()
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(scaled[: len(part)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_layer_of_each_shape_runs(path):
    """In float32, 4 GB for the 70B shape: bfloat16 takes several times as long on a processor without it."""
    model = one_layer(path)
    size, length = model.config.vision_config.image_size, model.config.image_seq_length
    assert length == (257 if "clip" in path.stem else 256)
    picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2] + [15] * length + [3, 4]]), picture).logits
        text_logits = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert logits.shape == (1, 4 + length, 16) and logits.isfinite().all()
    torch.testing.assert_close(logits[:, :2], text_logits[:, :2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, -2:], text_logits[:, -2:], rtol=0.1, atol=0.1)
