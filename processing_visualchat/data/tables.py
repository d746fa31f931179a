"""Tables of rows, the first being the head, as aligned text."""

from collections.abc import Sequence


Row = Sequence[str | int | float]


def format_cell(cell: str | int | float) -> str:
    """Text as it is, numbers with thousands separators."""
    return cell if isinstance(cell, str) else f"{cell:,}"


def format_table(rows: Sequence[Row]) -> str:
    """Aligned columns, numbers on the right."""
    columns = []
    for column in zip(*rows):
        width = max(len(format_cell(cell)) for cell in column)
        align = ">" if any(isinstance(cell, (int, float)) for cell in column) else "<"
        columns.append([f"{format_cell(cell):{align}{width}}" for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))
