"""The time of a training run, from the floating point operations and the bytes that move in a step."""

import re
from dataclasses import dataclass

from .models import Parameters
from .step_memory import Batch, StepMemory
from .strategies import MASTER, MOMENTS, Strategy


# 10^12 dense operations per second in bfloat16, from the data sheets of NVIDIA and AMD, by words of a device's name;
# the first entry counts whose words are all there.
CHIPS = {
    "A100": 312.0, "A10": 125.0, "A30": 165.0, "A40": 149.7,
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0,
    "B200": 2250.0, "L4": 121.0, "L40S": 362.0, "MI300X": 1307.0,
}  # fmt: skip


def peak_tflops(device: str) -> float | None:
    """The peak of a device by its name, as in `torch.cuda.get_device_name()`; `None` if it is not known."""
    words = set(re.split(r"\W+", device))
    return next((peak for chip, peak in CHIPS.items() if words.issuperset(chip.split())), None)


@dataclass(frozen=True)
class Machine:
    """What a run has: devices and their speeds. The defaults are of an A100 with NVLink and PCIe 4."""

    devices: int = 8
    tflops: float = 312.0  # 10^12 operations per second of a device, in the dtype of computation
    utilisation: float = 0.4  # the share of them that a run reaches
    link: float = 200.0  # 10^9 bytes per second between devices
    pcie: float = 20.0  # 10^9 bytes per second between a device and its host
    nvme: float = 3.0  # 10^9 bytes per second of NVMe for each device


@dataclass(frozen=True)
class Mixture:
    """The conversations of a run, with the means of what they hold."""

    conversations: int
    text_tokens: float
    images: float


def operations(step: StepMemory, text_only: StepMemory, batch: Batch, mixture: Mixture) -> float:
    """The operations of the mean conversation, taken as linear in the tokens of text and in images."""
    per_token = text_only.flops / (batch.rows * batch.text_tokens)
    per_image = (step.flops - text_only.flops) / (batch.rows * max(batch.images, 1))
    return mixture.text_tokens * per_token + mixture.images * per_image


@dataclass(frozen=True)
class Run:
    """What a run computes and moves."""

    parameters: Parameters  # in the dtype of computation
    width: int  # bytes of a number in it
    flops: float  # operations of a conversation
    conversations: float  # of the whole run, over all epochs
    rows: int  # conversations of a micro-batch of one device
    micro_batches: int  # of an optimizer step
    num_streams: int  # how often a layer is gathered in a pass: twice where images go through it first


def hours(strategy: Strategy, machine: Machine, run: Run) -> float:
    """
    Hours of a run. Communication overlaps with computation within a micro-batch; the exchange of gradients and the
    update of offloaded weights, once in an optimizer step, do not.
    """
    trained, share = run.parameters.trained, run.parameters.trained / machine.devices
    weights = run.parameters.frozen_bytes + run.width * trained
    gathers = 2 * run.num_streams  # forward and backward
    compute = run.rows * run.flops / (machine.tflops * 1e12 * machine.utilisation)
    moved = 0.0  # seconds of a micro-batch
    if strategy.partitions_weights and machine.devices > 1:
        moved = gathers * weights / (machine.link * 1e9)
    if strategy.weights_on != "device":
        speed = machine.pcie if strategy.weights_on == "cpu" else min(machine.pcie, machine.nvme)
        moved = max(moved, gathers * weights / machine.devices / (speed * 1e9))
    update = 0.0  # seconds of an optimizer step
    if machine.devices > 1:
        update += 2 * run.width * trained / (machine.link * 1e9)
    if strategy.optimizer_on != "device":
        update += (4 + run.width) * share / (machine.pcie * 1e9)
    if strategy.optimizer_on == "nvme":
        update += 2 * (MASTER + MOMENTS) * share / (machine.nvme * 1e9)
    steps = run.conversations / (run.rows * machine.devices)  # of micro-batches
    return steps * (max(compute, moved) + update / run.micro_batches) / 3600
