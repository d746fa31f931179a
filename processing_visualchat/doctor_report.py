"""The page that the doctor writes: tables, histograms and conversations, in one file without anything beside it."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from .image_archives import open_training_image
from .packing import batching_table
from .sources import SOURCES


if TYPE_CHECKING:
    from .doctor import Diagnosis, Sample

THUMBNAIL = (220, 220)  # width by height in pixels, at most
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; }
img { max-width: 100%; }
.problem { background: #fde8e8; padding: .4rem .8rem; }
.sample { border: 1px solid #ccc; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; white-space: pre-wrap; }
.sample img { display: inline-block; vertical-align: middle; margin: .2rem .4rem; }
.where { color: #777; font-size: .85em; }
mark { background: #c9f0c9; }
"""


def write_page(diagnosis: "Diagnosis", path: Path) -> Path:
    """Writes the page, whole or not at all."""
    problems = "".join(f'<p class="problem">{html.escape(problem)}</p>' for problem in diagnosis.problems)
    findings = "".join(f"<li>{html.escape(finding)}</li>" for finding in diagnosis.findings())
    terms: list[Sequence] = [("source", "terms, as their authors state them", "to be cited")]
    names = (report.name for report in diagnosis.reports)
    terms += [(name, SOURCES[name].licence, SOURCES[name].attribution) for name in names if name in SOURCES]
    parts = [
        f"<h1>{html.escape(diagnosis.name)}</h1>{problems}<ul>{findings}</ul>",
        f"<h2>Sources</h2>{_table(diagnosis.source_table())}",
        f"<h2>Dropped and repaired</h2>{_table(diagnosis.reason_table())}"
        if len(diagnosis.reason_table()) > 1
        else "",
        f"<h2>Lengths</h2>{_histograms(diagnosis)}{_table(diagnosis.length_table())}",
        "<h2>What packing saves</h2><p>Padding is the share of all computed tokens; the spread is the standard "
        f"deviation over the mean of a batch.</p>{_table(batching_table(diagnosis.batching))}",
        "<h2>The first conversations</h2><p>As the model gets them; the loss is on what is marked.</p>"
        + "".join(map(_sample, diagnosis.samples)),
        f"<h2>Terms</h2>{_table(terms)}" if len(terms) > 1 else "",
    ]
    title = f"<title>{html.escape(diagnosis.name)}</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>'
    part = path.with_suffix(".part")
    part.write_text(head + "\n".join(parts) + "</html>\n", encoding="utf-8")
    part.replace(path)
    return path


def _table(rows: Sequence[Sequence]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _kind(cell) -> str:
    return ' class="number"' if isinstance(cell, (int, float)) else ""


def _histograms(diagnosis: "Diagnosis") -> str:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (quantity, name) in zip(
        axes, (("length", "tokens"), ("num_images", "images"), ("num_rounds", "rounds"))
    ):
        for side in diagnosis.sides:
            values = diagnosis.lengths(quantity, side)
            if len(values) == 0:
                continue
            most = int(max(diagnosis.lengths(quantity, each).max(initial=0) for each in diagnosis.sides))
            bins = np.linspace(0, most, 41) if quantity == "length" else np.arange(most + 2) - 0.5
            axis.hist(values, bins=bins, alpha=0.6, label=side)
        axis.set(xlabel=f"{name} of a conversation", ylabel="conversations")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(diagnosis.max_length, color="black", linestyle=":", label="longest allowed")
    axes[0].legend(frameon=False)
    return _picture(figure, "Histograms of tokens, images and rounds")


def _picture(figure: Figure, text: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _sample(sample: "Sample") -> str:
    images = iter(sample.images)
    shown = []
    for text, is_learned in sample.pieces:
        parts = [html.escape(part) for part in text.split("<image>")]
        inner = parts[0] + "".join(_thumbnail(next(images)) + part for part in parts[1:])
        shown.append(f"<mark>{inner}</mark>" if is_learned else inner)
    where = html.escape("; ".join(sample.where))
    counts = f"{sample.num_tokens} tokens, the loss is on {sample.num_learned}"
    return f'<div class="sample"><span class="where">{where} ({counts})</span>\n{"".join(shown)}</div>'


def _thumbnail(source: str | bytes) -> str:
    image = open_training_image(source)
    image.thumbnail(THUMBNAIL)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    name = html.escape(source if isinstance(source, str) else "an image inside of its record", quote=True)
    return f'<img title="{name}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
