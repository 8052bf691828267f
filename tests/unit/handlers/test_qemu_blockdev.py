"""The primary's replica under a controller's names: what is added, what is refused, and the link that is cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tcmu_replication.block.remote import State
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.human import _modern, _options
from tests.unit.handlers.ends import End


def nbd(alpha: End, name: str = "nbd0", **options: Any) -> dict[str, Any]:
    """The connection as the resource file has it, but for `options`."""
    link = alpha.backstore.resource.link
    server = {"type": "inet", "host": "127.0.0.2", "port": str(link.port)}
    return {"driver": "nbd", "node-name": name, "server": server, "export": "disk0", **options}


async def add(alpha: End, **options: Any) -> None:
    await alpha.ask(
        "blockdev-add", driver="replication", mode="primary", node_name="r", file=nbd(alpha, **options)
    )


async def named(end: End) -> set[str]:
    return {node["node-name"] for node in await end.ask("query-named-block-nodes", flat=True)}


@pytest.mark.parametrize("export", ["disk0", "disk0-disk"])
def test_what_the_resource_file_says_is_added(play: Any, export: str) -> None:
    async def story(alpha: End, beta: End) -> None:
        await add(alpha, export=export, **{"reconnect-delay": 3})
        assert await named(alpha) == {"top", "disk", "r", "nbd0"}
        await alpha.ask("x-blockdev-change", parent="disk0", node="r")
        await beta.ask("start")
        await alpha.ask("start", assume_clean=True)
        await alpha.write(0, 5)
        assert beta.disk[0] == 5
        nodes = {node["node-name"]: node for node in await alpha.ask("query-named-block-nodes", flat=True)}
        assert nodes["nbd0"]["drv"] == "nbd"
        assert nodes["nbd0"]["file"].endswith("/disk0")

    play(story, started=False, reconnect_delay=3)


OTHERS: dict[str, dict[str, Any]] = {
    "port": {"server": {"type": "inet", "host": "127.0.0.2", "port": "1"}},
    "host": {"server": {"type": "inet", "host": "127.0.0.3", "port": "PORT"}},
    "name": {"server": {"type": "inet", "host": "no such host", "port": "PORT"}},
    "socket": {"server": {"type": "unix", "path": "/run/some.sock"}},
    "export": {"export": "disk1"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_any_other_secondary_is_refused(play: Any, other: dict[str, Any]) -> None:
    async def story(alpha: End, beta: End) -> None:
        port = str(alpha.backstore.resource.link.port)
        server = {k: port if v == "PORT" else v for k, v in other.get("server", {}).items()}
        with pytest.raises(Error) as caught:
            await add(alpha, **(other | ({"server": server} if server else {})))
        assert caught.value.kind is Kind.BAD_CONFIG
        assert str(alpha.backstore.resource.path) in str(caught.value)
        assert f"the secondary is beta, export disk0 or disk0-disk at 127.0.0.2 port {port}" in str(
            caught.value
        )
        assert await named(alpha) == {"top", "disk"}

    play(story, started=False)


def test_options_that_the_resource_file_contradicts(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        with pytest.raises(Error, match=r"disk0\.toml says: reconnect-delay is 0\.1\. Say the same"):
            await add(alpha, **{"reconnect-delay": 5})
        with pytest.raises(Error, match=r"No TLS credentials with id 'tls0': .*disk0\.toml has no \[tls\]"):
            await add(alpha, **{"tls-creds": "tls0"})
        with pytest.raises(Error, match="'disk' is no connection to the secondary"):
            await alpha.ask("blockdev-add", driver="replication", mode="primary", node_name="r", file="disk")
        options = {"driver": "replication", "mode": "secondary", "node_name": "r", "top_id": "disk0"}
        with pytest.raises(Error, match="alpha is the primary of disk0"):
            await alpha.ask("blockdev-add", file=nbd(alpha), **options)
        with pytest.raises(
            Error, match=r"beta is the secondary of disk0: its chain is what \[host\.beta\] of"
        ):
            await beta.ask("blockdev-add", file=nbd(alpha), **options)

    play(story, started=False)


def test_there_is_one_replica(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        with pytest.raises(Error, match="disk0 has one replica, which is there as 'replication'"):
            await add(alpha)
        await alpha.ask("x-blockdev-change", parent="top", child="children.1")
        await alpha.ask("blockdev-del", node_name="replication")
        assert await named(alpha) == {"top", "disk"}
        assert await alpha.ask("query-yank") == []
        await add(alpha)
        with pytest.raises(Error, match="disk0 has one replica, which is there as 'r'"):
            await alpha.ask("blockdev-add", **nbd(alpha, "other"))
        await alpha.ask("x-blockdev-change", parent="top", node="r")
        await alpha.write(0, 6)
        assert beta.disk[0] == 6

    play(story)


def test_replica_that_was_forgotten_is_there_again_with_the_next_start(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
        await alpha.ask("blockdev-del", node_name="replication")
        for end in (beta, alpha):
            await end.ask("stop-replication")
        for end in (beta, alpha):
            await end.ask("start", assume_clean=True)
        await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
        await alpha.ask("x-blockdev-change", parent="disk0", node="replication")
        await alpha.write(0, 6)
        assert beta.disk[0] == 6

    play(story)


def test_new_replica_of_disks_that_differ_is_not_attached(play: Any) -> None:
    """After the end only the operator knows whether the disks were made equal again."""

    async def story(alpha: End, beta: End) -> None:
        await alpha.ask("stop-replication")
        await alpha.write(0, 7)
        await add(alpha)
        with pytest.raises(Error, match="start both"):
            await alpha.ask("x-blockdev-change", parent="top", node="r")
        await beta.ask("stop-replication")
        (beta.directory / "disk.img").write_bytes(alpha.disk)
        await beta.ask("start")
        await alpha.ask("start")
        await alpha.ask("x-blockdev-change", parent="top", node="r")
        await alpha.write(4096, 8)
        assert (beta.disk[0], beta.disk[4096]) == (7, 8)

    play(story)


def test_yank_hangs_up_for_good(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        [instance] = await alpha.ask("query-yank")
        assert instance == {"type": "block-node", "node-name": "remote"}
        with pytest.raises(Error, match="Instance not found"):
            await alpha.ask("yank", instances=[instance, {"type": "migration"}])
        assert alpha.backstore.engine.remote.state is State.CONNECTED
        await alpha.ask("yank", instances=[instance])
        assert alpha.backstore.engine.remote.state is State.CLOSED
        assert alpha.told("REPLICATION_LINK")[-1]["state"] == "none"
        await alpha.write(0, 9)
        assert (alpha.disk[0], beta.disk[0]) == (9, 0)
        assert (await alpha.ask("query-errors"))["error"]
        assert await beta.ask("query-yank") == []

    play(story)


def test_options_of_drive_add() -> None:
    said = "driver=replication,file.driver=nbd,file.host=::1,file.port=10,file.export=a,,b=c,file.reconnect-delay=3"
    assert _modern(_options(said)) == {
        "driver": "replication",
        "file": {
            "driver": "nbd",
            "server": {"type": "inet", "host": "::1", "port": "10"},
            "export": "a,b=c",
            "reconnect-delay": 3,
        },
    }
    assert _modern(_options("driver=nbd,server.type=unix,server.path=x"))["server"] == {
        "type": "unix",
        "path": "x",
    }


@pytest.mark.parametrize("text", ["driver", "a=1,a=2", "a=1,a.b=2", "a.b=1,a=2", "a.b=1,a.b.c=2"])
def test_options_of_drive_add_that_are_none(text: str) -> None:
    with pytest.raises(Error, match="Invalid parameter"):
        _options(text)


async def replace(alpha: End) -> None:
    """As QEMU's script when the secondary hangs, and then for the new one."""
    [instance] = await alpha.ask("query-yank")
    await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
    await alpha.ask("yank", instances=[instance])
    await alpha.ask("blockdev-del", node_name="replication")
    await add(alpha)


def test_replica_that_was_yanked_and_missed_nothing_is_connected_anew(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await alpha.write(0, 1)
        old = alpha.backstore.engine.remote
        await replace(alpha)
        with pytest.raises(Error, match="was removed from the mirror"):
            await alpha.ask("checkpoint")
        await alpha.ask("x-blockdev-change", parent="disk0", node="r")
        assert alpha.backstore.engine.remote is not old
        assert alpha.told("REPLICATION_LINK")[-1]["state"] == "connected"
        await alpha.write(0, 2)
        assert beta.disk[0] == 2
        assert (await alpha.ask("checkpoint"))["epoch"] == 2

    play(story)


def test_replica_that_was_yanked_and_missed_a_write_stays_out(play: Any) -> None:
    async def story(alpha: End, beta: End) -> None:
        await replace(alpha)
        await alpha.write(0, 1)
        with pytest.raises(Error, match="misses writes"):
            await alpha.ask("x-blockdev-change", parent="disk0", node="r")
        assert alpha.backstore.engine.removed
        assert alpha.backstore.engine.remote.state is State.CLOSED

    play(story)


def test_replica_that_was_yanked_stays_out_while_nobody_listens(play: Any) -> None:
    """Once the secondary offers its export again, it is connected."""

    async def story(alpha: End, beta: End) -> None:
        link = alpha.backstore.resource.link
        addr = {"type": "inet", "data": {"host": "127.0.0.2", "port": str(link.port)}}
        await beta.ask("nbd-server-start", addr=addr)
        await beta.ask("nbd-server-stop")
        await replace(alpha)
        with pytest.raises(Error, match="the server has no export 'disk0'"):
            await alpha.ask("x-blockdev-change", parent="disk0", node="r")
        assert alpha.backstore.engine.removed
        await beta.ask("nbd-server-start", addr=addr)
        await alpha.ask("x-blockdev-change", parent="disk0", node="r")
        await alpha.write(0, 1)
        assert beta.disk[0] == 1

    play(story)


@pytest.mark.parametrize("anew", [False, True], ids=["same connection", "new connection"])
def test_yank_ends_the_wait_for_a_replica_that_is_put_back(play: Any, anew: bool) -> None:
    """The LUN waits with it."""

    async def story(alpha: End, beta: End) -> None:
        if anew:
            await replace(alpha)
        else:
            await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
        forwarded = beta.backstore.engine.forwarded
        hold = forwarded.hold()
        name = "r" if anew else "replication"
        adding = asyncio.create_task(alpha.ask("x-blockdev-change", parent="disk0", node=name))
        while not forwarded.waiting:
            await asyncio.sleep(0)
        writing = asyncio.create_task(alpha.write(0, 1))
        await alpha.ask("yank", instances=await alpha.ask("query-yank"))
        with pytest.raises(Error, match="was closed"):
            await adding
        await writing
        hold.release()
        assert (alpha.disk[0], beta.disk[0]) == (1, 0)
        assert alpha.backstore.engine.machine.error is not None

    play(story)


def test_replica_is_not_put_back_behind_the_end_of_replication(play: Any) -> None:
    """Two controllers at once: by the time that the second has its turn it has ended."""

    async def story(alpha: End, beta: End) -> None:
        await alpha.ask("x-blockdev-change", parent="disk0", child="children.1")
        async with alpha.backstore.engine.between_commands():  # as under a third command
            both = asyncio.gather(
                alpha.ask("stop-replication"),
                alpha.ask("x-blockdev-change", parent="disk0", node="replication"),
                return_exceptions=True,
            )
            await asyncio.sleep(0)
        stopped, added = await both
        assert stopped["stage"] == "done"
        assert str(added) == "no replica of disk0 was removed"
        await alpha.write(0, 1)
        assert beta.disk[0] == 0

    play(story)


LONG = {
    "depth": (
        "driver=nbd,server.type=unix,server.path=x," + "a." * 4000 + "b=1",
        "Parameter 'a' is unexpected",
    ),
    "number": (
        "driver=nbd,server.type=unix,server.path=x,reconnect-delay=" + "9" * 5000,
        "expected: integer",
    ),
}


@pytest.mark.parametrize(("options", "why"), LONG.values(), ids=list(LONG))
def test_options_of_drive_add_that_are_too_long(play: Any, options: str, why: str) -> None:
    async def story(alpha: End, beta: End) -> None:
        said = await alpha.ask("human-monitor-command", command_line=f"drive_add -n b {options},node-name=n")
        assert why in said

    play(story, started=False)


@pytest.mark.parametrize("line", ["", "drive_add", "drive_add x y", "drive_del", "drive_del a b"])
def test_lines_that_are_none(play: Any, line: str) -> None:
    async def story(alpha: End, beta: End) -> None:
        said = await alpha.ask("human-monitor-command", command_line=line)
        assert said == "say: drive_add -n buddy OPTIONS, or drive_del NODE\r\n"

    play(story, started=False)
