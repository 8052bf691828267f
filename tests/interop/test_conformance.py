"""docs/replication.md names tests and differences: they exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tcmu_replication.replication import stages
from tests.interop.differential.differences import Difference
from tests.interop.test_replication_cases import CASES
from tests.support.named_tests import functions_of, named_in

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/replication.md").read_text()
NAMED = named_in(PAGE)
TEXTS = [
    text
    for name, text in vars(stages).items()
    if name.isupper() and isinstance(text, str) and len(name) > 1 and "{" not in text
]


@pytest.mark.parametrize(("module", "test"), NAMED)
def test_named_test_exists(module: str, test: str) -> None:
    assert test in functions_of(module)


def test_every_row_of_a_conformance_table_names_a_test() -> None:
    _, _, tables = PAGE.partition("## QEMU's defects")
    rows = [
        line
        for line in tables.splitlines()
        if line.startswith("| ") and not re.match(r"\|.*\| tests? \|$", line)
    ]
    assert len(rows) > 80
    assert [row for row in rows if "::test_" not in row] == []


def test_all_sixteen_defects_have_a_row() -> None:
    assert re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE) == [str(number) for number in range(1, 17)]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_of_the_table_has_a_row(text: str) -> None:
    _, _, tables = PAGE.partition("## Conformance")
    assert f'"{text}"' in tables


@pytest.mark.parametrize("difference", Difference)
def test_difference_that_a_run_lets_pass_has_a_row(difference: Difference) -> None:
    assert f"\n| {difference.value}" in PAGE


def test_cases_of_qemu_are_all_there() -> None:
    assert len(CASES) == 13
    assert sum(name.startswith("primary/") for name in CASES) == 6
