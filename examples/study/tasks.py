"""
The tasks of the study: questions about scans of handwritten digits, drawn without end from a seed.

Scans of training, tuning and test are disjoint. A conversation is drawn from a seed and its number, so every arm sees
the same conversations in the same order.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from scans import WORDS, load_scans
from torch.utils.data import Dataset


NUM_READINGS = 2  # questions "what digit does image 3 show?" that follow in training


@dataclass(frozen=True)
class Drawn:
    """One conversation as drawn: the digits shown in each round, its question and its answer."""

    rounds: list[tuple[list[int], str, str]]
    num_answers: int  # possible answers to the last question; chance is one in `num_answers`

    @property
    def digits(self) -> list[int]:
        """Those of all rounds, in order."""
        return [digit for digits, _, _ in self.rounds for digit in digits]


@dataclass(frozen=True)
class Task:
    """
    A kind of question.

    Args:
        draw (`Callable`): Draws a conversation from a random generator and a size.
        sizes (`range`): The numbers of images or, of `apart`, of rounds between the two images.
        group (`str`): Tasks of one group and size fill a batch together, so that its rows are about equally long.
    """

    draw: Callable[[random.Random, int], Drawn]
    sizes: range
    group: str


def draw_single(rng: random.Random, num_images: int) -> Drawn:
    digit = rng.randrange(10)
    return Drawn([([digit], "what digit is it?", WORDS[digit])], 10)


def draw_larger(rng: random.Random, num_images: int) -> Drawn:
    first, second = rng.sample(range(10), 2)
    return Drawn([([first, second], "which image shows the larger digit?", name_image(int(second > first)))], 2)


def draw_sum(rng: random.Random, num_images: int) -> Drawn:
    digits = [rng.randrange(10), rng.randrange(10)]
    return Drawn([(digits, "what is the sum of the digits?", WORDS[sum(digits)])], 19)


def draw_same(rng: random.Random, num_images: int) -> Drawn:
    """Exactly one other image shows the digit of image 1."""
    first, place = rng.randrange(10), rng.randrange(1, num_images)
    others = [digit for digit in range(10) if digit != first]
    digits = [first] + [first if number == place else rng.choice(others) for number in range(1, num_images)]
    return Drawn([(digits, "which image shows the same digit as image 1?", name_image(place))], num_images - 1)


def draw_largest(rng: random.Random, num_images: int) -> Drawn:
    largest, place = rng.randint(1, 9), rng.randrange(num_images)
    digits = [largest if number == place else rng.randrange(largest) for number in range(num_images)]
    return Drawn([(digits, "which image shows the largest digit?", name_image(place))], num_images)


def draw_count(rng: random.Random, num_images: int) -> Drawn:
    """Every count is as likely as any other."""
    digit, count = rng.randrange(10), rng.randint(0, num_images)
    others = [other for other in range(10) if other != digit]
    digits = [digit] * count + [rng.choice(others) for _ in range(num_images - count)]
    rng.shuffle(digits)
    return Drawn([(digits, f"how many images show a {WORDS[digit]}?", WORDS[count])], num_images + 1)


def draw_two_hops(rng: random.Random, num_images: int) -> Drawn:
    question = "image 1 gives the number of an image: what digit does that show?"
    return draw_hops(rng, num_images, 2, question)


def draw_three_hops(rng: random.Random, num_images: int) -> Drawn:
    question = "image 1 gives the number of an image, and that of another: what digit does the last show?"
    return draw_hops(rng, num_images, 3, question)


def draw_hops(rng: random.Random, num_images: int, num_hops: int, question: str) -> Drawn:
    path = [0, *rng.sample(range(1, num_images), num_hops - 1)]
    digits = [rng.randrange(10) for _ in range(num_images)]
    for place, following in itertools.pairwise(path):
        digits[place] = following + 1
    return Drawn([(digits, question, WORDS[digits[path[-1]]])], 10)


def draw_apart(rng: random.Random, num_rounds: int) -> Drawn:
    """Sums in words between two images."""
    between = [[rng.randrange(10), rng.randrange(10)] for _ in range(num_rounds)]
    rounds = [([], f"what is {WORDS[left]} plus {WORDS[right]}?", WORDS[left + right]) for left, right in between]
    return join_apart(rng, rounds)


def draw_distractors(rng: random.Random, num_rounds: int) -> Drawn:
    """Other images between two images."""
    between = [rng.randrange(10) for _ in range(num_rounds)]
    return join_apart(rng, [([digit], "is it even or odd?", ("even", "odd")[digit % 2]) for digit in between])


def join_apart(rng: random.Random, between: list) -> Drawn:
    first, second = rng.sample(range(10), 2)
    last = 1 + sum(len(digits) for digits, _, _ in between)
    question = f"which of image 1 and image {last + 1} shows the larger digit?"
    answer = name_image(0 if first > second else last)
    return Drawn([([first], "what is it?", "a digit"), *between, ([second], question, answer)], 2)


def name_image(place: int) -> str:
    """The answer that names an image, counted from 0."""
    return f"image {place + 1}"


TASKS: dict[str, Task] = {
    "single": Task(draw_single, range(1, 2), "few"),
    "larger": Task(draw_larger, range(2, 3), "few"),
    "sum": Task(draw_sum, range(2, 3), "few"),
    "same": Task(draw_same, range(3, 9), "many"),
    "largest": Task(draw_largest, range(2, 9), "many"),
    "count": Task(draw_count, range(2, 9), "many"),
    "two hops": Task(draw_two_hops, range(3, 9), "many"),
    "three hops": Task(draw_three_hops, range(4, 9), "many"),
    "apart": Task(draw_apart, range(1, 4), "apart"),
    "distractors": Task(draw_distractors, range(1, 4), "apart"),
}


class StudyConversations(Dataset):
    """
    Conversations of one task to test, or of all to train on.

    In training, questions about single images follow the one that is tested, and conversations of one batch have the
    same size.

    Args:
        split (`str`): `"train"`, `"tuning"` or `"test"`, which have no scan in common.
        size (`int`): Number of conversations.
        seed (`int`): The same seed gives the same conversations.
        task (`str`, *optional*): A key of `TASKS`; by default all.
        has_images (`bool`, *optional*, defaults to `True`): Whether the images are shown.
        batch_size (`int`, *optional*, defaults to 32): Conversations of a batch.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int,
        task: str | None = None,
        has_images: bool = True,
        batch_size: int = 32,
    ):
        self.split, self.size, self.seed, self.task = split, size, seed, task
        self.has_images, self.batch_size = has_images, batch_size
        train, test = load_scans()
        train, tuning = [scan for number, scan in enumerate(train) if number % 8], train[::8]
        splits = {"train": train, "tuning": tuning, "test": test}
        self.scans = [[image for image, shown in splits[split] if shown == digit] for digit in range(10)]

    def __len__(self) -> int:
        return self.size

    def draw(self, index: int) -> tuple[Drawn, random.Random]:
        """The conversation of a number, and the generator that goes on to choose its scans."""
        rng = random.Random(f"{self.split}/{self.seed}/{self.task}/{index}")
        if self.task is not None:
            task = TASKS[self.task]
            return task.draw(rng, rng.choice(task.sizes)), rng
        of_batch = random.Random(f"{self.seed}/batch {index // self.batch_size}")
        first = of_batch.choice(list(TASKS.values()))
        size = of_batch.choice(first.sizes)
        fitting = [task for task in TASKS.values() if task.group == first.group and size in task.sizes]
        drawn = rng.choice(fitting).draw(rng, size)
        rounds, digits = list(drawn.rounds), drawn.digits
        for place in rng.choices(range(len(digits)), k=NUM_READINGS):
            rounds.append(([], f"what digit does image {place + 1} show?", WORDS[digits[place]]))
        return Drawn(rounds, 10), rng

    def __getitem__(self, index: int) -> dict:
        """The messages; of a test, the loss is on the last answer, which is scored."""
        drawn, rng = self.draw(index)
        messages = []
        for number, (digits, question, answer) in enumerate(drawn.rounds, start=1):
            images = [{"type": "image", "image": rng.choice(self.scans[digit])} for digit in digits]
            content = (images if self.has_images else []) + [{"type": "text", "text": question}]
            is_scored = self.task is None or number == len(drawn.rounds)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer, "weight": int(is_scored)})
        return {"messages": messages}
