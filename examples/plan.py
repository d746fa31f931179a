"""
Says what a training run needs, before a GPU is rented: memory of a device for each way to spread it, hours, and the
cheapest way that fits. It needs no GPU and no weights.

    python examples/plan.py examples/configs/visualchat_7b.yaml --gpus 8 --gpu-memory 80
    python examples/plan.py RECIPE.yaml --model CHECKPOINT --data_root data --gpus 8 --gpu-memory 80
    python examples/plan.py --parameters examples/configs/models/*.json

The model is built without memory, and a training step runs on it with shapes only: activations are those of the code
that trains. The batch is the largest one, rows of max_length tokens with as many images as the mixture allows and a
loss on all text; hours are those of the mean conversation, which is read from the mixture where it is there. With
--parameters, only the parameters of models are counted: of recipes, configurations or checkpoints.
"""

import json
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from finetune import FinetuneArguments
from planning.hours import Machine, Mixture
from planning.models import count_parameters, read_config
from planning.plans import GIB, Plan, Planner, advise
from planning.step_memory import Batch
from training_arguments import parse_recipe
from transformers import AutoProcessor

from configuration_visualchat import VisualChatConfig
from processing_visualchat import load_mixture, measure_lengths, read_mixture_config


# Conversations to train on, nine tenths of those in table 1 of arXiv 2309.14327, by the name of the mixture's file.
PUBLISHED = {"paper_set1": 194_545, "paper_set2": 200_413}
COLUMNS = ("weights", "gradients", "optimizer", "activations", "images", "buffers", "total", "host", "NVMe")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and every default."""


def main() -> None:
    options = parse_options()
    if options.parameters:
        return print(tabulate_counts(options.recipes))
    machine = Machine(options.gpus, options.tflops, options.utilisation, options.link, options.pcie, options.nvme)
    limit = (options.gpu_memory - options.reserved) * GIB
    for path in options.recipes:
        names = ("model", "data_root", "max_length", "per_device_train_batch_size")
        overrides = {name: getattr(options, name) for name in names if hasattr(options, name)}
        arguments, training_arguments, deepspeed = parse_recipe(path, FinetuneArguments, overrides)
        config = read_config(arguments)
        batch = largest_batch(config, arguments, training_arguments, options.images)
        deepspeed = None if deepspeed is None else json.loads(Path(deepspeed).read_text())
        planner = Planner(config, arguments, training_arguments, batch, deepspeed)
        mixture = mean_conversation(arguments, batch, options)
        plans = planner.plans(machine, mixture)
        if not options.advice:
            print(describe(path, planner, mixture, options))
            print(f"{tabulate_plans(plans, limit)}\n")
        print(f"{advise(planner, plans, machine, mixture, limit)}".replace("RECIPE", str(path)))


def parse_options():
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, help="recipes, YAML files of finetune.py's --config")
    parser.add_argument("--parameters", action="store_true", help="only count the parameters")
    parser.add_argument("--advice", action="store_true", help="print the advice without the table")
    parser.add_argument("--gpus", type=int, default=8, help="number of devices")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="memory of a device in GiB")
    parser.add_argument("--reserved", type=float, default=4.0, help="GiB of it for CUDA, NCCL and fragments")
    parser.add_argument("--tflops", type=float, default=312.0, help="peak of a device, 10^12 operations per second")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--link", type=float, default=200.0, help="10^9 bytes per second between devices")
    parser.add_argument("--pcie", type=float, default=20.0, help="10^9 bytes per second between device and host")
    parser.add_argument("--nvme", type=float, default=3.0, help="10^9 bytes per second of NVMe for a device")
    for name, kind, text in (
        ("model", str, "checkpoint or configuration, instead of the recipe's"),
        ("data_root", str, "folder of the mixture's data sets, to measure its conversations"),
        ("max_length", int, "tokens of a row, instead of the recipe's"),
        ("per_device_train_batch_size", int, "rows of a micro-batch, instead of the recipe's"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=SUPPRESS, help=text)
    for name, text in (
        ("images", "images of a row; by default as many as the mixture allows, or 8"),
        ("conversations", "conversations of the mixture, if it is not there to be read"),
        ("text-tokens", "text tokens of the mean conversation, likewise"),
        ("mean-images", "images of the mean conversation, likewise"),
    ):
        parser.add_argument(f"--{name}", type=float, help=text)
    return parser.parse_args()


def tabulate_counts(paths: list[Path]) -> str:
    """A table of the parameters of models, by part."""
    rows = []
    for path in paths:
        is_recipe = path.suffix in (".yaml", ".yml")
        config = read_config(parse_recipe(path, FinetuneArguments, {})[0]) if is_recipe else None
        rows.append((path.stem, count_parameters(config or VisualChatConfig.from_pretrained(path))))
    lines = [f"| model | {' | '.join(rows[0][1])} |", "|---" * (1 + len(rows[0][1])) + "|"]
    lines += [f"| {name} | {' | '.join(f'{number:,}' for number in counts.values())} |" for name, counts in rows]
    return "\n".join(lines)


def largest_batch(config: VisualChatConfig, arguments, training_arguments, images: float | None) -> Batch:
    """The micro-batch of a device that needs the most memory: images, and text up to the maximum length."""
    length = arguments.max_length or config.text_config.max_position_embeddings
    if images is None:
        images = read_mixture_config(arguments.mixture).max_images if arguments.mixture else 8
    number = min(int(images), (length - 1) // config.image_seq_length)
    text_tokens = length - number * config.image_seq_length
    return Batch(training_arguments.per_device_train_batch_size, text_tokens, number)


def mean_conversation(arguments, batch: Batch, options) -> Mixture:
    """The conversations of a recipe: as its mixture has them, as the options say, or as the largest batch has them."""
    if arguments.mixture and arguments.data_root and Path(arguments.data_root).is_dir() and arguments.model:
        processor = AutoProcessor.from_pretrained(arguments.model)
        mixture = load_mixture(read_mixture_config(arguments.mixture), arguments.data_root, False, processor)
        measured = measure_lengths(mixture.train, processor).with_format("numpy")
        images = float(measured["num_images"][:].mean())
        text_tokens = float(measured["length"][:].mean()) - images * processor.image_seq_length
        return Mixture(len(measured), text_tokens, images)
    name = Path(arguments.mixture).stem if arguments.mixture else ""
    text_tokens = batch.text_tokens if options.text_tokens is None else options.text_tokens
    images = batch.images if options.mean_images is None else options.mean_images
    return Mixture(int(options.conversations or PUBLISHED.get(name, 1000)), text_tokens, images)


def describe(path: Path, planner: Planner, mixture: Mixture, options) -> str:
    """The model and what is assumed, in Markdown."""
    parameters, batch = planner.parameters, planner.batch
    return f"""\
# {path.stem}

{parameters.total:,} parameters, {parameters.trained:,} trained ({parameters.trained / parameters.total:.2%}), \
{parameters.total - parameters.trained:,} frozen.

- Micro-batch of a device: {batch.rows} x ({batch.text_tokens:,} text tokens + {batch.images} images of \
{planner.config.image_seq_length}), {planner.micro_batches} to an optimizer step.
- {mixture.conversations:,} conversations of {mixture.text_tokens:,.0f} text tokens and {mixture.images:.1f} images, \
{planner.epochs:g} epochs. Hours are for these; --data_root measures them, and --conversations, --text-tokens and \
--mean-images set them.
- {options.gpus} devices with {options.gpu_memory:g} GiB, {options.reserved:g} of them for CUDA, NCCL and fragments, \
and {options.tflops:g} TFLOP/s, of which {options.utilisation:.0%} are reached.
"""


def tabulate_plans(plans: list[Plan], limit: float) -> str:
    """The memory of a device in GiB for every plan."""
    header = ["strategy", "checkpointing", *COLUMNS, "hours", "fits"]
    rows = []
    for plan in plans:
        memory = plan.memory
        numbers = (
            memory.weights, memory.gradients, memory.optimizer, memory.activations, plan.images, memory.buffers,
            memory.total, memory.host, memory.nvme,
        )  # fmt: skip
        cells = [f"{number / GIB:.1f}" for number in numbers]
        is_fit = "yes" if plan.fits(limit) else "no"
        rows.append([plan.strategy.name, "yes" if plan.checkpoints else "no", *cells, f"{plan.hours:.1f}", is_fit])
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    main()
