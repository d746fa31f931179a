"""
Ways to spread a training run over devices, and the memory of a device in each.

The numbers of bytes follow what the libraries allocate: AdamW keeps two moments of each trained parameter in float32;
DeepSpeed keeps every weight in the dtype of computation and a master copy of what is trained in float32, and takes
gradients into buckets; DDP and FSDP2 keep trained weights in float32 and compute under autocast.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .models import Parameters
from .step_memory import StepMemory


CONFIGS = Path(__file__).parent.parent / "configs"
MOMENTS, MASTER = 8, 4  # bytes per trained parameter


@dataclass(frozen=True)
class Strategy:
    """One way to spread a run."""

    name: str
    file: str | None = None  # in examples/configs: a DeepSpeed file, or one of accelerate
    stage: int = 0  # of ZeRO
    optimizer_on: str = "device"  # or "cpu" or "nvme"
    weights_on: str = "device"
    is_fsdp: bool = False

    def read(self) -> dict:
        """The content of its DeepSpeed file; empty without one."""
        return json.loads((CONFIGS / self.file).read_text()) if self.is_deepspeed and self.file is not None else {}

    @property
    def is_deepspeed(self) -> bool:
        """Whether weights are in the dtype of computation, and there is no autocast."""
        return self.stage > 0

    @property
    def casts(self) -> bool:
        """Whether layers see all weights in the dtype of computation."""
        return self.is_deepspeed or self.is_fsdp

    @property
    def partitions_weights(self) -> bool:
        """Whether a device holds a part of the weights only, and gathers layers as they run."""
        return self.is_fsdp or self.stage == 3


# From the simplest on; the first of the fastest that fit is the cheapest.
STRATEGIES = (
    Strategy("DDP"),
    Strategy("ZeRO-1", "zero1.json", 1),
    Strategy("ZeRO-2", "zero2.json", 2),
    Strategy("ZeRO-3", "zero3.json", 3),
    Strategy("FSDP2", "fsdp2.yaml", is_fsdp=True),
    Strategy("ZeRO-2, optimizer on CPU", "zero2_cpu.json", 2, "cpu"),
    Strategy("ZeRO-3, optimizer on CPU", "zero3_cpu_optimizer.json", 3, "cpu"),
    Strategy("ZeRO-3, weights and optimizer on CPU", "zero3_cpu.json", 3, "cpu", "cpu"),
    Strategy("ZeRO-3, weights and optimizer on NVMe", "zero3_nvme.json", 3, "nvme", "nvme"),
)


@dataclass(frozen=True)
class Zero:
    """The sizes in a DeepSpeed file that memory depends on, in elements; DeepSpeed's defaults where it has none."""

    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000  # parameters of ZeRO-3 that are gathered at once
    overlaps: bool = True  # a second bucket is filled while the first one is reduced

    @classmethod
    def of(cls, deepspeed: dict, hidden_size: int) -> "Zero":
        """Those of a DeepSpeed configuration; `"auto"` is what Trainer makes of the hidden size."""
        options = deepspeed.get("zero_optimization", {})
        auto = {"reduce_bucket_size": hidden_size**2, "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2)}

        def size(name: str, default: int) -> int:
            value = options.get(name, default)
            return auto[name] if value == "auto" else int(value)

        return cls(
            size("reduce_bucket_size", cls.reduce_bucket),
            size("stage3_prefetch_bucket_size", cls.prefetch_bucket),
            size("stage3_max_live_parameters", cls.max_live),
            options.get("overlap_comm", options.get("stage") == 3),
        )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, and in the memory and on the NVMe of the host for it."""

    weights: float
    gradients: float  # that are there when activations are at their peak
    optimizer: float
    activations: float
    buffers: float  # gathered layers, and buckets
    update: float = 0.0  # gradients in float32, while the optimizer steps and activations are gone
    host: float = 0.0
    nvme: float = 0.0

    @property
    def total(self) -> float:
        """The peak."""
        during_step = max(self.gradients + self.activations, self.update)
        return self.weights + self.optimizer + self.buffers + during_step


def device_memory(
    strategy: Strategy, parameters: Parameters, step: StepMemory, devices: int, width: int, zero: Zero
) -> DeviceMemory:
    """
    The memory of a device.

    Args:
        strategy ([`Strategy`]): How the run is spread.
        parameters ([`Parameters`]): Those of the model as it is loaded.
        step ([`StepMemory`]): A micro-batch of a device, its model as the strategy has it.
        devices (`int`): How many there are.
        width (`int`): Bytes of a number in the dtype of computation.
        zero ([`Zero`]): The sizes of DeepSpeed.
    """
    trained, frozen_bytes = parameters.trained, parameters.frozen_bytes
    if strategy.is_deepspeed:
        return _deepspeed_memory(strategy, parameters, step, devices, width, zero)
    if strategy.is_fsdp:
        # The layer that runs and the next one are gathered, in the dtype of computation.
        return DeviceMemory(
            weights=(4 * trained + frozen_bytes) / devices,
            gradients=4 * trained / devices,
            optimizer=MOMENTS * trained / devices,
            activations=step.activations,
            buffers=2 * width * parameters.largest_layer,
        )
    return DeviceMemory(
        weights=4 * trained + frozen_bytes,
        gradients=step.peak - step.activations,
        optimizer=MOMENTS * trained,
        activations=step.activations,
        buffers=4 * trained * (devices > 1),  # the buckets of DDP
    )


def _deepspeed_memory(
    strategy: Strategy, parameters: Parameters, step: StepMemory, devices: int, width: int, zero: Zero
) -> DeviceMemory:
    trained, share = parameters.trained, parameters.trained / devices
    weights: dict[str, float] = dict.fromkeys(("device", "cpu", "nvme"), 0.0)
    optimizer = dict(weights)
    all_weights = parameters.frozen_bytes + width * trained
    weights[strategy.weights_on] = all_weights / devices if strategy.stage == 3 else all_weights
    optimizer[strategy.optimizer_on] = (MASTER + MOMENTS) * share
    on_device = strategy.optimizer_on == "device"
    gradients = width * (trained if strategy.stage == 1 else share)  # beside those in the buckets
    buckets = min(zero.reduce_bucket, trained) * width * (2 if zero.overlaps else 1)
    gathered = min(parameters.total, max(zero.max_live, parameters.largest_layer) + zero.prefetch_bucket) * width
    return DeviceMemory(
        weights=weights["device"],
        gradients=gradients if on_device or strategy.stage == 1 else 0.0,
        optimizer=optimizer["device"],
        activations=step.activations,
        buffers=buckets + (gathered if strategy.stage == 3 else 0.0),
        update=(width + 4) * share if on_device else 0.0,
        # The gradients of what is offloaded are there in float32 too.
        host=weights["cpu"] + optimizer["cpu"] + (0.0 if on_device else 4 * share),
        nvme=weights["nvme"] + optimizer["nvme"],
    )
