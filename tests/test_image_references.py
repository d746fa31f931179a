"""Image references: every kind is a value with one text, which opens itself and knows its digest."""

import base64
import json

import pytest
from conftest import draw_picture
from datasets import Dataset
from test_custom_sources import picture

from processing_visualchat import ImageReference
from processing_visualchat.data.files import digest_of


ENCODED = base64.b64encode(picture(1)).decode()
PIXELS = digest_of(b"(24, 16)" + draw_picture(1).tobytes())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "store.json").write_text(json.dumps({"k#1": ENCODED, "cut": ENCODED[:60]}))
    Dataset.from_dict({"images": [[{"bytes": picture(1), "path": None}]]}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


LOCAL = {"a.png": "file", "store.json#k#1": "archive", "rows.parquet#0.0": "archive"}


@pytest.mark.parametrize(("text", "kind"), LOCAL.items())
def test_images_in_files_open_themselves(folder, text, kind):
    relative = ImageReference.parse(text)
    image = relative.under(folder)
    assert (image.kind, str(relative), str(image)) == (kind, text, f"{folder}/{text}")
    assert image.relative_to(folder) == relative == relative.relative_to(folder) and image.under("/") == image
    assert image.block() == {"type": "image", "path": f"{folder}/{text}"}
    assert ImageReference.from_block(image.block()) == image == ImageReference.parse(str(image))
    assert image.exists() and image.read() == picture(1) and image.digest() == PIXELS
    assert image.open().tobytes() == draw_picture(1).convert("RGB").tobytes()


@pytest.mark.parametrize("text", [ENCODED, f"data:image/png;base64,{ENCODED}"], ids=["base64", "data URI"])
def test_images_inside_their_records_open_themselves(text):
    image = ImageReference.from_base64(text)
    assert image == ImageReference.parse(f"data:image/png;base64,{ENCODED}")
    assert image.kind == "inline" and str(image) == f"inline:{digest_of(picture(1))}" and image.exists()
    assert image.block() == {"type": "image", "base64": text}
    assert ImageReference.from_block(image.block()) == image == ImageReference.parse(str(image))
    assert image.read() == picture(1) and image.digest() == PIXELS
    assert image.under("/root") == image.resolve("/root") == image.relative_to("/root") == image


def test_urls_are_told_apart_by_their_text():
    url, hub = (ImageReference.parse(text) for text in ("https://x.org/a.png", "hf://datasets/user/chats/a.png"))
    assert (url.kind, hub.kind) == ("url", "hub") and url.exists() and hub.exists()
    assert url.block() == {"type": "image", "url": "https://x.org/a.png"}
    assert ImageReference.from_block({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}) == url
    assert ImageReference.from_block(hub.block()) == hub == ImageReference.parse(str(hub))
    assert url.digest() == digest_of(b"https://x.org/a.png") and url.resolve("/root") == url


def test_a_missing_or_broken_image_says_so_and_has_the_digest_of_its_text(folder):
    for text, message in (
        ("gone.png", "No image file at"),
        ("store.json#cut", "holds no image cut of use: an image that is truncated or broken"),
        ("none.json#k", "No image archive at"),
        ("bad\0.png", "No image file at"),
    ):
        image = ImageReference.parse(text).under(folder)
        assert not image.exists() and image.digest() == digest_of(str(image).encode())
        with pytest.raises((ValueError, OSError), match=message):
            image.open()
    with pytest.raises(ValueError, match="is not base64 text: '!!'"):
        ImageReference.from_base64("!!").open()
    assert ImageReference.from_source(7) is None and ImageReference.from_block({"type": "image"}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b/../a.png", "/data/mine/a.png"),
        ("file://a.png", "/data/mine/a.png"),
        ("/data/mine/b/a.png", "/data/mine/b/a.png"),
        ("a.json#../k", "/data/mine/a.json#../k"),
        ("rows.parquet#0.0", "/data/mine/rows.parquet#0.0"),
        ("/other/rows.parquet#0.0", "/other/rows.parquet#0.0"),  # the file of the record itself
        ("../a.png", None),
        ("/data/mine", None),
        ("", None),
        ("/data/mined/a.png", None),
        ("../x.json#k", None),
    ],
)
def test_there_is_one_rule_for_paths(text, expected):
    found = ImageReference.parse(text).resolve("/data/mine", "/other/rows.parquet")
    assert (found and str(found)) == expected


def test_a_path_that_leads_out_may_be_relative_to_the_file_of_its_record():
    for text, expected in (("a.png", "/data/a.png"), ("../a.png", "/data/a.png"), ("../../a.png", None)):
        image = ImageReference.parse(text).resolve("/data", "/data/mine/rows.jsonl")
        assert (image and str(image)) == expected


def test_paths_beside_a_file_on_the_hub_are_on_the_hub():
    folder = "hf://datasets/user/chats"
    image = ImageReference.parse("b/../a.png").resolve(folder)
    assert image == ImageReference.parse(f"{folder}/a.png") and image.kind == "hub"
    for text in ("../a.png", "/a.png"):
        assert ImageReference.parse(text).resolve(folder) is None
