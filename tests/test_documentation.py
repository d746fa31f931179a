"""
The documentation as it is written: Python blocks run, examples of data are read, and commands have the scripts and
flags that they name. The commands run for real in the tests of `RUN_BY`; the code of a model card in `test_hub.py`.
"""

import itertools
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import training_arguments
import training_resume
from accelerate.commands.launch import launch_command_parser
from conftest import draw_picture, make_config, make_model, make_processor, pixels, tokens
from test_remote_code import REPOSITORY
from torch.distributed.run import get_args_parser

from modeling_visualchat import PROJECTORS, VisualChatForConditionalGeneration
from processing_visualchat import load_conversations, read_mixture_config
from processing_visualchat.evaluation import METRICS, ROBUSTNESS, SUITES


PAGES = {
    str(page.relative_to(REPOSITORY)): page.read_text()
    for page in sorted([*REPOSITORY.glob("README*.md"), *REPOSITORY.glob("examples/**/*.md")])
}
RUN_BY = {
    "chat.py": "test_finetune.py",
    "convert_deepspeed_visualchat.py": "test_convert_deepspeed.py",
    "convert_llava.py": "test_convert_llava.py",
    "data.py": "test_benchmark.py",
    "demo.py": "test_study_pictures.py",
    "attention.py": "test_benchmark.py",
    "evaluate.py": "test_evaluation.py",
    "extract_qwen_vl_vision.py": "test_qwen_vision.py",
    "finetune.py": "test_finetune.py",
    "conversations.py": "test_benchmark.py",
    "generate.py": "test_generate.py",
    "join.py": "test_model_card.py",
    "llava.py": "test_benchmark.py",
    "memory.py": "test_planner.py",
    "merge_adapter.py": "test_merge_adapter.py",
    "plan.py": "test_planner.py",
    "pretrained.py": "test_study_pictures.py",
    "processing_visualchat.doctor": "test_doctor.py",
    "run.py": "test_study.py",
    "serve.py": "test_serve.py",
    "serve_load.py": "test_serve.py",
    "serve_replicas.py": "test_serve_replicas.py",
    "tables.py": "test_study.py",
    "web_demo.py": "test_web_demo.py",
}
OTHERS = ("lmms_eval", "run.py --data BLINK", "transformers serve")  # programs that are not ours


class Parsed(BaseException):
    """Ends a script once its command line is parsed."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The commands in blocks, and those within sentences."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [part.strip() for line in lines for part in line.split(" && ")]
    found += re.findall(r"`((?:python|accelerate launch|torchrun) [^`\n]*(?:\.py| -m )[^`\n]*)`", PAGES[page])
    return [re.sub(r"^(\w+=\S+ )+", "", command) for command in found if command]


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the checkpoints and pictures that the pages name."""
    monkeypatch.chdir(tmp_path)
    for name, attention_type in (("visualchat-digits", "mmca"), ("converted", "causal")):
        make_model(attention_type=attention_type).save_pretrained(name)
        make_processor().save_pretrained(name)
    (tmp_path / "visualchat-digits" / "pictures").mkdir()
    pictures = ["visualchat-digits/pictures/0-is-5.png", "visualchat-digits/pictures/1-is-5.png"]
    for seed, name in enumerate([*pictures, "cat.png", "dog.png", "bird.png"]):
        draw_picture(seed).save(name)
    return tmp_path


def test_the_code_of_the_readme_runs(folder, monkeypatch):
    monkeypatch.setattr("modeling_visualchat.projector_visualchat.PROJECTORS", PROJECTORS.copy())
    assert set(blocks("README_zh.md", "python")) <= set(blocks("README.md", "python"))
    names = {}
    for code in blocks("README.md", "python"):
        exec(code, names)
    session = names["session"]
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[0]["content"][-1]["text"] == "what is their sum?"
    assert len(load_conversations(Path("chat.jsonl"), make_processor())) == 1
    assert len(list((folder / "image_memory").iterdir())) == 2
    model = VisualChatForConditionalGeneration(make_config(projector_type="deep"))
    assert isinstance(model.model.multi_modal_projector, names["DeepProjector"])
    assert model(tokens("I", 4), pixels(0)).logits.shape[1] == 9


def test_the_pictures_of_the_pages_are_there():
    pictures = [
        (REPOSITORY / page).parent / path
        for page, text in PAGES.items()
        for path in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", text)
    ]
    assert len(pictures) > 2 and all(path.is_file() for path in pictures)


def test_the_code_for_another_program_has_a_test():
    (of_another_program,) = blocks("examples/README.md", "python")
    assert "vlmeval" in of_another_program and (REPOSITORY / "tests" / "test_vlmevalkit.py").is_file()


def test_the_examples_of_data_are_read(folder):
    for page in ("README.md", "examples/README.md"):
        record, *edits = blocks(page, "json")
        Path("train.jsonl").write_text(record)
        (conversation,) = load_conversations(Path("train.jsonl"), make_processor())
        assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
    (edits,) = edits
    Path("edits.jsonl").write_text(edits.replace("\n", " "))
    (example,) = SUITES["edits"].load("edits.jsonl")
    assert [each.references for each in example.rounds] == [("a cat",), ("a dog",), ("a dog",), ("a bird",)]
    (mixture,) = blocks("examples/README.md", "yaml")
    Path("mixture.yaml").write_text(mixture)
    assert [source.name for source in read_mixture_config("mixture.yaml").sources][:2] == ["llava", "otter_mimicit_sd"]


def parse(words: list[str], monkeypatch) -> tuple[str, object]:
    """The script of a command, and its arguments as its parser takes them, without the launcher."""
    if words[0] == "python":
        is_module, words = words[1] == "-m", words[1 + (words[1] == "-m") :]
    else:
        parser = get_args_parser() if words[0] == "torchrun" else launch_command_parser()
        launched = parser.parse_args(words[1 if words[0] == "torchrun" else 2 :])
        is_module, words = launched.module, [launched.training_script, *launched.training_script_args]
    assert Path(words[0]).name in RUN_BY, f"No test runs {words[0]}."
    original = ArgumentParser.parse_args

    def stop(*arguments, **options):
        raise Parsed(original(*arguments, **options))

    def stop_finetune(parsed):
        raise Parsed(parsed)

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(training_resume, "find_checkpoint", stop_finetune)
    monkeypatch.setattr(training_arguments, "start_deepspeed", lambda use_cpu: stop_finetune(None))
    monkeypatch.setattr(sys, "argv", words)
    path = REPOSITORY / words[0]
    with pytest.raises(Parsed) as parsed:
        if is_module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=False)
        else:
            assert path.is_file(), f"There is no script {words[0]}"
            monkeypatch.syspath_prepend(str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
    return Path(words[0]).name, parsed.value.args[0]


@pytest.mark.parametrize("page, command", COMMANDS, ids=itertools.starmap("{}: {}".format, COMMANDS))
def test_a_command_has_its_script_and_flags(page, command, monkeypatch, tmp_path):
    words = [word for word in shlex.split(command, comments=True) if word != "…"]
    if not words or any(other in command for other in OTHERS):
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        assert all((REPOSITORY / words[words.index(flag) + 1]).is_file() for flag in ("-c", "-r") if flag in words)
        extras = re.findall(r"\.\[(\w+)\]", command)
        assert all(f'"{extra}":' in (REPOSITORY / "setup.py").read_text() for extra in extras)
    else:
        if any(word.startswith("examples/") for word in words):
            monkeypatch.chdir(tmp_path)
            (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
        script, parsed = parse(words, monkeypatch)
        assert re.search(rf"\b{Path(script).stem}\b", (REPOSITORY / "tests" / RUN_BY[script]).read_text())
        if script == "evaluate.py":
            assert parsed.suite in (None, "NAME", *SUITES)
            assert {*parsed.robustness} <= ROBUSTNESS.keys() and {*(parsed.metrics or ())} <= METRICS.keys()
