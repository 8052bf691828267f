"""TLS with other people's NBD clients and servers, and with those that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd.uri import Tcp, Unix
from tcmu_replication.tls import Context
from tcmu_replication.units import KiB, MiB
from tests.interop.test_nbd_remote import LENGTH, exercise
from tests.support import tools
from tests.support.certificates import PAST, Authority
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S, requires

pytestmark = [pytest.mark.interop, requires("openssl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of certificates: the server's host is localhost, the client's is alpha."""
    base = tmp_path_factory.mktemp("tls")
    ours = Authority(base)
    ours.issue(base / "server", "localhost", "127.0.0.1")
    ours.issue(base / "client", "alpha")
    ours.issue(base / "expired", "alpha", "localhost", valid=PAST)
    ours.issue(base / "elsewhere", "gamma")
    Authority(base, "other").issue(base / "stranger", "alpha", "localhost")
    bare = base / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((base / "server/ca-cert.pem").read_bytes())
    return base


class Served(NamedTuple):
    """Our server with `node` as disk0, over TCP at `port` and on a unix socket at `path`."""

    node: Memory
    port: int
    path: Path
    certificates: Path

    def uri(self, who: str = "client", unix: bool = False) -> str:
        query = f"tls-certificates={self.certificates / who}"
        if unix:
            return f"nbds+unix://localhost/disk0?socket={self.path}&{query}"
        return f"nbds://localhost:{self.port}/disk0?{query}"


def serve(made: Path, tmp_path: Path, body: Callable[[Served], Awaitable[None]]) -> None:
    async def main() -> None:
        node = Memory(LENGTH)
        tls = Context(str(made / "server"), server_side=True, names=["alpha"])
        server = Server([Export("disk0", node)], tls=tls, handshake_limit_s=5)
        path = tmp_path / "nbd.sock"
        await server.listen_unix(str(path))
        port = await server.listen_tcp("127.0.0.1", 0)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await body(Served(node, port, path, made))
        finally:
            await server.close()

    asyncio.run(main())


async def fails(*command: str) -> str:
    """What a command that must fail says."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode, f"{command} did not fail: {said!r}"
    return said.decode()


def qemu(program: str, who: Path, port: int, *words: str) -> list[str]:
    """A command of QEMU's on disk0 over TLS; `words` may have {} for the image."""
    image = (
        f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk0,tls-creds=tls0"
    )
    creds = f"tls-creds-x509,id=tls0,endpoint=client,dir={who}"
    return [program, *(word.replace("{object}", creds).replace("{}", image) for word in words)]


# Our server


@requires("nbdinfo", "nbdcopy")
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_libnbd_copies_both_ways(made: Path, tmp_path: Path, unix: bool) -> None:
    async def body(served: Served) -> None:
        original, copy = tmp_path / "original.img", tmp_path / "copy.img"
        original.write_bytes(os.urandom(3 * MiB) + bytes(MiB) + os.urandom(LENGTH - 4 * MiB))
        assert '"TLS": true' in await tools.run("nbdinfo", "--json", served.uri(unix=unix))
        await tools.run("nbdcopy", str(original), served.uri(unix=unix))
        assert served.node.data == original.read_bytes()
        await tools.run("nbdcopy", served.uri(unix=unix), str(copy))
        assert served.node.data == copy.read_bytes()

    serve(made, tmp_path, body)


@requires("qemu-img", "qemu-io")
def test_qemu_img_and_qemu_io(made: Path, tmp_path: Path) -> None:
    async def body(served: Served) -> None:
        who = made / "client"
        info = await tools.run(
            *qemu("qemu-img", who, served.port, "info", "--object", "{object}", "--image-opts", "{}")
        )
        assert f"({LENGTH} bytes)" in info
        await tools.run(
            *qemu(
                "qemu-io", who, served.port, "--object", "{object}", "--image-opts", "{}",
                "-c", "write -P 5 511 3000", "-c", "write -z 1M 1M", "-c", "flush", "-c", "read -P 5 511 3000",
            )
        )  # fmt: skip
        assert served.node.data[511:3511] == b"\x05" * 3000

    serve(made, tmp_path, body)


@requires("nbdcopy", "nbdkit")
def test_nbdkits_client_plugin(made: Path, tmp_path: Path) -> None:
    """nbdkit's nbd plugin opens our export and serves it again, in plain text."""

    async def body(served: Served) -> None:
        where, original = tmp_path / "kit.sock", tmp_path / "original.img"
        original.write_bytes(os.urandom(LENGTH))
        command = ("nbdkit", "-f", "-U", str(where), "nbd", "hostname=localhost", f"port={served.port}")
        command += ("export=disk0", "tls=require", f"tls-certificates={made / 'client'}")
        async with tools.server(*command, socket=where):
            await tools.run("nbdcopy", str(original), f"nbd+unix:///?socket={where}")
        assert served.node.data == original.read_bytes()

    serve(made, tmp_path, body)


@requires("nbdinfo")
@pytest.mark.parametrize("who", ["expired", "elsewhere", "bare", "stranger"])
def test_libnbd_with_the_wrong_certificate_gets_nothing(
    made: Path, tmp_path: Path, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(served: Served) -> None:
        said = await fails("nbdinfo", served.uri(who))
        assert str(LENGTH) not in said
        assert "disk0" not in said.replace(served.uri(who), "")
        await tools.run("nbdinfo", served.uri())

    serve(made, tmp_path, body)
    if who != "stranger":  # who does not know our CA goes away by himself
        (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        assert "certificate" in line
        assert line.endswith("hung up")


@requires("nbdinfo")
@pytest.mark.parametrize("command", [["nbdinfo"], ["nbdinfo", "--list"]], ids=["info", "list"])
def test_plain_client_gets_nothing(made: Path, tmp_path: Path, command: list[str]) -> None:
    async def body(served: Served) -> None:
        for uri in (f"nbd://127.0.0.1:{served.port}/disk0", f"nbd+unix:///disk0?socket={served.path}"):
            assert str(LENGTH) not in await fails(*command, uri)

    serve(made, tmp_path, body)


@requires("nbdinfo")
def test_tls_client_of_a_plain_server_goes_away(made: Path, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server([Export("disk0", Memory(LENGTH))])
        port = await server.listen_tcp("127.0.0.1", 0)
        try:
            query = f"tls-certificates={made / 'client'}"
            assert str(LENGTH) not in await fails("nbdinfo", f"nbds://localhost:{port}/disk0?{query}")
            tls = Context(str(made / "client"), server_side=False, names=["localhost"])
            with pytest.raises(Error, match="this listener has no TLS") as caught:
                await Remote("r", Tcp("127.0.0.1", port), "disk0", tls=tls).open()
            assert caught.value.kind is Kind.PERMISSION
        finally:
            await server.close()

    asyncio.run(main())


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


FLAGS, STARTTLS, LIST = b"\0\0\0\3", option(5), option(3)

EVIL = {
    "garbage behind STARTTLS": [FLAGS + STARTTLS, os.urandom(300)],
    "an option behind STARTTLS, in plain text": [FLAGS + STARTTLS, LIST],
    "an option in one packet with STARTTLS": [FLAGS + STARTTLS + LIST],
    "TLS at once": [b"\x16\x03\x01\0\x05hello"],
    "silence behind STARTTLS": [FLAGS + STARTTLS],
}


@pytest.mark.parametrize("row", EVIL)
def test_client_that_means_no_good_is_told_nothing_and_harms_nobody(
    made: Path, tmp_path: Path, row: str
) -> None:
    async def body(served: Served) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        await reader.readexactly(18)
        heard = b""
        for index, said in enumerate(EVIL[row]):
            writer.write(said)
            if index + 1 < len(EVIL[row]):
                heard += await reader.readexactly(20)  # the ACK of STARTTLS
        with contextlib.suppress(ConnectionResetError):
            heard += await reader.read()
        assert b"disk0" not in heard
        writer.close()
        tls = Context(str(made / "client"), server_side=False, names=["localhost"])
        remote = Remote("r", Tcp("127.0.0.1", served.port), "disk0", tls=tls)
        await remote.open()
        remote.close()

    serve(made, tmp_path, body)


def test_what_was_agreed_before_tls_does_not_count_behind_it(made: Path, tmp_path: Path) -> None:
    """Somebody in the middle asks for structured replies and a context before the client's STARTTLS."""

    async def body(served: Served) -> None:
        def client() -> bytes:
            sock = socket.create_connection(("127.0.0.1", served.port))
            with sock:
                sock.settimeout(PATIENCE_S)
                take(sock, 18)
                sock.sendall(FLAGS + option(8))
                assert take_reply(sock) == 0x80000005
                sock.sendall(STARTTLS)
                assert take_reply(sock) == 1
                with client_context(made).wrap_socket(sock) as tls:
                    tls.sendall(option(1, b"disk0"))
                    take(tls, 10)
                    tls.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 4096))
                    return take(tls, 4)

        assert await asyncio.to_thread(client) == b"\x67\x44\x66\x98", "a simple reply"

    serve(made, tmp_path, body)


def take(sock: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        received += sock.recv(length - len(received)) or pytest.fail("hung up")
    return received


def take_reply(sock: socket.socket) -> int:
    """The type of an option's reply."""
    kind, length = struct.unpack(">II", take(sock, 20)[12:])
    take(sock, length)
    return int(kind)


def client_context(made: Path, who: str = "client") -> ssl.SSLContext:
    """Python's own, with nothing of ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(made / who / "ca-cert.pem")
    context.load_cert_chain(made / who / "client-cert.pem", made / who / "client-key.pem")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_client_that_sends_its_certificate_late_or_never(
    made: Path, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    async def body(served: Served) -> None:
        def client() -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.minimum_version = context.maximum_version = version
            context.load_verify_locations(made / "client/ca-cert.pem")
            with socket.create_connection(("127.0.0.1", served.port)) as sock:
                sock.settimeout(PATIENCE_S)
                take(sock, 18)
                sock.sendall(FLAGS + STARTTLS)
                assert take_reply(sock) == 1
                with context.wrap_socket(sock) as tls:  # with 1.3 that looks like a success
                    tls.sendall(LIST)
                    assert tls.recv(4096) == b"", "an answer"

        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            await asyncio.to_thread(client)

    serve(made, tmp_path, body)


# Our client


def qemu_nbd(made: Path, path: Path, port: int, *words: str) -> Any:
    image = path / "disk.img"
    if not image.exists():
        image.write_bytes(bytes(LENGTH))
    pid = path / "qemu-nbd.pid"
    pid.unlink(missing_ok=True)
    return tools.server(
        "qemu-nbd", "-t", "-f", "raw", "--discard=unmap", "-b", "127.0.0.1", "-p", str(port), "-x", "disk0",
        "--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={made / 'server'},verify-peer=yes",
        "--tls-creds", "tls0", f"--pid-file={pid}", *words, str(image), socket=pid,
    )  # fmt: skip


def remote_of(
    made: Path, port: int, who: str = "client", *, name: str = "localhost", **options: Any
) -> Remote:
    tls = Context(str(made / who), server_side=False, names=[name])
    return Remote(
        "r",
        Tcp("127.0.0.1", port),
        "disk0",
        **{"length": LENGTH, "open_timeout": PATIENCE_S, **options},
        tls=tls,
    )


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body()

    asyncio.run(main())


@requires("qemu-nbd")
def test_remote_over_qemu_nbd(made: Path, tmp_path: Path) -> None:
    async def body() -> None:
        port = free_port()
        async with qemu_nbd(made, tmp_path, port):
            remote = remote_of(made, port)
            await remote.open()
            await exercise(remote, 60)
            remote.close()
            await remote.wait_closed()

    run(body)


@requires("nbdkit")
@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_remote_over_nbdkit(made: Path, tmp_path: Path, unix: bool) -> None:
    async def body() -> None:
        port, where, pid = free_port(), tmp_path / "kit.sock", tmp_path / "pid"
        listen = ("-U", str(where)) if unix else ("-i", "127.0.0.1", "-p", str(port))
        command = ("nbdkit", "-f", "-P", str(pid), *listen, "--tls=require", "--tls-verify-peer")
        command += (f"--tls-certificates={made / 'server'}", "memory", str(LENGTH))
        async with tools.server(*command, socket=pid):
            tls = Context(str(made / "client"), server_side=False, names=["localhost"])
            address = Unix(str(where)) if unix else Tcp("127.0.0.1", port)
            remote = Remote("r", address, "", length=LENGTH, open_timeout=PATIENCE_S, tls=tls)
            await remote.open()
            await exercise(remote, 60)
            remote.close()
            await remote.wait_closed()

    run(body)


REFUSED = {
    "a plain client": (None, "localhost", "it wants TLS, which is not set up here"),
    "another name": ("client", "beta", "names localhost, 127.0.0.1, and not beta"),
    "another CA": ("stranger", "localhost", "not signed by our CA"),
    "our certificate has expired": ("expired", "localhost", "it may not accept our certificate"),
}


@requires("qemu-nbd")
@pytest.mark.parametrize("row", REFUSED)
def test_remote_is_told_why_there_is_no_connection(made: Path, tmp_path: Path, row: str) -> None:
    who, name, said = REFUSED[row]

    async def body() -> None:
        port = free_port()
        async with qemu_nbd(made, tmp_path, port):
            if who is None:
                remote = Remote("r", Tcp("127.0.0.1", port), "disk0", open_timeout=PATIENCE_S)
            else:
                remote = remote_of(made, port, who, name=name, open_timeout=1)
            with pytest.raises(Error, match=said) as caught:
                await remote.open()
            assert caught.value.kind is (Kind.PEER_LOST if who == "expired" else Kind.PERMISSION)

    run(body)


@requires("qemu-nbd")
def test_qemu_nbd_killed_and_back_loses_nothing(made: Path, tmp_path: Path) -> None:
    async def body() -> None:
        port = free_port()
        states: asyncio.Queue[State] = asyncio.Queue()
        model = bytearray(LENGTH)
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(qemu_nbd(made, tmp_path, port))
            remote = remote_of(
                made, port, reconnect_delay=PATIENCE_S, on_state=lambda state, _: states.put_nowait(state)
            )
            await remote.open()
            pendings = []
            for number in range(1, 1200):
                offset = random.randrange(LENGTH // 512 - 128) * 512
                data = bytes([number & 255]) * random.choice([512, 4 * KiB, 64 * KiB])
                model[offset : offset + len(data)] = data
                pendings.append(remote.write(offset, [memoryview(data)]))
                if number % 100 == 0:
                    remote.unplug()
                    await asyncio.sleep(0)
                if number == 600:
                    first.kill()
            remote.unplug()
            while await states.get() is not State.WAITING:
                pass
            await first.wait()
            await stack.enter_async_context(qemu_nbd(made, tmp_path, port))
            for pending in pendings:
                assert pending is not None
                await pending.wait()
            assert (tmp_path / "disk.img").read_bytes() == model
            remote.close()
            await remote.wait_closed()

    run(body)


@requires("fio")
def test_load_through_our_client_and_our_server(made: Path, tmp_path: Path) -> None:
    """fio knows no certificates, so it is our client that speaks TLS: fio > server > remote > TLS > server."""

    async def body(served: Served) -> None:
        remote = remote_of(made, served.port)
        await remote.open()
        front = Server([Export("disk0", remote)])
        path = tmp_path / "front.sock"
        await front.listen_unix(str(path))
        await tools.run(
            "fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///disk0?socket={path}", "--rw=randwrite",
            "--bsrange=512-256k", "--blocksize_unaligned=0", "--iodepth=32", f"--size={LENGTH}", "--loops=4",
            "--verify=crc32c", "--verify_fatal=1", f"--aux-path={tmp_path}", f"--directory={tmp_path}",
        )  # fmt: skip
        await front.close()
        remote.close()
        await remote.wait_closed()

    serve(made, tmp_path, body)
