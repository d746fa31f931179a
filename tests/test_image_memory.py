"""Images that are computed once: exact in any conversation, bounded, and never used where they would be wrong."""

import gc
import os
import resource
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, TEXT_CONFIGS, interrupt, make_model, pad_left, pixels, tokens
from peft import LoraConfig, get_peft_model
from test_finetune import environment
from transformers import LlamaConfig

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.image_states_visualchat import same_images
from modeling_visualchat.key_rotation_visualchat import KeyRotation
from modeling_visualchat.weights_key_visualchat import column_sums, image_key, weights_key


DECODERS = [name for name in TEXT_CONFIGS if name not in ("mistral", "qwen2", "gemma3")]  # without windows
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CONVERSATIONS = {
    "order": ([tokens(2, "I", 3, "I", 2)], pixels(1, 0)),
    "position": ([tokens(9, "I", 1, "I", 4, "I", 2)], pixels(2, 0, 1)),
    "repeated images": ([tokens(1, "I", 2, "I", 2, "I", 3)], pixels(0, 0, 0)),
    "image first": ([tokens("I", "I", 3)], pixels(2, 1)),
    "rows": ([tokens(3, "I", 2), tokens(1, "I", 4, "I", 3, seed=1), tokens(4, seed=2)], pixels(0, 1, 0)),
    "no image": ([tokens(5)], None),
}


def logits(model, rows, images, **kwargs):
    batch = pad_left(rows)
    passed = {} if images is None else {"pixel_values": images}
    output = model.generate(**batch, **passed, **OPTIONS, **kwargs)
    return torch.stack(output.logits, dim=1)


def counted(monkeypatch, model):
    """The numbers of images that go through the vision tower."""
    calls = []
    run = model.model._run_vision_tower
    monkeypatch.setattr(
        model.model, "_run_vision_tower", lambda images, **kwargs: calls.append(len(images)) or run(images, **kwargs)
    )
    return calls


def widths_of(model):
    """The numbers of tokens of a row in every pass through the decoder, a list that grows."""
    widths = []
    decode = model.model._decode
    model.model._decode = lambda embeds, *args, **kwargs: (
        widths.append(embeds.shape[1]) or decode(embeds, *args, **kwargs)
    )
    return widths


@pytest.mark.parametrize("where", ["memory", "disk", "too small for anything"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_with_a_memory_are_those_without(decoder, where, tmp_path):
    model = make_model(decoder)
    memory = {
        "memory": ImageMemory(),
        "disk": ImageMemory(max_bytes=0, folder=tmp_path),
        "too small for anything": ImageMemory(max_bytes=1),
    }[where]
    for rows, images in 2 * list(CONVERSATIONS.values()):
        expected = logits(model, rows, images)
        torch.testing.assert_close(logits(model, rows, images, image_memory=memory), expected, rtol=0, atol=1e-5)
    assert (memory.hits, memory.misses) == ((17, 3) if where != "too small for anything" else (0, 20))


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic", "longrope", "llama3"])
def test_scaled_rotary_embeddings_are_exact_too(monkeypatch, rope):
    options = {
        "linear": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "dynamic": {"factor": 2.0},
        "longrope": {
            "factor": 4.0, "original_max_position_embeddings": 20, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        },
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    }[rope]  # fmt: skip
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **options}
    make = TEXT_CONFIGS["llama"]
    length = 20 if rope == "dynamic" else 1024  # some of the conversations are longer, and some shorter
    changes = {"rope_parameters": parameters, "max_position_embeddings": length}
    monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: LlamaConfig(**{**make().to_dict(), **changes}))
    model, masked, memory = make_model(), make_model(), ImageMemory()
    masked.set_route("masked")
    for rows, images in 2 * list(CONVERSATIONS.values()):
        actual = logits(model, rows, images, image_memory=memory)
        torch.testing.assert_close(actual, logits(masked, rows, images), rtol=0, atol=1e-5)
    assert memory.hits == 17


def test_an_image_known_is_not_computed(monkeypatch):
    model, memory = make_model(), ImageMemory()
    calls = counted(monkeypatch, model)
    logits(model, [tokens(1, "I", 2, "I", 1)], pixels(0, 1), image_memory=memory)
    logits(model, [tokens(1, "I", 2, "I", 1, "I", 2)], pixels(1, 2, 0), image_memory=memory)
    assert calls == [2, 1] and repr(memory).startswith("ImageMemory(3 images")


def test_negative_controls_fail(monkeypatch):
    """Another image, keys that are not rotated, keys rotated twice: each is far outside of the tolerance."""
    model, memory = make_model(), ImageMemory()
    rows, images = CONVERSATIONS["position"]
    expected = logits(model, rows, images, image_memory=memory)

    def differs():
        return (logits(model, rows, images, image_memory=memory) - expected).abs().max() > 1e-2

    assert not differs()
    rotate = KeyRotation.rotate
    monkeypatch.setattr(KeyRotation, "rotate", lambda self, keys, *args: keys)
    assert differs()
    monkeypatch.setattr(
        KeyRotation, "rotate", lambda self, keys, *args: rotate(self, rotate(self, keys, *args), *args)
    )
    assert differs()
    monkeypatch.setattr(KeyRotation, "rotate", rotate)
    assert not differs()
    first, second = list(memory._entries)[:2]
    memory._entries[first], memory._entries[second] = memory._entries[second], memory._entries[first]
    assert differs()


def lora(model):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)).eval()
    return adapted, adapted.base_model.model


def test_what_an_image_depends_on_changes_the_key():
    model = make_model().model
    keys = [weights_key(model)]

    def changed():
        keys.append(weights_key(model))
        return len(set(keys)) == len(keys)

    for part in (model.vision_tower, model.multi_modal_projector, model.language_model.layers):
        parameter = max(part.parameters(), key=torch.numel)
        parameter.data[-1, -1] += 1e-3  # which no version counter sees
        assert changed()
        parameter.data = parameter.data.flip(0)
        assert changed()
    model.to(torch.bfloat16)
    assert changed()
    model.config.vision_feature_layer = -2
    assert changed()
    model.language_model.embed_tokens.weight.data += 1
    assert changed()


def test_adapters_switched_on_off_and_merged_miss():
    model, memory = make_model(), ImageMemory()
    rows, images = CONVERSATIONS["order"]
    adapted, inner = lora(model)
    with_adapter = logits(inner, rows, images, image_memory=memory)
    with adapted.disable_adapter():
        without = logits(inner, rows, images, image_memory=memory)
        torch.testing.assert_close(without, logits(make_model(), rows, images), rtol=0, atol=1e-5)
    assert memory.misses == 4 and (without - with_adapter).abs().max() > 1e-2
    torch.testing.assert_close(logits(inner, rows, images, image_memory=memory), with_adapter, rtol=0, atol=1e-5)
    assert memory.misses == 4
    adapted.merge_adapter()
    torch.testing.assert_close(logits(inner, rows, images, image_memory=memory), with_adapter, rtol=1e-3, atol=1e-3)
    assert memory.misses == 6


def test_autocast_hooks_and_other_forwards_are_seen():
    model, memory = make_model(), ImageMemory()
    rows, images = CONVERSATIONS["order"]
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, rows, images, image_memory=memory)
    plain = logits(model, rows, images, image_memory=memory)
    torch.testing.assert_close(plain, logits(make_model(), rows, images), rtol=0, atol=1e-5)
    assert memory.misses == 4
    projector = model.model.multi_modal_projector
    for strength in (1.0, 2.0):
        handle = projector.register_forward_hook(lambda module, args, output, strength=strength: output * strength)
        expected = logits(model, rows, images)
        with pytest.warns(UserWarning, match="memory is not used: multi_modal_projector has hooks"):
            actual = logits(model, rows, images, image_memory=memory)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        handle.remove()
    forward = projector.forward
    projector.forward = lambda features: forward(features) * 3
    with pytest.warns(UserWarning, match="or a forward of its own"):
        assert not torch.allclose(logits(model, rows, images, image_memory=memory), plain, atol=1e-2)
    assert len(memory) == 4


def test_the_checksum_sees_small_and_symmetric_changes():
    weight = torch.randn(4096, 64).to(torch.bfloat16)
    seen = {column_sums(weight)}
    for change in range(6):
        changed = weight.clone()
        match change:
            case 0:
                changed[[5, 1026]] = changed[[1026, 5]]
            case 1:
                changed[3, 3], changed[3 + 1021, 3] = -changed[3, 3], -changed[3 + 1021, 3]
            case 2:
                changed = -changed
            case 3:
                changed[-1, -1] += 0.1
            case 4:
                changed = changed.flip(1)
            case 5:
                changed = changed[:, :-1]
        seen.add(column_sums(changed))
    assert len(seen) == 7
    assert len({column_sums(torch.tensor(value)) for value in (0.0, 1.0, True)}) == 3


def test_images_given_with_embeddings_are_read_too():
    model, memory = make_model(), ImageMemory()
    ids, images = tokens(3, "I", 2, "I", 1), pixels(0, 1)
    embeds = model.get_input_embeddings()(ids)
    passed = {"inputs_embeds": embeds, "mm_token_type_ids": (ids == 2).long(), **OPTIONS}
    expected = model.generate(pixel_values=images, **passed).logits
    actual = model.generate(pixel_values=images, image_memory=memory, **passed).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="vision_feature_layer cannot be chosen for one call with an image memory"):
        model.generate(ids, pixel_values=images, vision_feature_layer=-2, image_memory=memory)
    with pytest.raises(ValueError, match="There are no images"):
        memory.get_states(model, images[:0])
    assert memory.get_states(model, images).index == [0, 1] and memory.hits == 2  # the whole model will do


def test_a_memory_is_refused_where_it_would_be_wrong():
    rows, images = CONVERSATIONS["order"]
    random = make_model()
    random.config.text_config.attention_dropout = 0.5
    for layer in random.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="With dropout an image is never the same twice"):
        logits(random.train(), rows, images, image_memory=ImageMemory())
    logits(random.eval(), rows, images, image_memory=ImageMemory())
    with pytest.raises(ValueError, match=r"Images can be computed apart .* only with multi-modal causal attention"):
        logits(make_model(attention_type="causal"), rows, images, image_memory=ImageMemory())
    eager = make_model()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"on the sdpa kernel, .* 'mmca_joint_eager'"):
        logits(eager, rows, images, image_memory=ImageMemory())
    with pytest.raises(ValueError, match="limits of ImageMemory are numbers of bytes"):
        ImageMemory(max_bytes=-1)


def test_a_thousand_images_stay_under_the_limit():
    """In what the memory counts, and in the tensors of the shapes of its entries that the process holds."""
    model = make_model().model
    one = ImageMemory()
    one.get_states(model, pixels(0))
    shapes = {tensor.shape for entry in one._entries.values() for tensor in entry.values()}
    memory = ImageMemory(max_bytes=10 * one.nbytes + 1)

    def bytes_held():
        gc.collect()
        held = [value for value in gc.get_objects() if type(value) is torch.Tensor and value.shape in shapes]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())

    before, held = bytes_held(), []
    for start in range(0, 1000, 20):
        memory.get_states(model, pixels(*range(start, start + 20)))
        assert memory.nbytes == 10 * one.nbytes and len(memory) == 10
        if start % 200 == 180:
            held.append(bytes_held() - before)
    assert held == [memory.nbytes] * 5
    memory.get_states(model, pixels(990))
    memory.get_states(model, pixels(0))
    memory.get_states(model, pixels(990))  # used lately, so still there
    assert (memory.hits, memory.misses) == (2, 1001)
    memory.clear()
    assert memory.nbytes == len(memory) == 0 and bytes_held() == before


def test_a_corrupt_file_is_a_miss_with_a_warning(tmp_path):
    model = make_model().model
    ImageMemory(folder=tmp_path).get_states(model, pixels(0))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for broken in (b"", whole[:40], whole[:-8], bytes(flipped), b"{" * len(whole)):
        path.write_bytes(broken)
        memory = ImageMemory(folder=tmp_path)
        with pytest.warns(UserWarning, match="The file .* cannot be used and is computed again"):
            memory.get_states(model, pixels(0))
        assert memory.misses == 1 and path.read_bytes() == whole
    other = image_key(pixels(1)[0])
    path.rename(tmp_path / f"{path.name[:40]}-{other}.safetensors")
    with pytest.warns(UserWarning, match="does not hold what was written under its name"):
        ImageMemory(folder=tmp_path).get_states(model, pixels(1))
    ImageMemory(folder=tmp_path).get_states(model, pixels(0))
    memory = ImageMemory(folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.get_states(model, pixels(0))
    assert memory.hits == 1


def test_the_folder_is_bounded_and_the_latest_stay(tmp_path):
    model = make_model().model
    ImageMemory(folder=tmp_path).get_states(model, pixels(0))
    size = next(tmp_path.iterdir()).stat().st_size
    memory = ImageMemory(max_bytes=0, folder=tmp_path, max_disk_bytes=3 * size)
    for seed in (1, 2, 0, 3):
        memory.get_states(model, pixels(seed))
    assert len(list(tmp_path.iterdir())) == 3 and memory.hits == 1
    for seed in (2, 0, 3):
        memory.get_states(model, pixels(seed))
    assert memory.hits == 4
    (tmp_path / "model.safetensors").write_bytes(b"not ours" * size)
    abandoned = next(tmp_path.glob("*-*.safetensors")).with_suffix(".77-88.part")
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    memory.get_states(model, pixels(9))
    assert (tmp_path / "model.safetensors").exists() and not abandoned.exists()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_disk_that_cannot_be_written_costs_no_answer(tmp_path):
    model = make_model().model
    memory = ImageMemory(folder=tmp_path / "memory")
    (tmp_path / "memory").rmdir()
    memory.get_states(model, pixels(0))
    assert len(list((tmp_path / "memory").iterdir())) == 1
    shutil.rmtree(tmp_path / "memory")
    (tmp_path / "memory").write_text("a file where the folder was")
    with pytest.warns(UserWarning, match="ImageMemory cannot write to"):
        states = memory.get_states(model, pixels(1))
    assert len(states.keys) == 2 and len(memory) == 2
    memory = ImageMemory(folder=tmp_path / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with pytest.warns(UserWarning, match="ImageMemory cannot write to"):
            memory.get_states(model, pixels(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list((tmp_path / "full").iterdir())


SHARER = """
import sys
from conftest import make_model, pixels
from modeling_visualchat import ImageMemory
model = make_model().model
for turn in range(3):
    for seed in range(12):
        memory = ImageMemory(max_bytes=0, folder=sys.argv[1])
        states = memory.get_states(model, pixels(seed))
        expected = model.compute_image_states(pixels(seed))
        assert all(abs(a[0] - b[0]).max() <= 1e-5 for a, b in zip(states.keys, expected.keys))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_processes_share_a_folder(tmp_path):
    (tmp_path / "sharer.py").write_text(SHARER)
    from test_remote_code import REPOSITORY

    folder, env = tmp_path / "memory", {**environment(), "PYTHONPATH": str(REPOSITORY / "tests")}
    command = [sys.executable, "-W", "error::UserWarning", str(tmp_path / "sharer.py"), str(folder)]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    assert len(list(folder.iterdir())) == 12


def test_equal_images_of_a_batch_are_computed_once_in_training_too(monkeypatch):
    batch = pad_left([tokens(1, "I", 2, "I", 3), tokens(2, "I", 4, seed=1)])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 2, -100)
    images, results = pixels(0, 1, 0), []
    assert same_images(images) == [0, 1, 0] and same_images(images + torch.arange(3)[:, None, None, None]) == [0, 1, 2]
    for merged in (True, False):
        if not merged:
            monkeypatch.setattr("modeling_visualchat.image_features_visualchat.same_images", lambda images: [0, 1, 2])
        model = make_model().train()
        calls = counted(monkeypatch, model)
        loss = model(**batch, pixel_values=images, labels=labels).loss
        loss.backward()
        results.append((loss, model.model.multi_modal_projector.linear.weight.grad))
        assert calls == ([2] if merged else [3])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    model = make_model().train()
    next(part for part in model.model.vision_tower.modules() if hasattr(part, "dropout")).dropout = 0.1
    monkeypatch.undo()
    calls = counted(monkeypatch, model)
    model(**batch, pixel_values=images)
    assert calls == [3]
    features = model.eval().get_image_features(images)
    assert features.last_hidden_state.shape[0] == len(features.pooler_output) == 3


def test_cached_turns_equal_uncached_ones(monkeypatch):
    """Rounds on one cache, with and without a memory, on unequal rows."""
    model, memory = make_model(), ImageMemory()
    calls = counted(monkeypatch, model)
    rounds = [
        ([tokens(3, "I", 2), tokens(4, "I", 3, seed=1)], pixels(0, 1)),
        ([tokens(2, "I", 1, "I", 2, seed=2), tokens(5, "I", 5, seed=3)], pixels(2, 0, 0)),
        ([tokens(8, seed=4), tokens(1, "I", 2, seed=5)], pixels(3)),
    ]
    rows, images = [torch.zeros(1, 0, dtype=torch.long)] * 2, [[], []]
    caches = {None: ConversationCache(), memory: ConversationCache()}
    for added, new in rounds:
        new = iter(new)
        for row, part in enumerate(added):
            rows[row] = torch.cat([rows[row], part], dim=1)
            images[row] += [next(new) for _ in range(int((part == 2).sum()) // IMAGE_SEQ_LENGTH)]
        batch = pad_left(rows)
        expected = logits(model, rows, torch.stack(images[0] + images[1]))
        for used, cache in caches.items():
            image_keys = [[image_key(image) for image in row] for row in images]
            cache.keep_shared(batch["input_ids"], image_keys, IMAGE_TOKEN_ID, batch["attention_mask"])
            actual = model.generate(
                **batch, pixel_values=torch.stack(images[0] + images[1]), past_key_values=cache, image_memory=used,
                **OPTIONS,
            )  # fmt: skip
            torch.testing.assert_close(torch.stack(actual.logits, dim=1), expected, rtol=0, atol=1e-5)
    assert calls == [2, 2, 2, 3, 2, 1, 4, 1, 1]  # of each round: uncached, cached, with a memory


@pytest.fixture
def conversation():
    """A cache that holds a conversation of three images, and how to go on with another one."""
    model, memory, cache = make_model(), ImageMemory(), ConversationCache()
    texts = widths_of(model)

    def ask(ids, images):
        texts.clear()
        cache.keep_shared(ids, [[image_key(image) for image in images]], IMAGE_TOKEN_ID)
        output = model.generate(ids, pixel_values=images, past_key_values=cache, image_memory=memory, **OPTIONS)
        computed = texts[:-3]  # without the steps for the three tokens that follow the first
        expected = logits(model, [ids], images)
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)
        return output.sequences, computed

    ids = tokens(6, "I", 4, "I", 5, "I", 3)
    ask(ids, pixels(0, 1, 2))
    return ask, ids, memory


LAST_IMAGE = 6 + 4 + 5 + 2 * IMAGE_SEQ_LENGTH  # where the third image begins


def test_an_image_of_an_earlier_round_is_replaced(conversation):
    ask, ids, memory = conversation
    assert ask(ids, pixels(0, 3, 2))[1] == [IMAGE_SEQ_LENGTH, 5 + 3]  # the one new image, and the text after it
    assert ask(ids, pixels(0, 1, 2))[1] == [5 + 3]
    assert memory.misses == 4


def test_an_image_of_an_earlier_round_is_removed(conversation):
    ask, ids, memory = conversation
    without_second = torch.cat([ids[:, : 10 + IMAGE_SEQ_LENGTH], ids[:, 10 + 2 * IMAGE_SEQ_LENGTH :]], dim=1)
    assert ask(without_second, pixels(0, 2))[1] == [5 + 3]
    assert memory.misses == 3


def test_a_message_is_edited(conversation):
    ask, ids, memory = conversation
    edited = ids.clone()
    edited[0, LAST_IMAGE - 2] += 1
    assert ask(edited, pixels(0, 1, 2))[1] == [2 + 3]
    longer = torch.cat([edited[:, :2], tokens(3, seed=7), edited[:, 2:]], dim=1)
    assert ask(longer, pixels(0, 1, 2))[1] == [4 + 3 + 4 + 5 + 3]
    assert memory.misses == 3


def test_an_answer_is_asked_for_again_and_gone_on_from(conversation):
    ask, ids, _ = conversation
    answered, computed = ask(ids, pixels(0, 1, 2))
    assert computed == [1]  # the last token before the answer
    following = torch.cat([answered, tokens(2, "I", 1, seed=3)], dim=1)
    assert ask(following, pixels(0, 1, 2, 0))[1] == [1 + 3]  # the answer's last token, and the new text
    # Where a conversation ends with an image, its output in the memory predicts the next token.
    assert ask(following[:, : LAST_IMAGE + IMAGE_SEQ_LENGTH], pixels(0, 1, 2))[1] == [1]


def test_new_images_only_continue_a_conversation():
    """A turn that passes only its new image; then tokens and images that are not those of the cache are refused."""
    model, cache = make_model(), ConversationCache()
    first, images = tokens(3, "I", 2), pixels(0)
    answered = model.generate(first, pixel_values=images, past_key_values=cache, **OPTIONS).sequences
    second = torch.cat([answered, tokens("I", 2, seed=2)], dim=1)
    output = model.generate(second, pixel_values=pixels(1), past_key_values=cache, **OPTIONS)
    expected = logits(model, [second], pixels(0, 1))
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-5)
    third = torch.cat([output.sequences, tokens(2, seed=3)], dim=1)
    changed = third.clone()
    changed[0, 1] += 1
    for options in ({}, {"num_beams": 2}):  # a refusal leaves the cache as it was
        with pytest.raises(ValueError, match=f"Token 1 of row 0 is .*{changed[0, 1]}, .* holds {third[0, 1]}"):
            model.generate(changed, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS, **options)
    with pytest.raises(ValueError, match="Image 2 of row 0 differs from the one in the cache"):
        model.generate(third, pixel_values=pixels(0, 2), past_key_values=cache, **OPTIONS)
    with pytest.raises(ValueError, match="there is nothing new to compute"):
        model.generate(second, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    output = model.generate(third, pixel_values=pixels(0, 1), past_key_values=cache, **OPTIONS)
    expected = logits(model, [third], pixels(0, 1))
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, rtol=0, atol=1e-5)


def test_a_cache_of_other_rows_is_refused():
    ids, images, cache = tokens(3, "I", 4), pixels(0), ConversationCache()
    model = make_model()
    model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
    with pytest.raises(ValueError, match="The cache holds 1 rows, and 2 were passed"):
        model.generate(ids.repeat(2, 1), pixel_values=pixels(0, 0), past_key_values=cache, **OPTIONS)
    cache.keep_shared(ids.repeat(2, 1), [["a"], ["a"]], IMAGE_TOKEN_ID)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="use_cache=False does not go with past_key_values"):
        model.generate(ids, pixel_values=images, past_key_values=cache, use_cache=False)


def test_an_interrupted_run_leaves_the_cache_usable(monkeypatch):
    """Interrupted in the image stream, in the text and at the first new token; then another image in its place."""
    model, cache = make_model(), ConversationCache()
    ids, images = tokens(3, "I", 4), pixels(0)
    for place in range(3):
        interrupt(monkeypatch, model.model.language_model.layers[1].mlp, place)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
        monkeypatch.undo()
        if cache.get_seq_length():
            cache.keep_shared(ids, [[image_key(images[0])]], IMAGE_TOKEN_ID)
    for seed in (1, 0):
        cache.keep_shared(ids, [[image_key(pixels(seed)[0])]], IMAGE_TOKEN_ID)
        output = model.generate(ids, pixel_values=pixels(seed), past_key_values=cache, **OPTIONS)
        expected = logits(model, [ids], pixels(seed))
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)


def test_the_cost_grows_with_the_number_of_known_images_alone():
    """Counted in tokens that go through the decoder: text, however many images are known."""
    model, memory = make_model(), ImageMemory()
    widths = widths_of(model)
    memory.get_states(model.model, pixels(*range(6)))
    for count in (1, 3, 6):
        widths.clear()
        logits(model, [tokens(*["I"] * count, 7)], pixels(*range(count)), image_memory=memory)
        assert widths == [7, 1, 1, 1]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_returns_continue_a_cache_of_one_row(options):
    model = make_model()
    first, other = tokens(3, "I", 4), tokens(4, "I", 3, seed=5)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    cache = ConversationCache()
    model.generate(first, pixel_values=pixels(0), past_key_values=cache, **{**greedy, **options})
    with pytest.raises(ValueError, match="The cache holds 2 rows, and 1 were passed"):
        model.generate(other, pixel_values=pixels(1), past_key_values=cache, **greedy)
    cache = ConversationCache()
    answered = model.generate(first, pixel_values=pixels(0), past_key_values=cache, **greedy)
    longer = torch.cat([answered, tokens(2, seed=3)], dim=1)
    torch.manual_seed(0)
    actual = model.generate(longer, pixel_values=pixels(0), past_key_values=cache, **{**greedy, **options})
    torch.manual_seed(0)
    assert torch.equal(actual, model.generate(longer, pixel_values=pixels(0), **{**greedy, **options}))


def test_new_tokens_only_continue_a_cropped_cache():
    model, cache = make_model(), ConversationCache()
    first = tokens(3, "I", 2)
    model.generate(first, pixel_values=pixels(0), past_key_values=cache, **OPTIONS)
    cache.crop(first.shape[1] - cache.get_seq_length())
    new = tokens(3, seed=4)
    mask = torch.ones(1, first.shape[1] + 3, dtype=torch.long)
    types = torch.nn.functional.pad((first == 2).long(), (0, 3))
    output = model.generate(new, attention_mask=mask, mm_token_type_ids=types, past_key_values=cache, **OPTIONS)
    assert cache.token_ids.shape[1] == cache.get_seq_length()
    expected = logits(model, [torch.cat([first, new], dim=1)], pixels(0))
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)
