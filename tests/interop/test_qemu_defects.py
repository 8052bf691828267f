"""Where QEMU's replication aborts, hangs, loses a write or hides an error, ours does the right thing: real processes.

What needs no process is tested beside the engines; docs/replication.md has the table of all
sixteen. In `make soak` there are more and longer rounds.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.control.client import Client
from tcmu_replication.errors import Error
from tcmu_replication.replication import stages
from tcmu_replication.replication.assemble import secondary
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.replica import Replica
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import KiB, MiB
from tests.support import nbd, qemu
from tests.support.processes import Pair, Worker
from tests.support.tools import requires

SOAK = "TCMU_REPLICATION_SOAK" in os.environ
SIZE = 64 * MiB


@pytest.fixture
def place() -> Iterator[Path]:
    with qemu.images() as directory:
        yield directory


@pytest.fixture
def rng() -> random.Random:
    """Another seed every time; a failing test prints it."""
    seed = int(os.environ.get("TCMU_REPLICATION_SEED", random.getrandbits(32)))
    print(f"TCMU_REPLICATION_SEED={seed}")
    return random.Random(seed)


def control(worker: Worker, command: str, **arguments: Any) -> Any:
    """A command on the worker's control socket. Raises `Error`."""
    with Client.unix(worker.directory / "run/disk0.sock") as client:
        return client.execute(
            command, {name.replace("_", "-"): v for name, v in arguments.items()}, qemu.PATIENCE_S
        )


def lun(worker: Worker) -> nbd.Nbd:
    """The worker's LUN."""
    return nbd.Nbd(str(worker.socket), "disk0")


def whole(device: nbd.Nbd) -> bytes:
    """All that a LUN shows."""
    return b"".join(device.read(offset, 16 * MiB) for offset in range(0, SIZE, 16 * MiB))


def wait_for_stage(worker: Worker, stage: str) -> None:
    qemu.until(lambda: control(worker, "query-status")["stage"] == stage, f"stage {stage}")


class Lonely:
    """A secondary without a primary: the test forwards, from the address that the primary would have."""

    def __init__(self, base: Path) -> None:
        pair = Pair(base, size=SIZE, link={"trust": "address"})
        self.worker = pair.beta
        self.port = pair_port(self.worker)

    def forward(self) -> nbd.Nbd:
        """A connection as the primary's."""
        return nbd.Nbd(("127.0.0.2", self.port), "disk0")


def pair_port(worker: Worker) -> int:
    """The link's port in the worker's resource file."""
    import tomllib

    return tomllib.loads((worker.directory / "etc/disk0.toml").read_text())["link"]["port"]


def scatter(rng: random.Random, device: nbd.Nbd, model: bytearray | None, count: int) -> None:
    """Random writes, many in flight, and what they leave in the model."""
    started = []
    for _ in range(count):
        length = rng.choice((512, 4 * KiB, 64 * KiB, MiB))
        offset = rng.randrange((SIZE - length) // 512) * 512
        data = rng.randbytes(512) * (length // 512)
        device.finish(started)  # overlapping writes in flight have no order
        started = [device.start(nbd.WRITE, offset, length, data)]
        if model is not None:
            model[offset : offset + length] = data
    device.finish(started)


@requires("fio")
def test_ten_checkpoints_a_second_under_load_from_both_sides(place: Path) -> None:
    seconds = 60 if SOAK else 4
    with Pair(place, size=SIZE) as pair:
        pair.replicate()
        loads = [_fio(pair.alpha, seconds, "--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1")]
        loads.append(_fio(pair.beta, seconds))  # each checkpoint drops what it wrote: nothing to verify
        made, began = 0, time.monotonic()
        with Client.unix(pair.alpha.directory / "run/disk0.sock") as client:
            while any(load.poll() is None for load in loads):
                client.execute("checkpoint", timeout=qemu.PATIENCE_S)
                made += 1
                time.sleep(max(0, began + made / 10 - time.monotonic()))
        for load in loads:
            output, _ = load.communicate(timeout=qemu.PATIENCE_S)
            assert load.returncode == 0, output
        assert control(pair.beta, "query-status")["epoch"] == made + 1
        assert pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()
        control(pair.alpha, "checkpoint")
        with lun(pair.beta) as shown:
            assert whole(shown) == pair.alpha.disk.read_bytes()
        for worker in (pair.alpha, pair.beta):
            assert control(worker, "query-errors") == {"error": False}


def _fio(worker: Worker, seconds: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri={worker.uri}", "--rw=randwrite", "--bsrange=512-64k",
         "--iodepth=32", f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--randrepeat=0",
         "--verify_state_save=0", *more],
        cwd=worker.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_link_that_returns_too_late_is_refused_and_said(place: Path) -> None:
    with Pair(place, size=SIZE, link={"reconnect-delay": 0.2, "timeout": 10.0}) as pair:
        pair.replicate()
        with lun(pair.alpha) as primary:
            primary.write(0, b"\x11" * MiB)
            control(pair.alpha, "checkpoint")
            primary.write(0, b"\x22" * MiB)
            pair.beta.kill()
            primary.write(MiB, b"\x33" * MiB)  # lost on the way: acknowledged alone, and remembered
            pair.beta.start()
            qemu.until(
                lambda: control(pair.beta, "query-status")["outdated-since"],
                "the secondary hears that it is outdated",
            )
            primary.write(2 * MiB, b"\x44" * MiB)
        status = control(pair.alpha, "query-status")
        assert status["out-of-sync-bytes"] == 2 * MiB
        assert "not forwarded" in status["error"]
        with pytest.raises(Error, match="misses writes"):
            control(pair.alpha, "checkpoint")
        assert pair.beta.disk.read_bytes()[: 3 * MiB] == b"\x22" * MiB + bytes(2 * MiB)
        with lun(pair.beta) as shown:
            assert shown.read(0, 3 * MiB) == b"\x11" * MiB + bytes(2 * MiB)


def test_frozen_peer_delays_a_write_and_no_command(place: Path) -> None:
    with Pair(place, size=SIZE, link={"reconnect-delay": 0.5, "timeout": 8.0}) as pair:
        pair.replicate()
        pair.beta.pause()
        with lun(pair.alpha) as primary:
            stalled = primary.start(nbd.WRITE, 0, MiB, b"\x11" * MiB)
            status = control(pair.alpha, "query-status")
            assert (status["stage"], status["error"]) == ("running", None)
            qemu.until(lambda: control(pair.alpha, "query-status")["link"]["in-flight"] > 0, "the write")
            primary.finish([stalled])
            assert stalled.error == 0
            assert control(pair.alpha, "query-errors")["error"] is True
            control(pair.alpha, "stop-replication")
            assert control(pair.alpha, "query-status")["stage"] == "done"
            assert primary.read(0, MiB) == b"\x11" * MiB
        pair.beta.resume()


@pytest.mark.timeout(1800)
def test_commit_killed_at_random_moments_is_finished_by_the_next_process(
    place: Path, rng: random.Random
) -> None:
    worker = (lonely := Lonely(place)).worker
    worker.start()
    try:
        for _ in range(100 if SOAK else 20):
            control(worker, "start", discard_my_data=True)
            with lonely.forward() as forward, lun(worker) as own:
                scatter(rng, forward, None, 20)
                control(worker, "xen-colo-do-checkpoint")
                expected = bytearray(worker.disk.read_bytes())
                scatter(rng, forward, None, 20)
                scatter(rng, own, expected, 20)
                control(worker, "failover", to="checkpoint", force=True)
                time.sleep(rng.uniform(0, 0.05))
                worker.kill()
            worker.start()
            with lun(worker) as shown:
                assert whole(shown) == expected
            wait_for_stage(worker, "done")
            assert worker.disk.read_bytes() == expected
    finally:
        worker.stop()


@pytest.mark.timeout(1800)
def test_secondary_killed_at_random_moments_keeps_its_checkpoint(place: Path, rng: random.Random) -> None:
    worker = (lonely := Lonely(place)).worker
    worker.start()
    try:
        control(worker, "start")
        expected = bytearray(SIZE)
        for _ in range(50 if SOAK else 8):
            forward = lonely.forward()
            with lun(worker) as own:
                scatter(rng, own, expected, 8)
            flood = threading.Thread(target=_until_hung_up, args=(random.Random(rng.random()), forward))
            flood.start()
            time.sleep(rng.uniform(0, 0.1))
            worker.kill()
            flood.join()
            forward.close()
            worker.start()
            with lun(worker) as shown:
                assert whole(shown) == expected
            if rng.random() < 0.5:
                control(worker, "xen-colo-do-checkpoint")
                expected = bytearray(worker.disk.read_bytes())
    finally:
        worker.stop()


def _until_hung_up(rng: random.Random, device: nbd.Nbd) -> None:
    """Write at random places until the other side is gone."""
    try:
        while True:
            scatter(rng, device, None, 16)
    except OSError:
        pass


def test_late_writes_of_the_primary_do_not_reach_a_failed_over_secondary(place: Path) -> None:
    with Pair(place, size=SIZE, link={"reconnect-delay": 0.0, "timeout": 20.0}) as pair:
        pair.replicate()
        with lun(pair.alpha) as primary:
            for offset in range(0, SIZE, 16 * MiB):
                primary.write(offset, b"\x22" * 16 * MiB)
        control(pair.alpha, "checkpoint")
        done = threading.Event()
        flood = threading.Thread(target=_flood, args=(pair.alpha, done))
        flood.start()
        try:
            qemu.until(
                lambda: control(pair.beta, "query-status")["overlays"]["hidden-bytes"] > 4 * MiB, "the flood"
            )
            control(pair.beta, "failover", to="checkpoint", force=True)
            wait_for_stage(pair.beta, "done")
            qemu.until(lambda: control(pair.alpha, "query-errors")["error"], "the primary's error")
        finally:
            done.set()
            flood.join()
        assert pair.beta.disk.read_bytes() == b"\x22" * SIZE


def _flood(worker: Worker, done: threading.Event) -> None:
    """The primary's initiator, which knows nothing of a failover."""
    rng = random.Random(1)
    with lun(worker) as device:
        while not done.is_set():
            offset = rng.randrange(SIZE // (64 * KiB)) * 64 * KiB
            device.finish([device.start(nbd.WRITE, offset, 64 * KiB, b"\x33" * 64 * KiB)])


def test_start_that_fails_on_one_disk_of_several_leaves_that_one_untouched(tmp_path: Path) -> None:
    """Each disk is a resource of its own: what starts can be stopped, what does not start can be tried again."""

    async def nothing(*_: object) -> None:
        pass

    def site(name: str, top_id: str) -> Replica:
        (tmp_path / name).mkdir(exist_ok=True)
        disk = Memory(MiB)
        epochs = Epochs(tmp_path / name, disk)
        return secondary(
            name, disk, epochs, top_id=top_id, durable=True, publish=nothing, withdraw=nothing,
            roots=None if top_id == name else {},
        )  # fmt: skip

    async def story() -> None:
        first, second = site("disk0", "nobody"), site("disk1", "disk1")
        for engine in (first, second):
            await engine.open()
        with pytest.raises(Error, match=f"^{stages.BAD_TOP}$"):
            await first.start(Mode.SECONDARY)
        assert await second.start(Mode.SECONDARY)
        assert (first.stage, second.stage) == (Stage.NONE, Stage.RUNNING)
        assert list((tmp_path / "disk0").iterdir()) == []
        assert await second.stop()
        repaired = site("disk0", "disk0")
        await repaired.open()
        assert await repaired.start(Mode.SECONDARY)
        assert await second.start(Mode.SECONDARY, again=True)
        for engine in (first, repaired, second):
            await engine.close()

    asyncio.run(story())
