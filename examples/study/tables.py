"""
Makes the tables and figures of the study, only from a CSV.

    python examples/study/tables.py                     # prints tables, writes results.md and results.png
    python examples/study/tables.py --input pretrained.csv --output DIR     # pretrained.md and pretrained.png
"""

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from picture_tasks import TASKS as PICTURE_TASKS
from picture_tasks import TESTS as PICTURE_TESTS
from scipy import stats
from tasks import TASKS


FOLDER = Path(__file__).parent
BASELINE, FLOOR = "causal", "text only"
CONFIDENCE = 0.95
# The tasks of run.py by what they ask for, and those of pretrained.py by images and by what is held out.
GROUPS: dict[str, tuple[str, ...]] = {
    "one or two images": ("single", "larger", "sum"),
    "binding": ("same", "largest", "count"),
    "pointers": ("two hops", "three hops"),
    "images apart": ("apart", "distractors"),
}
SINGLE = ("name", "kind")
GROUPS |= {
    "one picture": tuple(name for name, (task, _) in PICTURE_TESTS.items() if task in SINGLE),
    "several pictures": tuple(name for name, (task, _) in PICTURE_TESTS.items() if task not in SINGLE),
}
GROUPS |= {
    f"unseen {held_out}": tuple(name for name, (_, split) in PICTURE_TESTS.items() if split == of)
    for of, held_out in (("test", "pictures"), ("concept", "concepts"), ("style", "style"))
}
SHARES = (0.5, 0.9)  # of the best arm's final accuracy, at which data efficiency is read

Rows = list[dict[str, str]]
Measure = Callable[[dict], float]


def read_rows(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def arms_of(rows: Rows) -> list[str]:
    """In the order of their first line."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def by_seed(rows: Rows, arm: str, value: Measure) -> dict[int, float]:
    return {int(row["seed"]): value(row) for row in rows if row["arm"] == arm}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval by Student's t; not a number where there are too few values."""
    if len(values) < 2:
        return values[0] if values else float("nan"), float("nan")
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / len(values) ** 0.5)


def difference(rows: Rows, arm: str, value: Measure, baseline: str = BASELINE) -> tuple[float, float]:
    """Mean difference to the baseline over the seeds of both, and half the width of its interval."""
    ours, theirs = by_seed(rows, arm, value), by_seed(rows, baseline, value)
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def tasks_of(rows: Rows) -> list[str]:
    """The tasks that a CSV has results of."""
    return [task for task in CHANCES if task in rows[0]]


def curves_of(rows: Rows) -> list[str]:
    """The tasks that it has learning curves of."""
    return [task for task in tasks_of(rows) if f"{task}, curve" in rows[0]]


def accuracy(*tasks: str) -> Measure:
    """The mean over tasks."""
    return lambda row: sum(float(row[task]) for task in tasks) / len(tasks)


def measures(rows: Rows) -> dict[str, Measure]:
    """What arms are compared by: the mean over all tasks, and each task."""
    tasks = tasks_of(rows)
    return {"all tasks": accuracy(*tasks), **{task: accuracy(task) for task in tasks}}


def chance(task) -> float:
    """The accuracy of guesses among the possible answers, all sizes being as likely."""
    return sum(1 / task.num_answers(size) for size in task.sizes) / len(task.sizes)


# Of the tasks of run.py and of pretrained.py.
CHANCES = {name: chance(task) for name, task in TASKS.items()} | {
    name: chance(PICTURE_TASKS[task]) for name, (task, _) in PICTURE_TESTS.items()
}


def curve(row: dict, task: str) -> tuple[list[int], list[float]]:
    """Conversations seen, and the accuracy after them; chance is not subtracted."""
    return [int(point) for point in row["points"].split(";")], [float(x) for x in row[f"{task}, curve"].split(";")]


def spent_to(row: dict, task: str, accuracy: float, spent: str = "points") -> float:
    """Conversations or `"seconds"` spent when a curve first reaches an accuracy; infinite if it does not."""
    _, values = curve(row, task)
    points = [float(point) for point in row[spent].split(";")]
    for index, value in enumerate(values):
        if value >= accuracy:
            if index == 0:
                return points[0]
            share = (accuracy - values[index - 1]) / (value - values[index - 1])
            return points[index - 1] + share * (points[index] - points[index - 1])
    return float("inf")


def summary_table(rows: Rows) -> list[list[str]]:
    """
    An arm a row: the mean over the tasks of a group and over seeds, and over all tasks with its interval; and chance,
    where there is no floor.
    """
    tasks = tasks_of(rows)
    groups = {name: group for name, group in GROUPS.items() if set(group) <= set(tasks)}
    table = [["arm", *groups, "all tasks", "over causal, points"]]
    if FLOOR not in arms_of(rows):
        means = (sum(CHANCES[task] for task in each) / len(each) for each in (*groups.values(), tasks))
        table.append(["chance", *(f"{mean:.0%}" for mean in means), ""])
    for arm in arms_of(rows):
        cells = [f"{interval(list(by_seed(rows, arm, accuracy(*each)).values()))[0]:.0%}" for each in groups.values()]
        cells.append(format_accuracy(rows, arm, accuracy(*tasks)))
        cells.append("" if arm in (BASELINE, FLOOR) else format_difference(rows, arm, accuracy(*tasks)))
        table.append([arm, *cells])
    return table


def format_accuracy(rows: Rows, arm: str, value: Measure) -> str:
    mean, half = interval(list(by_seed(rows, arm, value).values()))
    return f"{mean:.1%}" if np.isnan(half) else f"{mean:.1%} ± {half:.1%}"


def format_difference(rows: Rows, arm: str, value: Measure) -> str:
    """Percentage points over causal attention; in bold where the interval excludes zero."""
    mean, half = difference(rows, arm, value)
    text = f"{100 * mean:+.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")
    return f"**{text}**" if abs(mean) > half else text


def accuracy_table(rows: Rows) -> list[list[str]]:
    table = [["task", "chance", *arms_of(rows)]]
    chances = {task: CHANCES[task] for task in tasks_of(rows)}
    chances["all tasks"] = sum(chances.values()) / len(chances)
    for name, value in measures(rows).items():
        table.append([name, f"{chances[name]:.1%}", *(format_accuracy(rows, arm, value) for arm in arms_of(rows))])
    return table


def difference_table(rows: Rows) -> list[list[str]]:
    arms = [arm for arm in arms_of(rows) if arm not in (BASELINE, FLOOR)]
    measured = measures(rows).items()
    return [
        ["task", *arms],
        *([name, *(format_difference(rows, arm, value) for arm in arms)] for name, value in measured),
    ]


def efficiency_table(rows: Rows) -> list[list[str]]:
    """Thousands of conversations, and CPU seconds, to a share of the best arm's final accuracy: median over seeds."""
    arms = [arm for arm in arms_of(rows) if arm != FLOOR]
    table = [["task, accuracy", *arms]]
    for task in curves_of(rows):
        best = max(interval(list(by_seed(rows, arm, accuracy(task)).values()))[0] for arm in arms)
        for share in SHARES:
            cells = []
            for arm in arms:
                of_arm = [row for row in rows if row["arm"] == arm]
                conversations, seconds = (
                    float(np.median([spent_to(row, task, share * best, spent) for row in of_arm]))
                    for spent in ("points", "seconds")
                )
                is_reached = np.isfinite(conversations)
                cells.append(f"{conversations / 1000:.1f}, {seconds:.0f} s" if is_reached else "not reached")
            table.append([f"{task}, {share * best:.0%}", *cells])
    return table


def cost_table(rows: Rows) -> list[list[str]]:
    columns = {
        "learning rate": ("learning_rate", "{:g}"),
        "parameters": ("parameters", "{:,.0f}"),
        "trained": ("trained_parameters", "{:,.0f}"),
        "CPU s of training": ("cpu_seconds", "{:.0f}"),
        "peak MiB, libraries apart": ("peak_mebibytes", "{:,.0f}"),
        "known images over new ones, time": ("second_question_over_first", "{:.2f}"),
    }
    columns = {name: column for name, column in columns.items() if column[0] in rows[0]}
    table = [["arm", "seeds", *columns]]
    for arm in arms_of(rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        medians = (form.format(np.median([float(row[key]) for row in of_arm])) for key, form in columns.values())
        table.append([arm, str(len(of_arm)), *medians])
    return table


def format_table(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def format_report(rows: Rows) -> str:
    sections = {
        "Summary": (
            summary_table,
            "Exact match on held-out images after the last step, mean over seeds; ± 95% intervals, of the difference "
            "paired over seeds, in bold where it excludes zero.",
        ),
        "Accuracy": (
            accuracy_table,
            "Exact match on held-out images after the last step: mean over seeds ± 95% interval.",
        ),
        "Difference to causal attention": (
            difference_table,
            "Percentage points, paired over seeds ± 95% interval; in bold where the interval excludes zero.",
        ),
        "Data efficiency": (
            efficiency_table,
            "Thousands of conversations, and CPU seconds of training, to half and nine tenths of the best arm's final "
            "accuracy: median over seeds.",
        ),
        "Cost": (cost_table, "Median over the seeds of each arm; one thread."),
    }
    parts = [f"## {name}\n\n{caption}\n\n{format_table(make(rows))}" for name, (make, caption) in sections.items()]
    return "\n\n".join(["# Results of the study", *parts]) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Learning curves of each task, a line and a band of one standard deviation for each arm; chance is dashed."""
    matplotlib.use("Agg")
    tasks = curves_of(rows)
    figure, axes = pyplot.subplots(2, (len(tasks) + 1) // 2, figsize=(16, 6), sharex=True, sharey=True)
    for axis, task in zip(axes.flat, tasks):
        for arm in arms_of(rows):
            curves = [curve(row, task) for row in rows if row["arm"] == arm]
            values = np.array([accuracies for _, accuracies in curves])
            points, mean = np.array(curves[0][0]) / 1000, values.mean(axis=0)
            axis.plot(points, mean, label=arm, linestyle=":" if arm == FLOOR else "-")
            axis.fill_between(points, mean - values.std(axis=0), mean + values.std(axis=0), alpha=0.15)
        axis.axhline(CHANCES[task], color="black", linewidth=0.8, linestyle="--")
        axis.set_title(task)
    figure.supxlabel("thousands of conversations seen")
    figure.supylabel("exact match on held-out images")
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=FOLDER / "results.csv", help="CSV of finished runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables and figures")
    arguments = parser.parse_args()
    if not arguments.input.exists():
        parser.error(f"there is no {arguments.input}; run.py and pretrained.py write it")
    rows = read_rows(arguments.input)
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = format_report(rows)
    (arguments.output / f"{arguments.input.stem}.md").write_text(report)
    draw(rows, arguments.output / f"{arguments.input.stem}.png")
    print(report)


if __name__ == "__main__":
    main()
