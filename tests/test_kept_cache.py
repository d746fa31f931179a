"""A kept cache is never continued for another conversation, in whichever form that is passed: an error, or fresh."""

import copy

import pytest
import torch
from conftest import (
    IMAGE_SEQ_LENGTH,
    IMAGE_TOKEN_ID,
    TEXT_CONFIGS,
    draw_picture,
    interrupt,
    make_model,
    make_processor,
    pad_left,
    pixels,
    tokens,
)
from test_weights_key import scores_of
from transformers import DynamicCache, LlamaConfig, Phi3Config

from modeling_visualchat import ChatSession, ConversationCache, ImageMemory
from modeling_visualchat.weights_key_visualchat import image_key


GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
RECORD = {"return_dict_in_generate": True, "output_logits": True}
IDS, IMAGES = tokens(3, "I", 4, "I", 2), pixels(0, 1)


@torch.no_grad()
def logits(model, ids=None, **kwargs):
    # Embeddings before pixels: transformers counts rows by the first tensor.
    output = model.generate(ids, **dict(sorted((GREEDY | RECORD | kwargs).items())))
    return torch.stack(output.logits, dim=1)


def right_or_refused(compute, expected):
    """Whether a call is right, or raises a ValueError; silently wrong is neither."""
    try:
        actual = compute()
    except ValueError:
        return "refused"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return "right"


def begun(model, **kwargs):
    """A cache with a conversation of two images, and the tokens of the next turn."""
    cache = ConversationCache()
    passed = {"pixel_values": IMAGES} | kwargs
    if passed["pixel_values"] is None:
        passed.pop("pixel_values")
    passed = dict(sorted(passed.items()))  # embeddings before pixels: see `test_edges.py`
    ids = None if "inputs_embeds" in passed else IDS
    with torch.no_grad():
        answer = model.generate(ids, past_key_values=cache, **passed, **GREEDY)[:, -3:]
    return cache, torch.cat([IDS, answer, tokens(3, seed=4)], dim=1)


def states(model, *seeds):
    return {"image_states": model.model.compute_image_states(pixels(*seeds))}


def encoded(model, *seeds):
    with torch.no_grad():
        return {"mm_encoder_outputs": {"image": model.get_image_features(pixels(*seeds))}}


def plain(model, *seeds):
    return {"pixel_values": pixels(*seeds)}


def remembered(model, *seeds):
    return {"pixel_values": pixels(*seeds), "image_memory": ImageMemory()}


FORMS = {"pixels": plain, "states": states, "encoded": encoded, "memory": remembered}


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_an_image_that_changes_is_not_answered_from_the_old_prefix(first, second):
    model = make_model()
    cache, longer = begun(model, **{"pixel_values": None, **FORMS[first](model, 0, 1)})
    expected = logits(model, longer, pixel_values=pixels(0, 2))
    right_or_refused(lambda: logits(model, longer, past_key_values=cache, **FORMS[second](model, 0, 2)), expected)


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_the_same_images_continue_in_any_form(first, second):
    model = make_model()
    cache, longer = begun(model, **{"pixel_values": None, **FORMS[first](model, 0, 1)})
    if (first == "encoded") != (second == "encoded"):  # features and pixels cannot be compared
        with pytest.raises(ValueError, match="Image 1 of row 0 differs from the one in the cache, or in its form"):
            logits(model, longer, past_key_values=cache, **FORMS[second](model, 0, 1))
        return
    expected = logits(model, longer, pixel_values=IMAGES)
    actual = logits(model, longer, past_key_values=cache, **FORMS[second](model, 0, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_text_that_changes_is_not_answered_from_the_old_prefix(form):
    model = make_model()
    cache, longer = begun(model)
    longer[0, 1] += 1
    expected = logits(model, longer, pixel_values=IMAGES)
    right_or_refused(lambda: logits(model, longer, past_key_values=cache, **FORMS[form](model, 0, 1)), expected)


def embeds_of(model, ids):
    return model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("place", [1, 9, None], ids=["first text", "later text", "unchanged"])
@pytest.mark.parametrize("first", ["ids", "embeds"])
@pytest.mark.parametrize("second", ["ids", "embeds"])
def test_embeddings_that_change_are_not_answered_from_the_old_prefix(first, second, place):
    if (first, second) == ("ids", "ids"):
        pytest.skip("above")
    model = make_model()
    cache, longer = begun(model, **({"inputs_embeds": embeds_of(model, IDS)} if first == "embeds" else {}))
    if place is not None:
        longer[0, place] += 1
    expected = logits(model, longer, pixel_values=IMAGES)
    passed = {"inputs_embeds": embeds_of(model, longer)} if second == "embeds" else {"ids": longer}
    right_or_refused(lambda: logits(model, past_key_values=cache, pixel_values=IMAGES, **passed), expected)


def test_an_image_that_changes_beside_embeddings_is_not_answered_from_the_old_prefix():
    model = make_model()
    cache, longer = begun(model, inputs_embeds=embeds_of(model, IDS))
    expected = logits(model, longer, pixel_values=pixels(0, 2))
    right_or_refused(
        lambda: logits(
            model, inputs_embeds=embeds_of(model, longer), past_key_values=cache, pixel_values=pixels(0, 2)
        ),
        expected,
    )


def positions(length, gap):
    """Ascending positions with a gap after the first token."""
    ids = torch.arange(length)[None]
    return ids + (ids > 0) * gap


@pytest.mark.parametrize("gaps", [(0, 40), (40, 0), (40, 80), (40, 40)], ids=str)
def test_positions_that_change_are_not_answered_from_the_old_prefix(gaps):
    model = make_model()
    first, second = ({} if gap == 0 else {"gap": gap} for gap in gaps)
    cache, longer = begun(model, **({"position_ids": positions(IDS.shape[1], first["gap"])} if first else {}))
    passed = {"position_ids": positions(longer.shape[1], second["gap"])} if second else {}
    expected = logits(model, longer, pixel_values=IMAGES, **passed)
    right_or_refused(lambda: logits(model, longer, pixel_values=IMAGES, past_key_values=cache, **passed), expected)


def test_a_mask_that_hides_or_shows_old_tokens_is_not_answered_from_the_old_prefix():
    for hides_first in (True, False):
        model = make_model()
        hidden = torch.ones_like(IDS)
        hidden[:, :2] = 0
        cache, longer = begun(model, **({"attention_mask": hidden} if hides_first else {}))
        mask = torch.ones_like(longer)
        if not hides_first:
            mask[:, :2] = 0
        expected = logits(model, longer, pixel_values=IMAGES, attention_mask=mask)
        right_or_refused(
            lambda model=model, longer=longer, mask=mask, cache=cache: logits(
                model, longer, pixel_values=IMAGES, attention_mask=mask, past_key_values=cache
            ),
            expected,
        )


def test_vision_options_that_change_are_not_answered_from_the_old_prefix():
    model = make_model()
    cache, longer = begun(model, vision_feature_layer=-1)
    expected = logits(model, longer, pixel_values=IMAGES, vision_feature_layer=-2)
    right_or_refused(
        lambda: logits(model, longer, pixel_values=IMAGES, vision_feature_layer=-2, past_key_values=cache), expected
    )


# 18: rotary embeddings whose frequencies depend on the length.


def rope(kind):
    if kind == "phi3":  # as published: the original length is a field of the configuration
        shape = TEXT_CONFIGS["llama"]().to_dict()
        shape = {name: shape[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id",
        )}  # fmt: skip
        parameters = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        }  # fmt: skip
        return Phi3Config(
            **shape, max_position_embeddings=1024, original_max_position_embeddings=24, rope_parameters=parameters
        )
    options = {
        "longrope": {
            "factor": 4.0, "original_max_position_embeddings": 24, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        },
        "dynamic": {"factor": 2.0},
    }[kind]  # fmt: skip
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **options}
    length = 24 if kind == "dynamic" else 1024
    base = TEXT_CONFIGS["llama"]().to_dict()
    return LlamaConfig(**{**base, "rope_parameters": parameters, "max_position_embeddings": length})


@pytest.fixture(params=["longrope", "dynamic", "phi3"])
def limited(request, monkeypatch):
    """A model whose rotary embedding changes beyond 24 positions."""
    config = rope(request.param)
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: copy.deepcopy(config))
    return make_model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_conversation_that_grows_past_the_limit_is_that_of_a_fresh_one(limited, kernel):
    """Turn by turn, from below the limit to beyond it, by the cache alone and after a session's crop."""
    for crops in (False, True):
        model = limited()
        model.set_attn_implementation(kernel)
        cache, ids, images = ConversationCache(), tokens(2, "I", 3), [0]
        for turn in range(4):
            # A `dynamic` embedding remembers the longest text, in transformers too: the twin has seen the same.
            expected = logits(copy.deepcopy(model), ids, pixel_values=pixels(*images))
            if crops:
                cache.keep_shared(ids, [[image_key(image) for image in pixels(*images)]], IMAGE_TOKEN_ID)
            done = right_or_refused(
                lambda ids=ids, images=images, cache=cache, model=model: logits(
                    model, ids, pixel_values=pixels(*images), past_key_values=cache
                ),
                expected,
            )
            if done == "refused":
                break
            ids = torch.cat([ids, cache.token_ids[:, ids.shape[1] :], tokens(3, "I", 2, seed=turn)], dim=1)
            images.append(turn + 1)


def test_one_answer_that_passes_the_limit_is_that_of_an_uncached_one(limited):
    model = limited()
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    ids = tokens(4, "I", 10)
    actual = model.generate(
        ids, pixel_values=pixels(0), past_key_values=ConversationCache(), do_sample=False, **options
    )
    stock = model.generate(ids, pixel_values=pixels(0), past_key_values=DynamicCache(), do_sample=False, **options)
    assert torch.equal(actual, stock)  # within one answer as in transformers


def test_edits_beyond_the_limit_answer_as_a_new_conversation(limited):
    model = limited()
    session = model.start_chat(make_processor(), **GREEDY)
    session.ask("What is it?", [draw_picture(0)])
    session.ask("And this?", [draw_picture(1)])
    for edit in (
        lambda s: s.replace_image(1, draw_picture(2)),
        lambda s: s.edit_question(1, "Where?"),
        lambda s: s.remove_image(2),
        lambda s: s.retry(),
        lambda s: s.ask("Why?"),
    ):
        twin = copy.deepcopy(model)
        actual = scores_of(session, edit)
        messages = copy.deepcopy(session.messages[:-1])
        expected = scores_of(ChatSession(twin, make_processor(), **GREEDY), lambda s, m=messages: s.answer(m))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_crops_on_either_side_of_the_limit_are_right_or_refused(limited):
    model, cache = limited(), ConversationCache()
    ids, images = tokens(4, "I", 20), pixels(0)
    for length in (29, 12, 29, 23, 24, 25, 15):
        part = ids[:, :length]
        expected = logits(copy.deepcopy(model), part, pixel_values=images)
        cache.keep_shared(part, [[image_key(images[0])]], IMAGE_TOKEN_ID)
        if (
            right_or_refused(
                lambda part=part: logits(model, part, pixel_values=images, past_key_values=cache), expected
            )
            == "refused"
        ):
            cache.reset()


# 19: what is made of a returned cache.


def rebuilt_by_update(cache):
    new = DynamicCache()
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


REBUILT = {
    "update": rebuilt_by_update,
    "pairs": lambda cache: DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
    "iteration": lambda cache: DynamicCache([(states[0], states[1]) for states in cache]),
    "iterator": lambda cache: DynamicCache(iter(cache)),
}


@pytest.mark.parametrize("parts", [(3, "I", 4), ("I", 9), (8, "I", 1)], ids=["middle", "first", "last"])
@pytest.mark.parametrize("is_interleaved", [False, True], ids=["", "interleaved"])
@pytest.mark.parametrize("rebuild", REBUILT)
def test_a_plain_cache_made_of_a_returned_one_is_right_or_refused(rebuild, is_interleaved, parts):
    model, cache = make_model(), ConversationCache()
    with torch.no_grad():
        ids = model.generate(tokens(*parts), pixel_values=pixels(0), past_key_values=cache, **GREEDY)
    new = tokens(3, seed=4)
    longer = torch.cat([ids, new], dim=1)
    # A mask, as transformers would take a generated padding token for padding.
    mask = {"attention_mask": torch.ones_like(longer)}
    expected = logits(model, longer, pixel_values=pixels(0), **mask)
    if is_interleaved:
        cache.interleave()

    def found(ids=longer, **kwargs):
        made = REBUILT[rebuild](cache)
        return right_or_refused(lambda: logits(model, ids, past_key_values=made, **mask, **kwargs), expected)

    # What is iterated over is the whole conversation; the layers of separate blocks hold nothing.
    without_images = "right" if is_interleaved or rebuild.startswith("itera") else "refused"
    assert found(pixel_values=pixels(0)) == "right" and found() == without_images
    types = (longer == IMAGE_TOKEN_ID).long()
    assert found(longer[:, cache.get_seq_length() :], mm_token_type_ids=types) == without_images


def test_new_tokens_that_do_not_follow_on_a_plain_cache_are_refused():
    """A cache of text only, as it would be without the images."""
    model, cache, longer = make_model(), DynamicCache(), tokens("I", 12)
    covering = {"attention_mask": torch.ones_like(longer), "mm_token_type_ids": (longer == IMAGE_TOKEN_ID).long()}
    with torch.no_grad():
        model(longer[:, IMAGE_SEQ_LENGTH:-3], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 9 tokens and 3 new ones were passed"):
        model.generate(longer[:, -3:], past_key_values=cache, **covering, **GREEDY)


def test_a_dynamic_cache_that_is_asked_for_is_a_plain_one():
    output = make_model().generate(
        IDS, pixel_values=IMAGES, cache_implementation="dynamic", return_dict_in_generate=True, **GREEDY
    )
    assert type(output.past_key_values) is DynamicCache


# 20: crashes.


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_an_image_first_and_the_question_edited_then_beams_or_returns(options):
    model, cache = make_model(), ConversationCache()
    ids = tokens("I", 5)
    model.generate(ids, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
    edited = torch.cat([ids[:, :IMAGE_SEQ_LENGTH], tokens(4, seed=9)], dim=1)
    cache.keep_shared(edited, [[image_key(pixels(0)[0])]], IMAGE_TOKEN_ID)
    assert cache.get_seq_length() == IMAGE_SEQ_LENGTH
    results = []
    for passed in ({"past_key_values": cache}, {}):
        torch.manual_seed(0)
        results.append(model.generate(edited, pixel_values=pixels(0), **passed, **{**GREEDY, **options}))
    assert torch.equal(*results)


def test_an_image_first_and_the_question_edited_then_reordered_and_selected():
    model, cache = make_model(), ConversationCache()
    ids = tokens("I", 5)
    model.generate(ids, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
    cache.crop(IMAGE_SEQ_LENGTH - cache.get_seq_length())
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    expected = logits(model, ids, pixel_values=pixels(0))
    torch.testing.assert_close(
        logits(model, ids, pixel_values=pixels(0), past_key_values=cache), expected, rtol=1e-4, atol=1e-4
    )


MASKED = {
    "mistral": {"decoder": "mistral"},
    "qwen2": {"decoder": "qwen2"},
    "gemma3": {"decoder": "gemma3"},
    "eager": {"kernel": "eager"},
    "masked": {"route": "masked"},
}


def masked_model(kernel=None, route=None, **kwargs):
    model = make_model(**kwargs)
    if kernel is not None:
        model.set_attn_implementation(kernel)
    if route is not None:
        model.set_route(route)
    return model


@pytest.mark.parametrize("kind", MASKED)
def test_another_conversation_on_a_session_of_the_masked_route(kind):
    model = masked_model(**MASKED[kind])
    session = model.start_chat(make_processor(), **GREEDY)
    session.ask("What is it?", [draw_picture(0)])
    for text in ("Another one, from the start.", "So"):
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        actual = scores_of(session, lambda s, m=messages: s.answer(m))
        expected = scores_of(ChatSession(model, make_processor(), **GREEDY), lambda s, m=messages: s.answer(m))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    actual = scores_of(session, lambda s: s.retry())
    expected = scores_of(ChatSession(model, make_processor(), **GREEDY), lambda s, m=messages: s.answer(m))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["keep_shared", "crop", "reset"])
@pytest.mark.parametrize("kind", MASKED)
def test_another_conversation_on_a_kept_cache_of_the_masked_route(kind, how):
    """Also with fewer tokens, and after so many that a window has passed over them."""
    model, cache = masked_model(**MASKED[kind]), ConversationCache()
    for parts, seed in (((3, "I", 20), 0), ((2, "I", 3), 1), ((3, "I", 20), 2), ((3, "I", 14), 2), ((1,), 3)):
        ids = tokens(*parts, seed=seed)
        passed = {"pixel_values": pixels(seed)} if "I" in parts else {}
        keys = [[image_key(pixels(seed)[0])] if passed else []]
        expected = logits(model, ids, **passed)
        if how == "keep_shared":
            cache.keep_shared(ids, keys, IMAGE_TOKEN_ID)
        elif how == "crop":
            cache.crop(-cache.get_seq_length())
        else:
            cache.reset()
        actual = logits(model, ids, past_key_values=cache, **passed)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_after_an_interrupted_masked_forward_is_usable(monkeypatch, kind, layer, turn):
    model, cache = masked_model(**MASKED[kind]), ConversationCache()
    ids = tokens(3, "I", 4)
    if turn == 1:
        answered = model.generate(ids, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
        ids = torch.cat([answered, tokens(3, seed=3)], dim=1)
    mlp = model.model.language_model.layers[layer].mlp
    for place in (0, 1, 2):
        interrupt(monkeypatch, mlp, place)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
        monkeypatch.undo()
        cache.keep_shared(ids, [[image_key(pixels(0)[0])]], IMAGE_TOKEN_ID)
    expected = logits(model, ids, pixel_values=pixels(0))
    actual = logits(model, ids, pixel_values=pixels(0), past_key_values=cache)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", *MASKED])
def test_a_cache_after_an_interrupted_forward_is_usable_without_a_crop(monkeypatch, kind):
    """The same call again, of a first turn and of a second one."""
    model, cache = masked_model(**MASKED.get(kind, {})), ConversationCache()
    ids = tokens(3, "I", 4)
    mlp = model.model.language_model.layers[1].mlp
    for _ in range(2):
        interrupt(monkeypatch, mlp)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
        monkeypatch.undo()
        expected = logits(model, ids, pixel_values=pixels(0))
        actual = logits(model, ids, pixel_values=pixels(0), past_key_values=cache)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, cache.token_ids[:, ids.shape[1] :], tokens(3, seed=3)], dim=1)


@pytest.mark.parametrize("kwargs", [{}, {"merge": "joint", "image_attention": "image"}], ids=str)
@pytest.mark.parametrize("decoder", ["mistral", "qwen2", "gemma3"])
def test_padding_between_the_rounds_of_a_batch_takes_no_room_in_a_window(decoder, kwargs):
    """Two conversations of unequal rounds, longer than the window, each as if it were alone."""
    model = make_model(decoder, **kwargs)
    rounds = [[tokens(4, "I", 9), tokens(2, "I", 3, seed=1)], [tokens(3, "I", 2, seed=2), tokens(12, seed=3)]]
    images = [pixels(0, 1), pixels(2)]
    batches = [pad_left([row[turn] for row in rounds]) for turn in range(2)]
    cache = ConversationCache()
    first = {**batches[0], "pixel_values": torch.stack([images[0][0], images[1][0]])}
    model.generate(**first, past_key_values=cache, max_new_tokens=1, do_sample=False)
    both = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in batches[0]}
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kept = model.generate(**both, pixel_values=torch.cat(images), past_key_values=cache, **options).logits[0]
    for row, (turns, shown) in enumerate(zip(rounds, images)):
        alone = model(torch.cat(turns, dim=1), shown).logits[0, -1]
        torch.testing.assert_close(kept[row], alone, rtol=1e-4, atol=1e-4)
