"""How front ends load a checkpoint: flags, devices, and what is refused."""

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
