"""No image is lost silently: each placeholder has its states, or there is an error."""

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, make_model, pad_left, pixels, tokens
from test_kept_cache import FORMS, GREEDY, logits

from modeling_visualchat import ConversationCache, ImageMemory


ERRORS = (ValueError, RuntimeError)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 100])
def test_a_prefill_in_chunks_reads_every_image(form, chunk):
    """Chunks that begin and end inside of an image, between images, and of one token."""
    model, ids = make_model(), tokens(3, "I", 4, "I", 2)
    expected = logits(model, ids, pixel_values=pixels(0, 1))
    actual = logits(model, ids, prefill_chunk_size=chunk, **FORMS[form](model, 0, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_prefill_in_chunks_reads_every_image_of_unequal_rows(form, chunk):
    model = make_model()
    batch = pad_left([tokens(3, "I", 4, "I", 2), tokens(2, "I", 3, seed=1)])
    expected = logits(model, batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=pixels(0, 1, 2))
    actual = logits(
        model, batch["input_ids"], attention_mask=batch["attention_mask"], prefill_chunk_size=chunk,
        **FORMS[form](model, 0, 1, 2),
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def short_model(**kwargs):
    """An image is one token."""
    return make_model(projector_type="perceiver", image_seq_length=1, **kwargs)


IMAGE = torch.tensor([[IMAGE_TOKEN_ID]])


@pytest.mark.parametrize("route", ["auto", "masked"])
@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_one_token_alone_is_read(form, route):
    """As all there is, and as the only new token of a kept conversation."""
    model = short_model()
    model.set_route(route)
    first = torch.cat([tokens(3), IMAGE, tokens(2)], dim=1)
    cache = ConversationCache()
    answered = model.generate(first, pixel_values=pixels(0), past_key_values=cache, **GREEDY)
    longer = torch.cat([answered[:, : cache.get_seq_length()], IMAGE], dim=1)
    expected = model(longer, pixels(0, 1)).logits[:, -1].detach()
    assert (expected - model(longer, pixels(0, 2)).logits[:, -1].detach()).abs().max() > 1e-2
    actual = logits(model, longer, past_key_values=cache, **FORMS[form](model, 1))[:, 0]
    kept = torch.isfinite(actual) & (torch.arange(actual.shape[-1]) != IMAGE_TOKEN_ID)
    torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-4, atol=1e-4)
    alone = logits(model, IMAGE, **FORMS[form](model, 1))[:, 0]
    torch.testing.assert_close(alone, model(IMAGE, pixels(1)).logits[:, -1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 2])
def test_images_of_one_token_in_chunks(form, chunk):
    model = short_model()
    ids = torch.cat([IMAGE, tokens(2), IMAGE, IMAGE, tokens(1)], dim=1)
    expected = logits(model, ids, pixel_values=pixels(0, 1, 2))
    actual = logits(model, ids, prefill_chunk_size=chunk, **FORMS[form](model, 0, 1, 2))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ["auto", "masked"])
@pytest.mark.parametrize("attention_type", ["mmca", "causal"])
def test_a_placeholder_without_an_image_is_an_error(attention_type, route):
    model = short_model(attention_type=attention_type)
    model.set_route(route)
    with pytest.raises(ERRORS):
        model(IMAGE)
    with pytest.raises(ERRORS):
        model(torch.cat([tokens(1), IMAGE], dim=1))
    with torch.no_grad():
        past = model(tokens(3), use_cache=True).past_key_values
    with pytest.raises(ERRORS):
        model(IMAGE, past_key_values=past, mm_token_type_ids=torch.tensor([[0, 0, 0, 1]]))
    with pytest.raises(ERRORS):
        model.generate(IMAGE, **GREEDY)
    with pytest.raises(ERRORS):
        model.generate(torch.cat([tokens(3), IMAGE], dim=1), **GREEDY)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 1}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generation_with_a_placeholder_and_no_image_is_an_error(options):
    model = make_model()
    with pytest.raises(ERRORS):
        model.generate(tokens(3, "I", 4), **options, **GREEDY)
    with pytest.raises(ERRORS):
        model.generate(tokens(3, "I"), image_memory=ImageMemory(), **options, **GREEDY)


@pytest.mark.parametrize("form", FORMS)
def test_a_number_of_images_that_is_not_that_of_the_placeholders_is_an_error(form):
    model = make_model()
    for parts, seeds in ((("I", 2, "I", 3), (0,)), (("I", 2), (0, 1)), ((4,), (0,))):
        with pytest.raises(ERRORS):
            logits(model, tokens(*parts), **FORMS[form](model, *seeds))
    for parts, seeds in ((("I", 2, "I", 3), (0,)), (("I", 2), (0, 1)), ((4,), (0,)), ((1,), (0,))):
        passed = FORMS[form](model, *seeds)
        if "image_memory" not in passed:
            with pytest.raises(ERRORS):
                model(tokens(*parts), **passed)


def test_a_last_token_that_is_an_image_is_read_by_assisted_decoding():
    model, assistant = short_model(), short_model(seed=1)
    ids = torch.cat([tokens(4), IMAGE], dim=1)
    expected = model.generate(ids, pixel_values=pixels(0), **GREEDY)
    assert not torch.equal(expected, model.generate(ids, pixel_values=pixels(5), **GREEDY))
    assert torch.equal(model.generate(ids, pixel_values=pixels(0), assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(ids, pixel_values=pixels(0), prompt_lookup_num_tokens=2, **GREEDY), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_are_counted_by_embeddings_in_any_order_of_arguments(order):
    model, ids = make_model(), tokens(3, "I", 4, "I", 2)
    passed = {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "pixel_values": pixels(0, 1)}
    passed = dict(list(passed.items())[::order])
    expected = model.generate(ids, pixel_values=pixels(0, 1), **GREEDY)[:, -3:]
    assert torch.equal(model.generate(**passed, **GREEDY), expected)


def test_zero_images_and_none_are_no_image():
    """In `generate` as in `forward`."""
    model, ids = make_model(), tokens(5)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, pixel_values=None, **GREEDY), expected)
    assert torch.equal(model.generate(ids, pixel_values=None, image_memory=ImageMemory(), **GREEDY), expected)
    assert torch.equal(model.generate(ids, image_memory=None, **GREEDY), expected)


@pytest.mark.parametrize("name", ["generate", "memory", "forward"])
def test_a_batch_of_zero_images_is_no_image(name):
    model, ids = make_model(), tokens(5)
    if name == "forward":
        torch.testing.assert_close(model(ids, pixels(0)[:0]).logits, model(ids).logits)
        return
    memory = {"image_memory": ImageMemory()} if name == "memory" else {}
    assert torch.equal(
        model.generate(ids, pixel_values=pixels(0)[:0], **memory, **GREEDY), model.generate(ids, **GREEDY)
    )


@pytest.mark.parametrize("kwargs", [{}, {"attention_type": "causal"}, {"decoder": "mistral"}], ids=str)
def test_none_in_place_of_images_goes_through_generate_and_a_session(kwargs):
    model, ids = make_model(**kwargs), tokens(3, "I", 4)
    expected = model.generate(ids, pixel_values=pixels(0), **GREEDY)
    with torch.no_grad():
        encoded = {"image": model.get_image_features(pixels(0))}
    actual = model.generate(ids, pixel_values=None, mm_encoder_outputs=encoded, **GREEDY)
    assert torch.equal(actual, expected)
