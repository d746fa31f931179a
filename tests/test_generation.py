"""Everything `generate` can do, against a loop that runs the whole sequence anew for every token."""

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, TEXT_CONFIGS, make_model, pad_left, pixels, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_visualchat import VisualChatForConditionalGeneration


DECODERS = list(TEXT_CONFIGS)
NEW = 12
# No padding token (0) in an answer, since `generate` finds the padding of later calls by it.
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}

PROMPT = (3, "I", 4, "I", 6)
IMAGES = (0, 1)


@torch.no_grad()
def generate_uncached(model, input_ids, pixel_values=None, num_new=NEW):
    """Greedy decoding of one row without a cache, without padding and without `generate`."""
    for _ in range(num_new):
        logits = model(input_ids, pixel_values, use_cache=False).logits[:, -1].float()
        logits[:, [0, IMAGE_TOKEN_ID, 1]] = -torch.inf  # no padding, no placeholder, and no end before its time
        input_ids = torch.cat([input_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return input_ids


# transformers moves an offloaded cache over CUDA streams, which no CPU has.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches need a GPU")


@pytest.mark.parametrize(
    "cache",
    [
        None,
        "dynamic",
        "static",
        pytest.param("offloaded", marks=needs_cuda),
        pytest.param("offloaded_static", marks=needs_cuda),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_caches(decoder, cache):
    device = "cuda" if cache and cache.startswith("offloaded") else "cpu"
    model = make_model(decoder).to(device)
    ids, images = tokens(*PROMPT).to(device), pixels(*IMAGES).to(device)
    actual = model.generate(ids, pixel_values=images, cache_implementation=cache, disable_compile=True, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, ids, images))


@pytest.mark.parametrize("decoder", DECODERS)
def test_generation_beyond_a_sliding_window(decoder):
    model = make_model(decoder)
    ids, images = tokens(2, "I", 14, "I", 9), pixels(*IMAGES)
    expected = generate_uncached(model, ids, images, 24)
    for cache in (None, "static"):
        options = {**OPTIONS, "max_new_tokens": 24, "min_new_tokens": 24, "cache_implementation": cache}
        assert torch.equal(model.generate(ids, pixel_values=images, disable_compile=True, **options), expected)


@pytest.mark.parametrize("attention_type", ["mmca", "causal"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_left_padded_batch_of_unequal_rows(cache, attention_type):
    model = make_model(attention_type=attention_type)
    rows = [tokens(3, "I", 4), tokens(9, seed=1), tokens(2, "I", "I", 5, "I", 7, seed=2)]
    images = [pixels(0), None, pixels(1, 2, 3)]
    actual = model.generate(
        **pad_left(rows), pixel_values=pixels(0, 1, 2, 3), cache_implementation=cache, disable_compile=True, **OPTIONS
    )
    for row, (ids, pixel_values) in enumerate(zip(rows, images)):
        assert torch.equal(actual[row, -NEW:], generate_uncached(model, ids, pixel_values)[0, -NEW:])


@torch.no_grad()
def log_probability(model, ids, num_new, pixel_values=None):
    """Of the last tokens of a row without padding, in one plain forward pass."""
    logits = model(ids[None], pixel_values, use_cache=False).logits[0, -num_new - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(1, ids[-num_new:, None]).sum()


@pytest.mark.parametrize("decoder", DECODERS)
def test_beam_search(decoder):
    """Cached equals uncached, and every beam has the score that a plain pass over its row with its images gives."""
    model = make_model(decoder)
    rows, images = [tokens(*PROMPT), tokens(4), tokens(2, "I", 3, seed=3)], [pixels(0, 1), None, pixels(2)]
    options = {**OPTIONS, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    cached, uncached = (
        model.generate(
            **pad_left(rows), pixel_values=pixels(0, 1, 2), use_cache=use, return_dict_in_generate=True, **options
        )
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    for index, sequence in enumerate(cached.sequences):
        ids = sequence[-rows[index // 2].shape[1] - NEW :]
        expected = log_probability(model, ids, NEW, images[index // 2]) / NEW
        torch.testing.assert_close(cached.sequences_scores[index], expected, rtol=1e-4, atol=1e-4)


def test_sampling_with_several_returns():
    """The logits of every step are those of a plain pass over the row that was drawn, with its images."""
    model = make_model()
    rows, images = [tokens(*PROMPT), tokens(4), tokens(2, "I", 3, seed=3)], [pixels(0, 1), None, pixels(2)]
    torch.manual_seed(5)
    output = model.generate(
        **pad_left(rows), pixel_values=pixels(0, 1, 2), return_dict_in_generate=True, output_logits=True,
        **{**OPTIONS, "do_sample": True, "num_return_sequences": 3},
    )  # fmt: skip
    assert len({tuple(row.tolist()) for row in output.sequences[:3]}) > 1
    logits = torch.stack(output.logits, dim=1)
    for index, sequence in enumerate(output.sequences):
        ids = sequence[-rows[index // 3].shape[1] - NEW :]
        with torch.no_grad():
            expected = model(ids[None], images[index // 3], use_cache=False).logits[0, -NEW - 1 : -1]
        torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_prompt_lookup_decoding(decoder):
    model = make_model(decoder)
    ids = torch.cat([tokens(*PROMPT), tokens(*PROMPT)], dim=1)  # repetition gives the lookup something to find
    actual = model.generate(ids, pixel_values=pixels(0, 1, 0, 1), prompt_lookup_num_tokens=3, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, ids, pixels(0, 1, 0, 1)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("assistant_seed", [0, 1], ids=["assistant agrees", "assistant differs"])
def test_assisted_decoding(decoder, assistant_seed):
    model, assistant = make_model(decoder), make_model(decoder, seed=assistant_seed)
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    actual = model.generate(ids, pixel_values=images, assistant_model=assistant, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, ids, images))


def test_assisted_decoding_by_a_text_model():
    model = make_model()
    assistant = AutoModelForCausalLM.from_config(TEXT_CONFIGS["llama"]()).eval()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    actual = model.generate(ids, pixel_values=images, assistant_model=assistant, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, ids, images))


@pytest.mark.parametrize("chunk", [3, 7])
def test_chunked_prefill(chunk):
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    actual = model.generate(
        ids,
        pixel_values=images,
        prefill_chunk_size=chunk,
        past_key_values=DynamicCache(config=model.config.text_config),
        **OPTIONS,
    )
    assert torch.equal(actual, generate_uncached(model, ids, images))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("passed", ["all images", "new images only"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_conversation_goes_on_with_its_cache(decoder, passed, static):
    model = make_model(decoder)
    first = tokens(3, "I", 4)
    config = model.config.text_config
    cache = StaticCache(config=config, max_cache_len=128) if static else DynamicCache(config=config)
    answered = model.generate(first, pixel_values=pixels(0), past_key_values=cache, disable_compile=True, **OPTIONS)
    second = torch.cat([answered, tokens(2, "I", 1, "I", 5, seed=4)], dim=1)
    images = pixels(0, 1, 2) if passed == "all images" else pixels(1, 2)
    actual = model.generate(second, pixel_values=images, past_key_values=cache, disable_compile=True, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, second, pixels(0, 1, 2)))
    third = torch.cat([actual, tokens(6, seed=5)], dim=1)
    images = {"pixel_values": pixels(0, 1, 2)} if passed == "all images" else {}
    actual = model.generate(third, past_key_values=cache, disable_compile=True, **images, **OPTIONS)
    assert torch.equal(actual, generate_uncached(model, third, pixels(0, 1, 2)))


def test_a_batch_goes_on_with_its_cache():
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    rows = [tokens(3, "I", 4), tokens(2, "I", 5, seed=1)]
    answered = model.generate(**pad_left(rows), pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    new = [tokens(2, "I", 3, seed=2), tokens(5 + IMAGE_SEQ_LENGTH, seed=3)]
    second = torch.cat([answered, torch.cat(new)], dim=1)
    padding = (second != 0).long()
    actual = model.generate(
        second, attention_mask=padding, pixel_values=pixels(0, 2, 1), past_key_values=cache, **OPTIONS
    )
    for row, images in enumerate([pixels(0, 2), pixels(1)]):
        ids = second[row : row + 1, padding[row].bool()]
        assert torch.equal(actual[row, -NEW:], generate_uncached(model, ids, images)[0, -NEW:])


@pytest.mark.parametrize("passed", ["all images", "new images only"])
@pytest.mark.parametrize("beams", [True, False], ids=["beams", "returns"])
def test_beams_and_returns_go_on_with_a_cache(beams, passed):
    """A cache of two rows, each repeated for its beams or returns, and a new image in each row and in only one."""
    model = make_model()
    rows = [tokens(3, "I", 4), tokens(2, "I", 5, seed=1)]
    padded = pad_left(rows)
    repeated = {key: value.repeat_interleave(2, dim=0) for key, value in padded.items()}
    cache = model(**repeated, pixel_values=pixels(0, 0, 1, 1), use_cache=True).past_key_values
    new = torch.cat([tokens(2, "I", 3, seed=2), tokens(5 + IMAGE_SEQ_LENGTH, seed=3)])
    second = torch.cat([padded["input_ids"], new], dim=1)
    mask = torch.cat([padded["attention_mask"], torch.ones_like(new)], dim=1)
    options = {"num_beams": 2} if beams else {"do_sample": True}
    output = model.generate(
        second, attention_mask=mask, past_key_values=cache, num_return_sequences=2, return_dict_in_generate=True,
        pixel_values=pixels(0, 2, 1) if passed == "all images" else pixels(2), output_logits=True, output_scores=True,
        **{**OPTIONS, **options},
    )  # fmt: skip
    for index, sequence in enumerate(output.sequences):
        row = index // 2
        ids = torch.cat([sequence[: second.shape[1]][mask[row].bool()], sequence[second.shape[1] :]])
        images = [pixels(0, 2), pixels(1)][row]
        if beams:
            expected = log_probability(model, ids, NEW, images) / NEW
            torch.testing.assert_close(output.sequences_scores[index], expected, rtol=1e-4, atol=1e-4)
        else:
            expected = model(ids[None], images, use_cache=False).logits[0, -NEW - 1 : -1]
            actual = torch.stack(output.logits, dim=1)[index]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passed", ["all images", "new images only"])
def test_chunked_prefill_goes_on_with_a_cache(passed):
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    answered = model.generate(tokens(3, "I", 4), pixel_values=pixels(0), past_key_values=cache, **OPTIONS)
    second = torch.cat([answered, tokens(2, "I", 5, seed=4)], dim=1)
    actual = model.generate(
        second,
        pixel_values=pixels(0, 1) if passed == "all images" else pixels(1),
        past_key_values=cache,
        prefill_chunk_size=4,
        **OPTIONS,
    )
    assert torch.equal(actual, generate_uncached(model, second, pixels(0, 1)))


@pytest.mark.parametrize("padded", [False, True])
def test_only_the_new_tokens_go_on_with_a_cache(padded):
    """As a processor prepares a new round: the mask and the modalities cover everything, the ids only what is new."""
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    rows = [tokens(3, "I", 4), tokens(2, "I", 5 - padded, seed=1)]
    batch = pad_left(rows)
    answered = model.generate(**batch, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    new = torch.cat([tokens(2, "I", 3, seed=2), tokens(5 + IMAGE_SEQ_LENGTH, seed=3)])
    # The last answered token is not in the cache yet.
    given = torch.cat([answered[:, -1:], new], dim=1)
    whole = torch.cat([answered, new], dim=1)
    mask = torch.cat(
        [batch["attention_mask"], torch.ones(2, whole.shape[1] - batch["input_ids"].shape[1]).long()], dim=1
    )
    options = {"attention_mask": mask, "pixel_values": pixels(2), "past_key_values": cache, **OPTIONS}
    with pytest.raises(ValueError, match=f"mm_token_type_ids has to cover all {whole.shape[1]}"):
        model.generate(given, mm_token_type_ids=(given == IMAGE_TOKEN_ID).long(), **options)
    actual = model.generate(given, mm_token_type_ids=(whole == IMAGE_TOKEN_ID).long(), **options)
    for row, images in enumerate([pixels(0, 2), pixels(1)]):
        ids = whole[row : row + 1, mask[row].bool()]
        assert torch.equal(actual[row, -NEW:], generate_uncached(model, ids, images)[0, -NEW:])


def test_an_image_in_the_cache_is_not_encoded_again(monkeypatch):
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    answered = model.generate(tokens(3, "I", 4), pixel_values=pixels(0), past_key_values=cache, **OPTIONS)
    encoded = []
    encode = model.model.get_image_features

    def count(pixel_values, **kwargs):
        encoded.append(len(pixel_values))
        return encode(pixel_values)

    # generate looks the parameters of the function up by name.
    monkeypatch.setattr(model.model, "get_image_features", count)
    second = torch.cat([answered, tokens(2, "I", 1, seed=4)], dim=1)
    answered = model.generate(second, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    third = torch.cat([answered, tokens(4, seed=5)], dim=1)
    model.generate(third, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    assert encoded == [1]


def test_drafting_on_a_kept_cache_is_refused():
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    answered = model.generate(tokens(3), past_key_values=cache, **OPTIONS)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_model()}):
        with pytest.raises(ValueError, match="start from an empty cache"):
            model.generate(answered, past_key_values=cache, **options, **OPTIONS)


def test_too_many_or_too_few_images_for_a_cache_are_named():
    model = make_model()
    cache = DynamicCache(config=model.config.text_config)
    answered = model.generate(tokens(3, "I", "I"), pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    second = torch.cat([answered, tokens(2, "I", 1, seed=4)], dim=1)
    with pytest.raises(ValueError, match="hold 3 images, 2 of them in the cache; 2 were passed"):
        model.generate(second, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)


def test_from_embeddings():
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    embeds = model.get_input_embeddings()(ids)
    expected = generate_uncached(model, ids, images)[:, -NEW:]
    is_image = (ids == IMAGE_TOKEN_ID).long()
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=images, **OPTIONS), expected)
    features = torch.stack(model.get_image_features(images).pooler_output)
    filled = embeds.masked_scatter(is_image.bool()[..., None], features)
    for cache in (None, "static"):
        options = {**OPTIONS, "cache_implementation": cache, "disable_compile": True}
        actual = model.generate(inputs_embeds=filled, mm_token_type_ids=is_image, **options)
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match="cannot be told from embeddings: pass mm_token_type_ids"):
        model.generate(inputs_embeds=filled, **OPTIONS)


def test_text_alone():
    model = make_model()
    assert torch.equal(model.generate(tokens(9), **OPTIONS), generate_uncached(model, tokens(9)))


def test_never_generates_a_placeholder():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN_ID] = 100 * model.lm_head.weight.abs().sum(dim=0)
    model.generation_config.do_sample = True
    for suppress_tokens in (None, [5]):
        generated = model.generate(tokens(9).expand(8, -1), max_new_tokens=20, suppress_tokens=suppress_tokens)
        assert not (generated == IMAGE_TOKEN_ID).any()
        assert suppress_tokens is None or not (generated[:, 9:] == 5).any()


def test_a_past_of_unknown_modality_is_refused():
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    past = model(ids, images, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cannot be told for the 23 tokens in the cache: pass mm_token_type_ids"):
        model(tokens(1), past_key_values=past)
    with pytest.raises(ValueError, match="mm_token_type_ids covers 1 tokens"):
        model(tokens(1), past_key_values=past, mm_token_type_ids=torch.zeros(1, 1, dtype=torch.long))


def test_images_and_placeholders_have_to_match():
    model = make_model()
    with pytest.raises(ValueError, match=r"The text holds 5 image tokens, the images give 10"):
        model(tokens(3, "I"), pixels(0, 1))
    with pytest.raises(ValueError, match="there are no images"):
        model(tokens(3, "I"))
    with pytest.raises(ValueError, match="only one of pixel_values, mm_encoder_outputs"):
        model(tokens(3, "I"), pixels(0), mm_encoder_outputs={"image": model.get_image_features(pixels(0))})


def test_encoded_images_stand_in_for_pixels():
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    features = {"image": model.get_image_features(images)}
    assert torch.equal(model(ids, mm_encoder_outputs=features).logits, model(ids, images).logits)


def test_logits_to_keep():
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    torch.testing.assert_close(model(ids, images, logits_to_keep=3).logits, model(ids, images).logits[:, -3:])


def test_kernel_asked_for_at_loading_keeps_the_mathematics(tmp_path):
    model = make_model()
    ids, images = tokens(*PROMPT), pixels(*IMAGES)
    model.save_pretrained(tmp_path)
    for kernel in (None, "sdpa", "eager", {"text_config": "eager", "vision_config": "sdpa"}):
        loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=kernel).eval()
        torch.testing.assert_close(loaded(ids, images).logits, model(ids, images).logits, rtol=1e-4, atol=1e-4)
    for kernel in ("flex_attention", {"text_config": "flex_attention"}):
        with pytest.raises(ValueError, match="not available for the attention type 'mmca'"):
            VisualChatForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=kernel)
        with pytest.raises(ValueError, match="not available for the attention type 'mmca'"):
            model.set_attn_implementation(kernel)
