"""
Measures multi-modal causal attention against plain causal attention, in one run, as ratios.

    python examples/benchmark.py                  # the quick table
    python examples/benchmark.py --full           # also 8 x 576 + 512, a layer of 7B shape, training steps and prefill
    python examples/benchmark.py --output DIR     # where to leave benchmark.json and benchmark.png

Everything is measured beside the same computation with causal attention: repeats are interleaved, medians are
compared, and the spread is that of the ratio between its quartiles. On a CPU it is CPU time on one thread, in float32;
on a GPU it is device time, in bfloat16. Layouts are images x tokens of an image + text tokens, the text in equal parts
before, between and after the images. The floor counts the query-key pairs that MMCA needs over those of causal
attention. The form of 2023 computes both softmaxes over full score matrices in float32.
"""

import itertools
import json
import math
import platform
import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, LlamaConfig

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.plan_visualchat import plan_mmca, planned_attention


QUICK_LAYOUTS = [(1, 256, 128), (4, 256, 256), (8, 256, 512)]
FULL_LAYOUTS = [*QUICK_LAYOUTS, (8, 576, 512)]
LONGEST_OF_2023 = 3000  # tokens; beyond, its score matrices take minutes and gigabytes
USES_GPU = torch.cuda.is_available()
DEVICE = "cuda" if USES_GPU else "cpu"
DTYPE = torch.bfloat16 if USES_GPU else torch.float32


def modalities(layout: tuple[int, int, int]) -> torch.Tensor:
    """`mm_token_type_ids` of shape (1, S): text in equal parts before, between and after the images."""
    num_images, image_length, num_text = layout
    cuts = [num_text * part // (num_images + 1) for part in range(num_images + 2)]
    ids = []
    for start, end in itertools.pairwise(cuts):
        ids += [0] * (end - start) + [1] * image_length
    return torch.tensor([ids[:-image_length]], device=DEVICE)


def floor(ids: torch.Tensor) -> float:
    """Query-key pairs that MMCA computes, over those of causal attention."""
    is_text = ids[0] == 0
    num_pairs = (torch.arange(1, len(is_text) + 1, device=ids.device) * is_text).sum()
    return float(num_pairs) / (len(is_text) * (len(is_text) + 1) / 2)


def causal_attention(query, key, value):
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous()


def attention_of_2023(query, key, value, ids):
    """Two full float32 score matrices, masked and put through a softmax each."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query.float() @ key.float().transpose(2, 3)) / math.sqrt(query.shape[-1])
    is_image = ids[:, None, None, :].bool()
    position = torch.arange(ids.shape[1], device=ids.device)
    causal = position[:, None] >= position
    own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    is_image_query = ids[:, None, :, None].bool()
    output = 0
    for keys in (~is_image, is_image):
        allowed = causal & keys & (~is_image_query | own)
        weights = scores.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(dim=-1) * allowed
        output = output + weights.to(value.dtype) @ value
    return output.transpose(1, 2).contiguous()


def measure(function: Callable[[], object]) -> float:
    """Seconds of one call: CPU time, or device time between two events."""
    if not USES_GPU:
        start = time.process_time()
        function()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def compare(name: str, layout: tuple, variants: dict[str, Callable], repeats: int, lower_bound: float) -> list[dict]:
    """Interleaved repeats of every variant; the first is what the others are compared with."""
    for function in variants.values():
        function()
    times = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, function in variants.items():
            times[variant].append(measure(function))
    baseline, *others = variants
    rows = []
    for variant in others:
        ratios = [time / base for time, base in zip(times[variant], times[baseline])]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "measured": name,
                "layout": "{}x{}+{}".format(*layout),
                "variant": variant,
                "ratio": statistics.median(times[variant]) / statistics.median(times[baseline]),
                "spread": [quartiles[0], quartiles[2]],
                "floor": lower_bound,
                "milliseconds": 1000 * statistics.median(times[variant]),
                "causal_milliseconds": 1000 * statistics.median(times[baseline]),
            }
        )
    return rows


def benchmark_attention(layout, num_heads, num_key_heads, head_dim, repeats, backward):
    """Attention alone, as a layer of the decoder calls it: sorted tokens, (B, S, H, D) out."""
    ids = modalities(layout)
    plan = plan_mmca(ids)
    generator = torch.Generator(DEVICE).manual_seed(0)
    query, key, value = (
        torch.randn(1, ids.shape[1], heads, head_dim, device=DEVICE, dtype=DTYPE, generator=generator)
        .transpose(1, 2)
        .requires_grad_(backward)
        for heads in (num_heads, num_key_heads, num_key_heads)
    )
    variants = {
        "causal": lambda: causal_attention(query, key, value),
        "mmca": lambda: planned_attention(query, key, value, plan),
    }
    if ids.shape[1] <= LONGEST_OF_2023:
        variants["form of 2023"] = lambda: attention_of_2023(query, key, value, ids)
    if backward:
        variants = {
            name: lambda function=function: torch.autograd.grad(function().sum(), (query, key, value))
            for name, function in variants.items()
            if name != "form of 2023"
        }
    name = f"attention, {'forward and backward' if backward else 'forward'}"
    return compare(name, layout, variants, repeats, floor(ids))


def build(layout, attention_type, hidden_size=512, num_layers=8, num_heads=8) -> VisualChatForConditionalGeneration:
    """A decoder of the given shape under a vision tower that costs next to nothing."""
    torch.manual_seed(0)
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=hidden_size,
            intermediate_size=round(hidden_size * 8 / 3),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=8192,
        ),
        image_token_id=999,
        image_seq_length=layout[1],
        attention_type=attention_type,
    )
    return VisualChatForConditionalGeneration(config).to(DEVICE, DTYPE).eval()


def benchmark_model(layout, repeats, trains, **shape):
    """Prefill with all images new, or a training step with the decoder frozen, from embeddings onward."""
    ids = modalities(layout)
    models = {kind: build(layout, kind, **shape) for kind in ("causal", "mmca")}
    hidden_size = models["mmca"].config.text_config.hidden_size
    embeds = torch.randn(1, ids.shape[1], hidden_size, device=DEVICE, dtype=DTYPE).requires_grad_(trains)
    labels = torch.randint(0, 999, ids.shape, device=DEVICE).masked_fill(ids.bool(), -100)

    def step(model):
        model.requires_grad_(False)
        model.train(trains)
        if trains:
            model(inputs_embeds=embeds, mm_token_type_ids=ids, labels=labels).loss.backward()
        else:
            with torch.no_grad():
                model(inputs_embeds=embeds, mm_token_type_ids=ids, use_cache=True, logits_to_keep=1)

    variants = {kind: lambda model=model: step(model) for kind, model in models.items()}
    config = models["mmca"].config.text_config
    shape_name = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
    name = f"{'training step, frozen decoder' if trains else 'prefill, images new'} ({shape_name})"
    return compare(name, layout, variants, repeats, floor(ids))


def format_table(rows: list[dict]) -> str:
    lines = [f"{'measured':<58} {'layout':>10} {'variant':>13} {'ratio':>7} {'quartiles':>15} {'floor':>6} {'ms':>9}"]
    for row in rows:
        spread = "{:.3f} to {:.3f}".format(*row["spread"])
        lines.append(
            f"{row['measured']:<58} {row['layout']:>10} {row['variant']:>13} {row['ratio']:>7.3f} {spread:>15} "
            f"{row['floor']:>6.3f} {row['milliseconds']:>9.1f}"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Ratios as bars beside the floor by operations."""
    matplotlib.use("Agg")
    rows = [row for row in rows if row["variant"] == "mmca"]
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)))
    labels = [f"{row['measured']}  {row['layout']}" for row in rows]
    axis.barh(labels, [row["ratio"] for row in rows], label="MMCA")
    axis.plot([row["floor"] for row in rows], labels, "k|", markersize=14, label="floor of attention by operations")
    axis.axvline(1.0, color="grey", linewidth=1)
    axis.set_xlabel("time, causal attention = 1")
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all layouts, a layer of 7B shape, training and prefill")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats of every measurement")
    parser.add_argument("--heads", type=int, default=32, help="query heads of the attention alone")
    parser.add_argument("--key_heads", type=int, default=32, help="key/value heads of the attention alone")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for benchmark.json and benchmark.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    repeats, full = arguments.repeats, arguments.full
    jobs = [
        lambda layout=layout, backward=backward: benchmark_attention(
            layout, arguments.heads, arguments.key_heads, 128, repeats, backward
        )
        for layout in (FULL_LAYOUTS if full else QUICK_LAYOUTS)
        for backward in (False, True)
    ]
    if full:
        layer = {"hidden_size": 4096, "num_layers": 1, "num_heads": 32}
        jobs.append(lambda: benchmark_model((8, 256, 512), 3, trains=False, **layer))
        jobs += [lambda trains=trains: benchmark_model((8, 256, 200), repeats, trains) for trains in (False, True)]
    rows = [row for job in tqdm(jobs, desc="Measuring", unit="table") for row in job()]

    machine = torch.cuda.get_device_name() if USES_GPU else f"{platform.machine()} CPU, one thread"
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "dtype": str(DTYPE), "torch": torch.__version__, "rows": rows}
    (arguments.output / "benchmark.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, arguments.output / "benchmark.png")
    print(f"\nTime over that of causal attention, on {machine}, {DTYPE}\n\n{format_table(rows)}")


if __name__ == "__main__":
    main()
