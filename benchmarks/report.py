"""What came of a run: medians and ratios, as a table, as JSON and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rows import ROWS, Row, Sample
from benchmarks.scale import FULL, Scale
from tcmu_replication.units import format_size


class Median(NamedTuple):
    """Of one side's samples of a row, with quartiles and extremes; `cpu_us` is None where it was not measured."""

    value: float
    low: float
    lower: float
    upper: float
    high: float
    cpu_us: float | None
    count: int


class Line(NamedTuple):
    """One row's outcome. `ratio` compares with QEMU, or what the row names instead, `of_limit` with the bare loop.

    Above 1 ours, or this row, is better.
    """

    row: Row
    qemu: Median | None
    ours: Median | None
    limit: Median | None
    ratio: float | None
    of_limit: float | None
    others: dict[str, Median]
    """What else was measured beside it, by name: other ways to the limit, the client without a checkpoint."""

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None if there is none or nothing to compare."""
        return None if self.ratio is None or self.row.target is None else self.ratio >= self.row.target


def lines(samples: Iterable[Sample], scale: Scale = FULL) -> dict[str, Line]:
    """The outcome of every row that was measured, at that scale."""
    sizes = {name: format_size(length) for name, length in scale._asdict().items()}
    by_row: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_row.setdefault(sample.row, {}).setdefault(sample.side, []).append(sample)
    found = {
        name: _line(row._replace(title=row.title.format(**sizes)), by_row[name])
        for name, row in ROWS.items()
        if name in by_row
    }
    return {
        name: line._replace(ratio=_ratio(line.row, line.ours, found[line.row.beside].ours))
        if line.row.beside in found
        else line
        for name, line in found.items()
    }


def _line(row: Row, sides: dict[str, list[Sample]]) -> Line:
    medians = {side: _median(samples) for side, samples in sides.items()}
    ratios = [_ratio(row, medians.get("ours"), medians.get(side)) for side in (row.against, "limit")]
    ours, limit = medians.pop("ours", None), medians.pop("limit", None)
    return Line(row, medians.pop(row.against, None), ours, limit, *ratios, medians)


def _median(samples: Sequence[Sample]) -> Median:
    values = [sample.value for sample in samples]
    cpu = [sample.cpu_us for sample in samples if sample.cpu_us is not None]
    lower, middle, upper = statistics.quantiles(values * (1 + (len(values) == 1)), n=4, method="inclusive")
    return Median(
        middle,
        min(values),
        lower,
        upper,
        max(values),
        statistics.median(cpu) if cpu else None,
        len(values),
    )


def _ratio(row: Row, ours: Median | None, other: Median | None) -> float | None:
    if ours is None or other is None:
        return None
    return ours.value / other.value if row.better == "more" else other.value / ours.value


class Compared(NamedTuple):
    """Two rows of ours: `same` if their medians lie closer than the quartiles of the wider one do."""

    same: bool
    sentence: str


def same_pause(found: dict[str, Line]) -> Compared | None:
    """Whether a checkpoint's pause depends on how much was changed; None if that was not measured."""
    pair = [found[name] for name in ("pause-small", "pause-large") if name in found]
    few, many = (line.ours for line in pair) if len(pair) == 2 else (None, None)
    if few is None or many is None:
        return None
    noise = max(few.upper - few.lower, many.upper - many.lower)
    same = abs(few.value - many.value) < noise
    spread = " against ".join(
        f"{side.value:.2f} ms (quartiles {side.lower:.2f} and {side.upper:.2f}, "
        f"{side.low:.2f} to {side.high:.2f} in {side.count})"
        for side in (few, many)
    )
    return Compared(same, f"pause after few and many changes: {'the same' if same else 'differs'}: {spread}")


HEAD = ("work", "unit", "QEMU", "ours", "ratio", "target", "QEMU µs CPU", "ours µs CPU", "limit", "of limit")


def cells(line: Line) -> tuple[str, ...]:
    """A row of the table, in the order of HEAD."""
    row, qemu, ours, limit = line.row, line.qemu, line.ours, line.limit
    return (
        row.title,
        row.unit,
        *(_value(side) for side in (qemu, ours)),
        "" if line.ratio is None else f"{line.ratio:.{1 if row.beside is None else 2}f}x",
        "" if row.target is None else f"{row.target:.2g}x",
        *("" if side is None or side.cpu_us is None else f"{side.cpu_us:.1f}" for side in (qemu, ours)),
        _value(limit),
        "" if line.of_limit is None else f"{100 * line.of_limit:.0f} %",
    )


def _value(median: Median | None) -> str:
    if median is None:
        return ""
    digits = 0 if median.value >= 100 else 1 if median.value >= 1 else 3
    return f"{median.value:,.{digits}f}"


def show(found: dict[str, Line]) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, title="medians; ratios above 1 are in our favour")
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="left" if index < 2 else "right")
    for line in found.values():
        style = {True: "green", False: "red", None: None}[line.reached]
        table.add_row(*cells(line), style=style)
    console = Console(width=150)
    console.print(table)
    if (compared := same_pause(found)) is not None:
        console.print(compared.sentence)


def markdown(found: dict[str, Line]) -> str:
    """The table for docs/performance.md."""
    rows = [HEAD, ("---", "---", *["---:"] * (len(HEAD) - 2)), *map(cells, found.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def save(path: Path, facts: dict[str, Any], found: dict[str, Line], samples: Sequence[Sample]) -> None:
    """Everything, for machines."""
    compared = same_pause(found)
    document = {
        "machine": facts,
        "same_pause": None if compared is None else compared._asdict(),
        "rows": {name: line._asdict() | {"row": line.row._asdict()} for name, line in found.items()},
        "samples": [sample._asdict() for sample in samples],
    }
    for row in document["rows"].values():
        for side in ("qemu", "ours", "limit"):
            row[side] = None if row[side] is None else row[side]._asdict()
        row["others"] = {name: other._asdict() for name, other in row["others"].items()}
    path.write_text(json.dumps(document, indent=1) + "\n")
