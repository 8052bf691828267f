"""sd_notify(3), received as a service manager does, and by our own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tcmu_replication.daemon.notices import Notices
from tcmu_replication.host import systemd


def test_nothing_is_said_without_a_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify(READY=1)


def test_service_manager_that_went_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.notify(READY=1)


def test_assignments_arrive_in_one_datagram_each_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"tcmu-replication-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        systemd.notify(READY=1, STATUS="two\nlines")
        assert channel.recv(4096) == b"READY=1\nSTATUS=two lines"


def test_manager_learns_who_said_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notices = Notices(tmp_path / "notify")
    assert notices.path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("NOTIFY_SOCKET", str(notices.path))
    systemd.notify(STATUS="a=b")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(b"\xff nonsense\nREADY=1", str(notices.path))
    assert notices.take() == [(os.getpid(), {"STATUS": "a=b"}), (os.getpid(), {"READY": "1"})]
    assert notices.take() == []
    notices.close()
    notices.close()
    assert not notices.path.exists()
