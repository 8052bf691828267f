"""docs/pair.md shows the tables of the code: what is written there between two markers is made from them.

`python -m tests.unit.replication.test_pair_document` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.replication.identity import Marks
from tcmu_replication.replication.state import EVENTS, PLANS, REFUSALS, SERVE, Word
from tcmu_replication.replication.verdict import TABLE, Found, Row, Side

FILE = Path(__file__).parents[3] / "docs" / "pair.md"
VALUES = re.compile(r"\{(\w+)\}")


def plain(text: str) -> str:
    """A template for people: {my_dirty} is MY DIRTY."""
    return VALUES.sub(lambda match: match[1].replace("_", " ").upper(), text)


def table(*rows: tuple[str, ...]) -> Iterator[str]:
    head, *body = rows
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"


def _source(row: Row) -> str:
    if row.source is not None:
        return row.source.value
    if row.found is Found.HOT:
        return "nobody yet"
    return "the operator names it" if row.may_be_source else "-"


def verdicts() -> Iterator[str]:
    head = ("row", "verdict", "source", "what is looked at", "it says", "what to do")
    yield from table(
        head,
        *(
            (
                f"`{row.name}`",
                row.found.value,
                _source(row),
                ", ".join(span.value for span in row.spans) or "-",
                plain(row.words),
                plain(row.advice or "nothing"),
            )
            for row in TABLE
            if row.source is not Side.THEIRS
        ),
    )


def _becomes(value: object) -> str:
    if value is None:
        return "stays"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(getattr(value, "value", value))


def events() -> Iterator[str]:
    head = ("event", "what happened", "only if", "role", "disk", "flushed before", "promoted", "handing over")
    yield from table(
        head,
        *(
            (
                f"`{event.name}`",
                event.value,
                row.must_be,
                _becomes(row.role),
                _becomes(row.disk),
                "yes" if row.flush else "-",
                _becomes(row.promoted),
                _becomes(row.handing_over),
            )
            for event, row in EVENTS.items()
        ),
    )


def plans() -> Iterator[str]:
    yield from table(
        ("verdict", "this host", "at once", "before the first block", "at the end"),
        *(
            (
                found.value,
                part.value,
                *(f"`{event.name}`" if event else "-" for event in row),
            )
            for (found, part), row in PLANS.items()
        ),
    )


def serves() -> Iterator[str]:
    yield from table(
        ("row", "the LUN", "why"),
        *((f"`{row.name}`", row.answer.value, plain(row.words)) for row in SERVE),
    )


def refusals() -> Iterator[str]:
    yield from table(
        ("row", "lifted by", "it says", "what is given up then"),
        *(
            (
                f"`{row.name}`",
                ", ".join(f"`{word.value}`" for word in Word if word in row.lifted_by) or "nothing",
                plain(row.words),
                plain(row.gives_up or "-"),
            )
            for row in REFUSALS
        ),
    )


def marks() -> Iterator[str]:
    yield from table(("marks", "blocks"), *((f"`{mark.name}`", mark.value) for mark in Marks))


PARTS = {
    "verdicts": verdicts,
    "events": events,
    "plans": plans,
    "serve": serves,
    "refusals": refusals,
    "marks": marks,
}


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)


@pytest.mark.parametrize("name", PARTS)
def test_document_shows_the_table(name: str) -> None:
    found = between(name).search(FILE.read_text())
    assert found is not None
    assert found[0].splitlines()[1:-1] == list(PARTS[name]()), (
        "python -m tests.unit.replication.test_pair_document"
    )


def write() -> None:
    """Put the tables as they are now into the document."""
    text = FILE.read_text()
    for name, part in PARTS.items():
        body = "".join(f"{line}\n" for line in part())
        text = between(name).sub(lambda match, body=body: match[1] + body + match[2], text)
    FILE.write_text(text)


if __name__ == "__main__":
    write()
