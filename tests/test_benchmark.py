"""The benchmark runs, and what it compares computes the same."""

import json
import subprocess
import sys

import pytest
import torch
from test_finetune import EXAMPLES, environment

from modeling_visualchat import mmca_attention


pytestmark = pytest.mark.slow


def test_the_quick_table(tmp_path):
    flags = ["--repeats", "2", "--heads", "2", "--key_heads", "1", "--output", str(tmp_path)]
    completed = subprocess.run(
        [sys.executable, str(EXAMPLES / "benchmark.py"), *flags],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    document = json.loads((tmp_path / "benchmark.json").read_text())
    floors = {row["layout"]: round(row["floor"], 3) for row in document["rows"]}
    assert floors == {"1x256+128": 0.333, "4x256+256": 0.201, "8x256+512": 0.2}
    assert {row["variant"] for row in document["rows"]} == {"mmca", "form of 2023"}
    assert all(row["ratio"] > 0 for row in document["rows"])
    assert (tmp_path / "benchmark.png").stat().st_size > 0
    assert "attention, forward and backward" in completed.stdout


def test_the_form_of_2023_is_another_form_of_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from benchmark import attention_of_2023, modalities

    ids = modalities((3, 5, 9)).cpu()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, ids.shape[1], 8, generator=generator) for heads in (4, 2, 2))
    expected = mmca_attention(query, key, value, ids).transpose(1, 2)
    torch.testing.assert_close(attention_of_2023(query, key, value, ids), expected, rtol=1e-5, atol=1e-5)
