"""The suite of one's own conversations: a file that can be trained on, whose answers are the references."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.conversation import Turn
from ..data.ingestion import IngestedRecord
from ..data.readers import read_conversations
from .records import Example, Round, Suite, SuiteError, check_groups
from .text_matching import reference_choice


EXTRA = ("choices", "references", "groups")


def load_conversation_file(source: str | Path) -> Iterator[Example]:
    """
    The conversations of a file in any schema and format of `data/readers.py`, keyed by their place in it. Each
    answer is the reference of its question. A record may have `choices`, the options of its last question, whose
    answer is then a letter or the text of an option; `references`, other right answers to it; and `groups`, as
    `{"task": "counting"}`, to break results down by.

    Raises:
        `SuiteError`: no such file, a record with a fault (or one that would need a repair), or no conversation.
    """
    file = Path(os.path.abspath(source))
    if not file.is_file():
        raise SuiteError(f"There is no file {file}; name a file of conversations with --data.")
    is_empty = True
    try:
        for record in read_conversations(file, name=file.name, is_strict=True, extra=EXTRA):
            is_empty = False
            outcome: Any = record.outcome
            system = None if outcome.system is None else "\n".join(map(str, outcome.system))
            turns = outcome.turns[outcome.system is not None :]
            rounds = [*map(_read_round, turns[::2], turns[1::2])]
            rounds[-1] = _add_fields(rounds[-1], record)
            groups = check_groups(record.extra.get("groups"), record.where)
            yield Example(record.where.removeprefix(f"{file.name}, "), tuple(rounds), system, groups)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, SuiteError) else SuiteError(str(error)) from error
    if is_empty:
        raise SuiteError(f"{file} holds no conversation; write one on every line.")


def _add_fields(asked: Round, record: IngestedRecord) -> Round:
    """The last round with the options and the other references of its record, whose fields are checked."""
    choices, references = record.extra.get("choices"), record.extra.get("references")
    for name, value in (("choices", choices), ("references", references)):
        if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise SuiteError(f"{record.where} has {name} {value!r:.80}; expected a list of texts.")
    asked = replace(asked, references=(*asked.references, *(references or ())), choices=tuple(choices or ()))
    for reference in asked.references if choices else ():
        if reference_choice(reference, asked.choices) is None:
            raise SuiteError(
                f"{record.where} has the answer {reference!r:.60}; expected a letter or text of its choices."
            )
    return asked


def _read_round(question: Turn, answer: Turn) -> Round:
    content = [
        {"type": "text", "text": block} if isinstance(block, str) else block.block() for block in question.content
    ]
    return Round(tuple(content), ("\n".join(map(str, answer.content)),))


JSONL = Suite(
    name="jsonl",
    description="Conversations of one's own, in a file of any schema that can be trained on",
    reference="processing_visualchat/data/schemas.py",
    load=load_conversation_file,
    metrics=("exact_match", "contains", "anls", "choice"),
)
