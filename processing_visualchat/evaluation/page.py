"""The answers of an evaluation as one self-contained page: images, rounds, answers, references and scores."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.pages import format_html_table, format_image, format_list, format_page
from ..data.tables import Row
from .answer_file import write_whole
from .pictures import THUMBNAILS


STYLE = """
.conversation { border: 1px solid #ccc; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
.conversation img { display: inline-block; vertical-align: top; margin: .2rem .4rem .2rem 0;
    min-height: 56px; max-height: 160px; }
.round { border-left: 4px solid #bbb; padding-left: .7rem; margin: .7rem 0; }
.round p { margin: .15rem 0; white-space: pre-wrap; }
.right { border-color: #3a9d3a; } .wrong { border-color: #c33; } .partly { border-color: #d90; }
.answer { font-weight: 600; }
.right .answer { color: #226f22; } .wrong .answer { color: #a11; }
.label { color: #777; font-weight: 400; }
.filter { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ddd; }
.filter label { display: inline-block; padding: .25rem .7rem; cursor: pointer; }
body:has(#show-wrong:checked) .conversation:not(:has(.wrong)) { display: none; }
body:has(#show-right:checked) .conversation:has(.wrong, .partly, .open) { display: none; }
"""
FILTERS = {"all": "all", "wrong": "with a wrong answer", "right": "all right"}


def write_page(
    folder: Path,
    results: Mapping[str, Any],
    tables: Mapping[str, Sequence[Row]],
    lines: Sequence[dict],
    scores: Mapping[str, Sequence[Sequence[float | None]]],
) -> Path:
    """Writes `index.html`: the tables, and the conversations with the scores of their rounds by metric."""
    title = f"{results['suite']}: {results['checkpoint']}"
    shown = f"{len(lines):,} of {results['num_conversations']:,} conversations"
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{name}"{" checked" * (name == "all")}> {text}</label>'
        for name, text in FILTERS.items()
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        format_list(results["notes"]),
        *(format_html_table(html.escape(name), rows) for name, rows in tables.items()),
        f'<h2>Conversations</h2><div class="filter">{shown}: {buttons}</div>',
        *(
            _format_conversation(folder, line, {metric: values[number] for metric, values in scores.items()})
            for number, line in enumerate(lines)
        ),
    ]
    write_whole(folder / "index.html", format_page(title, STYLE, parts))
    return folder / "index.html"


def _format_conversation(folder: Path, line: dict, scores: Mapping[str, Sequence[float | None]]) -> str:
    groups = ", ".join(f"{name}: {value}" for name, value in line["groups"].items())
    parts = [f'<p class="where">{html.escape(line["key"])}{" · " * bool(groups)}{html.escape(groups)}</p>']
    num_shown = 0
    for number, asked in enumerate(line["rounds"]):
        new = range(num_shown, asked.get("num_shown", asked["num_images"]))  # an edit takes images away
        images = "".join(_format_thumbnail(folder, line["images"][image], image + 1) for image in new)
        num_shown = new.stop
        parts.append(_format_round(asked, images, {metric: values[number] for metric, values in scores.items()}))
    return f'<div class="conversation">{"".join(parts)}</div>'


def _format_round(asked: dict, images: str, scores: Mapping[str, float | None]) -> str:
    deciding = next((score for score in scores.values() if score is not None), None)  # the first metric decides
    kind = "open" if deciding is None else "right" if deciding >= 1 else "wrong" if deciding == 0 else "partly"
    options = [f"{chr(65 + place)}. {text}" for place, text in enumerate(asked["choices"])]
    found = ", ".join(f"{metric} {'-' if score is None else f'{score:.2f}'}" for metric, score in scores.items())
    if "tokens" in asked:
        found += f"; {asked['tokens']:,} tokens computed, {asked['tokens_anew']:,} anew"
    lines = [
        ("question", asked["question"], ""),
        ("options", "\n".join(options), ""),
        ("answer", asked["answer"] or f"(none) {asked.get('fault', '')}", "answer"),
        ("reference", " / ".join(asked["references"]), ""),
        ("scores", found, "where"),
    ]
    texts = "".join(
        f'<p class="{kind_of_line}"><span class="label">{label}:</span> {html.escape(text)}</p>'
        for label, text, kind_of_line in lines
        if text
    )
    return f'<div class="round {kind}">{images}{texts}</div>'


def _format_thumbnail(folder: Path, digest: str, number: int) -> str:
    file = folder / THUMBNAILS / f"{digest}.jpg"
    name = f"Image {number}"
    return format_image(file.read_bytes(), "image/jpeg", alt=name, title=name) if file.exists() else f"[{name}] "
