"""Tables of rows, the first being the head, as aligned text or Markdown."""

from collections.abc import Sequence


Row = Sequence[str | int | float]


def format_cell(cell: str | int | float) -> str:
    """Text as it is, numbers with thousands separators."""
    return cell if isinstance(cell, str) else f"{cell:,}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun, or more of its sentence, in the singular or the plural."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_table(rows: Sequence[Row]) -> str:
    """Aligned columns, numbers on the right."""
    columns = []
    for column in zip(*rows):
        width = max(len(format_cell(cell)) for cell in column)
        align = ">" if any(isinstance(cell, (int, float)) for cell in column) else "<"
        columns.append([f"{format_cell(cell):{align}{width}}" for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def format_markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(format_cell(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
