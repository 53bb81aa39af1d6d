"""What a section returns: rows of named values, printed as a table and written to results.json."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median, the least and the largest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Of at least one value; None of no value."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values)) if values else None

    @classmethod
    def of_ratios(cls, values: Iterable[float], bases: Iterable[float]) -> "Spread | None":
        """Of each round's value divided by the same round's base. Raises `ValueError` if their numbers differ."""
        return cls.of(value / base for value, base in zip(values, bases, strict=True))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def column(heading: str) -> Any:
    """A field of a `Row` whose heading is no Python name."""
    return field(metadata={"heading": heading})


@dataclass(frozen=True)
class Row:
    """A line of a table. A field is a column, headed by its name or by its `column`; a `Row` in a field is several."""

    def cells(self) -> dict[str, Any]:
        """{heading: value}, in order."""
        cells = {}
        for column in fields(self):
            value = getattr(self, column.name)
            cells |= value.cells() if isinstance(value, Row) else {column.metadata.get("heading", column.name): value}
        return cells


def print_table(rows: Sequence[Row]) -> None:
    """Columns as wide as their widest cell. `rows` has at least one, and all are of one type."""
    lines = [list(rows[0].cells()), *([text_of(value) for value in row.cells().values()] for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    for line in lines:
        print(
            "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True
        )


def text_of(value: Any) -> str:
    """A cell as the table shows it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int | float) else str(value)
