"""Pushing to the Hub with the official client, and loading what was pushed in a process without the packages."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_model, make_processor, pixels, tokens
from hub_stand_in import HubStandIn
from test_remote_code import CODE, HIDE_PACKAGES, REPOSITORY


PUSH = """
from conftest import make_model, make_processor
print(make_model().push_to_hub("someone/model", processor=make_processor(), tags=["digits"]))
"""

LOAD = """
import json, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("someone/model", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("someone/model", trust_remote_code=True)
ids, pixel_values = torch.load(sys.argv[1])
print(json.dumps([type(processor).__name__, model(ids, pixel_values).logits.tolist()]))
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
    with HubStandIn() as hub:
        address = run(PUSH, hub=hub, folder=tmp_path / "push", python_path=REPOSITORY / "tests")
        output = run(HIDE_PACKAGES + LOAD, tmp_path / "inputs.pt", hub=hub, folder=tmp_path / "load")
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
    card = files["README.md"].decode()
    assert "# someone/model" in card and 'from_pretrained("someone/model", trust_remote_code=True)' in card
    assert "- digits\n" in card and "{repo_id}" not in card and "{attention}" not in card
    assert "two softmaxes whose results are summed; an image token attends only to itself." in card
    name, logits = json.loads(output)
    assert name == "VisualChatProcessor"
    expected = make_model()(tokens(3, "I", 4), pixels(0)).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


def test_a_missing_card_is_refused_before_anything_is_sent(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No model card at .*nowhere\.md"):
        make_model().push_to_hub("someone/model", processor=make_processor(), card=str(tmp_path / "nowhere.md"))
