"""The one record of a conversation, which every reader returns and everything later reads."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .images import ImageReference


class Turn(NamedTuple):
    """What one side says: text and images, in order."""

    role: str
    content: list[str | ImageReference]
    has_loss: bool = True


class Round(NamedTuple):
    """A question, with the images that it shows first, and its answer."""

    images: list[ImageReference]
    question: str
    answer: str


@dataclass(frozen=True)
class Dropped:
    """A record that cannot be used."""

    reason: str  # the same for all records with this fault
    detail: str = field(default="", compare=False)  # the fault of this one, as the predicate of a sentence
    images: tuple[ImageReference, ...] = field(default=(), compare=False)  # those at fault: where they were looked for

    @property
    def predicate(self) -> str:
        """The fault as the predicate of a sentence, without its full stop."""
        return (self.detail or f"cannot be used: {self.reason}").rstrip(".")


NO_ROUND = Dropped("no question with an answer", "has no question with an answer")
NO_QUESTION = Dropped("no question", "has no question")
OUTSIDE = Dropped(
    "image path outside of its folder",
    "names an image outside of its folder; name one that holds all images: `images` of a source, or the image root",
)


@dataclass(frozen=True)
class Conversation:
    """An optional system turn, then user and assistant in turn; and what was repaired in the raw record."""

    turns: list[Turn]
    repairs: tuple[str, ...] = ()

    @classmethod
    def from_rounds(cls, rounds: Sequence[Round], repairs: Sequence[str] = ()) -> "Conversation | Dropped":
        """A conversation whose images come before the words of their question."""
        turns = []
        for images, question, answer in rounds:
            turns += [Turn("user", [*images, *([question] if question else [])]), Turn("assistant", [answer])]
        return cls(turns, tuple(dict.fromkeys(repairs))) if turns else NO_ROUND

    @property
    def images(self) -> list[ImageReference]:
        """All images, in the order in which they are shown."""
        return [block for turn in self.turns for block in turn.content if not isinstance(block, str)]

    @property
    def system(self) -> list[str | ImageReference] | None:
        """The content of the system turn, if there is one."""
        return self.turns[0].content if self.turns[0].role == "system" else None

    def map_images(self, change: Callable[[ImageReference], ImageReference]) -> "Conversation":
        """The same conversation with other references."""
        return self._map(lambda block: block if isinstance(block, str) else change(block))

    def map_texts(self, change: Callable[[str], str]) -> "Conversation":
        """The same conversation with other texts."""
        return self._map(lambda block: change(block) if isinstance(block, str) else block)

    def _map(self, change: Callable[[str | ImageReference], str | ImageReference]) -> "Conversation":
        return replace(self, turns=[turn._replace(content=[*map(change, turn.content)]) for turn in self.turns])

    def under(self, root: str | Path) -> "Conversation":
        """The same conversation with absolute image paths."""
        return self.map_images(lambda image: image.under(root))

    def messages(self) -> list[dict]:
        """The form that processor and template read, see [`validate_conversation`]."""
        unweighted = {False: {"weight": 0}, True: {}}
        return [
            {"role": turn.role, "content": _render(turn.content), **unweighted[turn.has_loss]} for turn in self.turns
        ]


def _render(content: list[str | ImageReference]) -> str | list[dict]:
    if all(isinstance(block, str) for block in content):
        return "\n".join(map(str, content))
    return [{"type": "text", "text": block} if isinstance(block, str) else block.block() for block in content]


def pair_turns(
    turns: Sequence[Turn], repairs: Sequence[str] = (), ends_with_question: bool = False
) -> Conversation | Dropped:
    """
    An optional system turn, and questions with their answers, or without one the last question to be answered; what
    else has no counterpart is left out, and noted.
    """
    notes, paired = list(repairs), [turn for turn in turns[:1] if turn.role == "system" and turn.content]
    question: Turn | None = None
    for turn in turns[1:] if turns and turns[0].role == "system" else turns:
        if turn.role == "system":
            notes.append("a system message in the middle left out")
        elif turn.role == "user":
            if question is not None:
                notes.append("questions in a row joined")
                turn = Turn("user", [*question.content, *turn.content])
            question = turn
        elif question is None or not question.content:
            notes.append("an answer without a question left out")
            question = None
        elif not turn.content:
            notes.append("a round without an answer left out")
            # Its images stay, so that "the second image" is still the second.
            images = [block for block in question.content if not isinstance(block, str)]
            question = Turn("user", [*images]) if images else None
        else:
            paired += [question, turn]
            question = None
    if ends_with_question:
        if question is None or not question.content:
            return NO_QUESTION
        return Conversation([*paired, question], tuple(dict.fromkeys(notes)))
    if question is not None:
        notes.append("a question without an answer left out")
    if len(paired) < 2:
        return NO_ROUND
    return Conversation(paired, tuple(dict.fromkeys(notes)))


def join_messages(conversations: Sequence[list[dict]]) -> list[dict]:
    """Conversations as one, with the first of their equal system messages."""
    messages = [message for conversation in conversations for message in conversation]
    return [message for index, message in enumerate(messages) if index == 0 or message["role"] != "system"]


def messages_of(example: dict) -> list[dict]:
    """The messages of an example, which may be JSON text."""
    messages = example["messages"]
    return json.loads(messages) if isinstance(messages, str) else messages
