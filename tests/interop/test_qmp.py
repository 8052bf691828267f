"""The control server is real QMP: QEMU's own client library talks to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tcmu_replication.control import schema
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tests.unit.control.documents import status

pytestmark = pytest.mark.interop


async def query_status(arguments: Any, session: Session) -> schema.Status:
    return status()


async def stop(arguments: Any, session: Session) -> None:
    raise Error(Kind.INVALID_STATE, "Block replication is not running")


def test_qemus_library_negotiates_calls_and_listens(tmp_path: Path) -> None:
    async def main() -> None:
        server = Server({"query-status": query_status, "stop": stop})
        await server.listen_unix(tmp_path / "disk0.sock")
        client = QMPClient("test")
        await client.connect(str(tmp_path / "disk0.sock"))
        answer = await client.execute("query-status")
        assert answer["last-checkpoint"]["pause-ms"] == 1.5
        with pytest.raises(ExecuteError, match="Block replication is not running") as caught:
            await client.execute("stop")
        assert caught.value.error.error.class_ == "GenericError"
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("cont")
        assert {"name": "stop"} in await client.execute("query-commands")
        with client.listener("REPLICATION_LINK") as events:
            server.emit("REPLICATION_LINK", schema.Link(state="lost", reason="no answer"))
            event = await events.get()
        assert event["data"]["reason"] == "no answer"
        await client.disconnect()
        await server.close()

    asyncio.run(asyncio.wait_for(main(), 30))
