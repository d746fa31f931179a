"""How the text of an answer is compared with a reference or with the options of a choice."""

import re
import string
from collections.abc import Sequence


ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
LETTER_A = "lettera"
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_<>@`,?!:*#~|]|(?<=\S)-|-(?!\d)""")

# How an answer names an option by its letter, the surest form first. `{letters}` are those of the options.
LETTER_FORMS = (
    r"\s*[(\[]?([{letters}{small}])[)\]]?\s*[.:,)]?\s*",  # the whole answer: "B", "(b)", "B."
    r"\s*[(\[]?([{letters}{small}])\s*[)\]](?!.*[(\[][{letters}][)\]]).*",  # at its beginning: "B) a cat"
    r"\s*([{letters}])\s*[.:,](?:\s.*|)",  # "B. a cat", "B: a cat"
)
LETTER_AFTER = r"(?i:\b(?:answer|option|choice)\b)(?:\s+is)?\s*:?\s*[*(\[]*([{letters}])(?![\w'])"  # "the answer is B"
LETTER_IN_PARENTHESES = r"[(\[]([{letters}])[)\]]"
PRONOUN_OR_ARTICLE = re.compile(r"\bI\b|^\s*A\s+(?!(?:and|or)\b)")
LETTER_ALONE = r"(?<![\w'])([{letters}])(?![\w'])"


def normalize(text: str) -> str:
    """
    Text in the form that exact match compares, after the evaluation of VQA (Antol et al., 2015): lower case, without
    articles and punctuation (a decimal point and a minus sign stay), words for the numbers up to twenty as digits, and
    "none" as 0. Text of nothing else keeps its articles, or else its punctuation ("A", "+").

    ```python
    >>> normalize("There are Two cats, on the 1,000.5 m²!")
    'there are 2 cats on 1000.5 m²'
    ```
    """
    bare = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower())
    bare = re.sub(r"(?<!\d)\.|\.(?!\d)|['’]", "", bare)  # noqa: RUF001, an apostrophe as it is typeset
    words = PUNCTUATION.sub(" ", bare).split()
    kept = [word for word in words if word not in ARTICLES] or words or text.lower().split()
    return " ".join(DIGITS.get(word, word) for word in kept)


def _normalize_option(text: str) -> str:
    """As [`normalize`], but an A that is no article stays: it ends a text, or is a capital within it ("Point A")."""
    return normalize(re.sub(r"(?<=\w)(\W+)(?:A\b|a\W*$)", rf"\1{LETTER_A}", text))


def holds_words(text: str, words: str) -> bool:
    """Whether normalized words stand next to each other in normalized text."""
    return bool(words) and f" {words} " in f" {text} "


def find_choice(answer: str, choices: Sequence[str]) -> int | None:
    """
    The number of the option that an answer names; `None` if it names none, or more than one. The first rule that
    applies decides:

    1. The answer is a letter ("B", "(b)", "B."), or begins with one and a mark ("B) a cat", "B. a cat").
    2. A letter follows the words answer, option or choice ("the answer is (B)"); the last such letter counts.
    3. The answer is the text of one option, both normalized.
    4. One letter is in parentheses ("I choose (B)").
    5. The text of one option stands in the answer as whole words; a text within a longer one that stands there too
       does not count ("cat" in "black cat").
    6. One capital letter stands by itself; not the article A at the beginning, nor the pronoun I.
    """
    if not answer.strip():
        return None
    letters = string.ascii_uppercase[: len(choices)]
    for form in LETTER_FORMS:
        if match := re.fullmatch(_fill(form, letters), answer, re.DOTALL):
            return letters.index(match[1].upper())
    if after := re.findall(_fill(LETTER_AFTER, letters), answer):
        return letters.index(after[-1])
    text, options = _normalize_option(answer), [_normalize_option(choice) for choice in choices]
    if options.count(text) == 1:
        return options.index(text)
    if len(found := {*re.findall(_fill(LETTER_IN_PARENTHESES, letters), answer)}) == 1:
        return letters.index(found.pop())
    named = [option for option in options if holds_words(text, option)]
    if named:
        longest = [option for option in named if not any(holds_words(each, option) for each in {*named} - {option})]
        return options.index(longest[0]) if len(longest) == 1 else None
    found = {*re.findall(_fill(LETTER_ALONE, letters), PRONOUN_OR_ARTICLE.sub(" ", answer))}
    return letters.index(found.pop()) if len(found) == 1 else None


def _fill(form: str, letters: str) -> str:
    return form.replace("{letters}", letters).replace("{small}", letters.lower())


def reference_choice(reference: str, choices: Sequence[str]) -> int | None:
    """The option that a reference stands for, a letter or the text of an option."""
    letter = reference.strip().strip("().").upper()
    if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
        return string.ascii_uppercase.index(letter)
    options = [normalize(choice) for choice in choices]
    return options.index(normalize(reference)) if normalize(reference) in options else None


def edit_distance(first: str, second: str) -> int:
    """The Levenshtein distance: the characters to insert, delete or replace."""
    previous = list(range(len(second) + 1))
    for row, char in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (char != other)))
        previous = current
    return previous[-1]


def anls(answer: str, reference: str) -> float:
    """The normalized Levenshtein similarity of ST-VQA (Biten et al., 2019): 0 from half of the characters on."""
    answer, reference = (" ".join(text.lower().split()) for text in (answer, reference))
    longest = max(len(answer), len(reference))
    distance = edit_distance(answer, reference) / longest if longest else 0.0
    return 1.0 - distance if distance < 0.5 else 0.0
