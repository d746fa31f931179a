"""
The memory of a training step, found without memory: the step runs on fake tensors, which have shapes but no data, and
the bytes of all tensors are counted as they come and go.

It is the step itself, so nothing is said here about layers, attention types or towers. What differs on a GPU is the
memory that kernels need inside them, and what the allocator loses in fragments.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from modeling_visualchat.attention_types_visualchat import get_attention_type
from modeling_visualchat.parts_visualchat import image_shape


aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


@dataclass(frozen=True)
class Batch:
    """The shape of a batch; the text of a row stands before, between and after its images."""

    rows: int
    text_tokens: int  # of a row
    images: int  # of a row
    label_share: float = 1.0  # of the text tokens, the last ones, that have a loss


@dataclass(frozen=True)
class StepMemory:
    """
    Bytes of a training step beside weights and optimizer, at the peak of each phase, and its operations.

    The phases of a micro-batch end before and after each pass through the decoder, after the loss, and after the
    backward pass of the output layer.
    """

    peaks: tuple[float, ...]  # of gradients and activations together
    activation_peaks: tuple[float, ...]  # of all that is no gradient
    flops: float  # floating point operations of a micro-batch

    @property
    def peak(self) -> float:
        """Of gradients and activations together."""
        return max(self.peaks)

    @property
    def activations(self) -> float:
        """Of all that is no gradient."""
        return max(self.activation_peaks)

    def extend(self, longer: "StepMemory", lengths: tuple[int, int], length: int) -> "StepMemory":
        """
        The step of a decoder with more layers, from those of two numbers of layers: every layer adds the same to each
        phase.
        """
        share = (length - lengths[0]) / (lengths[1] - lengths[0])

        def affine(first: float, second: float) -> float:
            return first + share * (second - first)

        return StepMemory(
            tuple(map(affine, self.peaks, longer.peaks)),
            tuple(map(affine, self.activation_peaks, longer.activation_peaks)),
            affine(self.flops, longer.flops),
        )


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, new tensors have a shape and a dtype, and no data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def make_inputs(config: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """The ids, labels and pixels of a batch, with data, since the plan of a forward pass reads them."""
    part = batch.text_tokens // (batch.images + 1)
    text = int(config.image_token_id == 0)
    row = ([text] * part + [config.image_token_id] * config.image_seq_length) * batch.images
    row += [text] * (batch.text_tokens - part * batch.images)
    input_ids = torch.tensor([row] * batch.rows)
    is_text = input_ids != config.image_token_id
    is_labelled = is_text & (is_text.cumsum(dim=1) > (1 - batch.label_share) * batch.text_tokens)
    inputs = {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_labelled, -100)}
    if batch.images:
        numbers = torch.arange(1.0, batch.rows * batch.images + 1)[:, None, None, None]
        inputs["pixel_values"] = numbers.expand(-1, *image_shape(config.vision_config)).contiguous()
    return inputs


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come and go within it, their peaks, and floating point operations."""

    def __init__(self, known: Iterator[torch.Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.total = self.gradients = 0
        self.peaks, self.activation_peaks, self.flops = [0], [0], 0.0

    def end_phase(self, *arguments) -> None:
        """Starts a phase with peaks of its own; takes what hooks pass."""
        self.peaks.append(self.total)
        self.activation_peaks.append(self.total - self.gradients)

    def note(self, tensor: torch.Tensor) -> None:
        """Counts a tensor, unless it shares its memory with one that is counted."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.total += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata)
            self.peaks[-1] = max(self.peaks[-1], self.total)
            self.activation_peaks[-1] = max(self.activation_peaks[-1], self.total - self.gradients)

    def free(self, key: int) -> None:
        """Forgets the memory of a tensor."""
        self.total -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False  # a check of weights or states for faults, and there are none
        if function in INDEXING:
            args = (args[0], [each for index in args[1] for each in as_numbers(index)], *args[2:])
        outputs = function(*args, **(kwargs or {}))
        if (count := FLOP_COUNTS.get(function._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=outputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return outputs


def as_numbers(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A mask as indices: how many they are cannot be told without data."""
    if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
        return (index,)
    return index.nonzero(as_tuple=True)


def _sdpa_on_cpu(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _sdpa_backward_on_cpu(gradient, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch counts the fused attention of GPUs only; that of CPUs does the same operations.
FLOP_COUNTS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_on_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_on_cpu,
}


def simulate_step(
    model: Any,
    batch: Batch,
    micro_batches: int = 1,
    autocast: torch.dtype | None = None,
    keeps_gradients: bool = True,
) -> StepMemory:
    """
    Runs forward and backward passes of a model of fake tensors.

    Args:
        model (`VisualChatForConditionalGeneration`): In training mode, with gradient checkpointing or without; a
            `PeftModel` is possible too.
        batch ([`Batch`]): A micro-batch of one device.
        micro_batches (`int`, *optional*, defaults to 1): How many are accumulated; the second finds gradients there.
        autocast (`torch.dtype`, *optional*): The dtype of computation, where the weights have another.
        keeps_gradients (`bool`, *optional*, defaults to `True`): Whether gradients stay; DeepSpeed takes each away.
    """
    inputs = make_inputs(model.config, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head, number = model.get_output_embeddings(), min(micro_batches, 2)
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    if get_attention_type(model.config).two_streams is not None:
        _ = inner.probe  # tries the decoder, once, on tensors with data
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with TensorBytes(iter([*model.parameters(), *model.buffers(), *inputs.values()])) as tensors:

        def take(parameter: torch.nn.Parameter) -> None:
            if keeps_gradients:
                tensors.gradients = sum(each.grad.nbytes for each in trained if each.grad is not None)
            else:
                parameter.grad = None

        hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in trained]
        hooks.append(inner.language_model.register_forward_pre_hook(tensors.end_phase))
        hooks.append(inner.language_model.register_forward_hook(tensors.end_phase))
        hooks.append(head.register_full_backward_hook(tensors.end_phase))
        for _ in range(number):
            with context:
                loss = model(**inputs).loss
            tensors.end_phase()
            loss.backward()
            del loss
            tensors.end_phase()
        memory = StepMemory(tuple(tensors.peaks), tuple(tensors.activation_peaks), tensors.flops / number)
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    return memory
