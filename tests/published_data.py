"""The thirteen published sources in small: their layouts and schemas, with the faults that real copies have."""

import base64
import io
import json
from pathlib import Path

from conftest import draw_picture


def llava(image, *turns):
    speakers = {"q": "human", "a": "gpt"}
    return {
        "id": image.removesuffix(".jpg"),
        "image": image,
        "conversations": [{"from": speakers.get(turn[0], turn[0]), "value": turn[1]} for turn in turns],
    }


def coco(number):
    return f"{number:012d}.jpg"


DETAIL = [
    llava(coco(1), ("q", "What is shown?\n<image>"), ("a", "A bus.")),
    llava(coco(2), ("q", "<image>\nDescribe <image> it."), ("a", "A dog.")),  # tag twice
    llava(coco(3), ("q", "No tag here?"), ("a", "None.")),
    llava(coco(99), ("q", "<image>\nA file that is not there?"), ("a", "Yes.")),
    llava("../../secret.jpg", ("q", "<image>\nOut?"), ("a", "Out.")),
]
REASONING = [
    llava(coco(1), ("q", "<image>\nWhy?"), ("a", "Because.")),
    {"id": "x", "image": [coco(1)], "conversations": []},
    llava(coco(2), ("q", "<image>\nEmpty?"), ("a", "  ")),
]
DIALOGUES = [
    llava(coco(1), ("q", "<image>\nFirst?"), ("a", "One."), ("q", "Second?"), ("a", "Two."), ("q", "Third?")),
    llava(coco(2), ("a", "I begin."), ("q", "What?\n<image>"), ("a", "That.")),
    llava(coco(4), ("q", "<image>\nWho?"), ("narrator", "Somebody.")),
]


def mimicit(answers, images, related=(), instruction="What changed? ({})"):
    return {
        name: {
            "instruction": instruction.format(name),
            "answer": answer,
            "image_ids": images,
            "rel_ins_ids": list(related),
        }
        for name, answer in answers.items()
    }


def ids(prefix, *numbers):
    return [f"{prefix}{number}" for number in numbers]


CGD = {
    **mimicit({"CGD_1": "The bus left."}, ids("CGD_IMG_", f"{1:012d}", f"{2:012d}"), ["CGD_2", "CGD_9", "CGD_3"]),
    **mimicit({"CGD_2": "A dog came."}, ids("CGD_IMG_", f"{1:012d}", f"{2:012d}"), ["CGD_1"]),
    **mimicit({"CGD_3": "Other images."}, ids("CGD_IMG_", f"{3:016d}", f"{4:016d}")),  # 16 digits
    **mimicit({"CGD_4": "Missing."}, ids("CGD_IMG_", f"{99:012d}", f"{1:012d}")),
    **mimicit({"CGD_5": "Odd."}, ["IMG_5"]),
}
SD = {
    **mimicit({"SD_1": "The car left."}, ids("SD_IMG_", "1_1", "1_2"), instruction="<image>What changed?"),
    **mimicit({"SD_2": "It is text alone."}, None, instruction="Say so."),
    **mimicit({"SD_3": ""}, ids("SD_IMG_", "1_1")),
}
SN = mimicit({"SN_1": "A room."}, ids("SN_IMG_scene0000_00_", "000000", "color_000100"))
TVC = mimicit({"TVC_1": "A talk."}, ids("TVC_IMG_castle_s01e01_seg01_clip_00_", "00001"))
VST = {
    **mimicit({"VST_1": "A story."}, ids("VST_IMG_", 1, 2, 3)),
    **mimicit({"VST_2": "Lost."}, ids("VST_IMG_", 1, 77, 3)),
}
ARCHIVES = {
    "SD": ids("SD_IMG_", "1_1", "1_2"),
    "SN": ids("SN_IMG_scene0000_00_color_", "000000", "000100"),
    "TVC": ids("TVC_IMG_castle_s01e01_seg01_clip_00_", "00001"),
    "VST": ids("VST_IMG_", 1, 2, 3),
}


def tag(*numbers):
    return [f"IMAGE#{number}<Img><ImageHere></Img>" for number in numbers]


def turn(role, content, *images):
    return {"role": role, "content": content, "images": [{"image_id": image, "caption": "…"} for image in images]}


SPARKLES_CC = [
    {
        "dialogue": [
            turn("user", "Compare {} and {}.".format(*tag(14, 1417)), "14", 1417),
            turn("assistant", "IMAGE#14 is darker. IMAGE#1417 is not."),
            turn("user", "And {}, beside IMAGE#1417?".format(*tag(15)), "15"),
            turn("assistant", "It is as dark as IMAGE#14."),
            turn("user", "So?"),
        ]
    },
    {"dialogue": [turn("user", "IMAGE#14?", "15"), turn("assistant", "No.")]},
    {"dialogue": [turn("assistant", "I begin."), turn("user", "No.")]},
]
SPARKLES_VG = [
    {"dialogue": [turn("user", "What is {}?".format(*tag(7)), "7"), turn("assistant", "IMAGE#7 is a cat.")]},
    {"dialogue": [turn("user", "What is {}?".format(*tag(8)), "8"), turn("assistant", "Not there.")]},
    {"raw": []},
]


def aokvqa(split="train", **changes):
    record = {
        "split": split, "image_id": 1, "question_id": "q1", "question": "What is he awaiting?",
        "choices": ["bus", "cab", "train", "dog"], "correct_choice_idx": 1, "direct_answers": ["cab"],
        "rationales": ["he stands at a curb with luggage", "A cab comes."],
    }  # fmt: skip
    return {**record, **changes}


AOKVQA = [aokvqa(), aokvqa("test"), aokvqa(correct_choice_idx=4), aokvqa(rationales=[" "])]


def captioned(split, number, *captions):
    folder = "val2014" if split in ("restval", "val") else "train2014"
    name = f"COCO_{folder}_{number:012d}.jpg"
    sentences = [{"raw": caption} for caption in captions]
    return {"filepath": folder, "filename": name, "split": split, "cocoid": number, "sentences": sentences}


CAPTIONS = [
    captioned("train", 1, "", " a dog runs"),
    captioned("restval", 2, "A cat."),
    captioned("val", 3, "A val image."),
    captioned("test", 4, "A test image."),
    captioned("train", 5),
]


def book(split, questions, answers):
    return {"imageURL": "http://x/1.gif", "questions": questions, "answers": answers, "title": "T", "split": split}


BOOKS = {
    "0001": book(1, ["Who wrote this?", "What genre?", "Which year?"], ["A. Author", ""]),
    "0002": book(2, ["Who?"], ["B"]),
    "0003": book(3, ["Who?"], ["C"]),
    "0004": book(1, ["A file that is not there?"], ["Yes"]),
    "../5": book(1, ["Out?"], ["Out"]),
}
CAPTIONED = {
    "annotations": [{"image_id": "2", "caption": " A quiet lake. "}, {"image_id": 3, "caption": ""}, {"caption": "x"}]
}


def encoded(seed, url_safe=False):
    picture = io.BytesIO()
    draw_picture(seed).save(picture, "PNG")
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    return encode(picture.getvalue()).decode()


def write_published_data(root: Path) -> Path:
    """All of it under one data root."""
    annotations = {
        "llava/detail_23k.json": DETAIL,
        "llava/complex_reasoning_77k.json": REASONING,
        "llava/conversation_58k.json": DIALOGUES,
        **{
            f"MIMIC-IT/{name}_instructions.json": {"meta": {}, "data": data}
            for name, data in {"CGD": CGD, "SD": SD, "SN": SN, "TVC": TVC, "VST": VST}.items()
        },
        **{
            f"MIMIC-IT/{name}.json": {image: encoded(seed, seed == 1) for seed, image in enumerate(images)}
            for name, images in ARCHIVES.items()
        },
        "SparklesDialogueCC/annotations/SparklesDialogueCC.json": SPARKLES_CC,
        "SparklesDialogueCC/annotations/SparklesDialogueCC_turn2_2img.json": {"another": "schema"},
        "SparklesDialogueVG/annotations/SparklesDialogueVG.json": SPARKLES_VG,
        "aokvqa/annotations/aokvqa_v1p0_train.json": AOKVQA,
        "coco_caption/dataset.json": {"dataset": "coco", "images": CAPTIONS},
        "OCR_VQA/dataset.json": BOOKS,
        "cc_sbu_align/filter_cap.json": CAPTIONED,
    }
    for name, contents in annotations.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(contents))
    pictures = [f"coco/train2017/{coco(number)}" for number in (1, 2, 3, 4)]
    pictures += [f"SparklesDialogueCC/images/{number}.jpg" for number in (14, 15, 1417)]
    pictures += ["SparklesDialogueVG/images/7.jpg", "OCR_VQA/images/0001.jpg", "cc_sbu_align/image/2.jpg"]
    folders = ["", "val2014/", *["train2014/"] * 3]  # both layouts
    pictures += [f"coco/2014/{folder}{record['filename']}" for folder, record in zip(folders, CAPTIONS)]
    for seed, name in enumerate(pictures):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw_picture(seed).save(root / name)
    return root
