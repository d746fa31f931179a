"""The collator: labels and lengths, conversations that cannot be used, packing."""

import json

import pytest
import torch
from conftest import draw_picture, make_model
from PIL import Image
from torch.utils.data import DataLoader

from processing_visualchat import DataCollatorForVisualChat


@pytest.mark.parametrize(
    ("overlong", "expected"), [("drop_first_rounds", "What's the difference"), ("drop_last_rounds", "It's a circle.")]
)
def test_long_conversations_lose_whole_rounds(processor, chat, overlong, expected):
    whole = DataCollatorForVisualChat(processor)([{"messages": chat}])
    limit = whole["input_ids"].shape[1] - 1
    collator = DataCollatorForVisualChat(processor, limit, overlong)
    batch = collator(
        [
            {"messages": chat},
            {"messages": [{"role": "system", "content": "Be short, and say what you see in the pictures."}, *chat]},
        ]
    )
    assert batch["input_ids"].shape[1] <= limit and collator.counts == {"shortened": 2, "skipped": 0, "broken": 0}
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert all(text.count("### Question") == 1 and expected in text for text in texts)
    assert "Be short, and" in texts[1] and (batch["labels"] != -100).any(dim=1).all()
    assert len(batch["pixel_values"]) == (4 if overlong == "drop_first_rounds" else 2)
    unshortened = DataCollatorForVisualChat(processor, limit + 1, overlong)
    assert unshortened([{"messages": chat}])["input_ids"].shape[1] == limit + 1
    assert not any(unshortened.counts.values())
    with pytest.raises(ValueError, match="overlong is 'cut'; choose one of error, drop_first_rounds"):
        DataCollatorForVisualChat(processor, 20, "cut")


def ask(*paths, answer="Yes."):
    images = [{"type": "image", "path": str(path)} for path in paths]
    question = {"type": "text", "text": "is it so?"}
    return {"messages": [{"role": "user", "content": [*images, question]}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("overlong", ["drop_first_rounds", "drop_last_rounds", "skip"])
def test_what_does_not_fit_is_left_out_and_counted(processor, chat, overlong):
    collator = DataCollatorForVisualChat(processor, 100, overlong)
    batch = collator([{"messages": chat}, ask(), ask(answer="y" * 80)])
    assert batch["input_ids"].shape[0] == 1 and "pixel_values" not in batch
    assert collator.counts == {"shortened": 0, "skipped": 2, "broken": 0}
    with pytest.raises(ValueError, match="more than max_length=100"):
        DataCollatorForVisualChat(processor, 100)([{"messages": chat}])


@pytest.fixture
def broken(tmp_path):
    """Files that are no images, by what is wrong with them, and what the error says."""
    draw_picture(0).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    draw_picture(0, (1, 1)).save(tmp_path / "pixel.png")
    (tmp_path / "archive.json").write_text(json.dumps({"a": "no base64!"}))
    names = ["cut.png", "empty.png", "page.jpg", "pixel.png", "archive.json#a", "gone.png"]
    messages = ["truncated", "is empty", "not an image", "1 x 1 pixels", "holds no image a", "No image file"]
    return dict(zip([str(tmp_path / name) for name in names], messages))


def test_conversations_with_broken_images_are_left_out_up_to_a_limit(processor, chat, broken):
    collator = DataCollatorForVisualChat(processor, max_broken=len(broken))
    expected = DataCollatorForVisualChat(processor)([{"messages": chat}])
    for number, (path, message) in enumerate(broken.items(), start=1):
        with pytest.warns(UserWarning, match=f"left out, {number} of at most 6 images cannot be used: .*{message}"):
            batch = collator([ask(path), {"messages": chat}])
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor)
    for path in broken:  # known
        collator([ask(path), {"messages": chat}])
    assert collator.counts["broken"] == 12
    with pytest.raises(ValueError, match="image 7 that cannot be used, and max_broken=6"):
        collator([ask("elsewhere.png")])
    with pytest.raises(ValueError, match="max_broken is -1"):
        DataCollatorForVisualChat(processor, max_broken=-1)


def test_a_broken_image_counts_once_in_all_workers_and_epochs(processor, tmp_path):
    """Whatever it is inside of, and however often it is shown."""
    (tmp_path / "archive.json").write_text(json.dumps({"a": "!", "b": "!"}))
    inline = {"messages": [{"role": "user", "content": [{"type": "image", "base64": "!"}]}, ask()["messages"][1]]}
    examples = [ask(tmp_path / "gone.png")] * 101 + [ask(tmp_path / f"archive.json#{key}") for key in "ab"] + [inline]
    collator = DataCollatorForVisualChat(processor, max_broken=4)
    for epoch in range(1, 3):
        assert len(list(DataLoader(examples, 8, collate_fn=collator, num_workers=2))) == 13
        assert collator.counts["broken"] == 104 * epoch
    with pytest.raises(ValueError, match="image 4 that cannot be used, and max_broken=3"):
        DataCollatorForVisualChat(processor, max_broken=3)(examples)


def test_odd_images_are_read_for_what_they_are(processor, tmp_path):
    picture = draw_picture(3)
    picture.save(tmp_path / "really_a.gif")
    (tmp_path / "really_a.gif").rename(tmp_path / "gif.jpg")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.effect_noise((9, 9), 50).convert("I;16").save(tmp_path / "16_bits.png")
    collator = DataCollatorForVisualChat(processor, max_broken=0)
    assert len(collator([ask(*sorted(tmp_path.iterdir()))])["pixel_values"]) == 3


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_of_which_nothing_is_left_teaches_nothing(processor, tmp_path, packing):
    collator = DataCollatorForVisualChat(processor, packing=packing)
    with pytest.warns(UserWarning, match="left out"):
        batch = collator([ask(tmp_path / "gone.png")])
    model = make_model().train()
    model(**batch, num_items_in_batch=torch.tensor(0)).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    half = make_model().half().train()
    loss = half(**batch, skip_logits=False).loss
    assert loss == 0 and loss.dtype == torch.float32
    assert model.eval()(**batch).loss.isnan(), "a loss of zero would make an evaluation better"


def test_what_workers_count_is_seen_by_all(processor, tmp_path):
    examples = [ask(tmp_path / f"{number}.png") for number in range(6)] + [ask(answer="y" * 2000)] * 2
    collator = DataCollatorForVisualChat(processor, overlong="skip")
    batches = list(DataLoader(examples, 2, collate_fn=collator, num_workers=2))
    assert len(batches) == 4 and collator.counts == {"shortened": 0, "skipped": 2, "broken": 6}


def test_packing_teaches_what_padding_does(processor, chat):
    """Through processor, collator and model: one row without padding, the loss to 1e-5, every gradient to 1e-4."""
    images = [block["path"] for message in chat[::2] for block in message["content"] if block["type"] == "image"]
    examples = [{"messages": chat}, ask(images[2]), {"pack": [ask(), ask(images[0], images[1], answer="No, never.")]}]
    padded = DataCollatorForVisualChat(processor)(examples)
    packed = DataCollatorForVisualChat(processor, packing=True)(examples)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum())) and "attention_mask" not in packed
    assert (packed["position_ids"] == 0).sum() == 4 == len(padded["input_ids"])
    assert torch.equal(packed["pixel_values"], padded["pixel_values"])
    models = [make_model().train() for _ in range(2)]
    losses = [model(**batch).loss for model, batch in zip(models, (packed, padded))]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for (name, actual), expected in zip(models[0].named_parameters(), models[1].parameters()):
        assert (actual.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)
