"""
A memory of images: what a model makes of an image, computed once and used in any conversation.

With MMCA an image depends on nothing but itself and the weights, so its projected features, and its keys (before
rotation) and values at every layer, can be used again exactly: at another position, beside other images, in another
process. [`ImageMemory`] keeps them, the least recently used going first, under a key made of everything that they
depend on. What does not match is computed.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .image_states_visualchat import ImageStates, has_dropout, hooks_of, same_images
from .tensor_store_visualchat import DIGEST_SIZE, TensorStore, column_sums


# What `enable_input_require_grads` registers for gradient checkpointing; it changes no value.
NEUTRAL_HOOK = "make_inputs_require_grads"
FORMAT = b"visualchat image states 1"  # to be counted up when what is kept, or its form, changes


class ImageMemory(TensorStore):
    """
    A bounded store of images that a model has read.

    ```python
    >>> memory = ImageMemory(max_bytes=2 * 2**30, folder="image_memory")
    >>> model.generate(**inputs, image_memory=memory)
    ```

    It may be used with several models; each sees its own entries alone, and none after its weights, adapters or dtype
    have changed. To find that out, every call sums up the weights once, which costs about what one generated token
    does.

    Args:
        max_bytes (`int`, *optional*, defaults to 4 GiB): The most that it holds in memory.
        device (`str` or `torch.device`, *optional*): Where to hold it, as in `"cpu"`; by default where the model is.
        folder (`str` or `Path`, *optional*): Keeps entries on disk too, as safetensors; processes may share it.
        max_disk_bytes (`int`, *optional*, defaults to 64 GiB): The most that the folder holds.

    Attributes:
        hits, misses (`int`): Images that were found, and that had to be computed.
        nbytes (`int`): What it holds in memory.

    Raises:
        `ValueError`: a limit below 0, or a folder that is a file.
    """

    @torch.no_grad()
    def read(self, model: Any, pixel_values: torch.Tensor) -> ImageStates:
        """
        What a model makes of images, from the memory or, of those that it does not know, computed together.

        Args:
            model (`VisualChatModel`): The model.
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels.

        Raises:
            `ValueError`: no image, or a model whose dropout is on, whose weights cannot be read, or that cannot read
                images apart from a conversation.
        """
        model = getattr(model, "model", model)
        if len(pixel_values) == 0:
            raise ValueError("There are no images to read; pixel_values is empty.")
        if has_dropout(model):
            raise ValueError(
                "With dropout an image is never the same twice: call model.eval() to use an image memory."
            )
        if watched := watched_modules(model):
            warnings.warn(
                f"The image memory is not used: {watched[0]} has hooks or a forward of its own, which may change what "
                "it computes.",
                stacklevel=3,
            )
            return model.read_images(pixel_values)
        model_key = fingerprint_model(model)
        index = same_images(pixel_values)
        first = [index.index(number) for number in range(max(index, default=-1) + 1)]
        keys = [f"{model_key}-{fingerprint_image(pixel_values[image])}" for image in first]
        device = model.get_input_embeddings().weight.device
        entries = {key: entry for key in keys if (entry := self._get(key, device)) is not None}
        missing = [image for key, image in zip(keys, first) if key not in entries]
        self.hits += len(entries)
        self.misses += len(missing)
        if missing:
            states = model.read_images(pixel_values[torch.tensor(missing, device=pixel_values.device)])
            for row, image in enumerate(missing):
                key = keys[first.index(image)]
                number = states.index[row]
                entries[key] = _to_entry(states, number)
                self._put(key, entries[key])
        return _from_entries([entries[key] for key in keys], index, device)


def fingerprint_image(pixel_values: torch.Tensor) -> str:
    """What tells a preprocessed image (channels, height, width) from any other."""
    digest = hashlib.blake2b(str((pixel_values.dtype, tuple(pixel_values.shape))).encode(), digest_size=DIGEST_SIZE)
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def watched_modules(model: Any) -> list[str]:
    """The modules whose result no weight tells: those with hooks, or with a forward of their own."""

    def is_watched(module: Any) -> bool:
        hooks = [hook for hook in hooks_of(module) if getattr(hook, "__name__", None) != NEUTRAL_HOOK]
        return bool(hooks) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))

    return [name or type(module).__name__ for name, module in model.named_modules() if is_watched(module)]


def describe_switches(model: Any) -> str:
    """What tells one state of a model with the same weights from another: its adapters, and autocast."""
    switches: list[Any] = []
    for name, module in model.named_modules():
        adapters = [str(getattr(module, what, None)) for what in ("active_adapters", "disable_adapters", "merged")]
        scaling = getattr(module, "scaling", None)
        if adapters != ["None"] * 3 or isinstance(scaling, dict):
            switches.append((name, adapters, scaling))
    device = next(model.parameters()).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        switches.append(torch.get_autocast_dtype(device))
    return str(switches)


def fingerprint_model(model: Any) -> str:
    """
    What tells everything in a [`VisualChatModel`] that an image depends on from anything else: configuration, weights
    with their dtype and device, adapters and autocast. Weights enter by sums, not bit by bit.

    Raises:
        `ValueError`: weights that are not here, as with sharded parameters.
    """
    described = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    described += str(getattr(model.config.vision_config, "_attn_implementation", None))
    unread = model.get_input_embeddings().parameters()  # images come as embeddings
    return fingerprint_weights(model, FORMAT + described.encode(), unread)


def fingerprint_weights(module: Any, described: bytes, unread: Iterable[torch.Tensor] = ()) -> str:
    """
    What tells a module, its weights and switches from any other.

    Args:
        module (`nn.Module`): The module.
        described (`bytes`): What else its result depends on.
        unread (`Iterable` of `torch.Tensor`, *optional*): Weights that it does not.

    Raises:
        `ValueError`: weights that are not here.
    """
    digest = hashlib.blake2b(described, digest_size=DIGEST_SIZE)
    digest.update(describe_switches(module).encode())
    passed_over = set(map(id, unread))
    for name, part in module.named_modules():
        if name.endswith("rotary_emb"):
            continue  # keys are kept before rotation
        for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if id(tensor) in passed_over:
                continue
            if is_elsewhere(tensor):
                raise ValueError(
                    f"The weight {name}.{key} is not on this machine as a whole, so an image memory cannot tell "
                    "whether it has changed. Load the model without offloading or ZeRO-3."
                )
            digest.update(str((name, key, tensor.dtype, tuple(tensor.shape), tensor.device.type)).encode())
            digest.update(column_sums(tensor))
    return digest.hexdigest()


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a weight is offloaded, or sharded by ZeRO-3."""
    return tensor.is_meta or hasattr(tensor, "ds_id")


def _to_entry(states: ImageStates, number: int) -> dict[str, torch.Tensor]:
    """One of the different images, in tensors of its own."""
    entry = {"features": states.features[number].clone()}
    for layer, (keys, values) in enumerate(zip(states.keys, states.values)):
        entry[f"keys.{layer}"] = keys[number].clone(memory_format=torch.contiguous_format)
        entry[f"values.{layer}"] = values[number].clone(memory_format=torch.contiguous_format)
    return entry


def _from_entries(entries: list[dict[str, torch.Tensor]], index: list[int], device: torch.device) -> ImageStates:
    def stack(name: str) -> torch.Tensor:
        return torch.stack([entry[name].to(device) for entry in entries])

    layers = range(sum(name.startswith("keys.") for name in entries[0]))
    keys, values = ([stack(f"{name}.{layer}") for layer in layers] for name in ("keys", "values"))
    return ImageStates(stack("features"), index, keys, values)
