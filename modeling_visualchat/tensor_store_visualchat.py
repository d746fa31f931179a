"""
A bounded store of named tensors with least-recently-used eviction, in memory and in a folder that processes share.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .weights_key_visualchat import DIGEST_SIZE, column_sums


Entry = dict[str, torch.Tensor]

ENTRY_NAME = re.compile(r"[0-9a-f]{40}-[0-9a-f]{40}\.(safetensors|[0-9]+-[0-9]+\.part)")
ABANDONED_AFTER = 3600  # seconds
SAVES_BETWEEN_LOOKS = 100  # at a folder that others may write to


class TensorStore:
    """
    Entries of named tensors under keys of two digests.

    Args:
        max_bytes (`int`): Maximum bytes in memory.
        device (`str` or `torch.device`, *optional*): Device of the entries; by default their own.
        folder (`str` or `Path`, *optional*): Also stores entries on disk, as safetensors; processes may share it.
        max_disk_bytes (`int`): Maximum bytes of the folder.

    Attributes:
        hits, misses (`int`): Images found, and images computed.
        nbytes (`int`): Bytes in memory.

    Raises:
        `ValueError`: a limit below 0, or a folder that is a file.
    """

    def __init__(
        self,
        max_bytes: int = 4 * 2**30,
        device: str | torch.device | None = None,
        folder: str | Path | None = None,
        max_disk_bytes: int = 64 * 2**30,
    ):
        if max_bytes < 0 or max_disk_bytes < 0:
            raise ValueError(
                f"The limits of {type(self).__name__} are numbers of bytes, got {max_bytes}, {max_disk_bytes}."
            )
        self.max_bytes, self.device, self.max_disk_bytes = max_bytes, device, max_disk_bytes
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.is_file():
            raise ValueError(f"{self.folder} is a file; name a folder for {type(self).__name__}.")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        # Bytes of the folder as far as known, and the number of writes since it was last listed.
        self._disk_bytes, self._unseen = 0, SAVES_BETWEEN_LOOKS

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} images, {self.nbytes / 2**20:.1f} of "
            f"{self.max_bytes / 2**20:.1f} MiB, {self.hits} hits, {self.misses} misses)"
        )

    def __deepcopy__(self, memo) -> "TensorStore":
        return self  # a copy of a model shares the entries

    def __getstate__(self) -> dict:
        return {**vars(self), "_lock": None, "_entries": OrderedDict(), "nbytes": 0}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def clear(self) -> None:
        """Removes all entries from memory; the folder stays."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def get_entries(self, keys: list[str], device: torch.device, compute: Callable[[list[int]], list[Entry]]) -> list:
        """The entries of keys, from memory, from the folder, or for the indices of the missing ones, computed."""
        entries = {key: entry for key in keys if (entry := self._get(key, device)) is not None}
        missing = [index for index, key in enumerate(keys) if key not in entries and keys.index(key) == index]
        self.hits += len(entries)
        self.misses += len(missing)
        for index, entry in zip(missing, compute(missing) if missing else ()):
            entries[keys[index]] = entry
            self._put(keys[index], entry)
        return [{name: tensor.to(device) for name, tensor in entries[key].items()} for key in keys]

    def _get(self, key: str, device: torch.device) -> Entry | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = self._load(key) if self.folder is not None else None
        if entry is not None:
            entry = {name: tensor.to(device) for name, tensor in entry.items()}
            self._keep(key, entry)
        return entry

    def _put(self, key: str, entry: Entry) -> None:
        self._keep(key, entry)
        if self.folder is not None:
            self._save(key, entry)

    def _keep(self, key: str, entry: Entry) -> None:
        size = size_of(entry)
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
                self.nbytes -= size_of(oldest)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _load(self, key: str, retries: int = 1) -> Entry | None:
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                # Copies, since the file may be overwritten.
                entry = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            if metadata.get("entry") != f"{key} {_checksum(entry)}":
                raise ValueError("it does not hold what was written under its name")
        except (SafetensorError, ValueError, OSError, RuntimeError) as error:
            if not path.exists():
                return None
            if retries:  # another process has replaced it in between
                return self._load(key, retries - 1)
            warnings.warn(f"The file {path} cannot be used and is computed again: {error}", stacklevel=2)
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return entry

    def _save(self, key: str, entry: Entry) -> None:
        """Writes a file atomically: whole or not at all, whoever else reads or writes the folder."""
        assert self.folder is not None
        entry = {name: tensor.cpu() for name, tensor in entry.items()}
        part = self.folder / f"{key}.{os.getpid()}-{threading.get_ident()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(entry, part, metadata={"entry": f"{key} {_checksum(entry)}"})
            os.replace(part, self._path(key))
            self._disk_bytes += size_of(entry)
            self._unseen += 1
            if self._disk_bytes > self.max_disk_bytes or self._unseen >= SAVES_BETWEEN_LOOKS:
                self._shrink_folder()
        except (OSError, SafetensorError) as error:  # a full disk costs the entry, not the answer
            warnings.warn(f"{type(self).__name__} cannot write to {self.folder}: {error}", stacklevel=2)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _shrink_folder(self) -> None:
        """Removes the least recently used entries, and half-written files of processes that were killed."""
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
        self._disk_bytes, self._unseen = sum(size for _, size, _ in files), 0
        # Listing a folder of many files takes time: once it is full, more is removed than necessary.
        goal = self.max_disk_bytes - (self.max_disk_bytes // 20 if len(files) > SAVES_BETWEEN_LOOKS else 0)
        for _, size, path in sorted(files) if self._disk_bytes > self.max_disk_bytes else ():
            if self._disk_bytes <= goal:
                return
            path.unlink(missing_ok=True)
            self._disk_bytes -= size


def _checksum(entry: Entry) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name in sorted(entry):
        digest.update(str((name, entry[name].dtype, tuple(entry[name].shape))).encode())
        digest.update(column_sums(entry[name]))
    return digest.hexdigest()


def size_of(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
