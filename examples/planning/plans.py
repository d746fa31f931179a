"""The plans of a recipe: each strategy with and without gradient checkpointing, and the cheapest that fits."""

import copy
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from modeling_visualchat.attention_types_visualchat import get_attention_type

from .hours import Machine, Mixture, Run, hours, operations
from .models import Parameters, build_model
from .step_memory import Batch, StepMemory, simulate_step
from .strategies import STRATEGIES, DeviceMemory, Strategy, Zero, device_memory


GIB = 2**30
NUM_LAYERS = 4  # of the shorter decoder that is run in the place of a long one


@dataclass(frozen=True)
class Plan:
    """A strategy with or without gradient checkpointing."""

    strategy: Strategy
    checkpoints: bool
    memory: DeviceMemory  # of a device
    images: float  # bytes of the activations that are due to images
    hours: float
    devices: int

    def fits(self, limit: float) -> bool:
        """Whether a device of `limit` bytes is enough."""
        return self.memory.total <= limit

    @property
    def flags(self) -> str:
        """What to start the script with."""
        launcher = f"--num_processes {self.devices}"
        file = f"examples/configs/{self.strategy.file}"
        flags = f" --activation_checkpointing {str(self.checkpoints).lower()}"
        if self.strategy.is_deepspeed:
            return f"--use_deepspeed {launcher} examples/finetune.py --config RECIPE --deepspeed {file}{flags}"
        flags = f"{flags} --deepspeed none"
        if self.strategy.is_fsdp:
            launcher = f"--config_file {file} {launcher}"
        elif self.devices > 1:
            launcher = f"--multi_gpu {launcher}"
        return f"{launcher} examples/finetune.py --config RECIPE{flags}"


class Planner:
    """
    Makes the plans of a recipe.

    Args:
        config (`VisualChatConfig`): The configuration of the model.
        arguments (`FinetuneArguments`): Those of the recipe.
        training_arguments (`TrainingArguments`): Those of the recipe.
        batch ([`Batch`]): The largest micro-batch of a device.
        deepspeed (`dict`, *optional*): The content of its DeepSpeed file.
    """

    def __init__(
        self, config: Any, arguments: Any, training_arguments: Any, batch: Batch, deepspeed: dict | None = None
    ):
        self.config, self.arguments, self.batch, self.deepspeed = config, arguments, batch, deepspeed
        self.micro_batches = training_arguments.gradient_accumulation_steps
        self.epochs = training_arguments.num_train_epochs
        self.mixed = None
        if training_arguments.bf16 or training_arguments.fp16:
            self.mixed = torch.bfloat16 if training_arguments.bf16 else torch.float16
        self.width = 4 if self.mixed is None else 2
        self.steps: dict[tuple, StepMemory] = {}

    @cached_property
    def parameters(self) -> Parameters:
        """The parameters as they are loaded without DeepSpeed."""
        return Parameters.of(build_model(self.config, self.arguments))

    @cached_property
    def cast_parameters(self) -> Parameters:
        """The parameters as DeepSpeed has them, all in the dtype of computation."""
        return Parameters.of(build_model(self.config, self.arguments, self.mixed or torch.float32))

    def step(self, is_cast: bool, checkpoints: bool, has_images: bool = True) -> StepMemory:
        """
        The step of a micro-batch.

        Args:
            is_cast (`bool`): Whether all weights are in the dtype of computation, as for DeepSpeed and FSDP2.
            checkpoints (`bool`): Whether layers are recomputed in the backward pass.
            has_images (`bool`, *optional*, defaults to `True`): Without, the text of the batch only.
        """
        key = (is_cast, checkpoints, has_images)
        if key not in self.steps:
            length = self.config.text_config.num_hidden_layers
            shorter = self._shorter_lengths()
            if shorter is None:
                self.steps[key] = self._simulate(length, *key)
            else:
                first, second = (self._simulate(each, *key) for each in shorter)
                self.steps[key] = first.extend(second, shorter, length)
        return self.steps[key]

    def _shorter_lengths(self) -> tuple[int, int] | None:
        """The numbers of layers of two shorter decoders that tell what a layer adds, unless layers differ."""
        text_config = self.config.text_config
        types = getattr(text_config, "layer_types", None) or ()
        period = NUM_LAYERS
        if get_attention_type(self.config).added_layers is not None:
            period = max(period, self.config.cross_layer_interval)
        patterns = (*(self.arguments.trainable or ()), *(self.arguments.lora_target or ()))
        differs = len(set(types)) > 1 or any(re.search(r"\d", pattern) for pattern in patterns)
        return None if differs or text_config.num_hidden_layers <= 2 * period else (period, 2 * period)

    def _simulate(self, length: int, is_cast: bool, checkpoints: bool, has_images: bool) -> StepMemory:
        config = copy.deepcopy(self.config)
        config.text_config.num_hidden_layers = length
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:length]
        model = build_model(config, self.arguments, (self.mixed or torch.float32) if is_cast else None)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = self.batch if has_images else replace(self.batch, images=0)
        autocast = None if is_cast else self.mixed
        return simulate_step(model, batch, self.micro_batches, autocast, keeps_gradients=not is_cast)

    def memory(self, strategy: Strategy, checkpoints: bool, devices: int) -> DeviceMemory:
        """What a device needs in a strategy, with gradient checkpointing or without."""
        parameters = self.cast_parameters if strategy.is_deepspeed else self.parameters
        is_own = self.deepspeed is not None and strategy == strategy_of(self.deepspeed)
        zero = Zero.of(self.deepspeed if is_own else strategy.read(), parameters.hidden_size)
        step = self.step(strategy.casts, checkpoints)
        return device_memory(strategy, parameters, step, devices, self.width, zero)

    def plan(self, strategy: Strategy, checkpoints: bool, machine: Machine, mixture: Mixture) -> Plan:
        """The plan of a strategy."""
        step = self.step(strategy.casts, checkpoints)
        text_only = self.step(strategy.casts, checkpoints, has_images=False) if self.batch.images else step
        num_streams = 2 if self.batch.images and get_attention_type(self.config).two_streams is not None else 1
        run = Run(
            self.cast_parameters,
            self.width,
            operations(step, text_only, self.batch, mixture),
            mixture.conversations * self.epochs,
            self.batch.rows,
            self.micro_batches,
            num_streams,
        )
        return Plan(
            strategy,
            checkpoints,
            self.memory(strategy, checkpoints, machine.devices),
            step.activations - text_only.activations,
            hours(strategy, machine, run),
            machine.devices,
        )

    def plans(self, machine: Machine, mixture: Mixture) -> list[Plan]:
        """All plans for a number of devices, in the order of the table of strategies."""
        return [
            self.plan(strategy, checkpoints, machine, mixture)
            for strategy in STRATEGIES
            if machine.devices > 1 or not strategy.partitions_weights or strategy.weights_on != "device"
            if not (self.arguments.quantization and strategy.partitions_weights)
            for checkpoints in (False, True)
        ]


def strategy_of(deepspeed: dict | None) -> Strategy:
    """The strategy that a DeepSpeed configuration stands for, or DDP without one."""
    options = (deepspeed or {}).get("zero_optimization", {})
    wanted = (
        options.get("stage", 0),
        options.get("offload_optimizer", {}).get("device", "none").replace("none", "device"),
        options.get("offload_param", {}).get("device", "none").replace("none", "device"),
    )
    found = [each for each in STRATEGIES if (each.stage, each.optimizer_on, each.weights_on) == wanted]
    return found[0] if found else Strategy("DeepSpeed", None, *wanted)


def cheapest(plans: list[Plan], limit: float) -> Plan | None:
    """The fastest plan that fits, and of those within one percent of it the simplest."""
    fitting = [plan for plan in plans if plan.fits(limit)]
    fastest = min((plan.hours for plan in fitting), default=0.0)
    return next((plan for plan in fitting if plan.hours <= 1.01 * fastest), None)


def advise(planner: Planner, plans: list[Plan], machine: Machine, mixture: Mixture, limit: float) -> str:
    """The cheapest plan that fits in words, or what would have to change."""
    best = cheapest(plans, limit)
    if best is not None:
        how = "with" if best.checkpoints else "without"
        return (
            f"The cheapest that fits is {best.strategy.name} {how} gradient checkpointing: "
            f"{best.memory.total / GIB:.1f} GiB of {limit / GIB:.1f} on a device, {best.hours:.1f} hours.\n"
            f"    accelerate launch {best.flags}"
        )
    least = min(plans, key=lambda plan: plan.memory.total)
    lines = [
        f"Nothing fits {machine.devices} devices with {limit / GIB:.1f} GiB. The least is {least.strategy.name} with "
        f"{least.memory.total / GIB:.1f} GiB, {least.memory.activations / GIB:.1f} of them activations."
    ]
    for number in (2, 4, 8, 16, 32, 64, 128, 256):
        larger = replace(machine, devices=number)
        fitting = [] if number <= machine.devices else planner.plans(larger, mixture)
        if (best := cheapest(fitting, limit)) is not None:
            needed = f"{best.memory.total / GIB:.1f} GiB"
            lines.append(f"{number} devices are enough, with {best.strategy.name} ({needed}).")
            break
    lines.append(
        "Less memory: a lower --max_length or --per_device_train_batch_size, fewer --trainable parameters, --lora, or "
        "--quantization 4bit with it."
    )
    return "\n".join(lines)
