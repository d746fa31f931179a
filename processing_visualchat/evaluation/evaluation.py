"""An evaluation from its start to its results: a checkpoint, a suite, and a folder that a second start continues."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoProcessor

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.weights_key_visualchat import weights_key

from ..data.files import digest_of
from .answer_file import LONGEST_WAIT, answer_all, check_settings
from .answering import Answerer, AnswerOptions, Item
from .custom import JSONL
from .edits import EDITS_SUITE, answer_with_edits
from .judge import Judge
from .metrics import find_metrics
from .names import find_name
from .pictures import THUMBNAILS, describe_block
from .records import RESERVED_GROUPS, Example, Round, Suite, SuiteError
from .results import RESULTS, choose_metrics, score_answers
from .robustness import ROBUSTNESS, perturb
from .suites import SUITES as PUBLISHED


SUITES: dict[str, Suite] = {**PUBLISHED, JSONL.name: JSONL, EDITS_SUITE.name: EDITS_SUITE}
FREE = ("checkpoint", "data")  # names of settings that may change: what they name is compared by its content


def evaluate(
    model: str | Path | Any,
    suite: str | Suite,
    data: str | Path | None = None,
    output: str | Path = "visualchat-evaluation",
    *,
    processor: Any = None,
    metrics: Sequence[str] | None = None,
    robustness: Sequence[str] = (),
    history: str = "own",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    judge: Judge | None = None,
    page_size: int = 200,
) -> dict[str, Any]:
    """
    Evaluates a model on a suite. Each answered conversation is appended to `answers.jsonl` at once; a second call with
    the same model, suite, data and options continues. Run by several processes (`torchrun`, `accelerate launch`),
    each answers a part of the batches.

    Args:
        model (`str`, `Path` or `VisualChatForConditionalGeneration`): A checkpoint, a folder or a name on the Hub; or
            a model in evaluation mode.
        suite (`str` or [`Suite`]): A name in `SUITES`, or a suite of one's own.
        data (`str` or `Path`, *optional*): The file or folder of the suite, or its name on the Hub; by default the
            name that the suite is published under.
        output (`str` or `Path`): The folder for `answers.jsonl`, `metrics.json`, `results.md` and `index.html`.
        processor (`VisualChatProcessor`, *optional*): By default that of the checkpoint.
        metrics (`Sequence[str]`, *optional*): Names in `METRICS`, the deciding one first; by default the suite's.
        robustness (`Sequence[str]`, *optional*): Names in `ROBUSTNESS`, each scored beside the plain suite.
        history, max_new_tokens, temperature, top_p, seed: See [`AnswerOptions`]; `max_new_tokens` is by default the
            suite's.
        limit (`int`, *optional*): Only the first so many conversations.
        batch_size (`int`, *optional*, defaults to 8): Maximum rows of a batch.
        judge ([`Judge`], *optional*): The judge model of the metric `judge`.
        page_size (`int`, *optional*, defaults to 200): Maximum conversations on the page.

    Returns:
        `dict`: See [`score_answers`].

    Raises:
        `SuiteError`: a file of the suite that is missing or in another format, or an image that cannot be used.
        `ChangedSettingsError`: the output folder holds answers of another model, suite, data or options.
        `ValueError`: an unknown name, an option out of range, or a checkpoint that lacks weights.
    """
    if not isinstance(suite, Suite):
        suite = SUITES[find_name(suite, SUITES, "suite")]
    find_metrics([*(metrics or ()), *suite.metrics])
    names = [find_name(name, ROBUSTNESS, "robustness test") for name in dict.fromkeys(robustness)]
    chosen, _ = choose_metrics(metrics, suite.metrics, judge)
    options = AnswerOptions(
        history,
        suite.max_new_tokens if max_new_tokens is None else max_new_tokens,
        temperature,
        top_p,
        seed,
        scores_options=any(metric.needs == "options" for metric in chosen),
    )
    # On a CPU, accelerate has to be told, or every process is by itself.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    folder = Path(output)
    with state.main_process_first():  # a download is shared
        examples = load_examples(suite, data, limit)
    items = plan(examples, names, page_size)
    if any(each.edit for example in examples for each in example.rounds) and (names or temperature):
        raise ValueError("Conversations with edits are answered greedily, and take no robustness tests.")
    name, model, processor = load_model(model, processor, state.device)
    settings = {
        **{"checkpoint": name, "weights": weights_key(model), "suite": suite.name, "data": str(data or suite.source)},
        **{"examples": digest_examples(examples), "num_conversations": len(examples), "limit": limit},
        **{"robustness": names, "suite_metrics": [*suite.metrics], "mean_over": suite.mean_over},
        **{"processor": digest_processor(processor), "batch_size": batch_size, **asdict(options)},
    }
    order = {item.id: number for number, item in enumerate(items)}
    if state.is_main_process:
        check_settings(folder, settings, FREE)
    answerer = Answerer(model, processor, options, batch_size, folder / THUMBNAILS)
    answer_all(folder, answerer.make_batches(items), partial(answer_batch, answerer), order, state)
    if state.is_main_process:
        score_answers(folder, metrics, judge, page_size)
    state.wait_for_everyone()
    return json.loads((folder / RESULTS).read_text())


def load_examples(suite: Suite, data: str | Path | None, limit: int | None) -> list[Example]:
    """The examples of a suite; a [`SuiteError`] if it does not say where they are, or two have the same key."""
    source = data or suite.source
    if source is None:
        raise SuiteError(f"The suite {suite.name} is read from local files; name them with --data.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; use a number from 1 up.")
    examples = list(itertools.islice(suite.load(source), limit))
    if not examples:
        raise SuiteError(f"The suite {suite.name} has no conversation in {source}.")
    keys: set[str] = set()
    for example in examples:
        if reserved := [name for name in RESERVED_GROUPS if name in example.groups]:
            raise SuiteError(
                f"The suite {suite.name}, {example.key} has a group {reserved[0]!r}, by which results are broken down "
                "in any case; expected another name."
            )
        if example.key in keys:
            raise SuiteError(f"Two conversations of the suite {suite.name} have the key {example.key}.")
        keys.add(example.key)
    return examples


def plan(examples: Sequence[Example], robustness: Sequence[str], page_size: int) -> list[Item]:
    """All conversations to hold, in the order in which they are written down."""
    items = [Item(example, is_shown=number < page_size) for number, example in enumerate(examples)]
    return items + [Item(example, name) for name in robustness for example in perturb(name, examples)]


def load_model(
    model: Any, processor: Any, device: Any, dtype: Any = "auto", trust_remote_code: bool = False
) -> tuple[str, Any, Any]:
    """
    The name of a model, the model on a device, and its processor; a `ValueError` if a checkpoint lacks weights. A
    checkpoint is loaded in a dtype, by default its own; code beside it runs only for a tokenizer or image
    processor of its own.
    """
    name = str(model) if isinstance(model, (str, Path)) else str(model.config._name_or_path or "a model in memory")
    if isinstance(model, (str, Path)):
        model = load_complete(name, dtype=dtype, trust_remote_code=trust_remote_code)
        model.to(device)
        model.freeze()
    elif processor is None:
        raise ValueError("A model in memory needs its processor; pass it as processor.")
    return name, model.eval(), processor or AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_complete(name: str, **options) -> Any:
    """A checkpoint by `from_pretrained` with these options; a `ValueError` if it lacks weights."""
    model, info = VisualChatForConditionalGeneration.from_pretrained(name, output_loading_info=True, **options)
    if lacking := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ValueError(
            f"{name} lacks {len(lacking):,} weights, or has them in other shapes: {', '.join(lacking[:3])}"
            f"{', …' if len(lacking) > 3 else ''}. They would be random; name a complete checkpoint."
        )
    return model


def digest_examples(examples: Sequence[Example]) -> str:
    """The digest of all that is asked; images in files are told by their names and sizes."""

    def describe(asked: Round) -> list:
        edit = {key: describe_block(value) if key == "image" else value for key, value in (asked.edit or {}).items()}
        return [[*map(describe_block, asked.content)], asked.references, asked.choices, edit]

    described = [
        (example.key, example.system, sorted(example.groups.items()), [*map(describe, example.rounds)])
        for example in examples
    ]
    return digest_of(json.dumps(described).encode())


def digest_processor(processor: Any) -> str:
    """The digest of what makes inputs of a conversation: chat template, tokenizer and image processing."""
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    parts = [processor.chat_template, tokenizer.backend_tokenizer.to_str(), tokenizer.model_max_length]
    return digest_of(json.dumps([*parts, processor.image_seq_length, image_processor.to_dict()], default=str).encode())


def answer_batch(answerer: Answerer, batch: Sequence[Item]) -> Iterable[dict]:
    """The lines of `answers.jsonl` for conversations that are answered together."""
    if any(each.edit for item in batch for each in item.example.rounds):
        return (answer_with_edits(answerer, item) for item in batch)
    return answerer.answer(batch)
