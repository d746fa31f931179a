"""Gated cross-attention: the bare language model at its start, then its literal definition, in everything there is."""

import math

import pytest
import torch
from conftest import (
    IMAGE_TOKEN_ID,
    SHAPE,
    TEXT_CONFIGS,
    draw_picture,
    make_config,
    make_model,
    pad_left,
    pixels,
    tokens,
)
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from test_generation import generate_uncached
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionModel,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_visualchat import ConversationCache, ImageMemory, VisualChatForConditionalGeneration
from modeling_visualchat.cross_attention_visualchat import cross_attention_reference


DECODERS = list(TEXT_CONFIGS)
SCOPED = [*((decoder, "all") for decoder in DECODERS), ("llama", "last")]
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
# Text beyond the windows of the decoders, images first, last and none.
ROWS = [tokens(2, "I", 15, "I", 9), tokens("I", 1, "I", 2, seed=1), tokens(5, seed=2)]
IMAGES = [pixels(0, 1), pixels(2, 3), None]


def make_cross(decoder: str = "llama", is_open: bool = True, **kwargs):
    """A model with two cross-attention layers, by default with gates that are open."""
    model = make_model(decoder, **{"attention_type": "cross", "cross_layer_interval": 1, **kwargs})
    with torch.no_grad():
        for number, layer in enumerate(model.model.cross_attention.values()):
            layer.gate.fill_((-1) ** number * (0.5 + number) * is_open)
    return model


def rms_norm(norm, states):
    return states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + norm.eps) * norm.weight


def literal_logits(model, ids, images):
    """The logits of the text of one row, by the stock decoder on the text and the definition of cross-attention."""
    is_image, decoder = ids[0] == IMAGE_TOKEN_ID, model.model.language_model
    features = None if images is None else torch.cat(model.get_image_features(images).pooler_output)

    def read(layer, hidden_states):
        def at(places, states):
            heads = states.new_zeros(len(is_image), states.shape[-1])
            heads[places] = states
            return heads.view(1, len(is_image), -1, layer.head_dim).transpose(1, 2)

        query = at(~is_image, layer.q_proj(rms_norm(layer.norm, hidden_states[0])))
        normed = rms_norm(layer.images.norm, features)
        key, value = at(is_image, layer.images.k_proj(normed)), at(is_image, layer.images.v_proj(normed))
        num_tokens = 5 if model.config.image_scope == "last" else None
        output = cross_attention_reference(query, key, value, is_image.long()[None], num_tokens=num_tokens)
        output = output.transpose(1, 2)[0, ~is_image].flatten(1)
        return hidden_states + torch.tanh(layer.gate) * layer.o_proj(output)

    hooks = [
        decoder.layers[int(place)].register_forward_pre_hook(
            lambda module, arguments, layer=layer: (read(layer, arguments[0]), *arguments[1:])
        )
        for place, layer in model.model.cross_attention.items()
        if images is not None
    ]
    text = model.get_input_embeddings()(ids[:, ~is_image])
    states = decoder(inputs_embeds=text, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return model._scale_logits(model.lm_head(states))


def labels_of(ids):
    """All text but the first token."""
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)
    return labels.masked_fill((labels != -100).cumsum(dim=1) == 1, -100)


def make_batch(form):
    if form == "packed":
        batch = {
            "input_ids": torch.cat(ROWS, dim=1),
            "position_ids": torch.cat([torch.arange(row.shape[1]) for row in ROWS])[None],
        }
        return {**batch, "labels": torch.cat([labels_of(row) for row in ROWS], dim=1)}
    batch = pad_left(ROWS)
    if form == "padded right":
        batch = {name: batch[name].flip(1) for name in batch}
        for index, row in enumerate(ROWS):
            batch["input_ids"][index, : row.shape[1]] = row
    is_padding = batch["attention_mask"] == 0
    return {**batch, "labels": labels_of(batch["input_ids"].masked_fill(is_padding, IMAGE_TOKEN_ID))}


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_start_is_the_bare_language_model_on_the_text(decoder):
    model = make_cross(decoder, is_open=False)
    stock = AutoModelForCausalLM.from_config(TEXT_CONFIGS[decoder]()).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        for ids, images in zip(ROWS, IMAGES):
            is_text = ids != IMAGE_TOKEN_ID
            expected = stock(ids[is_text][None], labels=ids[is_text][None])
            actual = model(ids, images, labels=labels_of(ids))
            torch.testing.assert_close(actual.logits[is_text], expected.logits[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize(("decoder", "scope"), SCOPED)
def test_loss_and_gradients_are_those_of_the_definition_padded_and_packed(decoder, scope):
    model = make_cross(decoder, image_scope=scope).train()
    losses = []
    for ids, images in zip(ROWS, IMAGES):
        text = ids[0, ids[0] != IMAGE_TOKEN_ID]
        logits = literal_logits(model, ids, images)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, text[1:], reduction="none"))
    torch.cat(losses).mean().backward()
    expected = gradients_of(model)
    assert expected.keys() == {name for name, _ in model.named_parameters() if "post_layernorm" not in name}
    for form in ("padded left", "padded right", "packed"):
        model.zero_grad()
        loss = model(**make_batch(form), pixel_values=pixels(0, 1, 2, 3)).loss
        loss.backward()
        torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients_of(model), expected, rtol=1e-4, atol=1e-5, msg=form)


def test_text_before_the_first_image_is_unchanged_to_the_bit():
    model, ids = make_cross(), tokens(7, "I", 4)
    with torch.no_grad():
        states = [model(ids, pixels(seed), output_hidden_states=True) for seed in (0, 1)]
        alone = model(ids[ids != IMAGE_TOKEN_ID][None]).logits
    assert torch.equal(states[0].logits[:, :7], states[1].logits[:, :7])
    assert torch.equal(states[0].logits[:, :7], alone[:, :7])
    assert (states[0].logits[:, -4:] - states[1].logits[:, -4:]).abs().max() > 0.1
    # An image token predicts what the text before it does.
    assert torch.equal(states[0].logits[:, 7:12], states[0].logits[:, 6:7].expand(-1, 5, -1))
    assert [each.shape[1] for each in states[0].hidden_states] == [ids.shape[1]] * 3


@pytest.mark.parametrize(("decoder", "scope"), SCOPED)
def test_decoding_with_a_cache_is_that_without(decoder, scope):
    model = make_cross(decoder, image_scope=scope)
    expected = [generate_uncached(model, ids, images, 6) for ids, images in zip(ROWS, IMAGES)]
    for row, ids, images in zip(expected, ROWS, IMAGES):
        assert torch.equal(model.generate(ids, pixel_values=images, **OPTIONS), row)
    batch = {**pad_left(ROWS), "pixel_values": pixels(0, 1, 2, 3)}
    generated = model.generate(**batch, **OPTIONS)
    assert torch.equal(generated[:, -6:], torch.cat([row[:, -6:] for row in expected]))
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        results = [model.generate(**batch, **OPTIONS, **options, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(*results)


def test_gaps_in_the_positions_of_a_masked_row_are_no_new_conversation():
    model, ids = make_cross(), ROWS[0]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        mask = torch.ones_like(ids)
        expected = model(ids, IMAGES[0], position_ids=positions).logits
        moved = model(ids, IMAGES[0], position_ids=positions + 100).logits
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
        far = positions + 1000 * (positions >= 20)
        results = [
            model(ids, IMAGES[0], position_ids=far, attention_mask=mask, use_cache=use_cache).logits
            for use_cache in (False, True)
        ]
        torch.testing.assert_close(*results)
        packed = model(ids, IMAGES[0], position_ids=far, use_cache=False).logits
        assert (packed[:, 20:] - results[0][:, 20:]).abs().max() > 0.1


def test_other_ways_of_decoding():
    model, assistant = make_cross(), make_cross(seed=1)
    ids, images = ROWS[0], IMAGES[0]
    expected = generate_uncached(model, ids, images, 6)
    inputs = {"input_ids": ids, "pixel_values": images, **OPTIONS}
    for chunk in (3, 7):
        assert torch.equal(model.generate(**inputs, prefill_chunk_size=chunk), expected)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(model.generate(**inputs, assistant_model=assistant), expected)
    embeds = model.get_input_embeddings()(ids)
    features = torch.cat(model.get_image_features(images).pooler_output)
    embeds[ids == IMAGE_TOKEN_ID] = features
    kinds = (ids == IMAGE_TOKEN_ID).long()
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, mm_token_type_ids=kinds).logits
        torch.testing.assert_close(logits, model(ids, images).logits)
        torch.manual_seed(0)
        sampled = model.generate(ids, pixel_values=images, do_sample=True, num_return_sequences=3, max_new_tokens=4)
        assert len(sampled) == 3


@pytest.mark.parametrize(("decoder", "scope"), SCOPED)
def test_a_kept_cache_over_three_rounds_gives_what_a_fresh_one_does(decoder, scope):
    """A batch of unequal rounds, the second row without images until the last round, then beams."""
    model, cache = make_cross(decoder, image_scope=scope), ConversationCache()
    rounds = [
        ([tokens(3, "I", 6), tokens(5, seed=1)], pixels(0)),
        ([tokens(9, seed=2), tokens(2, seed=3)], None),
        ([tokens("I", 2, seed=4), tokens(1, "I", "I", 8, seed=5)], pixels(1, 2, 3)),
    ]
    generated, mask, seen = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), []
    for number, (rows, images) in enumerate(rounds):
        new = pad_left(rows)
        generated = torch.cat([generated, new["input_ids"]], dim=1)
        mask = torch.cat([mask, new["attention_mask"]], dim=1)
        seen += [] if images is None else list(images.split(1))
        order = [0, 1, 2, 3] if number == 2 else [0]
        inputs = {"input_ids": generated, "attention_mask": mask}
        fresh = {**inputs, "pixel_values": torch.cat([seen[index] for index in order])}
        options = {**OPTIONS, "num_beams": 2} if number == 2 else OPTIONS
        expected = model.generate(**fresh, **options)
        kept = {} if images is None else {"pixel_values": images}
        generated = model.generate(**inputs, **kept, past_key_values=cache, **options)
        assert torch.equal(generated, expected)
        mask = torch.nn.functional.pad(mask, (0, 6), value=1)


def test_a_chat_with_edited_images_answers_as_a_new_one(processor):
    model, pictures = make_cross(), [draw_picture(seed) for seed in range(4)]
    options = {"max_new_tokens": 5, "do_sample": False}
    for memory in (None, ImageMemory()):
        session = model.start_chat(processor, memory, **options)
        session.ask("What is it?", images=pictures[:2])
        session.ask("And this?", images=pictures[2:3])
        edits = [
            (session.replace_image, (1, pictures[3])),
            (session.edit_question, (2, "Or this?")),
            (session.remove_image, (2,)),
            (session.retry, ()),
        ]
        for edit, arguments in edits:
            answer = edit(*arguments)
            assert model.start_chat(processor, **options).answer(session.messages[:-1]) == answer


@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
def test_an_image_memory_gives_what_a_model_computes(decoder, tmp_path):
    model, memory = make_cross(decoder), ImageMemory(folder=tmp_path)
    batch = pad_left(ROWS)
    for images in (pixels(0, 1, 2, 3), pixels(3, 3, 1, 0), pixels(2, 1, 0, 0)):
        results = [
            model.generate(
                **batch, pixel_values=images, image_memory=store, output_logits=True, return_dict_in_generate=True,
                **OPTIONS,
            )
            for store in (None, memory)
        ]  # fmt: skip
        torch.testing.assert_close(results[0].logits, results[1].logits, rtol=0, atol=1e-5)
    assert (memory.hits, memory.misses) == (6, 4)
    states = memory.get_states(model, pixels(0))
    assert len(states.keys) == 2 and states.outputs is None
    with torch.no_grad():
        model.model.cross_attention["1"].images.k_proj.weight += 0.1
    memory.get_states(model, pixels(0))
    assert memory.misses == 5


def test_a_join_starts_as_its_language_model_and_trains_what_is_new(tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionModel(make_config().vision_config)
    text = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 4})).eval()
    vision.save_pretrained(tmp_path / "vision")
    ids, images = ROWS[0], IMAGES[0]
    is_text = ids != IMAGE_TOKEN_ID
    with torch.no_grad():
        expected = text(ids[is_text][None]).logits[0]
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision, text, image_token_id=IMAGE_TOKEN_ID, attention_type="cross", cross_layer_interval=2
    )
    assert list(model.model.cross_attention) == ["1", "3"]
    torch.testing.assert_close(model(ids, images).logits[is_text], expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trainable} == {"cross_attention", "multi_modal_projector", "language_model"}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # what is behind a closed gate has its first gradient in the second step
        optimizer.zero_grad()
        model.train()(ids, images, labels=labels_of(ids)).loss.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trainable
    model.set_trainable("cross_attention")
    text_only = model(ROWS[2], labels=labels_of(ROWS[2])).loss  # still depends on what is trained
    optimizer.zero_grad()
    text_only.backward()
    assert all(not parameter.grad.any() for parameter in model.model.cross_attention.parameters())
    model.save_pretrained(tmp_path / "saved")
    loaded, info = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(ids, images).logits, model.eval()(ids, images).logits)


def test_a_checkpoint_of_another_type_continues_with_closed_gates(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    options = {"attention_type": "cross", "cross_layer_interval": 2}
    loaded, info = VisualChatForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert all("cross_attention.1." in key for key in info["missing_keys"]) and len(info["missing_keys"]) == 7
    assert loaded.model.cross_attention["1"].gate.item() == 0.0
    text = tokens(9)
    torch.testing.assert_close(loaded.eval()(text).logits, model(text).logits)


@pytest.mark.parametrize("how", ["checkpointed", "checkpointed reentrantly", "lora"])
def test_training_is_the_same_however_it_is_done(how):
    model = make_cross().train()
    batch = {**make_batch("padded left"), "pixel_values": pixels(0, 1, 2, 3)}
    inner = model
    if how == "lora":
        model = get_peft_model(
            model, LoraConfig(target_modules=r"model\.(language_model|cross_attention)\..*\.(q_proj|v_proj)")
        )
    results = []
    for is_changed in (False, True):
        if is_changed and how != "lora":
            inner.gradient_checkpointing_enable({"use_reentrant": how == "checkpointed reentrantly"})
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients_of(model)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    if how == "lora":
        lora = {name: gradient for name, gradient in results[0][1].items() if "lora_B" in name}
        assert len(lora) == 8 and all(gradient.any() for gradient in lora.values())


@pytest.mark.slow
def test_compiles():
    model, ids, images = make_cross(), ROWS[0], IMAGES[0]
    expected = [model(ids, pixel_values).logits for pixel_values in (images, pixels(4, 5))]
    model.compile(backend="eager")
    for pixel_values, logits in zip((images, pixels(4, 5)), expected):
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixel_values).logits, logits)


def test_what_cannot_be_done_is_refused_with_the_reason():
    model, ids, images = make_cross(), ROWS[0], IMAGES[0]
    with pytest.raises(ValueError, match="A DynamicCache has no place for the images of cross-attention"):
        model(ids, images, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static' has no place for images"):
        model.generate(ids, pixel_values=images, cache_implementation="static")
    with pytest.raises(ValueError, match="A prompt ends with an image"):
        model.generate(tokens(3, "I"), pixel_values=pixels(0))
    with pytest.raises(ValueError, match="takes an attention_mask of shape"):
        model(ids, images, attention_mask=torch.ones(1, 2, *2 * ids.shape[1:], dtype=torch.bool))
    with pytest.raises(ValueError, match="output_attentions is not possible with cross-attention"):
        model(ids, images, output_attentions=True)
    with pytest.raises(ValueError, match="guidance_scale needs a second text without images"):
        model.generate(ids, pixel_values=images, guidance_scale=2.0)
    with pytest.raises(ValueError, match="marks 6 of the current tokens as images; the images take 10"):
        kinds = (ids == IMAGE_TOKEN_ID).long()
        kinds[0, 10:] = 0
        kinds[0, 9] = 1
        model(ids, images, mm_token_type_ids=kinds)
    model.set_route("masked")
    with pytest.raises(ValueError, match="The route 'masked' was asked for, and attention_type='cross' has one of"):
        model(ids, images)
    with pytest.raises(ValueError, match="cross_layer_interval=4 leaves a decoder of 2 layers without"):
        make_model(attention_type="cross")
    with pytest.raises(ValueError, match=r"Unknown image_scope='lost' \(did you mean 'last'\?\)"):
        make_cross(image_scope="lost")
    with pytest.raises(StrictDataclassError, match='has image_scope="all" only'):
        make_config(attention_type="causal", image_scope="last")
    with pytest.raises(StrictDataclassError, match='has image_scope="all" or "last"'):
        make_config(attention_type="cross", image_scope="half")
    assert make_config(cross_image_scope="last").image_scope == "last"
    with pytest.raises(StrictDataclassError, match="cross_layer_interval must be at least 1, got 0"):
        make_config(cross_layer_interval=0)
    with pytest.raises(ValueError, match="Unknown trainable part 'cross_attention'"):
        make_model().set_trainable("cross_attention")


@pytest.mark.parametrize("text_config", [BloomConfig, GPT2Config], ids=lambda config: config.__name__)
def test_an_unfit_decoder_is_refused_by_name(monkeypatch, text_config):
    shape = {"vocab_size": 259, "hidden_size": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    monkeypatch.setitem(TEXT_CONFIGS, "unfit", lambda: text_config(**shape))
    with pytest.raises(ValueError, match=r"(BloomModel|GPT2Model).* cannot carry cross-attention: "):
        make_model("unfit", attention_type="cross", cross_layer_interval=1)(ROWS[0], IMAGES[0])


def test_the_reference_counts_padding_and_grouped_heads():
    """By hand: two images of one token with equal scores give the mean of their values."""
    query, key = torch.zeros(1, 2, 5, 1), torch.zeros(1, 1, 5, 1)
    value = torch.tensor([8.0, 2.0, 4.0, 16.0, 32.0]).view(1, 1, 5, 1)
    kinds, mask = torch.tensor([[1, 0, 1, 0, 1]]), torch.ones(1, 5, dtype=torch.long)
    output = cross_attention_reference(query, key, value, kinds, mask)
    assert cross_attention_reference(query, key, value, kinds, mask, num_tokens=1)[0, 1, 3].item() == 4.0
    assert output[0, 1, :, 0].tolist() == [0.0, 8.0, 0.0, 6.0, 0.0]
    mask[0, 0] = 0
    output = cross_attention_reference(query, key, value, kinds, mask)
    assert output[0, 0, :, 0].tolist() == [0.0, 0.0, 0.0, 4.0, 0.0]
    assert not math.isnan(float(output.sum()))
