"""A conversation in which anything may be changed answers as one that was so from the beginning."""

import copy
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from accelerate import cpu_offload
from conftest import draw_picture, make_model, make_processor
from PIL import Image
from test_finetune import EXAMPLES
from test_remote_code import REPOSITORY
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_visualchat import ChatSession, ImageMemory, weights_key_visualchat
from modeling_visualchat.conversation_edits_visualchat import iterate_images
from processing_visualchat import load_conversations


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
    assert f"image 2: {pictures[3]}" in described and "question 4: Again" in described
    if memory is not None:
        assert memory.misses == 4


def test_what_cannot_be_changed_is_said_and_nothing_is_lost(chat_module, pictures, capsys):
    session = make_model().start_chat(make_processor(), max_new_tokens=4)
    chat = chat_module.Chat(session)
    session.ask("", pictures[:1])
    before = copy.deepcopy(session.messages)
    for line, message in {
        "/replace 2 x.png": "There is no image 2; the images of the conversation: 1",
        "/replace one x.png": "write /replace N PATH",
        "/replace 1 nowhere.png": "No image file at nowhere.png",
        "/remove": "write /remove N",
        "/remove 1 2": "write /remove N",
        "/remove 1": "Image 1 is the whole content of its message",
        "/swap 1": "write /swap N M",
        "/swap 1 2": "There is no image 2",
        "/edit 2 Hi": "There is no question 2; the conversation has 1",
        "/edit 1": "write /edit N TEXT",
        "/drop 1": "It is the only question",
        "/save": "write /save FILE",
        "/load nowhere.json": "No such file",
        "/image nowhere.png": "No image file at nowhere.png",
        "/what": "Unknown command /what; /help lists them",
    }.items():
        chat.run(line.replace("x.png", f'"{pictures[1]}"'))
        assert message in capsys.readouterr().out
        assert session.messages == before
    chat.run(f'/replace 1 "{pictures[1]}"')
    assert session.messages[0]["content"] == [{"type": "image", "path": pictures[1], "number": 1}]


def test_the_commands_of_the_terminal(chat_module, pictures, tmp_path, capsys):
    session = make_model().start_chat(make_processor(), ImageMemory(), max_new_tokens=4)
    chat = chat_module.Chat(session)

    def run(line):
        chat.run(line)
        return capsys.readouterr().out

    # As a terminal drops files: quoted, escaped, as URLs; and a glob.
    assert "24 x 16" in run(f"'{pictures[0]}' {pictures[1].replace(' ', chr(92) + ' ')}")
    assert "24 x 16" in run(Path(pictures[2]).as_uri())
    assert "next: " in run("/images") and len(chat.images) == 3
    assert "computed: " in run("Which is it? I don't know.") and chat.images == []
    assert run(f"/image {tmp_path}/3*.png").count("24 x 16") == 1
    assert "computed: 60 text tokens, 1 image; known: 141 text tokens, 3 images]" in run("And this?")
    assert "first token after" not in run("/retry")
    run("/speed")
    assert "first token after" in run("/retry")
    assert run("/list").count("image ") == 4
    assert "known: " in run("/system Answer in one word.") and session.messages[0]["role"] == "system"
    run("/remove 2")
    run("/swap 1 3")
    run("/move 2 1")
    assert [number for number, _, _ in iterate_images(session.messages)] == [4, 3, 1]
    assert "nothing to answer again" in run("/answer 2 A bird.")
    assert "Saved to" in run(f"/save {tmp_path}/chat.jsonl")
    run("/drop 1")
    assert "question 1: Which is it?" in run("/list")
    assert "question 2: Which is it?" in run("/undo")
    run("/reset")
    assert run("/list") == "(nothing so far)\n" and "system: Answer" in run(f"/load {tmp_path}/chat.jsonl")
    assert "/replace N PATH" in run("/help")
    run("/quit")
    assert chat.is_over


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


def text_of(session):
    """The conversation as the model reads it."""
    return session.processor.apply_chat_template(session.messages)


def test_an_image_keeps_its_number(session, pictures):
    session.ask("A third?", pictures[2:3])
    session.remove_image(1)
    text = text_of(session)
    assert "### Image 1:" not in text and text.index("### Image 2:") < text.index("### Image 3:")
    session.edit(swap_images=[2, 3])
    text = text_of(session)
    assert text.index("### Image 3:") < text.index("### Image 2:")
    session.replace_image(3, pictures[0])
    session.remove_image(2)
    session.ask("A fourth?", pictures[3:])
    assert [block["number"] for message in session.messages for block in message["content"] if "number" in block] == [
        3,
        4,
    ]


EDITS = [
    {"replace_image": 1},
    {"remove_image": 2},
    {"swap_images": [1, 2]},
    {"edit_question": 1, "question": "Which color?"},
    {"edit_answer": 1, "answer": "It is red."},
    {"remove_round": 1},
    {"move_round": [2, 1]},
]
LAST_ONLY = [{"edit_answer": 2, "answer": "Blue."}, {"remove_round": 2}]  # change nothing before the last answer


@pytest.mark.parametrize("edit", [*EDITS, *LAST_ONLY], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"attention_type": "causal"}], ids=["mmca", "causal"])
def test_usage_counts_what_an_edit_computes(pictures, edit, kwargs):
    model = make_model(**kwargs)
    memory = ImageMemory() if not kwargs else None
    session = model.start_chat(make_processor(), memory, max_new_tokens=2)
    session.ask("What is it?", pictures[:1])
    session.ask("And this?", pictures[1:2])
    before = copy.deepcopy(session.messages)
    value = {"image": pictures[2]} if "replace_image" in edit else {}
    with model.model.count_tokens() as counts:
        answer = session.edit(**edit, **value)
    assert session.messages[-1]["content"] == (answer or "(nothing)") and session.messages != before
    if edit in LAST_ONLY:
        assert not counts
    else:
        usage, length = session.usage, model.config.image_seq_length
        decoded = usage.answer_tokens - 1
        assert sum(counts) - decoded == usage.text_tokens + length * usage.new_images
        assert kwargs or usage.new_images == int("replace_image" in edit)
        new = ChatSession(make_model(**kwargs), make_processor(), max_new_tokens=2)
        assert (new.answer(session.messages[:-1]), new.messages) == (answer, session.messages)
        assert new.usage.text_tokens == usage.text_tokens + usage.cached_text_tokens
        assert new.usage.new_images + new.usage.known_images == usage.new_images + usage.known_images
    session.undo()
    assert session.messages == before


def test_a_round_computes_only_what_is_new(pictures):
    """Text, new images, and images that another conversation has shown."""
    model, processor, memory = make_model(), make_processor(), ImageMemory()
    other = model.start_chat(processor, memory, max_new_tokens=2)
    other.ask("What are they?", pictures[:2])
    session = model.start_chat(processor, memory, max_new_tokens=2)
    rounds = [("", pictures[:1], 0), ("Which is brighter?", pictures[1:3], 1), ("So?", [], 0), ("", pictures[:1], 0)]
    num_shown = num_read = 0
    for question, images, num_new in rounds:
        with model.model.count_tokens() as counts:
            session.ask(question, images)
        usage, num_shown = session.usage, num_shown + len(images)
        assert (usage.new_images, usage.known_images) == (num_new, num_shown - num_new)
        assert sum(counts) == usage.text_tokens + usage.answer_tokens - 1 + num_new * model.config.image_seq_length
        assert usage.cached_text_tokens >= num_read  # all that was read before, and its answer
        num_read = usage.text_tokens + usage.cached_text_tokens


class StopAfter(BaseStreamer):
    """Stops the answer of a session when a number of tokens has come."""

    def __init__(self, session, number):
        self.session, self.remaining = session, number + 1  # the first call passes the question

    def put(self, value):
        self.remaining -= 1
        if self.remaining == 0:
            self.session.stop()

    def end(self):
        pass


def test_a_stopped_answer_is_kept_and_can_be_taken_back(pictures):
    session = make_model().start_chat(make_processor(), max_new_tokens=8)
    whole = session.ask("What is it?", pictures[:1])
    assert (session.usage.finish_reason, session.usage.answer_tokens) == ("length", 8)
    again = session.retry(StopAfter(session, 3))
    assert session.usage.finish_reason == "stopped" and session.usage.answer_tokens < 6
    assert whole.startswith(again) and session.messages[-1]["content"] == (again or "(nothing)")
    session.undo()
    assert session.messages[-1]["content"] == whole
    session.undo()
    assert session.messages == []
    with pytest.raises(ValueError, match="There is nothing to take back"):
        session.undo()


def test_a_conversation_is_saved_with_its_images(session, pictures, tmp_path):
    session.ask("A picture?", [Image.open(pictures[2])])
    session.remove_image(1)
    session.save(path := tmp_path / "chat.jsonl")
    Path(pictures[1]).unlink()
    new = make_model().start_chat(make_processor(), max_new_tokens=2)
    new.ask("Another?")
    new.load(path)
    assert text_of(new) == text_of(session) and new.messages[2]["content"][0]["name"] == "1 x.png"
    assert new.retry() == session.messages[-1]["content"]
    new.ask("A fourth?", pictures[3:])
    assert "### Image 4:" in text_of(new)
    new.undo(), new.undo()
    new.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()
    assert len(load_conversations(path, make_processor())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "{": "chat.json is not a JSON file",
        "[]": r'chat.json holds no conversation: expected {"messages": \[…\]}',
        '{"messages": []}': "must be a list of messages that is not empty",
        '{"messages": [{"role": "wizard", "content": "Hi"}]}': "unknown role 'wizard'",
        '{"messages": [{"role": "user", "content": "Hi"}]}': "chat.json ends with a question; expected its answer",
    }.items(),
)
def test_a_file_that_holds_no_conversation_leaves_the_current_one(session, tmp_path, text, message):
    before = session.messages
    (tmp_path / "chat.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        session.load(tmp_path / "chat.json")
    assert session.messages is before


def test_what_exceeds_the_budget_is_said(pictures):
    model, processor = make_model(), make_processor()
    for limit, message in (
        ({"max_images": 1}, "shows 2 images, and at most 1 are allowed"),
        ({"max_tokens": 150}, "has 167 tokens, .* at most 150 are allowed"),
    ):
        session = model.start_chat(processor, max_new_tokens=2, **limit)
        session.ask("What is it?", pictures[:1])
        before = session.messages
        with pytest.raises(ValueError, match=message):
            session.ask("And this?", pictures[1:2])
        assert session.messages is before
    session = model.start_chat(processor, ImageMemory(), max_images=4, overflow="drop_first_rounds", max_new_tokens=2)
    dropped = []
    for number in range(9):
        session.ask(f"What is picture {number}?", [draw_picture(number)])
        dropped.append(session.usage.dropped_rounds)
    assert dropped == [0, 0, 0, 0, 2, 2, 4, 4, 6] and len(session.messages) == 18
    new = model.start_chat(processor, max_new_tokens=2)
    assert new.answer(session.messages[12:-1]) == session.messages[-1]["content"]
    assert "without the first 6 rounds" in str(session.usage)
    session.edit(remove_round=1)
    assert session.usage.dropped_rounds == 5
    session.ask("And these?", [draw_picture(number) for number in range(4)])  # as many as are allowed
    assert session.usage.dropped_rounds == 8
    with pytest.raises(ValueError, match="shows 5 images, and at most 4"):
        session.ask("These?", [draw_picture(number) for number in range(5)])
    with pytest.raises(ValueError, match="Unknown overflow='cut'; choose one of error, drop_first_rounds"):
        model.start_chat(processor, overflow="cut")


def test_special_tokens_in_the_words_of_a_user_stay_text(pictures):
    session = make_model().start_chat(make_processor(), max_new_tokens=2)
    session.ask("Is <image> a token, and </s>?", pictures[:1])
    assert session.usage.known_images + session.usage.new_images == 1
    assert session.messages[0]["content"][1]["text"] == "Is <image> a token, and </s>?"


@pytest.mark.slow
def test_a_person_chats_in_a_real_terminal(pictures, tmp_path, monkeypatch):
    """Editing, history, completion of commands, and Ctrl-C, which stops an answer and not the program."""
    model = make_model()
    processor = make_processor()
    words = processor.tokenizer.convert_tokens_to_ids(["Ġ", "a"])  # a word is printed when the next one begins
    model.generation_config.suppress_tokens = sorted({*range(model.config.text_config.vocab_size)} - {*words})
    model.generation_config.eos_token_id = None  # an answer ends where it is stopped
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    prompt = "\x1b[?2004h"  # the terminal is asked to mark what is pasted
    begun = r"\?2004l\s*[^\s\x1b]"  # the line is read, and an answer begins
    command = [str(EXAMPLES / "chat.py"), str(tmp_path / "model"), "--max_new_tokens", "900", "--temperature", "100"]
    command += ["--image", pictures[0]]
    with pexpect.spawn(
        sys.executable, command, timeout=60, encoding="utf-8", codec_errors="replace", dimensions=(40, 200)
    ) as chat:
        chat.expect("24 x 16")
        chat.expect_exact(prompt)
        chat.send("What is tt\x7f?\r")  # with a backspace
        chat.expect(begun)
        chat.sendintr()
        chat.expect(r"computed: 9\d text tokens, 1 image; known: .*\(stopped\)")
        chat.expect_exact(prompt)
        chat.send("/li\t")
        chat.expect_exact("st")
        chat.send("\r")
        chat.expect(r"question 1: What is t\?")
        chat.expect_exact(prompt)
        chat.send("\x1b[A\x1b[A\r")  # up twice: the question again
        chat.expect(begun)
        chat.sendintr()
        chat.expect("stopped")
        chat.expect_exact(prompt)
        chat.send("a line that is dropped")
        chat.sendintr()
        chat.expect_exact(prompt)
        chat.send("/quit\r")
        chat.expect(pexpect.EOF)
        chat.wait()
        assert chat.exitstatus == 0, chat.before
    assert "What is t?" in (tmp_path / "visualchat_history").read_text()
