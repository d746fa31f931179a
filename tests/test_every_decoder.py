"""
Every decoder that is accepted, tiny, against the stock causal model with a literal attention of this file's own.

Nothing of VisualChat computes the expected logits: transformers' causal model does, on embeddings in which image
features stand in their places, with an attention function that spells out the definition of MMCA.
"""

import copy
import functools

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, PAPER, SHAPE, TEXT_CONFIGS, make_model, pixels, tokens
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.attention_visualchat import check_decoder


pytestmark = pytest.mark.slow

# Small values for whatever a configuration has of these.
TINY = {
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_topk": 2, "attention_head_dim": 8,
    "kv_channels": 8, "moe_num_experts": 4, "moe_k": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48,
    "rotary_dim": 8, "zero_expert_num": 1, "num_nextn_predict_layers": 0, "norm_topk_prob": True,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1, "moe_num_shared_experts": 1, "partial_rotary_factor": None, "num_layers": 2,
}  # fmt: skip
SMALL = {**SHAPE, "bos_token_id": 3, "max_position_embeddings": 8192}
# What a tiny one of these needs besides.
NEEDS = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 8192,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    # Its encoders of images and audio are not used; in their usual size they took most of the time of this file.
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * 2, "num_dense_layers": 2},
    "lfm2": {"layer_types": ["full_attention"] * 2},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")
        },
    },
}
NOT_TIED = {"dbrx", "moshi"}  # by its configuration; by a table with one row more than the output


def tiny_config(model_type: str, **changes):
    default = AutoConfig.for_model(model_type)
    known = {name: value for name, value in TINY.items() if getattr(default, name, None) is not None}
    known = {name: value for name, value in known.items() if value is not None}
    if getattr(default, "sliding_window", None) is not None:
        known["sliding_window"] = 4096  # beyond the reach of the tests: windows have tests of their own
    config = AutoConfig.for_model(model_type, **{**SMALL, **known, **NEEDS.get(model_type, {}), **changes})
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" in (getattr(default, "layer_types", None) or types):
        config.layer_types = ["sliding_attention", "full_attention"]
    return config


@functools.cache
def accepted() -> list[str]:
    """The model types of the causal decoders whose default configuration is accepted."""
    names = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            check_decoder(AutoConfig.for_model(name))
        except Exception:  # refused, or no configuration by default
            continue
        names.append(name)
    return names


class Literal:
    """MMCA spelled out over whole matrices of scores; which tokens are images is set before a call."""

    is_image: torch.Tensor
    is_plain = True  # or one softmax, half of the heads read the last image, and images attend within themselves
    calls = 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        type(self).calls += 1
        heads, length = query.shape[1], query.shape[2]
        queries_per_key = heads // key.shape[1]
        key, value = (states.repeat_interleave(queries_per_key, dim=1) for states in (key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = (query.double() @ key.double().transpose(2, 3)) * scaling
        row, column = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = column <= row
        if sliding_window is not None:
            seen = seen & (column > row - sliding_window)
        is_image = self.is_image[:, None, None, :]
        if not self.is_plain:
            number = (self.is_image.cumsum(dim=1) - 1) // IMAGE_SEQ_LENGTH
            is_last = (number[:, None, :, None] == number[:, None, None, :]) & is_image
            group = torch.arange(heads) % (queries_per_key if queries_per_key > 1 else heads)
            reads_all = (group % 2 == 1)[:, None, None]
            allowed = torch.where(self.is_image[:, None, :, None], is_last, seen & (~is_image | is_last | reads_all))
            output = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value.double()
            return output.to(query.dtype).transpose(1, 2).contiguous(), None
        output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        for kind in (~is_image, is_image):
            allowed = seen & kind
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
            output = output + weights @ value.double()
        output = torch.where(self.is_image[:, None, :, None], value.double(), output)
        return output.to(query.dtype).transpose(1, 2).contiguous(), None


literal = Literal()
AttentionInterface.register("literal", literal)
AttentionMaskInterface.register("literal", sdpa_mask)


def randomise(module, norms: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.15, generator=generator)
            elif norms == "one" and "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif norms == "random":
                parameter.uniform_(0.5, 1.5, generator=generator)


class Pair:
    """A VisualChat model, and the stock causal model with the same weights."""

    def __init__(self, monkeypatch, config, dtype=torch.float32):
        monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: copy.deepcopy(config))
        self.model = make_model(**PAPER)
        stock = copy.deepcopy(config)
        stock._attn_implementation = "literal"
        self.stock = AutoModelForCausalLM.from_config(stock).eval()
        self.tied = config.get_text_config().tie_word_embeddings
        self.model.to(dtype)
        self.stock.to(dtype)
        self.copy_weights("one", 0)

    def copy_weights(self, norms, seed):
        randomise(self.model.model.language_model, norms, seed)
        if not self.tied:
            randomise(self.model.lm_head, norms, seed)
        state = self.model.model.language_model.state_dict()
        shapes = {name: tensor.shape for name, tensor in self.stock.base_model.state_dict().items()}
        state = {name: tensor for name, tensor in state.items() if name in shapes}
        self.stock.base_model.load_state_dict(state, strict=False)
        head = self.stock.get_output_embeddings()
        with torch.no_grad():
            rows = self.model.lm_head.weight.shape[0]  # Moshi has one more row in its table
            head.weight[:rows].copy_(self.model.lm_head.weight)
            if head.bias is not None:
                head.bias.zero_()

    @torch.no_grad()
    def expected(self, ids, images, start=0):
        features = torch.cat(list(self.model.get_image_features(images).pooler_output))
        is_image = ids == IMAGE_TOKEN_ID
        embeds = self.stock.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
        Literal.is_image, Literal.calls = is_image, 0
        positions = torch.arange(start, start + ids.shape[1])[None]
        output = self.stock(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
        assert Literal.calls >= 2, "the stock model did not use the literal attention"
        return output

    @torch.no_grad()
    def actual(self, ids, images, route, start=0, **kwargs):
        self.model.set_route(route)
        positions = torch.arange(start, start + ids.shape[1])[None]
        images = {"pixel_values": images} if "image_states" not in kwargs else {}
        return self.model(ids, position_ids=positions, use_cache=False, **images, **kwargs).logits


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def make_pair(monkeypatch, model_type, dtype=torch.float32, **changes):
    return Pair(monkeypatch, tiny_config(model_type, **changes), dtype)


IDS, IMAGES = tokens(2, "I", 3, "I", 1, "I", 4), pixels(0, 1, 0)  # the first one is repeated


def check(pair, tolerance=1e-4):
    for start in (0, 2100):
        expected = pair.expected(IDS, IMAGES, start)
        for route in ("auto", "masked"):
            found = error(pair.actual(IDS, IMAGES, route, start), expected)
            assert found < tolerance, f"{route} from position {start}: off by {found:.1e}"
        pair.model.set_route("auto")
        memory = ImageMemory()
        try:
            memory.get_states(pair.model, IMAGES[:1])
        except ValueError as refused:
            assert "apart from a conversation" in str(refused)
            continue
        states = memory.get_states(pair.model, IMAGES)
        found = error(pair.actual(IDS, None, "auto", start, image_states=states), expected)
        assert found < tolerance, f"memory from position {start}: off by {found:.1e}"


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("model_type", accepted())
def test_a_decoder_gives_the_logits_of_the_stock_model_with_a_literal_attention(monkeypatch, model_type, tied):
    """With norms of one, once more after they have changed behind a first forward pass, and with a variant of MMCA."""
    if tied and model_type in NOT_TIED:
        return
    pair = make_pair(monkeypatch, model_type, tie_word_embeddings=tied)
    check(pair)
    pair.copy_weights("random", 1)
    check(pair)
    if not tied:
        pair.model.config.merge, pair.model.config.image_attention = "joint", "image"
        pair.model.config.image_scope = "half"
        monkeypatch.setattr(Literal, "is_plain", False)
        check(pair)


@pytest.mark.parametrize("model_type", accepted())
def test_a_decoder_in_bfloat16_is_as_near_as_the_stock_model(monkeypatch, model_type):
    """The error against float32 is at most a few times that of the stock model in bfloat16, image by image."""
    pair = make_pair(monkeypatch, model_type, tie_word_embeddings=False)
    pair.copy_weights("random", 1)
    for start in (0, 2100):
        pair.model.float(), pair.stock.float()
        exact = pair.expected(IDS, IMAGES, start)
        pair.model.bfloat16(), pair.stock.bfloat16()
        allowed = 3 * error(pair.expected(IDS, IMAGES, start), exact) + 0.02
        for route in ("auto", "masked"):
            found = error(pair.actual(IDS, IMAGES, route, start), exact)
            assert found < allowed, f"{route} from position {start}: off by {found:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("model_type", accepted())
def test_a_decoder_continues_a_kept_cache_as_the_stock_model_computes_anew(monkeypatch, model_type):
    pair, cache = make_pair(monkeypatch, model_type, tie_word_embeddings=False), ConversationCache()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    ids, images = tokens(2, "I", 3), pixels(0)
    for turn in range(2):
        output = pair.model.generate(ids, pixel_values=images, past_key_values=cache, output_logits=True, **options)
        for step, logits in enumerate(output.logits):
            expected = pair.expected(output.sequences[:, : ids.shape[1] + step], images)[:, -1]
            assert error(logits, expected) < 1e-4, f"turn {turn}, step {step}"
        ids = torch.cat([output.sequences, tokens(2, "I", 2, seed=turn)], dim=1)
        images = torch.cat([images, pixels(0)])


YARN = {
    "rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_olmo3_as_published_reads_a_repeated_image_far_into_the_row(monkeypatch, dtype):
    """YaRN in the layers of full attention, and none in those with a window."""
    parameters = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}}
    config = tiny_config("olmo3", rope_parameters=parameters, max_position_embeddings=65536)
    pair = Pair(monkeypatch, config)
    pair.copy_weights("random", 1)
    for start in (0, 3000, 20000, 60000):
        pair.model.float(), pair.stock.float()
        exact = pair.expected(IDS, IMAGES, start)
        pair.model.to(dtype), pair.stock.to(dtype)
        allowed = 1e-4 if dtype == torch.float32 else 3 * error(pair.expected(IDS, IMAGES, start), exact) + 0.02
        for route in ("auto", "masked"):
            assert error(pair.actual(IDS, IMAGES, route, start), exact) < allowed, f"{route} from {start}"


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_keys_normalised_after_their_rotation_are_not_rotated_late(monkeypatch, model_type):
    """Norms of one at the first forward pass tell nothing of the norms later."""
    pair = make_pair(monkeypatch, model_type)
    check(pair)
    pair.copy_weights("random", 1)
    check(pair)
    assert pair.model.model.probe.no_late_rotation is not None


def test_the_literal_attention_is_not_that_of_another_pattern(monkeypatch):
    """The control: with the image tokens told wrongly the comparison fails."""
    pair = make_pair(monkeypatch, "llama")
    expected = pair.expected(IDS, IMAGES)
    swapped = IDS.clone()
    swapped[:, 2 : 2 + IMAGE_SEQ_LENGTH] = 5
    assert error(pair.actual(IDS, pixels(0, 1, 2), "auto"), expected) > 1e-2
    assert error(pair.actual(IDS, IMAGES, "auto", 0), expected) < 1e-4
