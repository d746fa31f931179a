"""
Draws chats about held-out pictures by a checkpoint of pretrained.py, right and wrong answers as they come.

    python examples/study/pretrained.py --arms "mmca, joint, half" --seeds 0 --save checkpoints
    python examples/study/demo.py checkpoints/mmca-joint-half-0

Chats of each kind: naming, reading digits, counting, comparing, a third round that goes back to image 1, and a
story over three pictures. They are drawn from a seed, and none is left out.
"""

import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from picture_tasks import Deck, Round, ask_count, ask_kind, ask_name, ask_names, compare, draw_back
from pictures import add_pictures_argument, load_pictures, read_paths, split_pictures
from transformers.utils import logging

from modeling_visualchat import ChatSession, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


sys.path.append(str(Path(__file__).parents[1]))
from drawn_chats import Chat, draw_chats


STORY = ("tell a story about them.", None)


def about(shown: list, *asked: tuple[str, str | None]) -> list[Round]:
    """Questions about pictures that are shown with the first."""
    return [(shown if number == 0 else [], question) for number, question in enumerate(asked)]


def things(deck: Deck) -> list[str]:
    return [kind for kind in deck.kinds if kind != "digit"]


def name(rng: random.Random, deck: Deck) -> list[Round]:
    shown = deck.draw(rng, [rng.choice(things(deck))])
    return about(shown, ask_name(rng, shown), ask_kind(rng, shown))


def read(rng: random.Random, deck: Deck) -> list[Round]:
    shown = deck.draw(rng, ["digit"] * 3)
    return about(shown, ask_names(rng, shown))


def count(rng: random.Random, deck: Deck) -> list[Round]:
    shown = deck.draw(rng, rng.choices(deck.kinds, k=4))
    return about(shown, ask_count(rng, shown), ask_names(rng, shown))


def contrast(rng: random.Random, deck: Deck) -> list[Round]:
    shown = deck.draw(rng, rng.choices(deck.kinds, k=2))
    return about(shown, compare(shown, 0, 1), ask_names(rng, shown))


def go_back(rng: random.Random, deck: Deck) -> list[Round]:
    return draw_back(rng, deck, 3)


def tell(rng: random.Random, deck: Deck) -> list[Round]:
    shown = deck.draw(rng, rng.choices(things(deck), k=3))
    return about(shown, ask_names(rng, shown), STORY)


CHATS: tuple[Callable[[random.Random, Deck], list[Round]], ...] = (name, read, count, contrast, go_back, tell)


def hold(session: ChatSession, rounds: list[Round]) -> Chat:
    """Asks the questions of a chat one after the other, with the model's own answers as history."""
    shown, answers = [], []
    for pictures, (question, expected) in rounds:
        images = [picture.render() for picture in pictures]
        answers.append(session.ask(question, images).strip())
        shown.append((question, images, expected))
    return shown, answers


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder that pretrained.py --save has written")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="picture to write")
    parser.add_argument("--split", default="test", choices=("test", "concept", "style"), help="held-out pictures")
    parser.add_argument("--seed", type=int, default=0, help="what the chats are drawn from")
    parser.add_argument("--chats", type=int, default=2, help="chats of each kind")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="maximum number of tokens of an answer")
    add_pictures_argument(parser)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    deck = Deck(split_pictures(load_pictures(read_paths(parser, arguments)))[arguments.split])
    model = VisualChatForConditionalGeneration.from_pretrained(arguments.checkpoint).eval()
    processor = VisualChatProcessor.from_pretrained(arguments.checkpoint)
    rng = random.Random(arguments.seed)
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    chats = [
        hold(model.start_chat(processor, **options), draw(rng, deck)) for draw in CHATS for _ in range(arguments.chats)
    ]
    draw_chats(chats, arguments.output)
    judged = [
        (answer, expected)
        for shown, answers in chats
        for (_, _, expected), answer in zip(shown, answers)
        if expected is not None
    ]
    right = sum(answer == expected for answer, expected in judged)
    print(f"{right} of {len(judged)} answers are those expected; the chats are in {arguments.output}")


if __name__ == "__main__":
    main()
