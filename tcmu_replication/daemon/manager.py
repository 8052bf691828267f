"""The daemon: a worker for every resource of this host and for every LUN of another handler of ours.

It serves no I/O. If it dies the LUNs go on, and the next one takes their
workers over. What it knows of them it answers on its own control socket
(query-workers, query-devices); commands for a resource go straight to its worker.

UIO devices come and go: those of the subtype `replication` are told to the
worker of their resource (attach-device, detach-device), every other that has a
handler gets a worker of its own, named after the device. One that cannot be
served is known with the reason, and tried again until it can.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Iterable, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Protocol

from tcmu_replication.control import lock, schema
from tcmu_replication.control.connection import Connection
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import config, handler, luns, places, program
from tcmu_replication.daemon.child import LOOK_S, Child
from tcmu_replication.daemon.config import Resource
from tcmu_replication.daemon.luns import REPLICATION, Lun, Why
from tcmu_replication.daemon.notices import Notices
from tcmu_replication.daemon.places import Context
from tcmu_replication.daemon.restarts import Restarts
from tcmu_replication.errors import Error, Kind
from tcmu_replication.host import systemd
from tcmu_replication.host.udev import Event, Monitor
from tcmu_replication.tcmu import configfs, uio

log = logging.getLogger(__name__)

TELL_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""A new device is announced before the kernel has finished it: the worker is told again until it can take it."""
TELL_S = 30.0
FIND_S = 5.0
"""How often the resource file is looked for that a device waits for. It counts when it is the same at two looks, for
the first may find half a file."""


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
        find_s: float = FIND_S,
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
        self._luns: dict[str, Lun] = {}
        self._find_s = find_s
        self._finding: asyncio.TimerHandle | None = None
        self._half_found: dict[str, Resource] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._subtypes: set[str] = set()
        self._notices: Notices | None = None
        self._living: asyncio.TimerHandle | None = None
        commands = {"query-workers": self._query_workers, "query-devices": self._query_devices}
        self._server = Server(commands, schema.MANAGER_COMMANDS)

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
        self._subtypes = handler.subtypes()
        self.reload()
        for identity in uio.devices():
            self._add_device(identity)
        self._finding = loop.call_later(self._find_s, self._find)
        log.info("process %d: %d workers", os.getpid(), len(self._children))
        self._lives()

    async def close(self) -> None:
        """End the workers in order, the youngest first, and then be nobody. Twice is fine."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._monitor.fileno())
        if self._finding is not None:
            self._finding.cancel()
        for task in self._telling.values():
            task.cancel()
        self._resources = {}
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
                self._end(name)
            elif name not in self._children:
                self._begin(name, [name])
            else:
                self._children[name].start()
        for lun in self._luns.values():
            if lun.worker in self._children and lun.identity.subtype != REPLICATION:
                self._children[lun.worker].start()

    def _find(self) -> None:
        """Look for the resources that devices wait for: has the file of one come, or been mended?"""
        self._finding = asyncio.get_running_loop().call_later(self._find_s, self._find)
        before, self._half_found = self._half_found, {}
        replicated = [lun for lun in self._luns.values() if lun.identity.subtype == REPLICATION]
        for name in {lun.identity.config for lun in replicated} - self._children.keys():
            try:
                resource = self._resource(name)
            except Error:
                continue
            if before.get(name) == resource:
                log.info("%s: its resource file is there now", name)
                self._resources[name] = resource
                self._wrong.pop(name, None)
                self._begin(name, [name])
            else:
                self._half_found[name] = resource

    def _resource(self, name: str) -> Resource:
        """What the file of resource `name` says now. Raises `Error` if there is none, or none for this host."""
        resource = config.find(name, self._context.config_directory)
        resource.host(self._context.host)
        return resource

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
            self._has_ended,
            self._is_down,
            self._look_s,
        )
        self._children[name].start()

    def _end(self, name: str) -> None:
        """Stop a worker behind; that of a resource that there still is begins anew."""
        child = self._children[name]

        async def stop() -> None:
            await child.stop()
            if self._children.get(name) is not child:
                return
            del self._children[name]
            if name in self._resources:
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
        for lun in self._luns_of(child):
            lun.begins()
            if lun.identity.subtype == REPLICATION:
                self._tell(lun.identity.uio, self._keep_attaching(lun))
            else:  # it says so when it has its device
                lun.taken()

    def _luns_of(self, child: Child) -> list[Lun]:
        return [lun for lun in self._luns.values() if lun.worker == child.name]

    def _has_ended(self, child: Child) -> None:
        for lun in self._luns_of(child):
            self._hush(lun.identity.uio)
            lun.lost()

    def _is_down(self, child: Child) -> bool:
        """Nobody is at the rings of its devices: the kernel answers BUSY, and initiators try again.

        Commands left in a ring would be I/O errors after the kernel's own time-out. The
        next worker, taking a device up, undoes it.
        """
        self._has_ended(child)  # if SIGKILL does not end it, it is as good as gone
        found = self._luns_of(child)
        for lun in found:
            identity = lun.identity
            store = configfs.Backstore(identity.hba, identity.name, self._core)
            try:
                store.block()
                store.reset_ring()
            except Error as error:  # it is being removed, or not enabled yet
                log.warning("%s: %s is not made to answer BUSY: %s", child.name, identity.uio, error)
        return bool(found)

    # Devices

    def _device_events(self) -> None:
        for event in self._monitor.events():
            if event.action == "remove":
                self._remove_device(event.device)
            elif event.action == "add" and (identity := uio.identify(event.device)) is not None:
                self._add_device(identity)

    def _add_device(self, identity: uio.Identity) -> None:
        if identity.uio in self._luns:
            return
        lun = self._luns[identity.uio] = Lun(identity, foreign=identity.subtype not in self._subtypes)
        child = self._children.get(identity.config)
        if not lun.foreign and identity.subtype != REPLICATION:
            self._begin(identity.uio, ["--device", identity.uio])
        elif lun.foreign or child is None:
            level = logging.INFO if lun.foreign else logging.ERROR
            log.log(level, "%s is not served: %s", identity.uio, self._without_worker(lun).reason)
        elif child.state == "running":
            self._tell(identity.uio, self._keep_attaching(lun))
        elif child.state in ("waiting", "failed"):  # an initiator may wait for it now
            child.start()

    def _remove_device(self, device: str) -> None:
        lun = self._luns.pop(device, None)
        if lun is None or lun.worker is None:
            return
        self._hush(device)
        child = self._children.get(lun.worker)
        if child is None:
            return
        if lun.identity.subtype != REPLICATION:
            self._end(device)
        elif child.state == "running":
            self._tell(device, self._detach(lun))

    def _tell(self, device: str, telling: Coroutine[None, None, None]) -> None:
        """Tell a resource's worker about a device, behind; the latest word counts."""
        self._hush(device)
        task = asyncio.get_running_loop().create_task(telling)
        self._telling[device] = task
        task.add_done_callback(
            lambda done: self._telling.pop(device) if self._telling.get(device) is done else None
        )

    def _hush(self, device: str) -> None:
        if device in self._telling:
            self._telling.pop(device).cancel()

    async def _keep_attaching(self, lun: Lun) -> None:
        """Again and again, until the worker has it: what is in the way can go away."""
        for delay_s in chain(TELL_DELAYS_S, repeat(TELL_DELAYS_S[-1])):
            try:
                await self._order(lun, "attach-device")
            except Error as error:
                lun.refused(error)
            else:
                lun.taken()
                return
            await asyncio.sleep(delay_s)

    async def _detach(self, lun: Lun) -> None:
        try:
            await self._order(lun, "detach-device")
        except Error as error:
            log.error("%s: detach-device %s: %s", lun.worker, lun.identity.uio, error)

    async def _order(self, lun: Lun, command: str) -> None:
        path = places.socket_path(self._context.run_directory, lun.identity.config)
        connection = await Connection.unix(path, timeout=TELL_S)
        try:
            await connection.execute(command, {"device": lun.identity.uio}, timeout=TELL_S)
        finally:
            connection.close()

    def _why(self, lun: Lun, child: Child | None) -> Why | None:
        """What keeps a LUN from being served, if that is known."""
        if child is None:
            return self._without_worker(lun)
        return lun.why(TELL_DELAYS_S[-1]) or luns.without_service(child)

    def _without_worker(self, lun: Lun) -> Why:
        if lun.foreign:
            return luns.of_another(lun.identity, self._subtypes)
        within_s = 2 * self._find_s
        try:
            resource = self._resource(lun.identity.config)
        except Error as error:
            return luns.without_resource(error, self._resources.keys(), within_s)
        return luns.with_unread_file(resource.path, within_s)

    # Commands

    async def _query_devices(self, arguments: schema.Nothing, session: Session) -> list[schema.DeviceInfo]:
        rows = []
        for lun in sorted(self._luns.values(), key=lambda lun: int(lun.identity.uio.removeprefix("uio"))):
            child = None if lun.worker is None else self._children.get(lun.worker)
            rows.append(lun.info(child, self._why(lun, child)))
        return rows

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
