"""The model file for VLMEvalKit in examples/README.md, with a stand-in for its base class."""

import re
import sys
from types import ModuleType

from conftest import draw_picture, make_model, make_processor
from test_finetune import EXAMPLES


def test_the_documented_file_answers_an_interleaved_message(tmp_path, monkeypatch):
    model, processor = make_model(), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for index, path in enumerate(paths):
        draw_picture(index).save(path)
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {})
    monkeypatch.setitem(sys.modules, base.__name__, base)
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    exec(code, names := {})

    parts = [("image", paths[0]), ("text", "Is it like"), ("image", paths[1]), ("text", "?")]
    model_of_kit = names["VisualChat"](str(tmp_path), max_new_tokens=8)
    answer = model_of_kit.generate_inner([{"type": kind, "value": value} for kind, value in parts], "BLINK")

    content = [{"type": kind, {"image": "path", "text": "text"}[kind]: value} for kind, value in parts]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert answer == processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer != model_of_kit.generate_inner([{"type": "text", "value": "What is <image>?"}])
