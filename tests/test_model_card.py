"""The model card: what the template, a training run and an evaluation write into it, and what a push makes of it."""

import json
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import training_processes
from conftest import draw_picture, make_model, make_processor, make_tokenizer
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi, ModelCard
from test_documentation import commands
from test_remote_code import REPOSITORY
from transformers import AutoProcessor, CLIPImageProcessor, Dinov2Config, Dinov2Model, LlamaForCausalLM

from modeling_visualchat import VisualChatForConditionalGeneration, hub_visualchat
from modeling_visualchat.model_card_visualchat import CARD, TEMPLATE, VisualChatCard, make_card
from processing_visualchat.data.mixture import DatasetSpec


SECTIONS = ("model", "data", "training", "results", "risks", "cost")


def run(command: str) -> None:
    """Runs a command of the README in this process; the launcher adds nothing on one process."""
    words = shlex.split(command.removeprefix("accelerate launch").removeprefix("python"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(training_processes, "set_cpu_threads", lambda *arguments: None)
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """
    The folder in which the commands of the README under "Train" have run, with tiny parts in the places of the
    pretrained ones.
    """
    folder = tmp_path_factory.mktemp("readme")
    join, finetune = (
        command
        for command in commands("README.md")
        if "examples/join.py" in command or "finetune.py --config" in command
    )
    vision = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4)
    text = make_model().config.text_config
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("examples").symlink_to(REPOSITORY / "examples")
        Dinov2Model(vision).save_pretrained("facebook/dinov2-small")
        size = {"height": 8, "width": 8}
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained("facebook/dinov2-small")
        LlamaForCausalLM(text).save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        make_tokenizer().save_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        draw_picture(0).save("cat.png")
        content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
        for name, count in (("train.jsonl", 3), ("eval.jsonl", 1)):
            Path(name).write_text(f"{json.dumps({'messages': messages})}\n" * count)
        run(join)
        run(f"{finetune} --license cc-by-4.0")
    return folder


def test_what_is_not_known_is_left_out_and_asked_for():
    card = ModelCard(str(make_card(make_model(), "someone/model")))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visualchat", "multi-modal-causal-attention", "vision-language"],
    }
    assert "{" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), "a placeholder is left"
    for section, wanted in (("data", "should name the data"), ("training", "final loss"), ("results", "Not meas")):
        (text,) = re.findall(rf"<!-- {section} -->\n(.*?)<!-- /{section} -->", card.text, re.DOTALL)
        assert wanted in text
    assert "- Vision tower: type `clip_vision_model`, 16,864 parameters\n" in card.text
    assert "- Language model: type `llama`, 32,096 parameters\n" in card.text
    assert "An image of 8 x 8 pixels takes 5 tokens; at most 1,024 tokens in a conversation" in card.text
    for section in SECTIONS:
        assert card.text.count(f"<!-- {section} -->") == card.text.count(f"<!-- /{section} -->") == 1


def test_pretrained_parts_are_named_and_local_ones_not_taken_for_those_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own/tower").mkdir(parents=True)
    model = make_model()
    model.config.vision_config._name_or_path = "own/tower"
    model.config.text_config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained("checkpoint")
    card = make_card(VisualChatForConditionalGeneration.from_pretrained("checkpoint"), "checkpoint")
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "- Vision tower: `tower`, type" in card.text
    assert "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Inst" in card.text


def test_a_training_run_writes_what_it_knows(trained):
    card = ModelCard.load(trained / "trained" / CARD)
    assert card.data.license == "cc-by-4.0" and card.data.base_model is None and card.data.eval_results is None
    assert "- Vision tower: `dinov2-small`, type `dinov2`," in card.text
    assert "Run 1 started from `joined`, which states no earlier training." in card.text
    assert "| train.jsonl | 3 | - | not stated; to be added by the owner of this checkpoint | - |\n" in card.text
    assert "| eval.jsonl | - | 1 | not stated;" in card.text
    state = json.loads((trained / "trained" / "trainer_state.json").read_text())
    history = {key: value for entry in state["log_history"] for key, value in entry.items()}
    model = VisualChatForConditionalGeneration.from_pretrained(trained / "trained").set_trainable()
    counts = [model.num_parameters(only_trainable=True), model.num_parameters()]
    for name, value in {
        "trained": "{:,} of {:,} parameters: projector, embeddings".format(*counts),
        "steps": "6 optimizer steps, 6.00 epochs",
        "batch": "128 conversations",
        "optimizer": "adamw_torch_fused, betas 0.9 and 0.95",
        "learning rate": "0.001, cosine, 1 warm-up step",
        "maximum length": "1,024 tokens; over-length conversations: error",
        "mean training loss": f"{history['train_loss']:.4f} nats/token",
    }.items():
        assert f"| {name} | {value} |\n" in card.text, name
    assert re.search(r"\| last evaluation loss \| \d\.\d{4} nats/token \|", card.text)
    assert re.search(r"Run 1: 1 process on (CPU|NVIDIA).*; \d+ seconds of training; \d+ seconds of CPU", card.text)
    assert str(trained) not in str(card)


def test_a_second_run_keeps_the_first_and_the_text_of_the_owner(trained, tmp_path, monkeypatch):
    from training_card import TrainerWithCard, TrainingRun
    from training_data import describe_source
    from transformers import TrainingArguments

    from processing_visualchat import DataCollatorForVisualChat

    monkeypatch.chdir(trained)
    sources = [describe_source(DatasetSpec("llava"), 10, 2), describe_source(DatasetSpec("own", hub="a/b"))]
    trainer = TrainerWithCard(
        make_model(),
        TrainingArguments(str(tmp_path / "again"), report_to="none", use_cpu=True),
        DataCollatorForVisualChat(make_processor()),
        run=TrainingRun(sources, "trained"),
    )
    trainer.create_model_card()
    file = tmp_path / "again" / CARD
    card = VisualChatCard.load(file)
    assert list(card.read("data")) == list(card.read("training")) == ["run 1", "run 2"]
    assert card.data.datasets == ["liuhaotian/LLaVA-Instruct-150K", "a/b"] and card.data.license is None
    terms = "CC BY 4.0 (earlier copies: CC BY-NC 4.0) and the terms of OpenAI; images (COCO): Flickr terms of use"
    link = "[llava](https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K)"
    assert f"| {link} | 10 | 2 | {terms} | Liu et al." in card.read("data")["run 2"]
    assert "| [own](https://huggingface.co/datasets/a/b) | - | - | not stated;" in card.read("data")["run 2"]
    file.write_text(file.read_text().replace("## Use\n", "## Use\n\nMy own words.\n"))
    trainer.create_model_card()
    again = VisualChatCard.load(file)
    assert "My own words." in again.text and again.text.count("## Use") == 1
    assert again.read("training").keys() == card.read("training").keys()
    trainer.hub_model_id = "someone/again"
    trainer.create_model_card(model_name="again", tags="cats")  # as `push_to_hub` does
    assert "# someone/again\n" in file.read_text() and "- cats\n" in file.read_text()


def load(folder):
    return VisualChatForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as hub:
        monkeypatch.setattr(hub_visualchat, "HfApi", partial(HfApi, endpoint=hub.address))
        yield hub


def test_a_push_takes_the_card_of_the_checkpoint_with_its_new_name(trained, hub, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(trained / "trained", folder)
    (folder / CARD).write_text((folder / CARD).read_text().replace("## Use\n", "## Use\n\nMy own words.\n"))
    model, processor = load(folder)
    model.push_to_hub("someone/model", processor=processor, token="hf_x", tags=["cats"])
    card = ModelCard(hub.files["someone/model"][CARD].decode())
    assert card.text.startswith("\n# someone/model\n") and 'checkpoint = "someone/model"\n' in card.text
    assert "My own words." in card.text and "| train.jsonl | 3 |" in card.text and "cats" in card.data.tags


def test_a_push_of_other_weights_does_not_take_the_card_and_leaves_that_of_the_repository(trained, hub, caplog):
    folder = trained / "trained"
    model, processor = load(folder)
    model.lm_head.weight.data[0, 0] += 1
    model.push_to_hub("someone/model", processor=processor, token="hf_x")
    assert "README.md is not uploaded: it is the model card of other weights" in caplog.text
    assert b"train.jsonl" not in hub.files["someone/model"][CARD]
    hub.files["someone/model"][CARD] = b"---\nlicense: mit\n---\nMine."
    model.push_to_hub("someone/model", processor=processor, token="hf_x")
    assert hub.files["someone/model"][CARD] == b"---\nlicense: mit\n---\nMine."
    (folder.parent / "other.md").write_text(TEMPLATE.read_text() + "Other.")
    model.push_to_hub("someone/model", processor=processor, token="hf_x", card=str(folder.parent / "other.md"))
    card = hub.files["someone/model"][CARD].decode()
    assert "# someone/model\n" in card and card.endswith("Other.")


def test_a_card_is_of_a_configuration_too(trained, tmp_path):
    for attention_type, is_found in (("mmca", True), ("causal", False)):
        options = {"attention_type": attention_type}
        model = VisualChatForConditionalGeneration.from_pretrained(trained / "trained", **options)
        model.save_pretrained(tmp_path / attention_type)
        assert (hub_visualchat.find_card(model, tmp_path / attention_type) is not None) == is_found
