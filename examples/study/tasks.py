"""
The tasks of the study: questions about scans of handwritten digits, drawn without end from a seed.

A conversation shows scans and asks about them. To test a task, its question is the only one that is scored; in
training, questions of other tasks about the same scans follow. Scans of training, tuning and test are disjoint. A
conversation is drawn from a seed and its number, so every arm sees the same conversations in the same order.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from scans import WORDS, load_scans
from torch.utils.data import Dataset


CURRICULUM = 0.4  # of the training, in which the largest size grows from 1 to 8
NUM_QUESTIONS = 10  # about the scans of a training conversation

Question = tuple[str, str]  # with its answer
Round = tuple[list[int], Question]  # the digits that it shows


@dataclass(frozen=True)
class Task:
    """
    A kind of question.

    Args:
        draw (`Callable`): Draws rounds from a random generator and a size; the last round asks the question.
        sizes (`range`): The numbers of images or, of `apart` and `distractors`, of rounds between two images.
        num_answers (`Callable`): Possible answers at a size: the chance of a guess is one in as many.
    """

    draw: Callable[[random.Random, int], list[Round]]
    sizes: range
    num_answers: Callable[[int], int]


# Questions about digits in order. None where the digits allow no such question.


def ask_single(rng: random.Random, digits: list[int]) -> Question | None:
    place = rng.randrange(len(digits))
    return f"digit of {name_image(place)}?", WORDS[digits[place]]


def ask_larger(rng: random.Random, digits: list[int]) -> Question | None:
    pairs = [pair for pair in itertools.combinations(range(len(digits)), 2) if digits[pair[0]] != digits[pair[1]]]
    return compare(digits, *rng.choice(pairs)) if pairs else None


def compare(digits: list[int], first: int, second: int) -> Question:
    question = f"larger of {name_image(first)} and {name_image(second)}?"
    return question, number_of(first if digits[first] > digits[second] else second)


def ask_sum(rng: random.Random, digits: list[int]) -> Question | None:
    if len(digits) < 2:
        return None
    first, second = sorted(rng.sample(range(len(digits)), 2))
    return f"sum of {name_image(first)} and {name_image(second)}?", WORDS[digits[first] + digits[second]]


def ask_same(rng: random.Random, digits: list[int]) -> Question | None:
    places = [place for place in range(1, len(digits)) if digits[place] == digits[0]]
    return ("same digit as image 1?", number_of(places[0])) if len(places) == 1 else None


def ask_which(rng: random.Random, digits: list[int]) -> Question | None:
    unique = [place for place, digit in enumerate(digits) if digits.count(digit) == 1]
    if len(digits) < 2 or not unique:
        return None
    place = rng.choice(unique)
    return f"which shows {WORDS[digits[place]]}?", number_of(place)


def ask_largest(rng: random.Random, digits: list[int]) -> Question | None:
    if len(digits) < 2 or digits.count(max(digits)) > 1:
        return None
    return "largest digit?", number_of(digits.index(max(digits)))


def ask_count(rng: random.Random, digits: list[int]) -> Question | None:
    if len(digits) < 2:
        return None
    digit = rng.choice(digits) if rng.random() < 0.8 else rng.randrange(10)
    return f"how many show {WORDS[digit]}?", WORDS[digits.count(digit)]


def ask_two_hops(rng: random.Random, digits: list[int]) -> Question | None:
    return follow(digits, 2, "follow image 1 once: digit?")


def ask_three_hops(rng: random.Random, digits: list[int]) -> Question | None:
    return follow(digits, 3, "follow image 1 twice: digit?")


def follow(digits: list[int], num_hops: int, question: str) -> Question | None:
    path = [0]
    for _ in range(num_hops - 1):
        path.append(digits[path[-1]] - 1)
        if not 0 <= path[-1] < len(digits) or path[-1] in path[:-1]:
            return None
    return question, WORDS[digits[path[-1]]]


QUESTIONS = (
    ask_single, ask_larger, ask_sum, ask_which, ask_same, ask_largest, ask_count, ask_two_hops, ask_three_hops,
)  # fmt: skip


# Draws: digits that allow the question of a task, and whose answers are evenly spread.


def draw_any(ask: Callable, rng: random.Random, num_images: int) -> list[Round]:
    digits = rng.sample(range(10), num_images) if ask is ask_larger else rng.choices(range(10), k=num_images)
    return [(digits, ask(rng, digits))]


def draw_same(rng: random.Random, num_images: int) -> list[Round]:
    first, place = rng.randrange(10), rng.randrange(1, num_images)
    others = [digit for digit in range(10) if digit != first]
    digits = [first] + [first if number == place else rng.choice(others) for number in range(1, num_images)]
    return [(digits, ask_same(rng, digits))]


def draw_largest(rng: random.Random, num_images: int) -> list[Round]:
    largest, place = rng.randint(1, 9), rng.randrange(num_images)
    digits = [largest if number == place else rng.randrange(largest) for number in range(num_images)]
    return [(digits, ask_largest(rng, digits))]


def draw_count(rng: random.Random, num_images: int) -> list[Round]:
    digit, count = rng.randrange(10), rng.randint(0, num_images)
    others = [other for other in range(10) if other != digit]
    digits = [digit] * count + [rng.choice(others) for _ in range(num_images - count)]
    rng.shuffle(digits)
    return [(digits, (f"how many show {WORDS[digit]}?", WORDS[count]))]


def draw_hops(num_hops: int, rng: random.Random, num_images: int) -> list[Round]:
    path = [0, *rng.sample(range(1, num_images), num_hops - 1)]
    digits = rng.choices(range(10), k=num_images)
    for place, following in itertools.pairwise(path):
        digits[place] = following + 1
    return [(digits, (ask_two_hops if num_hops == 2 else ask_three_hops)(rng, digits))]


def draw_apart(rng: random.Random, num_rounds: int) -> list[Round]:
    """Sums in words between two images."""
    between = [(rng.randrange(10), rng.randrange(10)) for _ in range(num_rounds)]
    return join_apart(rng, [([], (f"{WORDS[a]} plus {WORDS[b]}?", WORDS[a + b])) for a, b in between])


def draw_distractors(rng: random.Random, num_rounds: int) -> list[Round]:
    """Other images between two images."""
    between = [rng.randrange(10) for _ in range(num_rounds)]
    return join_apart(rng, [([digit], ("even or odd?", ("even", "odd")[digit % 2])) for digit in between])


def join_apart(rng: random.Random, between: list[Round]) -> list[Round]:
    first, second = rng.sample(range(10), 2)
    digits = [first, *itertools.chain.from_iterable(shown for shown, _ in between), second]
    return [([first], ("what is it?", "digit")), *between, ([second], compare(digits, 0, len(digits) - 1))]


def number_of(place: int) -> str:
    """The number of an image in questions and answers, counted from 1; `place` counts from 0."""
    return str(place + 1)


def name_image(place: int) -> str:
    return f"image {number_of(place)}"


def always(number: int) -> Callable[[int], int]:
    return lambda size: number


TASKS: dict[str, Task] = {
    "single": Task(lambda *args: draw_any(ask_single, *args), range(1, 2), always(10)),
    "larger": Task(lambda *args: draw_any(ask_larger, *args), range(2, 3), always(2)),
    "sum": Task(lambda *args: draw_any(ask_sum, *args), range(2, 3), always(19)),
    "same": Task(draw_same, range(3, 9), lambda size: size - 1),
    "largest": Task(draw_largest, range(2, 9), lambda size: size),
    "count": Task(draw_count, range(2, 9), lambda size: size + 1),
    "two hops": Task(lambda *args: draw_hops(2, *args), range(3, 9), always(10)),
    "three hops": Task(lambda *args: draw_hops(3, *args), range(4, 9), always(10)),
    "apart": Task(draw_apart, range(1, 4), always(2)),
    "distractors": Task(draw_distractors, range(1, 4), always(2)),
}


class StudyConversations(Dataset):
    """
    Conversations of one task to test, or of all to train on; in training, those of one batch have the same task and
    size, so that its rows are about equally long.

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

    def draw(self, index: int) -> tuple[list[Round], random.Random]:
        """The conversation of a number, and the generator that goes on to choose its scans."""
        rng = random.Random(f"{self.split}/{self.seed}/{self.task}/{index}")
        if self.task is not None:
            task = TASKS[self.task]
            return task.draw(rng, rng.choice(task.sizes)), rng
        first = index // self.batch_size * self.batch_size
        largest = 1 + int(8 * first / (CURRICULUM * self.size))
        of_batch = random.Random(f"{self.seed}/batch {first}")
        size = of_batch.choice([size for task in TASKS.values() for size in task.sizes if size <= largest])
        rounds = rng.choice([task for task in TASKS.values() if size in task.sizes]).draw(rng, size)
        digits = [digit for shown, _ in rounds for digit in shown]
        while len(rounds) < NUM_QUESTIONS:
            possible = [question for ask in QUESTIONS if (question := ask(rng, digits)) is not None]
            new = [([], question) for question in possible if question not in [asked for _, asked in rounds]]
            if not new:
                break
            rounds.append(rng.choice(new))
        return rounds, rng

    def __getitem__(self, index: int) -> dict:
        """The messages; of a test, the loss is on the last answer, which is scored."""
        rounds, rng = self.draw(index)
        messages = []
        for number, (digits, (question, answer)) in enumerate(rounds, start=1):
            images = [{"type": "image", "image": rng.choice(self.scans[digit])} for digit in digits]
            content = (images if self.has_images else []) + [{"type": "text", "text": question}]
            is_scored = self.task is None or number == len(rounds)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer, "weight": int(is_scored)})
        return {"messages": messages}
