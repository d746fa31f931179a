"""
Trains a VisualChat model with Trainer.

The demo, a tiny model that learns to read handwritten digits in a few minutes on a CPU (see digits/):

    accelerate launch examples/finetune.py

Custom data (JSON lines, see README) and a checkpoint, which `examples/join.py` makes from any two pretrained parts:

    accelerate launch examples/finetune.py --config examples/configs/finetune.yaml \\
        --model CHECKPOINT --train_file train.jsonl --eval_file eval.jsonl --output_dir OUTPUT

A mixture of published data sets, see examples/configs/paper_set1.yaml:

    accelerate launch examples/finetune.py --config examples/configs/finetune.yaml \\
        --model CHECKPOINT --mixture examples/configs/paper_set1.yaml --data_root DATA --output_dir OUTPUT

Every field of TrainingArguments is a flag and a key of the configuration file; flags override it. With DeepSpeed:

    accelerate launch --use_deepspeed --num_processes 2 examples/finetune.py --deepspeed examples/configs/zero3.json
"""

import sys
from dataclasses import dataclass, field

from digits.train import DIGITS_CONFIG, train_digits
from loading import QUANTIZATIONS
from training_accounts import TrainerWithAccounts
from training_arguments import parse_arguments
from training_card import TrainerWithCard, TrainingRun
from training_data import load_data
from training_memory import check_memory, memory_advice
from training_parameters import (
    GROUPS,
    GroupedTrainer,
    GroupOptions,
    choose_parameters,
    loading_options,
    report_parameters,
)
from training_processes import end_processes, set_cpu_threads
from training_resume import prepare_resume
from training_samples import Samples
from training_saving import ResumableTrainer
from transformers import AutoProcessor, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from configuration_visualchat import attention_defaults
from modeling_visualchat import (
    ATTENTION_OPTIONS,
    PROJECTORS,
    VisionFeatureCache,
    VisualChatForConditionalGeneration,
)
from processing_visualchat import OVERLONG, DataCollatorForVisualChat
from processing_visualchat.data.image_contents import save_training_images


class FinetuneTrainer(GroupedTrainer, TrainerWithAccounts, ResumableTrainer, TrainerWithCard):
    """`Trainer` with a learning rate for each group of parameters, accounts, checkpoints to resume from, a card."""


def attention_option(name: str, description: str):
    """A flag for a field of `VisualChatConfig`."""
    default = ({"attention_type": "mmca"} | attention_defaults("mmca"))[name]
    help = f"{description}; by default the checkpoint's, and {default} in the digits demo."
    return HfArg(default=None, help=help, metadata={"choices": ATTENTION_OPTIONS[name]})


@dataclass
class FinetuneArguments:
    """Arguments beside `TrainingArguments`."""

    model: str | None = HfArg(default=None, help="Checkpoint to train; without one, the digits demo runs.")
    train_file: str | None = HfArg(default=None, help="Training data: .jsonl, .json, .parquet, .arrow or a folder.")
    eval_file: str | None = HfArg(default=None, help="Evaluation data, in the formats of train_file.")
    image_root: str | None = HfArg(
        default=None, help="Folder of the images of train_file and eval_file; by default that of each file."
    )
    mixture: str | None = HfArg(default=None, help="YAML file of a mixture of data sets, instead of train_file.")
    data_root: str | None = HfArg(default=None, help="Folder of the mixture's data sets; overrides the YAML file.")
    check_images: bool = HfArg(default=True, help="Open every image of the data before training.")
    max_length: int | None = HfArg(default=None, help="Maximum number of tokens of a conversation.")
    overlong: str = HfArg(
        default="error",
        help="How over-length conversations are handled; error refuses them, before training or in the stream.",
        metadata={"choices": list(OVERLONG)},
    )
    packing: bool = HfArg(default=False, help="Pack conversations into rows of max_length tokens.")
    group_by_image: bool = HfArg(
        default=False,
        help="Bring conversations about the same images into one row or batch, which computes them once.",
    )
    max_per_image: int | None = HfArg(
        default=None, help="Maximum conversations about an image in an optimizer step, for group_by_image."
    )
    max_broken: int = HfArg(default=100, help="Distinct broken images that each process may skip.")
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "What is trained: names joined by + (projector, embeddings, language_model, vision_tower, "
            "lm_head), or patterns of parameters; +NAME adds to the default, projector+embeddings."
        },
    )
    lora: list[str] | None = field(
        default=None, metadata={"help": "Towers to train by LoRA: language_model, vision_tower, or both."}
    )
    lora_r: int = HfArg(default=16, help="Rank of LoRA.")
    lora_alpha: float = HfArg(default=32.0, help="Scale of LoRA, divided by its rank.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout of LoRA.")
    lora_target: list[str] | None = field(
        default=None, metadata={"help": "Names or patterns of linear layers that get LoRA; by default all of a tower."}
    )
    learning_rates: list[str] | None = field(
        default=None,
        metadata={"help": f"Learning rates, as in lora=0.0001, of {', '.join(GROUPS)}; by default learning_rate."},
    )
    weight_decays: list[str] | None = field(
        default=None, metadata={"help": "Weight decays of groups, as in lora=0.01; by default weight_decay."}
    )
    frozen_dtype: str = HfArg(
        default="float32",
        help="Dtype of frozen weights; those that are trained are in float32, or as DeepSpeed has them.",
        metadata={"choices": ["float32", "bfloat16", "float16"]},
    )
    quantization: str | None = HfArg(
        default=None,
        help="Quantization of the frozen decoder by bitsandbytes, for QLoRA.",
        metadata={"choices": list(QUANTIZATIONS)},
    )
    vision_features: str | None = HfArg(default=None, help="Folder to cache the frozen vision tower's features in.")
    vision_features_gib: float = HfArg(default=64.0, help="Maximum size of that folder in GiB.")
    samples: int = HfArg(default=4, help="Evaluation conversations that are answered at each evaluation.")
    license: str | None = HfArg(default=None, help="License of the trained checkpoint, for its model card.")
    device_memory: float | None = HfArg(default=None, help="Memory of a device in GiB; by default what it has.")
    cpu_threads: int = HfArg(default=0, help="Threads of each process on a CPU; 0 divides all cores among them.")
    attention_type: str | None = attention_option("attention_type", "The attention type")
    merge: str | None = attention_option("merge", "How text and images are merged in mmca")
    image_attention: str | None = attention_option("image_attention", "What image tokens attend to in mmca")
    image_scope: str | None = attention_option("image_scope", "Earlier images that text reads in mmca and cross")
    cross_layer_interval: int | None = HfArg(default=None, help="Decoder layers per cross-attention layer of cross.")
    projector_type: str | None = HfArg(
        default=None, help="Projector of the digits demo; by default linear.", metadata={"choices": list(PROJECTORS)}
    )

    @property
    def attention(self) -> dict[str, str]:
        """The attention options that were chosen."""
        options = (*ATTENTION_OPTIONS, "cross_layer_interval")
        return {option: value for option in options if (value := getattr(self, option)) is not None}


def main() -> None:
    arguments, training_arguments = parse_arguments(sys.argv[1:], FinetuneArguments, __doc__, DIGITS_CONFIG)
    checkpoint, described = prepare_resume(arguments, training_arguments)
    set_cpu_threads(training_arguments, arguments.cpu_threads)
    set_seed(training_arguments.seed)
    if arguments.model is None:
        return train_digits(arguments, training_arguments, checkpoint, described)
    check_memory(arguments, training_arguments)
    with memory_advice(arguments, training_arguments):
        train(arguments, training_arguments, checkpoint, described)


def train(
    arguments: FinetuneArguments, training_arguments: TrainingArguments, checkpoint: str | None, described: dict
) -> None:
    """Trains the model of `--model`, and saves it."""
    # What is trained is in float32; with `--bf16`, it is cast to bfloat16 for computation.
    options = GroupOptions.from_arguments(arguments, training_arguments)
    model = VisualChatForConditionalGeneration.from_pretrained(
        arguments.model, **loading_options(arguments, training_arguments), **arguments.attention
    )
    computes_images_once = model.model.supports_image_memory()
    if arguments.vision_features is not None:
        max_disk_bytes = int(arguments.vision_features_gib * 2**30)
        model.model.vision_cache = VisionFeatureCache(
            device="cpu", folder=arguments.vision_features, max_disk_bytes=max_disk_bytes
        )
    casts = training_arguments.deepspeed is None
    model = choose_parameters(model, arguments, casts, training_arguments.seed)

    processor = AutoProcessor.from_pretrained(arguments.model)
    collator = DataCollatorForVisualChat(
        processor, arguments.max_length, arguments.overlong, arguments.packing, arguments.max_broken, return_facts=True
    )
    data = load_data(arguments, training_arguments, collator, computes_images_once)
    if data.evaluation is None:
        training_arguments.eval_strategy = "no"

    report_parameters(model, options, training_arguments)
    trainer = FinetuneTrainer(
        model=model,
        group_options=options,
        args=training_arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=collator,
        processing_class=processor,
        run=TrainingRun(data.sources, arguments.model, arguments.license, checkpoint),
        arguments=arguments,
        samples=None if data.evaluation is None else Samples(data.evaluation, processor, arguments.samples),
        described=described,
        resumed_from=checkpoint,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if data.digests is not None and trainer.is_world_process_zero():
        save_training_images(data.digests, training_arguments.output_dir)  # for `evaluate.py`
    if data.evaluation is not None:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.create_model_card()
    if training_arguments.push_to_hub:
        trainer.push_to_hub()  # again, with the evaluation loss
    if any(collator.counts.values()):
        print(f"Conversations of process {training_arguments.process_index}: {collator.counts}")
    end_processes(trainer)


if __name__ == "__main__":
    main()
