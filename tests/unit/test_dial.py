"""Connecting to a port, and the words when it fails."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from tcmu_replication.dial import dial


def test_connection_comes_from_the_address_that_was_asked_for() -> None:
    async def body() -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            await dial("127.0.0.1", server.getsockname()[1], "127.0.0.5") as sock,
        ):
            assert sock.getpeername() == server.getsockname()
            assert sock.getsockname()[0] == "127.0.0.5"

    asyncio.run(body())


def test_port_where_nobody_listens_is_told_in_words() -> None:
    """asyncio says "Connect call failed ('127.0.0.1', 1)"."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(OSError) as caught:  # noqa: PT011 - what it says is looked at below
            asyncio.run(dial("127.0.0.1", bound.getsockname()[1]))
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.strerror == "Connection refused: nobody listens there"


def test_address_that_is_not_this_hosts_is_told_in_words() -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        asyncio.run(dial("127.0.0.1", 1, "192.0.2.1"))
    assert caught.value.strerror == "Cannot assign requested address"
