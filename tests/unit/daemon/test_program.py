"""The daemon as a whole process: ready, told, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import PATIENCE_S


def start(place: Path, notify: str) -> subprocess.Popen[str]:
    """`tcmu-replication daemon` with empty directories of its own."""
    (place / "etc").mkdir(exist_ok=True)
    options = [f"--config={place / 'etc'}", f"--run={place / 'run'}", "--host=alpha"]
    return subprocess.Popen(
        [sys.executable, "-m", "tcmu_replication", *options, "daemon"],
        env=os.environ | {"NOTIFY_SOCKET": notify},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def notices(tmp_path: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.bind(str(tmp_path / "notify"))
    channel.settimeout(PATIENCE_S)
    return channel


def heard(notices: socket.socket) -> bytes:
    """The next word that is no sign of life."""
    while (said := notices.recv(4096)) == b"WATCHDOG=1":
        pass
    return said


def test_daemon_is_ready_lists_its_workers_and_ends_in_order(tmp_path: Path, notices: socket.socket) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "broken.toml").write_text("[resource]")
    with start(tmp_path, str(tmp_path / "notify")) as daemon:
        assert heard(notices) == b"READY=1"
        command = [sys.executable, "-m", "tcmu_replication", f"--config={tmp_path / 'etc'}"]
        asked = subprocess.run(
            [*command, f"--run={tmp_path / 'run'}", "status", "--json"], capture_output=True, text=True
        )
        [document] = json.loads(asked.stdout)
        assert (document["resource"], document["stage"], asked.returncode) == ("broken", "down", 4)
        assert "resource.name: found nothing" in document["error"]
        daemon.send_signal(signal.SIGHUP)
        daemon.send_signal(signal.SIGTERM)
        assert heard(notices) == b"STOPPING=1"
        assert daemon.wait(PATIENCE_S) == 0
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "_manager.lock"]
    notices.close()


def test_second_daemon_says_why_it_ends(tmp_path: Path, notices: socket.socket) -> None:
    with start(tmp_path, str(tmp_path / "notify")) as first:
        assert heard(notices) == b"READY=1"
        with start(tmp_path, str(tmp_path / "notify")) as second:
            said = f"STATUS=a daemon runs on {tmp_path / 'run'} already: process {first.pid}"
            assert heard(notices) == said.encode()
            assert second.wait(PATIENCE_S) == 3
        first.terminate()
    notices.close()
