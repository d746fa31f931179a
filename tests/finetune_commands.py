"""
Runs commands of `finetune.py` one after the other in the processes of one launch: to start them takes longer than to
train a tiny model.

Its argument is JSON: for each command, its flags, and environment variables to set, or to remove if they are null.
"""

import gc
import json
import os
import sys
from datetime import timedelta

import finetune
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


TIMEOUT = timedelta(seconds=120)  # of a collective operation for which another process does not come


def run(flags: list[str], variables: dict[str, str | None]) -> None:
    """Runs a command as in a process of its own, but in the process group of the launch."""
    environment = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: value for name, value in {**environment, **variables}.items() if value is not None})
    if "RANK" in os.environ:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
        torch.distributed.barrier()  # they start together, as in a launch
    sys.argv = ["finetune.py", *flags]
    finetune.main()
    gc.collect()
    unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(environment)


def shard_on_cpu(prepare_backend):
    """Without a GPU, accelerate shards a model only if it takes processes for those of GPUs."""

    def prepare(state, *arguments, **options):
        backend, distributed_type = prepare_backend(state, *arguments, **options)
        is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        return backend, DistributedType.MULTI_GPU if is_sharded else distributed_type

    return prepare


if __name__ == "__main__":
    finetune.end_processes = lambda trainer: trainer.accelerator.wait_for_everyone()
    PartialState._prepare_backend = shard_on_cpu(PartialState._prepare_backend)
    for flags, variables in json.loads(sys.argv[1]):
        run(flags, variables)
