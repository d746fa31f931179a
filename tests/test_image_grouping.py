"""Conversations about the same images: in one row or batch, each image computed once, with unchanged gradients."""

import json
import random
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from conftest import IMAGE_SEQ_LENGTH, draw_picture, make_model, make_processor
from test_data_collator import ask
from test_finetune import EXAMPLES
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from modeling_visualchat import ATTENTION_TYPES
from processing_visualchat import (
    DataCollatorForVisualChat,
    ImageGroupedDataset,
    ImageReference,
    load_conversations,
    measure_lengths,
    pack_conversations,
)
from processing_visualchat.data.grouping import count_repeats, find_groups, order_by_image
from processing_visualchat.data.packing import compare_batching, measure_batches, plan_packs


def draw_conversations(num_images, seed=0):
    """The images of conversations, 1 to 12 about each image; some show two, and some none."""
    rng = random.Random(seed)
    images = [[f"{image}"] for image in range(num_images) for _ in range(rng.randint(1, 12))]
    images += [[*map(str, rng.sample(range(num_images), 2))] for _ in range(num_images)] + [[]] * num_images
    rng.shuffle(images)
    return images


def counters(images):
    return [Counter(shown) for shown in images]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_per_image", [None, 2])
def test_a_group_is_about_images_of_its_first_conversation(seed, max_per_image):
    images = draw_conversations(30, seed)
    sizes, limits = np.ones((len(images), 1), dtype=int), np.array([5])
    groups = find_groups(counters(images), sizes, limits, 0, max_per_image, random.Random(seed))
    assert sorted(index for group in groups for index in group) == list(range(len(images)))
    assert max(map(len, groups)) <= 5
    for first, *others in groups:
        assert all(set(images[first]) & set(images[index]) for index in others)
    shown = [Counter(image for index in group for image in images[index]) for group in groups]
    assert max(max(each.values(), default=0) for each in shown) == (max_per_image or 5)
    same = find_groups(counters([["a"]] * 7), sizes[:7], np.array([3]), 0, None, random.Random(seed))
    assert sorted(map(len, same)) == [1, 3, 3]


def test_a_batch_shows_as_few_images_as_it_can():
    images = counters([[str(number % 6)] for number in range(24)])
    order = order_by_image(images, 8, 8, None, random.Random(0))
    assert [len({image for index in order[start : start + 8] for image in images[index]}) for start in (0, 8, 16)] == [
        2, 2, 2,
    ]  # fmt: skip
    order = order_by_image(counters([[str(number % 5)] for number in range(23)]), 8, 8, None, random.Random(0))
    assert sorted(order) == list(range(23))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_per_image", [1, 3])
def test_no_step_has_more_conversations_about_an_image_than_allowed(seed, max_per_image):
    images = counters(draw_conversations(40, seed))
    order = order_by_image(images, 4, 16, max_per_image, random.Random(seed))
    assert sorted(order) == list(range(len(images)))
    steps = [Counter() for _ in range(0, len(order), 16)]
    for place, index in enumerate(order):
        steps[place // 16].update(images[index])
    assert max(max(step.values()) for step in steps) == max_per_image
    with pytest.raises(ValueError, match="At most 2 conversations about an image in a step are too few: 9 are about"):
        order_by_image(counters([["a"]] * 9), 2, 3, 2, random.Random(0))


@pytest.mark.parametrize("shared_length", [64, 0])
@pytest.mark.parametrize("max_per_image", [None, 4])
def test_packs_grouped_by_image_stay_balanced_and_within_limits(shared_length, max_per_image):
    images = draw_conversations(400)
    num_images = np.array([*map(len, images)])
    lengths = 64 * num_images + np.random.default_rng(0).lognormal(3.5, 0.5, len(images)).astype(int)
    options = {"images": images, "shared_length": shared_length}
    packs = plan_packs(lengths, num_images, 1500, max_per_image=max_per_image, **options)
    assert sorted(number for pack in packs for number in pack) == list(range(len(images)))
    repeats = [count_repeats(images[index] for index in pack) for pack in packs]
    assert all(lengths[pack].sum() - shared_length * count <= 1500 for pack, count in zip(packs, repeats))
    shown = [Counter(image for index in pack for image in images[index]) for pack in packs]
    most = max(max(each.values(), default=0) for each in shown)
    assert most == 4 if max_per_image else most > 8
    random_order = measure_batches(lengths, num_images, plan_packs(lengths, num_images, 1500), False, **options)
    grouped = measure_batches(lengths, num_images, packs, False, **options)
    assert grouped.images_per_conversation < (0.5 if max_per_image else 0.35) < random_order.images_per_conversation
    assert grouped.token_spread < 0.12 and grouped.batches < (0.7 if shared_length else 1.1) * random_order.batches
    again = plan_packs(lengths, num_images, 1500, max_per_image=max_per_image, **options)
    assert packs == again != plan_packs(lengths, num_images, 1500, seed=1, max_per_image=max_per_image, **options)


def test_images_computed_per_conversation_are_counted():
    """Written out by hand: two conversations about each of two images, of 10 tokens of text and 20 of the image."""
    found = compare_batching([30] * 4, [1] * 4, 60, batch_size=2, images=[["a"], ["b"], ["a"], ["b"]])
    assert found["grouped by image, padded"].images_per_conversation == 0.5
    assert found["packed, grouped by image"].images_per_conversation == 0.5
    found = compare_batching([30] * 4, [1] * 4, 60, 2, images=[["a"], ["b"], ["a"], ["b"]], shared_length=20)
    assert found["packed"].batches == 2 and found["packed, grouped by image"].batches == 2
    found = compare_batching([30] * 4, [1] * 4, 80, 2, images=[["a"], ["b"], ["a"], ["b"]], shared_length=20)
    assert found["packed, grouped by image"].batches == 1 and found["packed, grouped by image"].padding == 0
    assert compare_batching([30], [1], 80)["packed"].images_per_conversation == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions about 6 pictures, 4 about each; the last picture has a second name."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        draw_picture(min(number, 5)).save(folder / f"{number}.png")
    rng = random.Random(0)
    records = []
    for number in range(24):
        name = 6 if number == 23 else number % 6
        records.append(ask(f"{name}.png", answer="y" * rng.randrange(1, 20)))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "mixture.yaml").write_text("sources: [{name: own, path: train.jsonl}]\neval_share: 0.0")
    return folder


def load(folder):
    return measure_lengths(load_conversations(folder / "train.jsonl", make_processor()), make_processor())


def test_an_image_of_a_batch_is_opened_and_preprocessed_once(monkeypatch, folder):
    dataset, processor = load(folder), make_processor()
    opened, processed = [], []
    open_image, process = ImageReference.open, type(processor.image_processor).__call__
    monkeypatch.setattr(ImageReference, "open", lambda self: opened.append(self) or open_image(self))
    monkeypatch.setattr(
        type(processor.image_processor),
        "__call__",
        lambda self, images, **kwargs: processed.append(images) or process(self, images, **kwargs),
    )
    examples = [dataset[index] for index in (0, 1, 6, 12, 7)]
    batch = DataCollatorForVisualChat(processor, packing=True)(examples)
    assert len(opened) == 2 and len(processed) == 1 and len(processed[0]) == 2
    expected = torch.cat([DataCollatorForVisualChat(processor)([each])["pixel_values"] for each in examples])
    assert torch.equal(batch["pixel_values"], expected) and len(batch["pixel_values"]) == 5


def add_gradients(model, batches):
    """The sum of the gradients of batches, each loss over the tokens of all, as Trainer does."""
    num_items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=num_items).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(
    ("kind", "packing"), [*((kind, True) for kind in ("mmca", "mmca_joint_image", "causal", "cross")), ("mmca", False)]
)
def test_gradients_are_those_of_separate_runs_and_an_image_is_computed_once(folder, kind, packing):
    """Forward and backward; in the decoder too, where the tokens of an image do not depend on the text."""
    processor, options = make_processor(), {"cross_layer_interval": 1, **ATTENTION_TYPES[kind].options}
    dataset = load(folder).select([number for number in range(24) if number % 6 in (0, 1, 5)])
    alone = [DataCollatorForVisualChat(processor)([example]) for example in dataset]
    expected = add_gradients(make_model(**options).train(), alone)
    model = make_model(**options).train()
    is_shared = model.model.supports_image_memory()
    examples, batch_size = dataset, 4
    if packing:
        shared_length = IMAGE_SEQ_LENGTH if is_shared else 0
        examples = pack_conversations(dataset, 600, group_by_image=True, shared_length=shared_length)
        batch_size = 1
    assert is_shared == (kind != "causal")
    grouped = ImageGroupedDataset(examples, batch_size)
    rows = [[grouped[index] for index in range(start, min(start + batch_size, len(grouped)))]
            for start in range(0, len(grouped), batch_size)]  # fmt: skip
    batches = [DataCollatorForVisualChat(processor, packing=packing)(row) for row in rows]
    num_images, num_tokens = [], []
    model.model.multi_modal_projector.register_full_backward_hook(
        lambda module, inputs, outputs: num_images.append(len(outputs[0]))
    )
    model.model.language_model.layers[0].mlp.register_full_backward_hook(
        lambda module, inputs, outputs: num_tokens.append(outputs[0].shape[:2].numel())
    )
    with model.model.count_tokens() as forward:
        gradients = add_gradients(model, batches)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert sum(num_images) == 3
    if is_shared and kind != "cross":
        assert forward[::2] == num_tokens[1::2] == [IMAGE_SEQ_LENGTH * number for number in num_images]
        assert forward[1::2] == num_tokens[::2]
    if is_shared and kind != "cross" and packing:
        assert forward[1::2] == [int((batch["mm_token_type_ids"] == 0).sum()) for batch in batches]


def batches_of(dataset, epoch, rank, num_processes, skip=0):
    """The batches of a process in an epoch, as Trainer gets them; those of a resumed run without the first."""
    loader = DataLoader(dataset, batch_size=2, sampler=SequentialSampler(dataset), collate_fn=list)
    loader = prepare_data_loader(loader, num_processes=num_processes, process_index=rank, put_on_device=False)
    loader = skip_first_batches(loader, skip)
    loader.set_epoch(epoch)
    return [[example["where"] for example in batch] for batch in loader]


def test_the_order_is_the_same_on_any_number_of_processes_and_after_a_resume(folder):
    dataset = load(folder)

    def order(num_processes, epoch, skip=0):
        ranks = [
            batches_of(ImageGroupedDataset(dataset, 2, 4, 2, seed=3), epoch, rank, num_processes, skip)
            for rank in range(num_processes)
        ]
        return [batch for batches in zip(*ranks) for batch in batches]

    first, second = order(1, 0), order(1, 1)
    assert first != second and sorted(map(str, chain(*first))) == sorted(map(str, chain(*second)))
    for num_processes in (2, 4):
        assert order(num_processes, 0) == first and order(num_processes, 1) == second
        assert order(num_processes, 1, skip=2) == second[2 * num_processes :]
    assert ImageGroupedDataset(dataset, 2, 4, 2, seed=4).order != ImageGroupedDataset(dataset, 2, 4, 2, seed=3).order
    with pytest.raises(ValueError, match="no column digests; load it by load_mixture or load_conversations"):
        ImageGroupedDataset(dataset.remove_columns("digests"), 2)


@pytest.mark.parametrize("form", ["packing", "mixture"])
def test_training_goes_on_in_the_same_order(folder, tmp_path, monkeypatch, capsys, form):
    """Through the data of finetune.py and Trainer; the resume is in the middle of the second epoch."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from training_data import load_data

    arguments = SimpleNamespace(
        mixture=folder / "mixture.yaml" if form == "mixture" else None, data_root=str(folder), check_images=True,
        train_file=str(folder / "train.jsonl"), eval_file=None, packing=form == "packing", overlong="error",
        image_root=None, group_by_image=True, max_per_image=2,
    )  # fmt: skip
    batches = []

    def train(checkpoint=None):
        processor, model = make_processor(), make_model()
        collator = DataCollatorForVisualChat(processor, 400, packing=form == "packing")
        training_arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, per_device_train_batch_size=1 if collator.packing else 4,
            gradient_accumulation_steps=2, num_train_epochs=2, save_strategy="steps", save_steps=1,
            remove_unused_columns=False, report_to="none", disable_tqdm=True, seed=3,
        )  # fmt: skip
        data = load_data(arguments, training_arguments, collator, model.model.supports_image_memory())
        assert len(data.digests) == 6

        def collate(examples):
            batches.append([part["where"] for example in examples for part in example.get("pack", [example])])
            return collator(examples)

        Trainer(model, training_arguments, data_collator=collate, train_dataset=data.train).train(checkpoint)
        return batches

    whole = [*train()]
    assert "images per conversation" in capsys.readouterr().out
    batches.clear()
    num_steps = len([*(tmp_path / "run").glob("checkpoint-*")])
    resumed = train(str(tmp_path / "run" / f"checkpoint-{3 * num_steps // 4}"))
    assert len(resumed) > 0 and len(whole) - len(resumed) > len(whole) / 2 and whole[-len(resumed) :] == resumed
    assert sorted(chain(*whole[: len(whole) // 2])) == sorted(chain(*whole[len(whole) // 2 :]))
