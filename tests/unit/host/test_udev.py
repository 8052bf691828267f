"""The monitor of UIO devices, as far as a machine without them shows it."""

from __future__ import annotations

import select
from types import SimpleNamespace

import pytest
import pyudev

from tcmu_replication.host.udev import Event, Monitor


def test_monitor_listens_and_has_nothing_to_tell_at_first() -> None:
    monitor = Monitor()
    assert select.select([monitor], [], [], 0)[0] == []
    assert monitor.events() == []


def test_events_that_wait_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [
        SimpleNamespace(action="add", sys_name="uio0"),
        SimpleNamespace(action="remove", sys_name="uio0"),
        None,
    ]
    monkeypatch.setattr(pyudev.Monitor, "poll", lambda monitor, timeout: waiting.pop(0))
    assert Monitor().events() == [Event("add", "uio0"), Event("remove", "uio0")]
