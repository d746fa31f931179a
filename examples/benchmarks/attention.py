"""
Measures multi-modal causal attention against plain causal attention, in one run, as ratios.

    python examples/benchmarks/attention.py                # the quick table: attention alone
    python examples/benchmarks/attention.py --full         # all layouts, and whole models: prefill, decoding, training
    python examples/benchmarks/attention.py --tables types # one table: attention, layer, types, images or shared
    python examples/benchmarks/attention.py --output DIR   # folder for benchmark.json and benchmark.png

Each measurement is interleaved with the same computation under causal attention. Ratios compare medians, and quartiles
are those of the ratio. On a CPU, time is CPU time on one thread, in float32; on a GPU it is device time, in bfloat16.
"of rate" is the fraction of the measured matrix multiplication rate that the counted operations reach. Memory is the
peak allocation beyond inputs and weights. Layouts are images x tokens per image + text tokens, with the text in equal
parts before, between and after the images. The floor is the number of query-key pairs of MMCA over that of causal
attention. The original implementation computes both softmaxes over full float32 score matrices. The table "shared"
is not against causal attention: for each attention type, it is a training step on eight conversations about the same
images over one on eight about different images, per conversation. The data pipeline is measured by data.py.
"""

import itertools
import json
import math
import platform
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import measuring
import torch
from matplotlib import pyplot
from measuring import DEVICE, DTYPE, USES_GPU, measure
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, LlamaConfig

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import ATTENTION_TYPES, ImageMemory, VisualChatForConditionalGeneration
from modeling_visualchat.image_states_visualchat import ImageStream
from modeling_visualchat.placed_images_visualchat import Place, PlacedImages
from modeling_visualchat.plan_visualchat import make_plan


QUICK_LAYOUTS = [(1, 256, 128), (4, 256, 256), (8, 256, 512)]
FULL_LAYOUTS = [*QUICK_LAYOUTS, (8, 576, 512)]
NUM_SHARING = 8  # conversations about the same images
# Fields of `VisualChatConfig` by the name of a variant; "mmca" is that of new models.
VARIANTS: dict[str, dict[str, str]] = {"mmca": {}}
VARIANTS |= {"mmca_sum" if key == "mmca" else key: each.options for key, each in ATTENTION_TYPES.items()}
MAX_ORIGINAL_LENGTH = 3000  # tokens; for longer sequences, its score matrices take minutes and gigabytes


def modalities(layout: tuple[int, int, int]) -> torch.Tensor:
    """`mm_token_type_ids` of shape (1, S): text in equal parts before, between and after the images."""
    num_images, image_length, num_text = layout
    cuts = [num_text * part // (num_images + 1) for part in range(num_images + 2)]
    ids = []
    for start, end in itertools.pairwise(cuts):
        ids += [0] * (end - start) + [1] * image_length
    return torch.tensor([ids[:-image_length]], device=DEVICE)


def floor(ids: torch.Tensor) -> float:
    """The number of query-key pairs of MMCA over that of causal attention."""
    is_text = ids[0] == 0
    num_pairs = (torch.arange(1, len(is_text) + 1, device=ids.device) * is_text).sum()
    return float(num_pairs) / (len(is_text) * (len(is_text) + 1) / 2)


def causal_attention(query, key, value):
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous()


def original_attention(query, key, value, ids):
    """The original implementation: two full float32 score matrices, each masked and normalized by a softmax."""
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


def compare(
    name: str,
    layout: tuple,
    variants: dict[str, Callable],
    repeats: int,
    lower_bound: float | None = None,
    operations: float | None = None,
) -> list[dict]:
    """
    Measures all variants in interleaved repeats, and compares the first with each of the others.

    Args:
        name (`str`): What is measured.
        layout (`tuple` of 3 `int`): Images, tokens per image, text tokens.
        variants (`dict`): Functions of no arguments by name.
        repeats (`int`): Number of measurements of each.
        lower_bound (`float`, *optional*): The ratio of query-key pairs.
        operations (`float`, *optional*): Floating-point operations of MMCA.
    """
    measured = measuring.compare(variants, repeats)
    baseline, *others = variants
    causal = measured[baseline]
    return [
        {
            "measured": name,
            "layout": "{}x{}+{}".format(*layout),
            "variant": variant,
            "ratio": measured[variant].ratio,
            "spread": list(measured[variant].quartiles),
            "floor": lower_bound,
            "milliseconds": 1000 * measured[variant].seconds,
            "causal_milliseconds": 1000 * causal.seconds,
            "mebibytes": measured[variant].peak_bytes / 2**20,
            "causal_mebibytes": causal.peak_bytes / 2**20,
            "operations_per_second": (
                None if operations is None or variant != "mmca_sum" else operations / measured[variant].seconds
            ),
        }
        for variant in others
    ]


def benchmark_attention(layout, num_heads, num_key_heads, head_dim, repeats, backward):
    """
    Attention alone, as a decoder layer calls it in a training step: causal attention maps (B, H, S, D) to
    (B, S, H, D); MMCA, in the paper's form, takes images and text separately.
    """
    num_images, image_length, num_text = layout
    ids = modalities(layout)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(batch_size, length, heads):
        states = torch.randn(batch_size, length, heads, head_dim, device=DEVICE, dtype=DTYPE, generator=generator)
        return states.transpose(1, 2).requires_grad_(backward)

    heads = (num_heads, num_key_heads, num_key_heads)
    whole = [draw(1, ids.shape[1], count) for count in heads]
    text = [draw(1, num_text, count) for count in heads]
    images = [draw(num_images, image_length, count) for count in heads]
    plan = make_plan(ids)
    layer = nn.Module()
    layer.layer_idx = 0

    def mmca():
        stream = ImageStream()
        own = stream.attend(layer, *images, None, 0.0)
        places = [Place(image, 0, image_length, 0) for image in range(num_images)]
        placed = PlacedImages([stream.keys[0]], [stream.values[0]], [places])
        return own, replace(plan, images=placed).attend(layer, *text, None, 0.0)

    variants = {"causal": lambda: causal_attention(*whole), "mmca_sum": mmca}
    if backward:

        def causal_backward():
            torch.autograd.grad(causal_attention(*whole).sum(), whole)

        def mmca_backward():
            own, read = mmca()
            torch.autograd.grad(own.sum() + read.sum(), [*text, *images[1:]])

        variants = {"causal": causal_backward, "mmca_sum": mmca_backward}
    elif ids.shape[1] <= MAX_ORIGINAL_LENGTH:
        variants["original implementation"] = lambda: original_attention(*whole, ids)
    num_pairs = floor(ids) * ids.shape[1] * (ids.shape[1] + 1) / 2
    operations = (
        4 * num_pairs * num_heads * head_dim * (3.5 if backward else 1)
    )  # a backward pass costs 2.5 forward passes
    name = f"attention, {'forward and backward' if backward else 'forward'}"
    return compare(name, layout, variants, repeats, floor(ids), operations)


MODEL_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
MODEL_8B = {**MODEL_7B, "intermediate_size": 14336, "num_key_value_heads": 8}
SMALL = {"hidden_size": 512, "intermediate_size": 1365, "num_attention_heads": 8, "num_key_value_heads": 8}


def build(layout, options, num_layers, shape) -> VisualChatForConditionalGeneration:
    """A decoder of the given shape with a vision tower of negligible cost."""
    torch.manual_seed(0)
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8 * math.isqrt(layout[1]),
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=1000, num_hidden_layers=num_layers, max_position_embeddings=16384, pad_token_id=None, **shape
        ),
        image_token_id=999,
        vision_feature_select_strategy="default",
        cross_layer_interval=min(4, num_layers),
        **options,
    )
    with torch.device(DEVICE):
        model = VisualChatForConditionalGeneration(config)
    return model.to(DTYPE).set_trainable().eval()


class Models:
    """
    The same decoder with causal attention and with others, and a conversation of the given layout.

    Args:
        layout (`tuple` of 3 `int`): Images, tokens per image, text tokens.
        num_layers (`int`): Layers of the decoder.
        shape (`dict`): Its sizes.
        others (`list` of `str`, *optional*): Attention types, keys of `VARIANTS`; by default MMCA.
    """

    def __init__(self, layout, num_layers, shape, others=("mmca",)):
        self.layout, self.name = layout, f"{num_layers} layer{'s' * (num_layers > 1)}, {shape['hidden_size']} wide"
        kinds = {kind: VARIANTS[kind] for kind in ("causal", *others)}
        self.models = {kind: build(layout, options, num_layers, shape) for kind, options in kinds.items()}
        size = self.models["mmca"].config.vision_config.image_size
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.images = torch.randn(layout[0], 3, size, size, device=DEVICE, dtype=DTYPE, generator=generator)
        self.ids = modalities(layout)
        self.inputs = {"input_ids": self.ids * 999 + (1 - self.ids) * 7, "pixel_values": self.images}

    def compare(self, what: str, step: Callable, repeats: int, causal: Callable | None = None) -> list[dict]:
        """Times `step(model)` of all models; `causal` replaces the step of the first."""
        variants = {kind: partial(step, model) for kind, model in self.models.items()}
        variants["causal"] = partial(causal or step, self.models["causal"])
        return compare(f"{what} ({self.name})", self.layout, variants, repeats)

    @torch.no_grad()
    def prefill(self, model):
        return model(**self.inputs, use_cache=True, logits_to_keep=1)

    def benchmark_layer(self, repeats):
        """A layer in the middle of a decoder, whose output is computed at image tokens too."""
        step = torch.no_grad()(lambda model: model.model(**self.inputs, use_cache=False))
        return self.compare("decoder layer", step, repeats)

    def benchmark_new(self, repeats):
        return self.compare("prefill, new images", self.prefill, repeats)

    def benchmark_known(self, repeats):
        memory = ImageMemory()

        @torch.no_grad()
        def prefill_known(model):
            states = memory.get_states(model.model, self.images)
            return model(self.inputs["input_ids"], image_states=states, use_cache=True, logits_to_keep=1)

        others = [kind for kind in self.models if kind != "causal"]
        dependent = [kind for kind in others if not self.models[kind].model.supports_image_memory()]
        left_out = {kind: self.models.pop(kind) for kind in dependent}
        rows = self.compare("prefill, cached images", prefill_known, repeats, causal=self.prefill)
        self.models |= left_out
        assert memory.misses == self.layout[0] * len(rows) and memory.hits > 0
        return rows

    def benchmark_decoding(self, repeats):
        caches = {model: self.prefill(model).past_key_values for model in self.models.values()}
        token = self.inputs["input_ids"][:, :1]
        kinds = nn.functional.pad(self.ids, (0, 1))
        position = torch.tensor([[self.ids.shape[1]]], device=DEVICE)

        @torch.no_grad()
        def decode(model):
            model(token, mm_token_type_ids=kinds, position_ids=position, past_key_values=caches[model])
            caches[model].crop(-1)

        return self.compare("decoding, one token", decode, 5 * repeats)

    def benchmark_training(self, repeats):
        labels = self.inputs["input_ids"].masked_fill(self.ids.bool(), -100)

        def step(model):
            model.train()
            model(**self.inputs, labels=labels).loss.backward()
            model.zero_grad()
            model.eval()

        return self.compare("training step, frozen decoder", step, repeats)

    def benchmark_shared(self, repeats):
        """A packed row of conversations about the same images, over one about different images."""
        ids, length = self.ids.repeat(1, NUM_SHARING), self.ids.shape[1]
        inputs = {"input_ids": self.inputs["input_ids"].repeat(1, NUM_SHARING)}
        inputs["position_ids"] = torch.arange(length, device=DEVICE).repeat(NUM_SHARING)[None]
        inputs["labels"] = inputs["input_ids"].masked_fill(ids.bool(), -100)
        shared = self.images.repeat(NUM_SHARING, 1, 1, 1)
        different = shared + torch.arange(len(shared), device=DEVICE, dtype=DTYPE)[:, None, None, None]

        def step(model, images):
            model.train()
            model(**inputs, pixel_values=images).loss.backward()
            model.zero_grad()
            model.eval()

        rows = []
        for kind, model in self.models.items():
            variants = {"different": partial(step, model, different), kind: partial(step, model, shared)}
            rows += compare(f"training, shared images ({self.name})", self.layout, variants, repeats)
        for row in rows:
            row |= {name: row[name] / NUM_SHARING for name in ("milliseconds", "causal_milliseconds")}
        return rows


def matrix_rate() -> float:
    """Floating-point operations per second of a large matrix multiplication on this machine."""
    size = 8192 if USES_GPU else 1024
    left, right = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    times = [measure(lambda: left @ right) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:])


TABLES = ("attention", "layer", "types", "images", "shared")


def plan_jobs(arguments) -> list[Callable[[], list[dict]]]:
    """What to measure, in order."""
    repeats, layouts = arguments.repeats, FULL_LAYOUTS if arguments.full else QUICK_LAYOUTS

    def run(layout, num_layers, shape, *names, others=("mmca",)):
        models = Models(layout, num_layers, shape, others)
        return [row for name in names for row in getattr(models, name)(repeats)]

    shape = {"7b": MODEL_7B, "8b": MODEL_8B}[arguments.shape]
    whole = (8, shape) if USES_GPU else (8, SMALL)
    everything = ("benchmark_new", "benchmark_known", "benchmark_decoding", "benchmark_training")
    others = [kind for kind in VARIANTS if kind != "causal"]
    heads = (arguments.heads, arguments.key_heads, 128)
    jobs = {
        "attention": [
            partial(benchmark_attention, layout, *heads, repeats, backward)
            for layout in layouts
            for backward in (False, True)
        ],
        "layer": [partial(run, (8, 256, 512), 1, shape, "benchmark_layer")],
        "types": [partial(run, (8, 256, 200), *whole, *everything, others=others)],
        "images": [partial(run, (count, 256, 200), *whole, "benchmark_known") for count in (2, 4, 16)],
        "shared": [partial(run, (1, 256, 48), *whole, "benchmark_shared", others=others)],
    }
    return [job for table in arguments.tables for job in jobs[table]]


def format_table(rows: list[dict], rate: float) -> str:
    header = f"{'measured':<56} {'layout':>10} {'variant':>23} {'ratio':>7} {'quartiles':>15} {'floor':>6}"
    lines = [f"{header} {'ms':>9} {'MiB':>8} {'of causal':>9} {'of rate':>8}"]
    for row in rows:
        spread = "{:.3f} to {:.3f}".format(*row["spread"])
        bound = "" if row["floor"] is None else f"{row['floor']:.3f}"
        memory = row["mebibytes"] / row["causal_mebibytes"]
        speed = "" if row["operations_per_second"] is None else f"{row['operations_per_second'] / rate:.2f}"
        lines.append(
            f"{row['measured']:<56} {row['layout']:>10} {row['variant']:>23} {row['ratio']:>7.3f} {spread:>15} "
            f"{bound:>6} {row['milliseconds']:>9.1f} {row['mebibytes']:>8.1f} {memory:>9.2f} {speed:>8}"
        )
    return "\n".join(line.rstrip() for line in lines)


def draw(rows: list[dict], path: Path) -> None:
    """Draws the ratios as bars, with the floor of each."""
    matplotlib.use("Agg")
    rows = [row for row in rows if row["variant"] == ("mmca_sum" if "attention" in row["measured"] else "mmca")]
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.35 * len(rows)))
    labels = [f"{row['measured']}  {row['layout']}" for row in rows]
    errors = [[abs(row["ratio"] - row["spread"][end]) for row in rows] for end in (0, 1)]
    axis.barh(labels, [row["ratio"] for row in rows], xerr=errors, ecolor="grey", label="MMCA, with quartiles")
    bounds = [(row["floor"], label) for row, label in zip(rows, labels) if row["floor"] is not None]
    axis.plot(*zip(*bounds), "k|", markersize=14, label="floor: ratio of query-key pairs")
    axis.axvline(1.0, color="grey", linewidth=1)
    axis.set_xlabel("time, causal attention = 1")
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="measure all layouts, and all tables")
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="by default attention; with --full all")
    parser.add_argument("--repeats", type=int, default=7, help="number of interleaved measurements of each variant")
    parser.add_argument("--heads", type=int, default=32, help="query heads where attention is measured alone")
    parser.add_argument("--key_heads", type=int, default=32, help="key/value heads where attention is measured alone")
    parser.add_argument("--shape", choices=["7b", "8b"], default="7b", help="Llama shape of the decoder layer")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for benchmark.json and benchmark.png")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats has to be at least 2, to compute a spread")
    if arguments.heads % arguments.key_heads:
        parser.error(f"--key_heads {arguments.key_heads} does not divide --heads {arguments.heads}")
    arguments.tables = arguments.tables or (TABLES if arguments.full else TABLES[:1])
    torch.set_num_threads(1)

    rate = matrix_rate()
    rows = [row for job in tqdm(plan_jobs(arguments), desc="Measuring", unit="table") for row in job()]
    machine = torch.cuda.get_device_name() if USES_GPU else f"{platform.machine()} CPU, one thread"
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine, "dtype": str(DTYPE), "torch": torch.__version__, "matrix_rate": rate, "rows": rows,
    }  # fmt: skip
    (arguments.output / "benchmark.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, arguments.output / "benchmark.png")
    print(
        f"\nTime over that of causal attention, on {machine}, {DTYPE}, matrix products at {rate / 1e12:.3g} "
        f"Tflop/s\n\n{format_table(rows, rate)}"
    )


if __name__ == "__main__":
    main()
