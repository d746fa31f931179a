"""Edges of models, routes and outputs: no crash, nothing silently wrong, and parity with transformers' own suites."""

import copy

import pytest
import torch
from conftest import (
    IMAGE_SEQ_LENGTH,
    IMAGE_TOKEN_ID,
    PAPER,
    SHAPE,
    TEXT_CONFIGS,
    draw_picture,
    make_config,
    make_model,
    make_processor,
    pixels,
    tokens,
)
from test_kept_cache import GREEDY, logits
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
)

from modeling_visualchat import (
    ConversationCache,
    ImageMemory,
    VisionFeatureCache,
    VisualChatForConditionalGeneration,
    register_projector,
)
from modeling_visualchat import image_states_visualchat as image_states_module
from modeling_visualchat.attention_visualchat import create_mmca_masks
from modeling_visualchat.image_states_visualchat import same_images
from modeling_visualchat.projector_visualchat import PROJECTORS
from modeling_visualchat.weights_key_visualchat import column_sums, weights_key


# 20: crashes.


@pytest.mark.parametrize("route", ["auto", "masked"])
@pytest.mark.parametrize("parts", [(3, "I"), ("I",), ("I", 3, "I")], ids=str)
@pytest.mark.parametrize("trained", ["multi_modal_projector", "vision_tower"])
@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["", "checkpoints", "reentrant checkpoints"])
@pytest.mark.parametrize("attention_type", ["mmca", "causal"])
def test_a_loss_has_a_graph_when_the_last_image_reaches_nothing(parts, route, trained, checkpoints, attention_type):
    """An image that is the last token reaches no text, and the image path alone is trained."""
    model = make_model(attention_type=attention_type).set_trainable(trained).train()
    model.set_route(route)
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    ids = tokens(*parts)
    loss = model(ids, pixels(*range(parts.count("I"))), labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)).loss
    assert torch.isfinite(loss)
    loss.backward()


# Decoders whose table of embeddings has a name of its own.
OTHER_SHAPE = {**SHAPE, "bos_token_id": 3}  # ModernBERT takes no None
OTHER_TABLES = {
    "gpt_neox": {},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", OTHER_TABLES)
def test_a_tied_decoder_with_a_table_of_another_name_is_built_saved_and_loaded(
    monkeypatch, tmp_path, model_type, tied
):
    config = AutoConfig.for_model(
        model_type, **{**OTHER_SHAPE, **OTHER_TABLES[model_type], "tie_word_embeddings": tied}
    )
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: copy.deepcopy(config))
    try:
        model = make_model()
    except ValueError as refused:  # by name
        assert model_type in str(refused)
        return
    table = model.get_input_embeddings().weight
    assert (model.lm_head.weight is table) == tied
    model.save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, images = tokens(3, "I", 4), pixels(0)
    torch.testing.assert_close(loaded(ids, images).logits, model(ids, images).logits, rtol=1e-4, atol=1e-4)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", OTHER_TABLES)
def test_a_decoder_with_a_table_of_another_name_joins(tmp_path, model_type, tied):
    config = AutoConfig.for_model(
        model_type, **{**OTHER_SHAPE, **OTHER_TABLES[model_type], "tie_word_embeddings": tied}
    )
    vision = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    ))  # fmt: skip
    text = AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(6)
    expected = text(ids).logits.detach()
    try:
        model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
            vision, text, image_token_id=IMAGE_TOKEN_ID, image_seq_length=IMAGE_SEQ_LENGTH
        )
    except ValueError as refused:  # by name: GPT-NeoX, ModernBERT, an output layer with a bias
        assert type(text).__name__ in str(refused)
        return
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


TYPES = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("layer_type", TYPES)
@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
def test_a_rope_entry_of_none_is_right_where_it_is_unused_and_refused_where_it_is(monkeypatch, model_type, layer_type):
    """In transformers a layer type with such an entry is a KeyError in the first forward pass."""
    shape = {**OTHER_SHAPE, "layer_types": list(TYPES), "sliding_window": 4096}
    config = AutoConfig.for_model(model_type, **shape)
    table = {"rope_type": "default", "rope_theta": 10000.0}
    config.rope_parameters = {name: None if name == layer_type else dict(table) for name in TYPES}
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: copy.deepcopy(config))
    with pytest.raises(ValueError, match=f"cannot carry multi-modal causal attention: .*{layer_type}"):
        make_model()(tokens(2, "I", 3), pixels(0))
    config.layer_types = [name for name in TYPES if name != layer_type] * 2
    model, results = make_model(), []
    for route in ("auto", "masked"):
        model.set_route(route)
        results.append(model(tokens(2, "I", 3, "I", 2), pixels(0, 0), use_cache=False).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"decoder": "mistral"}, {"attention_type": "causal"}], ids=str)
@pytest.mark.parametrize("negative", [False, True])
def test_guidance_scale_mixes_in_the_unconditional_scores(kwargs, negative):
    """As in transformers: the unconditional text begins at the last token of the prompt, or is given."""
    model, ids, images, scale = make_model(**kwargs), tokens(3, "I", 4), pixels(0), 1.5
    given = {"negative_prompt_ids": tokens(3, seed=9)} if negative else {}
    try:
        actual = model.generate(ids, pixel_values=images, guidance_scale=scale, **given, **GREEDY)
    except ValueError as refused:
        assert "guidance_scale" in str(refused)
        return
    sequence, text = ids, given.get("negative_prompt_ids", ids[:, -1:])
    for _ in range(3):
        with torch.no_grad():
            with_image = model(sequence, images, use_cache=False).logits[:, -1].log_softmax(-1)
            without = model(text, use_cache=False).logits[:, -1].log_softmax(-1)
        scores = scale * (with_image - without) + without
        scores[:, [IMAGE_TOKEN_ID, 1]] = -torch.inf
        token = scores.argmax(-1, keepdim=True)
        sequence, text = torch.cat([sequence, token], dim=1), torch.cat([text, token], dim=1)
    assert torch.equal(actual, sequence)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_model_made_in_inference_mode_caches_vision_features_images_and_chats(is_frozen):
    with torch.inference_mode():
        model = make_model()
    model.requires_grad_(False)
    if is_frozen:
        model.freeze()
    expected = torch.stack(make_model().get_image_features(pixels(0, 1)).pooler_output).detach()
    model.model.vision_cache = VisionFeatureCache()
    for _ in range(2):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                actual = torch.stack(model.get_image_features(pixels(0, 1)).pooler_output)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
                model.generate(tokens(2, "I", 3), pixel_values=pixels(0), image_memory=ImageMemory(), **GREEDY)
                session = model.start_chat(make_processor(), ImageMemory(), **GREEDY)
                session.ask("What?", [draw_picture(0)])
                session.ask("So?")
    assert model.model.vision_cache.misses > 0


def test_features_cached_in_inference_mode_serve_training_later():
    """An entry made in inference mode is an inference tensor, which autograd refuses to save for backward."""
    model = make_model().set_trainable("multi_modal_projector")
    cache = model.model.vision_cache = VisionFeatureCache()
    ids = tokens(2, "I", 3)
    with torch.inference_mode():
        model(ids, pixels(0))
    model.train()
    model(ids, pixels(0), labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)).loss.backward()
    assert cache.hits == 1 and model.model.multi_modal_projector.linear.weight.grad.abs().max() > 0


def test_an_image_remembered_in_inference_mode_serves_a_gradient_later():
    model, memory, ids = make_model(), ImageMemory(), tokens(2, "I", 3)
    with torch.inference_mode():
        states = memory.get_states(model, pixels(0))
        expected = model(ids, image_states=states).logits.clone()
    output = model(ids, image_states=memory.get_states(model, pixels(0)))
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    output.logits.sum().backward()


# 21: smaller.


class Scaled(nn.Module):
    """A projector whose code is edited: the weights and names stay."""

    factor = 1.0

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features):
        return self.linear(features)


def edited():
    """As written anew in a file that was edited: another class of the same name."""

    def forward(self, features):
        return self.linear(features) * 3.0

    return type("Scaled", (Scaled,), {"forward": forward, "__qualname__": "Scaled", "__module__": Scaled.__module__})


@pytest.fixture
def custom_projector():
    register_projector("scaled")(Scaled)
    yield
    PROJECTORS.pop("scaled", None)


def test_a_projector_whose_code_was_edited_does_not_hit_entries_of_the_old_code(tmp_path, custom_projector):
    ids, images = tokens(2, "I", 3), pixels(0)
    old = make_model(projector_type="scaled")
    before = logits(old, ids, pixel_values=images, image_memory=ImageMemory(folder=tmp_path))
    register_projector("scaled")(edited())
    new = make_model(projector_type="scaled")
    assert all(torch.equal(*pair) for pair in zip(old.parameters(), new.parameters()))
    expected = logits(new, ids, pixel_values=images)
    assert (before - expected).abs().max() > 1e-2
    actual = logits(new, ids, pixel_values=images, image_memory=ImageMemory(folder=tmp_path))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_code_enters_the_key_of_a_model_and_of_its_tower(custom_projector, monkeypatch):
    old = weights_key(make_model(projector_type="scaled").model)
    assert weights_key(make_model(projector_type="scaled").model) == old
    register_projector("scaled")(edited())
    assert weights_key(make_model(projector_type="scaled").model) != old
    tower = make_model().model.vision_tower
    key = weights_key(tower)
    mlp = type(tower.encoder.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, states: self.fc2(self.fc1(states)))
    assert weights_key(tower) != key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("corners", [(0, 1021, 1009, 2030), (5, 5 + 3 * 1021, 5 + 2 * 1009, 5 + 3 * 1021 + 2 * 1009)])
def test_the_checksum_sees_sign_flips_at_the_corners_of_its_grid(dtype, corners):
    """Each corner shares a column of one width with one neighbour, and of the other width with the other."""
    weight = torch.randn(8 * 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    lanes = 8 // weight.element_size()
    flipped = weight.clone()
    for corner in corners:
        flipped[corner * lanes + lanes - 1] *= -1  # the lane with the sign of the word
    assert not torch.equal(flipped, weight)
    assert column_sums(flipped) != column_sums(weight)


def test_the_checksum_sees_values_that_change_places_at_the_corners_of_its_grid():
    weight = torch.zeros(2 * 4096)
    moved = weight.clone()
    weight[[0, 2 * 2030]] = 1.5
    moved[[2 * 1021, 2 * 1009]] = 1.5
    assert column_sums(moved) != column_sums(weight)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("route", ["auto", "masked"])
def test_attention_dropout_leaves_the_self_attention_of_an_image_alone(route, kernel):
    """`out_i = v_i`; and so both routes train alike."""
    model = make_model()
    ids, images = tokens(3, "I", 4), pixels(0)
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        expected = model.model(ids, images, use_cache=False).last_hidden_state[:, 3:8]
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.7
    model.train().set_route(route)
    with torch.no_grad():
        actual = model.model(ids, images, use_cache=False).last_hidden_state
    assert (
        actual[:, 8:] - model.eval().model(ids, images, use_cache=False).last_hidden_state[:, 8:]
    ).abs().max() > 1e-3
    torch.testing.assert_close(actual[:, 3:8], expected, rtol=1e-4, atol=1e-4)


def test_images_of_equal_sums_are_told_apart_in_few_comparisons(monkeypatch):
    """Images whose values only change places, so that all sums are equal."""
    generator = torch.Generator().manual_seed(0)
    count, many = [], []
    rows = torch.randint(0, 2, (60, 9, 7), generator=generator).float()
    for row in rows:  # equal sums over all, and over every seventh
        flat = torch.cat([row, 1 - row]).flatten()
        many.append(flat.view(1, 18, 7))
    images = torch.stack(many)
    equal = torch.equal
    monkeypatch.setattr(image_states_module.torch, "equal", lambda *pair: count.append(1) or equal(*pair))
    assert same_images(torch.cat([images, images[:5]])) == [*range(60), *range(5)]
    assert len(count) <= 2 * 65


def test_a_probe_that_failed_once_is_tried_again(monkeypatch):
    """A passing fault, as of memory, sends no later call to the masks for good."""
    model, ids, images = make_model(), tokens(2, "I", 3), pixels(0)

    def fail(decoder):
        raise MemoryError("no memory for a replica")

    monkeypatch.setattr("modeling_visualchat.key_rotation_visualchat.build_replica", fail)
    model(ids, images)
    monkeypatch.undo()
    model.set_route("two_streams")
    model(ids, images)


def test_another_decoder_takes_its_own_route():
    model, ids, images = make_model(), tokens(2, "I", 3), pixels(0)
    good = model.model.language_model
    broken = copy.deepcopy(good)
    del broken.rotary_emb
    model.model.language_model = broken
    assert model.model.probe.no_two_streams is not None
    model.model.language_model = good
    model.set_route("two_streams")
    model(ids, images)


def check_routes(model):
    """Both routes give the same logits."""
    results = []
    for route in ("auto", "masked"):
        model.set_route(route)
        with torch.no_grad():
            results.append(model(tokens(2, "I", 3), pixels(0), use_cache=False).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# Decoders whose `q_proj` yields a gate beside the queries.
GATED = {
    "qwen3_next": {"layer_types": ["full_attention"] * 2, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {"layer_types": ["full_attention"] * 2, "head_dim": 8},
    "qwen3_5_moe_text": {"layer_types": ["full_attention"] * 2, "head_dim": 8, "num_experts": 2,
                         "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("model_type", GATED)
def test_a_query_projection_with_a_gate_is_not_left_out(monkeypatch, model_type):
    config = AutoConfig.for_model(model_type, **{**SHAPE, **GATED[model_type]})
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: copy.deepcopy(config))
    try:
        model = make_model()
    except ValueError:
        pytest.skip("refused")
    check_routes(model)


def test_a_layer_called_q_proj_that_is_used_for_more_than_queries_is_computed(monkeypatch):
    """A decoder that reads its queries twice, as a gate on the output."""
    model = make_model()
    attention = type(model.model.language_model.layers[0].self_attn)
    forward = attention.forward

    def gated(self, hidden_states, *args, **kwargs):
        output, *rest = forward(self, hidden_states, *args, **kwargs)
        return output * self.q_proj(hidden_states).sigmoid(), *rest

    monkeypatch.setattr(attention, "forward", gated)
    check_routes(model)


# 22: parity with transformers' own suites.


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "inner"])
def test_image_features_come_as_a_tuple_where_asked(whole):
    model = make_model()
    model = model if whole else model.model
    output = model.get_image_features(pixels(0, 1))
    features = model.get_image_features(pixels(0, 1), return_dict=False)
    assert isinstance(features, tuple) and not isinstance(output, tuple)
    assert len(features) == len(output.to_tuple())
    model.config.return_dict = False
    assert isinstance(model.get_image_features(pixels(0, 1)), tuple)
    assert not isinstance(model.get_image_features(pixels(0, 1), return_dict=True), tuple)
    make_model()(tokens(2, "I", 3), pixels(0))


@pytest.mark.parametrize("names", [("output_hidden_states",), ("output_attentions",)], ids=str)
def test_image_features_record_what_is_asked_for(names):
    model = make_model()
    model.set_attn_implementation("eager")
    output = model.get_image_features(pixels(0, 1), **dict.fromkeys(names, True))
    recorded = getattr(output, names[0].removeprefix("output_"))
    assert recorded is not None and all(len(each) == 2 for each in recorded)


@pytest.mark.parametrize("attention_type", ["mmca", "causal"])
def test_attentions_of_the_eager_kernel_are_part_of_the_graph(attention_type):
    model = make_model(attention_type=attention_type)
    model.set_attn_implementation("eager")
    output = model(tokens(2, "I", 3), pixels(0), output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits[:, -1].sum().backward()
    for weights in output.attentions:
        assert weights.grad is not None and weights.grad.abs().max() > 0


def test_hidden_states_are_recorded_where_the_configuration_of_a_built_model_asks():
    model = make_model()
    ids, images = tokens(2, "I", 3), pixels(0)
    model.config.text_config.output_hidden_states = True
    output = model(ids, images)
    assert output.hidden_states is not None and len(output.hidden_states) == 3
    model.config.text_config.output_hidden_states = False
    assert model(ids, images).hidden_states is None


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("options", "channels"), [(PAPER, 2), ({}, 4)], ids=["two channels", "four channels"])
def test_a_float_mask_is_that_of_booleans_or_refused(options, channels, kernel, dtype):
    """Added to the scores, as transformers' float masks are: 0 to attend, the lowest number not to."""
    model = make_model(**options).to(dtype)
    model.set_attn_implementation(kernel)
    ids, images = tokens(2, "I", 3), pixels(0)
    types = (ids == IMAGE_TOKEN_ID).long()
    embeds = model.get_input_embeddings()(ids)
    allowed = create_mmca_masks(model.config, embeds, types, None, None)
    assert allowed.shape[1] == channels
    expected = model(ids, images, attention_mask=allowed, use_cache=False).logits
    torch.testing.assert_close(model(ids, images, use_cache=False).logits, expected, rtol=3e-2, atol=3e-2)
    for low in (torch.finfo(dtype).min, float("-inf")):
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, low)
        try:
            actual = model(ids, images, attention_mask=mask, use_cache=False).logits
        except ValueError:
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", [ConversationCache, DynamicCache])
def test_a_cache_continues_by_forward_with_embeddings(cache):
    model, ids = make_model(), tokens(2, "I", 3)
    types = (ids == IMAGE_TOKEN_ID).long()
    expected = model(ids, pixels(0)).logits[:, -2:]
    past = model(ids[:, :-2], pixels(0), past_key_values=cache(), use_cache=True).past_key_values
    embeds = model.get_input_embeddings()(ids[:, -2:])
    actual = model(inputs_embeds=embeds, past_key_values=past, mm_token_type_ids=types).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_configurations_of_the_tests_stay_as_they_are():
    assert make_config().text_config.model_type == "llama"


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("place", [2, 9], ids=["text", "image"])
def test_a_value_that_is_not_finite_stays_in_its_packed_conversation(kernel, place):
    """And there where nothing attends to it; transformers' own packed masks carry it to the whole row."""
    model = make_model()
    model.set_attn_implementation(kernel)
    model.set_route("masked")
    ids = torch.cat([tokens(4, "I", 3), tokens(2, "I", 3, seed=1)], dim=1)
    embeds = model.get_input_embeddings()(ids).detach()
    start, types = 12, (ids == IMAGE_TOKEN_ID).long()
    positions = torch.cat([torch.arange(start), torch.arange(ids.shape[1] - start)])[None]
    inputs = {"position_ids": positions, "mm_token_type_ids": types, "use_cache": False}
    expected = model(inputs_embeds=embeds, **inputs).logits
    place += start if place == 2 else 0
    faulty = embeds.clone()
    faulty[0, place] = float("inf")
    actual = model(inputs_embeds=faulty, **inputs).logits
    is_reached = positions[0] >= positions[0, place]
    is_reached &= (torch.arange(len(is_reached)) >= start) == (place >= start)
    is_reached &= ~types[0].bool() | (torch.arange(len(is_reached)) == place)
    torch.testing.assert_close(actual[0, ~is_reached], expected[0, ~is_reached])
    assert not actual[0, is_reached].isfinite().any()


def test_attentions_are_recorded_where_the_configuration_of_a_built_model_asks():
    """Of the whole model: `text_config` refuses them for any implementation that is not called `eager`."""
    model, (ids, images) = make_model(), (tokens(2, "I", 3), pixels(0))
    with pytest.raises(ValueError, match="Please set it to 'eager'"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    expected = model(ids, images, output_attentions=True).attentions
    assert model(ids, images).attentions is None
    model.config.output_attentions = True
    for actual in (model(ids, images).attentions, model.model(ids, images).attentions):
        assert torch.equal(torch.stack(actual), torch.stack(expected))
    assert model(ids, images, output_attentions=False).attentions is None
