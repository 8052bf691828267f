"""The secondary's engine on real overlays: every command, its refusals, and process death between any two."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs import commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.replication import following, stages
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.assemble import secondary
from tcmu_replication.replication.epochs import Epochs, Pair
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB
from tests.support.tools import PATIENCE_S

LENGTH = 8 * MiB
OLD, FORWARDED, OWN = 0x11, 0x22, 0x33


class Disk(Memory):
    """A disk that can refuse writes."""

    failing = False

    def write(self, offset, buffers, fua=False):
        if self.failing:
            raise Error(Kind.IO, "the medium is broken")
        return super().write(offset, buffers, fua)


class Site:
    """A secondary in `directory`; `export` is what the primary would be connected to."""

    def __init__(self, directory, disk=None, *, durable=True, **options):
        self.directory = directory
        self.disk = disk or Disk(LENGTH)
        self.export = None
        self.epochs = Epochs(directory, self.disk)
        self.durable = durable
        self.options = {"top_id": "disk0"} | options
        self.engine = self.make()

    def make(self):
        return secondary(
            "disk0",
            self.disk,
            self.epochs,
            durable=self.durable,
            publish=self.publish,
            withdraw=self.withdraw,
            **self.options,
        )

    async def publish(self, node):
        self.export = node

    async def withdraw(self):
        self.export = None

    async def reopen(self):
        """What a new process finds after the old one was killed: no close was called."""
        if self.engine.receiver.pair is not None:
            self.engine.receiver.pair.close()
        if self.engine.receiver.next is not None:
            self.engine.receiver.next.close()
        self.export = None
        self.engine = self.make()
        await self.engine.open()

    async def forward(self, offset, length, byte=FORWARDED):
        pending = self.export.write(offset, [memoryview(bytes([byte]) * length)])
        self.export.unplug()
        await settle(pending)

    async def own(self, offset, length, byte=OWN):
        await settle(self.engine.top.write(offset, [memoryview(bytes([byte]) * length)]))

    async def top(self, offset, length=BLOCK):
        view = memoryview(bytearray(length))
        await settle(self.engine.top.read(offset, [view]))
        return set(bytes(view))

    def sec(self, offset, length=BLOCK):
        return set(self.disk.data[offset : offset + length])

    async def committed(self):
        await self.engine.role.ended()


def run(coroutine):
    return asyncio.run(coroutine)


@pytest.fixture(params=[True, False], ids=["durable", "buffered"])
def site(tmp_path, request):
    site = Site(tmp_path, durable=request.param)
    site.disk.data[:] = bytes([OLD]) * LENGTH
    return site


async def started(site):
    await site.engine.open()
    assert await site.engine.start(Mode.SECONDARY)
    return site


def test_before_start_requests_are_io_errors(site):
    async def story():
        await site.engine.open()
        with pytest.raises(Error) as refused:
            await site.top(0)
        assert refused.value.kind is Kind.IO
        with pytest.raises(Error):
            await site.own(0, BLOCK)
        with pytest.raises(Error, match=f"^{stages.NOT_RUNNING}$"):
            site.engine.get_error()
        with pytest.raises(Error, match=f"^{stages.BACKUP_GONE}$"):
            await site.engine.checkpoint()
        with pytest.raises(Error, match=f"^{stages.NOT_RUNNING}$"):
            await site.engine.failover(latest=False)

    run(story())


def test_running_shows_the_checkpoint_and_own_writes(site):
    async def story():
        await started(site)
        await site.forward(0, MiB)
        await site.own(4 * BLOCK, BLOCK)
        assert site.sec(0) == {FORWARDED}
        assert await site.top(0) == {OLD}
        assert await site.top(4 * BLOCK) == {OWN}
        assert site.sec(4 * BLOCK) == {FORWARDED}
        assert site.engine.overlay_bytes == (BLOCK, MiB)
        site.engine.get_error()

    run(story())


def test_checkpoint_shows_the_forwarded_and_drops_own_writes(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(BLOCK, BLOCK)
        assert await site.engine.checkpoint() >= 0
        assert site.engine.epoch == 2
        assert await site.top(0) == {FORWARDED}
        assert await site.top(BLOCK) == {OLD}
        assert site.engine.overlay_bytes == (0, 0)
        await site.forward(0, BLOCK, 0x44)
        assert await site.top(0) == {FORWARDED}
        await site.engine.close()
        left = sorted(p.name for p in site.directory.iterdir())
        assert left == sorted(
            [
                "manifest",
                *(f"epoch-00000002.{r}.{k}" for r in ("active", "hidden") for k in ("data", "map")),
                "spare.active.data",
                "spare.hidden.data",
            ]
        )

    run(story())


class Slow(Node):
    """A node whose only write ends when the test says so."""

    def __init__(self, length):
        super().__init__("slow", length)
        self.pending = Pending()

    def write(self, offset, buffers, fua=False):
        return self.pending


def test_requests_during_a_checkpoint_are_held_and_belong_to_the_next_epoch(site):
    async def story():
        await started(site)
        slow = site.engine.filter.writes = Slow(LENGTH)
        site.engine.top.write(0, [memoryview(bytes(BLOCK))])
        checkpoint = asyncio.create_task(site.engine.checkpoint())
        while not site.engine.top.held:
            await asyncio.sleep(0)
        forwarded = site.export.write(0, [memoryview(bytes([FORWARDED]) * BLOCK)])
        own = site.engine.top.write(BLOCK, [memoryview(bytes([OWN]) * BLOCK)])
        assert site.sec(0) == {OLD}
        assert not checkpoint.done()
        slow.pending.complete()
        await checkpoint
        site.export.unplug()
        await settle(forwarded)
        await settle(own)
        assert site.sec(0) == {FORWARDED}
        assert await site.top(0) == {OLD}
        assert await site.top(BLOCK) == {OWN}

    run(story())


def test_checkpoint_that_takes_too_long_is_given_up_and_requests_go_on(site, monkeypatch):
    monkeypatch.setattr(following, "HOLD_S", 0.01)

    async def story():
        await started(site)
        slow = site.engine.filter.writes = Slow(LENGTH)
        under_way = site.engine.top.write(0, [memoryview(bytes(BLOCK))])
        checkpoint = asyncio.create_task(site.engine.checkpoint())
        while not site.engine.top.held:
            await asyncio.sleep(0)
        await settle(site.export.write(0, [memoryview(bytes([FORWARDED]) * BLOCK)]))
        assert not site.engine.top.held
        slow.pending.complete()
        await settle(under_way)
        with pytest.raises(Error, match="took too long") as late:
            await checkpoint
        assert late.value.kind is Kind.TIMED_OUT
        assert site.engine.epoch == 1
        assert site.sec(0) == {FORWARDED}

    run(story())


def test_failover_to_the_checkpoint_undoes_the_forwarded(site):
    async def story():
        await started(site)
        await site.forward(0, 2 * MiB)
        await site.own(MiB, 2 * MiB)
        assert await site.engine.failover(latest=False)
        assert site.engine.stage is Stage.FAILOVER
        assert site.export is None
        assert await site.top(0) == {OLD}
        await site.own(6 * MiB, BLOCK)
        await site.committed()
        assert site.engine.stage is Stage.DONE
        assert site.engine.job.status.value == "concluded"
        assert site.sec(0, MiB) == {OLD}
        assert site.sec(MiB, 2 * MiB) == {OWN}
        assert site.sec(3 * MiB, 3 * MiB) == {OLD}
        assert site.sec(6 * MiB) == {OWN}
        site.engine.get_error()
        await site.own(7 * MiB, BLOCK)
        assert site.sec(7 * MiB) == {OWN}

    run(story())


def test_failover_to_the_latest_keeps_the_forwarded(site):
    async def story():
        await started(site)
        await site.forward(0, MiB)
        await site.own(2 * MiB, MiB)
        assert await site.engine.failover(latest=True)
        assert site.engine.stage is Stage.DONE
        assert await site.top(0, MiB) == {FORWARDED}
        assert await site.top(2 * MiB) == {OLD}

    run(story())


def test_stop_makes_a_last_checkpoint(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(BLOCK, BLOCK)
        assert await site.engine.stop()
        assert site.engine.stage is Stage.DONE
        assert await site.top(0) == {FORWARDED}
        assert await site.top(BLOCK) == {OLD}
        await site.engine.close()
        assert [p.name for p in site.directory.iterdir()] == ["manifest"]

    run(story())


def test_everything_is_ignored_after_promotion(site):
    async def story():
        await started(site)
        await site.engine.failover(latest=True)
        assert await site.engine.start(Mode.PRIMARY) is False
        assert await site.engine.checkpoint() is None
        assert await site.engine.failover(latest=False) is False
        assert await site.engine.stop() is False
        site.engine.get_error()

    run(story())


def test_start_anew_after_promotion_begins_a_new_pairing(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.stop()
        first = site.engine.manifest.generation
        assert await site.engine.start(Mode.SECONDARY, again=True)
        assert site.engine.manifest.generation != first
        await site.forward(0, BLOCK, 0x44)
        assert await site.top(0) == {FORWARDED}

    run(story())


def test_start_anew_waits_until_the_overlays_of_before_are_gone(site, monkeypatch):
    """They are removed behind, by name, and the new pair has the same names."""
    removed, may_remove = Pair.destroy, threading.Event()

    def late(pair):
        assert may_remove.wait(PATIENCE_S)
        removed(pair)

    async def story():
        await started(site)
        monkeypatch.setattr(Pair, "destroy", late)
        await site.engine.stop()
        again = asyncio.create_task(site.engine.start(Mode.SECONDARY, again=True))
        for _ in range(100):
            await asyncio.sleep(0)
        may_remove.set()
        assert await again
        await site.forward(0, BLOCK)
        await site.reopen()
        assert await site.top(0) == {OLD}

    run(story())


def test_start_with_the_wrong_mode_leaves_nothing(site):
    async def story():
        await site.engine.open()
        with pytest.raises(Error, match="needs 1, but got 0"):
            await site.engine.start(Mode.PRIMARY)
        assert list(site.directory.iterdir()) == []
        assert await site.engine.start(Mode.SECONDARY)
        with pytest.raises(Error, match=f"^{stages.RUNNING_OR_DONE}$"):
            await site.engine.start(Mode.SECONDARY)

    run(story())


class Leaf(Node):
    """An overlay without a backing, or of another length, or that cannot be emptied."""

    def __init__(self, length, child=None):
        super().__init__("odd", length, child)

    def destroy(self):
        pass

    close = release = destroy


def odd_pairs(disk, real):
    """(the pair that start would get, the error) in QEMU's order of checks; each also fails the later checks."""
    other = Memory(LENGTH)
    yield Pair(Leaf(1), Leaf(2)), stages.NO_ACTIVE_BACKING
    yield Pair(Leaf(1), Leaf(2, real.hidden)), stages.NO_HIDDEN_BACKING
    yield Pair(Leaf(1, other), Leaf(2, real.hidden)), stages.NO_DISK_BACKEND
    yield Pair(Leaf(1, disk), Leaf(2, real.hidden)), stages.LENGTHS_DIFFER
    yield Pair(Leaf(LENGTH, disk), Leaf(LENGTH, real.hidden)), stages.NO_MAKE_EMPTY
    yield real, stages.BAD_TOP


def test_start_checks_the_chain_in_qemus_order(tmp_path):
    async def story():
        directory = tmp_path / "real"
        directory.mkdir()
        site = Site(tmp_path, top_id="nobody", roots={})
        real = Epochs(directory, site.disk).create(1)
        await site.engine.open()
        for pair, text in list(odd_pairs(site.disk, real)):
            site.epochs.create = lambda epoch, pair=pair: pair
            with pytest.raises(Error) as refused:
                await site.engine.start(Mode.SECONDARY)
            assert str(refused.value) == text
            assert site.engine.stage is Stage.NONE
            assert manifests.load(tmp_path) is None

    run(story())


@pytest.mark.parametrize("roots", ["elsewhere", "nothing"])
def test_start_with_a_top_that_is_no_root_above_the_filter(tmp_path, roots):
    async def story():
        site = Site(tmp_path, roots={} if roots == "nothing" else {"disk0": Memory(LENGTH)})
        await site.engine.open()
        for _ in range(2):
            with pytest.raises(Error, match=f"^{stages.BAD_TOP}$"):
                await site.engine.start(Mode.SECONDARY)
            assert list(tmp_path.iterdir()) == []

    run(story())


def test_checkpoint_that_cannot_make_overlays_keeps_the_epoch(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)

        def full(epoch):
            raise Error(Kind.NO_SPACE, "no space left")

        make, site.epochs.create = site.epochs.create, full
        with pytest.raises(Error, match=r"^Failed to empty active or hidden: no space left$"):
            await site.engine.checkpoint()
        assert site.engine.stage is Stage.RUNNING
        assert site.engine.epoch == 1
        assert await site.top(0) == {OLD}
        site.epochs.create = make
        await site.engine.checkpoint()
        assert await site.top(0) == {FORWARDED}

    run(story())


def test_checkpoint_whose_manifest_cannot_be_written_keeps_the_epoch(site, monkeypatch):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)

        def full(directory, manifest, before):
            raise Error(Kind.NO_SPACE, "no space left")

        monkeypatch.setattr(manifests, "save", full)
        with pytest.raises(Error, match="no space left"):
            await site.engine.checkpoint()
        monkeypatch.undo()
        assert site.engine.epoch == 1
        assert await site.top(0) == {OLD}
        await site.forward(BLOCK, BLOCK)
        assert await site.top(BLOCK) == {OLD}
        await site.engine.checkpoint()
        assert site.engine.epoch == 2

    run(story())


@pytest.mark.parametrize("role", ["active", "hidden"])
def test_checkpoint_after_an_overlay_was_ejected(site, role):
    async def story():
        await started(site)
        getattr(site.engine.receiver.pair, role).release()
        text = {"active": "Active disk active is ejected", "hidden": "Hidden disk hidden is ejected"}[role]
        with pytest.raises(Error, match=f"^{text}$"):
            await site.engine.checkpoint()
        assert site.engine.stage is Stage.RUNNING

    run(story())


def test_backup_ended_unexpectedly_stops_forwarding_and_is_recorded(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.backup_ended("the backup job was cancelled")
        assert site.export is None
        assert await site.top(0) == {OLD}
        with pytest.raises(Error, match=f"^{stages.IO_ERROR}$"):
            site.engine.get_error()
        with pytest.raises(Error, match=f"^{stages.BACKUP_GONE}$"):
            await site.engine.checkpoint()
        assert await site.engine.failover(latest=False)
        await site.committed()
        assert site.sec(0) == {OLD}

    run(story())


def test_commit_that_fails_leaves_the_lun_right_and_splits_writes(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(2 * BLOCK, BLOCK)
        site.disk.failing = True
        await site.engine.failover(latest=False)
        await site.committed()
        assert site.engine.stage is Stage.FAILOVER_FAILED
        assert "the medium is broken" in site.engine.machine.error
        with pytest.raises(Error, match=f"^{stages.IO_ERROR}$"):
            site.engine.get_error()
        assert await site.top(0) == {OLD}
        assert await site.top(2 * BLOCK) == {OWN}
        await site.own(0, BLOCK, 0x55)
        assert site.sec(0) == {FORWARDED}
        assert await site.top(0) == {0x55}
        site.disk.failing = False
        await site.own(4 * BLOCK, BLOCK, 0x66)
        assert site.sec(4 * BLOCK) == {0x66}
        for operation in (site.engine.start(Mode.SECONDARY), site.engine.checkpoint(), site.engine.stop()):
            with pytest.raises(Error):
                await operation
        await site.reopen()
        assert site.engine.stage is Stage.FAILOVER
        await site.committed()
        assert site.engine.stage is Stage.DONE
        assert [site.sec(n * BLOCK) for n in (0, 1, 2, 4)] == [{0x55}, {OLD}, {OWN}, {0x66}]

    run(story())


def test_split_write_across_held_and_free_blocks(site):
    async def story():
        await started(site)
        await site.forward(BLOCK, BLOCK)
        site.disk.failing = True
        await site.engine.failover(latest=False)
        await site.committed()
        site.disk.failing = False
        await site.own(512, 3 * BLOCK, 0x77)
        assert await site.top(512, 3 * BLOCK) == {0x77}
        assert await site.top(0, 512) == {OLD}
        assert site.sec(BLOCK) == {FORWARDED}
        assert site.sec(2 * BLOCK) == {0x77}

    run(story())


def test_killed_while_running_goes_on(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(BLOCK, BLOCK)
        generation = site.engine.manifest.generation
        await site.reopen()
        assert site.engine.stage is Stage.RUNNING
        assert site.engine.manifest.generation == generation
        assert await site.top(0) == {OLD}
        assert await site.top(BLOCK) == {OWN}
        await site.forward(2 * BLOCK, BLOCK)
        assert await site.top(2 * BLOCK) == {OLD}
        site.engine.get_error()

    run(story())


def test_killed_between_the_new_overlays_and_the_manifest_keeps_the_old_epoch(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.prepare_checkpoint(1)
        assert len(list(site.directory.glob("epoch-00000002.*"))) == 4
        await site.reopen()
        assert site.engine.epoch == 1
        assert await site.top(0) == {OLD}
        assert not list(site.directory.glob("epoch-00000002.*"))

    run(story())


def test_killed_after_the_manifest_has_the_new_epoch(site, monkeypatch):
    class Killed(BaseException):
        pass

    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(BLOCK, BLOCK)
        engine = site.engine
        await engine.prepare_checkpoint(1)
        new, engine.receiver.next = engine.receiver.next, None
        engine.record.save(epoch=2)
        new.close()
        await site.reopen()
        assert site.engine.epoch == 2
        assert await site.top(0) == {FORWARDED}
        assert await site.top(BLOCK) == {OLD}

    run(story())


def test_killed_during_the_commit_goes_on_with_it(site, monkeypatch):
    monkeypatch.setattr(commit, "WINDOW", MiB)

    async def story():
        await started(site)
        await site.forward(0, 4 * MiB)
        await site.own(2 * MiB, 4 * MiB)
        await site.engine.failover(latest=False)
        for _ in range(3):
            await asyncio.sleep(0)
        await site.engine.role.leave()
        await site.reopen()
        assert site.engine.stage is Stage.FAILOVER
        assert await site.top(0, 2 * MiB) == {OLD}
        assert await site.top(2 * MiB, 4 * MiB) == {OWN}
        await site.committed()
        assert site.sec(0, 2 * MiB) == {OLD}
        assert site.sec(2 * MiB, 4 * MiB) == {OWN}

    run(story())


def test_closed_and_opened_again_goes_on(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.close()
        assert manifests.load(site.directory).clean
        site.engine = site.make()
        await site.engine.open()
        assert not manifests.load(site.directory).clean
        assert await site.top(0) == {OLD}

    run(story())


def test_power_loss_is_recorded_and_the_checkpoint_is_shown(tmp_path, monkeypatch):
    async def story():
        site = Site(tmp_path)
        await started(site)
        await site.forward(0, BLOCK)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        assert await site.top(0) == {0}
        with pytest.raises(Error, match=f"^{stages.IO_ERROR}$"):
            site.engine.get_error()

    run(story())


def test_power_loss_without_durable_refuses_to_open(tmp_path, monkeypatch):
    async def story():
        site = Site(tmp_path, durable=False)
        await started(site)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        for _ in range(2):
            with pytest.raises(Error, match="durable = false"):
                await site.reopen()
            await site.engine.close()
            assert not manifests.load(site.directory).clean

    run(story())


class SlowDisk(Disk):
    """A disk whose flush ends when the test says so."""

    syncing = None

    def flush(self):
        if self.syncing is None:
            return None
        self.syncing.append(Pending())
        return self.syncing[-1]


async def failed_over_unflushed(tmp_path):
    """After a failover to the checkpoint with durable = false, whose commit still makes that stable."""
    site = Site(tmp_path, SlowDisk(LENGTH), durable=False)
    site.disk.data[:] = bytes([OLD]) * LENGTH
    await started(site)
    await site.forward(0, MiB)
    site.disk.syncing = []
    assert await site.engine.failover(latest=False)
    async with asyncio.timeout(30):
        while not site.disk.syncing:
            await asyncio.sleep(0.001)
    return site


async def killed(site):
    await site.engine.role.leave()
    site.disk.syncing = None


def test_power_loss_before_the_checkpoint_is_stable_refuses_to_open(tmp_path, monkeypatch):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        await site.own(0, BLOCK)
        assert site.engine.job.status is JobStatus.RUNNING
        assert site.sec(0, MiB) == {FORWARDED}, "nothing is copied before"
        await killed(site)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        for _ in range(2):
            with pytest.raises(Error, match=r"durable = false.*copied nothing.*start again"):
                await site.reopen()
            await site.engine.close()
        assert site.sec(0, MiB) == {FORWARDED}

    run(story())


def test_process_death_before_the_checkpoint_is_stable_goes_on(tmp_path):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        await site.own(0, BLOCK)
        await killed(site)
        await site.reopen()
        await site.committed()
        assert site.engine.stage is Stage.DONE
        assert site.sec(0) == {OWN}
        assert site.sec(BLOCK, MiB - BLOCK) == {OLD}

    run(story())


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "closed"])
def test_power_loss_during_the_commit_goes_on_with_it(site, monkeypatch, stopped):
    async def story():
        monkeypatch.setattr(commit.Commit, "run", lambda self: asyncio.Event().wait())
        await started(site)
        await site.forward(0, MiB)
        assert await site.engine.failover(latest=False)
        async with asyncio.timeout(30):
            while not manifests.load(site.directory).whole:
                await asyncio.sleep(0.001)
        await site.own(0, BLOCK)
        await site.own(BLOCK, BLOCK, OWN + 1)
        await settle(site.engine.top.flush())
        await site.own(BLOCK, BLOCK, OWN)
        if stopped:
            await site.engine.close()
        else:
            await killed(site)
        for name in ("another boot", "and another"):
            monkeypatch.setattr(boot, "boot_id", lambda name=name: name)
            await site.reopen()
            assert site.engine.stage is Stage.FAILOVER
            assert site.engine.machine.error is None
            assert not manifests.load(site.directory).clean
            assert await site.top(0) == {OWN}
            assert await site.top(2 * BLOCK, MiB - 2 * BLOCK) == {OLD}
            await killed(site)
        monkeypatch.undo()
        await site.reopen()
        await site.committed()
        assert site.sec(0) == {OWN}
        assert site.sec(2 * BLOCK, MiB - 2 * BLOCK) == {OLD}

    run(story())


def test_slot_that_the_commit_forgot_is_taken_anew_only_once_that_is_stable(site, monkeypatch):
    stable = {}

    def fdatasync(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        stable[path] = path.read_bytes()

    async def story():
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        monkeypatch.setattr(commit.Commit, "run", lambda self: asyncio.Event().wait())
        await started(site)
        await site.forward(2 * BLOCK, BLOCK)
        await site.own(0, BLOCK)
        await settle(site.engine.top.flush())
        assert await site.engine.failover(latest=False)
        async with asyncio.timeout(30):
            while not manifests.load(site.directory).whole:
                await asyncio.sleep(0.001)
        site.disk.data[:BLOCK] = bytes([OWN]) * BLOCK  # as the commit does, but for the end of it
        site.engine.receiver.pair.active.forget(0, BLOCK)
        await killed(site)
        await site.reopen()
        await site.own(2 * BLOCK, BLOCK, OWN + 1)
        await killed(site)
        site.engine.receiver.pair.close()
        active = Path(f"{site.engine.receiver.pair.active.path}.map")
        active.write_bytes(stable[active])
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        assert await site.top(0) == {OWN}
        await killed(site)

    run(story())


def test_marks_that_were_forgotten_are_stably_so_after_an_open(site, monkeypatch):
    stable = {}

    def fdatasync(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        stable[path] = path.read_bytes()

    async def story():
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        await started(site)
        await site.forward(0, BLOCK)
        await site.own(BLOCK, BLOCK)
        for overlay in site.engine.receiver.pair:
            await settle(overlay.flush())
            overlay.forget(0, 2 * BLOCK)  # as after marks that could not be synced
        site.engine.receiver.pair.close()  # what the death of the process does
        await site.reopen()
        for overlay in site.engine.receiver.pair:
            path = Path(f"{overlay.path}.map")
            assert stable[path] == path.read_bytes(), overlay.name
        await site.engine.close()

    run(story())


def test_failover_of_durable_pre_images_says_so_at_once(tmp_path, monkeypatch):
    async def story():
        site = Site(tmp_path)
        await started(site)
        assert await site.engine.failover(latest=False)
        assert manifests.load(site.directory).whole
        await killed(site)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        await site.committed()
        assert site.engine.stage is Stage.DONE

    run(story())


def test_closed_before_the_checkpoint_is_stable_goes_on_after_boots(tmp_path, monkeypatch):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        site.disk.syncing, pending = None, site.disk.syncing
        await site.engine.close()
        assert manifests.load(site.directory).clean
        assert not manifests.load(site.directory).whole
        pending[0].complete()
        site.disk.syncing = []
        for name in ("another boot", "and another"):
            monkeypatch.setattr(boot, "boot_id", lambda name=name: name)
            await site.reopen()
            await site.engine.role.leave()
        site.disk.syncing = None
        await site.reopen()
        await site.committed()
        assert site.sec(0, MiB) == {OLD}

    run(story())


def test_commit_that_cannot_make_the_checkpoint_stable_fails_and_copies_nothing(tmp_path):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        site.disk.syncing[0].complete(Error(Kind.IO, "the medium is broken"))
        await site.committed()
        assert site.engine.stage is Stage.FAILOVER_FAILED
        assert site.engine.job.status is JobStatus.FAILED
        assert "the medium is broken" in site.engine.job.error
        assert not manifests.load(site.directory).whole
        assert site.sec(0, MiB) == {FORWARDED}
        assert await site.top(0, MiB) == {OLD}
        await killed(site)
        await site.reopen()
        await site.committed()
        assert site.sec(0, MiB) == {OLD}

    run(story())


class ColdDisk(SlowDisk):
    """And whose reads end when the test says so."""

    reading = None

    def read(self, offset, buffers):
        if self.reading is None:
            return super().read(offset, buffers)
        self.reading.append((Pending(), offset, buffers))
        return self.reading[-1][0]

    def arrived(self):
        reading, self.reading = self.reading, None
        for pending, offset, buffers in reading:
            self.read(offset, buffers)
            pending.complete()


def test_request_under_way_when_the_commit_ends_still_has_the_overlays(tmp_path):
    async def story():
        site = Site(tmp_path, ColdDisk(LENGTH))
        site.disk.data[:] = bytes([OLD]) * LENGTH
        await started(site)
        await site.own(BLOCK, BLOCK)
        site.disk.syncing = []
        assert await site.engine.failover(latest=False)
        async with asyncio.timeout(30):
            while not site.disk.syncing:
                await asyncio.sleep(0.001)
        assert site.engine.top.held
        site.disk.reading, pair = [], site.engine.receiver.pair
        reads = [asyncio.create_task(site.top(block * BLOCK)) for block in (0, 1)]
        await asyncio.sleep(0)
        syncing, site.disk.syncing = site.disk.syncing, None
        syncing[0].complete()
        async with asyncio.timeout(30):
            while len(site.disk.reading) < len(reads):
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not pair.active.ejected
        site.disk.arrived()
        async with asyncio.timeout(30):
            assert await asyncio.gather(*reads) == [{OLD}, {OWN}]
            await site.committed()
            await site.engine.receiver.swept()
        assert pair.active.ejected
        assert site.engine.stage is Stage.DONE

    run(story())


def test_commit_that_is_cancelled_when_all_is_copied_is_taken_up_again(tmp_path):
    async def story():
        site = Site(tmp_path, ColdDisk(LENGTH))
        await started(site)
        assert await site.engine.failover(latest=False)
        site.disk.reading = []
        read = asyncio.create_task(site.top(0))
        async with asyncio.timeout(30):
            while not site.engine.top.held:
                await asyncio.sleep(0.001)
        await site.engine.cancel_commit()
        assert site.engine.stage is Stage.FAILOVER_FAILED
        site.disk.arrived()
        assert await read == {0}
        await site.own(0, BLOCK)
        assert site.sec(0) == {OWN}
        await site.reopen()
        await site.committed()
        assert site.engine.stage is Stage.DONE
        assert await site.top(0) == {OWN}

    run(story())


def test_failover_itself_does_not_wait_for_the_disk(tmp_path):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        assert site.engine.stage is Stage.FAILOVER
        assert len(site.disk.syncing) == 1, "it is the commit's"
        await killed(site)

    run(story())


def test_open_in_another_resources_directory_is_refused(tmp_path):
    async def story():
        site = Site(tmp_path)
        await started(site)
        other = Site(tmp_path, Disk(LENGTH // 2))
        with pytest.raises(Error, match="an overlay directory of its own"):
            await other.engine.open()
        assert os.path.exists(tmp_path / "epoch-00000001.hidden.map")

    run(story())


def test_hidden_overlay_full_fails_the_forwarded_write_and_keeps_the_checkpoint(tmp_path):
    async def story():
        site = Site(tmp_path)
        site.disk.data[:] = bytes([OLD]) * LENGTH
        site.epochs = Epochs(tmp_path, site.disk, limit=2 * BLOCK)
        site.engine = site.make()
        await started(site)
        await site.forward(0, 2 * BLOCK)
        with pytest.raises(Error) as refused:
            await site.forward(2 * BLOCK, BLOCK)
        assert refused.value.kind is Kind.NO_SPACE
        assert "a forwarded write failed" in site.engine.machine.error
        assert site.sec(2 * BLOCK) == {OLD}
        assert await site.top(0, 3 * BLOCK) == {OLD}
        await site.forward(0, BLOCK, 0x44)
        await site.engine.checkpoint()
        assert await site.top(0) == {0x44}

    run(story())


def test_commit_that_is_cancelled_leaves_the_lun_right_and_is_taken_up_again(tmp_path):
    told = []
    site = Site(tmp_path, stage_changed=lambda: told.append(site.engine.stage))
    site.disk.data[:] = bytes([OLD]) * LENGTH

    async def story():
        await started(site)
        with pytest.raises(Error, match="no commit of disk0 is under way"):
            await site.engine.cancel_commit()
        await site.forward(0, BLOCK)
        await site.own(2 * BLOCK, BLOCK)
        assert await site.engine.failover(latest=False)
        await site.engine.cancel_commit()
        assert site.engine.stage is Stage.FAILOVER_FAILED
        assert site.engine.job.status is JobStatus.CANCELLED
        assert "cancelled" in site.engine.machine.error
        assert await site.top(0) == {OLD}
        assert await site.top(2 * BLOCK) == {OWN}
        await site.reopen()
        await site.committed()
        assert site.engine.stage is Stage.DONE
        assert site.sec(0) == {OLD}
        assert site.sec(2 * BLOCK) == {OWN}

    run(story())
    assert told == [Stage.FAILOVER_FAILED, Stage.DONE]


def test_end_of_a_commit_and_of_the_backup_are_told(tmp_path):
    told = []
    site = Site(tmp_path, stage_changed=lambda: told.append((site.engine.stage, site.engine.machine.error)))

    async def story():
        await started(site)
        assert site.engine.forwarded is site.export
        await site.engine.backup_ended("gone")
        assert site.engine.forwarded is None
        site.disk.failing = True
        await site.own(0, BLOCK)
        await site.engine.failover(latest=False)
        await site.committed()

    run(story())
    assert [stage for stage, _ in told] == [Stage.RUNNING, Stage.FAILOVER_FAILED]
    assert told[0][1] == "gone"


def test_open_that_misses_an_overlay_removes_nothing(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.prepare_checkpoint(1)
        site.engine.record.save(epoch=3)
        with pytest.raises(Error):
            await site.reopen()
        assert len(list(site.directory.glob("epoch-00000001.*"))) == 4
        assert len(list(site.directory.glob("epoch-00000002.*"))) == 4

    run(story())


def test_start_anew_that_fails_leaves_the_lun_serving_its_disk(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        await site.engine.stop()
        make = site.epochs.create

        def full(epoch):
            raise Error(Kind.NO_SPACE, "no space left")

        site.epochs.create = full
        with pytest.raises(Error, match="no space left"):
            await site.engine.start(Mode.SECONDARY, again=True)
        assert site.engine.stage is Stage.DONE
        assert await site.top(0) == {FORWARDED}
        await site.own(BLOCK, BLOCK)
        site.epochs.create = make
        assert await site.engine.start(Mode.SECONDARY, again=True, discard=True)

    run(story())


def test_command_after_the_close_is_refused_and_changes_nothing(site):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        async with site.engine.between_commands():  # as a command: these come one after the other behind it
            closing = asyncio.create_task(site.engine.close())
            await asyncio.sleep(0)
            commands = [
                asyncio.create_task(command)
                for command in (
                    site.engine.failover(latest=False),
                    site.engine.checkpoint(),
                    site.engine.start(Mode.SECONDARY),
                    site.engine.stop(),
                )
            ]
            await asyncio.sleep(0)
        await closing
        for command in commands:
            with pytest.raises(Error, match="shutting down; the command was not carried out") as refused:
                await command
            assert refused.value.kind is Kind.CANCELLED
        await site.reopen()
        assert site.engine.stage is Stage.RUNNING
        assert await site.top(0) == {OLD}

    run(story())


@pytest.mark.parametrize("after_the_manifest", [False, True])
def test_checkpoint_that_fails_keeps_the_pair_that_the_manifest_names_and_no_other(
    site, monkeypatch, after_the_manifest
):
    async def story():
        await started(site)
        await site.forward(0, BLOCK)
        with monkeypatch.context() as patch:
            if after_the_manifest:
                patch.setattr(site.engine.receiver.backup, "retarget", broken)
            else:
                patch.setattr(site.engine.record, "save", broken)
            with pytest.raises(Error, match="on cue"):
                await site.engine.checkpoint()
        named = 2 if after_the_manifest else 1
        assert {path.name for path in site.directory.glob("epoch-*")} >= {
            f"epoch-{named:08d}.{role}.{kind}" for role in ("active", "hidden") for kind in ("data", "map")
        }
        assert bool(list(site.directory.glob("epoch-00000002*"))) == after_the_manifest
        await site.reopen()
        assert site.engine.epoch == named
        assert await site.top(0) == ({FORWARDED} if after_the_manifest else {OLD})

    def broken(*_args, **_changes):
        raise Error(Kind.IO, "fails on cue")

    run(story())


def test_command_that_meets_a_defect_is_told_to_the_loop(tmp_path):
    """A3: it may have done half of what it does, so the worker has to end."""
    site = Site(tmp_path)
    seen = []

    async def publish(node):
        raise KeyError("nobody foresaw this")

    async def play():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
        await site.engine.open()
        site.publish = publish
        site.engine = site.make()
        await site.engine.open()
        with pytest.raises(KeyError):
            await site.engine.start(Mode.SECONDARY)

    run(play())
    assert [type(found) for found in seen] == [KeyError]


def test_failover_before_the_disks_were_compared_is_refused_either_way(site):
    """D6: the first checkpoint is the secondary's disk, which the primary's may never have been."""

    async def story():
        await started(site)
        await site.engine.hear(site.engine.manifest.generation, News(verified=False))
        for latest in (True, False):
            with pytest.raises(Error, match="were not found to be equal yet"):
                await site.engine.failover(latest=latest, fenced=True)
        await site.engine.hear(site.engine.manifest.generation, News(verified=True))
        assert await site.engine.failover(latest=False, fenced=True)
        await site.committed()
        await site.engine.close()

    run(story())
