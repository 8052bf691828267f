"""Log lines as the journal reads them."""

from __future__ import annotations

import logging
import sys

import pytest

from tcmu_replication.host.journal import PRIORITY, JournalFormatter, NamedFormatter


@pytest.mark.parametrize(("level", "priority"), PRIORITY.items())
def test_line_begins_with_its_priority(level: int, priority: int) -> None:
    record = logging.LogRecord("x", level, "", 0, "a %s", ("message",), None)
    assert JournalFormatter("disk0").format(record) == f"<{priority}>disk0: a message"


def test_every_line_of_a_trace_keeps_the_priority() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it broke", (), sys.exc_info())
    lines = JournalFormatter("disk0").format(record).splitlines()
    assert lines[0] == "<3>disk0: it broke"
    assert lines[-1] == "<3>ValueError: broken"
    assert all(line.startswith("<3>") for line in lines)


def test_name_is_said_once() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "disk0: link lost", (), None)
    assert JournalFormatter("disk0").format(record) == "<4>disk0: link lost"
    assert NamedFormatter("disk0").format(record).endswith(" WARNING disk0: link lost")
    assert JournalFormatter("daemon").format(record) == "<4>daemon: disk0: link lost"
