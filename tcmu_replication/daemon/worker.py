"""The worker: one LUN, its frontends and its control socket, in one process.

    tcmu-replication serve NAME             a resource
    tcmu-replication serve --device uioN    a LUN of another handler

It is a complete program: the daemon only starts it and tells it of devices.
Without a daemon it watches for its device by itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tcmu_replication
from tcmu_replication.control import lock, schema
from tcmu_replication.control.monitor import Shutdown
from tcmu_replication.control.schema import Command
from tcmu_replication.control.server import Handler as CommandHandler
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import handler, places
from tcmu_replication.daemon.guardian import Guardian
from tcmu_replication.daemon.handler import Backstore
from tcmu_replication.daemon.places import Context
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.tcmu import TcmuFrontend
from tcmu_replication.host import systemd
from tcmu_replication.scsi.identity import Identity as ScsiIdentity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu import configfs, uio

log = logging.getLogger(__name__)

RESOURCE_SUBTYPE = "replication"
VENDOR = "LIO-ORG"
"""What LIO's other backstores call themselves."""

DEFECT = 70
"""The exit status of a worker that a defect has ended (EX_SOFTWARE of sysexits.h)."""

_PR_SET_IO_FLUSHER = 57


def serve(name: str, context: Context) -> None:
    """Serve resource `name` until SIGTERM or `quit`. Raises `Error` if it cannot be opened."""
    asyncio.run(_serve_resource(name, context))


def serve_device(device: str, context: Context) -> None:
    """Serve the LUN of `device` ("uio0") with the handler that its subtype names. Raises `Error`."""
    asyncio.run(_serve_device(device, context))


async def _serve_resource(name: str, context: Context) -> None:
    worker = Worker(name, RESOURCE_SUBTYPE, name, context)
    await worker.run()


async def _serve_device(device: str, context: Context) -> None:
    identity = uio.identify(device)
    if identity is None:
        raise Error(Kind.NOT_FOUND, f"{device} is not a TCMU device; see /sys/class/uio")
    if identity.subtype == RESOURCE_SUBTYPE:
        raise Error(
            Kind.BAD_REQUEST,
            f"{device} belongs to the resource {identity.config}; its worker is: serve {identity.config}",
        )
    worker = Worker(device, identity.subtype, identity.config, context, device=device)
    await worker.run()


class Worker:
    """Serves one LUN as `name`: opens it with the handler of `subtype`, and puts frontends on it.

    With `device` it serves that one device and ends with it; without, every
    device of its subtype and configuration that is there or is attached.
    """

    def __init__(
        self, name: str, subtype: str, config: str, context: Context, *, device: str | None = None
    ) -> None:
        self.name = name
        self.subtype = subtype
        self.config = config
        self.context = context
        self.backstore: Backstore | None = None
        self.frontends: dict[str, TcmuFrontend] = {}
        self._device = device
        self._ended = asyncio.Event()
        self._failure: Error | None = None
        self._control: Server | None = None
        self._guardian: Guardian | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._attaching = asyncio.Lock()

    async def run(self) -> None:
        """Open, serve, and close in order. Raises `Error` if it cannot be opened or has to give up."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._defect)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ended.set)
        path = places.socket_path(self.context.run_directory, self.name)
        if (pid := lock.holder(path)) is not None:
            raise Error(Kind.CONFLICT, f"{self.name} is already served by process {pid}")
        lun = self.backstore = await handler.load(self.subtype).open(self.config, self.context)
        commands = self._commands(lun)
        control = self._control = Server(commands, lun.table, lun.events, lun.names)
        self.backstore.devices = lambda: ", ".join(self.frontends) or None
        try:
            await control.listen_unix(path)
            self._guardian = Guardian(self.name, self.frontends, control, commands, self._defect)
            self._guardian.start()
            await self.backstore.listen(control)
            await self._find_devices(path)
            systemd.notify(READY=1)
            # What was made until now lives as long as the process: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            await self._ended.wait()
        finally:
            systemd.notify(STOPPING=1)
            await self._close(control, self.backstore)
        if self._failure is not None:
            raise self._failure

    async def _close(self, control: Server, backstore: Backstore) -> None:
        """Frontends first, so that nothing new comes; the chain last."""
        for task in self._tasks:
            task.cancel()
        for frontend in list(self.frontends.values()):
            with suppress(Error):
                await frontend.stop()
        await backstore.close()
        if self._guardian is not None:
            await self._guardian.stop()
        await control.close()

    def _defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that nobody handled is a bug: end at once, the next process takes the LUN up.

        An OSError that asyncio met by itself is the world's (no descriptors left, a network gone). One that came out
        of a callback of ours (it has a handle) is a bug too.
        """
        error = context.get("exception")
        worldly = isinstance(error, OSError) and "handle" not in context
        if not isinstance(error, Exception) or worldly:
            loop.default_exception_handler(context)
            return
        try:  # without memory even to log may fail
            loop.default_exception_handler(context)
            log.critical("%s: ended by a defect; what was acknowledged is safe", self.name)
        finally:
            os._exit(DEFECT)

    # --- devices

    async def _find_devices(self, path: Path) -> None:
        if self._device is not None:
            await self.attach(self._device)
            return
        watching = lock.holder(places.socket_path(path.parent, places.MANAGER)) is None
        if watching:
            self._watch()
        for identity in uio.devices():
            if self._is_mine(identity):
                self._attach_later(identity.uio)

    def _is_mine(self, identity: uio.Identity) -> bool:
        return (identity.subtype, identity.config) == (self.subtype, self.config)

    def _watch(self) -> None:
        """No daemon tells us of devices: look ourselves."""
        from tcmu_replication.host.udev import Monitor

        monitor = Monitor()

        def look() -> None:
            for event in monitor.events():
                identity = uio.identify(event.device) if event.action == "add" else None
                if identity is not None and self._is_mine(identity):
                    self._attach_later(event.device)

        asyncio.get_running_loop().add_reader(monitor.fileno(), look)

    def _attach_later(self, device: str) -> None:
        async def attach() -> None:
            try:
                await self.attach(device)
            except Error as error:
                log.error("%s: %s is not served: %s", self.name, device, error)

        task = asyncio.create_task(attach())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def attach(self, device: str) -> None:
        """Serve the LUN on `device` too. Raises `Error`: NOT_FOUND, BAD_CONFIG (size), CONFLICT.

        One at a time: who asks for a device that is being taken up is answered when it is served.
        """
        async with self._attaching:
            if device not in self.frontends:
                await self._attach(device)

    async def _attach(self, device: str) -> None:
        assert self.backstore is not None
        _be_an_io_flusher()
        identity = uio.identify(device)
        if identity is None:
            raise Error(Kind.NOT_FOUND, f"{device} is not a TCMU device; see /sys/class/uio")
        if not self._is_mine(identity):
            raise Error(
                Kind.BAD_CONFIG,
                f"{device} is {identity.dev_config}, this worker serves {self.subtype}/{self.config}",
            )
        store = configfs.Backstore(identity.hba, identity.name)
        unit = self._unit(store, self.backstore, device)
        frontend = TcmuFrontend(
            uio.Device.open(device),
            store,
            unit,
            self.backstore.top,
            asyncio.get_running_loop(),
            on_closed=lambda error: self._closed(device, error),
        )
        self.frontends[device] = frontend
        try:
            await frontend.start()
        except Error:
            self.frontends.pop(device, None)  # its removal may have been told meanwhile
            await frontend.stop()
            raise
        log.info("%s: serving %s (%s)", self.name, device, identity.name)

    def _unit(self, store: configfs.Backstore, backstore: Backstore, device: str) -> LogicalUnit:
        name = self.name if self._device is None else f"{self.subtype}/{self.config}"
        check_store(store, backstore, f"{device}: the backstore {store.path.name}", name)
        length = backstore.top.length
        known = ScsiIdentity(
            VENDOR, store.path.name, tcmu_replication.__version__[:4], backstore.serial or ""
        )

        def identity() -> ScsiIdentity:
            """What LIO says now (the serial comes some time after the device), and our own where it is silent."""
            nonlocal known
            with suppress(Error):
                known = ScsiIdentity(
                    store.vendor or known.vendor,
                    store.product or known.product,
                    store.revision or known.revision,
                    store.serial or known.serial,
                )
            return known

        block = store.block_size
        return LogicalUnit(
            length,
            block,
            identity,
            read_only=backstore.top.read_only,
            not_ready=lambda: backstore.top.not_ready,
            max_transfer=max(1, store.max_blocks) * block,
        )

    def _closed(self, device: str, error: Error | None) -> None:
        """A frontend ended by itself: its device was removed, or its ring is beyond repair."""
        self.frontends.pop(device, None)
        if error is not None:
            log.error("%s: %s: %s", self.name, device, error)
            self._failure = error
            self._ended.set()
            return
        log.info("%s: %s was removed", self.name, device)
        if self._device is not None:
            self._ended.set()

    # --- commands

    def _commands(self, backstore: Backstore) -> Mapping[str, CommandHandler]:
        own: dict[str, CommandHandler] = {
            "query-status": self._query_status,
            "attach-device": self._attach_device,
            "detach-device": self._detach_device,
            "quit": self._quit,
        }
        rows: Mapping[str, Command] = backstore.table
        return {name: body for name, body in own.items() if name in rows} | backstore.commands

    async def _query_status(self, arguments: schema.Nothing, session: Session) -> schema.Document:
        assert self.backstore is not None
        frontends = [
            schema.Frontend(
                type="tcmu",
                device=device,
                in_flight=frontend.in_flight,
                commands=frontend.counters.commands,
                errors=frontend.counters.failed,
            )
            for device, frontend in self.frontends.items()
        ]
        hangs = self._guardian.hangs(self.backstore.offload) if self._guardian is not None else None
        return self.backstore.status(frontends, hangs) or schema.DeviceStatus(
            device=self.name,
            subtype=self.subtype,
            config=self.config,
            size=self.backstore.top.length,
            frontends=frontends,
            hangs=hangs,
            pid=os.getpid(),
            version=tcmu_replication.__version__,
        )

    async def _attach_device(self, arguments: schema.DeviceArguments, session: Session) -> None:
        await self.attach(arguments.device)

    async def _detach_device(self, arguments: schema.DeviceArguments, session: Session) -> None:
        frontend = self.frontends.pop(arguments.device, None)
        if frontend is not None:
            await frontend.stop()

    async def _quit(self, arguments: schema.Nothing, session: Session) -> None:
        if self._control is not None:
            self._control.emit("SHUTDOWN", Shutdown(guest=False, reason="host-qmp-quit"))
        self._ended.set()


def check_store(store: configfs.Backstore, backstore: Backstore, what: str, name: str) -> None:
    """Raise BAD_CONFIG unless `store`, called `what`, is as the LUN `name`: in its size and its block size.

    Initiators that see one disk in blocks of 512 and of 4096 bytes write partition tables that the other misreads.
    """
    length, block = backstore.top.length, backstore.block_size
    if store.size != length:
        raise Error(
            Kind.BAD_CONFIG,
            f"{what} was created with {store.size} bytes, {name} has {length}; delete it and create it with "
            f"size={length}",
        )
    if block is not None and store.block_size != block:
        raise Error(
            Kind.BAD_CONFIG,
            f"{what} was created with blocks of {store.block_size} bytes, {name} has blocks of {block} "
            f"(block-size in its resource file); delete it and create it with hw_block_size={block}",
        )


def _be_an_io_flusher() -> None:
    """Tell the kernel that reclaiming memory may need us (prctl(2), PR_SET_IO_FLUSHER, Linux 5.6).

    Without it an initiator on this very host could wait for memory that only its own writes would free.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
