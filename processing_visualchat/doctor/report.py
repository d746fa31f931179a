"""The report of a diagnosis as one self-contained page, with tables, histograms and conversations."""

import html
import io
import json
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.images import ImageReference
from ..data.packing import batching_table
from ..data.pages import encode_thumbnail, format_html_table, format_image, format_list, format_page
from ..data.published import SOURCES
from ..data.tables import Row, counted
from .diagnosis import NUM_NAMED, QUANTITIES, Diagnosis
from .samples import Sample


STYLE = """
.table img { max-width: none; width: 100%; min-width: 40rem; }
.verdict { font-size: 1.3em; font-weight: 600; padding: .5rem .8rem; border-radius: 6px; background: #dff3df; }
.undecided { background: #fdf1d6; }
.unfit { background: #fde8e8; }
.sample { border: 1px solid #ccc; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; white-space: pre-wrap; }
.sample img { display: inline-block; vertical-align: middle; margin: .2rem .4rem; }
mark { background: #c9f0c9; }
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
        f'<p class="verdict {kind}">{diagnosis.verdict}: {title}</p>{format_list(diagnosis.problems)}',
        f"<h2>In numbers</h2>{format_list(diagnosis.findings())}{format_html_table('', diagnosis.share_table())}",
        f"<h2>The first over-length conversations</h2>{format_list(overlong)}" if overlong else "",
        format_html_table("The first images that cannot be used", [("image", "reason"), *broken]),
        f'<h2>Lengths</h2><div class="table">{_histograms(diagnosis)}</div>',
        format_html_table("Batching", batching_table(diagnosis.batching)),
        "<p>Padding is the share of all computed tokens; the spread is the standard deviation over the mean of a "
        "batch.</p><h2>The first conversations of each source</h2><p>As the model gets them; the loss is on the "
        "marked text.</p>" + "".join(map(_sample, diagnosis.samples)),
        format_html_table("Records", diagnosis.mixture.source_table()),
        format_html_table("Dropped, repaired and reused records", diagnosis.reason_table()),
        format_html_table("Lengths of each source", diagnosis.length_table()),
        format_html_table("Terms", terms),
    ]
    return format_page(diagnosis.name, STYLE, parts)


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
    return format_image(data.getvalue(), "image/png", alt="Histograms of tokens, images and rounds")


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
    name = "an image inside its record" if reference.kind == "inline" else str(reference)
    return format_image(encode_thumbnail(reference.open()), "image/jpeg", title=name)
