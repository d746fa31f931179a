"""A real language model and a real vision encoder, joined: what they could do before, they can do after."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import draw_picture
from onnx import helper
from study.packaged_parts import dinov2_onnx, save_dinov2, smollm2_gguf
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.parts_visualchat import load_language_model
from processing_visualchat import VisualChatProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    save_dinov2(folder)
    return folder


@pytest.fixture(scope="module")
def joined(dinov2):
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        str(dinov2), str(smollm2_gguf()), vision_feature_layer=-2
    )
    processor = VisualChatProcessor.from_vision_text_pretrained(
        str(dinov2), str(smollm2_gguf()), image_seq_length=model.config.image_seq_length
    )
    return model, processor


def test_the_encoder_is_the_one_in_the_package(dinov2, tmp_path):
    """Features of the converted checkpoint against the graph it was taken from, run by onnxruntime."""
    graph = onnx.load(dinov2_onnx())
    last = max(
        (node for node in graph.graph.node if "/encoder/layer.11/" in node.name and node.op_type == "Add"),
        key=lambda node: [other.name for other in graph.graph.node].index(node.name),
    )
    graph.graph.output.append(helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    onnx.save(graph, tmp_path / "with_features.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "with_features.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([last.output[0]], {"input_image": images})
    model, info = AutoModel.from_pretrained(dinov2, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layer_output = []
    layers = [
        module for name, module in model.named_modules() if name.endswith("layer.11") or name.endswith("layers.11")
    ]
    layers[0].register_forward_hook(lambda module, inputs, output: layer_output.append(output))
    with torch.no_grad():
        model(torch.from_numpy(images))
    hidden = layer_output[0][0] if isinstance(layer_output[0], tuple) else layer_output[0]
    hidden = hidden.reshape(-1, 384)
    error = (hidden - torch.from_numpy(expected).reshape(-1, 384)).norm() / hidden.norm()
    assert error < 1e-4


def test_text_answers_as_before(joined):
    model, _ = joined
    folder, name = str(smollm2_gguf().parent), smollm2_gguf().name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    stock = load_language_model(str(smollm2_gguf())).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        actual, expected = model(**inputs).logits, stock(**inputs).logits
    vocab_size = expected.shape[-1]
    torch.testing.assert_close(actual[..., :vocab_size], expected, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 12, "do_sample": False}
    answers = [
        tokenizer.decode(m.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]) for m in (model, stock)
    ]
    assert answers[0] == answers[1] and "Paris" in answers[0]


def test_an_image_reaches_the_answer_and_only_two_parts_learn(joined):
    model, processor = joined
    assert model.config.image_seq_length == processor.image_seq_length == 16 * 16 + 1  # 224 pixels, not 518
    assert processor.image_token_id == model.config.image_token_id == 49152
    conversations = [
        [
            {"role": "user", "content": [{"type": "image", "image": draw_picture(seed)}]},
            {"role": "assistant", "content": "A shape."},
        ]
        for seed in (0, 1)
    ]  # fmt: skip
    losses = []
    for conversation in conversations:
        batch = processor.apply_chat_template([conversation], return_labels=True, return_tensors="pt")
        losses.append(model(**batch).loss)
    assert losses[0] != losses[1]
    losses[0].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in learned} == {"multi_modal_projector", "language_model"}
    assert [name for name in learned if "language_model" in name] == ["model.language_model.embed_tokens.weight"]
    model.zero_grad()


def test_saved_as_safetensors_and_loaded(joined, tmp_path):
    model, processor = joined
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = VisualChatProcessor.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": draw_picture(3)}, {"type": "text", "text": "Colour?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert AutoModelForCausalLM.from_config(loaded.config.text_config).num_parameters() > 1e8
