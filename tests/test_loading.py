"""How front ends load a checkpoint: flags, devices, and what is refused."""

import importlib
import sys
from argparse import ArgumentParser

import pytest
import torch
from accelerate import dispatch_model
from conftest import draw_picture, make_model, make_processor
from test_finetune import EXAMPLES

from modeling_visualchat import ImageMemory


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a small checkpoint by flags."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import loading

    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")

    def load(*flags, checkpoint=tmp_path / "model"):
        parser = ArgumentParser()
        loading.add_model_arguments(parser)
        return loading.load_model(parser.parse_args([str(checkpoint), *flags]))

    return load


def replies(model, processor):
    session = model.start_chat(processor, ImageMemory(), max_new_tokens=6)
    return session.ask("What?", [draw_picture(0)]), session.ask("And this?", [draw_picture(1)])


def test_replies_are_the_same_on_mapped_devices(load):
    """With the hooks that move states between devices, which a machine with one device has to be asked for."""
    plain, processor = load()
    expected = replies(plain, processor)
    limited, _ = load("--max_memory", "cpu=1GiB")
    mapped = dispatch_model(load()[0], {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(mapped.model.language_model.layers[0].self_attn.q_proj, "_hf_hook")
    for model in (limited, mapped):
        assert replies(model, processor) == expected


def test_the_dtype_and_the_quantization_are_those_asked_for(load):
    model, processor = load("--dtype", "bfloat16")
    assert model.dtype == torch.bfloat16 and all(replies(model, processor))
    model, processor = load("--quantize", "8bit")
    decoder = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert decoder.dtype == torch.int8 and model.model.vision_tower.dtype == torch.float32
    assert all(replies(model, processor))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "9"], "--gpus 9 is asked for, and this machine has"),
        (["--max_memory", "20GiB"], "--max_memory 20GiB is not a size of a device, as in 0=20GiB or cpu=60GiB"),
        (["--max_memory", "tpu=1GiB"], "--max_memory tpu=1GiB is not a size"),
    ],
)
def test_what_does_not_fit_the_machine_is_refused(load, flags, message):
    with pytest.raises(SystemExit, match=f"error: .*model cannot be loaded: {message}"):
        load(*flags)


def test_a_checkpoint_that_is_not_there_is_named(load, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere cannot be loaded: "):
        load(checkpoint=tmp_path / "nowhere")


@pytest.fixture
def memory_of(monkeypatch):
    """The image memory that flags make for a model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import loading

    def memory_of(model, *flags):
        parser = ArgumentParser()
        loading.add_image_memory_arguments(parser)
        return loading.make_image_memory(model, parser.parse_args([*map(str, flags)]), ImageMemory)

    return memory_of


def test_an_image_memory_is_as_its_flags_say(memory_of, tmp_path, monkeypatch):
    model, causal = make_model(), make_model(attention_type="causal")
    memory = memory_of(model, "--image_memory", tmp_path, "--image_memory_bits", 8)
    assert (memory.folder, memory.bits, memory_of(model).bits) == (tmp_path, 8, None)
    assert memory_of(causal) is None
    with pytest.raises(SystemExit, match=f"error: --image_memory {tmp_path}: this model cannot use an image memory"):
        memory_of(causal, "--image_memory", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: the image memory cannot be made: .* is a file; name a folder"):
        memory_of(model, "--image_memory", tmp_path / "file")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as if it were not installed
    assert memory_of(model).bits is None
    with pytest.raises(SystemExit, match=r"error: .* 8 or 4 bits requires torchao: pip install torchao"):
        memory_of(model, "--image_memory_bits", 4)


@pytest.mark.parametrize("script", ["chat", "generate", "serve"])
def test_a_front_end_has_the_flags_of_an_image_memory(load, script, tmp_path, monkeypatch):
    front_end = importlib.import_module(script)
    make_model(attention_type="causal").save_pretrained(tmp_path / "model")
    (tmp_path / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    command = [script, str(tmp_path / "model"), "--image_memory_bits", "4"]
    files = ["--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    monkeypatch.setattr(sys, "argv", [*command, *(files if script == "generate" else [])])
    with pytest.raises(SystemExit, match="error: --image_memory_bits 4: this model cannot use an image memory"):
        front_end.main()
