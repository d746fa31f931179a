"""Chats as a picture."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot


WIDTH, LINE, PICTURE = 44, 0.18, 3.5  # characters, inches of a line, and lines of an image
# `(question, images, expected)` of rounds, with `None` where no answer is right or wrong; and the answers.
Chat = tuple[Sequence[tuple[str, list, str | None]], Sequence[str]]


def draw_chats(chats: Sequence[Chat], path: Path) -> None:
    """
    Draws chats in up to four columns: images where they are shown, questions, and answers, green if they are those
    expected, red if not.
    """
    num_columns = min(len(chats), 4)
    figure, axes = pyplot.subplots(-(-len(chats) // num_columns), num_columns, squeeze=False)
    drawn = [draw_chat(axis, *chat) for axis, chat in zip(axes.flat, chats)]
    heights = [max(drawn[start : start + num_columns]) for start in range(0, len(drawn), num_columns)]
    for row, height in zip(axes, heights):
        for axis in row:
            axis.set_axis_off()
            axis.set(xlim=(0, 1), ylim=(-height, 0))
    axes[0, 0].get_gridspec().set_height_ratios(heights)
    figure.set_size_inches(3.6 * num_columns, LINE * sum(heights))
    figure.subplots_adjust(0.01, 0, 1, 0.99, wspace=0.02, hspace=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font lacks; the text has it
        figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_chat(axis: Any, rounds: Sequence[tuple[str, list, str | None]], answers: Sequence[str]) -> float:
    """Draws one chat from 0 downwards; returns its height in lines."""
    height, number = 0.0, 0
    for (question, images, expected), answer in zip(rounds, answers):
        height += (PICTURE + 1) * bool(images)
        pitch = min(0.36, 1 / max(len(images), 1))
        for column, image in enumerate(images):
            number += 1
            inset = axis.inset_axes([pitch * column, -height, 0.8 * pitch, PICTURE], transform=axis.transData)
            inset.imshow(image, cmap="gray", interpolation="nearest")
            inset.set(xticks=[], yticks=[])
            inset.set_title(f"Image {number}", fontsize=8, pad=2)
        height += 0.3 * bool(images)
        shown, color = answer or "(nothing)", "black"
        if expected is not None:
            color = "green" if answer == expected else "red"
            shown += f"  (expected: {expected})" * (answer != expected)
        for text, style in (
            (question, {"family": "monospace"}),
            (shown, {"color": color, "weight": "bold"}),
        ):
            lines = [line for part in text.splitlines() for line in textwrap.wrap(part, WIDTH)] or [""]
            axis.text(0, -height, "\n".join(lines), fontsize=10, va="top", parse_math=False, clip_on=True, **style)
            height += len(lines)
        height += 0.5
    return height
