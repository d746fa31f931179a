"""
Conversations about one to four pictures of things, drawn without end from a seed: what an image shows and of which
kind, which image shows a thing, how many show a kind, which two are of one kind, and a later round that refers to the
first image.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from pictures import Picture
from torch.utils.data import Dataset


KINDS = ("animal", "food", "vehicle", "garment", "digit")
NUMBERS = ("zero", "one", "two", "three", "four")
NUM_NAMES = 234  # in training
NUM_VARIANTS = 2  # of a picture in training
NUM_QUESTIONS = 6  # of a training conversation

Question = tuple[str, str]  # with its answer
Round = tuple[list[Picture], Question]  # the pictures that it shows


def name_image(place: int) -> str:
    """An image as questions and answers name it, counted from 0 here and from 1 there."""
    return f"image {place + 1}"


# Questions about pictures in order. None where they allow no such question.


def ask_name(rng: random.Random, shown: list[Picture]) -> Question | None:
    place = rng.randrange(len(shown))
    return f"what is {name_image(place)}?", shown[place].concept


def ask_names(rng: random.Random, shown: list[Picture]) -> Question | None:
    return "what do the images show?", ", ".join(picture.concept for picture in shown)


def ask_kind(rng: random.Random, shown: list[Picture]) -> Question | None:
    place = rng.randrange(len(shown))
    return f"what kind is {name_image(place)}?", shown[place].kind


def ask_find(rng: random.Random, shown: list[Picture]) -> Question | None:
    concepts = [picture.concept for picture in shown]
    place = rng.randrange(len(shown))
    if len(shown) < 2 or concepts.count(concepts[place]) > 1:
        return None
    return f"which image shows {concepts[place]}?", name_image(place)


def ask_count(rng: random.Random, shown: list[Picture]) -> Question | None:
    kinds = [picture.kind for picture in shown]
    kind = rng.choice([*kinds, *KINDS])
    return f"how many show {kind}?", NUMBERS[kinds.count(kind)]


def ask_pair(rng: random.Random, shown: list[Picture]) -> Question | None:
    places = [place for place in range(1, len(shown)) if shown[place].kind == shown[0].kind]
    return (f"which is of the kind of {name_image(0)}?", name_image(places[0])) if len(places) == 1 else None


def ask_same(rng: random.Random, shown: list[Picture]) -> Question | None:
    if len(shown) < 2:
        return None
    first, second = sorted(rng.sample(range(len(shown)), 2))
    return compare(shown, first, second)


def compare(shown: list[Picture], first: int, second: int) -> Question:
    answer = ("no", "yes")[shown[first].kind == shown[second].kind]
    return f"are {name_image(first)} and {name_image(second)} of one kind?", answer


QUESTIONS = (ask_names, ask_name, ask_kind, ask_find, ask_count, ask_pair, ask_same)


class Deck:
    """The pictures of a split, to be drawn by kind and concept, each concept as often as any other."""

    def __init__(self, pictures: list[Picture]):
        self.by_kind: dict[str, dict[str, list[Picture]]] = {}
        for picture in pictures:
            self.by_kind.setdefault(picture.kind, {}).setdefault(picture.concept, []).append(picture)
        self.kinds = [kind for kind in KINDS if kind in self.by_kind]

    def draw(self, rng: random.Random, kinds: list[str]) -> list[Picture]:
        """A picture of each of these kinds, of different concepts."""
        shown: list[Picture] = []
        for kind in kinds:
            free = [name for name in self.by_kind[kind] if name not in [picture.concept for picture in shown]]
            shown.append(rng.choice(self.by_kind[kind][rng.choice(free)]))
        return shown


# Draws: pictures that allow the question of a task, and whose answers are evenly spread.


def draw_any(ask: Callable, rng: random.Random, deck: Deck, num_images: int) -> list[Round]:
    shown = deck.draw(rng, rng.choices(deck.kinds, k=num_images))
    return [(shown, ask(rng, shown))]


def draw_count(rng: random.Random, deck: Deck, num_images: int) -> list[Round]:
    kind, count = rng.choice(deck.kinds), rng.randint(0, num_images)
    others = [other for other in deck.kinds if other != kind]
    kinds = [kind] * count + rng.choices(others, k=num_images - count)
    rng.shuffle(kinds)
    return [(deck.draw(rng, kinds), (f"how many show {kind}?", NUMBERS[count]))]


def draw_pair(rng: random.Random, deck: Deck, num_images: int) -> list[Round]:
    first, place = rng.choice(deck.kinds), rng.randrange(1, num_images)
    others = [kind for kind in deck.kinds if kind != first]
    kinds = [first] + [first if number == place else rng.choice(others) for number in range(1, num_images)]
    shown = deck.draw(rng, kinds)
    return [(shown, ask_pair(rng, shown))]


def draw_back(rng: random.Random, deck: Deck, num_images: int) -> list[Round]:
    """An image a round, and a last one that compares the last with the first."""
    first = rng.choice(deck.kinds)
    last = first if rng.random() < 0.5 else rng.choice([kind for kind in deck.kinds if kind != first])
    shown = deck.draw(rng, [first, *rng.choices(deck.kinds, k=num_images - 2), last])
    rounds: list[Round] = [
        ([picture], ("how many images?", NUMBERS[number])) for number, picture in enumerate(shown[:-1], start=1)
    ]
    return [*rounds, ([shown[-1]], compare(shown, 0, num_images - 1))]


@dataclass(frozen=True)
class Task:
    """
    A kind of question.

    Args:
        draw (`Callable`): Draws rounds from a random generator, a deck and a size; the last asks the question.
        sizes (`range`): The numbers of images.
        num_answers (`Callable`): Possible answers at a size: the chance of a guess is one in as many.
    """

    draw: Callable[[random.Random, Deck, int], list[Round]]
    sizes: range
    num_answers: Callable[[int], int]


def always(number: int) -> Callable[[int], int]:
    return lambda size: number


TASKS: dict[str, Task] = {
    "name": Task(lambda *args: draw_any(ask_name, *args), range(1, 2), always(NUM_NAMES)),
    "kind": Task(lambda *args: draw_any(ask_kind, *args), range(1, 2), always(len(KINDS))),
    "find": Task(lambda *args: draw_any(ask_find, *args), range(2, 5), lambda size: size),
    "count": Task(draw_count, range(2, 5), lambda size: size + 1),
    "pair": Task(draw_pair, range(3, 5), lambda size: size - 1),
    "back": Task(draw_back, range(3, 5), always(2)),
}


# A task with pictures of a split; "name" is left out where no picture's name occurs in training.
TESTS: dict[str, tuple[str, str]] = {
    f"{task}, {split}": (task, split)
    for split in ("test", "concept", "style")
    for task in TASKS
    if (task, split) != ("name", "concept")
}


class PictureConversations(Dataset):
    """
    Conversations of one task to test, or of all to train on; in training, those of one batch have the same task and
    size, so that its rows are about equally long.

    Args:
        pictures (`list[Picture]`): Those of a split.
        size (`int`): Number of conversations.
        seed (`int`): What they are drawn from, with their number.
        task (`str`, *optional*): A name out of `TASKS`; without one, a training conversation of any task.
        has_images (`bool`): Whether the images are shown; without, the same conversations are text only.
        batch_size (`int`): Conversations of a training batch.
    """

    def __init__(
        self,
        pictures: list[Picture],
        size: int,
        seed: int,
        task: str | None = None,
        has_images: bool = True,
        batch_size: int = 1,
    ):
        self.deck, self.size, self.seed, self.task = Deck(pictures), size, seed, task
        self.has_images, self.batch_size = has_images, batch_size

    def __len__(self) -> int:
        return self.size

    def draw(self, index: int) -> tuple[list[Round], random.Random]:
        """The conversation of a number, and the generator that goes on to choose the variants of its pictures."""
        rng = random.Random(f"{self.seed}/{self.task}/{index}")
        if self.task is not None:
            task = TASKS[self.task]
            return task.draw(rng, self.deck, rng.choice(task.sizes)), rng
        of_batch = random.Random(f"{self.seed}/batch {index // self.batch_size}")
        task = of_batch.choice(list(TASKS.values()))
        rounds = task.draw(rng, self.deck, of_batch.choice(task.sizes))
        shown = [picture for pictures, _ in rounds for picture in pictures]
        asked = [question for _, question in rounds]
        for ask in (ask_names, *rng.choices(QUESTIONS, k=4 * NUM_QUESTIONS)):
            question = ask(rng, shown)
            if len(asked) < NUM_QUESTIONS and question is not None and question not in asked:
                asked.append(question)
                rounds.append(([], question))
        return rounds, rng

    def __getitem__(self, index: int) -> dict:
        """The messages; of a test, the loss is on the last answer, which is scored."""
        rounds, rng = self.draw(index)
        messages = []
        for number, (pictures, (question, answer)) in enumerate(rounds, start=1):
            images = [{"type": "image", "image": picture.render(self.variant(rng))} for picture in pictures]
            content = (images if self.has_images else []) + [{"type": "text", "text": question}]
            is_scored = self.task is None or number == len(rounds)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer, "weight": int(is_scored)})
        return {"messages": messages}

    def variant(self, rng: random.Random) -> int:
        return rng.randrange(NUM_VARIANTS) if self.task is None else 0
