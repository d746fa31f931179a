"""A converted LLaVA computes what it did before, and can be switched to MMCA and trained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import SHAPE, draw_picture, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_finetune import EXAMPLES
from test_remote_code import HIDE_PACKAGES
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat, VisualChatProcessor, measure_lengths


# They render what the published templates render, whose marks leave out the end of an answer too.
VICUNA = """\
{%- for message in messages -%}
    {{- message.role.upper() + ": " if message.role != "system" -}}
    {%- for block in message.content if block.type == 'image' -%}{{- "<image>\\n" -}}{%- endfor -%}
    {%- for block in message.content if block.type == 'text' -%}
        {%- if message.role == "assistant" -%}{%- generation -%}{{- block.text + " " -}}{%- endgeneration -%}
        {%- else -%}{{- block.text + " " -}}{%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{{- "ASSISTANT:" if add_generation_prompt -}}
"""
QWEN = """\
{%- for message in messages -%}
    {{- "<|im_start|>" + message.role -}}
    {%- for block in message.content if block.type == 'image' -%}{{- "<image>" -}}{%- endfor -%}
    {%- for block in message.content if block.type == 'text' -%}{{- "\\n" + block.text -}}{%- endfor -%}
    {{- "<|im_end|>" -}}
{%- endfor -%}
{{- "<|im_start|>assistant" if add_generation_prompt -}}
"""
PADDED_VOCAB_SIZE = 272
TEXT_SHAPE = {**SHAPE, "vocab_size": PADDED_VOCAB_SIZE}
VISION_SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION_SHAPE |= {"image_size": 8, "patch_size": 4}


def vicuna_tokenizer():
    """It begins every text with a token, as that of Llama does."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.padding_side = "left"
    return tokenizer


def qwen_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<image>", "<|im_start|>"]})
    return tokenizer


# The tower and its features as in the two kinds of published checkpoints.
KINDS = {
    "LLaVA-1.5": lambda: (
        CLIPVisionConfig(**VISION_SHAPE),
        LlamaConfig(**TEXT_SHAPE),
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        vicuna_tokenizer(),
        {"patch_size": 4, "num_additional_image_tokens": 1, "chat_template": VICUNA},
    ),
    "llava-interleave": lambda: (
        SiglipVisionConfig(**VISION_SHAPE, vision_use_head=False),
        Qwen2Config(**{**TEXT_SHAPE, "tie_word_embeddings": True}),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        SiglipImageProcessor(size={"height": 8, "width": 8}),
        qwen_tokenizer(),
        {"patch_size": 4, "num_additional_image_tokens": 0, "chat_template": QWEN},
    ),
    # Several layers, no bias, and a decoder whose own head caps its logits.
    "Gemma 2": lambda: (
        CLIPVisionConfig(**VISION_SHAPE),
        Gemma2Config(**TEXT_SHAPE, head_dim=8, final_logit_softcapping=1.0, sliding_window=512),
        {
            "vision_feature_layer": [-2, 1],
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
        },
        CLIPImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False),
        vicuna_tokenizer(),
        {"patch_size": 4, "num_additional_image_tokens": 1, "chat_template": VICUNA},
    ),
}


def save_llava(kind, folder):
    """A random LLaVA in several files, and its processor."""
    vision_config, text_config, features, image_processor, tokenizer, template = KINDS[kind]()
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    parts = {"vision_config": vision_config, "text_config": text_config}
    config = LlavaConfig(**parts, image_token_index=image_token_id, **features)
    llava = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.15)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    llava.generation_config.eos_token_id = tokenizer.eos_token_id
    llava.generation_config.repetition_penalty = 1.1
    llava.save_pretrained(folder, max_shard_size="100KB")
    strategy = features["vision_feature_select_strategy"]
    LlavaProcessor(image_processor, tokenizer, vision_feature_select_strategy=strategy, **template).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    """A folder of each kind of LLaVA."""
    folder = tmp_path_factory.mktemp("llava")
    return {kind: save_llava(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def convert_llava():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import convert_llava

        def run(*arguments):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["convert_llava.py", *map(str, arguments)])
                convert_llava.main()

        yield run


@pytest.fixture(scope="module")
def converted(llavas, convert_llava, tmp_path_factory):
    """Each of them converted, the first as a user does."""
    folders = {kind: tmp_path_factory.mktemp("converted") / kind for kind in KINDS}
    command = [sys.executable, str(EXAMPLES / "convert_llava.py"), llavas["LLaVA-1.5"], folders["LLaVA-1.5"]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert completed.returncode == 0, completed.stderr[-3000:]
    for kind in ("llava-interleave", "Gemma 2"):
        convert_llava(llavas[kind], folders[kind])
    for kind, folder in folders.items():
        assert os.listdir(folder.parent) == [kind]
    return folders


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two conversations that end with a question: about one image, and about two in as many rounds."""
    folder, images = tmp_path_factory.mktemp("pictures"), []
    for index in range(3):
        draw_picture(index, (24 + 8 * index, 16)).save(folder / f"{index}.png")
        images.append({"type": "image", "path": str(folder / f"{index}.png")})
    first, second = ({"role": "user", "content": [image, text("What is it?")]} for image in images[:2])
    answer = {"role": "assistant", "content": [text("A circle.")]}
    return [[{"role": "user", "content": [images[2], text("Which color?")]}], [first, answer, second]]


def text(words):
    return {"type": "text", "text": words}


def prepare(processor, conversations):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_logits_and_generated_tokens(llavas, converted, questions, kind):
    llava = LlavaForConditionalGeneration.from_pretrained(llavas[kind]).eval()
    model = VisualChatForConditionalGeneration.from_pretrained(converted[kind]).eval()
    llava_processor = LlavaProcessor.from_pretrained(llavas[kind])
    processor = VisualChatProcessor.from_pretrained(converted[kind])
    assert model.config.attention_type == "causal" and processor.chat_template == llava_processor.chat_template
    assert model.generation_config.to_diff_dict() == llava.generation_config.to_diff_dict()
    assert processor.tokenizer.padding_side == llava_processor.tokenizer.padding_side
    assert processor.tokenizer.special_tokens_map == llava_processor.tokenizer.special_tokens_map
    for conversations in (questions[:1], questions[1:], questions):
        expected, inputs = prepare(llava_processor, conversations), prepare(processor, conversations)
        for name, value in expected.items():
            assert torch.equal(inputs[name], value), name
        kept = inputs["attention_mask"].bool()
        logits = llava(**expected).logits
        torch.testing.assert_close(model(**inputs).logits[kept], logits[kept], rtol=1e-5, atol=1e-5)
        # A placeholder is an image, which VisualChat never generates.
        options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [processor.image_token_id]}
        assert torch.equal(model.generate(**inputs, **options), llava.generate(**expected, **options))


@pytest.mark.parametrize("kind, answers", {
    "LLaVA-1.5": " A circle.<eos> A square.<eos>",
    "llava-interleave": "\nA circle.<|im_end|>\nA square.<|im_end|>",
}.items())  # fmt: skip
def test_switched_to_mmca_it_trains(converted, questions, kind, answers):
    model = VisualChatForConditionalGeneration.from_pretrained(converted[kind], attention_type="mmca").eval()
    causal = VisualChatForConditionalGeneration.from_pretrained(converted[kind]).eval()
    processor = VisualChatProcessor.from_pretrained(converted[kind])
    inputs = prepare(processor, questions[1:])
    assert not torch.allclose(model(**inputs).logits, causal(**inputs).logits, atol=1e-3)
    words = processor(text="Hello", return_tensors="pt")
    torch.testing.assert_close(model(**words).logits, causal(**words).logits, rtol=1e-5, atol=1e-5)

    messages = [*questions[1], {"role": "assistant", "content": "A square."}]
    batch = DataCollatorForVisualChat(processor)([{"messages": messages}])
    labels = batch["labels"][batch["labels"] != -100]
    assert processor.decode(labels) == answers
    measured = measure_lengths(Dataset.from_list([{"messages": json.dumps(messages)}]), processor)[0]
    assert (measured["length"], measured["num_trained"]) == (batch["labels"].shape[1], len(labels))
    model.set_trainable().train()
    assert moved_by(model(**batch).loss, model) == {
        name for name, _ in model.named_parameters() if "multi_modal_projector" in name or "embed_tokens" in name
    }

    targets = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"]))
    assert moved_by(model(**batch).loss, model) == {
        name for name, _ in model.named_parameters() if "lora_B" in name or "modules_to_save" in name
    }


def moved_by(loss, model):
    """The parameters with a gradient; lora_A has none before the first step."""
    model.zero_grad()
    loss.backward()
    assert torch.isfinite(loss)
    return {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


LOAD = """
import json, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, messages = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
print(json.dumps(model(**inputs).logits.tolist()))
"""


def test_it_loads_as_remote_code(converted, questions, tmp_path):
    folder, messages = converted["LLaVA-1.5"], questions[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", HIDE_PACKAGES + LOAD, str(folder), json.dumps(messages)]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr[-3000:]
    inputs = VisualChatProcessor.from_pretrained(folder).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = VisualChatForConditionalGeneration.from_pretrained(folder).eval()(**inputs).logits
    logits = torch.tensor(json.loads(completed.stdout.splitlines()[-1]))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def widen_the_tower(folder):
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", vision_config=config["vision_config"] | {"hidden_size": 28})


def keep_the_shape_of_images(folder):
    config = json.loads((folder / "processor_config.json").read_text())
    image_processor = config["image_processor"] | {"do_center_crop": False, "size": {"shortest_edge": 8}}
    change_json(folder / "processor_config.json", image_processor=image_processor)


BAD = {
    "it is of type 'llava_next' (LlavaNextForConditionalGeneration), and wanted is 'llava'": lambda folder: (
        change_json(
            folder / "config.json", model_type="llava_next", architectures=["LlavaNextForConditionalGeneration"]
        )
    ),
    "it holds a LlavaLlamaForCausalLM, in the layout of the original LLaVA code": lambda folder: change_json(
        folder / "config.json", architectures=["LlavaLlamaForCausalLM"]
    ),
    "its weights are quantized": lambda folder: change_json(
        folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
    "of its weights do not fit its configuration (mismatched keys)": widen_the_tower,
    "of its weights do not fit its configuration (missing keys)": lambda folder: change_json(
        folder / "config.json", vision_config=CLIPVisionConfig(**VISION_SHAPE | {"num_hidden_layers": 4}).to_dict()
    ),
    "its weights are incomplete": lambda folder: sorted(folder.glob("*.safetensors"))[-1].unlink(),
    "its weights are incomplete: Error while deserializing header": lambda folder: os.truncate(
        sorted(folder.glob("*.safetensors"))[-1], 500
    ),
    "it has no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "its image processor keeps the shape of images": keep_the_shape_of_images,
    "its tokenizer has <image> as 2, its model reads images at 7 (image_token_index)": lambda folder: change_json(
        folder / "config.json", image_token_index=7
    ),
    "it has no configuration that transformers knows": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("message, spoil", BAD.items(), ids=BAD)
def test_what_cannot_be_converted_is_refused(convert_llava, capsys, tmp_path, message, spoil):
    spoil(save_llava("LLaVA-1.5", tmp_path / "llava"))
    with pytest.raises(SystemExit):
        convert_llava(tmp_path / "llava", tmp_path / "out")
    error = capsys.readouterr().err
    assert message in error, error[-500:]
    assert os.listdir(tmp_path) == ["llava"]


def test_cross_attention_starts_as_the_language_model_of_llava(convert_llava, llavas, questions, capsys, tmp_path):
    arguments = ["--attention_type", "cross", "--cross_layer_interval"]
    convert_llava(llavas["LLaVA-1.5"], tmp_path / "out", *arguments, "2")
    model, info = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and list(model.model.cross_attention) == ["1"]
    llava = LlavaForConditionalGeneration.from_pretrained(llavas["LLaVA-1.5"]).eval()
    inputs = prepare(VisualChatProcessor.from_pretrained(tmp_path / "out"), questions[:1])
    text = inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id][None]
    torch.testing.assert_close(model.eval()(**inputs).logits[:, -1], llava(text).logits[:, -1], rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        convert_llava(llavas["LLaVA-1.5"], tmp_path / "none", *arguments, "4")
    assert "cannot be converted: cross_layer_interval=4 leaves a decoder of 2 layers" in capsys.readouterr().err


def test_mmca_and_our_template_by_flags(convert_llava, llavas, capsys, tmp_path):
    """And an output that exists is refused."""
    arguments = [llavas["LLaVA-1.5"], tmp_path / "out", "--chat_template", "visualchat", "--attention_type", "mmca"]
    convert_llava(*arguments)
    assert VisualChatForConditionalGeneration.from_pretrained(tmp_path / "out").config.attention_type == "mmca"
    assert "### Question" in VisualChatProcessor.from_pretrained(tmp_path / "out").chat_template
    with pytest.raises(SystemExit):
        convert_llava(*arguments)
    assert f"the output {tmp_path / 'out'} exists" in capsys.readouterr().err
