"""The handler of `user:replication`: puts one resource's chain together on this host.

    replication/disk0        the resource `disk0`, described by <config>/disk0.toml

    primary     gate -> mirror -+-> file
                                +-> filter -> NBD client ~~~> the peer's NBD server
    secondary   gate -> filter -> active -> hidden -> file
                NBD server -> gate -> copy-before-write -> file

Beside the LUN it offers the commands of the control socket, QEMU's among them, and on a secondary
the two TCP ports that only the primary's address may open, who besides knows the
shared secret, or has its certificate with TLS. Where the peer is QEMU there is no control port.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import tcmu_replication
from tcmu_replication.block import space
from tcmu_replication.block.disk_name import disk_name
from tcmu_replication.block.file import File
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.control import schema
from tcmu_replication.control.server import Handler as CommandHandler
from tcmu_replication.control.server import Server as ControlServer
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import config as resources
from tcmu_replication.daemon import guards
from tcmu_replication.daemon.config import QemuHost, Resource
from tcmu_replication.daemon.handler import Backstore, Context, Handler
from tcmu_replication.daemon.host_check import check_certificates, check_host
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.frontend.link_server import LinkServer
from tcmu_replication.frontend.nbd import Export
from tcmu_replication.frontend.nbd import Server as NbdServer
from tcmu_replication.jobs.compare import digests
from tcmu_replication.jobs.job import Job
from tcmu_replication.nbd.uri import Tcp, Unix
from tcmu_replication.qemu import colo, tables
from tcmu_replication.qemu.colo import ControllersCheckpoint, ControllersStart
from tcmu_replication.qemu.controller import Controller
from tcmu_replication.qemu.peer import QemuPeer
from tcmu_replication.replication import assemble
from tcmu_replication.replication.counterpart import Counterpart
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.peer import ControlPeer
from tcmu_replication.replication.peer_state import News, Peer
from tcmu_replication.replication.protection import Facts, judge
from tcmu_replication.replication.pulse import Heard, Pulse
from tcmu_replication.replication.replica import Replica
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.tls import Context as Tls

log = logging.getLogger(__name__)


class ReplicationHandler(Handler):
    """`config` is the name of a resource."""

    subtype: ClassVar[str] = "replication"
    description: ClassVar[str] = "the name of a resource, described by NAME.toml in /etc/tcmu-replication"

    def check(self, config: str, context: Context) -> None:
        """See `Handler.check`."""
        others, _ = resources.load_all(context.config_directory)
        resource = resources.find(config, context.config_directory)
        for warning in check_host(resource, context.host, others.values()) + guards.warnings(resource):
            log.warning("%s", warning)

    async def open(self, config: str, context: Context) -> Backstore:
        """See `Handler.open`."""
        self.check(config, context)
        resource = resources.find(config, context.config_directory)
        mine = resource.host(context.host)
        offload = Offload()
        try:
            disk = File(mine.disk, offload=offload)
        except Error:
            offload.close()
            raise
        primary = mine.mode == "primary"
        backstore: PairBackstore
        try:
            if primary:
                backstore = PrimaryBackstore(resource, context.host, disk, offload, context.run_directory)
            else:
                backstore = SecondaryBackstore(resource, context.host, disk, offload)
        except Error:
            disk.close()
            offload.close()
            raise
        try:
            for warning in check_certificates(resource, context.host):
                log.warning("%s: %s", resource.name, warning)
        except Error as error:
            log.warning("%s: %s", resource.name, error)
        try:
            await backstore.engine.open()
        except Error:
            await backstore.close()
            raise
        return backstore


class PairBackstore(Backstore):
    """What both ends have in common: the commands, the status, and the LUN over NBD if it is wanted."""

    table = tables.COMMANDS
    events = tables.EVENTS
    names = staticmethod(colo.names)
    engine: Replica
    _peer_name: str
    _counterpart: Counterpart

    def __init__(
        self,
        resource: Resource,
        host: str,
        disk: File,
        offload: Offload,
        engine: Replica,
        *,
        connect: Callable[[], Remote] | None = None,
        link_server: LinkServer | None = None,
    ) -> None:
        self.resource = resource
        self.host = host
        self.disk = disk
        self.engine = engine
        self._offload = offload
        self._control: ControlServer | None = None
        self._stage = engine.stage
        self._lun_server: NbdServer | None = None
        commands: dict[str, CommandHandler] = {
            "init": self._init,
            "start": self._start,
            "checkpoint": self._checkpoint,
            "failover": self._failover,
            "stop-replication": self._stop,
            "resync": self._resync,
            "query-errors": self._query_errors,
        }
        self._qemu = Controller(
            resource, host, engine, disk, self._emit, self._qmp_tls, connect=connect, own=link_server
        )
        commands |= self._qemu.commands
        super().__init__(engine.top, resource.block_size, commands, resource.serial, offload)

    async def listen(self, control: ControlServer) -> None:
        """See `Backstore.listen`."""
        self._control = control
        if self.resource.nbd is None:
            return
        listen = self.resource.nbd.listen
        # A unix socket is guarded by its mode; over TCP everybody whom the CA has signed may come.
        tls = None if listen.unix is not None else self._tls(server_side=True)
        self._lun_server = NbdServer([Export(self.resource.name, self.top, "the LUN")], tls=tls)
        if listen.unix is not None:
            await self._lun_server.listen_unix(str(listen.unix))
        else:
            await self._lun_server.listen_tcp(*listen.tcp)

    async def close(self) -> None:
        """See `Backstore.close`: the replication is taken up again by the next open."""
        await self._qemu.exports.close()
        if self._lun_server is not None:
            await self._lun_server.close()
        try:
            await self.engine.close()
        finally:
            self.disk.close()
            self._offload.close()

    def _tls(
        self, *names: str, server_side: bool, refused: Callable[[str], None] | None = None
    ) -> Tls | None:
        """TLS with who has one of `names`, or None where the file has no [tls]. Raises BAD_CONFIG."""
        tls = self.resource.tls
        if tls is None:
            return None
        return Tls(tls.certificates, server_side=server_side, names=names, refused=refused)

    def _qmp_tls(self) -> Tls | None:
        """For an NBD server that is started over QMP."""
        return self._tls(server_side=True)

    # --- commands

    async def _start(self, arguments: schema.Start, session: Session) -> schema.Outcome:
        if isinstance(arguments, ControllersStart):
            return self._outcome(await self.engine.start(self.engine.mode))
        return self._outcome(await self._start_again(arguments))

    async def _start_again(self, arguments: schema.Start) -> bool:
        raise NotImplementedError

    async def _init(self, arguments: schema.Nothing, session: Session) -> None:
        await self.engine.init()
        self._tell_stage()

    async def _resync(self, arguments: schema.Resync, session: Session) -> None:
        if arguments.paused is None and arguments.limit is None:
            await self.engine.resync()
        else:
            await self.engine.pace_resync(paused=arguments.paused, limit=arguments.limit)

    async def _stop(self, arguments: schema.Stop, session: Session) -> schema.Outcome:
        return self._outcome(await self.engine.stop(force=arguments.force))

    async def _failover(self, arguments: schema.Failover, session: Session) -> schema.FailoverStarted | None:
        to = self.resource.failover_to(arguments.to)
        if not await self.engine.failover(
            latest=to == "latest", force=arguments.force, fenced=arguments.fenced
        ):
            return None
        self._tell_stage()
        return schema.FailoverStarted(to=to, stage=self.engine.stage.value)

    async def _checkpoint(self, arguments: schema.Nothing, session: Session) -> schema.Checkpoint | None:
        return await self._make_checkpoint("")

    async def _make_checkpoint(self, name: str) -> schema.Checkpoint | None:
        if await self.engine.checkpoint(name) is None:
            return None
        made = self._last_checkpoint()
        if made is not None:
            self._emit("REPLICATION_CHECKPOINT", made)
        return made

    async def _query_errors(self, arguments: schema.Nothing, session: Session) -> schema.ErrorStatus:
        try:
            self.engine.get_error()
        except Error as error:
            reason = self.engine.machine.error
            return schema.ErrorStatus(error=True, desc=f"{error}: {reason}" if reason else str(error))
        return schema.ErrorStatus(error=False)

    def _outcome(self, done: bool) -> schema.Outcome:
        if done:
            self._tell_stage()
        return schema.Outcome(ignored=not done, stage=self.engine.stage.value)

    def _tell_stage(self) -> None:
        """The stage may be another one, by a command or by itself."""
        stage = schema.StageChanged(
            stage=self.engine.stage.value, epoch=self.engine.epoch, error=self.engine.machine.error
        )
        self._emit("REPLICATION_STAGE", stage)
        self._qemu.jobs.changed()

    def _emit(self, name: str, data: schema.Document) -> None:
        if self._control is not None:
            self._control.emit(name, data)

    # --- status

    def status(self, frontends: list[schema.Frontend], hangs: str | None) -> schema.Status:
        """See `Backstore.status`."""
        engine = self.engine
        if self._lun_server is not None and self.resource.nbd is not None:
            lun = schema.Frontend(
                type="nbd", device=str(self.resource.nbd.listen), in_flight=self._lun_server.in_flight
            )
            frontends = [*frontends, lun]
        serves = engine.mode is Mode.PRIMARY or engine.stage is not Stage.NONE
        facts = self._facts()._replace(hangs=hangs)
        comparing = facts.comparing
        return schema.Status(
            protection=schema.Protection(**judge(facts)._asdict()),
            running=serves,
            status="running" if serves else "prelaunch",
            resource=self.resource.name,
            host=self.host,
            mode=engine.mode.value,
            stage=engine.stage.value,
            epoch=engine.epoch,
            generation=engine.manifest.generation,
            size=self.resource.size,
            disk=self.disk.path,
            top=self.resource.name,
            link=self._link(),
            overlays=self._overlays(),
            out_of_sync_bytes=self._out_of_sync(),
            jobs=self._jobs(),
            error=facts.error,
            error_since=facts.error_since,
            last_forwarded=facts.last_forwarded_at,
            outdated_since=facts.outdated_since,
            not_ready=facts.not_ready,
            hangs=hangs,
            comparing=None if comparing is None else schema.Progress(done=comparing[0], total=comparing[1]),
            last_checkpoint=self._last_checkpoint(),
            checkpoint_under_way_since=facts.checkpoint_under_way_since,
            frontends=frontends,
            pid=os.getpid(),
            version=tcmu_replication.__version__,
            peer_software=self._counterpart.software,
        )

    def _facts(self) -> Facts:
        """What this end knows of the pair's protection."""
        engine, link = self.engine, self._link()
        manifest = engine.manifest
        job = next(iter(self._jobs()), None)
        return Facts(
            name=self.resource.name,
            host=self.host,
            role=engine.mode.value,
            peer=self._peer_name,
            stage=engine.stage,
            link_state=link.state,
            link_since=link.since,
            link_reason=link.reason,
            peer_heard_at=link.heard,
            out_of_sync_bytes=self._out_of_sync(),
            error=engine.machine.error,
            error_since=manifest.error_at or None,
            outdated_since=manifest.outdated_at or None,
            detached_since=manifest.detached_at or None,
            superseded_at=manifest.superseded_at or None,
            promoted_at=manifest.promoted_at or None,
            suspect=manifest.suspect,
            checkpoint_under_way_since=engine.checkpoint_since,
            disk_error=manifest.disk_error,
            peer_disk_error=manifest.peer_disk_error,
            not_ready=None if engine.top.not_ready is None else str(engine.top.not_ready),
            job=None if job is None else f"{job.type} {100 * job.offset // max(1, job.length)} %",
        )

    def _last_checkpoint(self) -> schema.Checkpoint | None:
        manifest = self.engine.manifest
        if not manifest.checkpoint_at:
            return None
        return schema.Checkpoint(
            epoch=manifest.epoch, at=manifest.checkpoint_at, pause_ms=manifest.checkpoint_pause_ms
        )

    def _link(self) -> schema.Link:
        return schema.Link()

    def _overlays(self) -> schema.Overlays:
        return schema.Overlays()

    def _out_of_sync(self) -> int:
        return 0

    def _jobs(self) -> list[schema.Job]:
        return []


class PrimaryBackstore(PairBackstore):
    """The LUN of the host that serves: connects to the secondary's two ports."""

    def __init__(
        self, resource: Resource, host: str, disk: File, offload: Offload, run_directory: Path
    ) -> None:
        self.resource = resource
        mine = resource.host(host)
        self._peer_name, theirs = resource.peer(host)
        self._counterpart = Counterpart(resource.name, host, self._peer_name)
        self._since = _now()
        self._up = False
        pulse = None
        link = resource.link
        # Of a host with several addresses the peer lets in the one that the file names.
        over_tcp = Tcp(theirs.address, link.port, mine.address)
        self._address = over_tcp if link.socket is None else Unix(link.socket)
        self._client_tls = self._tls(self._peer_name, theirs.address, server_side=False)
        self._control_peer: ControlPeer | None = None
        self._beats: ControlPeer | None = None
        peer: Peer
        if isinstance(theirs, QemuHost):
            peer = QemuPeer(theirs.qmp, resource.size, link.timeout, lambda: self.engine.epoch)
        else:
            peer = self._control_peer = ControlPeer(
                resource.name,
                theirs.address,
                link.control_port,
                local=mine.address,
                timeout=link.timeout,
                generation=lambda: self.engine.manifest.generation,
                counterpart=self._counterpart,
                tls=self._client_tls,
                secret=guards.secret(resource, "control"),
            )
            # On a connection of its own: a long command must not keep it silent.
            self._beats = ControlPeer(
                resource.name,
                theirs.address,
                link.control_port,
                local=mine.address,
                timeout=link.timeout,
                generation=lambda: self.engine.manifest.generation,
                counterpart=self._counterpart,
                tls=self._client_tls,
                secret=guards.secret(resource, "control"),
            )
            pulse = Pulse(resource.name)
        engine = assemble.primary(
            resource.name,
            disk,
            self._connect,
            peer,
            Path(mine.overlays),
            detach=resource.on_local_error == "detach",
            failed=lambda failure: self._qemu.failed(failure),
            stage_changed=self._tell_stage,
            pulse=pulse,
            heard=Heard(link.dead_after),
            beats=self._beats,
            wait_after_crash=resource.after_crash == "wait",
            heals=resource.resync == "automatic",
            in_flight=run_directory / f"{resource.name}.in-flight",
            disk_name=disk_name(mine.disk),
            peer_name=self._peer_name,
        )
        super().__init__(resource, host, disk, offload, engine, connect=lambda: self._connect(engine.verify))

    async def _start_again(self, arguments: schema.Start) -> bool:
        if arguments.discard_my_data:
            raise Error(
                Kind.BAD_REQUEST,
                f"{self.resource.name}: --discard-my-data is for the host whose data is given up, and that is the "
                "secondary",
            )
        if arguments.sync_from not in (None, self.host):
            raise Error(
                Kind.BAD_REQUEST,
                f"{self.resource.name}: --sync-from is for the host whose data counts, and that has to be the primary: "
                f"{self.host}, not {arguments.sync_from}. For the data of {self._peer_name} exchange `mode` in the "
                "resource file first, on both hosts",
            )
        return await self.engine.start(
            self.engine.mode,
            again=True,
            compare=True,
            assume_clean=arguments.assume_clean,
            force=arguments.force,
            sync=arguments.sync_from is not None,
        )

    def _connect(self, verify: Callable[[], Awaitable[None]]) -> Remote:
        """A remote node for the secondary's export, not yet open."""
        link = self.resource.link
        return Remote(
            "remote",
            self._address,
            self.resource.name,
            length=self.resource.size,
            reconnect_delay=link.reconnect_delay,
            timeout=link.timeout,
            tls=self._client_tls,
            secret=guards.secret(self.resource, "nbd"),
            verify=verify,
            on_state=self._link_changed,
        )

    def _link_changed(self, state: State, reason: str) -> None:
        up = state is State.CONNECTED
        if up != self._up:  # each attempt to connect is a state of its own, but down is down
            self._up, self._since = up, _now()
        text = f": {reason}" if reason else ""
        log.log(
            logging.INFO if state in (State.CONNECTED, State.CONNECTING, State.CLOSED) else logging.WARNING,
            "%s: link %s%s",
            self.resource.name,
            state.value,
            text,
        )
        # While replication starts the engine does not have the link yet.
        now = schema.Link(
            state="none" if state is State.CLOSED else state.value,
            peer=self._peer_name,
            since=self._since,
            reason=reason or None,
        )
        self._emit("REPLICATION_LINK", now)

    async def close(self) -> None:
        """See `Backstore.close`."""
        await super().close()
        for peer in (self._control_peer, self._beats):
            if peer is not None:
                peer.close()

    def _link(self) -> schema.Link:
        remote = self.engine.remote
        if remote is None or remote.state is State.CLOSED:
            return schema.Link(state="none", peer=self._peer_name)
        return schema.Link(
            state=remote.state.value,
            peer=self._peer_name,
            in_flight=remote.in_flight,
            in_flight_bytes=remote.in_flight_bytes,
            heard=self.engine.heard.at,
            since=self._since,
            reason=remote.reason or None,
        )

    def _out_of_sync(self) -> int:
        return self.engine.out_of_sync_bytes

    def _jobs(self) -> list[schema.Job]:
        job = self.engine.resyncing
        if job is None:
            return []
        return [_job(job, job.rate, error=job.waits, seconds_left=job.time_left_s)]

    def _facts(self) -> Facts:
        engine = self.engine
        job = engine.comparing
        comparing = None if job is None else (job.offset, job.length)
        if engine.stage is Stage.RUNNING and not engine.manifest.verified:
            comparing = comparing or (0, engine.disk.length)
        # Without a gap what is marked is being sent again.
        missed = engine.out_of_sync_bytes
        return (
            super()
            ._facts()
            ._replace(
                removed=engine.removed,
                map_complete=engine.missed.complete,
                comparing=comparing,
                resync=engine.resync_in_words,
                verified=engine.manifest.verified,
                peer_is_qemu=self._control_peer is None,
                out_of_sync_bytes=0 if engine.forwards else missed,
                resending_bytes=missed if engine.forwards else 0,
            )
        )


class SecondaryBackstore(PairBackstore):
    """The LUN of the host that follows: listens where only the primary may connect."""

    def __init__(self, resource: Resource, host: str, disk: File, offload: Offload) -> None:
        self.resource = resource
        mine = resource.host(host)
        self._mine = mine
        self._peer_name, self._theirs = resource.peer(host)
        self._counterpart = Counterpart(resource.name, host, self._peer_name)
        allowed = ipaddress.ip_address(self._theirs.address)
        names = self._peer_name, self._theirs.address
        self._control_tls = self._tls(*names, server_side=True, refused=self._refused)
        server = NbdServer(
            allow=lambda address: ipaddress.ip_address(address) == allowed,
            tls=self._tls(*names, server_side=True),
            secret=guards.secret(resource, "nbd"),
        )
        link = resource.link
        place = Tcp(mine.address, link.port) if link.socket is None else Unix(link.socket)
        self._server = LinkServer(resource.name, place, server)
        engine = assemble.secondary(
            resource.name,
            disk,
            Epochs(Path(mine.overlays), disk, offload=offload, limit=resource.overlay_limit),
            top_id=resource.name,
            # Overlays in memory, as QEMU's users like them: no sync makes them survive a loss of power.
            durable=resource.durable and not space.in_memory(mine.overlays),
            publish=self._publish,
            withdraw=self._withdraw,
            stage_changed=self._tell_stage,
            heard=Heard(resource.link.dead_after),
            in_use=self._user,
            disk_name=disk_name(mine.disk),
            peer_name=self._peer_name,
        )
        super().__init__(resource, host, disk, offload, engine, link_server=self._server)
        self.commands |= self._counterpart.commands(
            {
                "peer-hello": self._peer_hello,
                "peer-prepare": self._peer_prepare,
                "peer-checkpoint": self._peer_checkpoint,
                "peer-digests": self._peer_digests,
                "peer-resync": self._peer_resync,
                "peer-resynced": self._peer_resynced,
            }
        )

    def _user(self) -> str | None:
        """Who uses the LUN."""
        if self._lun_server is not None and self._lun_server.connections:
            return f"{self._lun_server.connections} NBD clients"
        return self.devices()

    async def _start_again(self, arguments: schema.Start) -> bool:
        if arguments.force:
            raise Error(
                Kind.BAD_REQUEST,
                f"{self.resource.name}: start --force is for a primary that is not ready; this host is the secondary",
            )
        if arguments.sync_from is not None:
            raise Error(
                Kind.BAD_REQUEST,
                f"{self.resource.name}: --sync-from is given on the primary; this host is the secondary, and what it "
                "has is overwritten",
            )
        return await self.engine.start(
            self.engine.mode,
            again=True,
            assume_clean=arguments.assume_clean,
            discard=arguments.discard_my_data,
        )

    async def _checkpoint(self, arguments: schema.Nothing, session: Session) -> schema.Checkpoint | None:
        """Of this end alone only where a controller, or QEMU, is the other: else the pair's would be two."""
        if (
            not isinstance(arguments, ControllersCheckpoint)
            and not self._theirs.qemu
            and self.engine.stage is Stage.RUNNING
        ):
            raise Error(
                Kind.INVALID_STATE,
                f"a checkpoint of {self.resource.name} is the pair's: make it on the primary ({self._peer_name}), "
                f"with tcmu-replication checkpoint {self.resource.name}",
            )
        return await self._make_checkpoint("")

    async def _publish(self, node: Node) -> None:
        self._server.publish(node)
        await self._qemu.exports.publish(node)

    async def _withdraw(self) -> None:
        await self._qemu.exports.withdraw()
        await self._server.withdraw()

    def _qmp_tls(self) -> Tls | None:
        """Forwarded writes are the primary's only."""
        return self._tls(self._peer_name, self._theirs.address, server_side=True)

    async def listen(self, control: ControlServer) -> None:
        """See `Backstore.listen`: the two ports for the primary."""
        await super().listen(control)
        await self._server.listen()
        if not self._theirs.qemu:
            await control.listen_tcp(
                self._mine.address,
                self.resource.link.control_port,
                self._theirs.address,
                self._control_tls,
                guards.secret(self.resource, "control"),
            )

    def _refused(self, why: str) -> None:
        log.warning("%s: a client of the control port was refused: %s", self.resource.name, why)

    async def close(self) -> None:
        """See `Backstore.close`."""
        await self._qemu.exports.close()  # some may be on the server that goes next
        await self._server.server.close()
        await super().close()

    def _link(self) -> schema.Link:
        running = self.engine.stage is Stage.RUNNING
        heard = self.engine.heard
        # A host that lost power leaves its connection open. QEMU is not heard any other way.
        # One that is outdated gets nothing any more, though its connection may be there a moment longer.
        forwards = running and not self.engine.manifest.outdated_at and self._server.server.connections > 0
        connected = forwards and (self._theirs.qemu or heard.alive)
        return schema.Link(
            state="connected" if connected else "listening" if running else "none",
            peer=self._peer_name,
            heard=heard.at,
            in_flight=self.engine.forwarding_in_flight,
        )

    def _overlays(self) -> schema.Overlays:
        active, hidden = self.engine.overlay_bytes
        return schema.Overlays(active_bytes=active, hidden_bytes=hidden)

    def _facts(self) -> Facts:
        engine = self.engine
        unknown = engine.stage is Stage.RUNNING and engine.manifest.paired and not engine.manifest.verified
        return (
            super()
            ._facts()
            ._replace(
                last_forwarded_at=engine.last_forwarded or None,
                resync=engine.manifest.resync_since or None,
                comparing=(0, engine.disk.length) if unknown else None,
            )
        )

    def _jobs(self) -> list[schema.Job]:
        job = self.engine.job
        return [] if job is None else [_job(job, job.speed, error=job.error)]

    # --- the primary's commands

    async def _peer_hello(self, arguments: schema.PeerHello, session: Session) -> schema.PeerState:
        if arguments.resource != self.resource.name:
            raise Error(
                Kind.NOT_FOUND,
                f"this is the resource {self.resource.name}, not {arguments.resource}; "
                "the resource files of the two hosts must be the same",
            )
        await self.engine.hear(
            arguments.generation,
            News(
                arguments.verified,
                arguments.outdated_since,
                one_line(arguments.reason),
                arguments.missed_bytes,
                one_line(arguments.disk_error),
            ),
        )
        if arguments.settled:
            await self.engine.settle()
        return self._state()

    async def _peer_prepare(self, arguments: schema.PeerEpoch, session: Session) -> None:
        await self.engine.prepare_checkpoint(arguments.epoch)

    async def _peer_checkpoint(self, arguments: schema.PeerCheckpoint, session: Session) -> schema.PeerState:
        """End the epoch, once: the primary may have to ask again when its connection was lost."""
        engine = self.engine
        made = engine.manifest.checkpoint_id == arguments.name
        if not made and arguments.epoch != engine.epoch:
            raise Error(
                Kind.CONFLICT,
                f"the secondary is in epoch {engine.epoch}, the primary believes {arguments.epoch}",
            )
        if not made and arguments.settled != engine.settled:
            text = f"the checkpoint of epoch {arguments.epoch} was given up: the primary has asked for the state since"
            log.warning("%s: %s", self.resource.name, text)
            raise Error(Kind.CONFLICT, text)
        if not made:
            await self._make_checkpoint(arguments.name)
        return self._state()

    async def _peer_resync(self, arguments: schema.PeerResync, session: Session) -> schema.PeerResyncBegun:
        return schema.PeerResyncBegun(
            compare=await self.engine.begin_resync(arguments.generation, arguments.name)
        )

    async def _peer_resynced(self, arguments: schema.PeerResynced, session: Session) -> schema.PeerState:
        await self.engine.end_resync(arguments.generation)
        return self._state()

    async def _peer_digests(self, arguments: schema.PeerRange, session: Session) -> schema.PeerDigests:
        if arguments.offset + arguments.length > self.resource.size:
            raise Error(
                Kind.OUT_OF_RANGE,
                f"outside the disk of {self.resource.size} bytes",
                offset=arguments.offset,
                length=arguments.length,
            )
        found = await digests(self.disk, arguments.offset, arguments.length, arguments.piece, self._offload)
        return schema.PeerDigests(digests=found)

    def _state(self) -> schema.PeerState:
        engine = self.engine
        return schema.PeerState(
            stage=engine.stage.value,
            epoch=engine.epoch,
            generation=engine.manifest.generation,
            length=self.resource.size,
            error=engine.machine.error,
            checkpoint_name=engine.manifest.checkpoint_id,
            paired=engine.manifest.paired,
            promoted_at=engine.manifest.promoted_at,
            settled=engine.settled,
        )


def _job(job: Job, speed: float, **known: Any) -> schema.Job:
    """A job as `status` shows it."""
    return schema.Job(
        id=job.name,
        type=job.kind,
        offset=job.offset,
        length=job.length,
        speed=int(speed),
        status=job.status.value,
        **known,
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
