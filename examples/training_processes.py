"""The processes of a training run: DeepSpeed on a CPU, threads, and an orderly end."""

import os
import signal

import torch
from transformers import Trainer, TrainingArguments


def start_deepspeed(use_cpu: bool) -> None:
    """
    Starts DeepSpeed on a CPU, which `TrainingArguments` does not; call it before they are made.

    Without it, every process trains a model of its own.
    """
    if use_cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes minutes
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def set_cpu_threads(training_arguments: TrainingArguments, cpu_threads: int) -> None:
    """Sets the threads of this process on a CPU; 0 divides all cores among the processes."""
    if training_arguments.use_cpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cpu_threads or max(1, cores // training_arguments.world_size))


def end_processes(trainer: Trainer) -> None:
    """
    Ends the process group in all processes together, before the interpreter is torn down under its threads; from then
    on, SIGTERM ends the process at once.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
