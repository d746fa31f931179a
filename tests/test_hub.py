"""
Pushing to the Hub with the official client, and running the code of the model card that was pushed, as it is written,
in a process without the packages.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import draw_picture, make_model, make_processor, pixels, tokens
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi
from test_remote_code import CODE, HIDE_PACKAGES, REPOSITORY
from test_training_parameters import COMMON, data, data_flags, run_finetune  # noqa: F401
from transformers import trainer


PUSH = """
from conftest import make_model, make_processor
from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.model_card_visualchat import make_card
make_model().save_pretrained("trained")
card = make_card(make_model(), "trained")
card.write("data", "run 1", "Ten pictures of cats.")
card.save("trained/README.md")
model = VisualChatForConditionalGeneration.from_pretrained("trained")
print(model.push_to_hub("someone/model", processor=make_processor(), tags=["digits"]))
"""

# After the code of the card.
CHECK = """
import json
ids, pixel_values = torch.load(sys.argv[1])
print(json.dumps([type(processor).__name__, model(ids, pixel_values).logits.tolist(), session.messages]))
"""


def run(code, *arguments, hub, folder, python_path=""):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder),
        "HF_TOKEN": "hf_" + "a" * 34,
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = str(python_path)
    completed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return completed.stdout.splitlines()[-1]


def test_one_commit_makes_a_repository_that_anyone_loads(tmp_path):
    (tmp_path / "push").mkdir()
    (tmp_path / "load").mkdir()
    torch.save((tokens(3, "I", 4), pixels(0)), tmp_path / "inputs.pt")
    for seed, name in enumerate(("first", "second", "third")):
        draw_picture(seed).save(tmp_path / "load" / f"{name}.png")
    with HubStandIn() as hub:
        python_path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        address = run(PUSH, hub=hub, folder=tmp_path / "push", python_path=python_path)
        card = hub.files["someone/model"]["README.md"].decode()
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE))
        output = run(HIDE_PACKAGES + code + CHECK, tmp_path / "inputs.pt", hub=hub, folder=tmp_path / "load")
        assert address.startswith(f"{hub.address}/someone/model/commit/")
        assert len(hub.commits) == 1
        files = hub.files["someone/model"]
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
    } <= files.keys()
    assert {"chat_template.jinja", "tokenizer_config.json", *CODE} <= files.keys()
    assert "# someone/model\n" in card and 'checkpoint = "someone/model"\n' in card and code.count("session") == 3
    assert "Ten pictures of cats." in card and "<!-- data: run 1 -->" in card
    assert "- digits\n" in card and "{repo_id}" not in card and "{attention}" not in card
    assert "images through one softmax; an image token attends only to itself." in card
    name, logits, messages = json.loads(output)
    assert name == "VisualChatProcessor"
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "third.png" in str(messages[0]["content"]) and "second.png" not in str(messages[0]["content"])
    expected = make_model()(tokens(3, "I", 4), pixels(0)).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


def test_a_missing_card_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model card at .*nowhere\.md"):
        make_model().push_to_hub("someone/model", processor=make_processor(), card=str(tmp_path / "nowhere.md"))


@pytest.mark.parametrize("lora", [[], ["--lora", "language_model"]], ids=["weights", "adapter"])
def test_every_push_in_the_middle_of_training_is_complete(tmp_path, data, monkeypatch, lora):  # noqa: F811
    flags = [*COMMON, *data_flags(data), *lora, "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--push_to_hub", "true", "--hub_model_id", "someone/model", "--hub_token", "hf_x"]
    flags += ["--hub_strategy", "all_checkpoints", "--hub_always_push", "true"]
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.address)
        monkeypatch.setattr(trainer, "hf_api", lambda: api)
        run_finetune(monkeypatch, *flags, "--output_dir", tmp_path / "out")
    processor_code = {name for name in CODE if (REPOSITORY / "processing_visualchat" / name).is_file()}
    wanted = {"README.md", "chat_template.jinja", "processor_config.json", "tokenizer.json"}
    wanted |= {"adapter_config.json", "adapter_model.safetensors", *processor_code} if lora else set()
    wanted |= set() if lora else {"config.json", "generation_config.json", "model.safetensors", *CODE}
    pushed = [set(names) for _, names in hub.commits]
    for number in (1, 2):
        root, checkpoint = pushed[2 * number - 2 : 2 * number]
        assert wanted <= root and {f"checkpoint-{number}/{name}" for name in wanted} <= checkpoint
        card = hub.files["someone/model"][f"checkpoint-{number}/README.md"].decode()
        assert "# someone/model\n" in card and f"| {number} optimizer step" in card
    assert len(pushed) == 6 and wanted <= pushed[-1]
