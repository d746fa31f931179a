"""Tables of rows, the first being the head, as aligned text."""

from collections.abc import Sequence


Row = Sequence[str | int | float]


def format_table(rows: Sequence[Row]) -> str:
    """Aligned columns, numbers on the right."""
    columns = []
    for column in zip(*rows):
        width = max(len(str(cell)) for cell in column)
        align = ">" if any(isinstance(cell, (int, float)) for cell in column) else "<"
        columns.append([f"{cell!s:{align}{width}}" for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))
