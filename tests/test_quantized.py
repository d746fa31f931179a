"""Decoders quantized by bitsandbytes and torchao: they generate, keep images and train adapters, on both routes."""

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, SHAPE, draw_picture, make_processor, pixels, tokens
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    TorchAoConfig,
)

from modeling_visualchat import ImageMemory, VisualChatForConditionalGeneration
from modeling_visualchat.weights_key_visualchat import weights_key


def bitsandbytes(bits):
    def configure(skipped=None):
        return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=skipped)

    return configure


METHODS = {
    "bitsandbytes, 8 bits": bitsandbytes(8),
    "bitsandbytes, 4 bits": bitsandbytes(4),
    "torchao, int8": lambda skipped=None: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped),
}
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
IDS, IMAGES = tokens(3, "I", 4), pixels(0)


def parts(factor=1.0):
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **shape})).eval()
    with torch.no_grad():
        text.model.layers[0].mlp.down_proj.weight.mul_(factor)
    vision = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    ))  # fmt: skip
    return vision.eval(), text


def join(vision, text):
    torch.manual_seed(1)
    return VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision, text, image_token_id=IMAGE_TOKEN_ID, image_seq_length=IMAGE_SEQ_LENGTH
    )


def joined(method, folder, factor=1.0):
    """A decoder that is loaded quantized, joined to a tower."""
    vision, text = parts(factor)
    text.save_pretrained(folder)
    return join(vision, AutoModelForCausalLM.from_pretrained(folder, quantization_config=METHODS[method]()))


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_decoder_generates_on_both_routes_and_keeps_images(method, tmp_path):
    model, memory = joined(method, tmp_path), ImageMemory()
    logits = []
    for route in ("masked", "two_streams"):
        model.set_route(route)
        with torch.no_grad():
            logits.append(model(IDS, IMAGES, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    model.set_route("auto")
    expected = model.generate(IDS, pixel_values=IMAGES, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(IDS, pixel_values=IMAGES, image_memory=memory, **GREEDY), expected)
    assert (memory.hits, memory.misses) == (1, 1)
    session = model.start_chat(make_processor(), **GREEDY)
    session.ask("What is it?", [draw_picture(0)])
    session.ask("So?")


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_quantized_decoder_are_trained(method, tmp_path):
    model = get_peft_model(joined(method, tmp_path), LoraConfig(target_modules=["q_proj", "v_proj"])).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(IDS, pixel_values=IMAGES, labels=IDS.masked_fill(IDS == IMAGE_TOKEN_ID, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_part_of_the_key(method, tmp_path):
    keys = [weights_key(joined(method, tmp_path, factor).model) for factor in (1.0, 2.0)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("method", METHODS)
def test_only_a_whole_model_is_saved_quantized(method, tmp_path):
    with pytest.raises(ValueError, match="The language model was quantized on its own"):
        joined(method, tmp_path / "text").save_pretrained(tmp_path / "joined")
    plain = join(*parts())
    plain.save_pretrained(tmp_path / "plain")
    config = METHODS[method](["model.vision_tower", "model.multi_modal_projector", "lm_head"])
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "whole")
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "whole")
    for each in (model, loaded):
        assert {type(parameter.data) for parameter in each.model.vision_tower.parameters()} == {torch.Tensor}
        assert {parameter.dtype for parameter in each.model.vision_tower.parameters()} <= {
            torch.float32,
            torch.float16,
        }
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS, IMAGES).logits, model(IDS, IMAGES).logits, rtol=1e-4, atol=1e-4)
