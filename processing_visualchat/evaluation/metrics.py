"""
The metrics, one record each: from the answers of all conversations to a score for each, between 0 and 1.

Of questions without options:

    exact_match             the normalized answer is one of the references
    contains                the words of a reference stand in the answer
    anls                    similarity of characters
    rouge_l, cider          overlap of words, by `rouge-score` and `pycocoevalcap` (CIDEr is between 0 and 10)

Of questions with options, which the others leave out:

    choice                  the option that the text of the answer names, by the rules of [`find_choice`]
    choice_likelihood       the option whose text has the highest mean log-probability of a token
    choice_likelihood_sum   the option whose text has the highest log-probability
    letter_likelihood       the letter with the highest log-probability

Of both:

    judge                   the score of a judge model, see `judge.py`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .names import find_name
from .text_matching import anls, find_choice, holds_words, normalize, reference_choice


EXTRA = "pip install 'visualchat[evaluation]'"


@dataclass(frozen=True)
class Answer:
    """The answer to one question, with all that a metric needs."""

    text: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    question: str = ""
    # For each option, the log-probability of its text and the number of tokens, and the log-probability of its letter.
    option_scores: tuple[tuple[float, int, float], ...] = ()
    verdict: float | None = None  # of the judge
    fault: str = ""  # why the model was not asked; such an answer is wrong

    @property
    def texts(self) -> tuple[str, ...]:
        """The references that the text of an answer is compared with: none if it is a choice."""
        return () if self.choices else self.references

    @property
    def right_choices(self) -> set[int]:
        """The numbers of the right options."""
        return {reference_choice(each, self.choices) for each in self.references} - {None}  # type: ignore[return-value]


Scores = list[float | None]  # `None` where a metric does not apply, or has nothing to go by


@dataclass(frozen=True)
class Metric:
    """A way of scoring answers."""

    name: str
    score: Callable[[Sequence[Answer]], Scores]
    needs: str = ""  # "options": log-probabilities of the options; "judge": a judge model


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics with these names; a `ValueError` names the nearest to an unknown one."""
    return [METRICS[find_name(name, METRICS, "metric")] for name in names]


def _of_each(score: Callable[[Answer], float | None]) -> Callable[[Sequence[Answer]], Scores]:
    return lambda answers: [score(answer) for answer in answers]


def _best_reference(score: Callable[[str, str], float]) -> Callable[[Sequence[Answer]], Scores]:
    """The highest score over the references of an answer."""
    return _of_each(lambda answer: max((score(answer.text, each) for each in answer.texts), default=None))


def _is_equal(answer: str, reference: str) -> float:
    return float(normalize(answer) == normalize(reference))


def _is_within(answer: str, reference: str) -> float:
    return float(holds_words(normalize(answer), normalize(reference)))


def _choose(choose: Callable[[Answer], int | None]) -> Callable[[Sequence[Answer]], Scores]:
    """Whether the chosen option is a right one, of answers to a question with options."""

    def score(answer: Answer) -> float | None:
        return float(choose(answer) in answer.right_choices) if answer.right_choices else None

    return _of_each(score)


def _likeliest(value: Callable[[tuple[float, int, float]], float]) -> Callable[[Sequence[Answer]], Scores]:
    def choose(answer: Answer) -> int | None:
        values = [value(scores) for scores in answer.option_scores]
        return values.index(max(values)) if values else None

    score = _choose(choose)
    return lambda answers: [
        each if answer.option_scores or answer.fault else None for each, answer in zip(score(answers), answers)
    ]


def _score_rouge(answers: Sequence[Answer]) -> Scores:
    """The F-measure of ROUGE-L (Lin, 2004) without stemming, of the best reference."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"The metric rouge_l needs rouge-score: {EXTRA}") from error
    scorer = RougeScorer(["rougeL"])
    return [
        scorer.score_multi(answer.texts, answer.text)["rougeL"].fmeasure if answer.texts else None
        for answer in answers
    ]


def _score_cider(answers: Sequence[Answer]) -> Scores:
    """
    CIDEr-D (Vedantam et al., 2015); how rare words are is counted in the references of all answers, so that a single
    answer has no score. Words are those of [`normalize`], not of the Penn Treebank tokenizer, which needs Java: scores
    differ slightly from published ones.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ImportError(f"The metric cider needs pycocoevalcap: {EXTRA}") from error
    numbers = [number for number, answer in enumerate(answers) if answer.texts]
    references = {number: [normalize(text) for text in answers[number].texts] for number in numbers}
    scores: Scores = [None] * len(answers)
    if len(numbers) > 1:
        _, found = Cider().compute_score(references, {number: [normalize(answers[number].text)] for number in numbers})
        for number, score in zip(numbers, found):
            scores[number] = float(score)
    return scores


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", _best_reference(_is_equal)),
        Metric("contains", _best_reference(_is_within)),
        Metric("choice", _choose(lambda answer: find_choice(answer.text, answer.choices))),
        Metric("choice_likelihood", _likeliest(lambda scores: scores[0] / scores[1]), needs="options"),
        Metric("choice_likelihood_sum", _likeliest(lambda scores: scores[0]), needs="options"),
        Metric("letter_likelihood", _likeliest(lambda scores: scores[2]), needs="options"),
        Metric("anls", _best_reference(anls)),
        Metric("rouge_l", _score_rouge),
        Metric("cider", _score_cider),
        Metric("judge", _of_each(lambda answer: answer.verdict), needs="judge"),
    )
}
