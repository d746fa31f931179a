"""
The key of a module's weights: what tells everything that its result depends on from anything else.

The image memory, the cache of vision features and a kept conversation use the same key: configuration, adapter state,
autocast, and a checksum of all weights with their dtype and device. Weights enter by content, so a key sees every way
of changing them; hooks and replaced forwards, which no weight tells, are listed by [`hooked_modules`].
"""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.utils import output_capturing


DIGEST_SIZE = 20  # bytes
COLUMNS = 2039  # of the checksum
MULTIPLIER = -7046029254386353131  # odd, of the golden ratio
# Modules whose replacement of a forward computes the same from the same weights.
NEUTRAL_FORWARDS = ("transformers.distributed.tensor_parallel",)
# `enable_input_require_grads` changes no value; cross-attention reads images in front of decoder layers, and its
# weights and code are in the key.
NEUTRAL_HOOKS = ("make_inputs_require_grads", "read_images_before_layer")


def weights_key(module: Any, description: bytes = b"") -> str:
    """
    The key of a module, 40 hexadecimal digits, and of what else its result depends on. It reads all weights once,
    about the cost of one generated token; after [`freeze`] only if one of them is another tensor or has another
    version. A `ValueError` names a weight that is offloaded or sharded.
    """
    config = module.config
    described = json.dumps(_without_name(config.to_dict()), sort_keys=True, default=str)
    for part in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
        described += str(getattr(part, "_attn_implementation", None))
    digest = hashlib.blake2b(description + described.encode(), digest_size=DIGEST_SIZE)
    digest.update(adapter_state(module).encode())
    classes = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    for functions in sorted(str([*map(_describe_code, vars(each).values())]) for each in classes):
        digest.update(functions.encode())
    for name, part in module.named_modules():
        plain = [(key, value) for key, value in vars(part).items() if isinstance(value, float)]
        replaced = [(key, getattr(value, "__name__", "")) for key, value in vars(part).items() if callable(value)]
        digest.update(str((name, type(part).__qualname__, plain, replaced)).encode())
    digest.update(_checksum_of_weights(module))
    return digest.hexdigest()


def _without_name(config: dict) -> dict:
    """A configuration without where it was loaded from, its parts included."""
    parts = {key: _without_name(value) if isinstance(value, dict) else value for key, value in config.items()}
    parts.pop("_name_or_path", None)
    return parts


def known_key(module: Any) -> str | None:
    """The key of a module, or `None` where it does not tell everything: weights are elsewhere, or there are hooks."""
    is_unknown = any(map(is_elsewhere, module.parameters())) or hooked_modules(module)
    return None if is_unknown else weights_key(module)


def _describe_code(function: Any) -> list | None:
    """What a function does, whatever it is called and wherever it is written; `None` for anything else."""
    code = function if isinstance(function, CodeType) else getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return None
    constants = [_describe_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code, code.co_names, constants]


def freeze(module: Any) -> None:
    """
    Declares that the weights of a module stay as they are, so that their checksum is taken once. In-place changes and
    loading are still noticed, by tensor versions; fused optimizers and writes through `.data`, which leave versions
    as they are, are not.
    """
    module._frozen_checksum = (None, b"")


@contextlib.contextmanager
def frozen(module: Any) -> Iterator[None]:
    """Takes the checksum of the weights once, for the keys that are asked for within."""
    is_frozen = getattr(module, "_frozen_checksum", None) is not None
    if not is_frozen:
        freeze(module)
    try:
        yield
    finally:
        if not is_frozen:
            module._frozen_checksum = None


def _checksum_of_weights(module: Any) -> bytes:
    frozen, weights = getattr(module, "_frozen_checksum", None), [*module.parameters(), *module.buffers()]
    if any(weight.is_inference() for weight in weights):
        frozen = None  # tensors made in inference mode have no versions
    if frozen is not None:
        versions = [(id(weight), weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if frozen[0] == versions:
            return frozen[1]
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name, part in module.named_modules():
        if any(rope_type in str(getattr(part, "rope_type", "")) for rope_type in ("dynamic", "longrope")):
            continue  # its frequencies follow the length of a text
        for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if is_elsewhere(tensor):
                raise ValueError(
                    f"The weight {name}.{key} is offloaded or sharded, so a change of it would not be noticed. Load "
                    "the model without offloading or ZeRO-3."
                )
            for plain in _plain_tensors(tensor):
                digest.update(str((name, key, plain.dtype, tuple(plain.shape), plain.device.type)).encode())
                digest.update(column_sums(plain))
    if frozen is not None:
        module._frozen_checksum = (versions, digest.digest())
    return digest.digest()


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors of a weight: of a quantized one its packed numbers and their scales."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if is_quantized(tensor) and hasattr(tensor, "__tensor_flatten__"):  # torchao, quanto
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
        return
    yield tensor
    yield from _scales(tensor)
    yield from _scales(getattr(tensor, "quant_state", None))


def _scales(state: Any) -> list[torch.Tensor]:
    """The scales that bitsandbytes keeps beside a weight, nested ones included."""
    found = [getattr(state, name, None) for name in ("SCB", "absmax", "offset", "code")]
    nested = getattr(state, "state2", None)
    return [scale for scale in found if isinstance(scale, torch.Tensor)] + (_scales(nested) if nested else [])


def image_key(pixel_values: torch.Tensor) -> str:
    """The key of a preprocessed image (channels, height, width), by its content."""
    digest = hashlib.blake2b(str((pixel_values.dtype, tuple(pixel_values.shape))).encode(), digest_size=DIGEST_SIZE)
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(module: nn.Module) -> str:
    """The state of adapters, active, disabled or merged, and of autocast."""
    state: list[Any] = []
    for name, part in module.named_modules():
        found = [getattr(part, what, None) for what in ("active_adapters", "disable_adapters", "merged")]
        adapters = [str(None if callable(value) else value) for value in found]
        scaling = getattr(part, "scaling", None)
        if adapters != ["None"] * 3 or isinstance(scaling, dict):
            state.append((name, adapters, scaling))
    device = next(module.parameters()).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        state.append(torch.get_autocast_dtype(device))
    return str(state)


def hooks_of(module: nn.Module) -> list[Callable]:
    """The hooks of a module that may change what it computes; not those that only record."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "func", hook).__module__ != output_capturing.__name__]


def hooked_modules(model: nn.Module) -> list[str]:
    """The modules with hooks or a replaced forward, by name."""

    def is_hooked(module: nn.Module) -> bool:
        hooks = [hook for hook in hooks_of(module) if getattr(hook, "__name__", None) not in NEUTRAL_HOOKS]
        hooks += [*module_hooks._global_forward_pre_hooks.values(), *module_hooks._global_forward_hooks.values()]
        forward = vars(module).get("forward")
        is_replaced = forward is not None and getattr(forward, "__module__", None) not in NEUTRAL_FORWARDS
        return bool(hooks) or (is_replaced and not hasattr(module, "_hf_hook"))

    return [name or type(module).__name__ for name, module in model.named_modules() if is_hooked(module)]


def has_dropout(module: nn.Module) -> bool:
    """Whether what a module computes is random, or depends on the rest of its batch, as in some training."""
    if not module.training:
        return False
    rates = ("p", "drop_prob", "dropout", "attention_dropout")
    return any(
        part.training
        and (
            isinstance(part, nn.modules.batchnorm._BatchNorm)
            or any(isinstance(rate := getattr(part, name, None), float) and rate > 0 for name in rates)
        )
        for part in module.modules()
    )


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a weight is of a class of its own, as those of bitsandbytes, torchao and quanto are."""
    return type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) and not hasattr(tensor, "to_local")


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a weight is offloaded, or sharded by ZeRO-3."""
    return tensor.is_meta or hasattr(tensor, "ds_id")


def column_sums(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor, mixed and summed up in columns, at about the speed of memory."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # with tensor parallelism
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.data_ptr() % 4 or flat.storage_offset() % 4 or len(flat) % 4:
        flat = nn.functional.pad(flat, (0, -len(flat) % 4)).clone()
    words = flat.view(torch.int32)
    rows = words[: len(words) // COLUMNS * COLUMNS].view(-1, COLUMNS)
    # Rows have odd factors, and signs enter other bits, so that changes do not cancel out.
    size = min(len(rows), 256 if words.device.type == "cpu" else 16384)  # for the caches of a CPU
    factors = ((2 * torch.arange(size, device=words.device) + 1) * MULTIPLIER >> 32).int()[:, None] | 1
    total, mixed = words.new_zeros(COLUMNS), words.new_empty(size, COLUMNS)
    for start in range(0, len(rows), max(size, 1)):
        part = rows[start : start + size]
        mixed = mixed[: len(part)]
        torch.bitwise_right_shift(part, 13, out=mixed).add_(part).mul_(factors[: len(part)])
        total = total * 31 + mixed.sum(dim=0, dtype=torch.int32)
    return torch.cat([total, words[rows.numel() :]]).cpu().numpy().tobytes()
