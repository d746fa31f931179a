"""
Conversations about scans of handwritten digits.

The pictures are the 1,797 scans of scikit-learn (8 by 8 pixels). A conversation shows two of them, one at a time or
both at once, over several rounds, and its answers are words. Scans held out from training make the evaluation.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from study.scans import WORDS
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Question:
    """
    A question about one or two digits.

    Args:
        text (`str`): What the user asks.
        num_images (`int`): Number of images the answer depends on.
        answer (`Callable`): Computes the answer from the digits shown.
        num_answers (`int`): Number of possible answers; chance is one in `num_answers`.
    """

    text: str
    num_images: int
    answer: Callable[..., str]
    num_answers: int


def name_the_larger(first: int, second: int) -> str:
    return "neither" if first == second else "the first" if first > second else "the second"


# `OF_ONE` is asked about the image just shown, `OF_TWO` once two have been shown.
OF_ONE = (
    Question("what digit is it?", 1, lambda digit: WORDS[digit], 10),
    Question("is it even or odd?", 1, lambda digit: ("even", "odd")[digit % 2], 2),
)
OF_TWO = (
    Question("what digit is the first?", 1, lambda first, second: WORDS[first], 10),
    Question("what digit is the second?", 1, lambda first, second: WORDS[second], 10),
    Question("which of the two is larger?", 2, name_the_larger, 3),
    Question("what is their sum?", 2, lambda first, second: WORDS[first + second], 19),
)


def converse(rounds: list[tuple[list, Question, tuple[int, ...]]]) -> list[dict]:
    """Messages of `(images, question, digits)` rounds, answers included."""
    messages = []
    for images, question, digits in rounds:
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer(*digits)})
    return messages


class DigitConversations(Dataset):
    """
    Draws each conversation from the seed and its index, so that few scans give many conversations.

    Args:
        scans (`list`): `(image, digit)` pairs.
        size (`int`): Number of conversations.
        seed (`int`): The same seed gives the same conversations.
    """

    def __init__(self, scans: list, size: int, seed: int = 0):
        self.scans, self.size, self.seed = scans, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        rng = random.Random(f"{self.seed}/{index}")
        (image_a, a), (image_b, b) = rng.choice(self.scans), rng.choice(self.scans)
        together = rng.sample(OF_TWO, len(OF_TWO))
        if rng.random() < 0.5:
            rounds = [([image_a], rng.choice(OF_ONE), (a,)), ([image_b], rng.choice(OF_ONE), (b,))]
            rounds += [([], question, (a, b)) for question in together]
        else:
            rounds = [([image_a, image_b], together[0], (a, b))]
            rounds += [([], question, (a, b)) for question in together[1:]]
        return {"messages": converse(rounds), "where": [f"digits, conversation {index}"]}
