"""The benchmark runs, and what it compares computes the same."""

import json
import subprocess
import sys

import pytest
import torch
from test_finetune import EXAMPLES, environment

from modeling_visualchat import mmca_attention


pytestmark = pytest.mark.slow

BENCHMARKS = EXAMPLES / "benchmarks"


def test_the_quick_table(tmp_path):
    flags = ["--repeats", "2", "--heads", "2", "--key_heads", "1", "--output", str(tmp_path)]
    completed = subprocess.run(
        [sys.executable, str(BENCHMARKS / "attention.py"), *flags],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    document = json.loads((tmp_path / "benchmark.json").read_text())
    floors = {row["layout"]: round(row["floor"], 3) for row in document["rows"]}
    assert floors == {"1x256+128": 0.333, "4x256+256": 0.201, "8x256+512": 0.2}
    assert {row["variant"] for row in document["rows"]} == {"mmca_sum", "original implementation"}
    assert all(row["ratio"] > 0 for row in document["rows"])
    assert (tmp_path / "benchmark.png").stat().st_size > 0
    assert "attention, forward and backward" in completed.stdout


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_whole_models_compute_the_same_with_images_known(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention as benchmark

    others = [kind for kind in benchmark.VARIANTS if kind != "causal"]
    models = benchmark.Models((2, 4, 7), 2, SHAPE, others)
    names = [name for name in vars(benchmark.Models) if name.startswith("benchmark_")]
    rows = [row for name in names for row in getattr(models, name)(2)]
    assert len(names) == 6 and {row["variant"] for row in rows} == set(benchmark.VARIANTS)
    assert {row["variant"] for row in rows if "shared" not in row["measured"]} == set(others)
    known = [row["variant"] for row in rows if "cached" in row["measured"]]
    assert known == [kind for kind in others if benchmark.VARIANTS[kind].get("image_attention") != "self_and_text"]
    assert all(row["ratio"] > 0 and row["mebibytes"] > 0 for row in rows)
    benchmark.draw([{**rows[0], "floor": 0.5}, *rows[1:]], tmp_path / "plot.png")
    assert rows[-1]["measured"] in benchmark.format_table(rows, 1e9)
    model = models.models["mmca"]
    known = model(
        models.ids * 999 + (1 - models.ids) * 7, image_states=model.model.compute_image_states(models.images)
    )
    expected = model(**models.inputs)
    torch.testing.assert_close(known.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_memory_is_the_peak_allocation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measuring import peak_bytes

    def run():
        for _ in range(3):
            first = torch.ones(2**18)  # 1 MiB each
            first = first + 1

    assert 2**21 <= peak_bytes(run) < 4 * 2**20


def test_wrong_flags_are_named():
    for flags, message in {
        ("--repeats", "1"): "--repeats has to be at least 2",
        ("--heads", "5", "--key_heads", "2"): "--key_heads 2 does not divide --heads 5",
    }.items():
        command = [sys.executable, str(BENCHMARKS / "attention.py"), *flags]
        completed = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100)
        assert completed.returncode == 2 and message in completed.stderr


def test_the_original_implementation_computes_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from attention import modalities, original_attention

    ids = modalities((3, 5, 9)).cpu()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, ids.shape[1], 8, generator=generator) for heads in (4, 2, 2))
    expected = mmca_attention(query, key, value, ids).transpose(1, 2)
    torch.testing.assert_close(original_attention(query, key, value, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def llava_benchmark(monkeypatch):
    """The comparison with the LLaVA class, on tiny models and images of four tokens."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data

    monkeypatch.setattr(data, "IMAGE_SIZE", 28)
    monkeypatch.setattr(data, "IMAGE_LENGTH", 4)
    config = data.make_model_config()
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = 32, 48, 2, 4
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 8
    monkeypatch.setattr(data, "make_model_config", lambda: config)
    monkeypatch.delitem(sys.modules, "llava", raising=False)
    import llava

    yield llava
    del sys.modules["llava"]


def test_a_step_computes_the_same_as_that_of_the_llava_class(llava_benchmark):
    models = llava_benchmark.make_models()
    assert len(models) == 3
    for name in llava_benchmark.BATCH_SIZE:
        losses = {
            row: llava_benchmark.make_step(variant, models[variant.model], name, 8)()
            for row, variant in llava_benchmark.VARIANTS.items()
            if not variant.shared
        }
        llava, causal, mmca, *others = losses.values()
        assert llava == pytest.approx(causal, rel=1e-5)
        assert [mmca] * 2 == pytest.approx(others, rel=1e-5)
        assert abs(mmca / causal - 1) > 1e-4
        rows = llava_benchmark.measure_workload(name, models, 4, 2)
        assert [row[0] for row in rows] == list(llava_benchmark.VARIANTS)[: len(rows)]
        assert len(rows) == len(losses) + (name != "the paper's mixture")


def test_the_data_pipeline_is_measured():
    completed = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "data.py"),
            "--records",
            "600",
            "--repeats",
            "2",
            "--batch_size",
            "1",
        ],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=400,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    rows = [line.split("  ") for line in completed.stdout.splitlines()]
    measured = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    for name in ("collation over a training step", "a packed step over a padded one", "a later epoch over the first"):
        assert float(measured[name][0]) > 0
    assert measured["second start"][-1].endswith("MiB")
    assert measured["packed"][1] == "0.0%" and measured["random order, padded"][1] != "0.0%"


def test_conversations_about_the_same_images_are_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import conversations

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    for name, value in (("LENGTH", 16), ("NUM_TEXT", 4), ("SMALL", shape)):
        monkeypatch.setattr(conversations, name, value)
    monkeypatch.setattr("sys.argv", ["conversations.py", "--conversations", "4", "--images", "3", "--repeats", "2"])
    conversations.main()
    lines = capsys.readouterr().out.splitlines()
    sizes = {line[:52].strip(): line.split()[-1] for line in lines if line[:1].isalnum()}
    assert sizes["a copy in each conversation"] == f"{4 * 3 * 16 * 8 * 64 * 2 * 4 / 2**20:.1f}"
    assert sizes["by reference"] == f"{3 * 16 * 8 * 64 * 2 * 4 / 2**20:.1f}"
    assert sizes["together"] == sizes["one after the other"] == f"{3 * 16 * 64 * 8 * 2 * 4 / 2**20:.1f}"
    assert float(sizes["as computed"]) == 0.0 < float(sizes["8 bits"]) < float(sizes["4 bits"]) < 0.5
