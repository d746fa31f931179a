"""
A memory of images: what a model makes of an image, computed once and used in any conversation.

With MMCA an image depends on nothing but itself and the weights, so its projected features, and its keys (before
rotation) and values at every layer, can be used again exactly: at another position, beside other images, in another
process. [`ImageMemory`] keeps them, the least recently used going first, under a key made of everything that they
depend on. What does not match is computed.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .image_states_visualchat import ImageStates, has_dropout, hooks_of, same_images


FORMAT = b"visualchat image states 1"  # to be counted up when what is kept, or its form, changes
DIGEST_SIZE = 20  # bytes
COLUMNS = (1021, 1009)  # of the checksum; primes, so that rows of a matrix that change places change it
ENTRY_NAME = re.compile(r"[0-9a-f]{40}-[0-9a-f]{40}\.(safetensors|[0-9]+-[0-9]+\.part)")
ABANDONED_AFTER = 3600  # seconds


class ImageMemory:
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
        `ValueError`: a limit below 0.
    """

    def __init__(
        self,
        max_bytes: int = 4 * 2**30,
        device: str | torch.device | None = None,
        folder: str | Path | None = None,
        max_disk_bytes: int = 64 * 2**30,
    ):
        if max_bytes < 0 or max_disk_bytes < 0:
            raise ValueError(f"The limits of an ImageMemory are numbers of bytes, got {max_bytes}, {max_disk_bytes}.")
        self.max_bytes, self.device, self.max_disk_bytes = max_bytes, device, max_disk_bytes
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"ImageMemory({len(self)} images, {self.nbytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB, "
            f"{self.hits} hits, {self.misses} misses)"
        )

    def clear(self) -> None:
        """Forgets what is in memory; the folder stays."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

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

    def _get(self, key: str, device: torch.device) -> dict[str, torch.Tensor] | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = self._load(key) if self.folder is not None else None
        if entry is not None:
            entry = {name: tensor.to(device) for name, tensor in entry.items()}
            self._keep(key, entry)
        return entry

    def _put(self, key: str, entry: dict[str, torch.Tensor]) -> None:
        self._keep(key, entry)
        if self.folder is not None:
            self._save(key, entry)

    def _keep(self, key: str, entry: dict[str, torch.Tensor]) -> None:
        size = _size(entry)
        if size > self.max_bytes:
            return
        if self.device is not None:
            entry = {name: tensor.to(self.device) for name, tensor in entry.items()}
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = entry
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.nbytes -= _size(oldest)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _load(self, key: str) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("entry") != f"{key} {_checksum(entry)}":
                raise ValueError("it does not hold what was written under its name")
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, OSError) as error:
            warnings.warn(f"The image memory's file {path} cannot be used and is computed anew: {error}", stacklevel=2)
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return entry

    def _save(self, key: str, entry: dict[str, torch.Tensor]) -> None:
        """Whole or not at all, whoever else reads or writes the folder."""
        assert self.folder is not None
        entry = {name: tensor.cpu() for name, tensor in entry.items()}
        part = self.folder / f"{key}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(entry, part, metadata={"entry": f"{key} {_checksum(entry)}"})
            os.replace(part, self._path(key))
            self._shrink_folder()
        except (OSError, SafetensorError) as error:  # a full disk costs the entry, not the answer
            warnings.warn(f"The image memory cannot write to {self.folder}: {error}", stacklevel=2)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _shrink_folder(self) -> None:
        """Removes the entries that were used longest ago, and what a process that was killed has left half-written."""
        assert self.folder is not None
        files = []
        for path in self.folder.iterdir():
            if not ENTRY_NAME.fullmatch(path.name):
                continue  # not ours
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if path.suffix == ".part" and time.time() - status.st_mtime > ABANDONED_AFTER:
                path.unlink(missing_ok=True)
            elif path.suffix != ".part":
                files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_disk_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def fingerprint_image(pixel_values: torch.Tensor) -> str:
    """What tells a preprocessed image (channels, height, width) from any other."""
    digest = hashlib.blake2b(str((pixel_values.dtype, tuple(pixel_values.shape))).encode(), digest_size=DIGEST_SIZE)
    digest.update(pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def watched_modules(model: Any) -> list[str]:
    """The modules whose result no weight tells: those with hooks, or with a forward of their own."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if hooks_of(module) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))
    ]


def describe_switches(model: Any) -> str:
    """What tells one state of a model with the same weights from another: its adapters, and autocast."""
    switches: list[Any] = []
    for name, module in model.named_modules():
        adapters = [str(getattr(module, what, None)) for what in ("active_adapters", "disable_adapters", "merged")]
        scaling = getattr(module, "scaling", None)
        if adapters != ["None"] * 3 or isinstance(scaling, dict):
            switches.append((name, adapters, scaling))
    device = model.get_input_embeddings().weight.device.type
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
    digest = hashlib.blake2b(FORMAT, digest_size=DIGEST_SIZE)
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(str(getattr(model.config.vision_config, "_attn_implementation", None)).encode())
    digest.update(describe_switches(model).encode())
    unread = set(map(id, model.get_input_embeddings().parameters()))  # images come as embeddings
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            continue  # keys are kept before rotation
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in unread:
                continue
            if tensor.is_meta or hasattr(tensor, "ds_id"):
                raise ValueError(
                    f"The weight {name}.{part} is not on this machine as a whole, so an image memory cannot tell "
                    "whether it has changed. Load the model without offloading or ZeRO-3."
                )
            digest.update(str((name, part, tensor.dtype, tuple(tensor.shape), tensor.device.type)).encode())
            digest.update(_column_sums(tensor))
    return digest.hexdigest()


def _column_sums(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor summed up as integers, in columns of two widths, at the speed of memory."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.data_ptr() % 8 or flat.storage_offset() % 8 or len(flat) % 8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).clone()
    words = flat.view(torch.int64)
    sums = []
    for width in COLUMNS:
        whole = len(words) // width * width
        sums += [words[:whole].view(-1, width).sum(dim=0), words[whole:]]
    return torch.cat(sums).cpu().numpy().tobytes()


def _checksum(entry: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name in sorted(entry):
        digest.update(str((name, entry[name].dtype, tuple(entry[name].shape))).encode())
        digest.update(_column_sums(entry[name]))
    return digest.hexdigest()


def _size(entry: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


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
