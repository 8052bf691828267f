"""The daemon: a worker for every resource of this host and for every LUN of another handler of ours.

It serves no I/O. If it dies the LUNs go on, and the next one takes their
workers over. What it knows of them it answers on its own control socket
(query-workers); commands for a resource go straight to its worker.

UIO devices come and go: those of the subtype `replication` are told to the
worker of their resource (attach-device, detach-device), every other that has a
handler gets a worker of its own, named after the device.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tcmu_replication.control import lock, schema
from tcmu_replication.control.connection import Connection
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import config, handler, places, program
from tcmu_replication.daemon.child import LOOK_S, Child
from tcmu_replication.daemon.config import Resource
from tcmu_replication.daemon.notices import Notices
from tcmu_replication.daemon.places import Context
from tcmu_replication.daemon.restarts import Restarts
from tcmu_replication.errors import Error, Kind
from tcmu_replication.host import systemd
from tcmu_replication.host.udev import Event, Monitor
from tcmu_replication.tcmu import configfs, uio

log = logging.getLogger(__name__)

REPLICATION = "replication"
TELL_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""A new device is announced before the kernel has finished it: the worker is told again until it can take it."""
TELL_S = 30.0


class DeviceEvents(Protocol):
    """Where devices' coming and going is learnt from (host.udev.Monitor)."""

    def fileno(self) -> int: ...

    def events(self) -> list[Event]: ...


def run(context: Context) -> None:
    """Be the daemon until SIGTERM. Raises what keeps it from being one: CONFLICT if there is one already."""
    with program.running("daemon"):
        asyncio.run(_run(context))


async def _run(context: Context) -> None:
    command = [sys.executable, "-m", "tcmu_replication"]
    manager = Manager(context, command, Monitor())
    await manager.open()
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, manager.reload)
    systemd.notify(READY=1)
    try:
        await ended.wait()
    finally:
        systemd.notify(STOPPING=1)
        await manager.close()


class Manager:
    """Keeps the workers. `command` runs the program tcmu-replication, `monitor` tells of devices."""

    def __init__(
        self,
        context: Context,
        command: Sequence[str],
        monitor: DeviceEvents,
        delays_s: tuple[float, ...] | None = None,
        look_s: float = LOOK_S,
        core: Path = configfs.CORE,
    ) -> None:
        self._context = context
        self._command = [
            *command,
            f"--config={context.config_directory}",
            f"--run={context.run_directory}",
            f"--host={context.host}",
            "serve",
        ]
        self._monitor = monitor
        self._delays_s = delays_s
        self._look_s = look_s
        self._core = core
        self._children: dict[str, Child] = {}
        self._resources: dict[str, Resource] = {}
        self._wrong: dict[str, Error] = {}
        self._devices: dict[str, uio.Identity] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._subtypes: set[str] = set()
        self._notices: Notices | None = None
        self._living: asyncio.TimerHandle | None = None
        self._server = Server({"query-workers": self._query_workers}, schema.MANAGER_COMMANDS)

    async def open(self) -> None:
        """Listen, and start a worker for everything that is there. Raises CONFLICT if a manager runs already."""
        run_directory = self._context.run_directory
        path = places.socket_path(run_directory, places.MANAGER)
        if (pid := lock.holder(path)) is not None:
            raise Error(Kind.CONFLICT, f"a daemon runs on {run_directory} already: process {pid}")
        await self._server.listen_unix(path)
        self._notices = Notices(run_directory / f"{places.MANAGER}.notify")
        loop = asyncio.get_running_loop()
        loop.add_reader(self._notices.fileno(), self._listen)
        loop.add_reader(self._monitor.fileno(), self._device_events)
        self._subtypes = handler.subtypes() - {REPLICATION}
        self.reload()
        for identity in uio.devices():
            self._add_device(identity)
        log.info("process %d: %d workers", os.getpid(), len(self._children))
        self._lives()

    async def close(self) -> None:
        """End the workers in order, the youngest first, and then be nobody. Twice is fine."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._monitor.fileno())
        for task in self._telling.values():
            task.cancel()
        children = list(reversed(self._children.values()))
        for child in children:
            child.terminate()
        await asyncio.gather(*(child.stop() for child in children), *self._ending)
        if self._notices is not None:
            loop.remove_reader(self._notices.fileno())
            self._notices.close()
            self._notices = None
        await self._server.close()
        if self._living is not None:
            self._living.cancel()

    def _lives(self) -> None:
        """Tell the service manager so, from the loop: one that is stuck is ended, and the workers outlive it."""
        systemd.notify(WATCHDOG=1)
        self._living = asyncio.get_running_loop().call_later(self._look_s, self._lives)

    def reload(self) -> None:
        """Read the resource files again: start, stop and restart what they add, remove and change.

        A file that has become wrong changes nothing for the worker that runs.
        """
        found, self._wrong = config.load_all(self._context.config_directory)
        for name, error in self._wrong.items():
            log.error("%s: %s", name, error)
        mine = {
            name: resource for name, resource in found.items() if resource.is_served_on(self._context.host)
        }
        before = self._resources
        kept = {name: resource for name, resource in before.items() if name in self._wrong}
        self._resources = mine | kept
        for name in before.keys() - self._resources.keys():
            log.info("%s: is not in the resource files any more", name)
            self._end(name)
        for name, resource in mine.items():
            if name in before and before[name] != resource:
                log.info("%s: its resource file has changed", name)
                self._end(name, then_start=True)
            elif name not in self._children:
                self._begin(name, [name])
            else:
                self._children[name].start()

    def _begin(self, name: str, arguments: Iterable[str]) -> None:
        assert self._notices is not None
        restarts = Restarts() if self._delays_s is None else Restarts(self._delays_s)
        self._children[name] = Child(
            name,
            [*self._command, *arguments],
            os.environ | {"NOTIFY_SOCKET": str(self._notices.path)},
            places.socket_path(self._context.run_directory, name),
            restarts,
            self._is_ready,
            self._listen,
            self._is_down,
            self._look_s,
        )
        self._children[name].start()

    def _end(self, name: str, *, then_start: bool = False) -> None:
        """Stop a worker behind; with `then_start` begin it anew."""
        child = self._children[name]

        async def stop() -> None:
            await child.stop()
            if self._children.get(name) is not child:
                return
            del self._children[name]
            if then_start:
                self._begin(name, [name])

        task = asyncio.get_running_loop().create_task(stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _listen(self) -> None:
        assert self._notices is not None
        children = {child.pid: child for child in self._children.values() if child.pid is not None}
        for pid, message in self._notices.take():
            if pid in children:
                children[pid].said(message)

    def _is_ready(self, child: Child) -> None:
        log.info("%s: serves", child.name)
        for identity in self._devices_of(child):
            if identity.subtype == REPLICATION:
                self._tell(identity, "attach-device")

    def _devices_of(self, child: Child) -> list[uio.Identity]:
        return [
            identity
            for identity in self._devices.values()
            if child.name == (identity.config if identity.subtype == REPLICATION else identity.uio)
        ]

    def _is_down(self, child: Child) -> bool:
        """Nobody is at the rings of its devices: the kernel answers BUSY, and initiators try again.

        Commands left in a ring would be I/O errors after the kernel's own time-out. The
        next worker, taking a device up, undoes it.
        """
        devices = self._devices_of(child)
        for identity in devices:
            store = configfs.Backstore(identity.hba, identity.name, self._core)
            try:
                store.block()
                store.reset_ring()
            except Error as error:  # it is being removed, or not enabled yet
                log.warning("%s: %s is not made to answer BUSY: %s", child.name, identity.uio, error)
        return bool(devices)

    # Devices

    def _device_events(self) -> None:
        for event in self._monitor.events():
            if event.action == "remove":
                self._remove_device(event.device)
            elif event.action == "add" and (identity := uio.identify(event.device)) is not None:
                self._add_device(identity)

    def _add_device(self, identity: uio.Identity) -> None:
        if identity.uio in self._devices:
            return
        if identity.subtype == REPLICATION:
            self._devices[identity.uio] = identity
            child = self._children.get(identity.config)
            if child is None:
                log.error("%s: %s is no resource of this host", identity.uio, identity.config)
            elif child.state == "running":
                self._tell(identity, "attach-device")
        elif identity.subtype in self._subtypes:
            self._devices[identity.uio] = identity
            self._begin(identity.uio, ["--device", identity.uio])

    def _remove_device(self, device: str) -> None:
        identity = self._devices.pop(device, None)
        if identity is None:
            return
        if identity.subtype == REPLICATION:
            self._tell(identity, "detach-device")
        elif device in self._children:
            self._end(device)

    def _tell(self, identity: uio.Identity, command: str) -> None:
        """Tell a resource's worker about a device, behind; the latest word counts."""
        if identity.uio in self._telling:
            self._telling[identity.uio].cancel()
        task = asyncio.get_running_loop().create_task(self._keep_telling(identity, command))
        self._telling[identity.uio] = task
        task.add_done_callback(
            lambda done: self._telling.pop(identity.uio) if self._telling.get(identity.uio) is done else None
        )

    async def _keep_telling(self, identity: uio.Identity, command: str) -> None:
        path = places.socket_path(self._context.run_directory, identity.config)
        for delay_s in (*TELL_DELAYS_S, None):
            try:
                connection = await Connection.unix(path, timeout=TELL_S)
                try:
                    await connection.execute(command, {"device": identity.uio}, timeout=TELL_S)
                finally:
                    connection.close()
                return
            except Error as error:
                if delay_s is None or command == "detach-device":
                    log.error("%s: %s %s: %s", identity.config, command, identity.uio, error)
                    return
            await asyncio.sleep(delay_s)

    async def _query_workers(self, arguments: schema.Nothing, session: Session) -> list[schema.WorkerInfo]:
        rows = {name: child.info() for name, child in self._children.items()}
        for name, error in self._wrong.items():
            row = rows.get(name, schema.WorkerInfo(name=name, state="failed"))
            rows[name] = schema.WorkerInfo(
                name=name,
                state=row.state,
                pid=row.pid,
                restarts=row.restarts,
                error=str(error),
                down_since=row.down_since,
            )
        return list(rows.values())
