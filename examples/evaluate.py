"""
Evaluates a checkpoint on a suite of conversations.

    python examples/evaluate.py CHECKPOINT --suite blink --output blink-results
    python examples/evaluate.py CHECKPOINT --suite jsonl --data test.jsonl --robustness swap,wrong_image --update_card
    python examples/evaluate.py CHECKPOINT --suite mmdu --judge_url http://localhost:8000/v1 --judge_model NAME
    python examples/evaluate.py --score_only --output blink-results --metrics exact_match

With several processes: `accelerate launch --multi_gpu examples/evaluate.py …` on GPUs, and on a CPU
`torchrun --nproc_per_node 2 examples/evaluate.py …`. A second start with the same flags continues. The output folder
gets `answers.jsonl`, `metrics.json`, `results.md` and `index.html`; `--update_card` adds the results to the model card
of the checkpoint, a folder.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from accelerate import PartialState

from processing_visualchat.evaluation import (
    METRICS,
    ROBUSTNESS,
    SUITES,
    Judge,
    evaluate,
    format_results,
    score_answers,
    update_card,
)
from processing_visualchat.evaluation.card import find_checkpoint_folder


# Flags that are arguments of `evaluate`.
OPTIONS = ("history", "max_new_tokens", "temperature", "top_p", "seed", "limit", "batch_size", "robustness")


def names(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder or name of a checkpoint")
    parser.add_argument("--suite", help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--data", help="file or folder of the suite, or its name on the Hub")
    parser.add_argument("--output", default="visualchat-evaluation", help="folder for answers and results")
    parser.add_argument(
        "--metrics", type=names, help=f"by default the suite's; names, with commas, of {', '.join(METRICS)}"
    )
    parser.add_argument("--robustness", type=names, default=[], help=f"names of {', '.join(ROBUSTNESS)}")
    parser.add_argument("--history", default="own", help="earlier answers that a round sees: own or references")
    parser.add_argument("--max_new_tokens", type=int, help="maximum tokens of an answer; by default the suite's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy answers")
    parser.add_argument("--top_p", type=float, default=1.0, help="probability mass that is sampled from")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled answers")
    parser.add_argument("--limit", type=int, help="only the first so many conversations")
    parser.add_argument("--batch_size", type=int, default=8, help="conversations that are answered together")
    parser.add_argument("--judge_url", help="OpenAI-compatible address of a judge model; its key is in OPENAI_API_KEY")
    parser.add_argument("--judge_model", help="name of the judge model there")
    parser.add_argument("--page_size", type=int, default=200, help="maximum conversations on the page")
    parser.add_argument("--score_only", action="store_true", help="score the answers in --output again")
    parser.add_argument("--update_card", action="store_true", help="add the results to the checkpoint's model card")
    return parser


def run(arguments: Namespace) -> dict:
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        raise ValueError("--judge_url and --judge_model require each other.")
    judge = Judge(arguments.judge_url, arguments.judge_model) if arguments.judge_url else None
    if arguments.score_only:
        return score_answers(arguments.output, arguments.metrics, judge, arguments.page_size)
    if arguments.checkpoint is None or arguments.suite is None:
        raise ValueError("A checkpoint and --suite are required, or --score_only.")
    if arguments.update_card:
        find_checkpoint_folder(arguments.checkpoint)
    options = {name: getattr(arguments, name) for name in OPTIONS}
    return evaluate(
        arguments.checkpoint, arguments.suite, arguments.data, arguments.output,
        metrics=arguments.metrics, judge=judge, page_size=arguments.page_size, **options,
    )  # fmt: skip


def main() -> None:
    arguments = make_parser().parse_args()
    try:
        results = run(arguments)
        is_main = PartialState().is_main_process
        if is_main and arguments.update_card:
            print(f"The model card: {update_card(arguments.output, arguments.checkpoint)}")
    except (OSError, ValueError, ImportError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if is_main:
        print(f"{format_results(results)}\nThe page: {arguments.output}/index.html")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
