"""Trains and evaluates the digits model; `accelerate launch examples/finetune.py` without a model runs it."""

from dataclasses import replace
from pathlib import Path

from study.scans import load_scans
from training_accounts import TrainerWithAccounts
from training_card import TrainerWithCard, TrainingRun
from training_data import DataSource
from training_processes import end_processes
from training_samples import Samples
from training_saving import ResumableTrainer
from transformers import TrainingArguments

from processing_visualchat import DataCollatorForVisualChat, load_image
from processing_visualchat.data.image_contents import save_training_images
from processing_visualchat.data.images import digest_pixels

from .conversations import DigitConversations
from .model import build_digits_model
from .report import report


DIGITS_CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
SCANS = DataSource(
    "conversations drawn from scans of handwritten digits",
    url="https://archive.ics.uci.edu/ml/datasets/Optical+Recognition+of+Handwritten+Digits",
    license="BSD 3-Clause, of scikit-learn, which includes the scans",
    attribution="Alpaydin and Kaynak, Cascading Classifiers, Kybernetika, 1998",
)


class DigitsTrainer(TrainerWithAccounts, ResumableTrainer, TrainerWithCard):
    """`Trainer` with accounts, checkpoints to resume from, and a model card."""


def train_digits(arguments, training_arguments: TrainingArguments, checkpoint: str | None, described: dict) -> None:
    """
    Trains all parameters of the model, saves it, and writes the report beside it.

    Args:
        arguments (`FinetuneArguments`): Those of `finetune.py`.
        training_arguments (`TrainingArguments`): By default those of configs/digits.yaml.
        checkpoint (`str`, *optional*): The checkpoint to resume from.
        described (`dict`): What [`describe_run`] says of the run.
    """
    model, processor = build_digits_model(projector_type=arguments.projector_type or "linear", **arguments.attention)
    train_scans, test_scans = load_scans()
    conversations_per_step = (
        training_arguments.train_batch_size
        * training_arguments.gradient_accumulation_steps
        * training_arguments.world_size
    )
    train_dataset = DigitConversations(train_scans, max(training_arguments.max_steps, 100) * conversations_per_step)
    eval_dataset = DigitConversations(test_scans, 64, seed=1)
    trainer = DigitsTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DataCollatorForVisualChat(
            processor, arguments.max_length, arguments.overlong, return_facts=True
        ),
        processing_class=processor,
        run=TrainingRun(
            [replace(SCANS, num_train=len(train_dataset))], license=arguments.license, resumed_from=checkpoint
        ),
        arguments=arguments,
        samples=Samples(eval_dataset, processor, arguments.samples, max_new_tokens=8),
        described=described,
        resumed_from=checkpoint,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        digests = (digest_pixels(load_image(scan)) for scan, _ in train_scans)
        save_training_images(digests, training_arguments.output_dir)
        report(training_arguments.output_dir, train_scans, test_scans, trainer.state.log_history)
    end_processes(trainer)
