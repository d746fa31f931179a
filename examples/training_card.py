"""The model card of a training run: its data and their terms, hyperparameters, losses and cost."""

import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from training_data import DataSource
from training_parameters import counted_parameters, trained_groups
from transformers import Trainer
from transformers.utils import cached_file

from modeling_visualchat.model_card_visualchat import (
    CARD,
    VisualChatCard,
    count_parameters,
    describe_origin,
    is_on_hub,
    make_card,
)
from processing_visualchat.data.tables import Row, counted, format_markdown


HUB_DATASET = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)")
HEAD: Row = ("data set", "conversations", "for evaluation", "license, as its authors state it", "citation")
LOSSES = {"loss": "last training loss", "train_loss": "mean training loss", "eval_loss": "last evaluation loss"}
NOT_STATED = "not stated; to be added by the owner of this checkpoint"


@dataclass(frozen=True)
class TrainingRun:
    """What a run knows beside its `Trainer`."""

    sources: list[DataSource]
    start: str | None = None  # the checkpoint that it started from; `None` for new weights
    license: str | None = None  # of the trained checkpoint
    resumed_from: str | None = None


class TrainerWithCard(Trainer):
    """
    A `Trainer` that writes complete repositories: the model card of VisualChat beside the weights of every checkpoint,
    and the code, too, where it pushes one in the middle of training.
    """

    def __init__(self, *arguments, run: TrainingRun, **options):
        super().__init__(*arguments, **options)
        self.run = run
        self.earlier = load_card(run.start) if run.start is not None else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, with the model card."""
        folder = Path(output_dir or self.args.output_dir)
        card = read_card(folder)  # PEFT overwrites it
        super().save_model(output_dir, _internal_call)
        self.write_card(folder, card)

    def create_model_card(self, tags: str | list[str] | None = None, **_) -> None:
        """Writes the card beside the checkpoint in the output folder."""
        folder = Path(self.args.output_dir)
        self.write_card(folder, read_card(folder), [tags] if isinstance(tags, str) else tags or [])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which copies weights to the output folder and pushes it, with the code and the card."""
        if self.is_world_process_zero():
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def write_card(self, folder: Path, card: VisualChatCard | None, tags: Sequence[str] = ()) -> None:
        """Writes the card beside a checkpoint, from the one that was there, whose other text stays."""
        if not self.is_world_process_zero():
            return
        name = self.hub_model_id or os.path.relpath(folder, Path(self.args.output_dir).absolute().parent)
        if card is not None:
            card.rename(name)
        else:
            card = make_card(base_model(self), name)
            inherit(card, self.earlier)
        number = 1 + (len(self.earlier.read("training")) if self.earlier is not None else 0)
        for section, describe in SECTIONS.items():
            card.write(section, f"run {number}", f"Run {number}{describe(self, number)}")
        for section in ("results", "risks"):  # of other weights
            card.reset(section)
        card.data.eval_results = None
        if self.run.start is not None and is_on_hub(self.run.start):
            card.data.base_model = [self.run.start]
        names = [match[1] for source in self.run.sources for match in HUB_DATASET.finditer(source.url)]
        card.data.datasets = list(dict.fromkeys([*(card.data.datasets or []), *names])) or None
        card.data.license = self.run.license or card.data.license
        card.data.tags = sorted({*(card.data.tags or []), *tags}) or None
        if is_adapter(self):
            mark_adapter(card, self.run.start)
        card.save(folder / CARD)


def is_adapter(trainer: Trainer) -> bool:
    """Whether a trainer saves an adapter of PEFT."""
    return isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)


def base_model(trainer: Trainer) -> Any:
    """The model of a trainer, without wrappers of accelerate and PEFT."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_card(folder: Path) -> VisualChatCard | None:
    """The card in a folder, if it has one."""
    return VisualChatCard.load(folder / CARD) if (folder / CARD).is_file() else None


def load_card(checkpoint: str) -> VisualChatCard | None:
    """The card of a checkpoint, a folder or a name on the Hub, if it has one within reach."""
    try:
        file = cached_file(checkpoint, CARD, _raise_exceptions_for_missing_entries=False)
    except OSError:  # the rest of the checkpoint is cached, and the Hub out of reach
        return None
    return None if file is None else VisualChatCard.load(file)


def inherit(card: VisualChatCard, earlier: VisualChatCard | None) -> None:
    """Takes over the training runs of the checkpoint that a run started from, and their data."""
    if earlier is not None:
        for section in SECTIONS:
            for key, text in earlier.read(section).items():
                if key.startswith("run "):
                    card.write(section, key, text)
        card.data.datasets = earlier.data.datasets


def mark_adapter(card: VisualChatCard, base: str) -> None:
    """Says in a card that its checkpoint is an adapter, and of which checkpoint."""
    text = (
        f"- Adapter: LoRA and the other trained modules, for {describe_origin(base)}, which `from_pretrained` loads "
        "too; `examples/merge_adapter.py` of VisualChat merges both into one checkpoint."
    )
    card.write("model", "adapter", text)
    card.data.library_name = "peft"
    card.data.base_model_relation = "adapter" if is_on_hub(base) else None
    card.data.tags = sorted({*(card.data.tags or []), "lora"})


def mark_merged(card: VisualChatCard, base: str) -> VisualChatCard:
    """Says in the card of an adapter that it was merged."""
    card.write("model", "adapter", f"- Merged: a LoRA adapter is part of the weights of {describe_origin(base)}.")
    card.data.library_name, card.data.base_model_relation = "transformers", None
    return card


def describe_data(trainer: TrainerWithCard, number: int) -> str:
    """The data sets of a run, and what the collator left out."""
    rows = [HEAD]
    for source in trainer.run.sources:
        name = f"[{source.name}]({source.url.split()[0]})" if source.url else source.name
        counts = ("-" if number is None else number for number in (source.num_train, source.num_eval))
        rows.append((name, *counts, source.license or NOT_STATED, source.attribution or "-"))
    start = trainer.run.start
    origin = "new weights" if start is None else describe_origin(start)
    if start is not None and number == 1:
        origin += ", which states no earlier training"
    left_out = ", ".join(f"{count:,} {what}" for what, count in trainer.data_collator.counts.items() if count)
    note = f"\n\nOf the conversations that the first process read, over all epochs: {left_out}." if left_out else ""
    return f" started from {origin}.\n\n{format_markdown(rows)}{note}"


def describe_training(trainer: TrainerWithCard, number: int) -> str:
    """The trained modules, hyperparameters and losses of a run."""
    args, state, collator = trainer.args, trainer.state, trainer.data_collator
    model = base_model(trainer)
    parameters = [each for _, each in counted_parameters(model)]
    trained = count_parameters(*(each for each in parameters if each.requires_grad))
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    warmup = args.get_warmup_steps(state.max_steps)
    groups = ", ".join(trained_groups(model))
    rate = f"{args.learning_rate}{describe_groups(trainer, 'learning_rates')}"
    rows: list[Row] = [
        ("", ""),
        ("trained", f"{trained:,} of {count_parameters(*parameters):,} parameters: {groups}"),
        ("steps", f"{state.global_step:,} optimizer steps, {state.epoch or 0:.2f} epochs"),
        ("batch", f"{batch:,} {'packed rows' if collator.packing else 'conversations'}"),
        ("optimizer", f"{args.optim.value}, betas {args.adam_beta1} and {args.adam_beta2}"),
        ("weight decay", f"{args.weight_decay}{describe_groups(trainer, 'weight_decays')}"),
        ("learning rate", f"{rate}, {args.lr_scheduler_type.value}, {counted(warmup, 'warm-up step')}"),
        ("gradient clipping", f"{args.max_grad_norm}"),
        ("precision", f"weights in {str(model.dtype).removeprefix('torch.')}, computed in {precision}"),
        ("maximum length", f"{collator.limit:,} tokens; over-length conversations: {collator.overlong}"),
        ("seed", f"{args.seed}"),
    ]
    for key, name in LOSSES.items():
        values = [entry[key] for entry in state.log_history if key in entry]
        if values and not (key == "train_loss" and trainer.run.resumed_from):  # the mean of a part, over all steps
            rows.append((name, f"{values[-1]:.4f} nats/token"))
    return f":\n\n{format_markdown(rows)}"


def describe_groups(trainer: TrainerWithCard, name: str) -> str:
    """The values of groups of parameters that have their own."""
    values = getattr(getattr(trainer, "group_options", None), name, {})
    return f" ({', '.join(f'{group} {value}' for group, value in values.items())})" if values else ""


def describe_cost(trainer: TrainerWithCard, number: int) -> str:
    """Time and hardware of a run."""
    args, run = trainer.args, trainer.run
    on_gpu = args.device.type == "cuda"
    threads = f"CPU ({platform.machine()}), {counted(torch.get_num_threads(), 'thread')}"
    device = torch.cuda.get_device_name(args.device) if on_gpu else threads
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
    parts = [f"{counted(args.world_size, 'process', 'processes')}{f' with ZeRO-{stage}' if stage else ''} on {device}"]
    if times := [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]:
        since = " since it was resumed" if run.resumed_from is not None else ""
        parts.append(f"{format_time(times[-1])} of training{since}")
    parts.append(f"{format_time(time.process_time())} of CPU time of the first process, from its start")
    if on_gpu:
        parts.append(f"at most {torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB of GPU memory")
    return f": {'; '.join(parts)}"


def format_time(seconds: float) -> str:
    """A time in hours, or in seconds below one."""
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"


SECTIONS = {"data": describe_data, "training": describe_training, "cost": describe_cost}
