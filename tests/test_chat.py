"""A conversation in which anything may be changed answers as one that was so from the beginning."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import draw_picture, make_model, make_processor
from PIL import Image
from test_finetune import EXAMPLES
from transformers import GenerationConfig

from modeling_visualchat import ChatSession, ImageMemory, weights_key_visualchat


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / f"{index} x.png") for index in range(4)]
    for index, path in enumerate(paths):
        draw_picture(index).save(path)
    return paths


@pytest.fixture
def chat_module(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import chat

    return chat


MODELS = {
    "mmca": {},
    "sliding window": {"decoder": "mistral"},
    "causal": {"attention_type": "causal"},
    "without rotation in a layer": {"decoder": "smollm3"},
}


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
def test_edits_give_the_answers_of_a_new_conversation(chat_module, pictures, kwargs):
    model, processor = make_model(**kwargs), make_processor()
    memory = ImageMemory() if model.model.supports_conversation_cache() else None
    chat = model.start_chat(processor, memory, max_new_tokens=8)

    def check(answer):
        new = ChatSession(model, processor, max_new_tokens=8)
        new.answer(copy.deepcopy(chat.messages[:-1]))
        assert new.messages == chat.messages and chat.messages[-1]["content"] == (answer or "(nothing)")

    check(chat.ask("What is it?", pictures[:1]))
    check(chat.ask("And these two?", pictures[1:3]))
    check(chat.ask("So?", []))
    check(chat.replace_image(2, pictures[3]))
    check(chat.edit_question(1, "What colors?"))
    check(chat.remove_image(1))
    check(chat.ask("Again, with one more?", pictures[:1]))
    check(chat.retry())
    described = chat_module.describe(chat.messages)
    assert described.splitlines()[0] == "question 1: What colors?"
    assert f"image 1: {pictures[3]}" in described and "question 4: Again" in described
    if memory is not None:
        assert memory.misses == 4


def test_what_cannot_be_changed_is_said_and_nothing_is_lost(chat_module, pictures):
    chat = make_model().start_chat(make_processor(), max_new_tokens=4)
    chat.ask("", pictures[:1])
    before = copy.deepcopy(chat.messages)
    for line, message in {
        "/replace 2 x.png": "There is no image 2; the conversation has 1",
        "/replace one x.png": "write /replace N PATH",
        "/remove": "write /remove N",
        "/remove 1": "Image 1 is the whole content of its message",
        "/edit 1 Hi": "There is no question 1; the conversation has 0",
        "/edit 1": "write /edit N TEXT",
    }.items():
        line = line.replace("x.png", f'"{pictures[1]}"')
        with pytest.raises(ValueError, match=message):
            chat_module.run_command(chat, line, None)
        assert chat.messages == before
    chat_module.run_command(chat, "/replace 1 nowhere.png", None)
    assert chat.messages == before
    chat_module.run_command(chat, f'/replace 1 "{pictures[1]}"', None)
    assert chat.messages[0]["content"] == [{"type": "image", "path": pictures[1]}]


@pytest.fixture
def session(pictures):
    """A conversation of two rounds with an image each, and the widths of the text in every pass of the decoder."""
    session = make_model().start_chat(make_processor(), ImageMemory(), max_new_tokens=2)
    session.ask("What is it?", pictures[:1])
    session.ask("And this?", pictures[1:2])
    return session


def cached_before(session, monkeypatch, change):
    """How many tokens of the cache a change keeps."""
    kept, generate = [], session.model.generate
    monkeypatch.setattr(
        session.model, "generate", lambda *args, **kwargs: kept.append(len(session.cache)) or generate(*args, **kwargs)
    )
    monkeypatch.setattr(type(session.cache), "__len__", lambda cache: cache.get_seq_length())
    change()
    return kept[0]


def test_an_edit_keeps_the_cache_before_it_and_changed_weights_keep_nothing(session, monkeypatch, pictures):
    first_question = len("You are a powerful vision-language assistant.\n\n### Image 1: ")
    assert cached_before(session, monkeypatch, lambda: session.replace_image(1, pictures[2])) == first_question
    assert cached_before(session, monkeypatch, session.retry) > 2 * first_question
    with torch.no_grad():
        session.model.model.language_model.norm.weight.data.mul_(1.5)  # which no tensor version shows
    assert cached_before(session, monkeypatch, session.retry) == 0
    assert cached_before(session, monkeypatch, session.retry) > 2 * first_question


def test_a_session_takes_paths_pictures_and_plain_text(pictures):
    session = make_model().start_chat(make_processor(), max_new_tokens=2)
    answers = [session.ask("What?", [image]) for image in (Path(pictures[0]), Image.open(pictures[1]))]
    session.replace_image(1, Image.open(pictures[2]))
    assert len(answers) == 2 and session.messages[0]["content"][0]["image"].size == (24, 16)
    session.answer([{"role": "user", "content": "Only text."}])
    session.edit_question(1, "Other text.")
    assert session.messages[0]["content"] == [{"type": "text", "text": "Other text."}]
    session.reset()
    with pytest.raises(ValueError, match="must be a list of messages that is not empty"):
        session.retry()


def test_a_session_computes_in_full_where_hooks_may_change_the_model(session, monkeypatch):
    session.image_memory = None
    handle = session.model.model.language_model.layers[0].register_forward_hook(lambda *args: None)
    assert cached_before(session, monkeypatch, session.retry) == 0
    handle.remove()


def test_a_frozen_model_is_checked_by_versions(session, monkeypatch):
    sums = []
    monkeypatch.setattr(
        "modeling_visualchat.weights_key_visualchat.column_sums", lambda tensor: sums.append(tensor) or b""
    )
    session.model.freeze()
    session.retry()
    assert sums
    sums.clear()
    session.retry()
    assert not sums
    with torch.no_grad():
        session.model.model.language_model.norm.weight.mul_(1.5)
    session.retry()
    assert sums


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_round_leaves_the_session_usable(monkeypatch, pictures, kwargs, layer):
    """Interrupted in the first round, and in the second, in either layer."""
    model = make_model(**kwargs)
    session = model.start_chat(make_processor(), max_new_tokens=4)
    mlp = model.model.language_model.layers[layer].mlp
    for question, images in (("What is it?", pictures[:1]), ("And these?", pictures[1:3])):
        for place in (0, 2):
            calls, forward = [], type(mlp).forward

            def stop(self, states, forward=forward, calls=calls, place=place):
                if self is mlp:
                    calls.append(states)
                if len(calls) > place:
                    raise KeyboardInterrupt
                return forward(self, states)

            # On the class, since a session empties its cache where a module has a forward of its own.
            monkeypatch.setattr(type(mlp), "forward", stop)
            before = copy.deepcopy(session.messages)
            with pytest.raises(KeyboardInterrupt):
                session.ask(question, images)
            monkeypatch.undo()
            assert session.messages == before
        answer = session.ask(question, images)
        new = ChatSession(model, make_processor(), max_new_tokens=4)
        assert new.answer(copy.deepcopy(session.messages[:-1])) == answer


@pytest.mark.parametrize("kwargs", MODELS.values(), ids=MODELS)
def test_weights_that_change_between_rounds_start_the_cache_again(pictures, kwargs):
    model = make_model(**kwargs)
    session = model.start_chat(make_processor(), max_new_tokens=4)
    session.ask("What is it?", pictures[:1])
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(2)
    answer = session.ask("So?")
    new = ChatSession(model, make_processor(), max_new_tokens=4)
    assert new.answer(copy.deepcopy(session.messages[:-1])) == answer


def test_arguments_of_generate_are_kept_or_refused(pictures):
    model = make_model()
    session = model.start_chat(make_processor(), generation_config=GenerationConfig(max_new_tokens=1))
    assert "max_new_tokens" not in session.generate_kwargs
    session.ask("What?", pictures[:1])
    model.start_chat(make_processor(), max_new_tokens=2, return_dict_in_generate=True).ask("What?")
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens starts from an empty cache"):
        model.start_chat(make_processor(), prompt_lookup_num_tokens=2)


def test_an_offloaded_model_can_chat(pictures):
    model = make_model()
    expected = make_model().start_chat(make_processor(), max_new_tokens=4).ask("What?", pictures[:1])
    cpu_offload(model.model.language_model.layers[1], torch.device("cpu"))
    session = model.start_chat(make_processor(), max_new_tokens=4)
    assert session.ask("What?", pictures[:1]) == expected
    session.ask("So?")


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_checksum_of_the_weights_is_taken_once_a_round(monkeypatch, is_frozen):
    """By session, cache and image memory together; of a frozen model once for all rounds."""
    taken: list[int] = []
    column_sums = weights_key_visualchat.column_sums
    monkeypatch.setattr(
        weights_key_visualchat, "column_sums", lambda tensor: taken.append(tensor.numel()) or column_sums(tensor)
    )
    model = make_model()
    if is_frozen:
        model.freeze()
    session = model.start_chat(make_processor(), ImageMemory(), max_new_tokens=2)
    num_weights = len([*model.model.parameters(), *model.model.buffers()])
    for number in (1, 2):
        session.ask("What is it?", [draw_picture(number)])
        assert len(taken) == num_weights * (1 if is_frozen else number)
    session.replace_image(1, draw_picture(3))
    assert len(taken) == num_weights * (1 if is_frozen else 3)
