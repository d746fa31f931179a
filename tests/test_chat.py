"""A conversation in which anything may be changed answers as one that was so from the beginning."""

import copy

import pytest
from conftest import draw_picture, make_model, make_processor
from test_finetune import EXAMPLES

from modeling_visualchat import ImageMemory


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
def test_changes_give_the_answers_of_a_conversation_that_was_so(chat_module, pictures, kwargs):
    model, processor = make_model(**kwargs), make_processor()
    memory = ImageMemory() if model.model.keeps_apart() else None
    chat = chat_module.Chat(model, processor, 8, memory)

    def check(answer):
        anew = chat_module.Chat(model, processor, 8)
        anew._answer(copy.deepcopy(chat.messages[:-1]), None)
        assert anew.messages == chat.messages and chat.messages[-1]["content"] == (answer or "(nothing)")

    check(chat.ask("What is it?", pictures[:1]))
    check(chat.ask("And these two?", pictures[1:3]))
    check(chat.ask("So?", []))
    check(chat.replace_image(2, pictures[3]))
    check(chat.edit_question(1, "What colors?"))
    check(chat.remove_image(1))
    check(chat.ask("Again, with one more?", pictures[:1]))
    assert chat.describe().splitlines()[0] == "question 1: What colors?"
    assert f"image 1: {pictures[3]}" in chat.describe() and "question 4: Again" in chat.describe()
    if memory is not None:
        assert memory.misses == 4


def test_what_cannot_be_changed_is_said_and_nothing_is_lost(chat_module, pictures):
    chat = chat_module.Chat(make_model(), make_processor(), 4)
    chat.ask("", pictures[:1])
    before = copy.deepcopy(chat.messages)
    for line, message in {
        "/replace 2 x.png": "There is no image 2; the conversation has 1",
        "/replace one x.png": "write /replace N PATH",
        "/remove": "write /remove N",
        "/remove 1": "Image 1 is all that its round says",
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
