"""
Trains a VisualChat model with HF Trainer.

The embedded default, a tiny model that learns to read handwritten digits in a few minutes on a CPU:

    accelerate launch examples/finetune.py

Your own conversations (JSON lines, see README) on a checkpoint, which `examples/join.py` makes of any two parts:

    accelerate launch examples/finetune.py --config examples/configs/finetune.yaml \\
        --model CHECKPOINT --train_file train.jsonl --eval_file eval.jsonl --output_dir OUTPUT

A mixture of published data sets, see examples/configs/paper_set1.yaml:

    accelerate launch examples/finetune.py --config examples/configs/finetune.yaml \\
        --model CHECKPOINT --mixture examples/configs/paper_set1.yaml --data_root DATA --output_dir OUTPUT

Every field of TrainingArguments is a flag and a key of the configuration file; a flag wins. With DeepSpeed:

    accelerate launch --use_deepspeed --num_processes 2 examples/finetune.py --deepspeed examples/configs/zero3.json
"""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from digits import DigitConversations, build_model, load_scans
from digits_report import report
from finetune_data import arrange, leave_out_overlong, load_data
from transformers import AutoProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_visualchat import VisionFeatureCache, VisualChatForConditionalGeneration
from processing_visualchat import OVERLONG, DataCollatorForVisualChat


DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class FinetuneArguments:
    """What `TrainingArguments` does not cover."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint to train; without one, the tiny digits model."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Conversations: .jsonl, .json, .parquet or a folder; without, the digits."}
    )
    mixture: str | None = field(
        default=None, metadata={"help": "YAML file of a mixture of published data sets, instead of a train_file."}
    )
    data_root: str | None = field(
        default=None, metadata={"help": "The folder under which its data sets lie; by default as the mixture says."}
    )
    overlong: str = field(
        default="error",
        metadata={"help": "What becomes of a conversation of more than max_length tokens.", "choices": list(OVERLONG)},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack conversations into rows of max_length tokens; a batch then counts packs."},
    )
    max_broken: int = field(
        default=100,
        metadata={"help": "How many conversations with broken images are left out, by each rank, before an error."},
    )
    eval_file: str | None = field(default=None, metadata={"help": "Conversations to evaluate on, as train_file."})
    attention_type: str | None = field(
        default=None, metadata={"help": "Of the digits model; mmca by default.", "choices": ["mmca", "causal"]}
    )
    projector_type: str | None = field(
        default=None,
        metadata={"help": "Of the digits model; linear by default.", "choices": ["linear", "mlp", "vit"]},
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of a checkpoint that learn, by default multi_modal_projector and input_embeddings; also "
            "vision_tower, language_model, lm_head. Of the digits model everything learns."
        },
    )
    vision_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps what the frozen vision tower makes of images, for later epochs and runs."
        },
    )
    vision_features_gib: float = field(default=64.0, metadata={"help": "The most that this folder holds."})
    cpu_threads: int = field(default=0, metadata={"help": "Threads of each process on a CPU; 0 shares out all cores."})
    max_length: int | None = field(default=None, metadata={"help": "The most tokens a conversation may have."})
    check_images: bool = field(default=True, metadata={"help": "Open every image of the data files before training."})


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and every default."""


class ArgumentParserOfTraining(HfArgumentParser):
    """Says what is wrong without listing some hundred flags before it."""

    def error(self, message: str):
        raise SystemExit(f"finetune.py: error: {message} (see --help)")


def parse_arguments(argv: list[str]) -> tuple[FinetuneArguments, TrainingArguments]:
    """Flags over the configuration file over the defaults of the two classes."""
    config_parser = ArgumentParser(add_help=False)
    config_parser.add_argument("--config", type=Path, help="YAML file of arguments; flags win over it.")
    known, flags = config_parser.parse_known_args(argv)
    parser = ArgumentParserOfTraining(
        (FinetuneArguments, TrainingArguments),
        parents=[config_parser],
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    is_default = known.config is None and not any(
        flag.split("=")[0] in ("--model", "--train_file", "--mixture") for flag in flags
    )
    config_path = DIGITS_CONFIG if is_default else known.config
    defaults = {} if torch.accelerator.is_available() else {"use_cpu": True}
    if config_path is not None:
        if not config_path.is_file():
            parser.error(f"no configuration file at {config_path}")
        defaults |= yaml.safe_load(config_path.read_text()) or {}
    if unknown := sorted(defaults.keys() - {action.dest for action in parser._actions}):
        parser.error(f"{config_path} has the unknown argument {', '.join(unknown)}")
    parser.set_defaults(**defaults)
    if any(flag.split("=")[0] == "--deepspeed" for flag in flags) or defaults.get("deepspeed"):
        prepare_deepspeed(defaults.get("use_cpu", False) or "--use_cpu" in flags)
    arguments, training_arguments = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)[:2]
    if training_arguments.label_smoothing_factor:
        parser.error(
            "label_smoothing_factor is not supported: for models of this kind, Trainer's label smoothing compares "
            "each token with itself instead of the next one; leave it at 0"
        )
    if arguments.mixture is not None and (arguments.train_file or arguments.eval_file):
        parser.error("--mixture has data to train and to evaluate on; leave out --train_file and --eval_file")
    if arguments.mixture is None and arguments.data_root is not None:
        parser.error("--data_root goes with --mixture")
    if (arguments.model is None) != (arguments.train_file is None and arguments.mixture is None):
        parser.error("--model and --train_file (or --mixture) go together; without both, the digits are trained on")
    if arguments.model is None and arguments.eval_file is not None:
        parser.error("--eval_file goes with --model and --train_file; the digits have an evaluation of their own")
    if arguments.model is None and arguments.packing:
        parser.error("--packing is of a checkpoint (--model); the digits are all of one length")
    if arguments.model is None and arguments.trainable is not None:
        parser.error("--trainable is of a checkpoint (--model); of the digits model everything learns")
    if arguments.vision_features is not None and (
        arguments.model is None or "vision_tower" in (arguments.trainable or ())
    ):
        parser.error("--vision_features needs a frozen vision tower; leave it out, or vision_tower of --trainable")
    if arguments.model is not None and not {arguments.attention_type, arguments.projector_type} <= {None}:
        parser.error("--attention_type and --projector_type are of the digits model; a checkpoint has its own")
    training_arguments.remove_unused_columns = False
    return arguments, training_arguments


def prepare_deepspeed(use_cpu: bool) -> None:
    """On a CPU, DeepSpeed has to be started by hand, before TrainingArguments, or every rank trains alone."""
    if use_cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def find_checkpoint(training_arguments: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from; of `true`, the newest one that was written to its end.

    Raises:
        `SystemExit`: there is none, or the output folder is in use and nothing is said of resuming.
    """
    folder, wanted = Path(training_arguments.output_dir), training_arguments.resume_from_checkpoint or "false"
    if wanted.lower() not in ("true", "false"):
        return wanted
    if wanted.lower() == "false":
        if folder.exists() and any(folder.iterdir()):
            raise SystemExit(
                f"finetune.py: error: the output folder {folder} exists and is not empty. Choose another "
                "--output_dir, or go on from its last checkpoint with --resume_from_checkpoint true."
            )
        return None
    needed = ["trainer_state.json"] + (["latest"] if training_arguments.deepspeed else [])
    complete = [path for path in folder.glob("checkpoint-*") if all((path / name).is_file() for name in needed)]
    if not complete:
        raise SystemExit(f"finetune.py: error: {folder} holds no complete checkpoint to resume from.")
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2])))


def main() -> None:
    arguments, training_arguments = parse_arguments(sys.argv[1:])
    checkpoint = find_checkpoint(training_arguments)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if training_arguments.world_size != world_size:
        raise SystemExit(
            f"finetune.py: error: {world_size} processes were started and each trains alone. On a CPU, start them "
            "with `accelerate launch --use_deepspeed --num_processes N … --deepspeed FILE`, or with torchrun."
        )
    if training_arguments.use_cpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(arguments.cpu_threads or max(1, cores // world_size))
    set_seed(training_arguments.seed)

    if arguments.model is None:
        model, processor = build_model(arguments.attention_type or "mmca", arguments.projector_type or "linear")
        train_scans, test_scans = load_scans()
        batch_size = training_arguments.train_batch_size * training_arguments.gradient_accumulation_steps * world_size
        train_dataset = DigitConversations(train_scans, max(training_arguments.max_steps, 100) * batch_size)
        eval_dataset = None
    else:
        # Weights learn in float32; `--bf16` computes in bfloat16 all the same.
        model = VisualChatForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
        model.set_trainable(*arguments.trainable or ())
        processor = AutoProcessor.from_pretrained(arguments.model)
        if arguments.vision_features is not None:
            max_disk_bytes = int(arguments.vision_features_gib * 2**30)
            model.model.vision_cache = VisionFeatureCache(
                device="cpu", folder=arguments.vision_features, max_disk_bytes=max_disk_bytes
            )
        train_dataset, eval_dataset = load_data(arguments, training_arguments, processor)
    collator = DataCollatorForVisualChat(
        processor, arguments.max_length, arguments.overlong, arguments.packing, arguments.max_broken
    )
    if arguments.model is not None:
        train_dataset = arrange(train_dataset, arguments, training_arguments, collator)
        eval_dataset = leave_out_overlong(eval_dataset, arguments, collator)

    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    if arguments.model is None and trainer.is_world_process_zero():
        report(training_arguments.output_dir, train_scans, test_scans, trainer.state.log_history)
    if any(collator.counts.values()):
        print(f"Conversations of rank {trainer.args.process_index}: {collator.counts}")
    # The threads of the process group end here, together, and not in an interpreter that is being torn down.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
