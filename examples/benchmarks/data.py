"""
Measures the data pipeline: loading a mixture, collation, packing, and cached vision features.

    python examples/benchmarks/data.py                     # everything, takes minutes
    python examples/benchmarks/data.py --records 2000      # a smaller mixture, for a first try

- Collation over a training step: CPU time on one thread for the same batch of photographs (JPEG files) and text,
  interleaved, as a ratio of medians. The model is far smaller than a real one, whose steps take longer.
- Packed over padded batches: the training step on the same conversations.
- A later epoch over the first, with cached features of the frozen vision tower.
- Start-up time of a mixture, and memory growth while it is read, each in its own process.
- Padding of the paper's mixture: the number of samples of table 1 of arXiv 2309.14327, with simulated lengths.
- The same for simulated questions, 5 to 20 about each image, and the images that are computed for each question.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import compare
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisionFeatureCache, VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat, VisualChatProcessor
from processing_visualchat.data.packing import batching_table, compare_batching
from processing_visualchat.data.tables import format_table
from processing_visualchat.doctor.samples import make_estimating_processor


IMAGE_SIZE, PATCH_SIZE = 224, 14  # pixels; 256 tokens an image
IMAGE_LENGTH = (IMAGE_SIZE // PATCH_SIZE) ** 2
NUM_IMAGES = 200
WORDS = ("the", "a", "small", "red", "bus", "dog", "street", "next", "to", "under", "bright", "two", "people", "walk")

# Number of samples (table 1 of arXiv 2309.14327), range of images per sample, range of rounds per sample.
PAPER_MIXTURE = {
    "llava": (49_924, (1, 3), (1, 3)),
    "llava_dial": (37_818, (1, 2), (3, 10)),
    "otter_mimicit_cgd": (70_940, (2, 2), (1, 2)),
    "otter_mimicit_sd": (8_006, (2, 2), (1, 1)),
    "otter_mimicit_sn": (487, (2, 8), (1, 3)),
    "otter_mimicit_tvc": (2, (8, 8), (1, 1)),
    "otter_mimicit_vst": (115, (3, 8), (1, 2)),
    "llava_otter_blend": (48_869, (2, 2), (3, 8)),
    "sparkles_dialogue": (6_520, (2, 5), (2, 3)),
}


def draw_lengths(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images of each sample of the paper's mixture: 256 tokens per image, log-normal rounds of about 80."""
    rng = np.random.default_rng(seed)
    lengths, images = [], []
    for count, image_range, round_range in PAPER_MIXTURE.values():
        num_images = rng.integers(image_range[0], image_range[1] + 1, count)
        num_rounds = rng.integers(round_range[0], round_range[1] + 1, count)
        text = np.array([rng.lognormal(4.4, 0.6, rounds).sum() for rounds in num_rounds])
        lengths.append(num_images * IMAGE_LENGTH + text.astype(int))
        images.append(num_images)
    return np.concatenate(lengths), np.concatenate(images)


def draw_questions(seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """Tokens of each of 5 to 20 questions about 500 images, and their images; log-normal questions of about 40."""
    rng = np.random.default_rng(seed)
    images = [[str(image)] for image in range(500) for _ in range(rng.integers(5, 21))]
    return IMAGE_LENGTH + rng.lognormal(3.6, 0.4, len(images)).astype(int), images


def write_photographs(folder: Path, count: int) -> list[str]:
    """Writes different crops of two photographs as JPEG files of 640 by 427 pixels."""
    folder.mkdir(parents=True)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    rng = random.Random(0)
    for number in range(count):
        left, top = rng.randrange(100), rng.randrange(60)
        part = photographs[number % 2].crop((left, top, left + 540, top + 360)).resize((640, 427))
        part.save(folder / f"{number:012d}.jpg", quality=90)
    return [str(path) for path in sorted(folder.iterdir())]


def write_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def make_conversations(paths: list[str], count: int) -> list[dict]:
    """Conversations with 1 to 3 photographs and one round for each."""
    rng = random.Random(1)
    conversations = []
    for _ in range(count):
        messages: list[dict] = []
        for path in rng.sample(paths, rng.randint(1, 3)):
            question = [{"type": "image", "path": path}, {"type": "text", "text": write_text(rng, 12)}]
            answer = write_text(rng, rng.randrange(10, 120))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append({"messages": messages})
    return conversations


def make_processor() -> VisualChatProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    tokenizer = make_estimating_processor().tokenizer
    return VisualChatProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer, IMAGE_LENGTH)


def make_model_config() -> VisualChatConfig:
    """A vision tower of the size of ViT-S and a decoder of 8 layers with a hidden size of 512."""
    return VisualChatConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=512,
            intermediate_size=1365,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=16384,
        ),
        image_token_id=3,
        vision_feature_select_strategy="default",
    )


def compare_rows(variants: dict[str, Callable], repeats: int) -> list[tuple]:
    """Rows of the table: CPU time of each variant over that of the first, with quartiles."""
    measured = compare(variants, repeats)
    first, *others = variants
    rows = []
    for name in others:
        low, high = measured[name].quartiles
        milliseconds = [f"{1000 * measured[variant].seconds:.0f}" for variant in (name, first)]
        rows.append((f"{name} over {first}", f"{measured[name].ratio:.3f}", f"{low:.3f} to {high:.3f}", *milliseconds))
    return rows


def measure_batches(folder: Path, batch_size: int, repeats: int) -> list[tuple]:
    """Collation, packing and cached vision features, each against a training step on the same conversations."""
    torch.set_num_threads(1)
    conversations = make_conversations(write_photographs(folder / "photographs", 40), batch_size)
    torch.manual_seed(0)
    processor = make_processor()
    model = VisualChatForConditionalGeneration(make_model_config()).set_trainable().train()
    padded = DataCollatorForVisualChat(processor)
    packed = DataCollatorForVisualChat(processor, packing=True)
    batches = {"padded": padded(conversations), "packed": packed(conversations)}

    def step(batch, cache=None):
        model.model.vision_cache = cache
        model(**batch).loss.backward()
        model.zero_grad()

    cache = VisionFeatureCache()
    step(batches["padded"], cache)
    rows = compare_rows(
        {"a training step": lambda: step(batches["padded"]), "collation": lambda: padded(conversations)}, repeats
    )
    variants = {"padded": lambda: step(batches["padded"]), "a packed step": lambda: step(batches["packed"])}
    rows += compare_rows({"a padded one": variants["padded"], "a packed step": variants["a packed step"]}, repeats)
    return rows + compare_rows(
        {"the first": lambda: step(batches["packed"]), "a later epoch": lambda: step(batches["packed"], cache)},
        repeats,
    )


def write_records(root: Path, count: int) -> None:
    """Writes one data set of `count` records about a few hundred photographs."""
    (root / "llava").mkdir(parents=True)
    write_photographs(root / "coco" / "train2017", NUM_IMAGES)
    rng = random.Random(0)
    records = [
        {
            "id": str(number),
            "image": f"{number % NUM_IMAGES:012d}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{write_text(rng, 12)}?"},
                {"from": "gpt", "value": write_text(rng, rng.randrange(10, 120))},
            ],
        }
        for number in range(count)
    ]
    for name, part in (("detail_23k", records[: count // 2]), ("complex_reasoning_77k", records[count // 2 :])):
        (root / "llava" / f"{name}.json").write_text(json.dumps(part))


START = """
import json, sys, time
from processing_visualchat import DatasetSpec, MixtureConfig, load_mixture
start = time.perf_counter()
mixture = load_mixture(MixtureConfig((DatasetSpec("llava", concatenate=3),)), sys.argv[1])
seconds = time.perf_counter() - start

def own_memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024

order = [index % len(mixture.train) for index in range(int(sys.argv[2]))]
for index in order[:1000]:
    mixture.train[index]
before = own_memory()
for index in order:
    mixture.train[index]
print(json.dumps([seconds, before, own_memory()]))
"""


def measure_start(folder: Path, num_records: int) -> list[tuple]:
    """Time of a first and a second start, and memory before and after reading half as many samples as records."""
    write_records(folder / "data", num_records)
    rows = []
    own = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for start in ("first", "second"):
        completed = subprocess.run(
            [sys.executable, "-c", START, str(folder / "data"), str(num_records // 2)],
            capture_output=True, text=True, env={**os.environ, **own},
        )  # fmt: skip
        if completed.returncode:
            raise RuntimeError(completed.stderr[-2000:])
        seconds, before, after = json.loads(completed.stdout.splitlines()[-1])
        rows.append(
            (
                f"{start} start",
                f"{seconds:.1f} s",
                f"{before:.0f} MiB",
                f"{after:.0f} MiB",
                f"{after - before:+.1f} MiB",
            )
        )
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000, help="number of records of the mixture")
    parser.add_argument("--repeats", type=int, default=7, help="number of interleaved measurements of each variant")
    parser.add_argument("--batch_size", type=int, default=4, help="conversations per batch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = measure_batches(folder, options.batch_size, options.repeats)
        print(format_table([("CPU time on one thread", "ratio", "quartiles", "ms", "ms of baseline"), *rows]))
        rows = measure_start(folder, options.records)
        read = f"after {options.records // 2} samples"
        print("\n" + format_table([(f"{options.records} records", "time", "private memory", read, "growth"), *rows]))
    lengths, images = draw_lengths()
    waste = compare_batching(lengths, images, max_length=4096, batch_size=8)
    print(
        f"\nThe paper's mixture, {len(lengths)} samples of simulated lengths, packs of 4096 tokens, else batches of 8:"
    )
    print(format_table(batching_table(waste)))
    lengths, images = draw_questions()
    for attention, shared_length in (("mmca", IMAGE_LENGTH), ("causal", 0)):
        options = {"images": images, "shared_length": shared_length}
        waste = compare_batching(lengths, [1] * len(lengths), max_length=4096, batch_size=8, **options)
        print(f"\n{len(lengths)} simulated questions, 5 to 20 about each image, with {attention} attention:")
        print(format_table(batching_table(waste)))


if __name__ == "__main__":
    main()
