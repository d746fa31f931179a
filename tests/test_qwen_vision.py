"""The Qwen-VL vision tower: the published mathematics, its size, its extraction, and a VisualChat model with it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import draw_picture, make_config, make_model, make_tokenizer
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from test_finetune import EXAMPLES
from test_remote_code import HIDE_PACKAGES
from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessor

from configuration_visualchat import VisualChatQwenVisionConfig
from modeling_visualchat import ImageMemory, VisualChatForConditionalGeneration, VisualChatQwenVisionModel
from modeling_visualchat.parts_visualchat import load_vision_tower, vision_sequence_length
from processing_visualchat import VisualChatProcessor


SMALL = {
    "hidden_size": 32,
    "embed_dim": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
    "position_grid_size": 4,
    "query_grid_size": 2,
    "resampler_head_dim": 8,
}


def make_tower(**kwargs):
    """A random tower in which every weight matters, biases and norms included."""
    torch.manual_seed(0)
    tower = VisualChatQwenVisionModel(VisualChatQwenVisionConfig(**{**SMALL, **kwargs})).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.3)
    return tower


def images(height, width, number=2):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


# The published mathematics, one head, one row and one number at a time.


def norm_reference(states, weights, name, eps):
    centred = states - states.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear_reference(states, weights, name):
    return states @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def attention_reference(query, key, value):
    return (query @ key.T / math.sqrt(query.shape[1])).softmax(dim=-1) @ value


def bicubic_reference(size, new_size):
    """The matrix (new_size, size) of one axis: four neighbours, a = -0.75, pixels counted from their centres."""
    matrix = torch.zeros(new_size, size)
    for target in range(new_size):
        place = (target + 0.5) * size / new_size - 0.5
        for neighbour in range(math.floor(place) - 1, math.floor(place) + 3):
            x, a = abs(place - neighbour), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[target, min(max(neighbour, 0), size - 1)] += near if x <= 1 else far
    return matrix


def interpolate_reference(positions, grid):
    size = math.isqrt(len(positions))
    square = positions.view(size, size, -1)
    rows, columns = (bicubic_reference(size, new_size) for new_size in grid)
    return torch.einsum("yr,xc,rcd->yxd", rows, columns, square).flatten(0, 1)


def sine_cosine_reference(grid_size, width):
    positions = torch.zeros(grid_size**2, width)
    quarter = width // 4
    for row in range(grid_size):
        for column in range(grid_size):
            for offset, place in ((0, column), (2 * quarter, row)):
                for i in range(quarter):
                    angle = place / 10000 ** (i / quarter)
                    positions[row * grid_size + column, offset + i] = math.sin(angle)
                    positions[row * grid_size + column, offset + quarter + i] = math.cos(angle)
    return positions


def resampler_reference(patches, weights, num_heads, grid, eps):
    """The patches (length, width) of one image; the first ones, more than the grid holds, have no position."""
    queries = norm_reference(weights["query"], weights, "ln_q", eps)
    values = norm_reference(linear_reference(patches, weights, "kv_proj"), weights, "ln_kv", eps)
    positions = sine_cosine_reference(math.isqrt(len(queries)), queries.shape[1])
    keys = values.clone()
    keys[len(values) - grid[0] * grid[1] :] += interpolate_reference(positions, grid)
    inputs = (queries + positions, keys, values)
    projections = zip(weights["attn.in_proj_weight"].chunk(3), weights["attn.in_proj_bias"].chunk(3))
    query, key, value = (states @ weight.T + bias for states, (weight, bias) in zip(inputs, projections))
    heads = zip(*(states.chunk(num_heads, dim=1) for states in (query, key, value)))
    output = torch.cat([attention_reference(*head) for head in heads], dim=1)
    return linear_reference(output, weights, "attn.out_proj")


def tower_reference(image, weights, config):
    """One image (channels, height, width) through the tower, with weights by Qwen-VL's names."""
    size, eps = config.patch_size, 1e-6
    grid = (image.shape[1] // size, image.shape[2] // size)
    filters = weights["conv1.weight"].flatten(1)
    states = torch.stack([
        filters @ image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten()
        for row in range(grid[0])
        for column in range(grid[1])
    ])  # fmt: skip
    states = states + interpolate_reference(weights["positional_embedding"], grid)
    states = norm_reference(states, weights, "ln_pre", eps)
    for layer in range(config.num_hidden_layers):
        prefix = f"transformer.resblocks.{layer}."
        block = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        fused = linear_reference(norm_reference(states, block, "ln_1", eps), block, "attn.in_proj")
        heads = [attention_reference(*head.chunk(3, dim=1)) for head in fused.chunk(config.num_attention_heads, dim=1)]
        states = states + linear_reference(torch.cat(heads, dim=1), block, "attn.out_proj")
        inner = linear_reference(norm_reference(states, block, "ln_2", eps), block, "mlp.c_fc")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        states = states + linear_reference(inner, block, "mlp.c_proj")
    resampler = {name.removeprefix("attn_pool."): weight for name, weight in weights.items() if "attn_pool." in name}
    pooled = resampler_reference(states, resampler, config.hidden_size // config.resampler_head_dim, grid, eps)
    return norm_reference(pooled, weights, "ln_post", eps)


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (20, 44)], ids=["trained", "without interpolation", "rectangle"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_tower_computes_the_published_mathematics(size, kernel):
    tower = make_tower()
    tower.set_attn_implementation(kernel)
    with torch.no_grad():
        output = tower(images(*size), output_hidden_states=True)
        expected = [tower_reference(image, tower.state_dict(), tower.config) for image in images(*size)]
    torch.testing.assert_close(output.last_hidden_state, torch.stack(expected), rtol=0, atol=1e-5)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    num_patches = size[0] * size[1] // 16
    assert [tuple(states.shape) for states in output.hidden_states] == 2 * [(2, num_patches, 24)] + [(2, 4, 32)]


@pytest.mark.parametrize("size", [(448, 448), (224, 448)], ids=["448", "half"])
def test_a_narrow_tower_of_the_published_grids_computes_the_same(size):
    """448 pixels in patches of 14, positions and queries of 16 by 16."""
    tower = make_tower(image_size=448, patch_size=14, position_grid_size=16, query_grid_size=16)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.3)  # a patch has 588 numbers
        output = tower(images(*size, number=1)).last_hidden_state[0]
        expected = tower_reference(images(*size, number=1)[0], tower.state_dict(), tower.config)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_the_real_tower_has_its_parameters():
    width, mlp, output = 1664, 8192, 4096
    attention = 3 * width * width + 3 * width + width * width + width
    layer = 2 * width + attention + 2 * width + width * mlp + mlp + mlp * width + width
    encoder = 3 * 14 * 14 * width + 16 * 16 * width + 2 * width + 48 * layer
    resampler = 256 * output + width * output + 4 * (output * output + output) + 2 * 2 * output
    with torch.device("meta"):
        tower = AutoModel.from_config(VisualChatQwenVisionConfig())
        assert tower(torch.zeros(1, 3, 448, 448)).last_hidden_state.shape == (1, 256, 4096)
    assert tower.num_parameters() == encoder + resampler + 2 * output == 1_917_784_832
    assert tower.attn_pool.attn.num_heads == 32 and tower.attn_pool.pos_embed.shape == (256, 4096)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        tower = make_tower().train()
        if checkpointing:
            tower.gradient_checkpointing_enable()
        tower(images(32, 32)).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_new_weights_are_set(tmp_path):
    """From the configuration alone, and where a checkpoint lacks what is no weight of a layer."""
    tower = AutoModel.from_config(VisualChatQwenVisionConfig(**SMALL))
    weights = tower.state_dict()
    tower.save_pretrained(tmp_path)
    kept = {name: weight for name, weight in weights.items() if name not in ("attn_pool.query", "attn_pool.pos_embed")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"attn_pool.query", "attn_pool.pos_embed"}
    for model in (tower, loaded):
        assert 0.1 < model.positional_embedding.std() * 24**0.5 < 2 and 0.01 < model.attn_pool.query.std() < 0.03
        torch.testing.assert_close(model.attn_pool.pos_embed, sine_cosine_reference(2, 32))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="Images of 32 by 30 pixels do not divide into patches of 4 by 4: resize them"
    ):
        make_tower()(images(32, 30))
    for changed, message in (
        ({"num_attention_heads": 5}, "embed_dim must be a multiple of num_attention_heads, got 24 and 5"),
        ({"hidden_size": 36}, "hidden_size must be a multiple of resampler_head_dim, got 36 and 8"),
        ({"image_size": 30}, "image_size must be a multiple of patch_size, got 30 and 4"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            VisualChatQwenVisionConfig(**{**SMALL, **changed})


# In a VisualChat model.


def make_visualchat(**kwargs):
    """Four tokens an image of 32 by 32 pixels."""
    return make_model(vision_config=VisualChatQwenVisionConfig(**SMALL), **kwargs)


def conversation(*parts):
    """Ids of one row: a number is a text token, "I" an image."""
    return torch.tensor([[id for part in parts for id in ([2] * 4 if part == "I" else [part])]])


@pytest.mark.parametrize("kwargs", [{}, {"projector_type": "mlp", "vision_feature_layer": 2}], ids=str)
def test_a_model_reads_the_resampled_tokens(tmp_path, kwargs):
    model = make_visualchat(**kwargs)
    assert model.config.image_seq_length == 4
    pixel_values, ids = images(32, 32), conversation(7, "I", 8, "I", 9)
    with torch.no_grad():
        output = model(ids, pixel_values)
        tokens = model.model.vision_tower(pixel_values).last_hidden_state
        expected = model.model.multi_modal_projector(tokens)
        features = torch.stack(model.get_image_features(pixel_values).pooler_output)
        torch.testing.assert_close(features, expected)
        assert not torch.allclose(model(ids, pixel_values.flip(0)).logits, output.logits, atol=1e-3)
        # Another size of image gives as many tokens.
        assert model(ids, images(32, 16)).logits.shape == output.logits.shape
        model.save_pretrained(tmp_path)
        loaded = VisualChatForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids, pixel_values).logits, output.logits)
    assert type(loaded.model.vision_tower) is VisualChatQwenVisionModel


@pytest.mark.parametrize(
    "kwargs", [{"vision_feature_layer": -2}, {"vision_feature_select_strategy": "default"}], ids=str
)
def test_only_the_resampled_output_is_read(kwargs):
    with pytest.raises(StrictDataclassError, match=r"vision_feature_layer must be -1 and .* 'full', got"):
        make_config(vision_config=VisualChatQwenVisionConfig(**SMALL), **kwargs)


@pytest.mark.parametrize("projector_type", ["vit", "perceiver"])
def test_projectors_of_patches_are_refused(projector_type):
    message = f"projector_type='{projector_type}' reads the patches .* resampled them to 4 tokens.* 'linear' or 'mlp'"
    with pytest.raises(ValueError, match=message):
        make_visualchat(projector_type=projector_type)


def test_an_image_memory_is_exact():
    model, memory = make_visualchat(), ImageMemory()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first, second = images(32, 32).split(1)
    for ids, pixel_values in (
        (conversation(7, "I", 8, "I", 9), torch.cat([first, second])),
        (conversation(5, 6, 7, "I", 8, "I", "I", 9), torch.cat([second, first, second])),
    ):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
        expected, actual = (model.generate(**batch, **options, **used) for used in ({}, {"image_memory": memory}))
        torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)
    assert (memory.hits, memory.misses) == (2, 2)


CLEAN_PROCESS = """
import json, torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
tower_folder, folder, picture = sys.argv[1:]
tower = AutoModel.from_pretrained(tower_folder, trust_remote_code=True).eval()
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(picture)], text="<image> What is it?", return_tensors="pt")
results = {"classes": [type(tower).__name__, type(model.model.vision_tower).__name__]}
results["tokens"] = tower(inputs["pixel_values"]).last_hidden_state.tolist()
results["logits"] = model(**inputs).logits.tolist()
model.save_pretrained(folder + " again")
AutoModelForImageTextToText.from_pretrained(folder + " again", trust_remote_code=True)
print(json.dumps(results))
"""


def test_remote_code_in_a_process_that_cannot_import_the_packages(tmp_path):
    """The tower by itself, and a model with it."""
    model, picture = make_visualchat(), draw_picture(0)
    tower = model.model.vision_tower
    size = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    processor = VisualChatProcessor(image_processor, make_tokenizer(), image_seq_length=4)
    tower.save_pretrained(tmp_path / "tower")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture.save(tmp_path / "picture.png")
    code = ["qwen_vision_configuration_visualchat.py", "qwen_vision_visualchat.py", "resampler_visualchat.py"]
    assert sorted(path.name for path in (tmp_path / "tower").glob("*.py")) == code
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [sys.executable, "-I", "-c", HIDE_PACKAGES + CLEAN_PROCESS, *(
            str(tmp_path / name) for name in ("tower", "model", "picture.png")
        )],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    results = json.loads(completed.stdout.splitlines()[-1])
    assert results["classes"] == 2 * ["VisualChatQwenVisionModel"]
    inputs = processor(images=[picture], text="<image> What is it?", return_tensors="pt")
    with torch.no_grad():
        tokens, logits = tower(inputs["pixel_values"]).last_hidden_state, model(**inputs).logits
    torch.testing.assert_close(torch.tensor(results["tokens"]), tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(results["logits"]), logits, rtol=1e-5, atol=1e-5)


# Out of a Qwen-VL checkpoint.


VISUAL = {
    "heads": 2, "image_size": 56, "image_start_id": 151857, "layers": 2, "mlp_ratio": 4.9231, "output_dim": 128,
    "patch_size": 14, "width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen_weights():
    """Weights of a small Qwen-VL by their real names, some of the language model and the tower's `proj` included."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "positional_embedding": (256, 16), "proj": (128, 128), "conv1.weight": (16, 3, 14, 14),
        "ln_pre.weight": (16,), "ln_pre.bias": (16,), "ln_post.weight": (128,), "ln_post.bias": (128,),
        "attn_pool.query": (256, 128), "attn_pool.kv_proj.weight": (128, 16),
        "attn_pool.attn.in_proj_weight": (384, 128), "attn_pool.attn.in_proj_bias": (384,),
        "attn_pool.attn.out_proj.weight": (128, 128), "attn_pool.attn.out_proj.bias": (128,),
        "attn_pool.ln_q.weight": (128,), "attn_pool.ln_q.bias": (128,),
        "attn_pool.ln_kv.weight": (128,), "attn_pool.ln_kv.bias": (128,),
    }  # fmt: skip
    for layer in range(2):
        block = {
            "ln_1.weight": (16,), "ln_1.bias": (16,), "ln_2.weight": (16,), "ln_2.bias": (16,),
            "attn.in_proj.weight": (48, 16), "attn.in_proj.bias": (48,),
            "attn.out_proj.weight": (16, 16), "attn.out_proj.bias": (16,),
            "mlp.c_fc.weight": (78, 16), "mlp.c_fc.bias": (78,),
            "mlp.c_proj.weight": (16, 78), "mlp.c_proj.bias": (16,),
        }  # fmt: skip
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    weights["attn_pool.pos_embed"] = sine_cosine_reference(16, 128).bfloat16()
    weights = {f"transformer.visual.{name}": weight for name, weight in weights.items()}
    return weights | {"transformer.wte.weight": torch.zeros(8, 4), "lm_head.weight": torch.zeros(8, 4)}


def write_checkpoint(folder, weights, suffix="safetensors", num_shards=3, index=True, visual=VISUAL):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": visual}))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = [f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}" for number in range(num_shards)]
    names = names if num_shards > 1 else [f"{stem}.{suffix}"]
    shards = {name: dict(list(weights.items())[number::num_shards]) for number, name in enumerate(names)}
    for name, shard in shards.items():
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name)
    if index:
        weight_map = {key: name for name, shard in shards.items() for key in shard}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import extract_qwen_vl_vision

    return extract_qwen_vl_vision


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_shards": 1, "index": False},
        {"suffix": "bin"},
        {"suffix": "bin", "index": False},
    ],
    ids=str,
)
def test_the_tower_is_taken_out_of_a_checkpoint(tmp_path, script, monkeypatch, capsys, qwen_weights, kwargs):
    checkpoint = write_checkpoint(tmp_path / "qwen", qwen_weights, **kwargs)
    monkeypatch.setattr(sys, "argv", ["extract_qwen_vl_vision.py", str(checkpoint), str(tmp_path / "new" / "tower")])
    script.main()
    assert "parameters in torch.bfloat16" in capsys.readouterr().out
    folder = str(tmp_path / "new" / "tower")
    tower, info = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, qwen_weights[f"transformer.visual.{name}"]), name
    assert len(tower.state_dict()) == len(qwen_weights) - 3  # without `proj` and the language model
    pixel_values = AutoImageProcessor.from_pretrained(folder)(draw_picture(0, (30, 50)), return_tensors="pt")
    tower = load_vision_tower(folder, torch.float32)
    with torch.no_grad():
        tokens = tower(**pixel_values).last_hidden_state
        weights = {name: weight.float() for name, weight in tower.state_dict().items()}
        expected = tower_reference(pixel_values["pixel_values"][0], weights, tower.config)
    # The checkpoint holds the sines and cosines rounded to bfloat16.
    torch.testing.assert_close(tokens[0], expected, rtol=0.05, atol=0.05)
    assert pixel_values["pixel_values"].shape == (1, 3, 56, 56) and vision_sequence_length(folder, tower.config) == 256


def test_a_checkpoint_without_the_shards_of_the_language_model_suffices(tmp_path, script, qwen_weights):
    checkpoint = write_checkpoint(tmp_path / "qwen", qwen_weights)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"lm_head.weight": "other.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert script.extract(checkpoint, tmp_path / "tower").num_parameters() > 0


def spoil(folder, weights, how):
    """Writes a checkpoint with one fault; returns its folder."""
    key = "transformer.visual.ln_post.weight"
    if how in ("missing shard", "missing shard without index"):
        write_checkpoint(folder, weights, index=how == "missing shard")
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif how == "no weights":
        write_checkpoint(folder, weights)
        for path in folder.glob("model*"):
            path.unlink()
    elif how == "another model":
        write_checkpoint(folder, {"model.embed_tokens.weight": torch.zeros(8, 4)})
    elif how == "another configuration":
        write_checkpoint(folder, weights, visual={"hidden_size": 16})
    elif how == "no configuration":
        folder.mkdir()
    elif how == "another size":
        write_checkpoint(folder, weights, visual={**VISUAL, "output_dim": 256})
    elif how == "sizes that do not divide":
        write_checkpoint(folder, weights, visual={**VISUAL, "heads": 3})
    elif how == "missing key":
        write_checkpoint(folder, {name: weight for name, weight in weights.items() if name != key})
    elif how == "additional key":
        write_checkpoint(folder, {**weights, f"{key}_2": torch.zeros(3)})
    elif how == "code":
        write_checkpoint(folder, {**weights, "function": print}, "bin")
    elif how.startswith("cut"):
        write_checkpoint(folder, weights, how.removeprefix("cut "))
        os.truncate(next(folder.glob("*00002-of-00003*")), 500)
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "lacks model-00002-of-00003.safetensors; download"),
        ("missing shard without index", "lacks model-00002-of-00003.safetensors; download"),
        ("no weights", r"holds no model\*.safetensors and no pytorch_model\*.bin"),
        ("another model", "lists no key below transformer.visual."),
        ("another configuration", 'no heads, .* in a section "visual", so this is no Qwen-VL checkpoint'),
        ("no configuration", "config.json does not exist; pass the folder of a Qwen-VL checkpoint"),
        ("another size", r"keys do not fit .*attn_pool.query: expected \(256, 256\), found \(256, 128\)"),
        (
            "sizes that do not divide",
            "describes no tower of Qwen-VL: .*\n.*embed_dim must be a multiple",
        ),
        ("missing key", r"1 keys do not fit .*visual.ln_post.weight: expected \(128,\), found no such key"),
        ("additional key", r"1 keys do not fit .*ln_post.weight_2: expected no such key, found \(3,\)"),
        ("code", "pytorch_model-0000.-of-00003.bin holds more than tensors, and could run code"),
        ("cut safetensors", "model-00002-of-00003.safetensors is incomplete or damaged; download it again"),
        ("cut bin", "pytorch_model-00002-of-00003.bin is incomplete, or not in the zip format"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path, script, qwen_weights, how, message):
    checkpoint = spoil(tmp_path / "qwen", qwen_weights, how)
    with pytest.raises(ValueError, match=message):
        script.extract(checkpoint, tmp_path / "tower")
    assert [path.name for path in tmp_path.iterdir()] == ["qwen"]


def test_an_existing_folder_is_not_written_to(tmp_path, script, monkeypatch, capsys, qwen_weights):
    checkpoint = write_checkpoint(tmp_path / "qwen", qwen_weights)
    monkeypatch.setattr(sys, "argv", ["extract_qwen_vl_vision.py", str(checkpoint), str(checkpoint)])
    with pytest.raises(SystemExit):
        script.main()
    assert "qwen exists; choose another folder" in capsys.readouterr().err
