"""The accounts of a training run: facts of batches, logged keys, samples, and batches whose loss is not finite."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_picture, make_model, make_processor
from drawn_chats import draw_chats
from PIL import Image
from planning.hours import peak_tflops
from torch.nn.functional import cross_entropy
from training_accounts import BATCHES, Sums, TokenLosses, TrainerWithAccounts, find_spike
from training_arguments import FinetuneError
from training_parameters import GroupedTrainer, GroupOptions
from training_samples import SAMPLES, Samples
from transformers import TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from processing_visualchat import DataCollatorForVisualChat, load_conversations, load_image
from processing_visualchat.data.batch_facts import BatchFacts, measure_answers, source_of


class AccountsTrainer(GroupedTrainer, TrainerWithAccounts):
    pass


def turn(question, answer, *images, **answer_keys):
    blocks = [{"type": "image", "image": image} for image in images]
    return [
        {"role": "user", "content": [*blocks, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer, **answer_keys},
    ]


PICTURES = [draw_picture(seed) for seed in range(2)]
EXAMPLES = [
    {
        "messages": [*turn("a?", "no", PICTURES[0], weight=0), *turn("b?", "yes", *PICTURES), *turn("c?", "maybe")],
        "source": "mine", "where": ["/data/mine.json, record 0"],
    },
    {"messages": turn("d?", "Z"), "where": ["/data/other.jsonl, line 1", "/data/other.jsonl, line 2"]},
    {"messages": turn("e?", "four", PICTURES[1]), "source": "mine"},
]  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_the_facts_of_a_batch_are_asked_for(packing):
    plain = DataCollatorForVisualChat(make_processor(), packing=packing)(EXAMPLES)
    batch = DataCollatorForVisualChat(make_processor(), packing=packing, return_facts=True)(EXAMPLES)
    facts = batch.pop("facts")
    assert plain.keys() == batch.keys() and all(torch.equal(plain[name], batch[name]) for name in plain)
    assert list(facts.answers()) == [(0, 2), (0, 3), (1, 1), (2, 1)]  # the first answer has no loss
    assert measure_answers(batch["labels"]) == facts.answer_lengths
    ids = batch["labels"][batch["labels"] != -100]
    texts = make_processor().batch_decode(ids.split(facts.answer_lengths))
    assert [text.strip() for text in texts] == ["yes<eos>", "maybe<eos>", "Z<eos>", "four<eos>"]
    assert (facts.num_images, facts.num_unique_images) == (4, 2)
    assert facts.num_tokens + facts.num_padding == batch["input_ids"].numel()
    assert facts.num_padding == (0 if packing else int((batch["attention_mask"] == 0).sum()))
    assert [source_of(example) for example in facts.examples] == ["mine", "other.jsonl", "mine"]


def test_the_loss_is_that_of_transformers_and_the_gradient_to_the_bit():
    torch.manual_seed(0)
    first = torch.randn(2, 7, 11, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    targets = torch.randint(11, (2, 7)).masked_fill(torch.rand(2, 7) < 0.4, -100)
    for number in (None, torch.tensor(5)):
        token_losses = TokenLosses()
        options = {"labels": None, "shift_labels": targets, "vocab_size": 11, "num_items_in_batch": number}
        actual, expected = token_losses(logits=first, **options), ForCausalLMLoss(logits=second, **options)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss, x in ((actual, first), (expected, second))))
        kept = cross_entropy(first[targets != -100], targets[targets != -100], reduction="none")
        np.testing.assert_allclose(token_losses.take(), kept.detach().numpy(), rtol=1e-5)
        assert len(token_losses.take()) == 0


def test_sums_are_those_worked_out_by_hand():
    facts = BatchFacts(EXAMPLES, [2, 1, 2, 1], num_tokens=90, num_padding=10, num_images=4, num_unique_images=2)
    sums = Sums()
    means = sums.add(facts, np.array([1.0, 2.0, 6.0, 4.0, 5.0, 7.0]))
    assert means == [3.0, 4.5, 7.0]
    sums.add(BatchFacts([], [], 0, 100, 0, 0), np.zeros(0))
    sums.memory = 1.5
    assert sums.mean_losses("eval_") == {
        "eval_loss_source/mine": 4.0, "eval_loss_source/other.jsonl": 4.5,
        "eval_loss_round/1": 16 / 3, "eval_loss_round/2": 1.5, "eval_loss_round/3": 6.0,
    }  # fmt: skip
    assert sums.rates(2.0) == {
        "tokens_per_second": 45.0, "images_per_second": 2.0, "samples_per_second": 1.5, "padding": 0.55,
        "shared_images": 0.5, "memory_gib": 1.5,
    }  # fmt: skip


def make_trainer(folder, trainable=(), **values):
    settings = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", max_steps=2, remove_unused_columns=False,
        logging_steps=1, train_sampling_strategy="sequential", learning_rate=0.0, disable_tqdm=True,
        lr_scheduler_type="constant", per_device_train_batch_size=2, gradient_accumulation_steps=2, **values,
    )  # fmt: skip
    return AccountsTrainer(
        model=make_model().set_trainable(*trainable),
        args=settings,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        data_collator=DataCollatorForVisualChat(make_processor(), return_facts=True),
        group_options=GroupOptions(0.0, 0.0, {}, {}),
        arguments=SimpleNamespace(
            model="x", trainable=None, lora=None, lora_target=None, quantization=None, frozen_dtype="float32"
        ),
        samples=Samples(EXAMPLES, make_processor(), 2, max_new_tokens=3),
    )


@pytest.mark.parametrize("packing", [False, True])
def test_trainer_logs_losses_by_source_and_round(tmp_path, packing):
    """With weights that stay, the losses of a step are those of its conversations, each run by itself."""
    trainer = make_trainer(tmp_path, eval_strategy="steps")
    trainer.data_collator.packing = packing
    trainer.peak = 1e-6
    trainer.train()
    model, alone = make_model(), []
    for example in EXAMPLES:
        batch = DataCollatorForVisualChat(make_processor())([example])
        targets = batch.pop("labels")[0, 1:]
        found = cross_entropy(model(**batch).logits[0, :-1], targets, reduction="none")[targets != -100]
        alone.append(found.tolist())
    every = [loss for losses in alone for loss in losses]
    expected = {"loss_source/mine": np.mean(alone[0] + alone[2]), "loss_source/other.jsonl": np.mean(alone[1])}
    expected |= {"loss_round/2": np.mean(alone[0][:5])}  # " yes" and the end token
    history = trainer.state.log_history
    training, evaluation = ([logs for logs in history if name in logs] for name in ("loss", "eval_loss"))
    assert len(training) == len(evaluation) == 2
    for logs, prefix in ((training[0], ""), (evaluation[0], "eval_")):
        for key, value in expected.items():
            assert logs[prefix + key] == pytest.approx(value, rel=1e-4), key
    first = training[0]
    assert first["loss"] == pytest.approx(np.mean(every), rel=1e-4)
    assert first["learning_rate/projector"] == first["learning_rate/embeddings"] == 0.0
    assert (first["padding"] == 0) == packing and first["shared_images"] == 0.25  # one of four, in the first batch
    assert first.keys() == training[1].keys() and first["mfu"] > 0 and first["tokens_per_second"] > 0
    for step in (1, 2):
        text = (tmp_path / SAMPLES / f"step-{step}.md").read_text()
        assert "## /data/mine.json, record 0" in text and "**Question**: <image> <image> b?" in text
        assert Image.open(tmp_path / SAMPLES / f"step-{step}.png").width > 300


def test_utilisation_is_operations_over_the_peak(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.count_operations = lambda mean: 1000 * mean.text_tokens + 50000 * mean.images
    trainer.peak, trainer.clock.seconds = 1e-6, 2.0
    sizes = {"conversations": 4, "tokens": 100, "images": 6, "unique_images": 5}
    # Images take 6 x 5 of the tokens, and 5 of them are computed.
    assert trainer.utilisation(sizes)["mfu"] == pytest.approx((1000 * 70 + 50000 * 5) / (2.0 * 1e6))
    trainer.peak = None
    assert trainer.utilisation(sizes) == {}
    names = {
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10G": None, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989, "NVIDIA L40S": 362, "NVIDIA GeForce RTX 3060": None,
    }  # fmt: skip
    assert {name: peak_tflops(name) for name in names} == names


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_records(tmp_path, is_trained):
    trainer = make_trainer(tmp_path, () if is_trained else ("multi_modal_projector",))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[make_processor().tokenizer.convert_tokens_to_ids("Z")] = torch.nan
    with pytest.raises(FinetuneError) as ended:
        trainer.train()
    path = tmp_path / BATCHES / "nan-step-1-process-0.jsonl"
    message = str(ended.value)
    where = "step 1 of process 0: /data/other.jsonl, line 1 + /data/other.jsonl, line 2 (loss nan); /data/mine.json"
    assert f"the loss is not finite in {where}, record 0 (loss " in message and str(path) in message
    assert ("weights are not finite either" in message) == is_trained
    other, mine = load_conversations(path, make_processor())["messages"]
    assert other[1]["content"] == "Z" and [each.get("weight") for each in mine[1::2]] == [0, None, None]
    images = [load_image(block["base64"]) for each in mine[::2] for block in each["content"] if "base64" in block]
    assert [image.tobytes() for image in images] == [PICTURES[number].tobytes() for number in (0, 0, 1)]


def test_a_spike_names_and_saves_its_records_and_training_goes_on(tmp_path):
    assert not find_spike([1.0, 1.2] * 24, 9.0) and not find_spike([1.0, 1.2] * 25, 1.79)
    assert find_spike([1.0, 1.2] * 25, 1.81)  # seven times 0.1 above 1.1
    trainer = make_trainer(tmp_path)
    trainer.recent = deque([1.0, 1.2] * 25, maxlen=1000)
    with pytest.warns(UserWarning, match=r"The loss is \d\.\d+, after 1\.100, in step 1 of process 0: /data/"):
        trainer.train()
    assert len(load_conversations(tmp_path / BATCHES / "spike-1-step-1-process-0.jsonl", make_processor())) == 2
    assert len(trainer.recent) == 54 and trainer.state.global_step == 2


def test_samples_are_spread_over_the_data_without_broken_images_and_drawn(tmp_path):
    lost = {"messages": turn("f?", "five", str(tmp_path / "gone.png"))}
    system = {"role": "system", "content": "Be short."}
    rest = [{"messages": [system, *turn(f"{number} costs $1 or $x^?", "$2")]} for number in range(4)]
    samples = Samples([lost, *rest, EXAMPLES[0]], make_processor(), 3)
    assert [len(example.rounds) for example in samples.examples] == [1, 1]
    assert samples.examples[0].system == "Be short." and samples.examples[0].key == "data, conversation 1"
    draw_chats([([("costs $1 or $x^?", PICTURES * 2, "$2")], ["5\n\n" * 9])] * 5, tmp_path / "chats.png")
    assert Image.open(tmp_path / "chats.png").size[0] == 4 * 360
