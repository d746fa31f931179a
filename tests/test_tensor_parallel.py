"""Two real processes that each hold half of every sharded weight."""

import os
import subprocess
import sys

import pytest
from conftest import make_model
from test_remote_code import REPOSITORY


pytestmark = [pytest.mark.slow, pytest.mark.processes]

RANK = """
import sys, torch
from conftest import draw_picture, make_processor, pixels, tokens
from transformers.distributed import DistributedConfig
from modeling_visualchat import ImageMemory, VisualChatForConditionalGeneration
model = VisualChatForConditionalGeneration.from_pretrained(
    sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto")
).eval()
whole = VisualChatForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
assert weight.to_local().shape == (16, 32), weight.to_local().shape
ids, images = tokens(3, "I", 4), pixels(0)
with torch.no_grad():
    torch.testing.assert_close(model(ids, images).logits, whole(ids, images).logits, rtol=1e-4, atol=1e-4)
    options = {"pixel_values": images, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
replies = []
for each in (model, whole):
    session = each.start_chat(make_processor(), ImageMemory(), max_new_tokens=5)
    replies.append([session.ask("What?", [draw_picture(0)]), session.ask("And this?", [draw_picture(1)])])
    assert session.usage.cached_text_tokens > 0
assert replies[0] == replies[1], replies
torch.distributed.destroy_process_group()
"""


def test_two_processes_with_half_the_weights_each(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    completed = subprocess.run(
        [*command, str(tmp_path / "rank.py"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests")},
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
