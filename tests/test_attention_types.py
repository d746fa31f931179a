"""The variants of MMCA: joint merge, attention within an image, earlier text for image tokens."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    IMAGE_SEQ_LENGTH,
    IMAGE_TOKEN_ID,
    PAPER,
    TEXT_CONFIGS,
    make_config,
    make_model,
    pad_left,
    pixels,
    tokens,
)
from test_attention import PATTERNS, assert_errs_no_more_than_rounding, draw, outputs_and_gradients
from test_image_memory import CONVERSATIONS, logits
from test_plan import pack

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import (
    ATTENTION_TYPES,
    PROJECTORS,
    ConversationCache,
    ImageMemory,
    VisualChatForConditionalGeneration,
    mmca_attention,
    mmca_attention_reference,
)
from modeling_visualchat.attention_visualchat import MultiModalCausalAttention
from modeling_visualchat.kernels_visualchat import split_heads


VARIANTS: dict[str, dict[str, str]] = {
    key: {"merge": each.merge, "image_attention": each.image_attention}
    for key, each in ATTENTION_TYPES.items()
    if each.name == "mmca"
}
VARIANTS |= {
    "mmca, last image": {"image_scope": "last"},
    "joint, last image": {"merge": "joint", "image_scope": "last"},
    "joint, last image for half of the heads": {"merge": "joint", "image_scope": "half"},
    "sum within images, last image for half": {"image_attention": "image", "image_scope": "half"},
    "joint within images, last image": {"merge": "joint", "image_attention": "image", "image_scope": "last"},
}
VARIANTS = {key: PAPER | options for key, options in VARIANTS.items()}
INDEPENDENT = {key: options for key, options in VARIANTS.items() if options.get("image_attention") != "self_and_text"}
WITHIN = {key: options for key, options in VARIANTS.items() if options.get("image_attention") == "image"}
DECODERS = list(TEXT_CONFIGS)
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
independent = pytest.mark.parametrize("options", INDEPENDENT.values(), ids=INDEPENDENT)
within = pytest.mark.parametrize("options", WITHIN.values(), ids=WITHIN)


@variants
@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS)
def test_the_fast_form_equals_the_reference_in_value_and_gradient(rows, options, heads=(4, 2)):
    inputs = draw(rows, *heads)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    expected = outputs_and_gradients(mmca_attention_reference, *exact, *inputs[3:], **options)
    assert_errs_no_more_than_rounding(outputs_and_gradients(mmca_attention, *inputs, **options), expected)


@pytest.mark.parametrize("heads", [(2, 2), (3, 3), (6, 2), (5, 1)], ids=lambda heads: f"{heads[0]} on {heads[1]}")
def test_half_of_any_number_of_heads_reads_the_last_image(heads):
    options = {"merge": "joint", "image_scope": "half"}
    test_the_fast_form_equals_the_reference_in_value_and_gradient(PATTERNS["unequal rows"], options, heads)
    query, key, value, ids, _ = draw(["ITIT"], *heads)
    changed = value + ids[:, None, :, None] * torch.tensor([1.0, 0, 0, 0])[:, None]  # of the first image
    before, after = (mmca_attention(query, key, values, ids, **options)[0, :, -1] for values in (value, changed))
    queries_per_key = heads[0] // heads[1]
    numbers = [head % queries_per_key if queries_per_key > 1 else head for head in range(heads[0])]
    assert (before != after).any(dim=-1).tolist() == [number % 2 == 1 for number in numbers]


def test_heads_that_tensor_parallelism_divides_unevenly_are_refused():
    states, layer = torch.zeros(1, 3, 1, 4), SimpleNamespace(config=SimpleNamespace(num_attention_heads=6))
    with pytest.raises(ValueError, match=r'"half" cannot divide the 6 heads .* that hold 3 each: use half as many'):
        split_heads(states, states, states, layer)
    halves = split_heads(states, states[:, :1], states[:, :1], layer)  # three that share a key are divided anywhere
    assert [query.shape[1] for query, _, _ in halves] == [2, 1]


def test_a_joint_merge_is_one_softmax_weighted_by_the_shares_of_two():
    query, key, value, ids, _ = draw(["TTIITITTI"])
    joint = mmca_attention_reference(query, key, value, ids, merge="joint")
    last_text = 7
    scores = (query @ key.repeat_interleave(2, dim=1).mT * query.shape[-1] ** -0.5)[0, :, last_text, : last_text + 1]
    values, is_image = value.repeat_interleave(2, dim=1)[0, :, : last_text + 1], ids[0, : last_text + 1].bool()
    one = (scores.softmax(dim=-1)[:, None] @ values)[:, 0]
    torch.testing.assert_close(joint[0, :, last_text], one, rtol=1e-5, atol=1e-6)
    parts = [(scores[:, kept].softmax(dim=-1)[:, None] @ values[:, kept])[:, 0] for kept in (~is_image, is_image)]
    totals = torch.stack([scores[:, kept].logsumexp(dim=-1) for kept in (~is_image, is_image)]).softmax(dim=0)
    weighted = sum(share[:, None] * part for share, part in zip(totals, parts))
    torch.testing.assert_close(joint[0, :, last_text], weighted, rtol=1e-5, atol=1e-6)


@variants
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_layer_computes_the_reference(decoder, options, monkeypatch):
    model = make_model(decoder, **options)
    ids = tokens(2, "I", 2, "I", 1)
    is_image = (ids == IMAGE_TOKEN_ID).long()
    errors = []
    compute = MultiModalCausalAttention.__call__

    def compare(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        output, weights = compute(self, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        expected = mmca_attention_reference(query, key, value, is_image, scaling=scaling, **options).transpose(1, 2)
        errors.append((output - expected).abs().max().item())
        return output, weights

    monkeypatch.setattr(MultiModalCausalAttention, "__call__", compare)
    model.set_route("masked")
    model(ids, pixels(0, 1))
    assert len(errors) == 2 and max(errors) < 1e-5


@independent
@pytest.mark.parametrize("decoder", DECODERS)
def test_both_routes_and_kernels_give_the_same_logits_and_gradients(decoder, options):
    """Over unequal rows padded on the left, with images side by side and twice, one row without images."""
    rows = [tokens(1, "I", 3), tokens("I", "I", 2, seed=1), tokens(4, seed=2)]  # short of every window
    batch = pad_left(rows)
    is_first = batch["attention_mask"].cumsum(dim=1) <= 1
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE_TOKEN_ID) | is_first, -100)
    results = []
    for route, kernel in (("two_streams", "sdpa"), ("masked", "sdpa"), ("masked", "eager")):
        model = make_model(decoder, **options).train()
        model.set_attn_implementation(kernel)
        model.set_route(route)
        output = model(**batch, pixel_values=pixels(0, 1, 0), labels=labels, skip_logits=False)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits[batch["attention_mask"].bool()], gradients))
    for actual, gradients in results[1:]:
        torch.testing.assert_close(results[0][0], actual, rtol=1e-4, atol=1e-4)
        assert gradients.keys() == results[0][1].keys() and len(gradients) > 30
        for name, gradient in gradients.items():
            torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-3, atol=1e-5)


@variants
@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
def test_packed_conversations_learn_what_padded_ones_do(decoder, options):
    rows = [tokens(3, "I", 3), tokens("I", "I", 2, seed=1), tokens(4, seed=2), tokens(1, "I", seed=3)]
    ids, positions = pack(rows)
    images = pixels(0, 1, 2, 3)
    packed, padded = make_model(decoder, **options).train(), make_model(decoder, **options).train()
    hidden = (ids == IMAGE_TOKEN_ID) | (positions == 0)
    loss = packed(ids, images, position_ids=positions, labels=ids.masked_fill(hidden, -100)).loss
    loss.backward()
    batch = pad_left(rows)
    is_first = batch["attention_mask"].cumsum(dim=1) <= 1
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE_TOKEN_ID) | is_first, -100)
    expected = padded(**batch, pixel_values=images, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in padded.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)


@independent
@pytest.mark.parametrize("place", [0, 4], ids=["text", "image"])
def test_a_value_that_is_not_finite_stays_in_its_packed_conversation_in_two_streams(place, options):
    model, (ids, positions) = make_model(**options), pack([tokens(3, "I", 4), tokens(2, "I", 3, seed=1)])
    types = (ids == IMAGE_TOKEN_ID).long()
    embeds = model.get_input_embeddings()(ids).detach()
    expected = model(inputs_embeds=embeds, mm_token_type_ids=types, position_ids=positions).logits
    embeds[0, place] = float("inf")
    actual = model(inputs_embeds=embeds, mm_token_type_ids=types, position_ids=positions).logits
    assert not actual[0, 11].isfinite().any()
    torch.testing.assert_close(actual[:, 12:], expected[:, 12:])


@variants
@pytest.mark.parametrize("decoder", ["llama", "mistral", "gemma3"])
def test_generation_with_a_cache_is_generation_without(decoder, options):
    """Rows padded on the left, longer than the windows; by default, with a static cache, and with beams."""
    model = make_model(decoder, **options)
    rows, images = [tokens(4, "I", 9), tokens(2, "I", 3, "I", 12, seed=1), tokens(6, seed=2)], pixels(0, 1, 2)
    expected = logits(model, rows, images, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        torch.testing.assert_close(logits(model, rows, images, **cache), expected, rtol=1e-4, atol=1e-4)
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    batch = {**pad_left(rows), "pixel_values": images}
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


@independent
@pytest.mark.parametrize("decoder", ["llama", "qwen3", "smollm3"])
def test_logits_with_an_image_memory_are_those_without(decoder, options):
    """In other orders, positions, rounds and rows."""
    model, memory = make_model(decoder, **options), ImageMemory()
    masked = make_model(decoder, **options)
    masked.set_route("masked")
    for rows, images in 2 * list(CONVERSATIONS.values()):
        expected = logits(masked, rows, images)
        torch.testing.assert_close(logits(model, rows, images, image_memory=memory), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(model, rows, images), expected, rtol=0, atol=1e-5)
    assert (memory.hits, memory.misses) == (17, 3)


@independent
def test_a_kept_conversation_goes_on_and_is_edited_as_a_fresh_one(processor, chat, options):
    session = make_model(**options).start_chat(processor, ImageMemory(), max_new_tokens=4, do_sample=False)
    messages = chat[:1]
    messages = [*messages, {"role": "assistant", "content": session.answer(messages)}, chat[2]]
    messages = [*messages, {"role": "assistant", "content": session.answer(messages)}, chat[2]]
    first = {**chat[0], "content": [chat[2]["content"][1], chat[0]["content"][1]]}  # another image in the first round
    for edited in (messages, [first, *messages[1:]]):
        fresh = make_model(**options).start_chat(processor, max_new_tokens=4, do_sample=False)
        assert session.answer(edited) == fresh.answer(edited)


@variants
def test_what_comes_later_changes_no_bit(options):
    model = make_model(**options)
    ids = tokens(3, "I", 4, "I", 2, "I", 5)
    cut = 3 + IMAGE_SEQ_LENGTH + 4
    for route in ("auto", "masked"):
        model.set_route(route)
        before = model(ids, pixels(0, 1, 2)).logits
        assert torch.equal(model(ids, pixels(0, 8, 9)).logits[:, :cut], before[:, :cut])
        other_text = torch.cat([ids[:, :-5], tokens(5, seed=3)], dim=1)
        assert torch.equal(model(other_text, pixels(0, 1, 2)).logits[:, :-5], before[:, :-5])


def test_what_an_image_depends_on():
    """Its own tokens within an image, and earlier text by the setting for old checkpoints; nothing else."""
    for options in VARIANTS.values():
        model = make_model(**options)
        place = slice(-IMAGE_SEQ_LENGTH, None)
        states = [
            model.model(tokens(length, "I", 1, "I", seed=seed), pixels(other, 1)).last_hidden_state[:, place]
            for length, seed, other in ((3, 0, 0), (3, 5, 0), (3, 0, 6), (14, 0, 0))
        ]
        changes = [bool((state - states[0]).abs().max() > 1e-4) for state in states[1:]]
        assert changes == [options.get("image_attention") == "self_and_text"] * 3, options
        last_patch = pixels(0)
        last_patch[:, :, -4:, -4:] += 1.0
        ids = tokens(2, "I")
        images = model.get_image_features(torch.cat([pixels(0), last_patch])).pooler_output
        mixed = {"image": type(model.get_image_features(pixels(0)))(pooler_output=[images[0].clone()])}
        mixed["image"].pooler_output[0][-1] = images[1][-1]
        plain = model.model(ids, pixels(0)).last_hidden_state[:, 2:-1]
        changed = model.model(ids, mm_encoder_outputs=mixed).last_hidden_state[:, 2:-1]
        assert bool((plain - changed).abs().max() > 1e-4) == (options.get("image_attention") == "image"), options


@pytest.mark.parametrize("projector_type", PROJECTORS)
@pytest.mark.parametrize("key", ATTENTION_TYPES)
def test_trains_packs_saves_loads_and_generates_with_each_projector(key, projector_type, tmp_path):
    length = 4 if projector_type == "perceiver" else IMAGE_SEQ_LENGTH  # its queries form a square
    options = {**ATTENTION_TYPES[key].options, "cross_layer_interval": 1}
    model = make_model(projector_type=projector_type, image_seq_length=length, **options).set_trainable().train()
    ids = torch.cat([tokens(3), torch.full((1, length), IMAGE_TOKEN_ID), tokens(4, seed=1)], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
    labels[:, 0] = -100
    rows, positions = pack([ids, ids])
    packed = model(rows, pixels(0, 0), position_ids=positions, labels=labels.repeat(1, 2)).loss
    torch.testing.assert_close(packed, model(ids, pixels(0), labels=labels).loss, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(ids, pixels(0), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids, pixels(0)).logits, model(ids, pixels(0)).logits)
    generate = {"pixel_values": pixels(0), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **generate)
    assert torch.equal(loaded.generate(ids, **generate), expected)
    assert torch.equal(model.generate(ids, **generate, use_cache=False), expected)


@within
def test_images_have_to_be_whole(options):
    model = make_model(**options)
    ids, types = tokens(2, "I", 2), (tokens(2, "I", 2) == IMAGE_TOKEN_ID).long()
    embeds = model.get_input_embeddings()(ids.masked_fill(types.bool(), 5))
    for route in ("auto", "masked"):
        model.set_route(route)
        with pytest.raises(ValueError, match="holds 4 image tokens, which are not whole images of 5"):
            model(inputs_embeds=embeds[:, :-3], mm_token_type_ids=types[:, :-3])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(ids, pixel_values=pixels(0), max_new_tokens=2, prefill_chunk_size=4)
    model.set_route("auto")
    states = model.model.compute_image_states(pixels(0))
    kept = {"attention_mask": torch.ones_like(ids)}
    positions = torch.tensor([[0, 1, 2, 4, 6, 8, 10, 11, 12]])
    with pytest.raises(ValueError, match="positions of an image's tokens have to follow each other"):
        model(ids, image_states=states, position_ids=positions, **kept)
    apart = [make_model(**options), make_model(**options)]
    apart[1].set_route("masked")
    actual, expected = (each(ids, pixels(0), position_ids=positions, **kept).logits for each in apart)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@independent
def test_a_model_is_switched_to_another_variant(options):
    model, ids, images = make_model(), tokens(2, "I", 3, "I", 2), pixels(0, 0)
    model(ids, images)
    for name, value in options.items():
        setattr(model.config, name, value)
    torch.testing.assert_close(model(ids, images).logits, make_model(**options)(ids, images).logits)


def test_unknown_values_are_refused_with_the_nearest():
    for options, message in (
        ({"merge": "joined"}, r"Unknown merge='joined' \(did you mean 'joint'\?\); choose one of sum, joint"),
        ({"image_attention": "images"}, "did you mean 'image'"),
        ({"attention_type": "mcma"}, "did you mean 'mmca'"),
        ({"attention_type": "causal", "merge": "joint"}, "'causal' has no form with merge='joint'"),
        (
            {"merge": "joint", "image_attention": "self_and_text"},
            r"it has \(merge, image_attention\): \('sum', 'self'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(**options)


def test_an_image_that_depends_on_text_has_no_memory():
    model = make_model(merge="sum", image_attention="self_and_text")
    with pytest.raises(ValueError, match="Images can be computed apart"):
        logits(model, [tokens(2, "I", 2)], pixels(0), image_memory=ImageMemory())
    cache = ConversationCache()
    ids = tokens(2, "I", 2, "I", 3)
    model.generate(ids[:, :9], pixel_values=pixels(0), past_key_values=cache, max_new_tokens=1)
    ids[:, 9] = cache.token_ids[0, -1] if cache.get_seq_length() > 9 else ids[:, 9]
    kept = model.generate(ids, pixel_values=pixels(0, 1), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(kept, model.generate(ids, pixel_values=pixels(0, 1), max_new_tokens=4, do_sample=False))


def attention_of(config: VisualChatConfig) -> tuple[str, str, str, str]:
    return config.attention_type, config.merge, config.image_attention, config.image_scope


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("mmca", "joint", "self", "half")),
        ({"image_scope": "all"}, ("mmca", "joint", "self", "all")),
        ({"image_attention": "self_and_text"}, ("mmca", "sum", "self_and_text", "all")),
        ({"attention_type": "causal"}, ("causal", "sum", "self", "all")),
        ({"attention_type": "cross", "image_scope": "last"}, ("cross", "sum", "self", "last")),
    ],
    ids=str,
)
def test_a_new_model_has_the_defaults_of_its_attention_type(chosen, expected, tmp_path):
    config = make_config(**chosen)
    assert attention_of(config) == expected
    config.save_pretrained(tmp_path)
    assert attention_of(VisualChatConfig.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("mmca", "sum", "self", "all")),
        ({"merge": "joint"}, ("mmca", "joint", "self", "all")),
        ({"attention_type": "mmca"}, ("mmca", "sum", "self", "all")),
        ({"attention_type": "causal"}, ("causal", "sum", "self", "all")),
    ],
    ids=str,
)
def test_an_old_checkpoint_keeps_its_attention(chosen, expected, tmp_path):
    """As it was written before there was a choice, and with an attention type that is changed."""
    saved = make_config().to_dict()
    for name in ("merge", "image_attention", "image_scope"):
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert attention_of(VisualChatConfig.from_pretrained(tmp_path, **chosen)) == expected


def test_a_checkpoint_that_changes_its_type_takes_the_defaults_of_the_new_one(tmp_path):
    make_config(image_attention="image", image_scope="last").save_pretrained(tmp_path)
    causal = VisualChatConfig.from_pretrained(tmp_path, attention_type="causal")
    assert attention_of(causal) == ("causal", "sum", "self", "all")
    causal.save_pretrained(tmp_path)
    changed = VisualChatConfig.from_pretrained(tmp_path, attention_type="mmca", image_scope="all")
    assert attention_of(changed) == ("mmca", "joint", "self", "all")
