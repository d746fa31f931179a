"""The model as a piece of transformers: parts, projectors, training, embeddings, errors."""

import pytest
import torch
from conftest import (
    IMAGE_SEQ_LENGTH,
    IMAGE_TOKEN_ID,
    VOCAB_SIZE,
    make_config,
    make_model,
    make_processor,
    pixels,
    tokens,
)
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessor,
    BloomConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Qwen3NextConfig,
    SiglipVisionConfig,
)

from configuration_visualchat import VisualChatConfig
from modeling_visualchat import VisualChatForConditionalGeneration, register_projector
from modeling_visualchat.projector_visualchat import PROJECTORS, vision_feature_size


def labels_of(ids):
    return ids.masked_fill(ids == IMAGE_TOKEN_ID, -100)


@pytest.mark.parametrize("projector_type", ["linear", "mlp", "vit", "perceiver"])
def test_projectors(projector_type):
    kwargs = {"image_seq_length": 9} if projector_type == "perceiver" else {}
    model = make_model(projector_type=projector_type, **kwargs)
    features = model.get_image_features(pixels(0, 1)).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(kwargs.get("image_seq_length", 5), 32)] * 2
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    torch.testing.assert_close(model.get_image_features(pixels(1)).pooler_output[0], features[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "length"),
    [
        ({}, 5),
        ({"vision_feature_select_strategy": "default"}, 4),
        ({"vision_feature_layer": -2}, 5),
        ({"vision_feature_layer": [-2, -1]}, 5),
        ({"vision_feature_layer": 0}, 5),
    ],
    ids=str,
)
def test_vision_features(kwargs, length):
    model = make_model(**kwargs)
    assert model.config.image_seq_length == length
    output = model.get_image_features(pixels(0))
    tower = model.model.vision_tower(pixels(0), output_hidden_states=True).hidden_states
    layers = kwargs.get("vision_feature_layer", -1)
    expected = torch.cat([tower[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    expected = expected[:, -length:]
    torch.testing.assert_close(output.pooler_output[0], model.model.multi_modal_projector(expected)[0])


def test_only_what_is_trainable_moves():
    for parts in ((), ("multi_modal_projector",), ("vision_tower", "language_model"), ("lm_head",)):
        model = make_model().train().set_trainable(*parts)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = tokens(3, "I", 9)
        model(ids, pixels(0), labels=labels_of(ids)).loss.backward()
        optimizer.step()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        prefixes = {
            (): ("model.multi_modal_projector.", "model.language_model.embed_tokens."),
            ("multi_modal_projector",): ("model.multi_modal_projector.",),
            ("vision_tower", "language_model"): ("model.vision_tower.", "model.language_model."),
            ("lm_head",): ("lm_head.",),
        }[parts]
        named = {name for name in before if name.startswith(prefixes)}
        unread = {name for name in named if "post_layernorm" in name}  # the tower's pooled output is not read
        assert moved == named - unread, parts


def test_an_unknown_trainable_part_is_named():
    with pytest.raises(
        ValueError,
        match=r"Unknown trainable part 'projecter' \(did you mean 'projector'\?\); choose from projector, embeddings",
    ):
        make_model().set_trainable("projecter")


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_tie_and_resize(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = tokens(3, "I", 4)
    before = model(ids, pixels(0)).logits
    model.resize_token_embeddings(VOCAB_SIZE + 7, mean_resizing=False)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 7
    torch.testing.assert_close(model(ids, pixels(0)).logits[..., :VOCAB_SIZE], before)
    model.save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded(ids, pixels(0)).logits.shape[-1] == VOCAB_SIZE + 7


def test_the_embedding_of_the_placeholder_is_never_read():
    model = make_model()
    ids = tokens(3, "I", 4)
    before = model(ids, pixels(0)).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[IMAGE_TOKEN_ID] = 1e4
    assert torch.equal(model(ids, pixels(0)).logits, before)


def test_the_loss_is_next_token_cross_entropy():
    model = make_model()
    ids = tokens(3, "I", 9)
    labels = labels_of(ids)
    output = model(ids, pixels(0), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    shared = model(ids, pixels(0), labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(shared, expected * (labels[:, 1:] != -100).sum() / 50)


def test_a_batch_of_text_and_images_learns_from_both():
    model = make_model().train()
    ids = torch.cat([tokens(3, "I", 4), tokens(7 + IMAGE_SEQ_LENGTH, seed=1)])
    together = model(ids, pixels(0), labels=labels_of(ids))
    alone = [model(ids[:1], pixels(0), labels=labels_of(ids[:1])), model(ids[1:], labels=ids[1:])]
    counts = [(labels_of(row[None])[:, 1:] != -100).sum() for row in ids]
    expected = sum(output.loss * count for output, count in zip(alone, counts)) / sum(counts)
    torch.testing.assert_close(together.loss, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32():
    model = make_model()
    ids = tokens(3, "I", 9)
    expected = model(ids, pixels(0)).logits
    actual = model.to(torch.bfloat16)(ids, pixels(0)).logits.float()
    assert (actual - expected).norm() / expected.norm() < 0.05


def test_device_map(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    ids = tokens(3, "I", 4)
    for device_map in ("auto", {"model.vision_tower": "cpu", "model": "cpu", "lm_head": "cpu"}):
        loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map).eval()
        torch.testing.assert_close(loaded(ids, pixels(0)).logits, model(ids, pixels(0)).logits)


def test_offloaded_to_disk_it_generates_the_same(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "lm_head": "cpu",
    }
    loaded = VisualChatForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    ids = tokens(3, "I", 4)
    options = {"max_new_tokens": 5, "do_sample": False}
    actual = loaded.generate(ids, pixel_values=pixels(0), **options)
    assert torch.equal(actual, model.generate(ids, pixel_values=pixels(0), **options))


def test_lora_trains_saves_and_merges(tmp_path):
    model = make_model()
    ids = tokens(3, "I", 4)
    targets = r"model\.language_model\..*\.(q_proj|v_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    expected = adapted(input_ids=ids, pixel_values=pixels(0)).logits
    assert not torch.allclose(expected, make_model()(ids, pixels(0)).logits, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    torch.testing.assert_close(reloaded(input_ids=ids, pixel_values=pixels(0)).logits, expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(ids, pixels(0)).logits, expected, rtol=1e-4, atol=1e-4)


VISION_CONFIGS = {
    "clip": (CLIPVisionConfig, {}),
    "siglip": (SiglipVisionConfig, {}),
    "dinov2": (Dinov2Config, {}),
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_parts_join(name, tmp_path):
    config_class, extra = VISION_CONFIGS[name]
    vision = AutoModel.from_config(config_class(**SMALL, **extra))
    causal_lm = AutoModelForCausalLM.from_config(make_config().text_config).eval()
    ids = tokens(9)
    text_logits = causal_lm(ids).logits
    weights = causal_lm.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision, causal_lm, image_token_id=VOCAB_SIZE
    )
    assert model.config.image_token_id == VOCAB_SIZE
    assert model.config.image_seq_length == (4 if name == "siglip" else 5)
    assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight, weights)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB_SIZE], text_logits, rtol=1e-5, atol=1e-5)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.model.language_model.config._attn_implementation == "mmca_joint_sdpa"
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        "model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias",
        "model.multi_modal_projector.norm.weight", "model.multi_modal_projector.norm.bias",
        "model.language_model.embed_tokens.weight",
    }  # fmt: skip
    with_image = torch.cat([torch.full((1, model.config.image_seq_length), VOCAB_SIZE), ids], dim=1)
    logits = model(with_image, pixels(0)).logits
    model.save_pretrained(tmp_path)
    loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(with_image, pixels(0)).logits, logits)


def test_half_a_dual_encoder_joins(tmp_path):
    CLIPImageProcessor(size=8, crop_size=8).save_pretrained(tmp_path)
    CLIPModel(
        CLIPConfig(vision_config=SMALL, text_config={"hidden_size": 8, "num_attention_heads": 2})
    ).save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_config(make_config().text_config)
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path), text, image_token_id=IMAGE_TOKEN_ID
    )
    assert type(model.model.vision_tower).__name__ == "CLIPVisionModel"


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


def test_the_length_of_an_image_is_that_of_its_image_processor(tmp_path):
    """A DINOv2 is configured for more pixels than its image processor yields, and reads these."""
    AutoModel.from_config(Dinov2Config(**{**SMALL, "image_size": 16})).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_config(make_config().text_config)
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path), text, image_token_id=IMAGE_TOKEN_ID
    )
    assert model.config.image_seq_length == 5
    assert model(tokens(3, "I"), pixels(0)).logits.isfinite().all()


def test_a_join_in_bfloat16_keeps_the_precision_of_positions(tmp_path):
    vision = AutoModel.from_config(CLIPVisionConfig(**SMALL))
    causal_lm = AutoModelForCausalLM.from_config(make_config().text_config, dtype=torch.bfloat16).eval()
    ids = tokens(600)
    expected = causal_lm(ids).logits
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision, causal_lm, image_token_id=IMAGE_TOKEN_ID
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path)
    reloaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, reloaded(ids).logits)
    assert (model(ids).logits.float() - expected.float()).norm() / expected.float().norm() < torch.finfo(
        torch.bfloat16
    ).eps


def test_parts_that_do_not_join_are_refused():
    vision = AutoModel.from_config(CLIPVisionConfig(**SMALL))
    join = VisualChatForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="A loaded LlamaForCausalLM comes without its tokenizer: pass image_token_id"):
        join(vision, AutoModelForCausalLM.from_config(make_config().text_config))
    with pytest.raises(ValueError, match=r"VisualChatForConditionalGeneration is itself multi-modal; .* type 'llama'"):
        join(vision, make_model(), image_token_id=2)
    maps = AutoModel.from_config(ConvNextConfig(image_size=32, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    for fields, message in (
        ({}, r"'convnext'\) yields features of shape \(1, 8, 1, 1\)"),
        ({"projector_type": "perceiver"}, r"'convnext'\) yields features of shape \(1, 8, 1, 1\)"),
        ({"image_seq_length": 1}, r"the vision tower \('convnext'\) has no hidden_size"),
    ):
        with pytest.raises(ValueError, match=message):
            join(maps, AutoModelForCausalLM.from_config(make_config().text_config), image_token_id=2, **fields)


@pytest.mark.parametrize("how", ["decoder", "configuration", "registered name"])
def test_nothing_switches_mmca_off(how):
    model = make_model()
    ids = tokens(3, "I", 9)
    expected = model(ids, pixels(0)).logits
    if how == "decoder":
        model.model.language_model.set_attn_implementation("eager")
    elif how == "configuration":
        model.config._attn_implementation = "sdpa"
    else:
        model.set_attn_implementation("mmca_eager")
    torch.testing.assert_close(model(ids, pixels(0)).logits, expected, rtol=1e-4, atol=1e-4)


UNFIT_DECODERS = {
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99), "its positions are not rotary"),
    "opt": (OPTConfig(**TINY, ffn_dim=32), "its positions are not rotary"),
    "bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=99), "does not take its attention from"),
    "mpt": (MptConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=99), "does not take its attention from"),
    "falcon": (FalconConfig(**TINY), "does not take its attention from"),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99), "does not take its attention"),
    "gemma2": (Gemma2Config(**TINY, intermediate_size=32, head_dim=16), "scores that are capped"),
    "gemma3n_text": (Gemma3nTextConfig(**TINY, intermediate_size=32, num_kv_shared_layers=0), "read the token ids"),
    "gpt_oss": (
        GptOssConfig(
            **TINY, intermediate_size=32, num_key_value_heads=2, head_dim=16, num_local_experts=2
        ),
        "more than a softmax over keys",
    ),
    "qwen3_next": (
        Qwen3NextConfig(**{**TINY, "num_hidden_layers": 4}, intermediate_size=32, num_experts=2),
        "layers of type linear_attention mix tokens by other means|does not take its attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT_DECODERS)
def test_an_unfit_decoder_is_refused_by_name(name):
    text_config, reason = UNFIT_DECODERS[name]
    config = VisualChatConfig(vision_config=make_config().vision_config, text_config=text_config)
    with pytest.raises(
        ValueError, match=f"model type '{name}'.* cannot carry multi-modal causal attention: .*({reason})"
    ):
        VisualChatForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vision_feature_select_strategy": "cls"}, r"expected one of \('full', 'default'\), got cls"),
        ({"image_seq_length": 0}, "image_seq_length must be at least 1, got 0"),
        ({"image_token_id": -1}, "image_token_id must not be negative, got -1"),
        ({"image_token_id": "2"}, "image_token_id"),
        (
            {"vision_feature_layer": 3},
            "vision_feature_layer must lie between -3 and 2 for a vision tower of 2 layers, got 3",
        ),
        ({"vision_feature_layer": []}, "vision_feature_layer must name at least one layer"),
        ({"projector_hidden_act": "gelo"}, "projector_hidden_act must be one of .*gelu.*, got 'gelo'"),
    ],
)
def test_a_wrong_configuration_says_which_value_and_what_is_allowed(kwargs, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**kwargs)


def test_an_unknown_attention_type_or_projector_is_refused_with_the_names_there_are():
    for kwargs, message in (
        (
            {"attention_type": "crossed"},
            r"Unknown attention_type='crossed' \(did you mean 'cross'\?\); choose one of mmca, causal, cross",
        ),
        ({"projector_type": "conv"}, "Unknown projector_type='conv'; choose one of linear, mlp, vit, perceiver"),
    ):
        config = make_config(**kwargs)
        with pytest.raises(ValueError, match=message):
            VisualChatForConditionalGeneration(config)


def test_a_custom_projector_is_one_class(monkeypatch):
    monkeypatch.setattr("modeling_visualchat.projector_visualchat.PROJECTORS", dict(PROJECTORS))

    @register_projector("deep")
    class DeepProjector(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(vision_feature_size(config), config.text_config.hidden_size)

    model = make_model(projector_type="deep")
    assert isinstance(model.model.multi_modal_projector, DeepProjector)
    assert model(tokens(2, "I", 1), pixels(0)).logits.shape[1] == 8


def test_an_image_of_unknown_length_is_asked_for():
    with pytest.raises(ValueError, match="image_seq_length cannot be derived for a vision tower of type 'llama'"):
        VisualChatConfig(vision_config=LlamaConfig())


def test_inputs_that_contradict_each_other_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, tokens\)"):
        model(tokens(4), attention_mask=torch.ones(1, 1, 4, 4))
    for length in (3, 5):
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(1, {length}\); it has to cover"):
            model(tokens(4), attention_mask=torch.ones(1, length))
    with pytest.raises(ValueError, match="mm_token_type_ids covers 3 tokens"):
        model(tokens(4), mm_token_type_ids=torch.zeros(1, 3, dtype=torch.long))


def test_model_and_processor_fit(chat):
    processor, model = make_processor(), make_model()
    inputs = processor.apply_chat_template(chat, return_labels=True, return_tensors="pt")
    loss = model(**inputs).loss
    assert loss.isfinite() and loss > 0
