"""The folder of an evaluation: its settings, and the answers as JSON lines that a second start continues."""

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any


SETTINGS, ANSWERS = "settings.json", "answers.jsonl"


class ChangedSettingsError(ValueError):
    """The folder holds the answers of an evaluation with other settings."""


def check_settings(folder: Path, settings: dict[str, Any], free: Container[str] = ()) -> None:
    """Writes the settings of an evaluation, or compares them, but for `free` ones, with those of its answers."""
    file = folder / SETTINGS
    if not file.exists():
        if (folder / ANSWERS).exists():
            raise ChangedSettingsError(f"{folder} holds {ANSWERS} without {SETTINGS}; choose another output folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    known = json.loads(file.read_text())
    differences = [
        f"{name} was {known.get(name)!r}, is {settings.get(name)!r}"
        for name in {**known, **settings}
        if name not in free and known.get(name) != settings.get(name)
    ]
    if differences:
        raise ChangedSettingsError(
            f"{folder} holds the answers of another evaluation: {'; '.join(differences)}. Choose another output "
            "folder, or remove this one."
        )


def write_whole(file: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def read_lines(file: Path) -> list[dict]:
    """The objects of a file of JSON lines; a last line that was torn off is removed from it."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_whole(file, whole.decode())
    return [json.loads(line) for line in whole.splitlines()]


def part_file(folder: Path, process: int, num_processes: int) -> Path:
    """The file that a process appends its answers to."""
    return folder / (ANSWERS if num_processes == 1 else f"answers-{process}-of-{num_processes}.jsonl")


def append(file: Path, lines: Iterable[dict]) -> None:
    """Appends objects to a file of JSON lines, each of them whole."""
    with file.open("a", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()


def join_files(folder: Path, order: dict[str, int]) -> list[dict]:
    """All answers of a folder in the order of their `id`, joined into one file; those of the processes are removed."""
    files = [folder / ANSWERS, *sorted(folder.glob("answers-*-of-*.jsonl"))]
    answers = {line["id"]: line for file in files for line in read_lines(file)}
    lines = sorted(answers.values(), key=lambda line: order[line["id"]])
    write_whole(folder / ANSWERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for file in files[1:]:
        file.unlink()
    return lines
