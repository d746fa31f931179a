"""Images that are computed once: exact in any conversation, bounded, and never used where they would be wrong."""

import gc
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, TEXT_CONFIGS, make_model, pad_left, pixels, tokens
from peft import LoraConfig, get_peft_model
from test_finetune import environment
from transformers import LlamaConfig

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.image_memory_visualchat import fingerprint_model
from modeling_visualchat.image_states_visualchat import KeyRotation, same_images


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
    tower = model.model.vision_tower
    forward = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda images, **kwargs: calls.append(len(images)) or forward(images, **kwargs)
    )
    return calls


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


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic", "llama3"])
def test_scaled_rotary_embeddings_are_exact_too(monkeypatch, rope):
    options = {
        "linear": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "dynamic": {"factor": 2.0},
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    }[rope]  # fmt: skip
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **options}
    make = TEXT_CONFIGS["llama"]
    monkeypatch.setitem(
        TEXT_CONFIGS, "llama", lambda: LlamaConfig(**{**make().to_dict(), "rope_parameters": parameters})
    )
    model, masked, memory = make_model(), make_model(), ImageMemory()
    masked.model._takes_plans = False
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
    apply = KeyRotation.apply
    monkeypatch.setattr(KeyRotation, "apply", lambda self, keys, *args: keys)
    assert differs()
    monkeypatch.setattr(KeyRotation, "apply", lambda self, keys, *args: apply(self, apply(self, keys, *args), *args))
    assert differs()
    monkeypatch.setattr(KeyRotation, "apply", apply)
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
    keys = [fingerprint_model(model)]

    def changed():
        keys.append(fingerprint_model(model))
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
    model.language_model.embed_tokens.weight.data += 1  # images come as embeddings
    assert fingerprint_model(model) == keys[-1]


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


def test_a_memory_is_refused_where_it_would_be_wrong():
    rows, images = CONVERSATIONS["order"]
    random = make_model()
    random.config.text_config.attention_dropout = 0.5
    for layer in random.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="With dropout an image is never the same twice"):
        logits(random.train(), rows, images, image_memory=ImageMemory())
    logits(random.eval(), rows, images, image_memory=ImageMemory())
    with pytest.raises(ValueError, match=r"Images can be read apart .* only with multi-modal causal attention"):
        logits(make_model(attention_type="causal"), rows, images, image_memory=ImageMemory())
    eager = make_model()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"on the sdpa kernel, .* 'mmca_eager'"):
        logits(eager, rows, images, image_memory=ImageMemory())
    with pytest.raises(ValueError, match="limits of an ImageMemory are numbers of bytes"):
        ImageMemory(max_bytes=-1)


def test_a_thousand_images_stay_under_the_limit():
    """In what the memory counts, and in the tensors of the shapes of its entries that the process holds."""
    model = make_model().model
    one = ImageMemory()
    one.read(model, pixels(0))
    shapes = {tensor.shape for entry in one._entries.values() for tensor in entry.values()}
    memory = ImageMemory(max_bytes=10 * one.nbytes + 1)

    def bytes_held():
        gc.collect()
        held = [value for value in gc.get_objects() if type(value) is torch.Tensor and value.shape in shapes]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())

    before, held = bytes_held(), []
    for start in range(0, 1000, 20):
        memory.read(model, pixels(*range(start, start + 20)))
        assert memory.nbytes == 10 * one.nbytes and len(memory) == 10
        if start % 200 == 180:
            held.append(bytes_held() - before)
    assert held == [memory.nbytes] * 5
    memory.read(model, pixels(990))
    memory.read(model, pixels(0))
    memory.read(model, pixels(990))  # used lately, so still there
    assert (memory.hits, memory.misses) == (2, 1001)
    memory.clear()
    assert memory.nbytes == len(memory) == 0 and bytes_held() == before


def test_a_corrupt_file_is_a_miss_with_a_warning(tmp_path):
    model = make_model().model
    ImageMemory(folder=tmp_path).read(model, pixels(0))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for broken in (b"", whole[:40], whole[:-8], bytes(flipped), b"{" * len(whole)):
        path.write_bytes(broken)
        memory = ImageMemory(folder=tmp_path)
        with pytest.warns(UserWarning, match="image memory's file .* cannot be used and is computed anew"):
            memory.read(model, pixels(0))
        assert memory.misses == 1 and path.read_bytes() == whole
    memory = ImageMemory(folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.read(model, pixels(0))
    assert memory.hits == 1


def test_the_folder_is_bounded_and_the_latest_stay(tmp_path):
    model = make_model().model
    ImageMemory(folder=tmp_path).read(model, pixels(0))
    size = next(tmp_path.iterdir()).stat().st_size
    memory = ImageMemory(max_bytes=0, folder=tmp_path, max_disk_bytes=3 * size)
    for seed in (1, 2, 0, 3):
        memory.read(model, pixels(seed))
    assert len(list(tmp_path.iterdir())) == 3 and memory.hits == 1
    for seed in (2, 0, 3):
        memory.read(model, pixels(seed))
    assert memory.hits == 4


SHARER = """
import sys
from conftest import make_model, pixels
from modeling_visualchat import ImageMemory
model = make_model().model
for turn in range(3):
    for seed in range(12):
        memory = ImageMemory(max_bytes=0, folder=sys.argv[1])
        states = memory.read(model, pixels(seed))
        expected = model.read_images(pixels(seed))
        assert all(abs(a - b).max() <= 1e-5 for a, b in zip(states.keys, expected.keys))
"""


@pytest.mark.slow
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
            monkeypatch.setattr("modeling_visualchat.modeling_visualchat.same_images", lambda images: [0, 1, 2])
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


def test_the_last_layer_leaves_out_what_nothing_reads(monkeypatch):
    """In the last layer of the image stream neither attention output nor MLP is computed, unless somebody reads it."""
    model = make_model()
    rows = []
    for layer in model.model.language_model.layers:
        forward = layer.mlp.forward
        monkeypatch.setattr(
            layer.mlp, "forward", lambda states, forward=forward: rows.append(states.shape) or forward(states)
        )
    ids, images = tokens(3, "I", 4), pixels(0)
    model(ids, images, logits_to_keep=1)  # the first time it is tried out how keys are rotated
    rows.clear()
    model(ids, images, logits_to_keep=1)
    assert [shape[1] for shape in rows] == [IMAGE_SEQ_LENGTH, 7, 7]
    rows.clear()
    model(ids, images)
    assert [shape[1] for shape in rows] == [IMAGE_SEQ_LENGTH, IMAGE_SEQ_LENGTH, 7, 7]


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
    texts = []
    forward = model.model.language_model.forward

    def count(*args, inputs_embeds, **kwargs):
        texts.append(inputs_embeds.shape[1])
        return forward(*args, inputs_embeds=inputs_embeds, **kwargs)

    def ask(ids, images):
        texts.clear()
        output = model.generate(ids, pixel_values=images, past_key_values=cache, image_memory=memory, **OPTIONS)
        computed = texts[:-3]  # without the steps for the three tokens that follow the first
        expected = logits(model, [ids], images)
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)
        return output.sequences, computed

    ids = tokens(6, "I", 4, "I", 5, "I", 3)
    model.model.language_model.forward = count
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
    # Where a conversation ends with an image, that image predicts, so its output is computed.
    assert ask(following[:, : LAST_IMAGE + IMAGE_SEQ_LENGTH], pixels(0, 1, 2))[1] == [IMAGE_SEQ_LENGTH, 1]


def test_a_run_that_breaks_off_leaves_the_cache_usable(monkeypatch):
    model, cache = make_model(), ConversationCache()
    ids, images = tokens(3, "I", 4), pixels(0)
    expected = logits(model, [ids], images)
    last = model.model.language_model.layers[1].mlp
    for place in range(3):
        calls, forward = [], last.forward

        def stop(states, forward=forward, calls=calls, place=place):
            calls.append(states)
            if len(calls) > place:
                raise KeyboardInterrupt
            return forward(states)

        monkeypatch.setattr(last, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
        monkeypatch.undo()
    output = model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)


def test_the_cost_grows_with_the_number_of_known_images_alone():
    """Counted in tokens that go through the decoder: text, however many images are known."""
    model, memory = make_model(), ImageMemory()
    memory.read(model.model, pixels(*range(6)))
    widths = []
    forward = model.model.language_model.forward
    model.model.language_model.forward = lambda *args, inputs_embeds, **kwargs: (
        widths.append(inputs_embeds.shape[1]) or forward(*args, inputs_embeds=inputs_embeds, **kwargs)
    )
    for count in (1, 3, 6):
        widths.clear()
        logits(model, [tokens(*["I"] * count, 7)], pixels(*range(count)), image_memory=memory)
        assert widths == [7, 1, 1, 1]
