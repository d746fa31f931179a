"""
Trains and evaluates every arm of the study on the same conversations; one line of a CSV for each finished run.

    python examples/study/run.py --tune            # tuning.csv: each arm with each learning rate
    python examples/study/run.py                   # results.csv: each arm and seed with its best learning rate
    python examples/study/run.py --quick           # one seed, a few steps, into a folder of its own: does it work?
    python examples/study/tables.py                # tables and figures of results.csv

Started again, it continues where it stopped; an interrupted run starts again. A run is a process of one thread;
`--processes 2` makes two runs at a time. What is compared and what decides is in README.md, written before the first
run.
"""

import csv
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from string import Template

import torch
from scans import WORDS
from tasks import TASKS, StudyConversations
from tiny_model import build_model
from transformers import BatchFeature, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_visualchat import ImageMemory, VisualChatForConditionalGeneration
from processing_visualchat import DataCollatorForVisualChat, VisualChatProcessor


FOLDER = Path(__file__).parent
ARMS: dict[str, dict] = {
    "causal": {"attention_type": "causal"},
    "cross": {"attention_type": "cross", "cross_layer_interval": 2, "image_scope": "last"},
    "mmca, sum": {"merge": "sum", "image_scope": "all"},
    "mmca, joint": {"merge": "joint", "image_scope": "all"},
    "mmca, sum, within images": {"merge": "sum", "image_attention": "image", "image_scope": "all"},
    "text only": {"attention_type": "causal"},
    "mmca, joint, last image": {"merge": "joint", "image_scope": "last"},  # this and the next: added later
    "mmca, joint, half": {"merge": "joint", "image_scope": "half"},
}
FLOOR = "text only"
# Short, since most tokens of a conversation are those of its format: " image 1<image>", then " digit of image 1? two".
CHAT_TEMPLATE = Template("""
{%- set images = namespace(count=0) %}
{%- for message in messages %}
    {%- if message["role"] == "assistant" %}
        {%- generation %}
            {%- for block in message["content"] %}{{ " " + block["text"] }}{% endfor %}
            {{- eos_token }}
        {%- endgeneration %}
        {{- "$answer_end" }}
    {%- else %}
        {%- for block in message["content"] %}
            {%- if block["type"] == "image" %}
                {%- set images.count = images.count + 1 %}
                {{- "${begin}image " ~ images.count ~ "$number_end<image>\n" }}
            {%- else %}
                {{- "$begin" + block["text"] + "$question_end" }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}""")
FORMAT = {"begin": " ", "number_end": "", "question_end": "", "answer_end": ""}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 1000
NUM_LAYERS, HIDDEN_SIZE = 4, 64
TEST_BATCH_SIZE = 50


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how much is asked."""

    steps: int = 2000
    batch_size: int = 32
    points: int = 10  # of the learning curve, evenly spaced; the last one is the end
    num_curve: int = 100  # conversations of a task at each point
    num_final: int = 500  # and at the end
    split: str = "test"


FULL = Plan()
TUNING = Plan(steps=500, points=1, num_final=200, split="tuning")
QUICK = Plan(steps=4, batch_size=4, points=2, num_curve=4, num_final=8)


class Run(TrainerCallback):
    """One arm with one seed: trains it, and evaluates it on the way."""

    def __init__(self, arm: str, seed: int, learning_rate: float, plan: Plan):
        self.arm, self.seed, self.learning_rate, self.plan = arm, seed, learning_rate, plan
        self.has_images = arm != FLOOR
        self.peak_before = peak_mebibytes()
        set_seed(seed)
        self.model, self.processor = build_model(
            study_texts(), NUM_LAYERS, HIDDEN_SIZE, CHAT_TEMPLATE.substitute(FORMAT), **ARMS[arm]
        )
        for layer in getattr(self.model.model, "cross_attention", {}).values():
            layer.gate.data.fill_(1.0)  # open, since there is no pretrained decoder to protect
        self.curves: dict[str, list[float]] = {task: [] for task in TASKS}
        self.seconds: list[float] = []  # CPU time of training alone, up to each point of the curves
        self.started = 0.0

    def train(self) -> dict[str, object]:
        """Trains the arm, and returns the line of the CSV."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=self.plan.steps,
                per_device_train_batch_size=self.plan.batch_size,
                learning_rate=self.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, self.plan.steps // 4),
                weight_decay=0.01,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                logging_steps=max(1, self.plan.steps // 20),
                save_strategy="no",
                report_to="none",
                seed=self.seed,
                use_cpu=True,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
                disable_tqdm=not os.isatty(2),
            )
            size = self.plan.steps * self.plan.batch_size
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=StudyConversations(
                    "train", size, self.seed, has_images=self.has_images, batch_size=self.plan.batch_size
                ),
                data_collator=DataCollatorForVisualChat(self.processor),
                callbacks=[self],
            )
            self.started = time.process_time()
            loss = trainer.train().training_loss
        peak = peak_mebibytes() - self.peak_before
        final = {task: self.ask(task, self.plan.num_final) for task in TASKS}
        image = StudyConversations("test", 1, 1, "single")[0]["messages"][0]["content"][0]
        content = [image] * 8 + [{"type": "text", "text": "what digit is it?"}]
        return {
            "arm": self.arm,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "samples": size,
            "parameters": self.model.num_parameters(),
            "cpu_seconds": self.seconds[-1],
            "peak_mebibytes": peak,
            "second_question_over_first": second_question_over_first(self.model, self.processor, content),
            "training_loss": round(loss, 4),
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "points": ";".join(str(size * point // self.plan.points) for point in range(1, self.plan.points + 1)),
            "seconds": ";".join(map(str, self.seconds)),
            **final,
            **{f"{task}, curve": ";".join(map(str, curve)) for task, curve in self.curves.items()},
        }

    def on_step_end(self, args, state, control, **kwargs):
        """A point of the learning curve."""
        if state.global_step * self.plan.points % self.plan.steps >= self.plan.points:
            return
        seconds = time.process_time() - self.started
        self.seconds.append(round(sum(self.seconds[-1:]) + seconds, 1))
        for task, curve in self.curves.items():
            curve.append(self.ask(task, self.plan.num_curve))
        self.started = time.process_time()

    @torch.no_grad()
    def ask(self, task: str, number: int) -> float:
        """The share of exact matches of greedy answers."""
        conversations = StudyConversations(self.plan.split, number, 1, task, self.has_images)
        collator, right = DataCollatorForVisualChat(self.processor), 0
        self.model.eval()
        for start in range(0, number, TEST_BATCH_SIZE):
            end = min(start + TEST_BATCH_SIZE, number)
            batch = collator([conversations[index] for index in range(start, end)])
            right += count_exact(self.model, batch)
        self.model.train()
        return right / number


@torch.no_grad()
def count_exact(model: VisualChatForConditionalGeneration, batch: BatchFeature) -> int:
    """
    The number of exact matches of greedy answers, from one forward pass: an answer is generated greedily if and only
    if each of its tokens, its end included, is the most likely one after those before it.
    """
    labels = batch.pop("labels")
    places = (labels != -100).any(dim=0).nonzero()[:, 0]
    labels = labels[:, places]
    best = model(**batch, use_cache=False, logits_to_keep=places - 1).logits.argmax(dim=-1)
    return int(((best == labels) | (labels == -100)).all(dim=1).sum())


def second_question_over_first(
    model: VisualChatForConditionalGeneration, processor: VisualChatProcessor, content: list[dict], repeats: int = 7
) -> float:
    """
    CPU time of a one-token answer about images that were asked about before elsewhere, over that about new ones:
    medians over repeats.

    Args:
        content (`list[dict]`): The user's message, images and a question. The images stand for their size and number
            alone, since each repeat is about new ones.
    """
    model.eval()
    memory = ImageMemory() if model.model.supports_image_memory() else None
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator)
        for is_known in (False, True):
            start = time.process_time()
            model.generate(**inputs, image_memory=memory, max_new_tokens=1)
            times[is_known].append(time.process_time() - start)
    return round(statistics.median(times[True]) / statistics.median(times[False]), 3)


def peak_mebibytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(wanted: tuple[str, int, float, Plan]) -> dict[str, object]:
    """One line of the CSV."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    return Run(*wanted).train()


def run_in_processes(run: Callable, wanted: list, num_processes: int) -> Iterator[dict]:
    """The lines of runs as they finish, each run in a process of its own, whose peak of memory is that of the run."""
    with multiprocessing.get_context("spawn").Pool(num_processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(run, wanted, chunksize=1)


def study_texts() -> list[str]:
    """What the tokenizer is trained on: the texts of conversations, the same for every arm and seed."""
    conversations = StudyConversations("train", 500, 0)
    texts = [" ".join(WORDS)]
    for index in range(len(conversations)):
        for _, (question, answer) in conversations.draw(index)[0]:
            texts.append(f" image {1 + index % 9} {question} {answer}")
    return texts


class Results:
    """A CSV with a line for each finished run."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def rows(self) -> list[dict[str, str]]:
        """The lines so far."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def add(self, row: dict[str, object]) -> None:
        """Adds a line, at once on the disk."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())


def best_learning_rate(arm: str, tuning: list[dict[str, str]]) -> float:
    """That of the highest mean accuracy over all tasks; without images, that of the same attention with them."""
    arm = "causal" if arm == FLOOR else arm
    tried = [row for row in tuning if row["arm"] == arm]
    if not tried:
        raise SystemExit(f"run.py: error: tuning.csv has no learning rate of {arm!r}; run --tune first.")
    return float(max(tried, key=lambda row: sum(float(row[task]) for task in TASKS))["learning_rate"])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="arms to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="seeds to run")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the CSV files")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one thread")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tune", action="store_true", help="find the learning rate of each arm")
    kind.add_argument("--quick", action="store_true", help="one seed and a few steps, to quick.csv")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tuning = Results(FOLDER / "tuning.csv")
    if arguments.tune:
        results, plan = tuning, TUNING
        wanted = [(arm, TUNING_SEED, rate) for arm in arguments.arms if arm != FLOOR for rate in LEARNING_RATES]
    elif arguments.quick:
        results, plan = Results(arguments.output / "quick.csv"), QUICK
        wanted = [(arm, 0, LEARNING_RATES[1]) for arm in arguments.arms]
    else:
        results, plan = Results(arguments.output / "results.csv"), FULL
        wanted = [
            (arm, seed, best_learning_rate(arm, tuning.rows)) for seed in arguments.seeds for arm in arguments.arms
        ]
    done = {(row["arm"], int(row["seed"]), float(row["learning_rate"])) for row in results.rows}
    missing = [(*each, plan) for each in wanted if each not in done]
    for row in run_in_processes(run, missing, arguments.processes):
        results.add(row)
        scores = ", ".join(f"{task} {row[task]:.3f}" for task in TASKS)
        print(f"{row['arm']}, seed {row['seed']}, {row['learning_rate']:g}: {scores}", flush=True)


if __name__ == "__main__":
    main()
