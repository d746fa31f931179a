"""`merge_adapter.py`: a LoRA adapter and its checkpoint become one checkpoint, which computes what both compute."""

import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_processor, pixels, tokens
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.torch import load_file
from test_remote_code import REPOSITORY
from test_training_parameters import arguments
from training_card import mark_adapter
from training_parameters import choose_parameters, loading_options

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.model_card_visualchat import CARD, make_card
from processing_visualchat import VisualChatProcessor


INPUTS = {"input_ids": tokens(3, "I", 9), "pixel_values": pixels(0)}


def merge(monkeypatch, *words):
    """The script in this process; what it ends with, if it fails, is its error."""
    monkeypatch.setattr(sys, "argv", ["merge_adapter.py", *map(str, words)])
    runpy.run_path(str(REPOSITORY / "examples" / "merge_adapter.py"), run_name="__main__")


def make_adapter(folder, seed=0, quantization=None, lora=("language_model",), **config):
    """A checkpoint `base`, and `adapter` for it with random weights, as `finetune.py` writes them."""
    base, adapter = folder / "base", folder / "adapter"
    make_model(seed=seed, **config).save_pretrained(base)
    chosen = arguments(lora=list(lora), quantization=quantization)
    options = loading_options(chosen, SimpleNamespace(bf16=False))
    model = choose_parameters(VisualChatForConditionalGeneration.from_pretrained(base, **options), chosen)
    for parameter in (each for each in model.parameters() if each.requires_grad):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(adapter)
    make_processor().save_pretrained(adapter)
    card = make_card(model.get_base_model(), "adapter")
    mark_adapter(card, str(base))
    card.text = card.text.replace("## Use\n", "## Use\n\nMy own words.\n")
    card.save(adapter / CARD)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "tied"])
@pytest.mark.parametrize("towers", [["language_model"], ["vision_tower"], ["language_model", "vision_tower"]])
def test_a_merged_checkpoint_computes_what_the_adapter_does(tmp_path, monkeypatch, towers, tied):
    expected = logits(make_adapter(tmp_path, lora=towers, tie_word_embeddings=tied))
    merge(monkeypatch, tmp_path / "adapter", tmp_path / "merged")
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )
    assert VisualChatProcessor.from_pretrained(tmp_path / "merged").image_token == "<image>"
    card = ModelCard.load(tmp_path / "merged" / CARD)
    assert card.data.library_name == "transformers" and "My own words." in card.text
    assert "a LoRA adapter is part of the weights of `base`" in card.text and 'checkpoint = "merged"' in card.text


def test_an_adapter_of_a_quantized_decoder_is_merged_into_full_precision(tmp_path, monkeypatch):
    quantized = make_adapter(tmp_path, quantization="4bit")
    base = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merge(monkeypatch, tmp_path / "adapter", tmp_path / "merged")
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(quantized), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "merged"], "base is not an adapter: it has no adapter_config.json"),
        (["nowhere", "merged"], "nowhere"),
        (["adapter", "base"], "base exists and is not empty; choose another OUTPUT"),
        (["adapter", "merged", "--base", "gone"], "the checkpoint 'gone', from which adapter was trained, cannot be"),
        (["adapter", "merged", "--base", "adapter"], "adapter is an adapter itself; merge it first"),
        (["adapter", "merged", "--base", "shallow"], "adapter was trained from another checkpoint than shallow, .*"),
        (["adapter", "merged", "--base", "narrow"], "another checkpoint than narrow, .*size mismatch"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_merged_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make_adapter(tmp_path)
    shape = make_model().config
    shape.text_config.num_hidden_layers = 1
    VisualChatForConditionalGeneration(shape).save_pretrained(tmp_path / "shallow")
    shape = make_model().config
    shape.text_config.intermediate_size = 24
    VisualChatForConditionalGeneration(shape).save_pretrained(tmp_path / "narrow")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        merge(monkeypatch, *words)
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()
