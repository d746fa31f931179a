"""The folder of a run: its settings, and the answers as JSON lines that a second start continues."""

import json
from collections.abc import Callable, Container, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm


SETTINGS, ANSWERS = "settings.json", "answers.jsonl"
LONGEST_WAIT = timedelta(days=7)  # of a process for the others


class ChangedSettingsError(ValueError):
    """The folder holds the answers of a run with other settings."""


def check_settings(folder: Path, settings: dict[str, Any], free: Container[str] = ()) -> None:
    """Writes the settings of a run, or compares them, but for `free` ones, with those of its answers."""
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
            f"{folder} holds the answers of another run: {'; '.join(differences)}. Choose another output, or remove "
            "this folder."
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
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON; remove it, and it is made again.") from error
    return found


def part_file(folder: Path, process: int, num_processes: int) -> Path:
    """The file that a process appends its answers to."""
    return folder / (ANSWERS if num_processes == 1 else f"answers-{process}-of-{num_processes}.jsonl")


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """Writes a whole file of JSON lines."""
    write_whole(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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
    write_lines(folder / ANSWERS, lines)
    for file in files[1:]:
        file.unlink()
    return lines


def answer_all(
    folder: Path,
    batches: Sequence[Sequence[Any]],
    answer: Callable[[Sequence[Any]], Iterable[dict]],
    order: dict[str, int],
    state: PartialState,
) -> list[dict]:
    """
    Answers what has no answer yet, or an error, one batch of every process; returns all lines in their order, on the
    main process. Batches are those of all items, so that a conversation has the same company, and the same rounding,
    however often the run was interrupted.
    """
    if state.is_main_process:
        join_files(folder, order)
    state.wait_for_everyone()
    known = {line["id"] for line in read_lines(folder / ANSWERS) if "error" not in line}
    file = part_file(folder, state.process_index, state.num_processes)
    own = batches[state.process_index :: state.num_processes]
    for batch in tqdm(own, desc="Answering", unit="batch", disable=not state.is_main_process):
        if any(item.id not in known for item in batch):
            append(file, (line for line in answer(batch) if line["id"] not in known))
    state.wait_for_everyone()
    return join_files(folder, order) if state.is_main_process else []
