"""The control channel between hosts inside of TLS: from the first byte, or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.control import schema
from tcmu_replication.control import server as server_module
from tcmu_replication.control.connection import Connection
from tcmu_replication.control.server import Server
from tcmu_replication.errors import Error, Kind
from tcmu_replication.tls import Context
from tests.support.certificates import Authority
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("openssl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tls")
    ours = Authority(base)
    ours.issue(base / "alpha", "alpha")
    ours.issue(base / "beta", "beta")
    (base / "stranger").mkdir()
    Authority(base, "other").issue(base / "stranger", "alpha")
    (base / "stranger/ca-cert.pem").write_bytes((base / "alpha/ca-cert.pem").read_bytes())
    return base


def client(made: Path, who: str, name: str = "beta") -> Context:
    return Context(str(made / who), server_side=False, names=[name])


def with_server(tls: Context | None, body: Callable[[Server], Awaitable[None]]) -> None:
    async def hello(arguments: schema.PeerHello, session: Any) -> schema.PeerState:
        return schema.PeerState(stage="running", epoch=3, generation="g", length=512)

    async def main() -> None:
        server = Server({"peer-hello": hello})
        await server.listen_tcp("127.0.0.1", 0, "127.0.0.1", tls)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await body(server)
        finally:
            await server.close()

    asyncio.run(main())


async def hello(server: Server, tls: Context | None) -> int:
    """Ask; the epoch that is answered."""
    connection = await Connection.tcp("127.0.0.1", server.tcp_port, local=None, timeout=PATIENCE_S, tls=tls)
    try:
        state = await connection.execute("peer-hello", {"resource": "disk0", "protocol": 2})
        return int(state["epoch"])
    finally:
        connection.close()


def test_peer_with_the_right_certificate_is_answered(made: Path) -> None:
    async def body(server: Server) -> None:
        for _ in range(2):
            assert await hello(server, client(made, "alpha")) == 3

    with_server(Context(str(made / "beta"), server_side=True, names=["alpha"]), body)


REFUSED = {
    # the client's directory, the server's name that it wants, what it is told, what the server notes
    "server of another name": ("alpha", "gamma", "names beta, and not gamma", ""),
    "client of another name": (
        "beta",
        "beta",
        "it may not accept our certificate",
        "names beta, and not alpha",
    ),
    "client of another CA": ("stranger", "beta", "it may not accept our certificate", "not signed by our CA"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_peer_that_is_refused_is_told_and_noted(made: Path, row: str) -> None:
    who, name, said, note = REFUSED[row]
    noted: list[str] = []

    async def body(server: Server) -> None:
        with pytest.raises(Error) as caught:
            await hello(server, client(made, who, name))
        assert said in str(caught.value)
        assert caught.value.kind is (Kind.PEER_LOST if note else Kind.PERMISSION)
        assert await hello(server, client(made, "alpha")) == 3

    tls = Context(str(made / "beta"), server_side=True, names=["alpha"], refused=noted.append)
    with_server(tls, body)
    assert note in "".join(noted)


def test_client_in_plain_text_is_told_nothing_and_noted(made: Path) -> None:
    noted: list[str] = []

    async def body(server: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.tcp_port)
        writer.write(b'{"execute": "qmp_capabilities"}\n')
        with contextlib.suppress(ConnectionResetError):
            assert b"QMP" not in await reader.read()
        writer.close()
        with pytest.raises(Error, match="it took the connection and says nothing") as caught:
            await Connection.tcp("127.0.0.1", server.tcp_port, local=None, timeout=0.5)
        assert caught.value.kind is Kind.TIMED_OUT

    with_server(Context(str(made / "beta"), server_side=True, names=["alpha"], refused=noted.append), body)
    assert noted == ["it does not speak TLS here"]


def test_server_in_plain_text_is_refused(made: Path) -> None:
    async def body(server: Server) -> None:
        with pytest.raises(Error, match="does not speak TLS here") as caught:
            await hello(server, client(made, "alpha"))
        assert caught.value.kind is Kind.PERMISSION

    with_server(None, body)


def test_client_that_never_shakes_hands_is_hung_up_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "NEGOTIATION_S", 0.05)

    async def body(server: Server) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", server.tcp_port))
            assert await loop.sock_recv(sock, 100) == b""

    with_server(Context(str(made / "beta"), server_side=True, names=["alpha"]), body)
