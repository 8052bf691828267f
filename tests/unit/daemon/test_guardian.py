"""The thread that answers while the loop's is stuck in the kernel (A2)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.file import File
from tcmu_replication.block.node import Buffers
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.control import schema
from tcmu_replication.control.client import Client
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import guardian
from tcmu_replication.daemon.guardian import Guardian
from tcmu_replication.errors import Error
from tcmu_replication.qemu import tables
from tests.support.tools import PATIENCE_S
from tests.unit.control.documents import status


class Frozen(File):
    """Its writes wait in the kernel, for a byte from a pipe."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._wait, self._go = os.pipe()

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        os.read(self._wait, 1)
        return None

    def thaw(self) -> None:
        os.write(self._go, b"x")


class Frontend:
    """Counts how often somebody stood in for it."""

    def __init__(self) -> None:
        self.steps = 0

    def stand_in(self) -> int:
        self.steps += 1
        return 0


class Worker:
    """What a worker has around its loop; `path` is its control socket."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run/disk0.sock"
        self.disk = Frozen(_image(directory))
        self.frontend = Frontend()
        self.started = 0
        self.defects: list[Any] = []
        commands = {"query-status": self.query_status, "query-errors": self.query_errors, "start": self.start}
        self.server = Server(
            commands,
            tables.COMMANDS,
            names=lambda handlers, emit: {"query-xen-replication-status": handlers["query-errors"]},
        )
        self.guardian = Guardian(
            "disk0",
            {"uio0": self.frontend},  # type: ignore[dict-item]
            self.server,
            commands,
            lambda loop, context: self.defects.append(context),
        )

    async def query_status(self, arguments: Any, session: Session) -> schema.Status:
        return status(hangs=self.guardian.hangs(None))

    async def query_errors(self, arguments: Any, session: Session) -> schema.ErrorStatus:
        return schema.ErrorStatus(error=False)

    async def start(self, arguments: Any, session: Session) -> schema.Outcome:
        self.started += 1
        return schema.Outcome(ignored=False, stage="running")

    def ask(self, command: str) -> Any:
        """From another thread, as an operator does."""
        with Client.unix(self.path) as client:
            return client.execute(command, timeout=PATIENCE_S)

    def hangs(self) -> str:
        """What `status` says, when it says that something hangs."""
        while not (answer := self.ask("query-status"))["hangs"]:
            time.sleep(0.05)
        return answer["hangs"]


def _image(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@contextlib.asynccontextmanager
async def working(directory: Path) -> AsyncIterator[Worker]:
    worker = Worker(directory)
    await worker.server.listen_unix(worker.path)
    worker.guardian.start()
    try:
        yield worker
    finally:
        await worker.guardian.stop()
        await worker.server.close()
        worker.disk.close()
    assert worker.defects == []


def stuck(directory: Path, story: Any) -> None:
    """`story(worker)` in another thread while the loop is stuck in a write; then what it returns, on the loop."""

    async def run() -> None:
        async with working(directory) as worker:
            raised: list[BaseException] = []
            sequel: list[Any] = []

            def aside() -> None:
                try:
                    sequel.append(story(worker))
                except BaseException as error:
                    raised.append(error)
                finally:
                    worker.disk.thaw()

            thread = threading.Thread(target=aside)
            thread.start()
            worker.disk.write(0, [memoryview(bytes(512))])
            thread.join()
            if raised:
                raise raised[0]
            if sequel[0] is not None:
                await sequel[0]()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def test_status_and_errors_name_the_call_that_hangs(tmp_path: Path) -> None:
    def story(worker: Worker) -> None:
        assert worker.hangs().endswith(f"s: write {tmp_path}/disk.img")
        errors = worker.ask("query-errors")
        assert errors["error"]
        assert f"write {tmp_path}/disk.img" in errors["desc"]

    stuck(tmp_path, story)


def test_other_name_of_a_command_is_answered_alike(tmp_path: Path) -> None:
    def story(worker: Worker) -> None:
        worker.hangs()
        assert f"write {tmp_path}/disk.img" in worker.ask("query-xen-replication-status")["desc"]

    stuck(tmp_path, story)


def test_other_commands_are_refused_and_not_carried_out_later(tmp_path: Path) -> None:
    def story(worker: Worker) -> Any:
        with pytest.raises(Error, match=r"write .*disk.img\. The command was not carried out"):
            worker.ask("start")

        async def sequel() -> None:
            assert worker.started == 0
            assert (await asyncio.to_thread(worker.ask, "start"))["stage"] == "running"
            assert worker.started == 1

        return sequel

    stuck(tmp_path, story)


def test_connection_that_came_meanwhile_is_served_when_the_disk_goes_on(tmp_path: Path) -> None:
    def story(worker: Worker) -> Any:
        worker.hangs()

        async def sequel() -> None:
            while worker.guardian.hang is not None:
                await asyncio.sleep(0.05)
            assert (await asyncio.to_thread(worker.ask, "query-status"))["hangs"] is None

        return sequel

    stuck(tmp_path, story)


def test_rings_are_looked_after(tmp_path: Path) -> None:
    def story(worker: Worker) -> None:
        worker.hangs()
        seen = worker.frontend.steps
        while worker.frontend.steps < seen + 2:
            time.sleep(0.05)

    stuck(tmp_path, story)


def test_busy_loop_is_not_taken_for_one_that_is_stuck(tmp_path: Path) -> None:
    async def run() -> None:
        async with working(tmp_path) as worker:
            while worker.frontend.steps < 3:  # without a turn of the loop
                pass
            assert worker.guardian.hang is None

    asyncio.run(run())


def test_manager_is_not_told_that_a_worker_lives_which_could_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This wait is one that SIGKILL ends: a dead lock must not look like a disk that hangs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def story(worker: Worker) -> None:
            worker.hangs()
            with contextlib.suppress(BlockingIOError):  # what the loop said while it turned
                while manager.recv(4096):
                    pass
            seen = worker.frontend.steps
            while worker.frontend.steps < seen + 2:
                time.sleep(0.05)
            with pytest.raises(BlockingIOError):
                manager.recv(4096)

        stuck(tmp_path, story)


def test_loop_that_turns_tells_the_manager_that_the_worker_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lio-findings 6."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        async def run() -> None:
            async with working(tmp_path):
                for _ in range(2):
                    assert await asyncio.get_running_loop().sock_recv(manager, 4096) == b"WATCHDOG=1"

        asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def test_call_in_a_thread_that_takes_long_is_told_with_its_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with working(tmp_path) as worker:
            offload, go = Offload(), threading.Event()
            assert offload.oldest() is None
            call = offload(go.wait, "flush /dev/sdb")
            while (oldest := offload.oldest()) is None:
                await asyncio.sleep(0.01)
            assert oldest.doing == "flush /dev/sdb"
            assert oldest.since_s <= time.monotonic()
            monkeypatch.setattr(guardian, "SLOW_S", 0.0)
            assert worker.guardian.hangs(offload) == "no answer for 0 s: flush /dev/sdb"
            go.set()
            await call.wait()
            assert offload.oldest() is None
            offload.close()

    asyncio.run(run())
