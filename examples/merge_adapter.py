"""
Merges a LoRA adapter of `finetune.py` into the checkpoint that it was trained from.

    python examples/merge_adapter.py trained merged

ADAPTER is a folder, as a checkpoint of a run, or a name on the Hub. OUTPUT becomes a complete checkpoint with the
processor, the chat template and the model card of the adapter. One that was trained on a quantized decoder (QLoRA) is
merged into the weights of full precision.
"""

import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from checkpoints import write
from peft import LoraConfig, PeftConfig, PeftModel
from training_card import load_card, mark_merged
from transformers.utils import cached_file, find_adapter_config_file

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.model_card_visualchat import CARD
from processing_visualchat import VisualChatProcessor
from processing_visualchat.data.image_contents import TRAINING_IMAGES


def read_config(adapter: str) -> LoraConfig:
    """
    The configuration of a LoRA adapter.

    Raises:
        `ValueError`: it is none.
    """
    if find_adapter_config_file(adapter) is None:
        raise ValueError(
            f"{adapter} is not an adapter: it has no adapter_config.json. Name the folder of a run with --lora, or "
            "one of its checkpoints; a complete checkpoint needs no merging."
        )
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{adapter} is an adapter of type {config.peft_type.value}; only LoRA is merged here.")
    return config


def load_base(base: str, adapter: str) -> VisualChatForConditionalGeneration:
    """
    The checkpoint that an adapter was trained from, in full precision.

    Raises:
        `ValueError`: there is none of that name, or it is an adapter too.
    """
    try:
        model = VisualChatForConditionalGeneration.from_pretrained(base)
    except OSError as error:
        raise ValueError(
            f"the checkpoint {base!r}, from which {adapter} was trained, cannot be loaded: name it with --base, or "
            f"start from the folder that the path is relative to. {str(error).splitlines()[0]}"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"{base} is an adapter itself; merge it first, and name the result with --base.")
    return model


def merge(
    model: VisualChatForConditionalGeneration, config: LoraConfig, adapter: str
) -> VisualChatForConditionalGeneration:
    """
    The model with an adapter merged into its weights.

    Raises:
        `ValueError`: the adapter is of another model.
    """
    try:
        peft_model = PeftModel(model, config)
        loaded = peft_model.load_adapter(adapter, "default")
        wrong = ", ".join([*loaded.missing_keys, *loaded.unexpected_keys])
    except (RuntimeError, ValueError) as error:  # other shapes, no such layers
        wrong = str(error)
    if wrong:
        raise ValueError(
            f"{adapter} was trained from another checkpoint than {model.name_or_path}, which it does not fit: "
            f"{' '.join(wrong.split())[:500]}. Name the right one with --base."
        )
    return peft_model.merge_and_unload(safe_merge=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or name of a LoRA adapter")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write the merged checkpoint to")
    parser.add_argument("--base", help="folder or name of its checkpoint, by default the one that it names")
    arguments = parser.parse_args()
    adapter, output = arguments.adapter, arguments.output
    if output.exists() and any(output.iterdir()):
        parser.error(f"the output folder {output} exists and is not empty; choose another OUTPUT")

    try:
        config = read_config(adapter)
        base = arguments.base or config.base_model_name_or_path
        model = merge(load_base(base, adapter), config, adapter)
        processor = VisualChatProcessor.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write(model.set_trainable(), processor, output)
    if card := load_card(adapter):
        mark_merged(card, base).rename(output.absolute().name)
        card.save(output / CARD)
    if images := cached_file(adapter, TRAINING_IMAGES, _raise_exceptions_for_missing_entries=False):
        shutil.copy(images, output / TRAINING_IMAGES)


if __name__ == "__main__":
    main()
