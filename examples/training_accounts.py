"""
The accounts of a training run, as keys of what `Trainer` logs: losses by source and by round, speed, padding, shared
images, model FLOPs utilisation, memory and learning rates. A loss that is not finite, or a spike, names its records.
"""

import resource
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from planning.hours import Mixture, operations, peak_tflops
from planning.plans import GIB, Planner
from planning.step_memory import Batch
from training_arguments import FinetuneError
from training_card import base_model
from training_samples import Samples
from transformers import Trainer, TrainerCallback

from processing_visualchat.data.batch_facts import BatchFacts, place_of, save_examples, source_of


BATCHES = "_batches"  # folder of saved batches; what begins with _ is not pushed to the Hub
MAX_ROUND = 10  # this and later rounds are one key
# A spike is 7 standard deviations above the mean of the last 1,000 losses, as in OLMo 2 (arXiv 2501.00656).
SPIKE_DEVIATIONS, SPIKE_WINDOW, MIN_WINDOW = 7, 1000, 50
MAX_SPIKES = 20  # saved by a process


class TokenLosses:
    """The loss function of causal models in transformers, which also keeps the loss of each token."""

    def __init__(self):
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self, logits: torch.Tensor, labels: None, vocab_size: int, num_items_in_batch=None, *, shift_labels, **kwargs
    ) -> torch.Tensor:
        targets = shift_labels.flatten()
        losses = torch.nn.functional.cross_entropy(logits.reshape(-1, vocab_size).float(), targets, reduction="none")
        self._last = (losses.detach(), targets)
        number = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(number, device=losses.device)

    def take(self) -> np.ndarray:
        """The losses of the tokens of the last call that have a label, on the CPU; none after an empty batch."""
        if self._last is None:
            return np.zeros(0)
        losses, targets = (tensor.cpu().numpy() for tensor in self._last)
        self._last = None
        return losses[targets != -100]


@dataclass
class Sums:
    """Sums over the batches of this process since the last log."""

    losses: Counter[str] = field(default_factory=Counter)  # by source and by round
    tokens: Counter[str] = field(default_factory=Counter)  # with a loss, by the same keys
    sizes: Counter[str] = field(default_factory=Counter)
    memory: float = 0.0  # GiB, the peak of the process so far

    def add(self, facts: BatchFacts, losses: np.ndarray) -> list[float]:
        """Adds a batch, and returns the mean loss of each of its conversations."""
        totals, numbers = np.zeros(len(facts.examples)), np.zeros(len(facts.examples))
        answers = np.split(losses, np.cumsum(facts.answer_lengths)[:-1].astype(int))
        for (number, turn), answer in zip(facts.answers(), answers):
            turn_name = f"{turn}" if turn < MAX_ROUND else f"{MAX_ROUND}+"
            for key in (f"loss_source/{source_of(facts.examples[number])}", f"loss_round/{turn_name}"):
                self.losses[key] += float(answer.sum())
                self.tokens[key] += len(answer)
            totals[number] += answer.sum()
            numbers[number] += len(answer)
        self.sizes.update(
            conversations=len(facts.examples), tokens=facts.num_tokens, padding=facts.num_padding,
            images=facts.num_images, unique_images=facts.num_unique_images, answers=len(losses),
        )  # fmt: skip
        return (totals / np.maximum(numbers, 1)).tolist()

    def gather(self) -> "Sums":
        """The sums of all processes."""
        total = Sums()
        for each in gather_object([self]):
            total.losses.update(each.losses)
            total.tokens.update(each.tokens)
            total.sizes.update(each.sizes)
            total.memory = max(total.memory, each.memory)
        return total

    def mean_losses(self, prefix: str = "") -> dict[str, float]:
        """The mean loss of each source and round, in nats/token."""
        keys = sorted(self.tokens, key=lambda key: (key.rpartition("/")[0] != "loss_source", len(key), key))
        return {f"{prefix}{key}": self.losses[key] / self.tokens[key] for key in keys}

    def rates(self, seconds: float) -> dict[str, float]:
        """Sizes per second, and what padding and repeated images are of them."""
        sizes, seconds = self.sizes, max(seconds, 1e-9)
        return {
            "tokens_per_second": sizes["tokens"] / seconds,
            "images_per_second": sizes["images"] / seconds,
            "samples_per_second": sizes["conversations"] / seconds,
            "padding": sizes["padding"] / max(sizes["tokens"] + sizes["padding"], 1),
            "shared_images": 1 - sizes["unique_images"] / sizes["images"] if sizes["images"] else 0.0,
            "memory_gib": self.memory,
        }


class Clock(TrainerCallback):
    """The seconds of training, data loading included, without those of logs, evaluation and saving."""

    def __init__(self):
        self.seconds, self.start = 0.0, 0.0

    def restart(self, *arguments, **options) -> None:
        self.start = time.perf_counter()

    on_train_begin = on_log = on_save = restart

    def on_step_end(self, *arguments, **options) -> None:
        self.seconds += time.perf_counter() - self.start
        self.restart()


def find_spike(recent: Sequence[float], loss: float) -> bool:
    """Whether a loss is a spike after recent ones."""
    return len(recent) >= MIN_WINDOW and loss > np.mean(recent) + SPIKE_DEVIATIONS * np.std(recent)


def peak_memory(device: torch.device) -> float:
    """GiB that this process has had at most, of its accelerator or else of the machine."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.accelerator.max_memory_allocated() / GIB


def is_finite(parameter: torch.Tensor) -> bool:
    """Whether a parameter has no infinite and no undefined weight; of a sharded one, the shard of this process."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
    return bool(torch.isfinite(local).all())


class TrainerWithAccounts(Trainer):
    """
    `Trainer` with accounts in its logs, for a collator with `return_facts=True`.

    Args:
        arguments (`FinetuneArguments`): Those that say what is trained, for the utilisation.
        samples ([`Samples`], *optional*): Conversations to answer at each evaluation.
    """

    group_names: Sequence[str] = ()  # of the parameter groups of the optimizer, if they have names

    def __init__(self, *positional, arguments: Any, samples: Samples | None = None, **options):
        super().__init__(*positional, **options)
        self.arguments, self.samples = arguments, samples
        self.token_losses, self.clock = TokenLosses(), Clock()
        self.add_callback(self.clock)
        self.sums = {True: Sums(), False: Sums()}  # of training, and of evaluation
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.num_spikes = 0
        self.group_rates: dict[str, float] = {}
        is_known = self.args.device.type == "cuda" and (self.args.bf16 or self.args.fp16)
        self.peak = peak_tflops(torch.cuda.get_device_name(self.args.device)) if is_known else None
        self.count_operations: Callable[[Mixture], float] | None = None
        base_model(self).loss_function = self.token_losses

    def compute_loss(self, model, inputs, *positional, **options):
        """As in `Trainer`; the facts of the batch and the losses of its tokens go into the accounts."""
        facts = inputs.pop("facts", None)
        outputs = super().compute_loss(model, inputs, *positional, **options)
        losses = self.token_losses.take()
        if facts is not None:
            means = self.sums[model.training].add(facts, losses)
            if model.training:
                self.check_losses(facts, losses, means)
                groups = zip(self.group_names, self.optimizer.param_groups)
                self.group_rates = {f"learning_rate/{name}": options["lr"] for name, options in groups}
        return outputs

    def check_losses(self, facts: BatchFacts, losses: np.ndarray, means: list[float]) -> None:
        """
        Before the backward pass, so that no update and no checkpoint comes of it in any process.

        Raises:
            `FinetuneError`: a loss that is not finite.
        """
        if not np.isfinite(losses).all():
            path, names = self.save_batch("nan", facts, means)
            parameters = [each for each in self.model.parameters() if each.requires_grad]
            cause = (
                "The trained weights are finite, so look at these conversations first; or lower --learning_rate"
                if all(map(is_finite, parameters))
                else "The trained weights are not finite either: an earlier update was too large; lower "
                "--learning_rate, or take --bf16 in place of --fp16"
            )
            raise FinetuneError(f"the loss is not finite in {names}. They are saved in {path}. {cause}")
        if len(losses) == 0:
            return
        if find_spike(self.recent, mean := float(losses.mean())) and self.num_spikes < MAX_SPIKES:
            self.num_spikes += 1
            path, names = self.save_batch(f"spike-{self.num_spikes}", facts, means)
            usual = float(np.mean(self.recent))
            warnings.warn(f"The loss is {mean:.3f}, after {usual:.3f}, in {names}. See {path}", stacklevel=2)
        self.recent.append(mean)

    def save_batch(self, what: str, facts: BatchFacts, means: list[float]) -> tuple[Path, str]:
        """Saves the conversations of a batch, the highest loss first; returns the file, and what names them."""
        step, process = self.state.global_step + 1, self.args.process_index
        order = sorted(range(len(means)), key=lambda number: -np.nan_to_num(means[number], nan=np.inf))
        names = [f"{place_of(facts.examples[number], number)} (loss {means[number]:.3f})" for number in order]
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        path = Path(self.args.output_dir) / BATCHES / f"{what}-step-{step}-process-{process}.jsonl"
        save_examples(path, [facts.examples[number] for number in order])
        return path, f"step {step} of process {process}: {'; '.join(names[:3])}{others}"

    def log(self, logs: dict[str, float], *positional, **options) -> None:
        """As in `Trainer`, with the accounts beside a loss of training or evaluation."""
        is_training = "loss" in logs
        name = next((key for key in logs if key.startswith("eval") and key.endswith("_loss")), "loss")
        if name in logs:
            own, self.sums[is_training] = self.sums[is_training], Sums()
            own.memory = peak_memory(self.args.device)
            sums = own.gather()
            logs.update(sums.mean_losses(name.removesuffix("loss")))
            if is_training:
                logs.update(self.group_rates | sums.rates(self.clock.seconds) | self.utilisation(sums.sizes))
                self.clock.seconds = 0.0
        super().log(logs, *positional, **options)

    def utilisation(self, sizes: Counter[str]) -> dict[str, float]:
        """
        The share of the peak of a known chip that the operations of the model are (arXiv 2204.02311, appendix B):
        without those of gradient checkpointing, and an image counts once in a batch.
        """
        if self.peak is None or not sizes["conversations"]:
            return {}
        config = base_model(self).config
        text = sizes["tokens"] - sizes["images"] * config.image_seq_length
        mean = Mixture(1, text / sizes["conversations"], sizes["unique_images"] / sizes["conversations"])
        if self.count_operations is None:
            labels = sizes["answers"] / max(text, 1)
            batch = Batch(1, max(round(mean.text_tokens), 1), max(round(mean.images), 1), min(labels, 1.0))
            planner = Planner(config, self.arguments, self.args, batch)
            steps = [planner.step(False, False, has_images=has_images) for has_images in (True, False)]
            self.count_operations = partial(operations, *steps, batch)
        done = self.count_operations(mean) * sizes["conversations"]
        return {"mfu": done / (self.clock.seconds * self.peak * 1e12 * self.args.world_size)}

    def evaluate(self, *positional, **options) -> dict[str, float]:
        """As in `Trainer`; then the samples are answered."""
        metrics = super().evaluate(*positional, **options)
        if self.samples is not None:
            with self.accelerator.autocast():  # which a model inside of PEFT does not do itself
                self.samples.answer(self, base_model(self))
        self.clock.restart()
        return metrics
