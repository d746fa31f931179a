"""The suite of one's own conversations: a file that can be trained on, whose answers are the references."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.conversation import Turn
from ..data.readers import read_conversations
from .records import Example, Round, Suite, SuiteError


def load_conversation_file(source: str | Path) -> Iterator[Example]:
    """
    The conversations of a file in any schema and format of `data/readers.py`, keyed by their place in it. Each
    answer is the reference of its question.

    Raises:
        `SuiteError`: no such file, a record with a fault (or one that would need a repair), or no conversation.
    """
    file = Path(os.path.abspath(source))
    if not file.is_file():
        raise SuiteError(f"There is no file {file}; name a file of conversations with --data.")
    is_empty = True
    try:
        for record in read_conversations(file, name=file.name, is_strict=True):
            is_empty = False
            outcome: Any = record.outcome
            system = None if outcome.system is None else "\n".join(map(str, outcome.system))
            turns = outcome.turns[outcome.system is not None :]
            rounds = tuple(map(_read_round, turns[::2], turns[1::2]))
            yield Example(record.where.removeprefix(f"{file.name}, "), rounds, system)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, SuiteError) else SuiteError(str(error)) from error
    if is_empty:
        raise SuiteError(f"{file} holds no conversation; write one on every line.")


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
    metrics=("exact_match", "contains", "anls"),
)
