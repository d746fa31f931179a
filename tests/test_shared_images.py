"""Conversations refer to images: any number of them reads one copy, and gets what a copy of its own would give."""

import pytest
import torch
from conftest import (
    IMAGE_SEQ_LENGTH,
    PAPER,
    SHAPE,
    TEXT_CONFIGS,
    draw_picture,
    make_model,
    make_processor,
    pad_left,
    pixels,
    tokens,
)
from transformers import LlamaConfig

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.placed_images_visualchat import Place, PlacedImages
from modeling_visualchat.quantized_states_visualchat import QuantizedStates


GREEDY = {"max_new_tokens": 6, "do_sample": False}
# Rows of unlike images, in unlike order, twice, and none.
ROWS = [("I", 3, "I", 2), (4,), ("I", "I", 2, "I", 1), (1, "I", 5)]
IMAGES = (0, 1, 1, 0, 2, 1)
HALF = {"merge": "joint", "image_scope": "half"}
MODELS = {
    "sum": PAPER,
    "joint": {"merge": "joint", "image_scope": "all"},
    "within images": {**PAPER, "image_attention": "image"},
    "last image": {"merge": "joint", "image_scope": "last"},
    "half of the heads": HALF,
    "half of the heads, a key for each": {**HALF, "text_config": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})},
    "cross": {"attention_type": "cross", "cross_layer_interval": 1},
    "layers without rotation": {"decoder": "smollm3"},
}


def storages(*caches: ConversationCache) -> dict[int, int]:
    """The bytes of the storages that hold keys and values of images, by address."""
    held = {}
    for cache in caches:
        for layer in (*cache.placed_images.keys, *cache.placed_images.values):
            for tensor in layer:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return held


def without_references(monkeypatch):
    """Every text token reads copies."""
    monkeypatch.setattr(PlacedImages, "reads", lambda *arguments: None)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_what_is_read_by_reference_is_what_a_copy_gives(options, monkeypatch):
    """A step of decoding in a batch of unlike rows, of a kept conversation of several rounds."""
    logits = []
    for is_copied in (False, True):
        model = make_model(**options)
        if is_copied:
            without_references(monkeypatch)
        cache, batch = ConversationCache(), pad_left([tokens(*row) for row in ROWS])
        with torch.no_grad():
            model(**batch, pixel_values=pixels(*IMAGES), past_key_values=cache, mm_token_type_ids=None)
            mask = batch["attention_mask"]
            for step in range(3):
                ids = tokens(len(ROWS), seed=step).T
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                types = torch.cat([cache.token_types == 2, torch.zeros(len(ROWS), 1, dtype=torch.bool)], dim=1).long()
                positions = mask.sum(dim=1, keepdim=True) - 1
                output = model(
                    ids, attention_mask=mask, position_ids=positions, past_key_values=cache, mm_token_type_ids=types
                )
                logits.append(output.logits)
    for by_reference, copied in zip(logits[:3], logits[3:]):
        torch.testing.assert_close(by_reference, copied, rtol=1e-4, atol=1e-4)


def test_a_scaled_rotation_is_turned_without_its_factor(monkeypatch):
    """YaRN puts a factor on queries and keys, which a turn must not put on a second time."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
    config = LlamaConfig(**SHAPE, rope_parameters=yarn)
    monkeypatch.setitem(TEXT_CONFIGS, "yarn", lambda: config)
    model, answers = make_model("yarn"), []
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    for form in ("rotated in place", "by reference", "copied"):
        if form == "copied":
            without_references(monkeypatch)
        memory = None if form == "rotated in place" else ImageMemory()
        ids = tokens(3, "I", 2, "I", 4)
        output = model.generate(ids, pixel_values=pixels(0, 1), image_memory=memory, **options)
        answers.append(torch.stack(output.logits))
    assert model.model.language_model.rotary_emb.attention_scaling > 1.1
    kept = torch.isfinite(answers[0])
    for answer in answers[1:]:
        torch.testing.assert_close(answer[kept], answers[0][kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [MODELS["sum"], MODELS["cross"]], ids=["mmca", "cross"])
def test_conversations_of_a_batch_hold_one_copy_and_answer_as_alone(options):
    """64 conversations over the same 20 images, all of them or some, in any order."""
    model = make_model(**options)
    generator = torch.Generator().manual_seed(0)
    images = pixels(*range(20))
    orders = [torch.randperm(20, generator=generator)[: 20 - row % 3 * 5] for row in range(64)]
    rows = [tokens(*["I"] * len(order), 2 + row % 4, seed=row) for row, order in enumerate(orders)]
    cache, batch = ConversationCache(), pad_left(rows)
    shown = images[torch.cat(orders)]
    together = model.generate(**batch, pixel_values=shown, past_key_values=cache, **GREEDY)
    layers, heads, size = 2, 2, 8
    if model.config.attention_type == "cross":
        layers = len(model.model.cross_attention)
    assert sum(storages(cache).values()) == 2 * 20 * layers * heads * IMAGE_SEQ_LENGTH * size * 4
    for row in (0, 1, 2, 63):
        alone = model.generate(rows[row], pixel_values=images[orders[row]], **GREEDY)
        width = min(alone.shape[1] - rows[row].shape[1], GREEDY["max_new_tokens"])
        start = batch["input_ids"].shape[1]
        assert torch.equal(together[row, start : start + width], alone[0, rows[row].shape[1] :])


def test_sessions_hold_the_copy_of_the_image_memory():
    model, processor, memory = make_model(), make_processor(), ImageMemory()
    sessions = []
    for number in range(8):
        session = model.start_chat(processor, memory, max_new_tokens=3)
        session.ask("Which?", [draw_picture(image) for image in range(number, number + 4)])
        session.ask("And these?", [draw_picture(number), draw_picture(20)])
        sessions.append(session)
    assert len(memory) == 12
    held = storages(*(session.cache for session in sessions))
    kept = {
        tensor.untyped_storage().data_ptr()
        for entry in memory._entries.values()
        for name, tensor in entry.items()
        if name.startswith(("keys.", "values."))
    }
    assert set(held) == kept


def test_beams_and_selected_rows_refer_to_the_same_images():
    model, cache = make_model(), ConversationCache()
    rows = [tokens("I", 3, "I", 2), tokens("I", 4)]
    model.generate(**pad_left(rows), pixel_values=pixels(0, 1, 2), past_key_values=cache, **GREEDY)
    before = storages(cache)
    cache.batch_repeat_interleave(3)
    assert len(cache.placed_images.rows) == 6 and storages(cache) == before
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.placed_images.rows == [[Place(0, 0, IMAGE_SEQ_LENGTH, cache.placed_images.rows[0][0].shift)]]
    model.generate(**pad_left(rows), pixel_values=pixels(0, 1, 2), num_beams=3, **GREEDY)


def test_images_are_cut_with_the_conversation():
    keys = [torch.randn(2, 2, 5, 8)]
    placed = PlacedImages(keys, keys, [[Place(0, 0, 5, 3), Place(1, 0, 5, 9)], [Place(1, 0, 5, 0)]])
    assert placed.cut([10, 5]) is placed
    cut = placed.cut([3, 0])
    assert cut.rows == [[Place(0, 0, 3, 3)], []] and len(cut.keys[0]) == 1
    assert cut.reads([[], []], 1, keys[0]) is None
    whole = placed.of_layer(0, keys[0]).keys_values()[0]
    assert torch.equal(cut.of_layer(0, keys[0]).keys_values()[0][:, :, :3][0], whole[0, :, :3])
    assert placed.cut([0, 0]) is None


@pytest.mark.parametrize(
    "order", [range(20), range(19, -1, -1), (3, 11, 3, 0), (7,)], ids=["all", "back", "some", "one"]
)
def test_known_images_cost_no_image_token(order):
    model, memory, images = make_model(), ImageMemory(), pixels(*range(20))
    memory.get_states(model, images)
    ids = tokens(*["I"] * len(order), 6)
    with model.model.count_tokens() as counts:
        known = model.generate(ids, pixel_values=images[list(order)], image_memory=memory, **GREEDY)
    assert counts == [6, *[1] * (known.shape[1] - ids.shape[1] - 1)]
    assert torch.equal(known, model.generate(ids, pixel_values=images[list(order)], **GREEDY))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_conversations_join_and_leave_a_batch(options):
    """Each answers as alone, whenever it has come; an image that two of them show is one copy."""
    model, memory = make_model(**options), ImageMemory()
    rows = [tokens(*row, seed=number) for number, row in enumerate(ROWS)]
    counts = [2, 0, 3, 1]
    shown = [pixels(*IMAGES)[sum(counts[:row]) : sum(counts[: row + 1])] for row in range(4)]
    expected = []
    for ids, images in zip(rows, shown):
        given = {"pixel_values": images} if len(images) else {}
        output = model.generate(ids, **given, output_logits=True, return_dict_in_generate=True, **GREEDY)
        expected.append((output.sequences[0, ids.shape[1] :], torch.stack(output.logits)[:, 0]))

    def begin(row):
        cache = ConversationCache()
        states = {"image_states": memory.get_states(model, shown[row])} if len(shown[row]) else {}
        logits = model(rows[row], past_key_values=cache, **states).logits[:, -1]
        return cache, logits

    batch, running, number = ConversationCache(), list[int](), dict.fromkeys(range(4), 0)
    last = torch.empty(0, model.config.text_config.vocab_size)
    with torch.no_grad():
        for step in range(10):
            if step in (0, 1, 3, 4):  # one more comes
                row = (0, 1, 3, 4).index(step)
                cache, logits = begin(row)
                last = torch.cat([last, logits])
                if running:
                    batch.append_rows(cache)
                else:
                    batch = cache
                running.append(row)
            for place, row in enumerate(running):
                kept = torch.isfinite(expected[row][1][number[row]])
                torch.testing.assert_close(
                    last[place][kept], expected[row][1][number[row]][kept], rtol=1e-4, atol=1e-4
                )
            ids = torch.stack([expected[row][0][number[row]] for row in running])[:, None]
            for row in running:
                number[row] += 1
            staying = [place for place, row in enumerate(running) if number[row] < len(expected[row][0])]
            if not staying:
                break
            if len(staying) < len(running):  # some are at their end
                batch.batch_select_indices(torch.tensor(staying))
                running, ids = [running[place] for place in staying], ids[staying]
            batch.compact()
            types = torch.nn.functional.pad((batch.token_types == 2).long(), (0, 1))
            mask = torch.nn.functional.pad((batch.token_types > 0).long(), (0, 1), value=1)
            positions = batch.position_ids.max(dim=1, keepdim=True).values + 1
            last = model(
                ids, attention_mask=mask, position_ids=positions, mm_token_type_ids=types, past_key_values=batch
            ).logits[:, -1]
    assert number == {row: len(expected[row][0]) for row in range(4)}


@pytest.mark.parametrize(("bits", "share", "error"), [(8, 0.30, 0.01), (4, 0.18, 0.15)])
def test_an_image_memory_in_few_bits(bits, share, error, tmp_path):
    """A fraction of the bytes of float32, with an error that is bounded; also from a folder, and by reference."""
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    quantized = QuantizedStates.quantize(states, bits)
    restored = quantized.to(states.device, states.dtype)
    assert quantized.shape == states.shape and quantized.nbytes <= share * states.nbytes
    assert (restored - states).norm() < error * states.norm()
    model, images, ids = make_model(), pixels(0, 1), tokens("I", 2, "I", 3)
    options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    exact = model.generate(ids, pixel_values=images, **options).logits[0]
    answers = []
    for _ in range(2):  # the second from the folder
        memory = ImageMemory(folder=tmp_path, bits=bits)
        cache = ConversationCache()
        answers.append(
            model.generate(ids, pixel_values=images, image_memory=memory, past_key_values=cache, **options).logits
        )
    assert memory.hits == 2 and all(map(torch.equal, *answers))
    kept = torch.isfinite(exact)
    difference = (answers[0][0] - exact)[kept].norm() / exact[kept].norm()
    assert 0 < difference < error
    assert ImageMemory(folder=tmp_path).get_states(model, images).keys[0][0].dtype == torch.float32
    with pytest.raises(ValueError, match="bits=3: keys and values are kept in 8 or 4 bits"):
        ImageMemory(bits=3)
