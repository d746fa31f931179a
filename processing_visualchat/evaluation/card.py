"""From the results of an evaluation to the model card of its checkpoint: metadata, results and measured risks."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.model_card_visualchat import CARD, VisualChatCard, make_card

from ..data.tables import counted, format_markdown
from .answer_file import SETTINGS
from .results import RESULTS, tables
from .robustness import ROBUSTNESS
from .suites import SUITES as PUBLISHED


TASK = "image-text-to-text"
ROBUSTNESS_TABLE = "Robustness"  # its title among the tables of a result
HISTORY = {"own": "the model's own earlier answers", "references": "the references of earlier rounds"}


def find_checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint, whose card can be changed; a `ValueError` for a name on the Hub."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"The model card of {checkpoint} cannot be updated, since it is not a folder. Download it with "
            f"`hf download {checkpoint} --local-dir FOLDER`, and evaluate the folder."
        )
    return folder


def update_card(output: str | Path, checkpoint: str | Path | None = None) -> Path:
    """
    Adds the results of an evaluation to the model card of its checkpoint, in place of earlier ones of the same data.

    Args:
        output (`str` or `Path`): The output folder of [`evaluate`].
        checkpoint (`str` or `Path`, *optional*): The folder of the checkpoint, if it is not where it was.

    Returns:
        `Path`: its `README.md`, which is made if there is none.
    """
    results, settings = (json.loads((Path(output) / name).read_text()) for name in (RESULTS, SETTINGS))
    folder = find_checkpoint_folder(checkpoint or settings["checkpoint"])
    file = folder / CARD
    card = VisualChatCard.load(file) if file.is_file() else make_card(_build_without_memory(folder), folder.name)
    title, dataset = name_data(settings)
    card.write("results", title, format_block(title, results, settings, is_robustness=False))
    has_changes = bool(results["robustness"])
    card.write("risks", title, format_block(title, results, settings, is_robustness=True) if has_changes else "")
    kept = [each for each in card.data.eval_results or [] if each.dataset_type != dataset]
    card.data.model_name = card.data.model_name or folder.name
    card.data.eval_results = [*kept, *list_results(title, dataset, results, settings)] or None
    card.save(file)
    return file


def name_data(settings: dict[str, Any]) -> tuple[str, str]:
    """What was evaluated on: as a title, and as the data set of the metadata, a name on the Hub if there is one."""
    suite, data = settings["suite"], settings["data"]
    if suite in PUBLISHED:
        return suite, PUBLISHED[suite].source or suite
    return f"{suite}, {Path(data).name}", Path(data).name


def list_results(title: str, dataset: str, results: dict[str, Any], settings: dict[str, Any]) -> list[EvalResult]:
    """
    The means of a result for the metadata, over parts where the published score is; those of changed conversations as
    configurations of the data set.
    """
    variants = {None: results["scores"], **{name: each["scores"] for name, each in results["robustness"].items()}}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=title,
            dataset_config=variant,
            dataset_args=None if settings["limit"] is None else {"limit": settings["limit"]},
            metric_type=metric,
            metric_value=round((score.get("mean_over") or score["all"])["mean"], 4),
        )
        for variant, scores in variants.items()
        for metric, score in scores.items()
        if score["all"] is not None
    ]


def format_block(title: str, results: dict[str, Any], settings: dict[str, Any], is_robustness: bool) -> str:
    """The tables of a result, those of robustness or the others, with what they were measured by."""
    found = tables(results)
    if is_robustness:
        lines = [f"- `{name}`: {ROBUSTNESS[name].meaning}." for name in results["robustness"]]
        return f"### {title}, changed\n\n{format_markdown(found[ROBUSTNESS_TABLE])}\n\n" + "\n".join(lines)
    first = "" if settings["limit"] is None else "the first "
    sizes = f"{counted(results['num_conversations'], 'conversation')}, {counted(results['num_rounds'], 'round')}"
    way = "greedy" if settings["temperature"] == 0 else f"sampled at temperature {settings['temperature']}"
    parts = [
        f"### {title}",
        f"On {first}{sizes}. Answers are {way}, of at most {settings['max_new_tokens']:,} tokens; each round sees "
        f"{HISTORY[settings['history']]}. Intervals are 95% bootstrap intervals over conversations.",
    ]
    parts += [f"{name}:\n\n{format_markdown(rows)}" for name, rows in found.items() if name != ROBUSTNESS_TABLE]
    return "\n\n".join([*parts, *(["\n".join(f"- {note}" for note in results["notes"])] if results["notes"] else [])])


def _build_without_memory(folder: Path) -> VisualChatForConditionalGeneration:
    with torch.device("meta"):
        return VisualChatForConditionalGeneration(VisualChatConfig.from_pretrained(folder))
