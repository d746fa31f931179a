"""Uploads a model, its processor, its code and its card to the Hub as one commit."""

import filecmp
import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.utils import CONFIG_NAME, logging

from .model_card_visualchat import CARD, TEMPLATE, VisualChatCard, fill_placeholders, make_card


logger = logging.get_logger(__name__)


def push_repository(
    model,
    processor,
    repo_id: str,
    card: str | None = None,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tags: list[str] | None = None,
    max_shard_size: int | str = "50GB",
    commit_message: str = "Upload VisualChat model and processor",
    **commit_kwargs,
) -> str:
    """
    See [`VisualChatPreTrainedModel.push_to_hub`]. Everything is saved to a folder first, so that a repository is never
    incomplete; a `FileNotFoundError` names a model card that does not exist.
    """
    if card is not None and not Path(card).is_file():
        raise FileNotFoundError(f"No model card at {card}; pass the path of a Markdown file.")
    api = HfApi(token=token if isinstance(token, str) else None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not commit_kwargs.get("create_pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        model_card = VisualChatCard.load(Path(card)) if card is not None else find_card(model, Path(folder))
        # Remote code comes without the template.
        if model_card is None and TEMPLATE.is_file() and not api.file_exists(repo_id, CARD, revision=revision):
            model_card = make_card(model, repo_id)
        if model_card is not None:
            fill_placeholders(model_card, model, repo_id).rename(repo_id)
            model_card.data.tags = sorted({*(model_card.data.tags or []), *(tags or [])}) or None
            model_card.save(Path(folder) / CARD)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, **commit_kwargs
        )
    return commit.commit_url


def find_card(model, saved: Path) -> VisualChatCard | None:
    """
    The card beside the checkpoint that a model was loaded from, if it is a folder with the configuration and weights
    that are `saved`: a card says nothing of a model that was changed since.
    """
    source = Path(model.config._name_or_path or "")
    if not model.config._name_or_path or not (source / CARD).is_file():
        return None
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (source, saved)]
    has_weights = names[0] == names[1] and not any(filecmp.cmpfiles(source, saved, names[0], shallow=False)[1:])
    if has_weights and _read_config(source) == _read_config(saved):
        return VisualChatCard.load(source / CARD)
    logger.warning(
        f"{source / CARD} is not uploaded: it is the model card of other weights or another configuration than those "
        "that are pushed. Pass its path as card if it still applies."
    )
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration, but for what no output depends on: the version that wrote it, and what training leaves."""
    config = json.loads((folder / CONFIG_NAME).read_text())
    return {key: value for key, value in config.items() if key not in ("transformers_version", "use_cache")}
