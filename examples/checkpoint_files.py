"""Weights in files, one tensor at a time: read where they lie, and written as safetensors while they are made."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file


DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors
PART_PREFIXES = ("", "vision_model.", "model.")  # before the weights in a checkpoint of a part


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """
    The tensors of a file of `torch.save`, mapped into memory and not read.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file cannot be read, or holds something other than tensors by name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; name a pytorch_model.bin or the folder that holds it.")
    try:
        state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and could run code while it is loaded, so it is refused. Save the state "
            f"dict of the model only. torch says: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is incomplete, or not in the zip format of torch.save, the default since torch 1.6; download it "
            f"again, or load and save it with a newer torch. torch says: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        found = f"the keys {list(state_dict)[:5]}" if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"{path} holds {found}, wanted is a dictionary of tensors: save the state dict of the model.")
    return state_dict


def open_weights(path: Path) -> dict[str, Callable[[], Tensor]]:
    """How each weight of a safetensors or `torch.save` file is read; raises what [`read_state_dict`] does."""
    if path.suffix != ".safetensors":
        return {key: (lambda tensor=tensor: tensor) for key, tensor in read_state_dict(path).items()}
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is incomplete or damaged; download it again. safetensors says: {error}") from None
    return {key: (lambda key=key: file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118, it is no mapping


class PartWeights:
    """The weights of a pretrained part, a name on the Hub or a folder; no file is opened before it is needed."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def _weights(self) -> dict[str, Callable[[], Tensor]]:
        """How each weight is read; empty if the part has none."""
        for single in ("model.safetensors", "pytorch_model.bin"):
            if index := self._find(f"{single}.index.json"):
                names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
                readers = [open_weights(Path(cached_file(self.name, name))) for name in names]
                return {key: reader for shard in readers for key, reader in shard.items()}
            if path := self._find(single):
                return open_weights(Path(path))
        return {}

    def _find(self, file_name: str) -> str | None:
        return cached_file(self.name, file_name, _raise_exceptions_for_missing_entries=False)

    def get(self, name: str) -> Tensor | None:
        """A weight by its name in the model of the part, mapped into memory; `None` if the part has none."""
        found = (prefix + name for prefix in PART_PREFIXES if prefix + name in self._weights)
        key = next(found, None)
        return None if key is None else self._weights[key]()


@dataclass(frozen=True)
class PlannedWeight:
    """A weight that is made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # of any dtype

    def num_bytes(self, dtype: torch.dtype) -> int:
        return torch.Size(self.shape).numel() * dtype.itemsize


def write_weights(folder: Path, weights: list[PlannedWeight], dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Writes weights in a dtype to safetensors files of at most so many bytes, which `from_pretrained` reads."""
    shards: list[list[PlannedWeight]] = [[]]
    for weight in weights:
        if shards[-1] and sum(other.num_bytes(dtype) for other in [*shards[-1], weight]) > max_shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(folder / name, shard, dtype)
        weight_map |= dict.fromkeys((weight.name for weight in shard), name)
    if len(shards) > 1:
        total_size = sum(weight.num_bytes(dtype) for weight in weights)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, weights: list[PlannedWeight], dtype: torch.dtype) -> None:
    """A safetensors file: the length of the header in 8 bytes, the header in JSON, then the tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for weight in weights:
        start, end = end, end + weight.num_bytes(dtype)
        header[weight.name] = {"dtype": DTYPE_NAMES[dtype], "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            file.write(weight.make().to(dtype).contiguous().flatten().view(torch.uint8).numpy())
