"""The text of an answer, as its tokens come."""

from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """
    The text of an answer whose tokens come one by one: without special tokens and surrounding spaces, as a whole
    equal to the decoded tokens.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer.
        stop (`Sequence[str]`): Strings before which the answer ends.

    Attributes:
        is_stopped (`bool`): Whether one of them has come.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.is_stopped = tokenizer, stop, False
        self.tokens: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        self._given, self._held = 0, ""

    def put(self, token: int) -> str:
        """The text that is certain with one more token, often empty."""
        self.tokens.append(token)
        new = self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
        self._held = self._cut(self._held + new if self._given else (self._held + new).lstrip())
        return self._give(len(self._held) if self.is_stopped else self._num_certain())

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.is_stopped:
            return ""
        text = self._cut(self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip())
        self._held = text[self._given :]
        return self._give(len(self._held))

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._given += length
        return text

    def _cut(self, text: str) -> str:
        """The text before a string of `stop`."""
        found = [place for each in self.stop if (place := text.find(each)) >= 0]
        self.is_stopped = bool(found)
        return text[: min(found)].rstrip() if found else text

    def _num_certain(self) -> int:
        """Characters before trailing spaces and before what may begin a string of `stop`."""
        starts = (each[:length] for each in self.stop for length in range(1, len(each)))
        held = max((len(start) for start in starts if self._held.endswith(start)), default=0)
        return len(self._held[: len(self._held) - held].rstrip())
