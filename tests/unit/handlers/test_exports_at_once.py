"""Exports that are changed by two controllers at once, or while a failover takes them away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tcmu_replication.errors import Error, Kind
from tests.support.nbd import Nbd
from tests.support.tools import PATIENCE_S
from tests.unit.handlers.ends import End


def at_the_link(beta: End) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": "127.0.0.2", "port": str(beta.backstore.resource.link.port)}}


async def connect(end: End, export: str) -> Nbd:
    return await asyncio.to_thread(Nbd, ("127.0.0.2", end.backstore.resource.link.port), export)


async def outcomes(*asked: Any) -> list[str]:
    """What each was answered: nothing, or its error."""
    ended = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(one, Error) for one in ended if isinstance(one, BaseException)), ended
    return [str(one) if isinstance(one, Error) else "" for one in ended]


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("to", ["checkpoint", "latest"])
def test_disk_is_not_exported_for_writing_while_a_failover_takes_it_away(play: Any, to: str) -> None:
    """It would be written past the pre-images, and beside the LUN that serves now."""

    async def story(alpha: End, beta: End) -> None:
        engine, server = beta.backstore.engine, beta.backstore._server.server
        await beta.ask("nbd-server-start", addr=at_the_link(beta))
        await beta.ask("nbd-server-add", device="disk0-disk", writable=True)
        nbd = await connect(beta, "disk0-disk")
        forwarded = engine.forwarded
        hold = forwarded.hold()  # so that the export ends slowly
        writing = asyncio.create_task(asyncio.to_thread(nbd.write, 0, b"\1" * 512))
        await until(lambda: forwarded.waiting)
        failover = asyncio.create_task(beta.ask("failover", to=to, force=True))
        await until(lambda: "disk0-disk" not in server.exports)
        tries = []
        while not failover.done():
            tries.append(asyncio.create_task(beta.ask("nbd-server-add", device="disk0-disk", writable=True)))
            await asyncio.sleep(0)
            if len(tries) == 3:
                hold.release()
        assert all("Permission conflict" in answer for answer in await outcomes(*tries))
        assert server.exports == ()
        assert await beta.ask("query-block-exports") == []
        await asyncio.gather(writing, return_exceptions=True)
        nbd.close()

    play(story)


def test_server_is_stopped_twice_while_exports_come_and_go(play: Any) -> None:
    """An export that came behind the one that ends would outlive the server, and a failover trip over it."""

    async def story(alpha: End, beta: End) -> None:
        top, server = beta.backstore.top, beta.backstore._server.server
        await beta.ask("nbd-server-start", addr=at_the_link(beta))
        await beta.ask("nbd-server-add", device="disk0", name="one")
        await beta.ask("nbd-server-add", device="disk0", name="two")
        nbd = await connect(beta, "one")
        hold = top.hold()  # so that the export ends slowly
        reading = asyncio.create_task(asyncio.to_thread(nbd.read, 0, 512))
        await until(lambda: top.waiting)
        stopping = asyncio.create_task(beta.ask("nbd-server-stop"))
        await until(lambda: "one" not in server.exports)
        others = [
            asyncio.create_task(ask)
            for ask in (
                beta.ask("nbd-server-remove", name="two", mode="hard"),
                beta.ask("nbd-server-add", device="disk0-disk", writable=True),
                beta.ask("nbd-server-stop"),
            )
        ]
        await asyncio.sleep(0)
        hold.release()
        assert await outcomes(stopping, *others) == [
            "",
            "Export 'two' is not found",
            "NBD server not running",
            "NBD server not running",
        ]
        assert server.exports == ()
        assert (await beta.ask("failover", to="checkpoint", force=True))["to"] == "checkpoint"
        await asyncio.gather(reading, return_exceptions=True)
        nbd.close()

    play(story)


def test_disk_is_not_exported_for_writing_during_a_new_start_that_may_fail(play: Any) -> None:
    """The LUN serves the disk of the replication that is over, and goes on with it when the start has failed."""

    async def story(alpha: End, beta: End) -> None:
        engine, full = beta.backstore.engine, asyncio.Event()

        async def fail(pair: object) -> None:
            await full.wait()
            raise Error(Kind.NO_SPACE, "no space left")

        await beta.ask("stop-replication")
        await beta.ask("nbd-server-start", addr=at_the_link(beta))
        engine.receiver.make_durable = fail
        starting = asyncio.create_task(beta.ask("start", assume_clean=True))
        await until(lambda: engine.top.held)
        [answer] = await outcomes(beta.ask("nbd-server-add", device="disk0-disk", writable=True))
        full.set()
        assert "Permission conflict" in answer
        with pytest.raises(Error, match="no space left"):
            await starting
        assert beta.backstore._server.server.exports == ()

    play(story)
