"""Saving, loading and remote code: the same logits and the same files, also in a process without the packages."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_model, make_processor, pixels, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
)

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration, VisualChatModel
from processing_visualchat import VisualChatProcessor


REPOSITORY = Path(__file__).parent.parent
CODE = [
    "answers_visualchat.py",
    "attention_types_visualchat.py",
    "attention_visualchat.py",
    "cache_visualchat.py",
    "chat_session_visualchat.py",
    "chat_template_visualchat.py",
    "configuration_visualchat.py",
    "conversation_edits_visualchat.py",
    "conversation_visualchat.py",
    "cross_attention_visualchat.py",
    "generation_visualchat.py",
    "hub_visualchat.py",
    "image_features_visualchat.py",
    "image_loading_visualchat.py",
    "image_memory_visualchat.py",
    "image_states_visualchat.py",
    "kernels_visualchat.py",
    "key_rotation_visualchat.py",
    "model_card_visualchat.py",
    "modeling_visualchat.py",
    "outputs_visualchat.py",
    "parts_visualchat.py",
    "placed_images_visualchat.py",
    "plan_visualchat.py",
    "processing_visualchat.py",
    "projector_visualchat.py",
    "quantized_states_visualchat.py",
    "qwen_vision_configuration_visualchat.py",
    "qwen_vision_visualchat.py",
    "resampler_visualchat.py",
    "route_visualchat.py",
    "skip_queries_visualchat.py",
    "tensor_store_visualchat.py",
    "trainable_parts_visualchat.py",
    "two_streams_visualchat.py",
    "vision_cache_visualchat.py",
    "weights_key_visualchat.py",
]


def save(folder, **kwargs):
    model = make_model(**kwargs)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return model


def assert_same_files(first, second):
    names = sorted(path.name for path in first.iterdir() if path.is_file())
    assert names == sorted(path.name for path in second.iterdir() if path.is_file())
    _, mismatch, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not mismatch and not errors


KINDS = [
    {}, {"tie_word_embeddings": True}, {"attention_type": "causal"}, {"merge": "joint", "image_attention": "image"},
    {"attention_type": "cross", "cross_layer_interval": 2},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_save_load_save_load(tmp_path, kwargs):
    model = save(tmp_path / "first", **kwargs)
    ids, images = tokens(3, "I", 4), pixels(0)
    expected = model(ids, images).logits
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "first").eval()
    assert torch.equal(loaded(ids, images).logits, expected)
    loaded.save_pretrained(tmp_path / "second")
    VisualChatProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    again = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "second").eval()
    assert torch.equal(again(ids, images).logits, expected)


def test_the_checkpoint_holds_the_code_and_not_the_bridge(tmp_path):
    save(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == CODE
    for name in CODE:
        package = name if name.split("_")[0] in ("configuration", "modeling", "processing") else None
        sources = (
            [REPOSITORY / name.removesuffix(".py") / name]
            if package
            else sorted(REPOSITORY.glob(f"*_visualchat/{name}"))  # configurations before their bridges
        )
        assert filecmp.cmp(tmp_path / name, sources[0], shallow=False), name
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert sorted(auto_map) == [
        "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor",
    ]  # fmt: skip
    assert "AutoProcessor" in json.loads((tmp_path / "processor_config.json").read_text())["auto_map"]


@pytest.mark.parametrize("order", ["model last", "processor last"])
def test_the_order_of_saving_does_not_matter(tmp_path, order):
    savers = [make_model().save_pretrained, make_processor().save_pretrained]
    for saver in savers if order == "processor last" else reversed(savers):
        saver(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == CODE
    assert "class VisualChatConfig" in (tmp_path / "configuration_visualchat.py").read_text()


def test_auto_classes_with_the_packages_installed(tmp_path):
    model = save(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VisualChatConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VisualChatProcessor
    assert type(AutoModel.from_pretrained(tmp_path)) is VisualChatModel
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto_class.from_pretrained(tmp_path).eval()
        assert type(loaded) is VisualChatForConditionalGeneration
        assert torch.equal(loaded(tokens("I", 4), pixels(0)).logits, model(tokens("I", 4), pixels(0)).logits)


# First lines of a process that cannot import the packages, though they are installed, editable, beside these tests.
HIDE_PACKAGES = f"""
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [folder for folder in sys.path if folder not in ({str(REPOSITORY)!r}, "")]
for package in ("configuration_visualchat", "modeling_visualchat", "processing_visualchat"):
    assert importlib.util.find_spec(package) is None, package + " can be imported"
"""

CLEAN_PROCESS = """
import json, torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, picture, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
messages = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
results = {"classes": [type(config).__name__, type(processor).__name__, type(base).__name__]}
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    results[auto_class.__name__] = model(**inputs).logits.tolist()
results["implementation"] = model.model.language_model.config._attn_implementation
results["generated"] = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
memory = get_class_from_dynamic_module("image_memory_visualchat.ImageMemory", folder)()
options = {"max_new_tokens": 6, "do_sample": False}
session = model.start_chat(processor, memory, **options)
answer = session.answer(messages)
for _ in range(2):
    assert model.generate(**inputs, image_memory=memory, **options).tolist() == results["generated"]
    assert session.retry() == answer
assert (memory.hits, memory.misses) == (2, 1), memory  # not looked up where the cache has it
results["hidden"] = base(**inputs).last_hidden_state.tolist()
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
(answer,) = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)
results["pipeline"] = answer["generated_text"]
model.save_pretrained(output)
processor.save_pretrained(output)
print(json.dumps(results))
"""


def test_remote_code_in_a_process_that_cannot_import_the_packages(tmp_path, chat):
    model, processor = save(tmp_path / "checkpoint"), make_processor()
    picture = chat[0]["content"][0]["path"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "checkpoint"), picture, str(tmp_path / "again")]
    completed = subprocess.run(
        [sys.executable, "-I", "-c", HIDE_PACKAGES + CLEAN_PROCESS, *arguments],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    results = json.loads(completed.stdout.splitlines()[-1])
    assert results["classes"] == ["VisualChatConfig", "VisualChatProcessor", "VisualChatModel"]
    assert results["implementation"] == "mmca_joint_sdpa"

    messages = [
        {"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model(**inputs).logits
    for auto_class in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        torch.testing.assert_close(torch.tensor(results[auto_class]), expected, rtol=1e-5, atol=1e-5)
    hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(torch.tensor(results["hidden"]), hidden, rtol=1e-5, atol=1e-5)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert results["generated"] == generated.tolist()
    answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert results["pipeline"] == answer
    # What remote code saves again is complete, and loads with the packages too.
    assert_same_files(tmp_path / "checkpoint", tmp_path / "again")


def test_another_model_type_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration of a 'llama' model, not of a 'visualchat' one"):
        VisualChatForConditionalGeneration.from_pretrained(tmp_path)


def test_configuration_round_trips_through_json(tmp_path):
    for decoder in ("llama", "gemma3"):
        config = make_config(decoder, projector_type="mlp", vision_feature_layer=[-2, -1], attention_type="causal")
        config.save_pretrained(tmp_path / decoder)
        loaded = VisualChatConfig.from_pretrained(tmp_path / decoder)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        assert type(loaded.text_config) is type(config.text_config)
