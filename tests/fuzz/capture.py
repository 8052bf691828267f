"""Make the first corpus of the targets from what real programs say to each other.

    python -m tests.fuzz.capture      (QEMU, nbdkit and libnbd's tools must be installed)

Every program talks to ours through a relay that keeps both directions. What
no real peer can be asked for here (ring entries, a map, a manifest) is written
by our own code; README.md in the corpus's folder says what is what.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from tcmu_replication.block import bitmap, hot_extents, map_format
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.remote_queue import Queue
from tcmu_replication.control import schema
from tcmu_replication.control.connection import Connection as ControlConnection
from tcmu_replication.control.server import Server as ControlServer
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.connect import connect
from tcmu_replication.nbd.handshake import ServerHandshake
from tcmu_replication.nbd.handshake_client import ClientHandshake
from tcmu_replication.nbd.protocol import GREETING
from tcmu_replication.nbd.uri import Unix
from tcmu_replication.qemu import tables
from tcmu_replication.replication.manifest import Manifest, encode
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.scsi.command import Command
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.task import Answer
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.secret import HELLO
from tcmu_replication.tcmu import layout
from tests.fuzz import CORPUS, nbd_replies, nbd_requests, scsi_commands, secret_proof, tcmu_ring
from tests.support.fake_kernel import FakeKernel
from tests.support.tools import run, server
from tests.unit.control.documents import status

LONGEST = 16 << 10
"""Inputs are cut here: what comes later in a conversation is more of the same."""


class Relay:
    """Stands between a client and a server at `there`; `said` are (client's, server's) bytes, a pair a connection."""

    def __init__(self, there: Path) -> None:
        self._there = there
        self.said: list[tuple[bytearray, bytearray]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        reader2, writer2 = await asyncio.open_unix_connection(str(self._there))
        pair = (bytearray(), bytearray())
        self.said.append(pair)
        await asyncio.gather(_copy(reader, writer2, pair[0]), _copy(reader2, writer, pair[1]))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            kept += data
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def relayed(there: Path) -> AsyncIterator[tuple[Relay, Path]]:
    """A relay to `there` and where it listens."""
    relay, here = Relay(there), there.with_suffix(".relay")
    listener = await asyncio.start_unix_server(relay.accept, str(here))
    try:
        yield relay, here
    finally:
        listener.close()
        here.unlink()


def keep(target: str, name: str, *parts: bytes) -> None:
    """One input, unless another name has the same."""
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    data = b"".join(parts)[:LONGEST]
    if not any(path.name != name and path.read_bytes() == data for path in folder.iterdir()):
        (folder / name).write_bytes(data)


CLIENTS: dict[str, tuple[str, ...]] = {
    "nbdinfo": ("nbdinfo", "{uri}"),
    "nbdinfo-list": ("nbdinfo", "--list", "--no-content", "{root}"),
    "nbdinfo-map": ("nbdinfo", "--map", "{uri}"),
    "nbdcopy-from": ("nbdcopy", "--connections=1", "--request-size=4096", "{uri}", "null:"),
    "nbdcopy-to": ("nbdcopy", "--connections=1", "--request-size=4096", "{image}", "{uri}"),
    "qemu-img-info": ("qemu-img", "info", "{uri}"),
    "qemu-img-map": (
        *("qemu-img", "map", "--image-opts"),
        "driver=raw,file.driver=nbd,file.path={path},file.export=disk0",
    ),
    "qemu-io": (
        *("qemu-io", "-f", "raw", "{uri}", "-c", "write -f -P 1 0 4k", "-c", "write -z 4k 8k"),
        *("-c", "write -z -u 16k 4k", "-c", "discard 8k 4k", "-c", "flush", "-c", "read 100 1000"),
    ),
}


async def clients(folder: Path) -> None:
    """Other people's clients of our server."""
    image = folder / "image"
    image.write_bytes(bytes(4096) + b"x" * 4096 + bytes(8192))
    exports = [Export("disk0", Memory(nbd_requests.LENGTH)), Export("disk1", Memory(512))]
    ours = Server(exports)
    there = folder / "ours.sock"
    await ours.listen_unix(str(there))
    for name, words in CLIENTS.items():
        async with relayed(there) as (relay, here):
            places = {
                "uri": f"nbd+unix:///disk0?socket={here}",
                "root": f"nbd+unix://?socket={here}",
                "image": str(image),
                "path": str(here),
            }
            await run(*(word.format(**places) for word in words))
            for number, (said, _) in enumerate(relay.said):
                handshake = ServerHandshake(lambda: {e.name: e.offer() for e in exports})
                with contextlib.suppress(AssertionError):
                    handshake.receive(bytes(said))
                rest = handshake.rest
                head = bytes(said[: len(said) - len(rest)])
                keep("nbd_server_handshake", f"{name}-{number}", b"\0\0", head)
                if rest:
                    keep("nbd_requests", f"{name}-{number}", b"\3\0\0\0", rest)
    await ours.close()


SERVERS: dict[str, tuple[str, ...]] = {
    "qemu-nbd": ("qemu-nbd", "-f", "raw", "-k", "{socket}", "-x", "disk0", "-t", "-e", "9", "{image}"),
    "nbdkit": ("nbdkit", "-f", "-U", "{socket}", "-e", "disk0", "memory", "1M"),
    "nbdkit-old": ("nbdkit", "-f", "-U", "{socket}", "--mask-handshake=0", "memory", "1M"),
    "nbdkit-no-structured": ("nbdkit", "-f", "-U", "{socket}", "--no-sr", "memory", "1M"),
    "nbdkit-errors": ("nbdkit", "-f", "-U", "{socket}", "--filter=error", "memory", "1M", "error-rate=100%"),
    "nbdkit-holes": ("nbdkit", "-f", "-U", "{socket}", "--filter=noparallel", "null", "1M"),
}


async def servers(folder: Path) -> None:
    """Our client and other people's servers."""
    image = folder / "server.img"
    image.write_bytes(bytes(nbd_replies.LENGTH))
    for name, words in SERVERS.items():
        there = folder / f"{name}.sock"
        command = [word.format(socket=there, image=image) for word in words]
        async with server(*command, socket=there), relayed(there) as (relay, here):
            sock, agreement, rest = await connect(Unix(str(here)), "disk0", timeout_s=10)
            queue = Queue(16)
            made, _ = nbd_replies.requests(queue)
            session = Session(
                sock, agreement, rest, timeout_s=10, answered=lambda: None, lost=lambda error: None
            )
            pendings = [queue.add(request) for request in made]
            queue.send(session)
            for pending in pendings:
                with contextlib.suppress(Error):
                    await pending.wait()
            session.close()
            ((_, said),) = relay.said
            handshake = ClientHandshake("disk0")
            handshake.receive(bytes(said))
            rest = handshake.rest
            head = bytes(said[: len(said) - len(rest)])
            keep("nbd_client_handshake", name, b"\0\0", head)
            flags = agreement.structured | 2 * (agreement.allocation_id is not None)
            keep("nbd_replies", name, bytes((flags, 0, 0)), rest)
        there.unlink(missing_ok=True)
        async with server(*command, socket=there), relayed(there) as (relay, here):
            with contextlib.suppress(Error):
                await connect(Unix(str(here)), "missing", timeout_s=10)
            keep("nbd_client_handshake", f"{name}-missing", b"\0\0", bytes(relay.said[0][1]))
    for name, answer in (("starttls", 1), ("no-starttls", 0x80000001)):
        greeting = GREETING.pack(0x4E42444D41474943, 0x49484156454F5054, 3)
        reply = struct.pack(">QIII", 0x3E889045565A9, 5, answer, 0)
        keep("nbd_client_handshake", name, b"\1\0", greeting, reply)


async def control(folder: Path) -> None:
    """QEMU's client library on our control server, and our client on QEMU's monitor."""
    from qemu.qmp import QMPClient
    from qemu.qmp.qmp_client import ExecuteError

    async def answer(arguments: object, session: object) -> object:
        return status()

    async def refuse(arguments: object, session: object) -> None:
        raise Error(Kind.INVALID_STATE, "not now")

    ours = ControlServer({"query-status": answer, "checkpoint": refuse, "start": refuse, "failover": refuse})
    there = folder / "control.sock"
    await ours.listen_unix(there)
    async with relayed(there) as (relay, here):
        client = QMPClient("capture")
        await client.connect(str(here))
        await client.execute("query-status")
        for name, arguments in (
            ("failover", {"to": "latest"}),
            ("start", {"assume-clean": True}),
            ("nothing", {}),
        ):
            with contextlib.suppress(ExecuteError):
                await client.execute(name, arguments)
        await client.disconnect()
        ours.emit("REPLICATION_STAGE", schema.StageChanged(stage="running", epoch=1))
        ((said, answered),) = relay.said
    keep("control_requests", "qemu-qmp", b"\0\0", bytes(said))
    keep("control_replies", "ours", b"\0", bytes(answered))
    for row in tables.COMMANDS.values():
        request = json.dumps({"execute": row.name, "arguments": {}, "id": 1}).encode()
        keep("control_requests", f"command-{row.name}", b"\2\0", request)
    await ours.close()
    monitor = folder / "monitor.sock"
    words = ("-machine", "none", "-display", "none", "-qmp", f"unix:{monitor},server=on,wait=off")
    async with server("qemu-system-x86_64", *words, socket=monitor), relayed(monitor) as (relay, here):
        connection = await ControlConnection.unix(here, timeout=10)
        for command in ("query-status", "query-block-jobs", "nothing"):
            with contextlib.suppress(Error):
                await connection.execute(command, timeout=10)
        connection.close()
        ((_, answered),) = relay.said
    keep("control_replies", "qemu", b"\0", bytes(answered))


def one_block(row: Command) -> bytes:
    """A command's CDB, for one block or for an answer of 255 bytes where it has such a field."""
    fields = {"blocks": 1, "allocation_length": 255}
    return row.encode(**{name: value for name, value in fields.items() if name in row.by_name})


def scsi() -> None:
    """A command of each row of the table, and those whose data or fields say more."""
    for row in COMMANDS:
        cdb = one_block(row)
        _keep_command(row.name, cdb, bytes(1024))
    block, descriptor = bytes(512), struct.pack(">HHxxxxQIxxxx", 22, 16, 8, 8)
    _keep_command("unmap-8", _row("UNMAP").encode(parameter_list_length=24), descriptor)
    _keep_command("verify-data", _row("VERIFY (10)").encode(blocks=2, bytchk=1), 2 * block)
    _keep_command("verify-one", _row("VERIFY (16)").encode(blocks=9, bytchk=3), block)
    _keep_command("write-same-unmap", _row("WRITE SAME (16)").encode(blocks=8, unmap=1), block)
    _keep_command("write-same-pattern", _row("WRITE SAME (10)").encode(blocks=3), 512 * b"x")
    _keep_command("compare-differs", _row("COMPARE AND WRITE").encode(blocks=1), 512 * b"x" + block)
    for page in (0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2):
        cdb = _row("INQUIRY").encode(evpd=1, page_code=page, allocation_length=255)
        _keep_command(f"inquiry-{page:02x}", cdb)
    for option, opcode in ((0, 0), (1, 0x28), (2, 0x9E), (3, 0x28)):
        fields = {
            "reporting_options": option,
            "requested_opcode": opcode,
            "allocation_length": 2048,
            "rctd": 1,
        }
        _keep_command(f"operation-codes-{option}", _row("REPORT SUPPORTED OPERATION CODES").encode(**fields))
    for length, name in ((6, "(6)"), (10, "(10)")):
        sensed = _row(f"MODE SENSE {name}").encode(page_code=0x3F, allocation_length=255)
        _keep_command(f"mode-sense-{length}-all", sensed)
        unit = LogicalUnit(scsi_commands.LENGTH, 512, lambda: scsi_commands.IDENTITY)
        answer = unit.command(sensed, (), 255)
        assert isinstance(answer, Answer)
        pages = bytearray(answer.data)  # what MODE SENSE gives, MODE SELECT takes
        pages[: 4 if length == 6 else 8] = bytes((0, 0, 0, 8)) if length == 6 else bytes((*bytes(7), 8))
        select = _row(f"MODE SELECT {name}").encode(pf=1, parameter_list_length=len(pages))
        _keep_command(f"mode-select-{length}-all", select, bytes(pages))


def _row(name: str) -> Command:
    return next(row for row in COMMANDS if row.name == name)


def _keep_command(name: str, cdb: bytes, data_out: bytes = b"") -> None:
    file = name.lower().translate(str.maketrans(" ", "-", "()/"))
    lengths = struct.pack(">HH", 4096, len(data_out))
    keep("scsi_commands", file, b"\0", bytes((len(cdb),)) + cdb + lengths + data_out)


def own() -> None:
    """What our own code writes."""
    scsi()
    for name, queue in (
        ("reads", (bytes((0x28, *bytes(6), 0, 8, 0)), 4096)),
        ("inquiry", (b"\x12\0\0\0\x60\0", 96)),
    ):
        kernel = FakeKernel(tcmu_ring.RING, tcmu_ring.DATA)
        for _ in range(3):
            kernel.queue(queue[0], in_length=queue[1])
        kernel.unknown()
        kernel.abort([1, 2])
        head = kernel.memory[:68].cast("I")[layout.HEAD_WORD]
        end = layout.MAILBOX_SIZE + head
        keep("tcmu_ring", name, bytes((0, head // 8)), bytes(kernel.memory[layout.MAILBOX_SIZE : end]))
        keep(
            "tcmu_ring", f"{name}-mailbox", b"\1\0", bytes(kernel.memory[:68]), bytes(kernel.memory[128:end])
        )
    kernel = FakeKernel(tcmu_ring.RING, tcmu_ring.DATA)
    kernel.queue(bytes((0x2A, *bytes(6), 0, 16, 0)), bytes(8192))
    kernel.queue(bytes((0x7F, *bytes(6), 24, *bytes(24))), in_length=512)
    kernel.queue(bytes((0x2A, *bytes(9))), bytes(512), 512, bidi=True)
    head = kernel.memory[:68].cast("I")[layout.HEAD_WORD]
    keep("tcmu_ring", "write-long-bidi", bytes((2, head // 8)), bytes(kernel.memory[128 : 128 + head]))
    whole = Manifest(
        "disk0", Mode.SECONDARY, Stage.RUNNING, 1 << 28, generation="3f2a", epoch=7, error="no", paired=True
    )
    signed = encode(whole)
    keep("manifest", "file", b"\0", signed)
    keep("manifest", "body", b"\1", signed.split(b"\n")[1])
    keep("allocation_map", "fresh", b"\2")
    keep(
        "allocation_map",
        "marks",
        b"\2",
        b"\2\0" + b"\1\0\0\0" * 3 + b"\0\0",
        b"\5\0" + b"\0\0\0\xc0" * 3 + b"\0\0",
        b"\x02\x10" + b"\xff\xff\xff\x3f" * 3 + b"\0\0",
    )
    unflushed = (
        b"\2\0" + b"\1\0\0\x40" + b"\2\0\0\x40" + b"\1\0\0\x80" + b"\0\0",
        b"\5\0" + b"\3\0\0\0" + b"\4\0\0\x80" + b"\5\0\0\xc0" + b"\0\0",
    )
    keep("allocation_map", "unflushed", b"\2", *unflushed)
    keep("allocation_map", "unflushed-in-another-boot", b"\3", b"\0\3" + b"another boot!!", *unflushed)
    keep("allocation_map", "short", b"\0", b"\2\0" + b"\2" * 14)
    keep("allocation_map", "other-header", b"\3", b"\0\0" + map_format.header(1 << 20)[:14])
    keep("bitmap", "fresh", b"\2")
    keep(
        "bitmap",
        "marks",
        b"\2",
        b"\2\0" + b"\1" + bytes(12) + b"\x80",
        b"\3\4" + b"\xff" * 14,
        b"\6\0\7" + bytes(13),
    )
    keep("bitmap", "beyond-the-end", b"\2", b"\6\1" + bytes(13) + b"\1")
    keep("bitmap", "short", b"\0", b"\2\0" + b"\2" * 14)
    keep("bitmap", "other-header", b"\3", b"\0\0" + bitmap.header(1 << 20)[:14])
    keep("hot_extents", "fresh", b"\x1f")
    keep(
        "hot_extents",
        "marks",
        b"\x1f",
        b"\x10\0" + b"\1" + bytes(12) + b"\x80",
        b"\x12\3" + b"\xff" * 14,
        b"\x14\0\7" + bytes(13),
    )
    keep("hot_extents", "torn", b"\x17", b"\x12\0" + b"\x55" * 14)
    keep("hot_extents", "beyond-the-end", b"\x1f", b"\x14\x0b" + b"\xff" * 14)
    keep("hot_extents", "other-disk", b"\x1f", b"\0\x10" + bytes(5) + b"\1" + bytes(8))
    keep("hot_extents", "newer", b"\x1f", b"\0\0" + hot_extents.MAGIC + b"\2" + bytes(3) + b"\0\0")
    keep("hot_extents", "damaged-header", b"\x1e", b"\0\0" + b"x" * 14)
    client, server = secret_proof.rest_of("client"), secret_proof.rest_of("server")
    keep("secret_proof", "client", b"\0\0", client)
    keep("secret_proof", "server", b"\1\0", server)
    keep("secret_proof", "client-wrong-secret", b"\2\7", client)
    keep("secret_proof", "server-wrong-secret", b"\3\7", server)
    keep("secret_proof", "server-refuses", b"\1\0", server[:HELLO], b"\0")
    keep("secret_proof", "nbd-greeting", b"\1\0", b"NBDMAGICIHAVEOPT\0\3")
    keep("secret_proof", "tls-handshake", b"\0\1", b"\x16\3\1\2\0\1\0\1\xfc\3\3")
    example = Path(__file__).parents[2] / "contrib/resources/disk0.toml"
    keep("resource_file", "example", example.read_bytes())


async def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        await clients(Path(folder))
        await servers(Path(folder))
        await control(Path(folder))
    own()


if __name__ == "__main__":
    asyncio.run(main())
