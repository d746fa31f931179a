"""From the answers of an evaluation to its numbers: scores, intervals, breakdowns and tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..data.image_contents import TRAINING_IMAGES, load_training_images
from ..data.tables import Row, format_markdown, format_table
from .answer_file import ANSWERS, SETTINGS, read_lines, write_whole
from .answering import PLAIN
from .edits import sum_up_tokens
from .judge import Judge
from .metrics import Answer, Metric, find_metrics
from .page import write_page
from .statistics import Mean, ScoredRound, average, break_down, natural_order


RESULTS, TABLE = "metrics.json", "results.md"
TEXT_METRICS = ("exact_match", "contains", "anls", "rouge_l")
WITHOUT_SCORE = dict.fromkeys(TEXT_METRICS, "no question without options has a reference")
WITHOUT_SCORE["cider"] = "it needs two questions without options that have a reference"
HEAD: Row = ("metric", "mean", "95% interval", "rounds", "conversations", "missing")


class ScoredAnswers(NamedTuple):
    """The answers to one variant of a suite with the scores of their rounds, by metric."""

    lines: list[dict]
    scores: dict[str, list[list[float | None]]]

    def has_score(self, metric: str) -> bool:
        """Whether any round has a score."""
        return any(score is not None for scores in self.scores[metric] for score in scores)

    def rounds(self, metric: str) -> list[ScoredRound]:
        """The scored rounds, with what they are broken down by."""
        return [
            ScoredRound(line["key"], score, _parts(line, number))
            for line, scores in zip(self.lines, self.scores[metric])
            for number, score in enumerate(scores)
        ]


def _parts(line: dict, number: int) -> tuple[tuple[str, str], ...]:
    asked = line["rounds"][number]
    parts = [("round", str(number + 1)), ("images", str(asked["num_images"])), *line["groups"].items()]
    return (*parts, *([("step", asked["step"])] if "step" in asked else []))


def score_answers(
    folder: str | Path, metrics: Sequence[str] | None = None, judge: Judge | None = None, page_size: int = 200
) -> dict[str, Any]:
    """
    Scores the answers of a folder again, and writes its `metrics.json`, `results.md` and `index.html`.

    Args:
        folder (`str` or `Path`): The output folder of [`evaluate`].
        metrics (`Sequence[str]`, *optional*): Names in `METRICS`; by default those of the suite.
        judge ([`Judge`], *optional*): For the metric `judge`.
        page_size (`int`, *optional*, defaults to 200): Maximum conversations on the page.

    Returns:
        `dict`: What `metrics.json` holds: `scores` by metric, each with `all`, a breakdown `by` round, number of
        images and group, and `mean_over` the parts that the suite's published score weighs equally; `robustness` by
        name; `tokens` of edits; `trained_on`; and `notes` in sentences.

    Raises:
        `FileNotFoundError`: the folder holds no answers.
        `ValueError`: an unknown metric, or one whose inputs are not among the answers.
    """
    folder = Path(folder)
    if not (folder / ANSWERS).is_file() or not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} holds no {ANSWERS} with {SETTINGS}; name the --output of an evaluation.")
    settings = json.loads((folder / SETTINGS).read_text())
    lines = read_lines(folder / ANSWERS)
    chosen, notes = choose_metrics(metrics, settings["suite_metrics"], judge)
    if any(metric.needs == "options" for metric in chosen) and not settings["scores_options"]:
        raise ValueError(
            f"The answers in {folder} have no log-probabilities of the options; evaluate with these metrics into "
            "another folder."
        )
    verdicts = judge.score(lines, folder) if judge is not None else {}
    variants = {name: _score_variant(lines, name, chosen, verdicts) for name in (PLAIN, *settings["robustness"])}
    plain = variants.pop(PLAIN)
    if not metrics:  # those of a suite are for all kinds of its questions, of which some data have not all
        chosen = [metric for metric in chosen if plain.has_score(metric.name)] or chosen
    num_open = sum(not asked["references"] for line in lines for asked in line["rounds"])
    mean_over = settings.get("mean_over")
    results: dict[str, Any] = {
        "suite": settings["suite"],
        "checkpoint": settings["checkpoint"],
        "metrics": [metric.name for metric in chosen],
        "num_conversations": len(plain.lines),
        "num_rounds": sum(len(line["rounds"]) for line in plain.lines),
        "num_faults": sum("fault" in asked for line in lines for asked in line["rounds"]),
        "scores": {metric.name: break_down(plain.rounds(metric.name), mean_over) for metric in chosen},
        "robustness": {name: _compare(variant, lines, chosen, verdicts) for name, variant in variants.items()},
        "tokens": sum_up_tokens(plain.lines),
        "trained_on": find_trained_images(settings["checkpoint"], lines),
        "judge": judge and {"model": judge.model, "missing": [*verdicts.values()].count(None), "open": num_open},
    }
    results["notes"] = [*notes, *_find_notes(results)]
    write_whole(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / TABLE, format_results(results, as_markdown=True))
    shown = {metric.name: plain.scores[metric.name] for metric in chosen}
    write_page(folder, results, tables(results), plain.lines[:page_size], shown)
    return results


def choose_metrics(
    names: Sequence[str] | None, of_suite: Sequence[str], judge: Judge | None
) -> tuple[list[Metric], list[str]]:
    """The metrics to compute, and what is left out; a `ValueError` for an unknown one, or one that needs a judge."""
    chosen, notes = find_metrics(names or of_suite), []
    if judge is not None and all(metric.name != "judge" for metric in chosen):
        chosen += find_metrics(["judge"])
    if judge is None and any(metric.needs == "judge" for metric in chosen):
        if names:
            raise ValueError("The metric judge needs a judge model; give --judge_url and --judge_model.")
        chosen = [metric for metric in chosen if metric.needs != "judge"]
        notes.append("The metric judge is left out: it needs --judge_url and --judge_model, also with --score_only.")
    return chosen, notes


def _score_variant(lines: list[dict], variant: str, metrics: list[Metric], verdicts: dict) -> ScoredAnswers:
    lines = [line for line in lines if line["variant"] == variant]
    answers = [
        Answer(
            asked["answer"],
            tuple(asked["references"]),
            tuple(asked["choices"]),
            asked["question"],
            tuple(map(tuple, asked.get("option_scores", ()))),
            0.0 if "fault" in asked and asked["references"] else verdicts.get((line["id"], number)),
            asked.get("fault", ""),
        )
        for line in lines
        for number, asked in enumerate(line["rounds"], 1)
    ]
    scores = {}
    for metric in metrics:
        flat = iter(metric.score(answers))
        scores[metric.name] = [[next(flat) for _ in line["rounds"]] for line in lines]
    return ScoredAnswers(lines, scores)


def _compare(variant: ScoredAnswers, lines: list[dict], metrics: list[Metric], verdicts: dict) -> dict[str, Any]:
    """
    The scores of a variant, those of the same conversations as they are, and the difference. The latter are scored
    without the conversations that were left out, which CIDEr would count words in.
    """
    keys = {line["key"] for line in variant.lines}
    num_plain = sum(line["variant"] == PLAIN for line in lines)
    plain = _score_variant([line for line in lines if line["key"] in keys], PLAIN, metrics, verdicts)
    numbers = {line["key"]: number for number, line in enumerate(plain.lines)}
    scores = {}
    for metric in (metric.name for metric in metrics):
        changed = variant.scores[metric]
        same = [plain.scores[metric][numbers[line["key"]]] for line in variant.lines]
        differences = [
            ScoredRound(line["key"], None if new is None or old is None else new - old)
            for line, news, olds in zip(variant.lines, changed, same)
            for new, old in zip(news, olds)
        ]
        means = {
            "plain": average(plain.rounds(metric)),
            "difference": average(differences),
        }
        scores[metric] = break_down(variant.rounds(metric)) | {
            name: None if mean is None else asdict(mean) for name, mean in means.items()
        }
    left_out = num_plain - len(variant.lines)
    return {"num_conversations": len(variant.lines), "num_left_out": left_out, "scores": scores}


def find_trained_images(checkpoint: str, lines: list[dict]) -> dict[str, int] | None:
    """How many of the images are among those that a checkpoint was trained on; `None` if it does not tell."""
    trained = load_training_images(checkpoint)
    if trained is None:
        return None
    shown = {digest for line in lines if line["variant"] == PLAIN for digest in line["images"]}
    return {"num_images": len(shown), "num_trained_on": len(shown & trained)}


def _find_notes(results: dict[str, Any]) -> list[str]:
    notes = []
    trained = results["trained_on"]
    if trained is None:
        notes.append(f"Whether the images were trained on is not known: the checkpoint has no {TRAINING_IMAGES}.")
    elif trained["num_trained_on"]:
        notes.append(f"WARNING: {trained['num_trained_on']:,} of {trained['num_images']:,} images were trained on.")
    if results["num_faults"]:
        notes.append(f"WARNING: {results['num_faults']:,} questions were too long for the model, and have no answer.")
    for metric, score in results["scores"].items():
        if score["all"] is None and metric != "judge":
            notes.append(f"The metric {metric} has no score: {WITHOUT_SCORE.get(metric, 'no question has options')}.")
    if results["judge"] and results["judge"]["open"]:
        notes.append(
            f"The judge was not asked about {results['judge']['open']:,} answers to questions without a reference; "
            "index.html shows them with their images."
        )
    if results["judge"] and results["judge"]["missing"]:
        notes.append(f"WARNING: the judge gave no score to {results['judge']['missing']:,} answers; see judge.jsonl.")
    return notes


def _mean_row(name: str, mean: dict | None, num_missing: int = 0) -> Row:
    if mean is None:
        return (name, "-", "-", 0, 0, num_missing)
    mean_, interval = format_mean(Mean(**mean))
    return (name, mean_, interval, mean["num_rounds"], mean["num_conversations"], num_missing or mean["num_missing"])


def format_mean(mean: Mean) -> tuple[str, str]:
    """A mean and its interval as text."""
    interval = "-" if mean.low is None else f"{mean.low:.3f} to {mean.high:.3f}"
    return f"{mean.mean:.3f}", interval


def _breakdowns(scores: dict[str, dict[str, dict[str, dict]]]) -> dict[str, list[Row]]:
    """A table for each kind of parts, as the number of images: a part a row, a metric a column."""
    found: dict[str, list[Row]] = {}
    for kind in dict.fromkeys(kind for by in scores.values() for kind in by):
        means = {metric: by.get(kind, {}) for metric, by in scores.items()}
        values = sorted({value for parts in means.values() for value in parts}, key=natural_order)
        if len(values) > 1:
            found[f"By {kind}"] = [(kind, "rounds", *(f"{metric} (95% interval)" for metric in means))]
            for value in values:
                of_value = [parts.get(value) for parts in means.values()]
                num_rounds = next(mean["num_rounds"] + mean["num_missing"] for mean in of_value if mean)
                cells = ("-" if mean is None else "{} ({})".format(*format_mean(Mean(**mean))) for mean in of_value)
                found[f"By {kind}"].append((value, num_rounds, *cells))
    return found


def tables(results: dict[str, Any]) -> dict[str, list[Row]]:
    """The tables of a result by their titles."""
    found: dict[str, list[Row]] = {"Scores": [HEAD]}
    for metric, score in results["scores"].items():
        found["Scores"].append(_mean_row(metric, score["all"], score["num_missing"]))
        if "mean_over" in score:
            mean = {**score["mean_over"]}
            name = f"{metric}, mean over {mean.pop('parts')}"
            found["Scores"].append(_mean_row(name, mean, score["num_missing"]))
    found |= _breakdowns({name: score["by"] for name, score in results["scores"].items() if score["all"]})
    rows: list[Row] = [
        ("change", "metric", "mean", "plain", "difference", "95% interval", "conversations", "left out")
    ]
    for name, variant in results["robustness"].items():
        for metric, score in variant["scores"].items():
            if score["all"] and score["difference"]:
                difference, interval = format_mean(Mean(**score["difference"]))
                means = (f"{score['all']['mean']:.3f}", f"{score['plain']['mean']:.3f}", difference, interval)
                rows.append((name, metric, *means, variant["num_conversations"], variant["num_left_out"]))
            else:
                rows.append((name, metric, "-", "-", "-", "-", variant["num_conversations"], variant["num_left_out"]))
    found |= {"Robustness": rows} if len(rows) > 1 else {}
    if results["tokens"]:
        found["Tokens through the decoder before an answer"] = [
            ("step", "steps", "computed", "anew", "share", "same answer"),
            *(
                (kind, row["steps"], row["tokens"], row["tokens_anew"], f"{row['share']:.3f}", f"{row['same']:.3f}")
                for kind, row in results["tokens"].items()
            ),
        ]
    return found


def format_results(results: dict[str, Any], as_markdown: bool = False) -> str:
    """The tables and notes as text."""
    counts = f"{results['num_conversations']:,} conversations, {results['num_rounds']:,} rounds"
    title = f"{results['suite']}, {results['checkpoint']}: {counts}"
    parts = [f"# {title}" if as_markdown else title]
    for name, rows in tables(results).items():
        parts.append(f"## {name}\n\n{format_markdown(rows)}" if as_markdown else f"{name}\n{format_table(rows)}")
    parts += [f"- {note}" if as_markdown else note for note in results["notes"]]
    return "\n\n".join(parts) + "\n"
