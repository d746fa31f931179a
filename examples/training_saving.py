"""The checkpoints of a run: with a record of what they were made of, also at SIGTERM, and on a disk that is full."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from training_arguments import FinetuneError
from training_parameters import count, counted_parameters
from training_resume import RECORD, describe_sharding, find_fault, list_sizes, read_record
from training_stop import StopAtSigterm, start_worker
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints


FULL = ("No space left on device", "Disk quota exceeded", "inline_container.cc")  # by the OS, Rust and `torch.save`
MIB = 2**20


class ResumableTrainer(Trainer):
    """
    `Trainer` whose checkpoints are whole or known not to be, and resumed exactly.

    Args:
        described (`dict`): What [`describe_run`] says of the run.
        resumed_from (`str`, *optional*): The checkpoint that it continues.
    """

    def __init__(self, *arguments, described: dict[str, Any], resumed_from: str | None = None, **options):
        super().__init__(*arguments, **options)
        self.described = described
        self.add_callback(LossSinceLog(self, resumed_from))
        if self.args.enable_jit_checkpoint:
            self.remove_callback(JITCheckpointCallback)
            self.add_callback(StopAtSigterm(self))

    def _run_epoch(self, *arguments, **options) -> None:
        """As in `Trainer`, which would train one more step of a run that has had all of them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Saves a checkpoint in place of what an interrupted run left of it."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with explain_full_disk(self, folder):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the random states, the last that every process saves, and the record; the state of Trainer follows."""
        super()._save_rng_state(output_dir)
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            record = {"run": self.described, "files": list_sizes(Path(output_dir))}
            record |= {"sharding": describe_sharding(self.args), "processes": self.args.world_size}
            record |= {"loss_since_log": loss, "last_log": self._globalstep_last_logged}
            Path(output_dir, RECORD).write_text(json.dumps(record, indent=1))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with nullcontext() if _internal_call else explain_full_disk(self):
            super().save_model(output_dir, _internal_call)

    def _get_dataloader(self, *arguments, **options):
        """As in `Trainer`; its workers ignore SIGTERM, which ends the process that they work for."""
        loader = super()._get_dataloader(*arguments, **options)
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        return loader


class LossSinceLog(TrainerCallback):
    """Takes up the loss that a checkpoint had not logged yet, so that the loss curve is that of one run."""

    def __init__(self, trainer: ResumableTrainer, checkpoint: str | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is not None:
            record = read_record(self.checkpoint)
            self.trainer._tr_loss += record["loss_since_log"]
            self.trainer._total_loss_scalar -= record["loss_since_log"]  # of the steps since it was resumed
            self.trainer._globalstep_last_logged = record["last_log"]


@contextmanager
def explain_full_disk(trainer: ResumableTrainer, folder: Path | None = None) -> Iterator[None]:
    """
    Removes the folder that could not be written, and says how much space it needs and has.

    Raises:
        `FinetuneError`: there is no space left.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if not any(text in str(error) for text in FULL):
            raise
        output = trainer.args.output_dir
        needed, free = count_bytes(trainer.model, folder is not None), shutil.disk_usage(output).free
        whole = [each for each in sort_checkpoints(output) if not find_fault(Path(each))]
        kept = f"The last whole checkpoint is {whole[-1]}" if whole else "There is no whole checkpoint"
        raise FinetuneError(
            f"no space is left for {folder or output}: it needs about {needed / MIB:,.1f} MiB, and {free / MIB:,.1f} "
            f"MiB are free. {kept}. Make room, or keep fewer checkpoints with --save_total_limit, and continue with "
            f"--resume_from_checkpoint true. ({str(error).splitlines()[0]})"
        ) from error


def count_bytes(model: Any, has_optimizer: bool) -> int:
    """The bytes of the weights of a checkpoint, those of an adapter for LoRA, and of the two moments of AdamW."""
    parameters = [each for _, each in counted_parameters(model)]
    trained = [each for each in parameters if each.requires_grad]
    saved = trained if hasattr(model, "peft_config") else parameters
    return sum(count(each) * each.element_size() for each in saved) + 8 * has_optimizer * sum(map(count, trained))
