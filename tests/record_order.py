"""
Trains a tiny model on a mixture and writes down, for every batch of this rank, what it was made of.

    torchrun --nproc_per_node N tests/record_order.py MIXTURE OUTPUT [CHECKPOINT]
"""

import json
import os
import sys
from pathlib import Path

from conftest import make_model, make_processor
from transformers import Trainer, TrainingArguments

from processing_visualchat import DataCollatorForVisualChat, load_mixture, measure_lengths, pack_conversations


GLOBAL_BATCH_SIZE = 4
SAVE_STEP = 5  # in the middle of the first epoch


def main(config: str, output: str, checkpoint: str | None = None) -> None:
    processor, rank = make_processor(), int(os.environ["RANK"])
    mixture = load_mixture(config)
    packs = pack_conversations(measure_lengths(mixture.train, processor), 400)
    collator = DataCollatorForVisualChat(processor, packing=True)
    batches: list[list] = []

    def collate(examples):
        batches.append([part["where"] for pack in examples for part in pack["pack"]])
        return collator(examples)

    arguments = TrainingArguments(
        output_dir=f"{output}/run",
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH_SIZE // int(os.environ["WORLD_SIZE"]),
        num_train_epochs=2,
        save_steps=SAVE_STEP,
        save_total_limit=10,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    model = make_model()
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=packs)
    trainer.train(resume_from_checkpoint=checkpoint)
    Path(f"{output}/{rank}.json").write_text(json.dumps(batches))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
