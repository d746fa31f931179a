"""SIGTERM: a checkpoint, a word on how to continue, and an exit code that no scheduler takes for success."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch
from training_processes import end_processes
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STOPPED = 128 + signal.SIGTERM  # the exit code, 143, as a shell gives it to a process that SIGTERM ends


class StopAtSigterm(TrainerCallback):
    """
    Ends a run at SIGTERM with a checkpoint and the exit code 143.

    Trainer's own callback, whose flag switches this one on, decides in each process by itself, which leaves the others
    waiting; it does not act within an evaluation or an accumulated step, and the run ends with code 0.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.is_stopping, self.saved_step = trainer, False, None
        signal.signal(signal.SIGTERM, lambda *_: trainer.accelerator.set_trigger())

    def is_asked(self) -> bool:
        """Whether one of the processes got the signal; all of them have to ask at the same place."""
        return self.trainer.accelerator.check_trigger()

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved_step = state.global_step or None  # that of the checkpoint, if it is resumed

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_begin = (self.trainer._tr_loss.clone(), *get_random_states())

    def on_substep_end(self, args, state, control, **kwargs):
        if self.is_asked():
            self.trainer._tr_loss, *random_states = self.step_begin  # the step is repeated as a whole
            set_random_states(*random_states)
            self.save_and_leave()

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked():
            self.is_stopping = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        self.saved_step = state.global_step
        if self.is_stopping:
            self.leave()

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.is_asked():
            self.save_and_leave()

    def save_and_leave(self) -> NoReturn:
        """Saves a checkpoint, unless the last one is of this step."""
        if self.saved_step != self.trainer.state.global_step:
            self.trainer._save_checkpoint(self.trainer.model)
        self.leave()

    def leave(self) -> NoReturn:
        """Ends the process, and says how the run continues."""
        step, folder = self.trainer.state.global_step, self.trainer.args.output_dir
        if self.trainer.is_world_process_zero():
            print(
                f"\nStopped by SIGTERM after step {step}; the checkpoint is {folder}/{PREFIX_CHECKPOINT_DIR}-{step}. "
                "Continue by the same command with --resume_from_checkpoint true.",
                file=sys.stderr,
            )
        end_processes(self.trainer)
        raise SystemExit(STOPPED)


def get_random_states() -> list[torch.Tensor]:
    """The states of the generators that dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(cpu: torch.Tensor, gpu: torch.Tensor | None = None) -> None:
    """Sets what [`get_random_states`] returns."""
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def start_worker(initialize: Callable | None, worker_id: int) -> None:
    """Starts a worker of a data loader."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker_id)
