"""The control server is real QMP: QEMU's own client library and its shell talk to it."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tcmu_replication.control import schema
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tests.support.tools import PATIENCE_S
from tests.unit.control.documents import status

pytestmark = pytest.mark.interop


async def query_status(arguments: Any, session: Session) -> schema.Status:
    return status()


async def stop(arguments: Any, session: Session) -> None:
    raise Error(Kind.INVALID_STATE, "Block replication is not running")


def test_qemus_library_negotiates_calls_and_listens(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server({"query-status": query_status, "stop-replication": stop})
        await server.listen_unix(tmp_path / "disk0.sock")
        client = QMPClient("test")
        await client.connect(str(tmp_path / "disk0.sock"))
        answer = await client.execute("query-status")
        assert answer["last-checkpoint"]["pause-ms"] == 1.5
        with pytest.raises(ExecuteError, match="Block replication is not running") as caught:
            await client.execute("stop-replication")
        assert caught.value.error.error.class_ == "GenericError"
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("cont")
        assert {"name": "stop-replication"} in await client.execute("query-commands")
        with client.listener("REPLICATION_LINK") as events:
            server.emit("REPLICATION_LINK", schema.Link(state="lost", reason="no answer"))
            event = await events.get()
        assert event["data"]["reason"] == "no answer"
        await client.disconnect()
        await server.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """The control socket of a server in a thread of its own."""
    path, loop = tmp_path / "disk0.sock", asyncio.new_event_loop()
    server = Server({"query-status": query_status, "stop-replication": stop})
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.listen_unix(path), loop).result(PATIENCE_S)
    yield path
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(PATIENCE_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def shell(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, str(path)]


def test_qmp_shell_runs_what_is_typed(served: Path, tmp_path: Path) -> None:
    typed = "query-version\nstop-replication\nquery-status x=1\nfailover\nquery-qmp-schema\n"
    done = subprocess.run(
        shell(served),
        input=typed,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=_environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "tcmu-replication " in done.stdout
    assert "Block replication is not running" in done.stdout
    assert "Parameter 'x' is unexpected" in done.stdout
    assert "The command failover has not been found" in done.stdout
    assert '"meta-type": "command"' in done.stdout


def test_qmp_shell_completes_the_names_of_commands(served: Path, tmp_path: Path) -> None:
    """On a terminal, with the tabulator: the one command that begins so is the one that runs."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        shell(served), stdin=theirs, stdout=theirs, stderr=theirs, env=_environment(tmp_path)
    )
    os.close(theirs)
    try:
        seen = _until(ours, b"(QEMU) ")
        os.write(ours, b"query-ver\t\n")
        seen = _until(ours, b"(QEMU) ")
        assert b"query-version" in seen
        assert b"tcmu-replication " in seen
        os.write(ours, b"\x04")
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        os.close(ours)


def _environment(home: Path) -> dict[str, str]:
    """The shell keeps its history at home."""
    return {**os.environ, "HOME": str(home), "TERM": "dumb", "INPUTRC": os.devnull}


def _until(terminal: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 4096)
    return seen
