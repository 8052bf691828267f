"""docs/qmp.md says what the tables say."""

from __future__ import annotations

from pathlib import Path

from tcmu_replication.control.monitor import SESSION_COMMANDS
from tcmu_replication.qemu import reference
from tcmu_replication.qemu.tables import COMMANDS, EVENTS

FILE = Path(__file__).parents[3] / "docs" / "qmp.md"


def test_reference_is_current() -> None:
    text = FILE.read_text()
    assert reference.updated(text) == text, f"run: python -m tcmu_replication.qemu.reference {FILE}"


def test_every_command_and_event_has_a_row() -> None:
    printed = reference.reference()
    for name in (*SESSION_COMMANDS, *COMMANDS, *EVENTS):
        assert f"\n| {name} | " in printed
