"""
Finds the answers in a rendered conversation, whatever its chat template, for the loss.

A template may mark them with `{% generation %}`. Those published with LLaVA leave the end token out of the marks, or
write none at all, so that a model trained on the marks would forget to end an answer. What they mark is not used.
"""

import re
from collections.abc import Callable, Sequence

from .conversation_visualchat import has_loss


# Renders conversations that are split already: each carries its pieces in its first message.
PIECES_TEMPLATE = """\
{%- for text, is_learned in messages[0]["pieces"] -%}
    {%- if is_learned -%}{%- generation -%}{{- text -}}{%- endgeneration -%}{%- else -%}{{- text -}}{%- endif -%}
{%- endfor -%}
"""
MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def split_answers(
    messages: list[dict], chat_template: str, render: Callable[..., tuple], end_tokens: Sequence[str]
) -> list[tuple[str, bool]]:
    """
    Splits the text of a conversation into pieces with and without a loss.

    An answer is what follows the generation prompt, up to and including the first special token after its words. A
    template that writes no such token there (LLaVA-1.5) gets the end-of-sequence token added.

    Args:
        messages (`list[dict]`): A valid conversation.
        chat_template (`str`): Its template.
        render (`Callable`): Renders messages to their text and, with `return_assistant_tokens_mask=True`, the spans
            that the template marks; takes `add_generation_prompt` too.
        end_tokens (`Sequence[str]`): The special tokens of the tokenizer, the end-of-sequence token first.

    Returns:
        `list[tuple[str, bool]]`: The text of each piece, and whether the loss is on it.

    Raises:
        `ValueError`: a template that renders a conversation otherwise than its parts, or leaves words out.

    Example: `USER: <image>\\nWhat? ASSISTANT: A cat. ` is split into

        "USER: <image>\\nWhat? ASSISTANT:"   no loss
        " A cat.</s>"                       loss
        " "                                 no loss
    """
    if MARK.search(chat_template):
        text, spans = render(messages, return_assistant_tokens_mask=True)
        is_ended = all(text[start:end].endswith(tuple(end_tokens)) for start, end in spans)
        if is_ended and len(spans) == sum(map(has_loss, messages)):
            return _cut(text, spans)
    pieces: list[tuple[str, bool]] = []
    whole, done = render(messages)[0], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:index], add_generation_prompt=True)[0]
            answered = render(messages[: index + 1])[0]
            content = message["content"]
            words = (content if isinstance(content, str) else content[-1]["text"]).strip()
            if not (whole.startswith(answered) and answered.startswith(prompt) and words in answered[len(prompt) :]):
                raise ValueError(
                    f"The answer of message {index} is not found in {answered!r:.80}…, as the chat template renders: "
                    "it has to follow the generation prompt, in a text that later messages continue. Mark answers "
                    "with {% generation %} in the template, their end-of-sequence token included, or use the template "
                    "of VisualChat (convert_llava.py --chat_template visualchat)."
                )
            answer, rest = _end(answered[len(prompt) :], words, end_tokens)
            pieces += [(whole[done : len(prompt)], False), (answer, has_loss(message)), (rest, False)]
            done = len(answered)
    return [piece for piece in [*pieces, (whole[done:], False)] if piece[0]]


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """A text as pieces, with a loss on the spans."""
    pieces, done = [], 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [piece for piece in [*pieces, (text[done:], False)] if piece[0]]


def _end(answer: str, words: str, end_tokens: Sequence[str]) -> tuple[str, str]:
    """A rendered answer up to its end token, which is added where the template writes none, and the rest."""
    end = answer.rindex(words) + len(words)
    found = [place + len(token) for token in end_tokens if (place := answer.find(token, end)) >= 0]
    return (answer[: min(found)], answer[min(found) :]) if found else (answer[:end] + end_tokens[0], answer[end:])
