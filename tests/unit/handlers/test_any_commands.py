"""Random commands on both ends, in turn and at once: each is answered, and no write goes where it must not.

The same seed gives the same commands; a failing run shows them all.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.errors import Error
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S
from tests.unit.handlers.ends import SESSION, End

BLOCKS = 8
LIMIT_S = PATIENCE_S
"""A command that takes longer hangs: nothing here waits for longer than [link]'s timeout of 20 s."""

NODES = [
    "disk0",
    "disk0-disk",
    "disk",
    "top",
    "replication",
    "remote",
    "r",
    "n",
    "#remote",
    "1",
    "",
    "é" * 40,
]
HOSTS = ["127.0.0.1", "0.0.0.0", "", "::", "a" * 64, "127.0.0.2\0", "x" * 300, "é"]
PORTS = ["0", "65536", "-1", "x", "", "²", "9" * 5000]
LINES = ["", "drive_del", "info block", "drive_add -n b driver=nbd", "drive_add -n b " + "a." * 4000 + "b=1"]
MOVES = {
    "start", "checkpoint", "failover", "stop-replication", "xen-set-replication", "xen-colo-do-checkpoint",
    "x-colo-lost-heartbeat",
}  # fmt: skip
"""What may change what the secondary's LUN shows; else only its own writes do."""
PLAIN = [
    "checkpoint", "query-block", "query-block-exports", "query-block-jobs", "query-colo-status",
    "query-errors", "query-jobs", "query-named-block-nodes", "query-status", "query-xen-replication-status",
    "query-yank", "stop-replication", "x-colo-lost-heartbeat", "xen-colo-do-checkpoint", "nbd-server-stop",
]  # fmt: skip


class Commands:
    """Random ones, of all that an end has. `port` is where the secondary listens."""

    def __init__(self, dice: random.Random, port: int, directory: Path) -> None:
        self._dice = dice
        self._server = {"type": "inet", "host": "127.0.0.2", "port": str(port)}
        self._free = str(free_port())
        self._paths = [str(directory / "a.sock"), str(directory), "", "\0x", "a\0b", "p" * 200]

    def next(self, host: str) -> tuple[str, dict[str, Any]]:
        """One for `host`."""
        one, port = self._dice.choice, self._server["port"]
        nodes = ["disk0", "disk0-disk", "r", "n", "replication", one(NODES)]
        choices: list[tuple[str, dict[str, Any]]] = [
            (one(PLAIN), {}),
            ("start", {}),
            ("start", {}),
            ("failover", {"to": one(["checkpoint", "latest", None])}),
            ("xen-set-replication", {"enable": one([True, False]), "primary": one([True, False])}),
            ("xen-set-replication", {"enable": False, "primary": False, "failover": True}),
            ("block-job-cancel", {"device": one(["commit-disk0", "backup-disk0", "x"])}),
            ("job-cancel", {"id": one(["commit-disk0", "x"])}),
            ("nbd-server-start", {"addr": self._addr()}),
            ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "0.0.0.0", "port": port}}}),
            ("nbd-server-add", {"device": "disk0-disk", "writable": True}),
            ("nbd-server-add", {"device": one(nodes), "name": one(nodes), "writable": one([True, False])}),
            ("nbd-server-remove", {"name": one(nodes), "mode": one(["safe", "hard"])}),
            (
                "block-export-add",
                {"type": "nbd", "id": one(nodes), "node-name": one(nodes), "writable": True},
            ),
            ("block-export-del", {"id": one(nodes), "mode": one(["safe", "hard"])}),
            ("blockdev-add", self._blockdev()),
            ("blockdev-add", self._blockdev()),
            ("blockdev-del", {"node-name": one(nodes)}),
            ("x-blockdev-change", {"parent": "disk0", "child": "children.1"}),
            ("x-blockdev-change", {"parent": one(["disk0", "top"]), "node": one(nodes)}),
            ("yank", {"instances": [{"type": "block-node", "node-name": one(["n", "remote", "#remote"])}]}),
            ("human-monitor-command", {"command-line": self._line()}),
        ]
        name, arguments = one(choices)
        if name == "nbd-server-start" and host == "alpha" and "port" in arguments["addr"]["data"]:
            # Both hosts are this one here: the secondary's port would be free while that restarts.
            arguments["addr"]["data"]["port"] = self._free
        return name, arguments

    def _addr(self) -> dict[str, Any]:
        one = self._dice.choice
        if one([True, False, False]):
            return {"type": "unix", "data": {"path": one(self._paths)}}
        port = one([self._server["port"], self._free, one(PORTS)])
        return {"type": "inet", "data": {"host": one(["127.0.0.2", one(HOSTS)]), "port": port}}

    def _blockdev(self) -> dict[str, Any]:
        one = self._dice.choice
        server = {**self._server}
        if self._dice.random() < 0.2:
            server |= {"host": one(HOSTS), "port": one(PORTS)}
        nbd = {"driver": "nbd", "server": server, "export": "disk0"}
        if one([True, False]):
            return {**nbd, "node-name": "n"}
        file = one([nbd, {**nbd, "node-name": "n"}, "n", "x"])
        return {
            "driver": "replication",
            "mode": "primary",
            "node-name": one(["r", "replication"]),
            "file": file,
        }

    def _line(self) -> str:
        one = self._dice.choice
        at = f"file.server.type=inet,file.server.host=127.0.0.2,file.server.port={self._server['port']}"
        add = f"drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,{at},file.export=disk0,node-name=r"
        long = "drive_add -n b driver=nbd,reconnect-delay=" + "9" * 5000
        return one([add, add, "drive_del r", "drive_del replication", one([*LINES, long])])


async def give(end: End, name: str, arguments: dict[str, Any], told: list[str]) -> None:
    """As a control socket's client: an answer or an Error that is the protocol's."""
    told.append(f"{end.context.host}: {name} {arguments!r:.300}")
    row = end.backstore.table[name]
    try:
        given = row.decode(arguments)
        async with asyncio.timeout(LIMIT_S):
            row.encode(await end.handlers[name](given, SESSION))
    except Error as error:
        told.append(f"   {name}: {error!s:.200}")


async def write(end: End, told: list[str], dice: random.Random) -> None:
    """A write that the LUN may refuse: a secondary's does before start."""
    block, byte = dice.randrange(BLOCKS), dice.randrange(256)
    told.append(f"{end.context.host}: write {byte} to {block}")
    try:
        await end.write(block * BLOCK, byte)
    except Error as error:
        told.append(f"   {error}")


def lun(end: End) -> bytes | None:
    """What the LUN shows; None while it shows nothing."""
    try:
        return bytes(end.backstore.top.fetch(0, BLOCKS * BLOCK))
    except Error:
        return None


def check_primary(alpha: End, beta: End) -> None:
    engine = alpha.backstore.engine
    if engine.top.not_ready is not None:
        assert lun(alpha) is None
        return
    assert (lun(alpha) or b"") == alpha.disk[: BLOCKS * BLOCK]
    if engine.stage is not Stage.RUNNING:
        return
    ours, theirs = alpha.disk, beta.disk
    follows = beta.backstore.engine.manifest.generation == engine.manifest.generation
    if not follows or beta.backstore.engine.stage is not Stage.RUNNING:
        return
    differ = [n for n in range(BLOCKS) if ours[n * BLOCK] != theirs[n * BLOCK]]
    if differ:
        assert engine.machine.error is not None, "a gap that is not recorded"
        assert engine.out_of_sync_bytes >= len(differ) * BLOCK


def check_secondary(beta: End) -> None:
    store = beta.backstore
    engine, link, exports = store.engine, store._server, store._qemu.exports
    running = engine.forwarded is not None
    assert running <= (engine.stage is Stage.RUNNING)
    exportable = exports._exportable
    assert exportable.device.child is (engine.forwarded if running else store.disk)
    assert link._forwarded is engine.forwarded
    qmp = [export for export, _ in exports._exports.values()]
    if any(export.node is exportable.device and not export.read_only for export in qmp):
        assert running or engine.stage is Stage.NONE, "an export left open"
    others = {export.name for export in qmp if exports._server is link.server}
    assert set(link.server.exports) - others <= ({"disk0"} if running else set())


def check(alpha: End, beta: End) -> None:
    """What is true whenever nothing is under way."""
    for end in (alpha, beta):
        engine = end.backstore.engine
        found = manifests.load(end.directory / "overlays")
        stage = Stage.NONE if found is None else found.stage
        # The next worker tries a failed commit again.
        assert engine.stage is stage or (engine.stage, stage) == (Stage.FAILOVER, Stage.FAILOVER_FAILED)
        if engine.stage is Stage.RUNNING:
            assert (found.error, found.epoch) == (engine.machine.error, engine.epoch)
        exports = end.backstore._qemu.exports
        there = () if exports._server is None else exports._server.exports
        assert {export.name for export, _ in exports._exports.values()} <= set(there)
    check_primary(alpha, beta)
    check_secondary(beta)


async def restart(end: End, given: list[asyncio.Task[None]], told: list[str]) -> None:
    """The worker ends, with commands under way, and the next one begins."""
    told.append(f"{end.context.host}: restart")
    await end.backstore.close()
    for task in given:
        task.cancel()  # as the control server does
    for ended in await asyncio.gather(*given, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    await end._control.close()
    await end.open()
    told.append(f"{end.context.host}: restarted")


async def begin_again(alpha: End, beta: End, told: list[str]) -> None:
    """As the operator does after the end: equal disks, and both started."""
    if beta.backstore.engine.stage is Stage.FAILOVER_FAILED:
        await restart(beta, [], told)
    if beta.backstore.engine.stage is Stage.FAILOVER:
        await beta.until(Stage.DONE)
    for end in (alpha, beta):
        await give(end, "stop-replication", {}, told)
    if {alpha.backstore.engine.stage, beta.backstore.engine.stage} <= {Stage.NONE, Stage.DONE}:
        (beta.directory / "disk.img").write_bytes(alpha.disk)
        await give(beta, "start", {"assume-clean": True}, told)
        await give(alpha, "start", {"assume-clean": True}, told)


@pytest.mark.parametrize("seed", range(8))
def test_any_commands(play: Any, seed: int) -> None:
    dice = random.Random(seed)
    told: list[str] = [f"seed {seed}"]

    async def story(alpha: End, beta: End) -> None:
        commands = Commands(dice, alpha.backstore.resource.link.port, alpha.directory.parent)
        before = lun(beta)
        for _ in range(60):
            moves = False
            given: dict[End, list[asyncio.Task[None]]] = {alpha: [], beta: []}
            for _ in range(dice.choice([1, 1, 1, 2, 4])):
                end = dice.choice([alpha, beta])
                name, arguments = commands.next(end.context.host)
                moves = moves or name in MOVES
                given[end].append(asyncio.create_task(give(end, name, arguments, told)))
            writes = [write(alpha, told, dice) for _ in range(dice.choice([0, 0, 0, 1, 2]))]
            await asyncio.gather(*writes)
            if dice.random() < 0.1:
                end = dice.choice([alpha, beta])
                await restart(end, given.pop(end), told)
            await asyncio.gather(*(task for tasks in given.values() for task in tasks))
            check(alpha, beta)
            after = lun(beta)
            assert moves or after == before, "a forwarded write reached the LUN"
            before = after
            if dice.random() < 0.15:
                await write(beta, told, dice)
                before = lun(beta)
            replicate = alpha.backstore.engine, beta.backstore.engine
            fine = all(e.stage is Stage.RUNNING and e.machine.error is None for e in replicate)
            if not fine and dice.random() < 0.4:
                await begin_again(alpha, beta, told)
                check(alpha, beta)
                before = lun(beta)

    try:
        play(story, reconnect_delay=0.1)
    except BaseException:
        print("\n".join(told))
        raise
