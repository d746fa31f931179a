"""Reads conversations from JSON lines: one conversation a line, its image paths relative to the file."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from .conversation_visualchat import validate_conversation
from .image_loading_visualchat import load_image


def load_conversations(path: str | Path, image_token: str = "<image>", check_images: bool = True) -> Dataset:
    r"""
    Reads and checks a file of conversations; every fault is found before training starts.

    Args:
        path (`str` or `Path`): JSON lines, each `{"messages": [{"role": …, "content": …}, …]}`, or the bare list.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder, which no text may hold.
        check_images (`bool`, *optional*, defaults to `True`): Opens every image once; if not, it has to be there.

    Returns:
        `datasets.Dataset` with a column `messages`, each a JSON text (messages have no common schema); image paths
        are absolute.

    Raises:
        `FileNotFoundError`: the file, or an image that it names, is not there.
        `ValueError`: a line or an image that cannot be read, with file and line number; or no conversation at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No data file at {path}.")
    conversations, checked = [], set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(tqdm(lines, desc=f"Checking {path.name}", unit="line"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
            messages: Any = record.get("messages") if isinstance(record, dict) else record
            validate_conversation(messages, image_token, where)
            image_paths = _resolve_image_paths(messages, path.parent, where)
            for image_path in image_paths if check_images else ():
                if image_path not in checked:
                    _check_image(image_path, where)
                    checked.add(image_path)
            conversations.append(json.dumps(messages))
    if not conversations:
        raise ValueError(f"{path} holds no conversation; write one on every line.")
    return Dataset.from_dict({"messages": conversations})


def _resolve_image_paths(messages: list[dict], folder: Path, where: str) -> list[str]:
    image_paths = []
    for message in messages:
        for block in message["content"] if not isinstance(message["content"], str) else ():
            if block["type"] != "image":
                continue
            if not {"path", "url", "base64"} & block.keys():
                raise ValueError(f"{where} has an image without a path, url or base64.")
            if "path" in block:
                image_path = (folder / block["path"]).resolve()
                if not image_path.is_file():
                    raise FileNotFoundError(
                        f"{where} names the image {block['path']}; there is no file at {image_path}."
                    )
                block["path"] = str(image_path)
                image_paths.append(block["path"])
    return image_paths


def _check_image(image_path: str, where: str) -> None:
    try:
        load_image(image_path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
