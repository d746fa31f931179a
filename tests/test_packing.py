"""Packs: every conversation once, within limits, alike in tokens and images, the same for the same seed."""

import json

import numpy as np
import pytest
from conftest import make_processor
from datasets import Dataset
from test_data_collator import ask

from processing_visualchat import DataCollatorForVisualChat, measure_lengths, pack_conversations
from processing_visualchat.data.lengths import count_tokens
from processing_visualchat.data.packing import compare_batching, plan_packs


def draw_lengths(count, seed=0):
    """Conversations of 1 to 8 images of 64 tokens and some text, a few longer than any pack."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 2, 3, 8], count, p=[0.1, 0.4, 0.3, 0.15, 0.05])
    return (images * 64 + rng.lognormal(4.0, 0.7, count)).astype(int), images


@pytest.mark.parametrize("max_images", [None, 9])
@pytest.mark.parametrize("seed", range(3))
def test_packs_hold_everything_once_within_limits(seed, max_images):
    lengths, images = draw_lengths(3000, seed)
    packs = plan_packs(lengths, images, 700, max_images, seed)
    assert sorted(number for pack in packs for number in pack) == list(range(3000))
    assert all(len(pack) == 1 or lengths[pack].sum() <= 700 for pack in packs)
    if max_images is not None:
        assert all(images[pack].sum() <= 9 for pack in packs)
    assert packs == plan_packs(lengths.tolist(), images.tolist(), 700, max_images, seed)
    assert packs != plan_packs(lengths, images, 700, max_images, seed + 1)


def test_packs_waste_less_and_are_more_alike_than_batches():
    waste = compare_batching(*draw_lengths(5000), max_length=1500, batch_size=8)
    random, grouped, packed = waste.values()
    assert packed.padding == 0 < grouped.padding < random.padding
    assert packed.token_spread < min(random.token_spread, grouped.token_spread) / 3
    assert packed.image_spread < min(random.image_spread, grouped.image_spread)


def test_what_batches_waste_is_counted_right():
    """Written out by hand: in any order of four, batches of two are padded to their longer one."""
    waste = compare_batching([10, 10, 30, 30], [1, 1, 0, 0], max_length=40, batch_size=2)
    for name in ("random order, padded", "grouped by length, padded"):
        assert waste[name].padding in (0, pytest.approx(1 - 80 / 120)) and waste[name].batches == 2
    assert waste["packed"].padding == 0 and waste["packed"].batches == 2
    assert waste["packed"].token_spread == 0 and waste["packed"].image_spread == 0


def test_a_measured_data_set_packs_into_batches(tmp_path):
    processor = make_processor()
    conversations = [ask(answer="y" * count)["messages"] for count in (1, 50, 3, 200, 7)]
    dataset = Dataset.from_dict({"messages": [json.dumps(messages) for messages in conversations]})
    with pytest.raises(ValueError, match="no column length, num_images; pass it to measure_lengths"):
        pack_conversations(dataset, 300)
    measured = measure_lengths(dataset, processor)
    assert measured["length"][:] == [count_tokens(messages, processor) for messages in conversations]
    assert measured["num_images"][:] == [0] * 5 and measured[0]["messages"] == dataset[0]["messages"]
    packs = pack_conversations(measured, 300, seed=1)
    assert sum(packs["length"][:]) == sum(measured["length"][:])
    collator = DataCollatorForVisualChat(processor, 300, packing=True)
    for pack in packs:
        batch = collator([pack])
        assert batch["input_ids"].shape == (1, pack["length"])
        assert (batch["position_ids"] == 0).sum() == len(pack["pack"])
    with pytest.raises(ValueError, match="at least 1 token"):
        pack_conversations(measured, 0)
    with pytest.raises(ValueError, match="no conversation to pack"):
        pack_conversations(measured.select([]), 300)
