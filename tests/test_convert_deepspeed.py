"""`convert_deepspeed_visualchat.py`: the logits of the original on the same tensors, the report, memory, bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import convert_deepspeed_visualchat as script
import pytest
import torch
from conftest import SHAPE, draw_picture, pixels
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from configuration_visualchat import VisualChatQwenVisionConfig
from modeling_visualchat import VisualChatForConditionalGeneration, VisualChatQwenVisionModel
from processing_visualchat import VisualChatProcessor


SCRIPT = Path(__file__).parent.parent / "examples" / "convert_deepspeed_visualchat.py"

WIDTH = SHAPE["hidden_size"]
NUM_TOKENS = 259  # of the tokenizer; the original adds three
IMAGE_TOKEN_ID = 260
RANK = 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special tokens of Llama: without padding and without `<image>`."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


class ViT(nn.Module):
    """A layer as in the tower over all tokens, then linear and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.vis_layer = CLIPEncoderLayer(config)
        self.projection = nn.Sequential(nn.Linear(24, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12))

    def forward(self, features):
        return self.projection(self.vis_layer(features, None))


class Perceiver(nn.Module):
    """Queries that read the patches, of the width of the language model; here on a grid of 2 by 2, there 16 by 16."""

    def __init__(self):
        super().__init__()
        self.query, self.pos_embed = nn.Parameter(torch.zeros(4, WIDTH)), nn.Parameter(torch.zeros(4, WIDTH))
        self.kv_proj = nn.Linear(24, WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 1)
        self.ln_q, self.ln_kv = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)
        self.projection = nn.Sequential(nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, WIDTH))

    def forward(self, features):
        values = self.ln_kv(self.kv_proj(features[:, 1:])).transpose(0, 1)
        queries = (self.ln_q(self.query) + self.pos_embed)[:, None].repeat(1, len(features), 1)
        output = self.attn(queries, values + self.pos_embed[:, None], values)[0]
        return self.projection(output.transpose(0, 1))


class Original:
    """The original on the modules of transformers: two towers, a projector, and the trained table of embeddings."""

    def __init__(self, vision: PreTrainedModel, text: LlamaForCausalLM, projection: nn.Module):
        self.vision, self.text, self.projection = vision, text, projection
        self.text.resize_token_embeddings(NUM_TOKENS + 3, mean_resizing=False)
        self.lang_embed = randomize(nn.Embedding(NUM_TOKENS + 3, WIDTH))

    def state_dict(self) -> dict[str, torch.Tensor]:
        is_clip = isinstance(self.vision, CLIPVisionModel)
        prefixes = {
            "vis_encoder.vision_model." if is_clip else "vis_encoder.": self.vision,
            "lang_decoder.": self.text,
            "lang_embed.": self.lang_embed,
            "projection.": self.projection,
        }
        state_dict = {"vis_encoder.vision_model.embeddings.position_ids": torch.arange(5)[None]} if is_clip else {}
        for prefix, module in prefixes.items():
            state_dict |= {prefix + name: weight.clone() for name, weight in module.state_dict().items()}
        return state_dict

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, pixel_values: torch.Tensor, attention: str) -> torch.Tensor:
        """One row; its images in the order of the text, and the future is not leaked."""
        is_image = ids[0] == IMAGE_TOKEN_ID
        embeds = self.lang_embed(ids)
        features = self.projection(self.vision(pixel_values).last_hidden_state)
        embeds[0, is_image] = features.flatten(0, 1)
        AttentionInterface.register("original", make_attention(is_image))
        self.text.set_attn_implementation(attention)
        return self.text(inputs_embeds=embeds).logits


def make_attention(is_image: torch.Tensor):
    """Its attention: two masks are added to the scores, and the weights of both softmaxes are summed."""

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        length, low = len(is_image), torch.finfo(query.dtype).min
        to_image = torch.where(is_image, 0.0, low).repeat(length, 1)
        to_image[is_image] = low
        to_image[is_image, is_image.nonzero()[:, 0]] = 0.0
        to_text = torch.where(is_image, low, 0.0).repeat(length, 1)
        causal = torch.full((length, length), low).triu(1)
        scores = query @ key.transpose(2, 3) * scaling
        image_weights = (scores + to_image + causal).softmax(dim=-1)
        image_weights[:, :, : is_image.long().argmax()] = 0.0  # the leak
        weights = image_weights + (scores + to_text + causal).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), None

    return attention


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folders of a tiny CLIP, a tiny tower of Qwen-VL and a tiny Llama, with their processors."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
    )
    qwen = VisualChatQwenVisionConfig(
        hidden_size=24, embed_dim=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=2, position_grid_size=4, query_grid_size=2, resampler_head_dim=8,
    )  # fmt: skip
    size = {"height": 8, "width": 8}
    for name, tower in (("clip", CLIPVisionModel(clip)), ("qwen", VisualChatQwenVisionModel(qwen))):
        randomize(tower).save_pretrained(folder / name)
        CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / name)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    randomize(LlamaForCausalLM(LlamaConfig(**SHAPE | special))).save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    return folder


def make_original(parts, projector="baseline", vision="clip") -> Original:
    torch.manual_seed(1)
    tower = AutoModel.from_pretrained(parts / vision)
    projections = {
        "baseline": lambda: nn.Sequential(nn.Linear(24, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)),
        "vit": lambda: ViT(tower.config),
        "perceiver": Perceiver,
    }
    text = LlamaForCausalLM.from_pretrained(parts / "llama")
    return Original(tower, text, randomize(projections[projector]()))


@pytest.fixture
def original(parts):
    return make_original(parts)


def add_lora(original: Original) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adds LoRA to the linear layers of both towers; returns the pairs, and the state dict before they are merged."""
    before = original.state_dict()
    pairs = {}
    towers = {
        "lang_decoder.": (original.text, "model.layers."),
        "vis_encoder.vision_model.": (original.vision, "encoder.layers."),
    }
    for prefix, (tower, scope) in towers.items():
        for name, module in tower.named_modules():
            if isinstance(module, nn.Linear) and scope in name:
                right, left = 0.3 * torch.randn(module.in_features, RANK), 0.3 * torch.randn(RANK, module.out_features)
                pairs |= {f"{prefix}{name}.lora_right_weight": right, f"{prefix}{name}.lora_left_weight": left}
                module.weight.data += (left.T @ right.T) * (1 / RANK)
    return pairs, before


def run(monkeypatch, parts, old, new, *flags, vision="clip"):
    arguments = [old, new, "--vision", parts / vision, "--text", parts / "llama", *flags]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    script.main()
    return json.loads((new / "conversion_report.json").read_text())


def assert_same_logits(folder, original, attention="original"):
    """Of text, an image, text, two images, and text."""
    model = VisualChatForConditionalGeneration.from_pretrained(folder).eval()
    text = torch.randint(3, NUM_TOKENS, (1, 12), generator=torch.Generator().manual_seed(3))
    image = torch.full((1, model.config.image_seq_length), IMAGE_TOKEN_ID)
    ids, pixel_values = (
        torch.cat([text[:, :3], image, text[:, 3:7], image, image, text[:, 7:]], dim=1),
        pixels(0, 1, 2),
    )
    with torch.no_grad():
        logits = model(ids, pixel_values).logits
    torch.testing.assert_close(logits, original.logits(ids, pixel_values, attention), atol=1e-5, rtol=0)


def test_the_script_converts_and_tells_what_became_of_every_key(parts, original, tmp_path):
    old = original.state_dict()
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    command = [sys.executable, SCRIPT, tmp_path / "old", tmp_path / "new", "--vision", parts / "clip"]
    completed = subprocess.run(
        [*command, "--text", parts / "llama", "--max_shard_gb", "2e-5", "--system_instruction", "Be \"kind\"."],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert "in reverse order" in completed.stdout and "lang_decoder.model.embed_tokens.weight" in completed.stdout
    assert_same_logits(tmp_path / "new", original)
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 3

    report = json.loads((tmp_path / "new" / "conversion_report.json").read_text())
    told = [key for group in ("taken", "merged", "left_out") for key in report[group]]
    assert sorted(told) == sorted(old)
    assert not report["merged"] and not report["missing"]
    assert sorted(report["left_out"]) == [
        "lang_decoder.model.embed_tokens.weight", "vis_encoder.vision_model.embeddings.position_ids",
    ]  # fmt: skip

    processor = VisualChatProcessor.from_pretrained(tmp_path / "new")
    model = VisualChatForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert (model.config.image_attention, model.config.image_token_id) == ("self_and_text", IMAGE_TOKEN_ID)
    assert model.generation_config.eos_token_id == 2
    model.save_pretrained(tmp_path / "again")  # writes the same configuration and the same code
    for path in [path for path in (tmp_path / "again").iterdir() if path.suffix in (".py", ".json")]:
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes(), path.name
    picture = {"type": "image", "image": draw_picture(0)}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "And?"}]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        '<s>Be "kind".\n\n### Image 1:\n<image>\n\n### Question:\nWhat?\n\n### Answer:\nA cat.</s>'
        "<s>### Image 2:\n<image>\n### Image 3:\n<image>\n\n### Question:\nAnd?\n\n### Answer:\n"
    )
    inputs = processor.apply_chat_template(messages[:2], return_labels=True, tokenize=True, return_dict=True)
    assert processor.decode([token for token in inputs["labels"][0] if token != -100]) == "A cat.</s>"
    assert inputs["input_ids"][0].count(1) == 1


@pytest.mark.parametrize("form", ["fused", "apart"])
def test_lora_pairs_are_merged_once(parts, original, tmp_path, monkeypatch, form):
    pairs, before = add_lora(original)
    weights = original.state_dict() if form == "fused" else before
    torch.save(weights | pairs, tmp_path / "old.bin")
    report = run(monkeypatch, parts, tmp_path / "old.bin", tmp_path / "new")
    assert_same_logits(tmp_path / "new", original)
    assert sorted(report["merged"]) == (sorted(pairs) if form == "apart" else [])
    assert (report["left_out"].keys() >= pairs.keys()) == (form == "fused")
    assert sorted(key for group in ("taken", "merged", "left_out") for key in report[group]) == sorted(weights | pairs)


@pytest.mark.parametrize(
    "projector, vision",
    [("vit", "clip"), ("perceiver", "clip"), ("baseline", "qwen")],
    ids=["vit", "perceiver", "qwen"],
)
def test_every_projector_and_tower_is_carried_over(parts, tmp_path, monkeypatch, projector, vision):
    original = make_original(parts, projector, vision)
    old = original.state_dict()
    torch.save(old, tmp_path / "old.bin")
    report = run(monkeypatch, parts, tmp_path / "old.bin", tmp_path / "new", vision=vision)
    assert_same_logits(tmp_path / "new", original)
    assert sorted([*report["taken"], *report["left_out"]]) == sorted(old)


def test_a_vit_projector_of_another_shape_is_refused(parts, tmp_path, monkeypatch, capsys):
    torch.save(make_original(parts, "vit").state_dict(), tmp_path / "old.bin")
    shutil.copytree(parts, tmp_path / "parts")
    config = CLIPVisionConfig.from_pretrained(parts / "clip", num_attention_heads=2)
    config.save_pretrained(tmp_path / "parts" / "clip")
    message = "'vit' projector of OLD cannot be carried over exactly.*num_attention_heads=2"
    assert_refused(monkeypatch, tmp_path / "parts", tmp_path, capsys, tmp_path / "old.bin", message)


def test_a_perceiver_on_a_tower_that_resamples_is_refused(parts, tmp_path, monkeypatch, capsys):
    torch.save(make_original(parts, "perceiver").state_dict(), tmp_path / "old.bin")
    shutil.copytree(parts / "qwen", tmp_path / "parts" / "clip")
    shutil.copytree(parts / "llama", tmp_path / "parts" / "llama")
    message = "'visualchat_qwen_vision' resamples its last layer, so vision_feature_layer must be -1"
    assert_refused(monkeypatch, tmp_path / "parts", tmp_path, capsys, tmp_path / "old.bin", message)


def test_a_checkpoint_without_mmca_keeps_the_attention_of_its_decoder(parts, original, tmp_path, monkeypatch):
    torch.save(original.state_dict(), tmp_path / "old.bin")
    run(monkeypatch, parts, tmp_path / "old.bin", tmp_path / "new", "--attention_type", "causal")
    assert_same_logits(tmp_path / "new", original, attention="eager")


def save_as_published(model: nn.Module, folder: Path, prefix: str) -> None:
    """Weights in two `.bin` files with an index, under the names of a larger model."""
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    names = list(weights)
    weight_map = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file_name in set(weight_map.values()):
        shard = {name: weights[name] for name in names if weight_map[name] == file_name}
        torch.save(shard, folder / file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("form", ["saved", "published"])
def test_weights_that_are_missing_come_from_the_parts(parts, original, tmp_path, monkeypatch, form):
    old = original.state_dict()
    kept = {key: value for key, value in old.items() if not re.match(r"vis_encoder|lang_decoder\.model", key)}
    torch.save(kept, tmp_path / "old.bin")
    shutil.copytree(parts, tmp_path / "parts")
    if form == "published":
        save_as_published(original.vision, tmp_path / "parts" / "clip", "vision_model.")
    report = run(monkeypatch, tmp_path / "parts", tmp_path / "old.bin", tmp_path / "new")
    assert_same_logits(tmp_path / "new", original)
    assert set(report["missing"].values()) == {str(tmp_path / "parts" / name) for name in ("clip", "llama")}
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert len(report["missing"]) + len(report["taken"]) == len(file.keys())


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes that operations allocate and that are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            if storage.data_ptr() not in [each.untyped_storage().data_ptr() for each in given]:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, num_bytes):
        self.now -= num_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_at_a_time_is_in_memory(parts, original, tmp_path, monkeypatch, dtype):
    pairs, before = add_lora(original)
    old = before | pairs
    torch.save(old, tmp_path / "old.bin")
    allocated = AllocatedBytes()

    def counted(function):
        def call(*args):
            with allocated:
                return function(*args)

        return call

    for name in ("write_weights", "are_fused"):
        monkeypatch.setattr(script, name, counted(getattr(script, name)))
    monkeypatch.setattr(script, "BLOCK_SIZE", 64)
    run(monkeypatch, parts, tmp_path / "old.bin", tmp_path / "new", "--dtype", dtype)
    num_bytes = [tensor.numel() * getattr(torch, dtype).itemsize for tensor in before.values()]
    assert 0 < allocated.peak <= max(num_bytes) < sum(num_bytes) / 5
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(old, *names):
    return {key: value for key, value in old.items() if key not in names}


TRANSPOSED = {"lang_decoder.model.layers.1.mlp.up_proj.weight": torch.zeros(32, 48)}
HALF_A_PAIR = {"lang_decoder.model.layers.0.mlp.up_proj.lora_left_weight": torch.zeros(4, 48)}
NARROW_PAIR = HALF_A_PAIR | {"lang_decoder.model.layers.0.mlp.up_proj.lora_right_weight": torch.zeros(31, 4)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda old: old | {"extra": Malicious()}, "holds more than tensors, and could run code"),
        (lambda old: {"module": old}, r"holds the keys \['module'\], wanted is a dictionary of tensors"),
        (lambda old: {"model.embed_tokens.weight": torch.zeros(2, 2)}, "no projector of the original"),
        (lambda old: without(old, "lang_embed.weight"), "OLD has no lang_embed.weight"),
        (lambda old: old | {"lang_embed.weight": torch.zeros(259, 32)}, "259 rows, and the tokenizer.* 262 tokens"),
        (lambda old: old | {"projection.0.weight": torch.zeros(32, 48)}, "width of 24, and the projector.* reads 48"),
        (lambda old: old | TRANSPOSED, r"layers.1.mlp.up_proj.weight has shape \(32, 48\), expected \(48, 32\)"),
        (lambda old: old | {"pos_embedding.weight": torch.zeros(3, 2)}, r"pos_embedding.weight of shape \(3, 2\)"),
        (lambda old: without(old, "projection.1.bias"), "projection.1.bias is missing"),
        (lambda old: without(old, "lang_decoder.lm_head.weight"), r"lm_head.* shape \(259, 32\), expected \(262"),
        (lambda old: old | HALF_A_PAIR, r"up_proj.lora_right_weight and .* \[\(\), \(4, 48\)\]"),
        (lambda old: old | NARROW_PAIR, r"\(31, 4\), \(4, 48\)\], expected \(32, rank\) and \(rank, 48\)"),
    ],
    ids=[
        "code", "nested", "another model", "no embeddings", "vocabulary", "tower width", "shape", "unknown key",
        "missing", "lost head", "half a LoRA pair", "LoRA shape",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(
    parts, original, tmp_path, monkeypatch, capsys, change, message
):
    torch.save(change(original.state_dict()), tmp_path / "old.bin")
    assert_refused(monkeypatch, parts, tmp_path, capsys, tmp_path / "old.bin", message)
    assert not os.path.exists("ran")


def assert_refused(monkeypatch, parts, tmp_path, capsys, old, message, *flags):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, parts, old, tmp_path / "new", *flags)
    assert exit_info.value.code == 1
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_no_checkpoint_are_refused(parts, original, tmp_path, monkeypatch, capsys):
    assert_refused(monkeypatch, parts, tmp_path, capsys, tmp_path, "There is no file .*pytorch_model.bin")
    torch.save(original.state_dict(), tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    assert_refused(monkeypatch, parts, tmp_path, capsys, tmp_path / "legacy.bin", "not in the zip format")
    torch.save(original.state_dict(), tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:5000])
    assert_refused(monkeypatch, parts, tmp_path, capsys, tmp_path / "cut.bin", "is incomplete, or not in the zip")
    (tmp_path / "new").mkdir()
    assert_refused(
        monkeypatch, parts, tmp_path, capsys, tmp_path / "cut.bin", "new exists; name a folder that does not"
    )


def test_nothing_is_left_of_an_interrupted_conversion(parts, original, tmp_path, monkeypatch):
    torch.save(original.state_dict(), tmp_path / "old.bin")

    def interrupted(folder, weights, *args):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, parts, tmp_path / "old.bin", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old.bin"]
