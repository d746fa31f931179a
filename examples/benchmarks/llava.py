"""
Compares a training step with that of transformers' LLaVA class on the same weights, one change after the other.

    python examples/benchmarks/llava.py                 # takes minutes
    python examples/benchmarks/llava.py --conversations 4 --repeats 2

The baseline is `LlavaForConditionalGeneration` with causal attention and padded batches. Both train the projector and
the embeddings. Each row keeps the changes of the rows above it, and the loss of the first two has to be the same. Two
workloads: conversations of the lengths of the paper's mixture, and conversations of eight about one image, with which
batches of the other rows show eight different ones. Time is CPU time on one thread; memory is the peak allocation.
"""

import copy
import platform
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measuring
import numpy as np
import torch
from data import IMAGE_LENGTH, IMAGE_SIZE, draw_lengths, draw_questions, make_model_config, make_processor, write_text
from measuring import DEVICE, DTYPE
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from configuration_visualchat import attention_defaults
from modeling_visualchat import VisionFeatureCache, VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat
from processing_visualchat.data.tables import format_table


sys.path.insert(0, str(Path(__file__).parent.parent))
from convert_llava import build_config, move_weights


BATCH_SIZE = {"the paper's mixture": 4, "eight conversations about an image": 8}
QUESTION_LENGTH = 12  # tokens


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    model: str  # "llava" or an attention type
    packing: bool = False
    features: bool = False  # kept
    shared: bool = False  # images of a batch


VARIANTS = {
    "LLaVA class, padded": Variant("llava"),
    "causal, padded": Variant("causal"),
    "+ multi-modal causal attention": Variant("mmca"),
    "+ packing": Variant("mmca", packing=True),
    "+ cached vision features": Variant("mmca", packing=True, features=True),
    "+ shared images": Variant("mmca", packing=True, features=True, shared=True),
}


def make_models() -> dict[str, torch.nn.Module]:
    """The LLaVA class and VisualChat with two attention types, all with the same weights."""
    torch.manual_seed(0)
    parts = make_model_config()
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=parts.vision_config,
            text_config=parts.text_config,
            image_token_index=parts.image_token_id,
            vision_feature_select_strategy="default",
        )
    ).eval()
    models: dict[str, torch.nn.Module] = {"llava": llava}
    for name in ("causal", "mmca"):
        config = build_config(llava, (3, IMAGE_SIZE, IMAGE_SIZE))
        config.update({"attention_type": name} | attention_defaults(name))
        models[name] = move_weights(copy.deepcopy(llava), config).set_trainable()
    trained = {id(llava.get_input_embeddings().weight), *map(id, llava.model.multi_modal_projector.parameters())}
    for parameter in llava.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return {name: model.to(DEVICE, DTYPE).train() for name, model in models.items()}


def draw_image(rng: random.Random) -> Image.Image:
    pixels = np.frombuffer(rng.randbytes(3 * 16 * 16), np.uint8).reshape(16, 16, 3)
    return Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE))


def make_conversation(rng: random.Random, images: list[Image.Image], num_tokens: int) -> dict:
    """A conversation with a round for each image, and a number of tokens in all."""
    answer = max(1, (num_tokens - len(images) * (IMAGE_LENGTH + QUESTION_LENGTH)) // len(images))
    messages: list[dict] = []
    for image in images:
        question = [{"type": "image", "image": image}, {"type": "text", "text": write_text(rng, QUESTION_LENGTH)}]
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": write_text(rng, answer)},
        ]
    return {"messages": messages}


def make_workload(name: str, count: int, is_shared: bool) -> list[dict]:
    """Conversations in random order; those of a batch are about the same image where images are shared."""
    rng = random.Random(0)
    if name == "the paper's mixture":
        lengths, images = draw_lengths()
        drawn = rng.sample(range(len(lengths)), count)
        return [
            make_conversation(rng, [draw_image(rng) for _ in range(images[index])], int(lengths[index]))
            for index in drawn
        ]
    lengths, _ = draw_questions()
    one_image = draw_image(rng)
    return [
        make_conversation(rng, [one_image if is_shared else draw_image(rng)], int(length))
        for length in lengths[:count]
    ]


def make_step(variant: Variant, model: torch.nn.Module, name: str, count: int) -> Callable[[], float]:
    """A function that takes all batches of a workload forward and backward, and returns their mean loss."""
    collator = DataCollatorForVisualChat(make_processor(), packing=variant.packing)
    conversations, size = make_workload(name, count, variant.shared), BATCH_SIZE[name]
    batches = [collator(conversations[start : start + size]).to(DEVICE) for start in range(0, count, size)]
    cache = VisionFeatureCache() if variant.features else None

    def step() -> float:
        if isinstance(model, VisualChatForConditionalGeneration):
            model.model.vision_cache = cache
        losses = []
        for batch in batches:
            if variant.model == "llava":
                batch = {key: value for key, value in batch.items() if key != "mm_token_type_ids"}
            with torch.autocast(DEVICE, DTYPE, enabled=DTYPE is not torch.float32):
                loss = model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
        model.zero_grad()
        return sum(losses) / len(losses)

    return step


def measure_workload(name: str, models: dict[str, torch.nn.Module], count: int, repeats: int) -> list[tuple]:
    """The rows of a workload."""
    variants = {
        row: variant
        for row, variant in VARIANTS.items()
        if not variant.shared or name != "the paper's mixture"  # whose images differ
    }
    steps = {row: make_step(variant, models[variant.model], name, count) for row, variant in variants.items()}
    theirs, ours = (steps[row]() for row in list(steps)[:2])
    if not abs(ours - theirs) <= (1e-4 if DTYPE is torch.float32 else 1e-2) * abs(theirs):
        raise SystemExit(f"llava.py: error: the losses differ, {theirs} and {ours}; the two do not compute the same.")
    measured = measuring.compare(steps, repeats)
    baseline = measured[next(iter(measured))]
    return [
        (
            row,
            f"{count / each.seconds:.2f}",
            f"{1 / each.ratio:.2f}",
            f"{1 / each.quartiles[1]:.2f} to {1 / each.quartiles[0]:.2f}",
            f"{each.peak_bytes / 2**20:.0f}",
            f"{each.peak_bytes / baseline.peak_bytes:.2f}",
        )
        for row, each in measured.items()
    ]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16, help="conversations of each workload")
    parser.add_argument("--repeats", type=int, default=5, help="number of interleaved measurements of each row")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats has to be at least 2, to compute a spread")
    torch.set_num_threads(1)
    models = make_models()
    machine = torch.cuda.get_device_name() if measuring.USES_GPU else f"{platform.machine()} CPU, one thread"
    print(f"{machine}, {DTYPE}, torch {torch.__version__}")
    for name in BATCH_SIZE:
        rows = measure_workload(name, models, arguments.conversations, arguments.repeats)
        head = (name, "conversations/s", "times as fast", "quartiles", "peak MiB", "of LLaVA class")
        print("\n" + format_table([head, *rows]), flush=True)


if __name__ == "__main__":
    main()
