"""Numbers and tables for terminals. The dashboard has its own formatting."""

from collections.abc import Sequence


def bytes_text(value: float | None) -> str:
    """Bytes in the binary unit that suits, three significant digits: 61.2 MiB."""
    if value is None:
        return "unknown"
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def count_text(value: int | None) -> str:
    """A count with thousands separated."""
    return "unknown" if value is None else f"{value:,}"


def table_text(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headings), *cells]) for i in range(len(headings))]
    right = [all(_numeric(row[i]) for row in cells) and bool(cells) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(list(headings)), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def _numeric(text: str) -> bool:
    return text == "" or text.replace(",", "").replace(".", "").replace("-", "").isdigit()
