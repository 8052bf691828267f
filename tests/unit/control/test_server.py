"""The control server over real sockets, with both of our clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.control import framing, lock, schema
from tcmu_replication.control import server as server_module
from tcmu_replication.control.client import Client
from tcmu_replication.control.connection import Connection
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tests.support.tools import PATIENCE_S
from tests.unit.control.documents import status


class Worker:
    """Canned bodies; what was called is in `calls`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.hold = asyncio.Event()
        self.holding = asyncio.Event()
        self.server = Server(
            {
                "query-status": self.query_status,
                "start": self.start,
                "checkpoint": self.checkpoint,
                "stop-replication": self.stop,
                "query-errors": self.broken,
                "peer-prepare": self.start,
            }
        )

    async def query_status(self, arguments: Any, session: Session) -> schema.Status:
        return status()

    async def start(self, arguments: Any, session: Session) -> None:
        self.calls.append(arguments)

    async def checkpoint(self, arguments: Any, session: Session) -> None:
        self.holding.set()
        await self.hold.wait()

    async def stop(self, arguments: Any, session: Session) -> None:
        raise Error(Kind.INVALID_STATE, "Block replication is not running")

    async def broken(self, arguments: Any, session: Session) -> object:
        return {"error": "this is not what the table says"}


def with_worker(tmp_path: Path, body: Callable[[Worker, Path], Awaitable[None]]) -> None:
    async def main() -> None:
        worker, path = Worker(), tmp_path / "run" / "disk0.sock"
        await worker.server.listen_unix(path)
        try:
            await body(worker, path)
        finally:
            await worker.server.close()
        assert not path.exists()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the project has logged: asyncio may have something to say of what an earlier test has left."""
    return [record for record in caplog.records if record.name.startswith("tcmu_replication.")]


async def raw(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose greeting has been read."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    assert b'"QMP"' in await reader.readline()
    return reader, writer


def test_socket_is_for_root_only(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755

    with_worker(tmp_path, body)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_somebody_else_is_cut_off_even_with_an_open_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        path.chmod(0o666)
        program = (
            "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setuid(65534); "
            "s.connect(sys.argv[1]); print(s.recv(99))"
        )
        for parent in (path.parent, tmp_path, tmp_path.parent):
            parent.chmod(0o755)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, path.name, cwd=path.parent, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out.strip() == b"b''"
        assert "of user 65534; only root may" in caplog.text

    with_worker(tmp_path, body)


def test_blocking_client_runs_commands_and_gets_errors_back(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        def client() -> None:
            with Client.unix(path) as control:
                assert control.execute("query-status")["epoch"] == 7
                assert control.execute("start", {"assume-clean": True}) == {}
                with pytest.raises(Error, match="not running") as caught:
                    control.execute("stop-replication")
                assert caught.value.kind is Kind.INVALID_STATE
                assert control.execute("query-status")["epoch"] == 7

        await asyncio.to_thread(client)
        assert worker.calls == [schema.Start(assume_clean=True)]

    with_worker(tmp_path, body)


def test_result_that_breaks_the_schema_is_an_error_and_a_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        control = await Connection.unix(path, timeout=PATIENCE_S)
        with pytest.raises(Error, match="Internal error in 'query-errors'"):
            await control.execute("query-errors")
        assert (await control.execute("query-status"))["resource"] == "disk0"
        control.close()

    with_worker(tmp_path, body)
    assert "ValidationError" in caplog.text


def test_a_command_under_way_does_not_hold_up_other_connections(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        slow = await Connection.unix(path, timeout=PATIENCE_S)
        quick = await Connection.unix(path, timeout=PATIENCE_S)
        waiting = asyncio.create_task(slow.execute("checkpoint"))
        await worker.holding.wait()
        assert (await quick.execute("query-status"))["epoch"] == 7
        worker.hold.set()
        assert await waiting == {}
        slow.close()
        quick.close()

    with_worker(tmp_path, body)


def test_out_of_band_overtakes_what_waits_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        reader, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}\n')
        await reader.readline()
        writer.write(b'{"execute":"checkpoint","id":1}{"execute":"query-version","id":2}')
        await worker.holding.wait()
        writer.write(b'{"exec-oob":"query-status","id":3}')
        assert json.loads(await reader.readline())["id"] == 3
        worker.hold.set()
        assert [json.loads(await reader.readline())["id"] for _ in range(2)] == [1, 2]
        writer.close()

    with_worker(tmp_path, body)


def test_what_a_client_asked_before_it_hung_up_is_carried_out(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        reader, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"start"}' * 12)
        writer.write_eof()
        assert (await reader.read()).count(b'{"return":{}}') == 13
        assert len(worker.calls) == 12
        writer.close()

    with_worker(tmp_path, body)


def test_client_that_goes_during_a_command_harms_nobody(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        gone = await Connection.unix(path, timeout=PATIENCE_S)
        waiting = asyncio.create_task(gone.execute("checkpoint"))
        await worker.holding.wait()
        gone.close()
        with pytest.raises(Error) as caught:
            await waiting
        assert caught.value.kind is Kind.PEER_LOST
        worker.hold.set()
        other = await Connection.unix(path, timeout=PATIENCE_S)
        assert (await other.execute("query-status"))["epoch"] == 7
        other.close()

    with_worker(tmp_path, body)


@pytest.mark.parametrize(
    "garbage",
    [b"hello\n", b"[]\n", b"\xff\xfe\n", b'{"' + b"x" * framing.MAX_LENGTH, b'{"a":' * 65],
    ids=["text", "array", "not-utf-8", "endless", "deep"],
)
def test_garbage_ends_its_connection_with_a_log_line_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        other = await Connection.unix(path, timeout=PATIENCE_S)
        reader, writer = await raw(path)
        writer.write(garbage)
        with contextlib.suppress(ConnectionResetError):  # if it closed with our bytes unread
            assert await reader.read() == b""
        writer.close()
        assert (await other.execute("query-status"))["epoch"] == 7
        other.close()

    with_worker(tmp_path, body)
    assert [record.levelno for record in ours(caplog)] == [logging.WARNING]
    assert "ended the connection of process" in caplog.text


@pytest.mark.parametrize("garbage", [b"hello\n", b"{]", b'{"id":NaN}'], ids=["text", "brackets", "nan"])
def test_garbage_behind_commands_ends_the_connection_when_they_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        other = await Connection.unix(path, timeout=PATIENCE_S)
        reader, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"checkpoint"}')
        await worker.holding.wait()
        writer.write(garbage)
        assert (await other.execute("query-status"))["epoch"] == 7
        worker.hold.set()
        assert (await reader.read()).count(b'"return"') == 2
        writer.close()
        assert (await other.execute("query-status"))["epoch"] == 7
        other.close()

    with_worker(tmp_path, body)
    assert [record.levelno for record in ours(caplog)] == [logging.WARNING]
    assert "ended the connection of process" in caplog.text


def test_client_that_goes_before_its_answers_leaves_no_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        other = await Connection.unix(path, timeout=PATIENCE_S)
        _, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"checkpoint"}' + 40 * b'{"execute":"start"}')
        await worker.holding.wait()
        writer.transport.abort()
        worker.hold.set()
        while len(worker.calls) < 40:
            await other.execute("query-status")
        other.close()

    with_worker(tmp_path, body)
    assert ours(caplog) == []


def test_silent_client_is_closed_after_the_time_for_negotiation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "NEGOTIATION_S", 0.01)

    async def body(worker: Worker, path: Path) -> None:
        reader, writer = await raw(path)
        assert await reader.read() == b""
        writer.close()

    with_worker(tmp_path, body)
    assert "no negotiation" in caplog.text


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNRESET, errno.EIO])
def test_network_that_goes_ends_its_connection_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A worker ends itself at an exception that nobody handles, so none may get away from here."""
    unhandled: list[Any] = []

    async def fail(reader: object, length: int) -> bytes:
        raise OSError(number, os.strerror(number))

    async def body(worker: Worker, path: Path) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.StreamReader, "read", fail)
            with pytest.raises(Error) as caught:
                await Connection.unix(path, timeout=PATIENCE_S)
            assert caught.value.kind is Kind.PEER_LOST
        (await Connection.unix(path, timeout=PATIENCE_S)).close()

    with_worker(tmp_path, body)
    gc.collect()
    assert unhandled == []


def test_events_reach_who_has_negotiated(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        early_reader, early = await raw(path)
        reader, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities"}\n')
        await reader.readline()
        worker.server.emit("REPLICATION_STAGE", schema.StageChanged(stage="running", epoch=1))
        message = json.loads(await reader.readline())
        assert (message["event"], message["data"]["stage"]) == ("REPLICATION_STAGE", "running")
        early.write(b'{"execute":"qmp_capabilities","id":1}\n')
        assert json.loads(await early_reader.readline()) == {"return": {}, "id": 1}
        early.close()
        writer.close()

    with_worker(tmp_path, body)


def test_client_that_does_not_read_its_events_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_UNSENT", 1000)

    async def body(worker: Worker, path: Path) -> None:
        reader, writer = await raw(path)
        writer.write(b'{"execute":"qmp_capabilities"}\n')
        await reader.readline()
        for _ in range(100_000):
            worker.server.emit(
                "REPLICATION_STAGE", schema.StageChanged(stage="done", epoch=1, error="x" * 1000)
            )
            if caplog.records:
                break
        writer.close()

    with_worker(tmp_path, body)
    assert "it does not read" in caplog.text


def test_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "disk0.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def body(worker: Worker, path: Path) -> None:
        (await Connection.unix(path, timeout=PATIENCE_S)).close()

    with_worker(tmp_path, body)


def test_second_server_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        with pytest.raises(Error, match=f"disk0 is already served by process {os.getpid()}") as caught:
            await Server({}).listen_unix(path)
        assert caught.value.kind is Kind.CONFLICT
        (await Connection.unix(path, timeout=PATIENCE_S)).close()

    with_worker(tmp_path, body)


def test_lock_ends_with_its_process_even_when_killed(tmp_path: Path) -> None:
    path = tmp_path / "disk0.sock"
    program = (
        "import sys, pathlib; from tcmu_replication.control import lock; "
        "lock.hold(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    )
    assert lock.holder(path) is None
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert lock.holder(path) == process.pid
        process.kill()
    assert lock.holder(path) is None
    os.close(lock.hold(path))


def test_run_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """S5: they could put a socket of their own in the place of ours."""
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    with pytest.raises(Error, match=f"found {run} with mode 0777, so that others may write it") as caught:
        lock.hold(run / "disk0.sock")
    assert caught.value.kind is Kind.BAD_CONFIG
    assert list(run.iterdir()) == []


def test_lock_that_is_a_link_is_refused_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    """S5."""
    (tmp_path / "precious").write_text("precious")
    lock.lock_path(tmp_path / "disk0.sock").symlink_to(tmp_path / "precious")
    with pytest.raises(Error, match="symbolic links"):
        lock.hold(tmp_path / "disk0.sock")
    assert (tmp_path / "precious").read_text() == "precious"


def test_clients_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(Error, match="nobody serves at") as caught:
        Client.unix(tmp_path / "disk0.sock")
    assert caught.value.kind is Kind.NOT_FOUND
    with pytest.raises(Error) as caught:
        asyncio.run(Connection.unix(tmp_path / "disk0.sock", timeout=PATIENCE_S))
    assert caught.value.kind is Kind.PEER_LOST


def test_peer_port_takes_peer_commands_of_the_peers_address_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(worker: Worker, path: Path) -> None:
        await worker.server.listen_tcp("127.0.0.1", 0, peer="127.0.0.2")
        port = worker.server.tcp_port
        peer = await Connection.tcp("127.0.0.1", port, local="127.0.0.2", timeout=PATIENCE_S)
        assert await peer.execute("peer-prepare", {"epoch": 3}) == {}
        with pytest.raises(Error, match="has not been found"):
            await peer.execute("start")
        with pytest.raises(Error) as caught:
            await Connection.tcp("127.0.0.1", port, local="127.0.0.3", timeout=PATIENCE_S)
        assert caught.value.kind is Kind.PEER_LOST
        worker.server.emit("REPLICATION_STAGE", schema.StageChanged(stage="done", epoch=1))
        assert await peer.execute("peer-prepare", {"epoch": 4}) == {}
        peer.close()
        assert worker.calls == [schema.PeerEpoch(epoch=3), schema.PeerEpoch(epoch=4)]

    with_worker(tmp_path, body)
    assert "control client 127.0.0.3 is not allowed here; hung up" in caplog.text


def test_peer_learns_that_the_connection_ended(tmp_path: Path) -> None:
    async def body(worker: Worker, path: Path) -> None:
        await worker.server.listen_tcp("127.0.0.1", 0, peer="127.0.0.1")
        peer = await Connection.tcp("127.0.0.1", worker.server.tcp_port, local=None, timeout=PATIENCE_S)
        await worker.server.close()
        assert await peer.lost
        with pytest.raises(Error) as caught:
            await peer.execute("peer-prepare", {"epoch": 3})
        assert caught.value.kind is Kind.PEER_LOST

    with_worker(tmp_path, body)


def test_connection_gives_up_on_a_server_that_says_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        path = tmp_path / "silent.sock"
        async with await asyncio.start_unix_server(silent, str(path)):
            with pytest.raises(Error) as caught:
                await Connection.unix(path, timeout=0.01)
            assert caught.value.kind is Kind.TIMED_OUT

    asyncio.run(main())


def test_error_of_a_peer_is_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(framing.greeting())
            await reader.readline()
            writer.write(b'{"return":{},"id":1}')
            await reader.readline()
            writer.write(b'{"error":{"class":"GenericError","desc":"no\\nERROR: yes\\u001b[31m"},"id":2}')
            await reader.read()
            writer.close()

        path = tmp_path / "peer.sock"
        async with await asyncio.start_unix_server(say, str(path)):
            connection = await Connection.unix(path, timeout=PATIENCE_S)
            with pytest.raises(Error) as caught:
                await connection.execute("peer-hello")
            assert caught.value.detail == "no?ERROR: yes?[31m"
            connection.close()

    asyncio.run(main())


def test_connection_ends_at_a_server_that_talks_nonsense(tmp_path: Path) -> None:
    async def main() -> None:
        async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n")
            await reader.read()
            writer.close()

        path = tmp_path / "nonsense.sock"
        async with await asyncio.start_unix_server(nonsense, str(path)):
            with pytest.raises(Error, match="broke the protocol"):
                await Connection.unix(path, timeout=PATIENCE_S)

    asyncio.run(main())
