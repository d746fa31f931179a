"""The report of a diagnosis as one self-contained page, with tables, histograms and conversations."""

import base64
import html
import io
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.images import ImageReference
from ..data.packing import batching_table
from ..data.published import SOURCES
from ..data.tables import Row, counted, format_cell
from .diagnosis import NUM_NAMED, QUANTITIES, Diagnosis
from .samples import Sample


THUMBNAIL = (220, 220)  # maximum width by height in pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem; color: #222;
       overflow-wrap: anywhere; }
div.table { overflow-x: auto; margin: .6rem 0 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; }
img { max-width: 100%; }
.table img { max-width: none; width: 100%; min-width: 40rem; }
.verdict { font-size: 1.3em; font-weight: 600; padding: .5rem .8rem; border-radius: 6px; background: #dff3df; }
.undecided { background: #fdf1d6; }
.unfit { background: #fde8e8; }
.sample { border: 1px solid #ccc; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; white-space: pre-wrap; }
.sample img { display: inline-block; vertical-align: middle; margin: .2rem .4rem; }
.where { color: #777; font-size: .85em; }
mark { background: #c9f0c9; }
@media (max-width: 40rem) { table { font-size: .8em; } th, td { padding: .2rem .4rem; } ul { padding-left: 1.2rem; } }
"""


def write_report(diagnosis: Diagnosis, folder: str | Path) -> Path:
    """Writes `report.html` and `dropped.jsonl` into a folder, and returns the page, written whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "dropped.jsonl").open("w") as lines:
        for report in diagnosis.mixture.reports:
            lines.writelines(json.dumps(dropped) + "\n" for dropped in report.list_dropped())
    part, page = folder / "report.part", folder / "report.html"
    part.write_text(_format_page(diagnosis), encoding="utf-8")
    part.replace(page)
    return page


def _format_page(diagnosis: Diagnosis) -> str:
    kind = "unfit" if diagnosis.errors else "undecided" if diagnosis.problems else "fit"
    overlong = [name for side in diagnosis.sides for name in diagnosis.list_overlong(side)[1]]
    broken = list(islice(diagnosis.list_broken().items(), NUM_NAMED))
    terms: list[Row] = [("source", "license, as its authors state it", "citation")]
    names = (report.name for report in diagnosis.mixture.reports)
    terms += [(name, SOURCES[name].license, SOURCES[name].attribution) for name in names if name in SOURCES]
    title = html.escape(diagnosis.name)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<p class="verdict {kind}">{diagnosis.verdict}: {title}</p>{_list(diagnosis.problems)}',
        f"<h2>In numbers</h2>{_list(diagnosis.findings())}{_table('', diagnosis.share_table())}",
        f"<h2>The first over-length conversations</h2>{_list(overlong)}" if overlong else "",
        _table("The first images that cannot be used", [("image", "reason"), *broken]),
        f'<h2>Lengths</h2><div class="table">{_histograms(diagnosis)}</div>',
        _table("Batching", batching_table(diagnosis.batching)),
        "<p>Padding is the share of all computed tokens; the spread is the standard deviation over the mean of a "
        "batch.</p><h2>The first conversations of each source</h2><p>As the model gets them; the loss is on the "
        "marked text.</p>" + "".join(map(_sample, diagnosis.samples)),
        _table("Records", diagnosis.mixture.source_table()),
        _table("Dropped, repaired and reused records", diagnosis.reason_table()),
        _table("Lengths of each source", diagnosis.length_table()),
        _table("Terms", terms),
    ]
    return "\n".join(parts) + "</html>\n"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(title: str, rows: Sequence[Row]) -> str:
    """A table with its title; nothing if it has no row."""
    if len(rows) == 1:
        return ""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in rows[0])
    lines = [f"<tr>{head}</tr>"]
    for row in rows[1:]:
        kinds = (' class="number"' if isinstance(cell, (int, float)) else "" for cell in row)
        cells = (f"<td{kind}>{html.escape(format_cell(cell))}</td>" for kind, cell in zip(kinds, row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<h2>{title}</h2>" * bool(title) + f'<div class="table"><table>{"".join(lines)}</table></div>'


def _histograms(diagnosis: Diagnosis) -> str:
    from matplotlib.figure import Figure  # needed for the page only

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (quantity, name) in zip(axes, QUANTITIES.items()):
        values = {side: diagnosis.lengths(quantity, side) for side in diagnosis.sides}
        highest = int(max(numbers.max(initial=0) for numbers in values.values()))
        bins = np.linspace(0, highest, 41) if quantity == "length" else np.arange(highest + 2) - 0.5
        for side, numbers in values.items():
            if len(numbers):
                axis.hist(numbers, bins=bins, alpha=0.6, label=side)
        axis.set(xlabel=f"{name} per conversation", ylabel="conversations")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(diagnosis.max_length, color="black", linestyle=":", label="maximum")
    axes[0].legend(frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="Histograms of tokens, images and rounds" src="data:image/png;base64,{encoded}">'


def _sample(sample: Sample) -> str:
    images = iter(sample.images)
    shown = []
    for text, has_loss in sample.pieces:
        parts = [html.escape(part) for part in text.split("<image>")]
        inner = parts[0] + "".join(_thumbnail(next(images)) + part for part in parts[1:])
        shown.append(f"<mark>{inner}</mark>" if has_loss else inner)
    where = html.escape("; ".join([sample.source, *sample.where]))
    counts = f"{counted(sample.num_tokens, 'token')}, the loss is on {sample.num_learned:,}"
    return f'<div class="sample"><span class="where">{where} ({counts})</span>\n{"".join(shown)}</div>'


def _thumbnail(reference: ImageReference) -> str:
    image = reference.open()
    image.thumbnail(THUMBNAIL)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    name = "an image inside its record" if reference.kind == "inline" else str(reference)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img title="{html.escape(name, quote=True)}" src="data:image/jpeg;base64,{encoded}">'
