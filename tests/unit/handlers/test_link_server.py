"""A server that a controller starts where the secondary listens for its primary, and servers elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import Any

import pytest

from tcmu_replication.errors import Error
from tests.support.nbd import Nbd, NbdError
from tests.support.processes import free_port
from tests.unit.handlers.ends import End


def inet(host: str, port: int, **options: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": host, "port": str(port), **options}}


@contextlib.asynccontextmanager
async def client(end: End, export: str) -> Any:
    """A connection to the secondary's server, from the primary's address."""
    port = end.backstore.resource.link.port
    nbd = await asyncio.to_thread(Nbd, ("127.0.0.2", port), export)
    try:
        yield nbd
    finally:
        nbd.close()


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "", "::"])
def test_server_where_we_listen_is_ours(play: Any, host: str) -> None:
    async def story(alpha: End, beta: End) -> None:
        port = beta.backstore.resource.link.port
        await beta.ask("nbd-server-start", addr=inet(host, port))
        await beta.ask("nbd-server-add", device="disk0-disk", writable=True)
        await alpha.write(0, 1)
        async with client(beta, "disk0-disk") as nbd:
            await asyncio.to_thread(nbd.write, 4096, b"\2" * 512)
        assert (beta.disk[0], beta.disk[4096]) == (1, 2)
        assert bytes(beta.backstore.top.fetch(4096, 1)) == b"\0"  # its pre-image was saved

    play(story)


def test_server_that_is_stopped_takes_the_primary_with_it(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        addr = inet("0.0.0.0", beta.backstore.resource.link.port)
        with pytest.raises(Error, match="NBD server not running"):
            await beta.ask("nbd-server-stop")
        await beta.ask("nbd-server-start", addr=addr)
        await alpha.write(0, 1)
        await beta.ask("nbd-server-stop")
        with pytest.raises((ConnectionError, NbdError)):
            async with client(beta, "disk0"):
                pass
        await alpha.write(0, 2)
        assert (alpha.disk[0], beta.disk[0]) == (2, 1)
        await beta.ask("nbd-server-start", addr=addr)
        assert beta.backstore._server.server.exports == ("disk0",)

    play(story)


def test_name_of_the_forwarded_writes_is_taken(play: Any) -> None:
    """Before start too: the primary would write to the LUN, and no pre-image were saved."""

    async def story(alpha: End, beta: End) -> None:
        await beta.ask("nbd-server-start", addr=inet("127.0.0.2", beta.backstore.resource.link.port))
        for options in ({"device": "disk0"}, {"device": "disk", "name": "disk0", "writable": False}):
            with pytest.raises(Error, match="NBD server already has export named 'disk0'"):
                await beta.ask("nbd-server-add", **({"writable": True} | options))
        assert await beta.ask("query-block-exports") == []
        await beta.ask("start")
        await alpha.ask("start", assume_clean=True)
        await alpha.write(0, 3)
        assert beta.disk[0] == 3

    play(story, started=False)


def test_forwarded_writes_may_have_their_name_before_the_start(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await beta.ask("nbd-server-start", addr=inet("127.0.0.2", beta.backstore.resource.link.port))
        await beta.ask("nbd-server-add", device="disk0-disk", name="disk0", writable=True)
        await beta.ask("start")
        await alpha.ask("start", assume_clean=True)
        await alpha.write(0, 3)
        assert (beta.disk[0], bytes(beta.backstore.top.fetch(0, 1))) == (3, b"\0")
        await beta.ask("failover", to="checkpoint", force=True)
        assert beta.told("BLOCK_EXPORT_DELETED") == [{"id": "disk0"}]
        with pytest.raises((ConnectionError, NbdError)):
            async with client(beta, "disk0"):
                pass

    play(story, started=False)


def test_first_free_port_of_a_range(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        with socket.socket() as busy:
            busy.bind(("127.0.0.1", free_port()))
            busy.listen()
            port = busy.getsockname()[1]
            with pytest.raises(Error, match="Failed to find an available port"):
                await alpha.ask("nbd-server-start", addr=inet("127.0.0.1", port))
            await alpha.ask("nbd-server-start", addr=inet("127.0.0.1", port, to=port + 20))
            await alpha.ask("nbd-server-add", device="disk0")
            found = [p for p in range(port + 1, port + 21) if await asyncio.to_thread(serves, p, "disk0")]
            assert len(found) == 1

    play(story, started=False)


def serves(port: int, export: str) -> bool:
    try:
        Nbd(("127.0.0.1", port), export).close()
    except OSError:
        return False
    return True


def test_tls_is_the_resource_files(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        addr = inet("127.0.0.2", free_port())
        with pytest.raises(
            Error, match=r"No TLS credentials with id 'tls0': the resource file has no \[tls\]"
        ):
            await beta.ask("nbd-server-start", addr=addr, tls_creds="tls0")
        with pytest.raises(Error, match="tls-authz is not understood here"):
            await beta.ask("nbd-server-start", addr=addr, tls_authz="authz0")
        with pytest.raises(Error, match="NBD server not running"):
            await beta.ask("nbd-server-stop")

    play(story, started=False)


BAD = {
    "number that is none": ({"host": "127.0.0.2", "port": "²"}, "the port must be a number up to 65535"),
    "number that is too long": (
        {"host": "127.0.0.2", "port": "9" * 5000},
        "the port must be a number up to 65535",
    ),
    "label that is too long": ({"host": "a" * 64, "port": "0"}, "Name or service not known"),
    "name with a NUL": ({"host": "a\0b", "port": "0"}, "Name or service not known"),
    "no path": ({"path": ""}, "UNIX socket path '' is no file's"),
    "path in no directory": ({"path": "\0abstract"}, "is no file's"),
    "path that is too long": ({"path": "/" + "p" * 200}, "listen on"),
    "path of a directory": ({"path": "/"}, "Failed to bind socket to /: Address already in use"),
}


@pytest.mark.parametrize(("data", "why"), BAD.values(), ids=list(BAD))
def test_addresses_that_are_none(play: Any, data: dict[str, str], why: str) -> None:
    async def story(alpha: End, beta: End) -> None:
        addr = {"type": "inet" if "port" in data else "unix", "data": data}
        for end in (alpha, beta):
            with pytest.raises(Error, match=re.escape(why)):
                await end.ask("nbd-server-start", addr=addr)

    play(story, started=False)
