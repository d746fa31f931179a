"""The parts of self-contained HTML pages: style, tables, lists and images."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from .tables import Row, format_cell


THUMBNAIL = (220, 220)  # maximum width by height in pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem; color: #222;
       overflow-wrap: anywhere; }
div.table { overflow-x: auto; margin: .6rem 0 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; }
img { max-width: 100%; }
.where { color: #777; font-size: .85em; }
@media (max-width: 40rem) { table { font-size: .8em; } th, td { padding: .2rem .4rem; } ul { padding-left: 1.2rem; } }
"""


def format_page(title: str, style: str, parts: Sequence[str]) -> str:
    """A whole page; `title` is text, `parts` are HTML."""
    head = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style>',
    ]
    return "\n".join([*head, *parts]) + "</html>\n"


def format_list(lines: Sequence[str]) -> str:
    """A list of texts; nothing if it is empty."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def format_html_table(title: str, rows: Sequence[Row]) -> str:
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


def encode_thumbnail(image: Image.Image) -> bytes:
    """An image as a small JPEG."""
    small, data = image.copy(), io.BytesIO()
    small.thumbnail(THUMBNAIL)
    small.save(data, "JPEG", quality=85)
    return data.getvalue()


def format_image(data: bytes, media_type: str, **attributes: str) -> str:
    """An encoded image inside of the page, with attributes such as `alt` and `title`."""
    named = "".join(f' {name}="{html.escape(value, quote=True)}"' for name, value in attributes.items())
    return f'<img{named} src="data:{media_type};base64,{base64.b64encode(data).decode()}">'
