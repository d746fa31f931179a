"""The route through the decoder: why a call is masked, that both routes agree, and what is known of a decoder."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, SHAPE, TEXT_CONFIGS, make_model, pixels, tokens
from safetensors.torch import load_file
from test_attention import draw
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import AutoConfig, DynamicCache, LlamaConfig

from modeling_visualchat import (
    ATTENTION_TYPES,
    ConversationCache,
    VisualChatForConditionalGeneration,
    mmca_attention_reference,
)
from modeling_visualchat.attention_types_visualchat import kernel_of
from modeling_visualchat.plan_visualchat import Run, prefix_cross_attention, prefix_cross_attention_reference
from modeling_visualchat.route_visualchat import ROUTE_CONDITIONS


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("route", ["auto", "two_streams", "masked"])
def test_a_checkpoint_of_version_0_1_gives_its_logits(route):
    """Saved, with its logits, loss and generated tokens, before the routes had names."""
    model = VisualChatForConditionalGeneration.from_pretrained(GOLDEN / "checkpoint").eval()
    model.set_route(route)
    expected = load_file(GOLDEN / "expected.safetensors")
    batch = {name: expected[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = model(**batch).logits * batch["attention_mask"][..., None]
        loss = model(**batch, labels=expected["labels"]).loss
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
        torch.testing.assert_close(loss, expected["loss"])
    if route == "auto":
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, expected["generated"])


@pytest.mark.parametrize("name", ATTENTION_TYPES)
def test_a_drawing_is_what_the_model_computes(name):
    """The keys whose values reach the output of each row, and in MMCA by which softmax."""
    drawing = ATTENTION_TYPES[name].drawing
    kinds = [line[0] for line in drawing.splitlines()]
    rows = [line.split(" | ")[1].split() for line in drawing.splitlines()]
    is_image = torch.tensor([[int(kind == "I") for kind in kinds]])
    query, key, value, *_ = draw(["".join(kinds)], num_heads=1, num_key_heads=1)
    reference = ATTENTION_TYPES[name].reference
    if reference is None:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        output = reference(query, key, value, is_image)
    if ATTENTION_TYPES[name].added_layers is not None:  # what the decoder's own layers read
        output = output + mmca_attention_reference(query, key, value, is_image, attention_mask=1 - is_image)
    for place, row in enumerate(rows):
        (gradient,) = torch.autograd.grad(output[0, 0, place].sum(), value, retain_graph=True)
        weights = gradient[0, 0, :, 0]
        assert [weight != 0 for weight in weights.tolist()] == [mark != "." for mark in row]
        for softmax in set(row) - {"."}:
            total = weights[torch.tensor([mark == softmax for mark in row])].sum()
            torch.testing.assert_close(total, torch.tensor(1.0))


def window(model):
    model.config.text_config.sliding_window = 4


def longrope(model):
    model.config.text_config.rope_parameters = {
        "rope_type": "longrope", "original_max_position_embeddings": 5, "short_factor": [1.0], "long_factor": [3.0]
    }  # fmt: skip


def checkpoint_reentrantly(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": True})


# How to meet each condition of the table: the attention type, a change of the model, and arguments of the call.
MEETING = [
    ("causal", None, {}),
    ("mmca", lambda model: model.set_attn_implementation("eager"), {}),
    ("mmca", None, {"attention_mask": torch.ones(1, 2, 8, 8, dtype=torch.bool)}),
    None,  # torch.compile: `test_compiles_without_a_graph_break`
    ("mmca", window, {}),
    ("mmca", None, {"output_hidden_states": True}),
    ("mmca", None, {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]]), "past_key_values": ConversationCache()}),
    ("mmca", longrope, {}),
    ("mmca", None, {"past_key_values": "used"}),
    ("mmca", checkpoint_reentrantly, {}),
    None,  # a decoder that passes nothing on: `test_a_decoder_that_drops_keyword_arguments_runs_by_masks`
]


@pytest.mark.parametrize("number", range(len(ROUTE_CONDITIONS)), ids=lambda number: ROUTE_CONDITIONS[number].condition)
def test_each_condition_takes_the_masked_route_with_its_reason(number):
    if MEETING[number] is None:
        assert number in (3, 10)
        return
    attention_type, change, kwargs = MEETING[number]
    model, ids, images = make_model(attention_type=attention_type), tokens("I", 3), pixels(0)
    kwargs = dict(kwargs)
    if kwargs.get("past_key_values") == "used":
        kwargs["past_key_values"] = DynamicCache()
        model(ids[:, -1:], past_key_values=kwargs["past_key_values"])
        kwargs |= {"mm_token_type_ids": torch.nn.functional.pad((ids == IMAGE_TOKEN_ID).long(), (1, 0))}
    if change is not None:
        change(model)
    model.set_route("two_streams")
    with pytest.raises(ValueError, match="is not possible: " + re.escape(ROUTE_CONDITIONS[number].condition)):
        model(ids, images, **kwargs)


def test_the_page_lists_the_conditions_in_order():
    page = (Path(__file__).parent.parent / "modeling_visualchat" / "README.md").read_text()
    table = re.search(r"<!-- routes -->\n(.*?)<!-- /routes -->", page, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in table[1].strip().splitlines()[2:]]
    assert rows == [[row.condition, "masked", row.cost] for row in ROUTE_CONDITIONS]


def test_the_reason_for_the_masked_route_is_logged_once(monkeypatch):
    messages = []
    monkeypatch.setattr(
        "modeling_visualchat.modeling_visualchat.logger.warning_once", lambda message: messages.append(message)
    )
    model, ids, images = make_model(), tokens("I", 3), pixels(0)
    model(ids, images)
    model.set_route("masked")
    model(ids, images)
    assert messages == []
    model.set_route("auto")
    model(ids, images, output_attentions=True)
    assert messages == ["VisualChat takes the masked route through the decoder: recorded attentions or hidden states."]
    with pytest.raises(ValueError, match="Unknown route 'fast'; choose one of auto, two_streams, masked"):
        model.set_route("fast")


def test_kernels_have_names_of_their_own():
    assert [kernel_of(name) for name in ("mmca_sdpa", "sdpa", "eager", "flash_attention_2")] == [
        "sdpa", "sdpa", "eager", "flash_attention_2",
    ]  # fmt: skip


RUNS = {
    "prefixes": [[Run(0, 2, 0, 3), Run(2, 7, 0, 6)]],
    "text first": [[Run(0, 3, 0, 0), Run(3, 7, 0, 6)]],
    "packed": [[Run(0, 2, 0, 3), Run(2, 3, 3, 3), Run(3, 5, 3, 6)]],
    "unequal rows": [[Run(0, 4, 0, 6)], [Run(0, 1, 0, 0), Run(1, 7, 0, 3)]],
    "no image": [[Run(0, 7, 0, 0)]],
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_prefix_cross_attention_equals_its_reference_in_value_and_gradient(runs, heads):
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(runs), heads[0], 7, 8), (len(runs), heads[1], 6, 8), (len(runs), heads[1], 6, 5)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    results = []
    for form in (prefix_cross_attention, prefix_cross_attention_reference):
        output = form(*inputs, runs)
        weighted = (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)).sum()
        gradients = [None] * 3
        if weighted.requires_grad:
            gradients = torch.autograd.grad(weighted, inputs, allow_unused=True)
        zeros = map(torch.zeros_like, inputs)
        results.append([output, *(zero if part is None else part for zero, part in zip(zeros, gradients))])
    for actual, expected in zip(*results):
        torch.testing.assert_close(
            torch.as_tensor(actual).expand_as(torch.as_tensor(expected)), torch.as_tensor(expected)
        )


# Model types with layouts of their own, and what is refused of their keys.
LAYOUTS = {
    "cohere2": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096}, [True, False], None),
    "exaone4": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096}, [True, False], None),
    "glm4": ({"head_dim": 8}, [True, True], None),
    "gpt_neox": ({}, [True, True], None),
    "granite": ({}, [True, True], None),
    "olmo3": ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096}, [True, True], None),
    "phi": ({}, [True, True], None),
    "hunyuan_v1_dense": ({"head_dim": 8}, [True, True], "are off by"),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_rotation_is_read_and_verified(monkeypatch, model_type):
    """A repeated image, in two streams and masked; far positions; norms that are not one."""
    changes, is_rotated, refused = LAYOUTS[model_type]
    shape = {**SHAPE, "max_position_embeddings": 8192, **changes}
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: AutoConfig.for_model(model_type, **shape))
    model = make_model()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    probe = model.model.probe
    assert probe.no_two_streams is None and probe.rotation.is_rotated == is_rotated
    assert (probe.no_late_rotation is None) if refused is None else (refused in probe.no_late_rotation)
    ids, images = tokens(2, "I", 3, "I", 1), pixels(0, 0)
    for start in (0, 4000):
        positions = torch.arange(start, start + ids.shape[1])[None]
        results = []
        for route in ("two_streams", "masked"):
            model.set_route(route)
            with torch.no_grad():
                results.append(model(ids, images, position_ids=positions, use_cache=False).logits)
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert model.model.supports_image_memory() is (refused is None)
    if refused is not None:
        with pytest.raises(ValueError, match=r"Images can be computed apart from a conversation only .* are off by"):
            model.model.compute_image_states(images)


def test_a_probe_leaves_the_random_state_and_the_weights_alone():
    model = make_model()
    state, weights = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    assert model.model.probe.no_two_streams is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_probe_does_not_depend_on_the_default_dtype_and_seeds_no_device(monkeypatch):
    seeds, model = [], make_model()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert model.model.probe.no_late_rotation is None and torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert not seeds


def test_layers_in_checkpoint_wrappers_train_as_others():
    ids, images, losses = tokens(2, "I", 3), pixels(0), []
    for is_wrapped in (False, True):
        model = make_model().train()
        if is_wrapped:
            apply_activation_checkpointing(
                model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
                checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
            )  # fmt: skip
        model.set_route("two_streams")
        loss = model(ids, images, labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)).loss
        loss.backward()
        losses.append((loss, model.model.multi_modal_projector.linear.weight.grad))
    torch.testing.assert_close(*losses)


def test_packed_rows_of_one_text_token_read_only_their_own_images():
    model = make_model()
    ids = torch.cat([torch.cat([tokens("I"), tokens(1)], dim=1), torch.cat([tokens(1), tokens("I")], dim=1)])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0], [0, 0, 1, 2, 3, 4]])
    results = []
    for route in ("two_streams", "masked"):
        model.set_route(route)
        with torch.no_grad():
            results.append(model(ids, pixels(0, 1), position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_another_decoder_is_probed_again():
    model = make_model()
    first = model.model.probe
    assert model.model.probe is first
    model.model.language_model = make_model(seed=1).model.language_model
    assert model.model.probe is not first
    assert isinstance(model.config.text_config, LlamaConfig)
