"""Uploads a model, its processor, its code and its card to the Hub as one commit."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from .attention_types_visualchat import get_attention_type


CARD_PATH = Path(__file__).with_name("hub_card.md")


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
    card_path = Path(card) if card is not None else CARD_PATH
    if card is not None and not card_path.is_file():
        raise FileNotFoundError(f"No model card at {card_path}; pass the path of a Markdown file.")
    api = HfApi(token=token if isinstance(token, str) else None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        # Remote code comes without the card; the card of the repository then stays.
        if card_path.is_file():
            model_card = ModelCard.load(card_path)
            model_card.text = model_card.text.replace("{repo_id}", repo_id)
            model_card.text = model_card.text.replace("{attention}", get_attention_type(model.config).description)
            model_card.data.tags = sorted({*(model_card.data.tags or []), *(tags or [])})
            model_card.save(Path(folder) / "README.md")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not commit_kwargs.get("create_pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision, **commit_kwargs
        )
    return commit.commit_url
