"""The planned form of MMCA: equal to the reference and to the masked form, and taken where it can be."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, SHAPE, TEXT_CONFIGS, make_model, pad_left, pixels, tokens
from peft import LoraConfig, get_peft_model
from test_attention import PATTERNS, assert_errs_no_more_than_rounding, draw, outputs_and_gradients
from transformers import DiffLlamaConfig, DynamicCache

from modeling_visualchat import ConversationCache, mmca_attention_reference
from modeling_visualchat.attention_visualchat import MultiModalCausalAttention
from modeling_visualchat.image_states_visualchat import SkipQueryProjections
from modeling_visualchat.placed_images_visualchat import Place, PlacedImages
from modeling_visualchat.plan_visualchat import (
    IMAGE,
    TwoStreamPlan,
    make_plan,
    mmca_text_attention,
    prefix_cross_attention,
    take,
)


DECODERS = list(TEXT_CONFIGS)


def in_two_streams(query, key, value, mm_token_type_ids, attention_mask):
    """The planned form under the signature of the reference."""
    plan = make_plan(mm_token_type_ids, attention_mask)
    text = [plan.gather_text(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)]
    columns = [(row == IMAGE).nonzero()[:, 0] for row in plan.token_types]
    order = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)
    keys, values = (take(states.transpose(1, 2), order).transpose(1, 2) for states in (key, value))
    rows = [[Place(row, 0, len(each), 0)] * bool(len(each)) for row, each in enumerate(columns)]
    images = PlacedImages([keys], [values], rows).of_layer(0, query)
    own = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
    return plan.scatter(mmca_text_attention(*text, images, plan), own[plan.token_types == IMAGE]).transpose(1, 2)


@pytest.fixture
def planned_calls(monkeypatch):
    """Counts the layers that are computed by a plan."""
    calls = []

    attend = TwoStreamPlan.attend

    def count(*args):
        calls.append(args)
        return attend(*args)

    monkeypatch.setattr(TwoStreamPlan, "attend", count)
    return calls


def by_masks(model):
    model.set_route("masked")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)], ids=lambda heads: f"{heads[0]} heads on {heads[1]}")
def test_equals_the_reference_in_value_and_gradient(rows, heads, dtype):
    inputs = draw(rows, *heads, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    expected = outputs_and_gradients(mmca_attention_reference, *exact, *inputs[3:])
    assert_errs_no_more_than_rounding(outputs_and_gradients(in_two_streams, *inputs), expected)


def test_the_plan_of_the_drawing():
    plan = make_plan(
        torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]), torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]])
    )
    assert plan.order.tolist() == [[2, 3, 5, 0], [1, 3, 4, 5]]
    assert plan.token_types.tolist() == [[2, 2, 1, 1, 2, 1], [0, 1, 2, 1, 1, 1]]
    assert plan.slots.tolist() == [[0, 1, 0, 1, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert plan.runs == [[(0, 2, 0, 2), (2, 3, 0, 3)], [(0, 1, 0, 0), (1, 4, 0, 1)]]
    assert plan.text_mask is None


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_model_computes_the_same_by_a_plan_and_by_masks(decoder, planned_calls):
    """Logits and every gradient, over unequal rows padded on the left, one of them without images."""
    rows = [tokens(1, "I", 3), tokens("I", 1, "I", 2, seed=1), tokens(4, seed=2)]  # short of every window
    batch = pad_left(rows)
    is_first = batch["attention_mask"].cumsum(dim=1) <= 1  # what padding predicts is not defined
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE_TOKEN_ID) | is_first, -100)
    results = []
    for model in (make_model(decoder).train(), by_masks(make_model(decoder)).train()):
        output = model(**batch, pixel_values=pixels(0, 1, 2), labels=labels, skip_logits=False)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits[batch["attention_mask"].bool()], gradients))
    assert len(planned_calls) == 2
    (logits, gradients), (expected_logits, expected_gradients) = results
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5)


def pack(rows):
    """One row of several, with positions that start anew."""
    return torch.cat(rows, dim=1), torch.cat([torch.arange(row.shape[1]) for row in rows])[None]


@pytest.mark.parametrize("masked", [False, True], ids=["by a plan", "by masks"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_conversations_learn_what_padded_ones_do(decoder, masked, planned_calls):
    """The loss to 1e-5 and every gradient to 1e-4; the packed row is longer than every window, no conversation is."""
    rows = [tokens(3, "I", 3), tokens("I", 1, "I", 2, seed=1), tokens(4, seed=2), tokens(1, "I", seed=3)]
    ids, positions = pack(rows)
    hidden = (ids == IMAGE_TOKEN_ID) | (positions == 0)
    images = pixels(0, 1, 2, 3)
    packed_model, padded_model = make_model(decoder).train(), make_model(decoder).train()
    packed_model.set_route("masked" if masked else "two_streams")
    packed = packed_model(ids, images, position_ids=positions, labels=ids.masked_fill(hidden, -100))
    packed.loss.backward()
    assert bool(planned_calls) is not masked
    batch = pad_left(rows)
    is_first = batch["attention_mask"].cumsum(dim=1) <= 1
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE_TOKEN_ID) | is_first, -100)
    padded = padded_model(**batch, pixel_values=images, labels=labels)
    padded.loss.backward()
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)
    expected = {name: p.grad for name, p in padded_model.named_parameters() if p.grad is not None}
    assert expected.keys() == {name for name, p in packed_model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        torch.testing.assert_close(packed_model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("attention_type", ["mmca", "causal"])
def test_packed_rows_are_apart_in_evaluation_too(attention_type, kernel):
    """With `use_cache` at its default, on every kernel, and with plain causal attention."""
    model = make_model(attention_type=attention_type)
    model.set_attn_implementation(kernel)
    rows = [tokens(3, "I", 2), tokens("I", 4, seed=1)]
    ids, positions = pack(rows)
    with torch.no_grad():
        packed = model(ids, pixels(0, 1), position_ids=positions)
        alone = torch.cat([model(row, pixels(number)).logits for number, row in enumerate(rows)], dim=1)
    torch.testing.assert_close(packed.logits, alone, rtol=1e-4, atol=1e-4)
    assert packed.past_key_values is None


def test_a_projector_that_learns_alone_takes_batches_without_images():
    model = make_model().set_trainable("multi_modal_projector").train()
    ids = tokens(6)
    model(ids, labels=ids).loss.backward()
    assert all(not p.grad.any() for p in model.model.multi_modal_projector.parameters())


def test_packed_rows_of_a_batch_differ(planned_calls):
    """Two rows of equal length, packed otherwise, one of them without images; the same image in two conversations."""
    model = make_model()
    rows = [[tokens(3, "I", 2), tokens("I", 5, seed=1)], [tokens(8, seed=2), tokens(12, seed=3)]]
    packed = [pack(row) for row in rows]
    with torch.no_grad():
        batch = model(
            torch.cat([ids for ids, _ in packed]),
            pixels(0, 0),
            position_ids=torch.cat([positions for _, positions in packed]),
        )
        alone = [
            torch.cat([model(ids, pixels(0) if (ids == IMAGE_TOKEN_ID).any() else None).logits for ids in row], dim=1)
            for row in rows
        ]
    assert planned_calls and batch.past_key_values is None
    torch.testing.assert_close(batch.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", ["llama", "qwen3", "smollm3"])
def test_what_is_cached_is_in_the_order_of_the_conversation(decoder, planned_calls):
    model = make_model(decoder)
    batch = pad_left([tokens(3, "I", 4, "I", 2), tokens(2, "I", 3, seed=1)])
    caches = []
    for masked in (False, True):
        cache = DynamicCache(config=model.config.text_config)
        model.set_route("masked" if masked else "two_streams")
        with torch.no_grad():
            model(**batch, pixel_values=pixels(0, 1, 2), past_key_values=cache)
        caches.append(cache)
    assert len(planned_calls) == 2
    kept = batch["attention_mask"].bool()
    for planned, masked in zip(caches[0].layers, caches[1].layers):
        for actual, expected in ((planned.keys, masked.keys), (planned.values, masked.values)):
            actual, expected = (states.transpose(1, 2)[kept] for states in (actual, expected))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_later_changes_a_bit(decoder, planned_calls):
    model = make_model(decoder)
    ids = tokens(2, "I", 2, "I", 1)
    with torch.no_grad():
        before = model.model(ids, pixels(0, 1), use_cache=False).last_hidden_state
        after = model.model(ids, pixels(0, 9), use_cache=False).last_hidden_state
    assert len(planned_calls) == 4
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


def test_the_masked_form_serves_where_a_plan_cannot(planned_calls):
    model = make_model()
    ids, images = tokens(3, "I", 4), pixels(0)
    expected = model(ids, images).logits
    assert len(planned_calls) == 2
    recorded = model(ids, images, output_hidden_states=True)
    assert len(recorded.hidden_states) == 3
    static = model.generate(
        ids, pixel_values=images, cache_implementation="static", max_new_tokens=2, disable_compile=True
    )
    model.set_attn_implementation("eager")
    eager = model(ids, images).logits
    assert len(planned_calls) == 2
    torch.testing.assert_close(recorded.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager, expected, rtol=1e-4, atol=1e-4)
    assert static.shape[1] == ids.shape[1] + 2


def test_a_decoder_that_drops_keyword_arguments_runs_by_masks(monkeypatch, planned_calls):
    model = make_model()
    ids, images = tokens(3, "I", 4), pixels(0)
    expected = by_masks(make_model())(ids, images).logits
    compute = MultiModalCausalAttention.__call__
    monkeypatch.setattr(
        MultiModalCausalAttention, "__call__", lambda *args, layer_plan=None, **kwargs: compute(*args, **kwargs)
    )
    cache = DynamicCache(config=model.config.text_config)
    for past in (cache, None):
        torch.testing.assert_close(model(ids, images, past_key_values=past).logits, expected)
    assert not planned_calls and cache.get_seq_length() == ids.shape[1]


def test_a_training_step_keeps_no_cache():
    ids, images = tokens(3, "I", 4), pixels(0)
    assert make_model().train()(ids, images).past_key_values is None
    assert make_model()(ids, images).past_key_values is not None


def test_a_cache_that_keeps_apart_can_do_what_others_can():
    """Cropped, with rows repeated and chosen, and put in order: each time it holds what a plain cache holds."""
    model = make_model()
    batch = pad_left([tokens(3, "I", 4, "I", 2), tokens(2, "I", 3, seed=1)])
    kinds = (batch["input_ids"] == IMAGE_TOKEN_ID).long()

    def fill(cache):
        with torch.no_grad():
            model(**batch, pixel_values=pixels(0, 1, 2), past_key_values=cache)
        return cache

    def last_logits(cache, rows, length):
        """Of two tokens more, after `length` positions of these rows."""
        mask = torch.nn.functional.pad(batch["attention_mask"][rows, :length], (0, 2), value=1)
        types = torch.nn.functional.pad(kinds[rows, :length], (0, 2))
        new = tokens(2, seed=9).expand(len(rows), -1)
        with torch.no_grad():
            return model(new, attention_mask=mask, mm_token_type_ids=types, past_key_values=cache).logits

    size = batch["input_ids"].shape[1]
    changes = {
        "nothing": lambda cache: None,
        "crop": lambda cache: cache.crop(-4),
        "crop into an image": lambda cache: cache.crop(-5),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    }
    rows = {"repeat": [0, 0, 1, 1], "select": [1], "reorder": [1, 0]}
    for name, change in changes.items():
        length = size - {"crop": 4, "crop into an image": 5}.get(name, 0)
        results = []
        for cache in (DynamicCache(), ConversationCache(), fill(ConversationCache())):
            is_fresh = cache.get_seq_length() == 0
            cache = fill(cache) if is_fresh else cache
            if not is_fresh:
                cache.interleave()
            change(cache)
            assert cache.get_seq_length() == length
            results.append(last_logits(cache, rows.get(name, [0, 1]), length))
        for actual in results[1:]:
            torch.testing.assert_close(actual, results[0], rtol=1e-4, atol=1e-4, msg=name)
    with pytest.raises(ValueError, match="as a negative number"):
        ConversationCache().crop(3)
    cache = fill(ConversationCache())
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        last_logits(fill(cache), [0, 1], size), last_logits(fill(ConversationCache()), [0, 1], size)
    )


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, pixel_values=pixels(0, 1, 2), **kwargs).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def labelled_batch():
    batch = pad_left([tokens(1, "I", 3), tokens("I", 1, "I", 2, seed=1), tokens(4, seed=2)])
    is_first = batch["attention_mask"].cumsum(dim=1) <= 1
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE_TOKEN_ID) | is_first, -100)
    return batch, labels


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "checkpointed reentrantly"])
@pytest.mark.parametrize("part", ["everything", "projector and embeddings", "lora"])
def test_training_is_the_same_however_it_is_done(part, reentrant, planned_calls):
    batch, labels = labelled_batch()
    results = []
    for masked in (False, True):
        model = make_model().train()
        if part == "projector and embeddings":
            model.set_trainable()
        inner = model
        if part == "lora":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        if not masked and reentrant is not None:
            inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            inner.enable_input_require_grads()
        inner.set_route("masked" if masked else "auto")
        planned_calls.clear()
        results.append(loss_and_gradients(model, batch, labels=labels))
        layers = {None: 2, False: 4, True: 0}[reentrant]  # with checkpoints a layer runs once more for the gradients
        assert len(planned_calls) == (0 if masked else layers)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_logits_are_computed_where_there_are_labels(monkeypatch):
    batch, labels = labelled_batch()
    model = make_model().train()
    rows = []
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: rows.append(states.shape[:-1]) or forward(states))
    full = loss_and_gradients(model, batch, labels=labels, skip_logits=False)
    for kwargs in ({}, {"num_items_in_batch": torch.tensor(11)}):
        expected = loss_and_gradients(model, batch, labels=labels, skip_logits=False, **kwargs)
        rows.clear()
        torch.testing.assert_close(loss_and_gradients(model, batch, labels=labels, **kwargs), expected)
        assert rows == [((labels[:, 1:] != -100).sum(),)]
    assert model(**batch, pixel_values=pixels(0, 1, 2), labels=labels).logits is None
    evaluated = model.eval()(**batch, pixel_values=pixels(0, 1, 2), labels=labels)
    assert evaluated.logits.shape[:2] == labels.shape
    torch.testing.assert_close(evaluated.loss, full[0])


def test_a_label_right_after_an_image_is_predicted_by_the_image():
    ids, images = tokens(2, "I", 3), pixels(0)
    labels = torch.full_like(ids, -100)
    labels[0, 7] = ids[0, 7]
    losses = [
        model(ids, images, labels=labels).loss for model in (make_model().train(), by_masks(make_model()).train())
    ]
    torch.testing.assert_close(*losses)
    nothing = make_model().train()(ids, images, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(3))
    assert nothing.loss == 0


def test_what_is_frozen_keeps_nothing_for_a_backward_pass():
    model = make_model().train().set_trainable()
    features = model.get_image_features(pixels(0, 1))
    assert features.last_hidden_state.grad_fn is None and features.pooler_output[0].grad_fn is not None
    model.set_trainable("input_embeddings")
    states = model.model.compute_image_states(pixels(0, 1))
    assert all(keys.grad_fn is None for keys in states.keys)


def test_queries_of_images_are_not_projected():
    decoder = make_model().model.language_model
    projection = decoder.layers[0].self_attn.q_proj
    states = torch.randn(2, 3, 32)
    with SkipQueryProjections(decoder):
        left_out, kept = projection(states), decoder.layers[0].self_attn.k_proj(states)
    assert left_out.shape == projection(states).shape and left_out.stride() == (0, 0, 0)
    torch.testing.assert_close(kept, decoder.layers[0].self_attn.k_proj(states))


@pytest.mark.parametrize(
    "rows",
    [
        ([tokens(1, "I", "I"), tokens("I", 1)], pixels(0, 1, 2)),
        ([tokens(1, "I"), tokens("I")], pixels(0, 1)),
        ([tokens(1, "I"), tokens("I", "I")], pixels(0, 1, 2)),
        ([tokens("I"), tokens("I")], pixels(0, 1)),
    ],
    ids=["text at either end", "no text in a row", "more images without text", "no text at all"],
)
def test_rows_with_hardly_any_text(rows, planned_calls):
    rows, images = rows
    batch = pad_left(rows)
    kept = batch["attention_mask"].bool()
    actual = make_model()(**batch, pixel_values=images).logits[kept]
    assert len(planned_calls) == 2
    torch.testing.assert_close(actual, by_masks(make_model())(**batch, pixel_values=images).logits[kept])


def test_a_layer_that_attends_twice_is_left_to_masks(monkeypatch):
    """DiffLlama: two attentions a layer, over the same keys and other values."""
    shape = {key: value for key, value in SHAPE.items() if key != "bos_token_id"}
    monkeypatch.setitem(TEXT_CONFIGS, "diffllama", lambda: DiffLlamaConfig(**shape))
    model, masked = make_model("diffllama"), by_masks(make_model("diffllama"))
    ids, images = tokens(3, "I", 4), pixels(0)
    torch.testing.assert_close(model(ids, images).logits, masked(ids, images).logits)
    assert not model.model.supports_conversation_cache()


def test_a_window_that_comes_within_reach_is_kept():
    """A first prompt shorter than the window, and an answer longer than it, on a cache without windows."""
    model = make_model("mistral")
    options = {"pixel_values": pixels(0), "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens(3, "I", 2), **options)
    assert torch.equal(model.generate(tokens(3, "I", 2), past_key_values=ConversationCache(), **options), expected)


def test_modalities_that_do_not_fit_the_images_are_named():
    ids, images = tokens(3, "I", 2, "I", 1), pixels(0, 1)
    marked = (ids == IMAGE_TOKEN_ID).long()
    marked[0, 10:] = 0
    with pytest.raises(ValueError, match="marks 5 of the current tokens as images; the images take 10"):
        make_model()(ids, images, mm_token_type_ids=marked)


def test_equal_images_have_gradients_of_their_own():
    images = pixels(0, 0).requires_grad_()
    ids = tokens("I", 2, "I", 2)
    make_model()(ids, images, labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)).loss.backward()
    first, second = images.grad.abs().sum(dim=(1, 2, 3))
    assert first > 0 and second > 0 and not torch.isclose(first, second)


def test_a_gradient_of_the_gradient_is_there():
    plan = make_plan(torch.tensor([[1, 1, 0, 0, 1, 0]]))
    text = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    images = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(
            lambda *inputs: prefix_cross_attention(inputs[0], *inputs[3:], plan.runs), (*text, *images)
        )
