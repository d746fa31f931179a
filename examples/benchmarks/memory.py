"""
Compares the memory that `plan.py` foresees with what training allocates, on small models and a CPU.

    python examples/benchmarks/memory.py                # one process: every attention type and several sizes
    python examples/benchmarks/memory.py --processes    # two processes: DeepSpeed ZeRO-1 to 3, FSDP2 and DDP

What is measured is every allocation of PyTorch on the CPU, as its profiler records them: in one process those of an
optimizer step of two micro-batches, in two processes those of `Trainer` from its third step on. Planned is the peak of
one device.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, TrainerCallback, TrainingArguments


sys.path.insert(0, str(Path(__file__).parent.parent))

from planning.plans import Planner
from planning.step_memory import Batch, make_inputs
from planning.strategies import STRATEGIES
from training_parameters import GroupedTrainer, GroupOptions, choose_parameters
from training_processes import end_processes, start_deepspeed

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import ATTENTION_TYPES, VisualChatForConditionalGeneration


MIB = 2**20
SIZES = {"small": (128, 4, 1000), "wide": (384, 3, 4000), "deep": (128, 12, 1000)}  # hidden size, layers, vocabulary
BATCH = Batch(rows=2, text_tokens=200, images=2, label_share=0.5)
STEADY = "steady"
STAGES = {each.name: each for each in STRATEGIES if each.optimizer_on == "device"}


def make_config(size: str, **options) -> VisualChatConfig:
    """A small model: 64 patches and a class token an image."""
    hidden_size, num_layers, vocab_size = SIZES[size]
    vision_config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=7
    )
    text_config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4, eos_token_id=1,
        num_hidden_layers=num_layers, num_attention_heads=hidden_size // 32, num_key_value_heads=hidden_size // 64,
    )  # fmt: skip
    options = {"image_token_id": 2, "cross_layer_interval": 2, **options}
    return VisualChatConfig(vision_config=vision_config, text_config=text_config, **options)


def make_arguments(**values) -> SimpleNamespace:
    """The arguments of `finetune.py` that memory depends on."""
    defaults = {
        "model": "small", "trainable": None, "lora": None, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0,
        "lora_target": None, "frozen_dtype": "float32", "quantization": None, "learning_rates": None,
        "weight_decays": None,
    }  # fmt: skip
    return SimpleNamespace(**defaults | values)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that is allocated within a call, in bytes beside what is there before it."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    return peak_of(profile)


def peak_of(profile: Any, mark: str | None = None) -> int:
    """The peak of the allocations that a profiler recorded, from a named mark on."""
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    current, peak, is_counted = 0, 0, mark is None
    for event in events:
        is_counted = is_counted or event.name() == mark
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current) if is_counted else 0
    return peak


def measure(config: VisualChatConfig, arguments: Any, settings: Any, checkpoints: bool) -> int:
    """The peak of a training run in this process, in bytes."""
    model = VisualChatForConditionalGeneration(config).to(getattr(torch, arguments.frozen_dtype))
    model = choose_parameters(model, arguments).train()
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    inputs = make_inputs(config, BATCH)

    def step() -> None:
        for _ in range(settings.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16) if settings.bf16 else nullcontext():
                loss = model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments, and tries the decoder
    states = [each for state in optimizer.state.values() for each in state.values()]
    held = sum(each.nbytes for each in (*model.parameters(), *model.buffers(), *states))
    return held + peak_bytes(step)


def make_settings(**values) -> SimpleNamespace:
    """The fields of `TrainingArguments` that memory depends on."""
    defaults = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "bf16": False, "fp16": False}
    return SimpleNamespace(**defaults | values)


def foresee(config, arguments, settings, checkpoints: bool, strategy: str = "DDP", processes: int = 1) -> float:
    """What the planner says of the same run, in bytes."""
    return Planner(config, arguments, settings, BATCH).memory(STAGES[strategy], checkpoints, processes).total


def compare_settings() -> list[dict]:
    """Both in one process: every attention type, what is trained, sizes, checkpointing, and dtypes."""
    types = [each.options for each in ATTENTION_TYPES.values()]
    trained = [{"trainable": ["+language_model"]}, {"trainable": ["projector+vision_tower"]}]
    trained += [{"lora": ["language_model"]}, {"lora": ["vision_tower"]}]
    settings = [({}, make_settings()), ({"frozen_dtype": "bfloat16"}, make_settings(bf16=True))]
    runs = [(size, {}, {}, *each) for size, each in product(SIZES, settings)]
    runs += [("small", options, {}, *settings[0]) for options in types]
    runs += [("small", {}, what, *each) for what, each in product(trained, settings)]
    rows = []
    for (size, options, what, dtypes, setting), checkpoints in product(runs, (False, True)):
        config, arguments = make_config(size, **options), make_arguments(**what, **dtypes)
        row = {
            "model": size,
            "attention": "_".join(str(each) for each in options.values()) or "mmca",
            "trained": " ".join(next(iter(what.values()), ["projector+embeddings"])) + " by LoRA" * ("lora" in what),
            "dtype": "bfloat16" if setting.bf16 else "float32",
            "checkpointing": "yes" if checkpoints else "no",
            "measured": measure(config, arguments, setting, checkpoints) / MIB,
            "planned": foresee(config, arguments, setting, checkpoints) / MIB,
        }
        rows.append(row)
        print_row(row)
    return rows


class MarkCallback(TrainerCallback):
    """Marks the end of the second optimizer step, when every buffer is there."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with torch.profiler.record_function(STEADY):
                pass


def train_in_process(strategy: str, values: dict, file: str | None, output: Path) -> None:
    """One of several processes that the launcher started: trains, and writes what it allocated."""
    if file is not None:
        start_deepspeed(use_cpu=True)
    config, arguments = make_config("wide"), make_arguments(**values)
    settings = TrainingArguments(
        str(output / "trainer"), use_cpu=True, report_to="none", save_strategy="no", max_steps=4, deepspeed=file,
        per_device_train_batch_size=BATCH.rows, gradient_accumulation_steps=2, remove_unused_columns=False,
        disable_tqdm=True, activation_checkpointing=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        model = VisualChatForConditionalGeneration._from_config(config)
        inputs = make_inputs(config, BATCH)
        trainer = GroupedTrainer(
            model=choose_parameters(model, arguments, casts=file is None),
            group_options=GroupOptions(1e-3, 0.0, {}, {}),
            args=settings,
            train_dataset=[{}] * 1000,
            data_collator=lambda rows: inputs,
            callbacks=[MarkCallback()],
        )
        trainer.train()
    (output / f"{settings.process_index}.json").write_text(json.dumps(peak_of(profile, STEADY)))
    end_processes(trainer)


LAUNCHERS = {
    "DDP": ["torch.distributed.run", "--nproc_per_node", "2"],
    "FSDP2": ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--cpu", "--num_processes", "2"],
}


def compare_processes(names: list[str]) -> list[dict]:
    """Both in two processes."""
    rows = []
    for name, values in product(names, ({}, {"trainable": ["+language_model"]})):
        strategy = STAGES[name]
        with tempfile.TemporaryDirectory() as folder:
            file = None
            if strategy.is_deepspeed:
                file = str(Path(folder) / "zero.json")
                Path(file).write_text(json.dumps(strategy.read()))
            launcher = LAUNCHERS.get(name, ["torch.distributed.run", "--nproc_per_node", "2"])
            worker = [__file__, "--worker", json.dumps([name, values, file, folder])]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-m", *launcher, *worker], check=True, env=environment)
            measured = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
        config, arguments = make_config("wide"), make_arguments(**values)
        row = {
            "strategy": name,
            "trained": " ".join(values.get("trainable", ["projector+embeddings"])),
            "measured": max(measured) / MIB,
            "planned": foresee(config, arguments, make_settings(), True, name, 2) / MIB,
        }
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict) -> None:
    cells = [f"{each:.1f}" if isinstance(each, float) else each for each in row.values()]
    print(f"| {' | '.join(cells)} | {row['planned'] / row['measured']:.3f} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="*", choices=list(STAGES), help="strategies to run in two processes")
    parser.add_argument("--worker", help="for the processes that this script starts")
    options = parser.parse_args()
    if options.worker is not None:
        name, values, file, output = json.loads(options.worker)
        return train_in_process(name, values, file, Path(output))
    if options.processes is None:
        compare_settings()
    else:
        compare_processes(options.processes or list(STAGES))


if __name__ == "__main__":
    main()
