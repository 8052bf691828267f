"""The manager over real processes: fake workers that do what they are told, and a fake monitor of devices."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.control.connection import Connection
from tcmu_replication.daemon import config, luns
from tcmu_replication.daemon import manager as manager_module
from tcmu_replication.daemon.child import Child
from tcmu_replication.daemon.manager import Manager
from tcmu_replication.daemon.places import Context, socket_path
from tcmu_replication.errors import Error, Kind
from tcmu_replication.host.udev import Event
from tcmu_replication.tcmu import uio
from tests.support.tools import PATIENCE_S
from tests.unit.daemon import fake_worker
from tests.unit.daemon.test_config import GOOD

NEVER_S = 3600.0
LIMIT_S = PATIENCE_S


class Fake:
    """The test's end of one fake worker."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: dict[str, Any]
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.pid: int = hello["pid"]
        self.arguments: list[str] = hello["arguments"]

    async def tell(self, line: str) -> None:
        """Give an order and wait until it is carried out."""
        self.writer.write(line.encode() + b"\n")
        if not line.startswith("exit"):
            assert await self.hear() == "done"

    async def hear(self) -> Any:
        return json.loads(await self.reader.readline())

    async def gone(self) -> None:
        assert await self.reader.read() == b""


class Devices:
    """A monitor that tells what the test pushes."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._waiting: list[Event] = []

    def fileno(self) -> int:
        return self._event

    def events(self) -> list[Event]:
        os.eventfd_read(self._event)
        found, self._waiting = self._waiting, []
        return found

    def push(self, action: str, device: str) -> None:
        self._waiting.append(Event(action, device))
        os.eventfd_write(self._event, 1)


class Rig:
    """A manager, its directories, and the fakes in the order in which they came."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.context = Context(place / "etc", place / "run", "alpha")
        self.context.config_directory.mkdir()
        self.context.run_directory.mkdir()
        self.fakes: asyncio.Queue[Fake] = asyncio.Queue()
        self.devices = Devices()
        self.present: dict[str, uio.Identity] = {}
        self.hub = place / "hub"
        self.core = place / "core"
        patch.setenv("FAKE_HUB", str(self.hub))
        patch.setattr(uio, "devices", lambda: iter(self.present.values()))
        patch.setattr(uio, "identify", self.present.get)
        patch.setattr(manager_module.handler, "subtypes", lambda: {"replication", "file"})
        patch.setattr(manager_module, "TELL_DELAYS_S", (0.0, 0.01))

    def write(self, name: str, text: str = GOOD) -> None:
        (self.context.config_directory / f"{name}.toml").write_text(text.replace("disk0", name))

    def make(
        self, delays_s: tuple[float, ...] = (0.0,), look_s: float = 1.0, find_s: float = NEVER_S
    ) -> Manager:
        command = [sys.executable, fake_worker.__file__]
        return Manager(self.context, command, self.devices, delays_s, look_s, self.core, find_s)

    def backstore(self, identity: uio.Identity) -> Path:
        """A device's directory in a configfs of files."""
        path = self.core / f"user_{identity.hba}" / identity.name
        (path / "action").mkdir(parents=True)
        for action in ("block_dev", "reset_ring"):
            (path / "action" / action).touch()
        return path

    async def next(self, name: str | None = None) -> Fake:
        """The next worker that comes, or the next of this resource or device: several come in any order."""
        while True:
            fake = await self.fakes.get()
            if name in (None, fake.arguments[-1]):
                return fake

    async def ask(self, command: str) -> list[dict[str, Any]]:
        """What the manager answers."""
        connection = await Connection.unix(
            socket_path(self.context.run_directory, "_manager"), timeout=LIMIT_S
        )
        rows: list[dict[str, Any]] = await connection.execute(command)
        connection.close()
        return rows

    async def workers(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in await self.ask("query-workers")}

    async def luns(self) -> dict[str, dict[str, Any]]:
        return {row["device"]: row for row in await self.ask("query-devices")}

    async def until_lun(self, device: str, state: str, reason: str = "") -> dict[str, Any]:
        """The row of a LUN once it is in a state, for a reason that has these words (asked again and again)."""
        while (row := (await self.luns())[device])["state"] != state or reason not in (row["reason"] or ""):
            await asyncio.sleep(0)
        return row

    async def serving(self, name: str | None = None) -> Fake:
        """As `next`, once it answers attach-device and has said that it serves."""
        fake = await self.next(name)
        await fake.tell(f"serve {socket_path(self.context.run_directory, fake.arguments[-1])}")
        await fake.tell("ready")
        return fake

    async def until(self, name: str, state: str) -> dict[str, Any]:
        """The row of a worker once it is in a state (asked again and again: the answer comes over a socket)."""
        while (row := (await self.workers())[name])["state"] != state:
            await asyncio.sleep(0)
        return row

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.fakes.put_nowait(Fake(reader, writer, json.loads(await reader.readline())))

        async with await asyncio.start_unix_server(accept, str(self.hub)):
            yield


Body = Callable[[Rig, Manager], Awaitable[None]]


@pytest.fixture
def with_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test's body with an open manager; `prepare` writes files before."""

    def run(
        body: Body, prepare: Callable[[Rig], None] = lambda rig: rig.write("disk0"), **options: Any
    ) -> None:
        async def main() -> None:
            rig = Rig(tmp_path, monkeypatch)
            prepare(rig)
            async with rig.listening():
                manager = rig.make(**options)
                await manager.open()
                try:
                    await body(rig, manager)
                finally:
                    await manager.close()
                assert not list(rig.context.run_directory.glob("_manager.[sn]*"))

        asyncio.run(asyncio.wait_for(main(), LIMIT_S))

    return run


def test_worker_is_started_with_this_hosts_context(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        config, run = rig.context.config_directory, rig.context.run_directory
        assert fake.arguments == [f"--config={config}", f"--run={run}", "--host=alpha", "serve", "disk0"]
        assert (await rig.workers())["disk0"]["state"] == "starting"
        await fake.tell("ready")
        row = await rig.until("disk0", "running")
        assert (row["pid"], row["restarts"]) == (fake.pid, 0)

    with_manager(body)


def test_killed_worker_is_started_again_at_once_every_time(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        pids = set()
        for _ in range(3):
            fake = await rig.next()
            await fake.tell("ready")
            pids.add(fake.pid)
            os.kill(fake.pid, signal.SIGKILL)
        last = await rig.next()
        row = (await rig.workers())["disk0"]
        assert (row["restarts"], row["pid"]) == (3, last.pid)
        assert row["error"].endswith("was killed by SIGKILL")
        assert row["down-since"]
        assert last.pid not in pids
        await last.tell("ready")
        row = await rig.until("disk0", "running")
        assert (row["error"], row["down-since"]) == (None, None)

    with_manager(body)


def test_worker_that_keeps_dying_has_to_wait(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        await (await rig.next()).tell("exit 1")
        await (await rig.next()).tell("exit 1")
        row = await rig.until("disk0", "waiting")
        while row["restarts"] != 2:
            row = await rig.until("disk0", "waiting")
        assert row["error"].endswith("ended with status 1")
        assert row["pid"] is None
        manager.reload()
        await rig.next()

    with_manager(body, delays_s=(0.0, NEVER_S))


def test_wrong_configuration_is_not_tried_again_and_its_words_are_kept(
    with_manager: Callable[..., None],
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell("words disk0.toml: host.alpha.disk: found nothing")
        await fake.tell("exit 2")
        row = await rig.until("disk0", "failed")
        assert row["error"] == "disk0.toml: host.alpha.disk: found nothing"
        assert rig.fakes.empty()

    with_manager(body, delays_s=(0.0, NEVER_S))


def test_worker_that_ends_as_told_stays_ended(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell("ready")
        await fake.tell("exit 0")
        row = await rig.until("disk0", "stopped")
        assert (row["pid"], row["restarts"]) == (None, 0)

    with_manager(body)


def test_program_that_cannot_be_run(
    with_manager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    async def body(rig: Rig, manager: Manager) -> None:
        assert "cannot be started" in (await rig.workers())["disk0"]["error"]

    with_manager(body, delays_s=(NEVER_S,))


def test_close_ends_every_worker(with_manager: Callable[..., None]) -> None:
    fakes: list[Fake] = []

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.write("disk1", GOOD.replace("port = 10809", "port = 1\ncontrol-port = 2"))

    async def body(rig: Rig, manager: Manager) -> None:
        fakes.extend([await rig.next(), await rig.next()])
        await manager.close()
        for fake in fakes:
            await fake.gone()
            with pytest.raises(ProcessLookupError):
                os.kill(fake.pid, 0)

    with_manager(body, prepare)


def test_worker_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, monkeypatch)
        rig.write("disk0")
        async with rig.listening():
            manager = rig.make()
            await manager.open()
            fake = await rig.next()
            await fake.tell("deaf")
            child: Child = manager._children["disk0"]
            await child.stop(limit_s=0)
            await fake.gone()
            assert child.state == "stopped"
            await manager.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_file_that_is_wrong_is_shown_and_the_others_are_served(with_manager: Callable[..., None]) -> None:
    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.write("broken", "[resource]")
        rig.write("elsewhere", GOOD.replace("host.alpha", "host.gamma"))

    async def body(rig: Rig, manager: Manager) -> None:
        await rig.next()
        rows = await rig.workers()
        assert set(rows) == {"disk0", "broken"}
        assert rows["broken"]["state"] == "failed"
        assert "broken.toml: resource.name: found nothing" in rows["broken"]["error"]

    with_manager(body, prepare)


def test_reload_starts_stops_and_restarts_what_the_files_say(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        first = await rig.next()
        rig.write("disk1")
        manager.reload()
        second = await rig.next()
        assert second.arguments[-1] == "disk1"
        rig.write("disk0", GOOD.replace("port = 10809", "port = 1"))
        (rig.context.config_directory / "disk1.toml").unlink()
        manager.reload()
        third = await rig.next()
        assert third.arguments[-1] == "disk0"
        await first.gone()
        await second.gone()
        while "disk1" in (rows := await rig.workers()):
            await asyncio.sleep(0)
        assert rows["disk0"]["pid"] == third.pid

    with_manager(body)


def test_reload_of_a_file_that_became_wrong_leaves_its_worker_alone(
    with_manager: Callable[..., None],
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell("ready")
        await rig.until("disk0", "running")
        rig.write("disk0", "nonsense")
        manager.reload()
        row = (await rig.workers())["disk0"]
        assert (row["state"], row["pid"]) == ("running", fake.pid)
        assert "expected TOML" in row["error"]
        rig.write("disk0")
        manager.reload()
        assert (await rig.workers())["disk0"]["error"] is None
        assert rig.fakes.empty()

    with_manager(body)


def test_second_manager_is_refused(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        with pytest.raises(Error, match="already: process") as caught:
            await rig.make().open()
        assert caught.value.kind is Kind.CONFLICT
        assert (await rig.workers())["disk0"]["state"] == "starting"

    with_manager(body)


def test_worker_of_an_earlier_manager_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, monkeypatch)
        rig.write("disk0")
        async with rig.listening():
            orphan = await asyncio.create_subprocess_exec(sys.executable, fake_worker.__file__, "orphan")
            fake = await rig.next()
            await fake.tell(f"hold {socket_path(rig.context.run_directory, 'disk0')}")
            manager = rig.make()
            await manager.open()
            row = (await rig.workers())["disk0"]
            assert (row["state"], row["pid"]) == ("running", orphan.pid)
            assert rig.fakes.empty()
            orphan.kill()
            assert (await rig.next()).arguments[-1] == "disk0"
            await orphan.wait()
            await manager.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def identity(device: str, subtype: str, config: str) -> uio.Identity:
    return uio.Identity(device, "user_0", "lun", subtype, config)


def test_device_that_is_there_is_told_when_the_worker_serves(with_manager: Callable[..., None]) -> None:
    """The worker of the test refuses once, as one does whose device is not enabled yet."""

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.present["uio0"] = identity("uio0", "replication", "disk0")
        rig.present["uio1"] = identity("uio1", "replication", "unknown")

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell(f"serve {socket_path(rig.context.run_directory, 'disk0')}")
        await fake.tell("ready")
        assert await fake.hear() == ["attach", "uio0"]

    with_manager(body, prepare)


def test_device_that_comes_and_goes_is_told(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell(f"serve {socket_path(rig.context.run_directory, 'disk0')}")
        await fake.tell("ready")
        await rig.until("disk0", "running")
        rig.present["uio4"] = identity("uio4", "replication", "disk0")
        rig.devices.push("add", "uio9")  # another driver's
        rig.devices.push("add", "uio4")
        assert await fake.hear() == ["attach", "uio4"]
        rig.devices.push("remove", "uio9")
        rig.devices.push("remove", "uio4")
        assert await fake.hear() == ["detach", "uio4"]

    with_manager(body)


def test_device_of_another_handler_gets_a_worker_of_its_own(with_manager: Callable[..., None]) -> None:
    def prepare(rig: Rig) -> None:
        rig.present["uio0"] = identity("uio0", "file", "/srv/image")
        rig.present["uio1"] = identity("uio1", "rbd", "pool")

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        assert fake.arguments[-2:] == ["--device", "uio0"]
        assert set(await rig.workers()) == {"uio0"}
        rig.devices.push("remove", "uio0")
        await fake.gone()

    with_manager(body, prepare)


def test_devices_of_a_worker_that_died_answer_busy_until_the_next_takes_them_up(
    with_manager: Callable[..., None],
) -> None:
    """lio-findings 5: what waits in a ring that nobody serves becomes an I/O error after 30 s."""
    stores: list[Path] = []

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.present["uio0"] = identity("uio0", "replication", "disk0")
        rig.present["uio1"] = identity("uio1", "replication", "another")._replace(name="other")
        stores.extend(rig.backstore(device) for device in rig.present.values())

    async def body(rig: Rig, manager: Manager) -> None:
        await (await rig.next()).tell("exit 1")
        await rig.until("disk0", "waiting")
        assert [(stores[0] / "action" / name).read_text() for name in ("block_dev", "reset_ring")] == [
            "1",
            "1",
        ]
        assert (stores[1] / "action" / "block_dev").read_text() == ""

    with_manager(body, prepare, delays_s=(NEVER_S,))


def test_wrong_configuration_that_an_initiator_waits_for_is_tried_again_soon(
    with_manager: Callable[..., None],
) -> None:
    """lio-findings 5. The backstore is being removed: its directory has gone, which is no reason to stop."""

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.present["uio0"] = identity("uio0", "replication", "disk0")

    async def body(rig: Rig, manager: Manager) -> None:
        await (await rig.next()).tell("exit 2")
        await rig.next()

    with_manager(body, prepare, delays_s=(0.0,))


def test_worker_that_falls_silent_is_killed_and_started_again(with_manager: Callable[..., None]) -> None:
    """lio-findings 6: one that hung was left alone, and the initiator got an I/O error."""

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell("ready")
        await fake.tell("alive")
        await fake.gone()
        again = await rig.next()
        row = (await rig.workers())["disk0"]
        assert (row["pid"], row["restarts"]) == (again.pid, 1)
        assert "it hung: no sign of life" in row["error"]

    with_manager(body, look_s=0.02)


def test_worker_that_sigkill_does_not_end_is_told_since_when_and_its_devices_answer_busy(
    with_manager: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """lio-findings 6, on a disk that hangs: the kernel keeps a process in state D until the disk goes on."""
    stores: list[Path] = []
    kill = signal.pidfd_send_signal

    def held(pidfd: int, number: int) -> None:
        if number != signal.SIGKILL:
            kill(pidfd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", held)

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.present["uio0"] = identity("uio0", "replication", "disk0")
        stores.append(rig.backstore(rig.present["uio0"]))

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell(f"serve {socket_path(rig.context.run_directory, 'disk0')}")
        await fake.tell("ready")
        assert await fake.hear() == ["attach", "uio0"]
        await fake.tell("alive")
        row = await rig.until("disk0", "hung")
        assert (row["pid"], row["restarts"]) == (fake.pid, 0)
        assert "SIGKILL does not end it: a disk hangs" in row["error"]
        assert row["down-since"]
        assert f"process {fake.pid}: {row['error']}" in caplog.text
        assert (stores[0] / "action" / "block_dev").read_text() == "1"
        await fake.tell("exit 1")  # the disk goes on, and SIGKILL takes effect
        again = await rig.next()
        assert (await rig.workers())["disk0"]["down-since"] == row["down-since"]
        await again.tell("ready")
        row = await rig.until("disk0", "running")
        assert (row["restarts"], row["down-since"]) == (1, None)

    with_manager(body, prepare, look_s=0.02)


def test_manager_says_that_it_lives_while_its_loop_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lio-findings 6, for the daemon itself: what systemd's WatchdogSec listens to, over a real socket.

    Its loop is held by a device event. That nothing comes then is seen by waiting for many looks.
    """
    look_s = 0.02
    stuck, goes_on = threading.Event(), threading.Event()

    class Holding(Devices):
        def events(self) -> list[Event]:
            stuck.set()
            goes_on.wait(LIMIT_S)
            return super().events()

    rig = Rig(tmp_path, monkeypatch)
    rig.devices = Holding()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

    async def main() -> None:
        manager = rig.make(look_s=look_s)
        await manager.open()
        try:
            await asyncio.to_thread(listen)
        finally:
            await manager.close()

    def listen() -> None:
        try:
            assert [notices.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            rig.devices.push("add", "uio9")
            assert stuck.wait(LIMIT_S)
            notices.settimeout(0)
            with suppress(BlockingIOError):
                while notices.recv(4096):  # from before
                    pass
            notices.settimeout(20 * look_s)
            with pytest.raises(TimeoutError):
                notices.recv(4096)
        finally:
            goes_on.set()
        notices.settimeout(LIMIT_S)
        assert notices.recv(4096) == b"WATCHDOG=1"

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(LIMIT_S)
        asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_worker_that_outlived_a_manager_is_watched_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lio-findings 6: the path to which it says that it lives is the same."""

    async def main() -> None:
        rig = Rig(tmp_path, monkeypatch)
        rig.write("disk0")
        monkeypatch.setenv("NOTIFY_SOCKET", str(rig.context.run_directory / "_manager.notify"))
        async with rig.listening():
            orphan = await asyncio.create_subprocess_exec(sys.executable, fake_worker.__file__, "orphan")
            fake = await rig.next()
            await fake.tell(f"hold {socket_path(rig.context.run_directory, 'disk0')}")
            manager = rig.make(look_s=0.02)
            await manager.open()
            await fake.tell("alive")
            await fake.gone()
            assert await orphan.wait() == -signal.SIGKILL
            await rig.next()
            await manager.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def lun_of(config: str) -> Callable[[Rig], None]:
    """Prepare a resource disk0 and a LUN uio0 of this SUBTYPE/CONFIG."""

    def prepare(rig: Rig) -> None:
        rig.write("disk0")
        rig.present["uio0"] = identity("uio0", *config.split("/", 1))
        rig.backstore(rig.present["uio0"])

    return prepare


def test_lun_that_is_served_names_its_worker(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.serving()
        row = await rig.until_lun("uio0", "served")
        assert (row["worker"], row["pid"], row["reason"], row["advice"]) == ("disk0", fake.pid, None, None)
        assert (row["backstore"], row["config"]) == ("lun", "replication/disk0")
        assert row["since"]

    with_manager(body, lun_of("replication/disk0"))


@pytest.mark.parametrize("reloaded", [False, True])
def test_lun_of_a_resource_that_is_not_there_says_so_and_is_served_when_its_file_comes(
    with_manager: Callable[..., None], reloaded: bool
) -> None:
    """lio-findings 7: `replication/nope` was a line in the log, and nothing else."""

    async def body(rig: Rig, manager: Manager) -> None:
        row = (await rig.luns())["uio0"]
        assert (row["state"], row["worker"], row["pid"]) == ("unserved", None, None)
        path = rig.context.config_directory / "nope.toml"
        assert f"{path}: file: found No such file or directory; expected a readable" in row["reason"]
        assert "this host has disk0" in row["advice"]
        assert "write or mend that file" in row["advice"]
        rig.write("nope")
        if reloaded:
            assert f"{path} is good" in (await rig.luns())["uio0"]["reason"]
            manager.reload()
        fake = await rig.serving("nope")
        row = await rig.until_lun("uio0", "served")
        assert (row["worker"], row["pid"], row["reason"]) == ("nope", fake.pid, None)

    with_manager(body, lun_of("replication/nope"), find_s=NEVER_S if reloaded else 0.01)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[resource]", "nope.toml: resource.name: found nothing; expected"),
        (
            GOOD.replace("host.alpha", "host.gamma"),
            "found [host.beta] and [host.gamma]; expected [host.alpha]",
        ),
    ],
    ids=["wrong", "of other hosts"],
)
def test_lun_of_a_resource_whose_file_is_no_good_says_why_and_is_served_when_it_is_mended(
    with_manager: Callable[..., None], text: str, reason: str
) -> None:
    def prepare(rig: Rig) -> None:
        lun_of("replication/nope")(rig)
        rig.write("nope", text)

    async def body(rig: Rig, manager: Manager) -> None:
        row = (await rig.luns())["uio0"]
        assert row["state"] == "unserved"
        assert reason in row["reason"]
        rig.write("nope")
        await rig.serving("nope")
        await rig.until_lun("uio0", "served")
        assert (await rig.workers())["nope"]["error"] is None

    with_manager(body, prepare, find_s=0.01)


def test_resource_file_that_is_still_being_written_is_not_taken(
    with_manager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file can be good: without its last table it has no [tls]."""
    whole, half = (
        config.parse(tomllib.loads(text.replace("disk0", "nope")), Path("nope.toml"))
        for text in (GOOD, GOOD.replace("port = 10809", "port = 1"))
    )
    looks = [half, half, whole, half, whole, whole]  # the first is for the log
    started: list[int] = []

    def find(name: str, where: Path) -> config.Resource:
        assert name == "nope"
        return looks.pop(0)

    async def body(rig: Rig, manager: Manager) -> None:
        await rig.next("nope")
        started.append(len(looks))

    monkeypatch.setattr(config, "find", find)
    with_manager(body, lun_of("replication/nope"), find_s=0.01)
    assert started == [0]


@pytest.mark.parametrize("name", ["../disk0", "", "disk0 "])
def test_lun_whose_configuration_is_no_name_of_a_resource_says_so(
    with_manager: Callable[..., None], name: str
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        row = (await rig.luns())["uio0"]
        assert row["state"] == "unserved"
        assert f"{name!r} is not the name of a resource" in row["reason"]

    with_manager(body, lun_of(f"replication/{name}"), find_s=0.01)


def test_lun_that_its_worker_refuses_says_why_and_is_served_when_it_can_be(
    with_manager: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """lio-findings 7: a wrong size was in the log, 38 s later. Tried a hundred times, each reason is there once."""

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next()
        await fake.tell("refuse was created with 1 byte, disk0 has 2; delete it and create it with size=2")
        await fake.tell(f"serve {socket_path(rig.context.run_directory, 'disk0')}")
        await fake.tell("ready")
        row = await rig.until_lun("uio0", "unserved", "was created with 1 byte")
        assert (row["worker"], row["pid"]) == ("disk0", fake.pid)
        assert "the worker tries again every" in row["advice"]
        await fake.tell("refuse in use")
        again = await rig.until_lun("uio0", "unserved", "in use")
        assert again["since"] == row["since"]
        await fake.tell("accept")
        row = await rig.until_lun("uio0", "served")
        assert (row["worker"], row["reason"]) == ("disk0", None)
        told = [line.message for line in caplog.records if "uio0 is not served" in line.message]
        assert len(told) == len(set(told)) == 3  # the fake refuses once by itself

    with_manager(body, lun_of("replication/disk0"))


def test_lun_whose_worker_died_says_what_it_died_of_until_the_next_serves(
    with_manager: Callable[..., None],
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.serving()
        assert await fake.hear() == ["attach", "uio0"]
        await rig.until_lun("uio0", "served")
        await fake.tell("words no space left on /var")
        await fake.tell("exit 1")
        row = await rig.until_lun("uio0", "unserved")
        assert "its worker disk0 does not serve: no space left on /var" in row["reason"]
        await rig.serving()
        assert (await rig.until_lun("uio0", "served"))["reason"] is None

    with_manager(body, lun_of("replication/disk0"))


def test_lun_that_comes_while_its_worker_waits_has_it_tried_at_once(
    with_manager: Callable[..., None],
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        await (await rig.next()).tell("exit 2")
        await rig.until("disk0", "failed")
        rig.present["uio0"] = identity("uio0", "replication", "disk0")
        rig.devices.push("add", "uio0")
        await rig.serving()
        await rig.until_lun("uio0", "served")

    with_manager(body, delays_s=(NEVER_S,))


def test_lun_of_another_handler_says_what_its_worker_died_of(with_manager: Callable[..., None]) -> None:
    """lio-findings 7: `file//no/such` was a worker that is restarted for ever."""

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.next("uio0")
        assert (await rig.luns())["uio0"]["state"] == "starting"
        await fake.tell("words file//no/such: found: No such file or directory")
        await fake.tell("exit 4")
        row = await rig.until_lun("uio0", "unserved")
        assert "file//no/such: found: No such file" in row["reason"]
        again = await rig.next("uio0")
        await again.tell("ready")
        row = await rig.until_lun("uio0", "served")
        assert (row["worker"], row["pid"], row["config"]) == ("uio0", again.pid, "file//no/such")

    with_manager(body, lun_of("file//no/such"))


def test_lun_whose_worker_never_says_a_word_counts_as_unserved(
    with_manager: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(luns, "GRACE_S", 0.0)

    async def body(rig: Rig, manager: Manager) -> None:
        row = (await rig.luns())["uio0"]
        assert row["state"] == "unserved"
        assert "worker disk0 is to take it up, and has not said" in row["reason"]

    with_manager(body, lun_of("replication/disk0"))


@pytest.mark.parametrize(("config", "worker"), [("replication/disk0", "disk0"), ("file//srv/image", "uio0")])
def test_lun_whose_worker_was_told_to_end_is_served_again_after_a_reload(
    with_manager: Callable[..., None], config: str, worker: str
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.serving(worker)
        await rig.until_lun("uio0", "served")
        await fake.tell("exit 0")
        row = await rig.until_lun("uio0", "unserved", "was told to end")
        assert "systemctl reload tcmu-replication" in row["advice"]
        manager.reload()
        await rig.serving(worker)
        await rig.until_lun("uio0", "served")

    with_manager(body, lun_of(config))


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ("replicatoin/disk0", "If replication/disk0 was meant"),
        ("qcow//srv/vm", "If one of file, replication was"),
    ],
)
def test_lun_of_a_handler_that_is_not_here_is_foreign_and_may_be_a_slip(
    with_manager: Callable[..., None], config: str, meant: str
) -> None:
    """lio-findings 7: `replicatoin/disk0`: nothing anywhere."""

    async def body(rig: Rig, manager: Manager) -> None:
        row = (await rig.luns())["uio0"]
        assert (row["state"], row["worker"]) == ("foreign", None)
        assert f"no handler of this host serves {config}" in row["reason"]
        assert meant in row["advice"]
        assert set(await rig.workers()) == {"disk0"}

    with_manager(body, lun_of(config))


def test_lun_that_was_removed_is_not_known_any_more(with_manager: Callable[..., None]) -> None:
    """lio-findings 7: later there was a stray `nope: detach-device … No such file`."""

    def prepare(rig: Rig) -> None:
        lun_of("replication/nope")(rig)
        rig.present["uio12"] = identity("uio12", "qcow", "x")
        rig.present["uio3"] = identity("uio3", "replication", "disk0")

    async def body(rig: Rig, manager: Manager) -> None:
        fake = await rig.serving()
        assert await fake.hear() == ["attach", "uio3"]
        assert list(await rig.luns()) == ["uio0", "uio3", "uio12"]
        for device in ("uio0", "uio12", "uio3"):
            rig.devices.push("remove", device)
        assert await fake.hear() == ["detach", "uio3"]
        assert await rig.luns() == {}

    with_manager(body, prepare)


def test_resource_that_comes_back_while_its_worker_ends_is_served(with_manager: Callable[..., None]) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        first = await rig.next()
        path = rig.context.config_directory / "disk0.toml"
        text = path.read_text()
        path.unlink()
        manager.reload()
        path.write_text(text)
        manager.reload()
        await first.gone()
        assert (await rig.next()).arguments[-1] == "disk0"

    with_manager(body)


def test_close_while_a_changed_resource_is_started_again_leaves_no_worker(
    with_manager: Callable[..., None],
) -> None:
    async def body(rig: Rig, manager: Manager) -> None:
        await rig.next()
        rig.write("disk0", GOOD.replace("port = 10809", "port = 1"))
        manager.reload()
        await manager.close()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
        assert not [command for command in commands if str(rig.context.run_directory) in command]

    with_manager(body)
