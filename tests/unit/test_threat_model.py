"""docs/threat-model.md: what it promises has a test, and the tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.named_tests import functions_of, named_in

PAGE = (Path(__file__).parents[2] / "docs/threat-model.md").read_text()


@pytest.mark.parametrize(("module", "test"), named_in(PAGE))
def test_named_test_exists(module: str, test: str) -> None:
    assert test in functions_of(module)


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) > 10
    assert [row for row in rows if not re.search(r"`(test_\w+::test_\w+|tests/\w+)`", row)] == []
