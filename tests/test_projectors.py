"""The projectors of arXiv 2309.14327, against the published mathematics."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, make_config, make_model, pixels
from test_qwen_vision import linear_reference, norm_reference, resampler_reference
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.projector_visualchat import PROJECTORS, num_heads


EPS = 1e-12


def features_of(model, images):
    """What the projector reads, and what it yields."""
    with torch.no_grad():
        features = model.model.run_vision_tower(images, [-1], model.config.vision_feature_select_strategy)[1]
        return features, model.model.multi_modal_projector(features)


def tower_of(image_size):
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=image_size,
        patch_size=2,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("queries", [9, 16], ids=["interpolated", "same grid"])
def test_the_perceiver_computes_the_published_mathematics(queries, strategy):
    """Patches of 4 by 4, with a class token, which has no position, and without."""
    model = make_model(
        projector_type="perceiver", image_seq_length=queries, vision_feature_select_strategy=strategy,
        vision_config=tower_of(8),
    )  # fmt: skip
    features, output = features_of(model, pixels(0, 1))
    assert features.shape == (2, 17 if strategy == "full" else 16, 32)
    weights = model.model.multi_modal_projector.state_dict()
    resampler = {name.removeprefix("resampler."): weight for name, weight in weights.items()}
    for image, actual in zip(features, output):
        tokens = resampler_reference(image, resampler, 1, (4, 4), EPS)
        expected = linear_reference(norm_reference(tokens, weights, "norm", EPS), weights, "linear")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_vit_projector_is_an_encoder_layer_of_clip():
    model = make_model(projector_type="vit", projector_hidden_act="quick_gelu")
    features, output = features_of(model, pixels(0, 1))
    weights = model.model.multi_modal_projector.state_dict()
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=128, num_attention_heads=1)
    config._attn_implementation = "sdpa"
    layer = CLIPEncoderLayer(config)
    named = {
        "layer_norm1": "attention_norm", "layer_norm2": "mlp_norm", "self_attn.out_proj": "attention.out_proj",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
    }  # fmt: skip
    state = {}
    for kind in ("weight", "bias"):
        state |= {f"{clip}.{kind}": weights[f"encoder.{ours}.{kind}"] for clip, ours in named.items()}
        projections = weights[f"encoder.attention.in_proj_{kind}"].chunk(3)
        state |= {f"self_attn.{name}_proj.{kind}": weight for name, weight in zip("qkv", projections)}
    layer.load_state_dict(state)
    with torch.no_grad():
        states = linear_reference(layer(features, None), weights, "projection.linear")
    expected = norm_reference(states, weights, "projection.norm", EPS)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_heads_are_those_of_the_published_sizes():
    assert [num_heads(1024, 64), num_heads(4096, 128), num_heads(576, 128), num_heads(32, 128)] == [16, 32, 4, 1]


def test_queries_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="form a square; image_seq_length=7 does not: choose 4 or 9"):
        make_model(projector_type="perceiver", image_seq_length=7)


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_joined_parts_get_a_new_projector_of_each_type(projector_type):
    config = make_config()
    vision, text = CLIPVisionModel(config.vision_config), LlamaForCausalLM(config.text_config)
    fields = {"image_seq_length": 4} if projector_type == "perceiver" else {}
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision, text, image_token_id=IMAGE_TOKEN_ID, projector_type=projector_type, **fields
    )
    weights = [weight for weight in model.model.multi_modal_projector.parameters() if weight.ndim > 1]
    assert all(0.01 < weight.std() < 0.3 for weight in weights)
    assert features_of(model, pixels(0))[1].isfinite().all()
