"""From conversations to token ids, pixels and labels, written out by hand where that is possible."""

import base64
import functools
import io
import struct
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, draw_picture, make_processor
from PIL import Image

from processing_visualchat import DataCollatorForVisualChat, VisualChatProcessor, load_image


IMAGES = "<image>" * IMAGE_SEQ_LENGTH
TWO_ROUNDS = """\
You are a powerful vision-language assistant.

### Image 1: <image>
### Question: please describe the image.
### Answer: It's a circle.<eos>

### Image 2: <image>
### Image 3: <image>
### Question: What's the difference between the three?
### Answer: The colors are different.<eos>"""


def picture_block(seed=0):
    return {"type": "image", "image": draw_picture(seed)}


def user(*content):
    blocks = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": blocks}


def assistant(text):
    return {"role": "assistant", "content": text}


def prepare(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **kwargs,
    )


def test_two_rounds_and_three_images(processor, chat):
    assert processor.apply_chat_template(chat) == TWO_ROUNDS
    inputs = prepare(processor, chat)
    assert processor.decode(inputs["input_ids"][0]) == TWO_ROUNDS.replace("<image>", IMAGES)
    assert inputs["pixel_values"].shape == (3, 3, 8, 8)
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == IMAGE_TOKEN_ID).long())
    assert inputs["mm_token_type_ids"].sum() == 3 * IMAGE_SEQ_LENGTH


def byte_ids(text):
    """Ids by hand: printable ASCII follows the three special tokens; a space and a new line have stand-ins."""
    return [{" ": 223, "\n": 201}.get(character, ord(character) - 33 + 3) for character in text]


def test_literal_ids(processor):
    inputs = prepare(processor, [user(picture_block(), "Hi"), assistant("A")])
    assert inputs["input_ids"][0].tolist() == [
        *byte_ids("You are a powerful vision-language assistant.\n\n### Image 1: "),
        *[2, 2, 2, 2, 2],
        *byte_ids("\n### Question: Hi\n### Answer: A"),
        1,
    ]


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([user("Hello?")], "### Question: Hello?\n### Answer:"),
        ([user(picture_block())], "### Image 1: <image>\n### Answer:"),
        (
            [user("Compare", picture_block(), "with", picture_block(), "please.")],
            "### Image 1: <image>\n### Image 2: <image>\n### Question: Compare Image 1 with Image 2 please.\n"
            "### Answer:",
        ),
        ([user("Two", "lines")], "### Question: Two\nlines\n### Answer:"),
        (
            [user("Is ", picture_block(), " brighter than ", picture_block(), "?")],
            "### Image 1: <image>\n### Image 2: <image>\n### Question: Is Image 1 brighter than Image 2?\n### Answer:",
        ),
        (
            [user(picture_block(), "Left:\n", picture_block(), picture_block(), "\nRight:", picture_block())],
            "### Image 1: <image>\n### Image 2: <image>\n### Image 3: <image>\n"
            "### Question: Left:\nImage 2 Image 3\nRight:\n### Image 4: <image>\n### Answer:",
        ),
        (
            [user("Hello?"), assistant("Hi."), user(picture_block(), "And this?")],
            "### Question: Hello?\n### Answer: Hi.<eos>\n\n### Image 1: <image>\n### Question: And this?\n### Answer:",
        ),
        (
            [user(picture_block(), "A?"), assistant([{"type": "text", "text": "B."}]), user("C?")],
            "### Image 1: <image>\n### Question: A?\n### Answer: B.<eos>\n\n### Question: C?\n### Answer:",
        ),
    ],
)
def test_any_mix_of_rounds_and_images(processor, conversation, expected):
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert rendered == "You are a powerful vision-language assistant.\n\n" + expected
    inputs = prepare(processor, conversation, add_generation_prompt=True)
    assert processor.decode(inputs["input_ids"][0]) == rendered.replace("<image>", IMAGES)


def test_a_system_message_replaces_the_instruction(processor):
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        messages = [{"role": "system", "content": content}, user("Hi")]
        assert processor.apply_chat_template(messages) == "Be brief.\n\n### Question: Hi\n"


def test_openai_content(processor, chat):
    buffer = io.BytesIO()
    draw_picture(0).save(buffer, format="PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    openai = [user({"type": "image_url", "image_url": {"url": address}}, "What is it?")]
    ours = [user(picture_block(0), "What is it?")]
    actual, expected = prepare(processor, openai), prepare(processor, ours)
    assert torch.equal(actual["input_ids"], expected["input_ids"])
    assert torch.equal(actual["pixel_values"], expected["pixel_values"])


def test_a_batch_pads_and_keeps_the_images_of_each_row_in_order(processor, chat):
    batch = [chat[:1], [user("No image at all.")], [user(picture_block(5), "a", picture_block(6))]]
    inputs = prepare(processor, batch, add_generation_prompt=True)
    alone = [prepare(processor, conversation, add_generation_prompt=True) for conversation in batch]
    assert inputs["pixel_values"].shape[0] == 3
    assert torch.equal(inputs["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[2]["pixel_values"]]))
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        assert torch.equal(inputs["input_ids"][row][kept], alone[row]["input_ids"][0])


def test_labels_are_the_answers_and_their_end(processor, chat):
    batch = [chat, [user("Hello?"), assistant("Hi.")]]
    inputs = prepare(processor, batch, return_labels=True)
    labels = inputs["labels"]
    assert labels.shape == inputs["input_ids"].shape and "assistant_masks" not in inputs
    is_answer = labels != -100
    assert torch.equal(labels[is_answer], inputs["input_ids"][is_answer])
    learned = [processor.decode(row[row != -100]) for row in labels]
    assert learned == [" It's a circle.<eos> The colors are different.<eos>", " Hi.<eos>"]


@pytest.mark.parametrize("unlearned", [{"weight": 0}, {"loss": False}])
@pytest.mark.parametrize("packing", [False, True])
def test_an_answer_without_a_loss_has_no_labels(processor, chat, unlearned, packing):
    """In padded and in packed batches; weights of 1 change nothing, and only the labels differ."""
    examples = [
        {"messages": [chat[0], {**chat[1], **unlearned}, *chat[2:]]},
        {"messages": [user("Hello?"), {**assistant("Hi."), "weight": 1, "loss": True}]},
    ]
    collator = DataCollatorForVisualChat(processor, packing=packing)
    batch, plain = collator(examples), collator([{"messages": chat}, examples[1]])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    labels = batch["labels"]
    assert processor.decode(labels[labels != -100]) == " The colors are different.<eos> Hi.<eos>"


def test_rounds_without_a_loss_are_no_reason_to_keep_a_conversation(processor, chat):
    """What is left of an over-length one is skipped if nothing of it is learned."""
    messages = [*chat[:3], {**chat[3], "weight": 0}]
    collator = DataCollatorForVisualChat(processor, max_length=200, overlong="drop_first_rounds")
    assert (collator([{"messages": messages}])["labels"] == -100).all() and collator.counts["skipped"] == 1
    assert (collator([{"messages": chat}])["labels"] != -100).any() and collator.counts["shortened"] == 1


def test_labels_with_a_template_that_reads_no_weights_and_ends_no_answer(processor):
    """The answers are found without its marks, and their end is added."""
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    first, second = ({"role": "user", "content": text} for text in ("Hi", "So"))
    messages = [first, {**assistant("A."), "weight": 0}, second, assistant("B.")]
    inputs = prepare(processor, messages, return_labels=True, chat_template=template)
    labels = inputs["labels"][0]
    assert processor.decode(inputs["input_ids"][0]) == "HiA.<eos>SoB.<eos>"
    assert processor.decode(labels[labels != -100]) == "B.<eos>"


def test_an_answer_that_a_template_does_not_render_is_an_error(processor):
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="The answer of message 1 is not found in"):
        prepare(processor, [user("Hi"), assistant("A.")], return_labels=True, chat_template=template)


@pytest.mark.parametrize("token", ["<eos>", "<pad>"])
def test_a_special_token_in_words_is_named(processor, token):
    """It would end the answer, and the model would learn to end it there."""
    for messages in ([user("Hi"), assistant(f"A{token}.")], [user(f"Hi{token}"), assistant("A.")]):
        with pytest.raises(ValueError, match=f"holds a literal {token} in its text, which is a special token"):
            prepare(processor, messages, return_labels=True)
        inputs = prepare(processor, messages, sanitize_control_tokens=True)
        assert (inputs["input_ids"] == processor.tokenizer.eos_token_id).sum() == 1


def test_assistant_masks_agree_with_the_labels(processor, chat):
    labels = prepare(processor, chat, return_labels=True)["labels"]
    masks = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert torch.equal(torch.tensor(masks["assistant_masks"]).bool(), labels != -100)


def test_a_prompt_is_the_beginning_of_the_finished_conversation(processor, chat):
    prompt = prepare(processor, chat[:3], add_generation_prompt=True)["input_ids"][0]
    whole = prepare(processor, chat)["input_ids"][0]
    assert torch.equal(whole[: len(prompt)], prompt)


def test_continue_the_final_message(processor):
    rendered = processor.apply_chat_template([user("Hi"), assistant("It is")], continue_final_message=True)
    assert rendered.endswith("### Answer: It is")


def test_saved_and_loaded_it_does_the_same(processor, chat, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VisualChatProcessor.from_pretrained(tmp_path)
    for key, value in prepare(processor, chat, return_labels=True).items():
        assert torch.equal(prepare(loaded, chat, return_labels=True)[key], value)
    assert (tmp_path / "chat_template.jinja").is_file()


def test_the_collator(processor, chat):
    collator = DataCollatorForVisualChat(processor)
    batch = collator([{"messages": chat}, {"messages": [user("Hello?"), assistant("Hi.")]}])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["mm_token_type_ids"].shape
    assert batch["pixel_values"].shape[0] == 3
    assert batch["attention_mask"][1, 0] == 1 and batch["attention_mask"][1, -1] == 0
    assert "pixel_values" not in collator([{"messages": [user("Hello?"), assistant("Hi.")]}])
    with pytest.raises(ValueError, match="no answer to learn from"):
        collator([{"messages": [user("Hello?")]}])
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than max_length=20"):
        DataCollatorForVisualChat(processor, max_length=20)([{"messages": chat}])


PIXEL = (200, 100, 50)


def solid(mode, color, **kwargs):
    image = Image.new(mode, (6, 4), color)
    for name, value in kwargs.items():
        setattr(image, name, value)
    return image


def palette_image():
    return Image.new("RGB", (6, 4), PIXEL).quantize(4)


def half_transparent():
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.paste((*PIXEL, 255), (0, 0, 3, 4))
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("L", 77), (77, 77, 77)),
        (solid("1", 1), (255, 255, 255)),
        (palette_image(), PIXEL),
        (solid("RGBA", (*PIXEL, 255)), PIXEL),
        (solid("LA", (77, 255)), (77, 77, 77)),
        (solid("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 6), 40000, dtype=np.uint16)), (156, 156, 156)),
        (Image.fromarray(np.full((4, 6), 0.5, dtype=np.float32)), (128, 128, 128)),
        (np.full((4, 6, 3), PIXEL, dtype=np.uint8), PIXEL),
        (np.full((3, 4, 6), 0.5, dtype=np.float32), (128, 128, 128)),
        (np.full((4, 6), 77, dtype=np.uint8), (77, 77, 77)),
        (np.full((4, 6), True), (255, 255, 255)),
        (Image.fromarray(np.full((4, 6), 100, dtype=np.uint16)), (25, 25, 25)),
        (Image.fromarray(np.full((4, 6), 4000, dtype=np.uint16)), (249, 249, 249)),
        (Image.fromarray(np.full((4, 6), 4000, dtype=np.int32)), (249, 249, 249)),
        (np.full((4, 6, 3), 16000, dtype=np.uint16), (249, 249, 249)),
        (Image.fromarray(np.full((4, 6), 100, dtype=np.int32)), (100, 100, 100)),
        (solid("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    ],
    ids=[
        "grey",
        "1-bit",
        "palette",
        "RGBA",
        "LA",
        "transparent",
        "16-bit",
        "float",
        "array",
        "float array",
        "grey array",
        "bool array",
        "10 bits in 16",
        "12 bits in 16",
        "12 bits in 32",
        "14 bits in an array",
        "byte in 32-bit",
        "CMYK",
    ],
)
def test_any_mode_becomes_rgb(image, expected):
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.size == (6, 4)
    assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= 1


def test_transparency_is_put_on_white():
    loaded = load_image(half_transparent())
    assert loaded.getpixel((1, 1)) == PIXEL and loaded.getpixel((5, 1)) == (255, 255, 255)


def test_an_exif_rotated_photograph_is_put_upright(tmp_path):
    image = Image.new("RGB", (6, 4), "white")
    image.paste("red", (0, 0, 3, 4))  # the left half, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    loaded = load_image(tmp_path / "rotated.png")
    assert loaded.size == (4, 6)
    assert loaded.getpixel((1, 0)) == (255, 0, 0) and loaded.getpixel((1, 5)) == (255, 255, 255)


def test_a_16_bit_png_from_disk(tmp_path):
    gradient = np.linspace(0, 65535, 24).round().astype(np.uint16).reshape(4, 6)
    Image.fromarray(gradient).save(tmp_path / "deep.png")
    values = np.asarray(load_image(tmp_path / "deep.png"))[:, :, 0]
    assert np.abs(values - gradient / 257).max() <= 0.5


def test_base64_may_be_broken_into_lines():
    buffer = io.BytesIO()
    solid("RGB", PIXEL).save(buffer, format="PNG")
    text = base64.encodebytes(buffer.getvalue()).decode()
    for source in (text, "data:image/png;base64," + text):
        assert "\n" in source and load_image(source).getpixel((0, 0)) == PIXEL


def test_an_image_by_address_is_treated_as_one_by_path(tmp_path):
    half_transparent().save(tmp_path / "half.png")
    (tmp_path / "words.png").write_text("words")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        loaded = load_image(f"{address}/half.png")
        with pytest.raises(ValueError, match=r"words\.png is not an image"):
            load_image(f"{address}/words.png")
        with pytest.raises(ValueError, match=r"nowhere\.png cannot be downloaded: .*404"):
            load_image(f"{address}/nowhere.png")
        server.shutdown()
    assert loaded.getpixel((1, 1)) == PIXEL and loaded.getpixel((5, 1)) == (255, 255, 255)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_an_orientation_that_cannot_be_read_is_none(tmp_path):
    solid("RGB", PIXEL).save(tmp_path / "odd.png", exif=b"Exif\x00\x00garbage")
    assert load_image(tmp_path / "odd.png").size == (6, 4)


def test_the_processor_takes_grey_and_colour_images_together(processor):
    inputs = prepare(processor, [user({"type": "image", "image": solid("L", 77)}, picture_block())])
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)


def write_bomb(path):
    """A PNG that says it is 30,000 pixels square and holds next to nothing."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


def write_truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "No image file at .*broken.png; check the path"),
        (lambda path: path.write_bytes(b""), ValueError, r"broken.png is empty \(0 bytes\)"),
        (lambda path: path.write_text("not an image"), ValueError, "broken.png is not an image that Pillow can read"),
        (write_truncated, ValueError, "broken.png is truncated or broken"),
        (write_bomb, ValueError, "broken.png has too many pixels to be opened safely"),
    ],
    ids=["missing", "empty", "not an image", "truncated", "decompression bomb"],
)
def test_a_bad_image_file_is_named(processor, tmp_path, write, error, message):
    path = tmp_path / "broken.png"
    write(path)
    with pytest.raises(error, match=message):
        prepare(processor, [user({"type": "image", "path": str(path)}, "What is it?")])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([assistant("Hello.")], "has no user turn"),
        (
            [assistant("Hello."), user("Hi")],
            "has 'assistant' at turn 1 where 'user' is due: it must start with the user",
        ),
        ([{"role": "system", "content": "Hi."}], "has no user turn"),
        (
            [user("Hi"), {"role": "human", "content": "Hi"}],
            "message 1 has the unknown role 'human'; use one of system, user",
        ),
        ([user("a"), user("b")], "has 'user' at turn 2 where 'assistant' is due"),
        ([user("a"), {"role": "system", "content": "x"}], "message 1 is a system message; it can only be the first"),
        ([user("an <image> in words")], "message 0 holds a literal <image> in its text"),
        ([user("Hi"), assistant("<image>")], "message 1 holds a literal <image>"),
        ([user("Hi"), {"role": "assistant", "content": [picture_block()]}], "message 1 shows an image as assistant"),
        ([user({"type": "video", "path": "x"})], "message 0 has a block of type 'video'"),
        ([user({"type": "image"})], "message 0 has an image without a source"),
        ([user({"type": "image", "path": "a", "url": "b"})], "more than one source"),
        ([user({"type": "image", "path": "a", "number": "2"})], "with the number '2'; expected one from 1 up"),
        ([{"role": "user", "content": ""}], "message 0 must have text or a list of blocks"),
        ([{"role": "user"}], "message 0 must have a role and a content"),
    ],
)
def test_a_bad_conversation_is_named(processor, conversation, message):
    with pytest.raises(ValueError, match=message):
        prepare(processor, conversation)


def test_an_empty_conversation_is_named(processor):
    for conversation in ([], None, {"role": "user", "content": "Hi"}):
        with pytest.raises(ValueError, match="list of messages that is not empty"):
            processor.apply_chat_template(conversation)


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_marks_and_images_have_to_match(processor, marks, images):
    pictures = [draw_picture(seed) for seed in range(images)] or None
    with pytest.raises(ValueError, match="<image>"):
        processor(text="<image>" * marks + "Hi", images=pictures)


def test_each_text_has_its_own_images(processor):
    pictures = [draw_picture(seed) for seed in range(2)]
    with pytest.raises(ValueError, match="Text 0 of the batch holds 1 <image> marks, and 2 images were passed for it"):
        processor(text=["<image>a", "<image>c"], images=[pictures, []])


def test_null_keys_are_no_keys(processor):
    """As `datasets` fills them in to give all blocks one schema."""
    content = [
        {"type": "image", "image": draw_picture(0), "url": None, "text": None},
        {"type": "text", "text": "Hi", "path": None, "image": None},
    ]
    actual = prepare(processor, [{"role": "user", "content": content}])
    assert torch.equal(actual["input_ids"], prepare(processor, [user(picture_block(0), "Hi")])["input_ids"])


def test_a_placeholder_in_words_can_be_sanitized(processor):
    conversation = [user(picture_block(), "what does <image> mean?")]
    inputs = prepare(processor, conversation, sanitize_control_tokens=True)
    assert inputs["mm_token_type_ids"].sum() == IMAGE_SEQ_LENGTH
    assert "what does <image> mean?" in processor.decode(inputs["input_ids"][0])


def test_a_sequence_over_the_length_of_the_model_is_refused(processor):
    short = make_processor()
    short.tokenizer.model_max_length = 80
    with pytest.raises(ValueError, match=r"has \d+ tokens, 5 for an image; the model reads 80"):
        prepare(short, [user(picture_block(), "a" * 40)])
    batch = [[user("short")], [user(picture_block(), "a" * 40)]]
    with pytest.raises(ValueError, match=r"Text 1 of the batch has \d+ tokens"):
        prepare(short, batch)
    with pytest.raises(ValueError, match="image"):
        short(text="<image> words", images=draw_picture(0), truncation=True, max_length=3)


def test_a_processor_that_cannot_work_is_refused(processor):
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    with pytest.raises(ValueError, match="image_seq_length must be the number of tokens of an image"):
        VisualChatProcessor(image_processor, tokenizer)
    with pytest.raises(ValueError, match="The tokenizer has no token <picture>"):
        VisualChatProcessor(image_processor, tokenizer, image_seq_length=5, image_token="<picture>")
