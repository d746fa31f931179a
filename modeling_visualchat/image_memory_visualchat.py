"""
A memory of images: what a model makes of an image, computed once and used in any conversation.

With MMCA an image depends on nothing but itself and the weights, so its projected features, and its keys (before
rotation) and values at every layer, can be used again exactly: at another position, beside other images, in another
process. [`ImageMemory`] keeps them, the least recently used going first, under a key made of everything that they
depend on. What does not match is computed.
"""

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .image_states_visualchat import ImageStates, has_dropout, hooks_of, same_images


DIGEST_SIZE = 20  # bytes
COLUMNS = 1021  # of the checksum; prime, so that rows of a matrix that change places change it


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
            `ValueError`: a model whose dropout is on, whose weights cannot be read, or that cannot read images apart
                from a conversation.
        """
        if has_dropout(model):
            raise ValueError(
                "With dropout an image is never the same twice: call model.eval() to use an image memory."
            )
        model_key = fingerprint_model(model)
        index = same_images(pixel_values)
        first = [index.index(number) for number in range(max(index, default=-1) + 1)]
        keys = [f"{model_key}-{fingerprint_image(pixel_values[image])}" for image in first]
        entries = {key: entry for key in keys if (entry := self._get(key)) is not None}
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
        return _from_entries([entries[key] for key in keys], index, model.get_input_embeddings().weight.device)

    def _get(self, key: str) -> dict[str, torch.Tensor] | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = self._load(key) if self.folder is not None else None
        if entry is not None:
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
                checksum = (file.metadata() or {}).get("checksum")
            if checksum != _checksum(entry):
                raise ValueError("its contents do not have the checksum that was noted")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, OSError) as error:
            warnings.warn(f"The image memory's file {path} cannot be used and is computed anew: {error}", stacklevel=2)
            return None
        return entry

    def _save(self, key: str, entry: dict[str, torch.Tensor]) -> None:
        """Whole or not at all, whoever else reads or writes the folder."""
        assert self.folder is not None
        entry = {name: tensor.cpu() for name, tensor in entry.items()}
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file(entry, name, metadata={"checksum": _checksum(entry)})
            os.replace(name, self._path(key))
        except OSError as error:  # a full disk costs the entry, not the answer
            warnings.warn(f"The image memory cannot write to {self.folder}: {error}", stacklevel=2)
            Path(name).unlink(missing_ok=True)
        self._shrink_folder()

    def _shrink_folder(self) -> None:
        assert self.folder is not None
        files = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
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


def fingerprint_model(model: Any) -> str:
    """
    What tells everything in a [`VisualChatModel`] that an image depends on from anything else: configuration, weights
    and their dtype and device, and which adapters and hooks are on. Weights enter by sums, not bit by bit.

    Raises:
        `ValueError`: weights that are not here, as with sharded parameters.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    configuration = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest.update(configuration.encode())
    digest.update(str(getattr(model.config.vision_config, "_attn_implementation", None)).encode())
    unread = set(map(id, model.get_input_embeddings().parameters()))  # images come as embeddings
    for name, module in model.named_modules():
        adapters = [str(getattr(module, what, None)) for what in ("active_adapters", "disable_adapters", "merged")]
        scaling = getattr(module, "scaling", None)
        hooks = [id(hook) for hook in hooks_of(module)]
        if hooks or adapters != ["None"] * 3 or isinstance(scaling, dict):
            digest.update(str((name, adapters, scaling, hooks)).encode())
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
    """The bits of a tensor summed up as integers in `COLUMNS` columns, at the speed of memory."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.data_ptr() % 8 or flat.storage_offset() % 8 or len(flat) % 8:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).clone()
    words = flat.view(torch.int64)
    whole = len(words) // COLUMNS * COLUMNS
    sums = words[:whole].view(-1, COLUMNS).sum(dim=0)
    return torch.cat([sums, words[whole:]]).cpu().numpy().tobytes()


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
