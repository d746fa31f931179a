"""
Changes of a conversation that test robustness, one record each: from an example, and another one with images to take,
to the changed example; or `None` if it cannot be changed without changing what is right.

    swap            the images of each question in reverse order; "image 1", "the first image" and "the left image" are
                    renamed along, in questions, options and references
    distractor      an image of another example after the last one; later questions say which images they are about
    wrong_image     each image replaced by one of another example: what is still right was not seen
    removed         the last image removed: what is still right did not need it
    question_first  the words of each question before its images
    question_last   the words of each question after its images

What stays right is decided from the words alone, and in doubt an example is left out, and counted.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from ..conversation_visualchat import is_image
from .pictures import describe_block
from .records import Example, Round


NUMERAL = r"\d+(?:st|nd|rd|th)"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
NOUN = r"(?:images?|pictures?|photos?|photographs?|figures?|scans?)"
NUMBERED = re.compile(rf"\b({NOUN}[ -]?#?)(\d+)\b(?!\s*(?:[,&]|and|or|to|-|–)\s*#?\d)", re.IGNORECASE)  # noqa: RUF001
ANY_ORDINAL = rf"{'|'.join(ORDINALS)}|{NUMERAL}"
# Of an image, or by itself: "the second image", "Is the 1st darker than the 2nd?".
ORDINAL = re.compile(
    rf"\b(the\s+)?({ANY_ORDINAL})(\s+{NOUN}\b)|\b(the\s+)({ANY_ORDINAL})(?=\s*(?:[.,;:!?)]|$)"
    r"|\s+(?:one|and|or|than)\b)",
    re.IGNORECASE,
)
SIDE = re.compile(rf"\b(left|right)((?:-hand)?\s+{NOUN})\b", re.IGNORECASE)
# Says which place is which, whatever picture is there.
PLACES = re.compile(r"(\bthe first image is the left one, the second the right one\b)", re.IGNORECASE)
# What depends on the order of the images, and is not one of the above.
ORDER_WORDS = re.compile(
    rf"\b(?:{ANY_ORDINAL}|last|left|right|former|latter|before|after|earlier|later|order|sequence|next|then|start|end"
    rf"|beginning|(?:previous|preceding|source|target|top|bottom|upper|lower)\s+{NOUN}"
    rf"|{NOUN}\s*(?:#?\d+|one|two|three|four|[a-h]))\b",
    re.IGNORECASE,
)
# An answer of these words tells what is different in one of the images, if it does not name it.
CHANGE_WORDS = re.compile(
    r"\b(?:more|less|fewer|gone|now|no longer|any ?more|added|removed|(?:dis)?appear(?:s|ed)?|missing|new)\b",
    re.IGNORECASE,
)
LABEL = re.compile(rf"\(?{NOUN}[ -]?#?\d+\)?\s*[:.]?\s*|\(?\d+\)?\s*[:.]?\s*", re.IGNORECASE)
ASKS_WHICH = re.compile(rf"\b(?:which|what)\s+(?:(?:one\s+)?of\s+the\s+(?:\w+\s+)?)?{NOUN}\b", re.IGNORECASE)
COUNTS_IMAGES = re.compile(
    rf"\b(?:how many|number of|all|last|every|each|both|these|those)\b.*\b{NOUN}\b", re.IGNORECASE
)
OPTION = re.compile(r"(?:^|\n)\s*\(?[A-Z][).:]\s*$")  # the letter before an option that is an image
MARK = "\0"  # before a reference to an image that has been renamed


@dataclass(frozen=True)
class Perturbation:
    """A change of an example, by its name."""

    name: str
    meaning: str  # of its score, for a model card
    change: Callable[[Example, Example], Example | None]
    needs_other: bool = False  # takes images of the other example


def to_numeral(number: int) -> str:
    """1 as "1st"."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}th" if number % 100 in (11, 12, 13) else f"{number}{suffix}"


def rename_images(text: str, numbers: dict[int, int], is_pair: bool = False) -> str | None:
    """
    Text whose references to images by number follow their new numbers; `None` if it depends on their order in another
    way. `is_pair` is for two images side by side, of which one is left.

    ```python
    >>> rename_images("Is image 1 darker than the second image?", {1: 2, 2: 1})
    'Is image 2 darker than the first image?'
    ```
    """

    def like(word: str, model: str) -> str:
        return word.capitalize() if model[0].isupper() else word

    def number(match: re.Match) -> str:
        known = numbers.get(int(match[2]))
        return match[0] if known is None else f"{MARK}{match[1]}{MARK}{known}"

    def ordinal(match: re.Match) -> str:
        article, word, noun = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], "")
        is_numeral = word[0].isdigit()
        known = numbers.get(int(word[:-2]) if is_numeral else ORDINALS.index(word.lower()) + 1)
        if known is None or known > len(ORDINALS):
            return match[0]
        other = to_numeral(known) if is_numeral else like(ORDINALS[known - 1], word)
        return f"{article or ''}{MARK}{other}{MARK}{noun}"

    def side(match: re.Match) -> str:
        other = {"left": "right", "right": "left"}[match[1].lower()]
        return f"{MARK}{like(other, match[1])}{MARK}{match[2]}" if is_pair else match[0]

    pieces = PLACES.split(text)  # with the sentences that name places at the odd numbers
    for pattern, change in ((NUMBERED, number), (ORDINAL, ordinal), (SIDE, side)):
        pieces[::2] = [pattern.sub(change, piece) for piece in pieces[::2]]
    # Whatever is left of the words of an order was not understood.
    rest = re.sub(rf"{MARK}[^{MARK}]*{MARK}\d*", " ", " ".join(pieces[::2]))
    return None if ORDER_WORDS.search(rest) else "".join(pieces).replace(MARK, "")


def swap(example: Example, other: Example) -> Example | None:
    """The images of each question in reverse order, and what is said of them by their numbers."""
    numbers: dict[int, int] = {}
    for each in example.rounds:
        count, start = sum(map(is_image, each.content)), len(numbers)
        numbers |= {start + place: start + count + 1 - place for place in range(1, count + 1)}
    if all(old == new for old, new in numbers.items()):
        return None
    is_pair = len(numbers) == 2
    rounds = [_swap_round(each, numbers, is_pair) for each in example.rounds]
    return replace(example, rounds=tuple(rounds)) if None not in rounds else None  # type: ignore[arg-type]


def _swap_round(asked: Round, numbers: dict[int, int], is_pair: bool) -> Round | None:
    places = [place for place, block in enumerate(asked.content) if is_image(block)]
    content: list[dict | None] = list(asked.content)
    for place, source in zip(places, reversed(places)):
        content[place] = asked.content[source]
    for place, block in enumerate(asked.content):
        if is_image(block):
            continue
        follows = place + 1 < len(content) and is_image(asked.content[place + 1])
        if follows and LABEL.fullmatch(block["text"]):
            continue  # it numbers the place, not the picture
        text = rename_images(block["text"], numbers, is_pair)
        is_between = bool(places) and places[0] < place < places[-1]
        content[place] = None if text is None or is_between else {**block, "text": text}
    question = " ".join(block["text"] for block in asked.content if not is_image(block))
    choices = [_rename_answer(choice, numbers, is_pair) for choice in asked.choices]
    references = [_swap_reference(each, question, numbers, is_pair, bool(asked.choices)) for each in asked.references]
    if None in content or None in choices or None in references:
        return None
    return replace(asked, content=tuple(content), choices=tuple(choices), references=tuple(references))  # type: ignore


def _swap_reference(
    reference: str, question: str, numbers: dict[int, int], is_pair: bool, has_choices: bool
) -> str | None:
    """A reference after the swap; a number that "which image" asks for is renamed too, if it is the whole answer."""
    bare = reference.strip().strip("().")
    if has_choices and len(bare) == 1 and bare.isalpha():
        return reference  # a letter, whose option is renamed
    if ASKS_WHICH.search(question) and re.search(r"\d", reference) and not NUMBERED.fullmatch(bare):
        known = numbers.get(int(bare)) if bare.isdecimal() else None
        return None if known is None else reference.replace(bare, str(known))
    return _rename_answer(reference, numbers, is_pair)


def _rename_answer(text: str, numbers: dict[int, int], is_pair: bool) -> str | None:
    """A reference or an option; `None` also if it tells a change without saying in which image."""
    renamed = rename_images(text, numbers, is_pair)
    return None if renamed == text and CHANGE_WORDS.search(text) else renamed


def add_distractor(example: Example, other: Example) -> Example | None:
    """An image of another example after the last one; from then on questions name the images that they are about."""
    count, rounds = example.num_images, list(example.rounds)
    last = max((number for number, each in enumerate(rounds) if any(map(is_image, each.content))), default=None)
    if last is None:
        return None
    pairs = pairwise(rounds[last].content)
    if any(is_image(image) and not is_image(label) and OPTION.search(label["text"]) for label, image in pairs):
        return None  # it would stand among images that are options
    about = "image 1" if count == 1 else f"images 1 to {count}"
    for number in range(last, len(rounds)):
        content = list(rounds[number].content)
        words = [place for place, block in enumerate(content) if not is_image(block)]
        if not words or COUNTS_IMAGES.search(" ".join(content[place]["text"] for place in words)):
            return None
        content[words[-1]] = {"type": "text", "text": f"About {about}: {content[words[-1]]['text']}"}
        if number == last:
            place = 1 + max(place for place, block in enumerate(content) if is_image(block))
            content.insert(place, next(_images(other)))
        rounds[number] = replace(rounds[number], content=tuple(content))
    return replace(example, rounds=tuple(rounds))


def use_wrong_images(example: Example, other: Example) -> Example | None:
    """Each image replaced by one of another example, in turn."""
    if example.num_images == 0:
        return None
    pool, rounds, number = [*_images(other)], [], 0
    for each in example.rounds:
        content = []
        for block in each.content:
            content.append(pool[number % len(pool)] if is_image(block) else block)
            number += is_image(block)
        rounds.append(replace(each, content=tuple(content)))
    return replace(example, rounds=tuple(rounds))


def remove_image(example: Example, other: Example) -> Example | None:
    """The last image removed, so that the others keep their numbers; not if it is all that a question has."""
    for number, each in reversed([*enumerate(example.rounds)]):
        places = [place for place, block in enumerate(each.content) if is_image(block)]
        if places:
            content = (*each.content[: places[-1]], *each.content[places[-1] + 1 :])
            rounds = (*example.rounds[:number], replace(each, content=content), *example.rounds[number + 1 :])
            return replace(example, rounds=rounds) if content else None
    return None


def _order_question(is_first: bool) -> Callable[[Example, Example], Example | None]:
    def change(example: Example, other: Example) -> Example | None:
        """Words before the images, or after; not if they stand between images, or nothing would change."""
        rounds = []
        for each in example.rounds:
            if len([*groupby(each.content, key=is_image)]) > 2:
                return None
            content = sorted(each.content, key=lambda block: is_image(block) is is_first)
            rounds.append(replace(each, content=tuple(content)))
        return replace(example, rounds=tuple(rounds)) if tuple(rounds) != example.rounds else None

    return change


def _images(example: Example) -> Iterator[dict]:
    return (block for each in example.rounds for block in each.content if is_image(block))


def perturb(name: str, examples: Sequence[Example]) -> list[Example]:
    """The changed examples, without those that cannot be changed; the other is the next one with other images."""
    perturbation, changed = ROBUSTNESS[name], []
    shown = [{describe_block(block) for block in _images(example)} for example in examples]
    for number, example in enumerate(examples):
        others = (*range(number + 1, len(examples)), *range(number))
        other = next((other for other in others if shown[other] and not shown[other] & shown[number]), None)
        if other is not None or not perturbation.needs_other:
            found = perturbation.change(example, examples[number if other is None else other])
            changed += [] if found is None else [found]
    return changed


MISSED = "what is still right was answered without"
ROBUSTNESS = {
    perturbation.name: perturbation
    for perturbation in (
        Perturbation("swap", "the images of a question in reverse order", swap),
        Perturbation("distractor", "an image of another conversation at the end", add_distractor, needs_other=True),
        Perturbation("wrong_image", f"other images; {MISSED} the right ones", use_wrong_images, needs_other=True),
        Perturbation("removed", f"without the last image; {MISSED} it", remove_image),
        Perturbation("question_first", "the words before the images", _order_question(is_first=True)),
        Perturbation("question_last", "the words after the images", _order_question(is_first=False)),
    )
}
