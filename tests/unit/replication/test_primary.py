"""The primary's engine against a real NBD server: forwarding, gaps, checkpoints, restarts, detach."""

import asyncio
import os

import msgspec
import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd.uri import Unix
from tcmu_replication.replication import forwarding, stages
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.assemble import primary
from tcmu_replication.replication.peer_state import PeerState
from tcmu_replication.replication.pulse import Pulse
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB
from tests.support.tools import PATIENCE_S

LENGTH = 4 * MiB


class Disk(Memory):
    """A disk that fails the operations named in `failing`."""

    def __init__(self, length, **options):
        super().__init__(length, **options)
        self.failing = set()

    def _check(self, operation):
        if operation in self.failing:
            raise Error(Kind.IO, f"{operation} failed")

    def read(self, offset, buffers):
        self._check("read")
        return super().read(offset, buffers)

    def write(self, offset, buffers, fua=False):
        self._check("write")
        return super().write(offset, buffers, fua)


class Site:
    """A primary in `directory`, and a secondary that is an NBD server and a few words."""

    def __init__(self, directory, *, reconnect_delay=0.0, detach=False):
        self.directory = directory
        self.socket = str(directory / "peer.sock")
        self.state = directory / "state"
        self.state.mkdir()
        self.disk = Disk(LENGTH, name="disk")
        self.theirs = Disk(LENGTH, name="theirs")
        self.reconnect_delay = reconnect_delay
        self.detach = detach
        self.peer = PeerState(Stage.RUNNING, 1, "generation-1", LENGTH, None)
        self.calls = []
        self.news = None
        self.server = None
        self.engine = self.make()

    def make(self):
        return primary("disk0", self.disk, self.connect, self, self.state, detach=self.detach)

    def connect(self, verify):
        return Remote(
            "remote",
            Unix(self.socket),
            "disk0",
            length=LENGTH,
            reconnect_delay=self.reconnect_delay,
            timeout=20.0,
            verify=verify,
        )

    async def hello(self, news, *, settled=False):
        self.calls.append("hello")
        self.news = news
        return self.peer

    async def prepare(self, epoch):
        self.calls.append(f"prepare {epoch}")

    async def checkpoint(self, epoch, name):
        self.calls.append(f"checkpoint {epoch}")
        self.peer = self.peer._replace(epoch=epoch + 1)
        return self.peer

    async def serve(self):
        self.server = Server([Export("disk0", self.theirs)])
        await self.server.listen_unix(self.socket)

    async def vanish(self):
        await self.server.close()

    async def write(self, offset, byte, length=BLOCK):
        pending = self.engine.top.write(offset, [memoryview(bytes([byte]) * length)])
        self.engine.top.unplug()
        await settle(pending)

    async def reopen(self):
        """What a new process finds after the old one was killed."""
        self.engine.remote.close()
        await self.engine.remote.wait_closed()
        self.engine.missed.close()
        self.engine = self.make()
        await self.engine.open()

    def byte(self, offset):
        """The byte at `offset` on both disks."""
        return self.disk.data[offset], self.theirs.data[offset]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def run(site, story):
    async def whole():
        await site.serve()
        await site.engine.open()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story()
        finally:
            await site.engine.close()
            await site.server.close()

    asyncio.run(whole())


def test_before_start_the_lun_serves_the_disk_alone(site):
    async def story():
        await site.write(0, 1)
        assert site.byte(0) == (1, 0)
        with pytest.raises(Error, match=f"^{stages.NOT_RUNNING}$"):
            site.engine.get_error()
        assert await site.engine.checkpoint() is None

    run(site, story)


def test_running_forwards_writes_zeroes_and_discards(site):
    async def story():
        assert await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1, MiB)
        assert site.byte(MiB - 1) == (1, 1)
        pending = site.engine.top.zero(0, BLOCK)
        site.engine.top.unplug()
        await settle(pending)
        assert site.byte(0) == (0, 0)
        pending = site.engine.top.discard(BLOCK, BLOCK)
        site.engine.top.unplug()
        await settle(pending)
        assert site.byte(BLOCK) == (0, 0)
        site.engine.get_error()

    run(site, story)


def test_the_filter_is_not_read_from(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        with pytest.raises(Error) as refused:
            site.engine.filter.read(0, [memoryview(bytearray(BLOCK))])
        assert refused.value.kind is Kind.IO

    run(site, story)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stage": Stage.NONE}, "start it first"),
        ({"length": LENGTH * 2}, "they must be equal"),
        ({"error": "something"}, "has an error: something"),
    ],
)
def test_start_with_a_secondary_that_is_not_ready(site, change, text):
    async def story():
        site.peer = site.peer._replace(**change)
        with pytest.raises(Error, match=text):
            await site.engine.start(Mode.PRIMARY)
        assert site.engine.stage is Stage.NONE
        assert manifests.load(site.state) is None
        await site.write(0, 1)
        assert site.byte(0) == (1, 0)

    run(site, story)


def test_start_refuses_disks_that_differ_until_told_to(site):
    async def story():
        site.theirs.data[100] = 1
        with pytest.raises(Error) as refused:
            await site.engine.start(Mode.PRIMARY)
        assert refused.value.kind is Kind.MISCOMPARE
        assert "--sync-from" in str(refused.value)
        assert site.engine.stage is Stage.NONE
        assert await site.engine.start(Mode.PRIMARY, again=True, assume_clean=True)

    run(site, story)


def test_checkpoint_prepares_holds_and_moves_the_epoch(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        assert await site.engine.checkpoint() >= 0
        assert site.calls[-3:] == ["hello", "prepare 1", "checkpoint 1"]
        assert site.engine.epoch == 2
        assert manifests.load(site.state).epoch == 2
        assert not site.engine.top.held

    run(site, story)


def test_writes_during_a_checkpoint_come_after_it(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        late = []

        async def checkpoint(epoch, name):
            late.append(site.engine.top.write(0, [memoryview(b"\7" * BLOCK)]))
            await asyncio.sleep(0)
            assert site.byte(0) == (0, 0)
            site.peer = site.peer._replace(epoch=epoch + 1)
            return site.peer

        site.checkpoint = checkpoint
        await site.engine.checkpoint()
        site.engine.top.unplug()
        await settle(late[0])
        assert site.byte(0) == (7, 7)

    run(site, story)


def test_checkpoint_without_an_answer_lets_writes_go_on(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)

        async def checkpoint(epoch, name):
            raise Error(Kind.TIMED_OUT, "no answer")

        site.checkpoint = checkpoint
        with pytest.raises(Error, match="no answer"):
            await site.engine.checkpoint()
        await site.write(0, 3)
        assert site.byte(0) == (3, 3)
        assert site.engine.epoch == 1

    run(site, story)


def test_checkpoint_of_a_secondary_that_never_answers_is_given_up_and_writes_go_on(site, monkeypatch):
    monkeypatch.setattr(forwarding, "HOLD_S", 0.01)

    async def story():
        await site.engine.start(Mode.PRIMARY)

        async def checkpoint(epoch, name):
            await asyncio.Event().wait()

        site.checkpoint = checkpoint
        with pytest.raises(Error, match="has not answered") as late:
            await site.engine.checkpoint()
        assert late.value.kind is Kind.TIMED_OUT
        await site.write(0, 3)
        assert site.byte(0) == (3, 3)
        assert site.engine.epoch == 1

    run(site, story)


def test_checkpoint_after_one_whose_answer_was_lost_ends_the_epoch_that_is(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.peer = site.peer._replace(epoch=2)
        await site.engine.checkpoint()
        assert site.calls[-1] == "checkpoint 2"
        assert site.engine.epoch == 3

    run(site, story)


def test_checkpoint_of_a_secondary_that_is_not_ours_is_refused(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.peer = site.peer._replace(generation="other")
        with pytest.raises(Error, match="not ours any more"):
            await site.engine.checkpoint()
        assert "prepare 1" not in site.calls
        assert not site.engine.top.held

    run(site, story)


def test_link_lost_goes_on_alone_and_remembers_what_differs(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        await site.vanish()
        await site.write(2 * BLOCK, 2)
        await site.write(5 * BLOCK, 2, 2 * BLOCK)
        assert site.byte(2 * BLOCK) == (2, 0)
        assert site.engine.out_of_sync_bytes == 3 * BLOCK
        with pytest.raises(Error, match=r"^I/O error occurred$"):
            site.engine.get_error()
        with pytest.raises(Error, match="misses writes"):
            await site.engine.checkpoint()
        assert "checkpoint 1" not in site.calls

    run(site, story)


def test_link_that_returns_after_a_gap_is_not_written_to(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        await site.write(0, 1)
        await site.serve()
        while not site.news.outdated_at:  # it is told, and then not connected to
            await asyncio.sleep(0.01)
        await site.write(BLOCK, 2)
        assert site.engine.remote.state.value == "lost"
        assert site.byte(BLOCK) == (2, 0)
        assert site.engine.out_of_sync_bytes == 2 * BLOCK
        with pytest.raises(Error, match="misses writes"):
            await site.engine.checkpoint()

    run(site, story)


def test_gap_survives_the_process(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        await site.write(0, 1)
        await site.serve()
        await site.reopen()
        assert site.engine.out_of_sync_bytes == BLOCK
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (2, 0)
        with pytest.raises(Error, match="misses writes"):
            await site.engine.checkpoint()

    run(site, story)


def test_failed_forwarded_write_is_the_end_of_forwarding(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.theirs.failing = {"write"}
        await site.write(0, 1)
        site.theirs.failing = set()
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (2, 0)
        assert site.engine.out_of_sync_bytes == 2 * BLOCK

    run(site, story)


def test_flush_while_the_link_is_lost_opens_no_gap_and_is_made_up_for(site):
    """Issue section 6: it made the pair ask for a copy of the whole disk, though no block differed."""
    flushed = asyncio.Event()

    class Flushed(Disk):
        def flush(self):
            flushed.set()

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        await site.vanish()
        pending = site.engine.top.flush()
        site.engine.top.unplug()
        await settle(pending)
        site.engine.get_error()
        assert site.engine.out_of_sync_bytes == 0
        flushed.clear()
        await site.serve()
        await flushed.wait()
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (2, 2)
        await site.engine.checkpoint()

    site.theirs = Flushed(LENGTH, name="theirs")
    run(site, story)


def test_flush_that_the_peer_fails_opens_the_gap(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)

        def flush():
            raise Error(Kind.IO, "flush failed")

        site.theirs.flush = flush
        pending = site.engine.top.flush()
        site.engine.top.unplug()
        await settle(pending)
        with pytest.raises(Error, match="misses writes"):
            await site.engine.checkpoint()

    run(site, story)


def test_secondary_back_within_the_delay_loses_nothing(tmp_path):
    site = Site(tmp_path, reconnect_delay=20.0)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        writes = [asyncio.create_task(site.write(n * BLOCK, n + 1)) for n in range(8)]
        await asyncio.sleep(0)
        await site.serve()
        await asyncio.gather(*writes)
        assert all(site.byte(n * BLOCK) == (n + 1, n + 1) for n in range(8))
        assert site.engine.out_of_sync_bytes == 0
        site.engine.get_error()
        await site.engine.checkpoint()

    run(site, story)


@pytest.mark.parametrize(
    "change", [{"generation": "other"}, {"stage": Stage.DONE}, {"error": "lost power"}], ids=str
)
def test_peer_that_is_not_ours_any_more_gets_nothing(tmp_path, change):
    site = Site(tmp_path, reconnect_delay=3600.0)  # which is not waited for: the answer is final

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        site.peer = site.peer._replace(**change)
        await site.serve()
        await site.write(0, 1)
        assert site.byte(0) == (1, 0)
        assert site.engine.out_of_sync_bytes == BLOCK
        with pytest.raises(Error, match=r"^I/O error occurred$"):
            site.engine.get_error()

    run(site, story)


def test_killed_while_running_goes_on(tmp_path):
    site = Site(tmp_path, reconnect_delay=20.0)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        await site.reopen()
        assert site.engine.stage is Stage.RUNNING
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (2, 2)
        site.engine.get_error()

    run(site, story)


def test_power_loss_is_not_taken_for_in_sync(site, monkeypatch):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        with pytest.raises(Error, match=r"^I/O error occurred$"):
            site.engine.get_error()
        with pytest.raises(Error, match="without a clean stop"):
            await site.engine.checkpoint()

    run(site, story)


def test_power_loss_right_after_start_leaves_a_whole_map_of_missed_writes(site, monkeypatch):
    path = site.state / "out-of-sync.map"
    stable = {}

    def fdatasync(fd):
        stable[os.readlink(f"/proc/self/fd/{fd}")] = path.read_bytes()

    async def story():
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        await site.engine.start(Mode.PRIMARY)
        path.write_bytes(stable.get(str(path), bytes(path.stat().st_size)))
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        assert site.engine.stage is Stage.RUNNING
        await site.write(0, 5)
        assert site.byte(0) == (5, 0)
        assert site.engine.out_of_sync_bytes == BLOCK

    run(site, story)


def test_clean_close_and_open_goes_on_after_a_boot(site, monkeypatch):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.engine.close()
        assert manifests.load(site.state).clean
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        site.reconnect_delay = 20.0
        site.engine = site.make()
        await site.engine.open()
        await site.write(0, 5)
        assert site.byte(0) == (5, 5)
        site.engine.get_error()

    run(site, story)


def test_stop_serves_the_disk_alone(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        assert await site.engine.stop()
        assert site.engine.stage is Stage.DONE
        await site.write(0, 1)
        assert site.byte(0) == (1, 0)
        site.engine.get_error()
        assert await site.engine.stop() is False
        assert await site.engine.start(Mode.PRIMARY) is False
        site.theirs.data[0] = 1
        site.theirs.data[:] = site.disk.data
        with pytest.raises(Error, match="written while nothing was replicated"):
            await site.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        assert await site.engine.start(Mode.PRIMARY, again=True)
        await site.write(0, 2)
        assert site.byte(0) == (2, 2)

    run(site, story)


def test_failover_of_a_primary_is_refused(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        with pytest.raises(Error, match="fail over on the secondary"):
            await site.engine.failover(latest=True)
        assert site.engine.stage is Stage.RUNNING

    run(site, story)


def test_local_failure_is_the_callers_and_marks_the_block(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.disk.failing = {"write"}
        with pytest.raises(Error, match="write failed"):
            await site.write(0, 1)
        assert site.engine.out_of_sync_bytes == BLOCK

    run(site, story)


def test_local_failure_with_detach_lets_the_peer_serve(tmp_path):
    site = Site(tmp_path, detach=True)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        site.disk.failing = {"write", "read"}
        await site.write(BLOCK, 2)
        assert site.theirs.data[BLOCK] == 2
        view = memoryview(bytearray(2 * BLOCK))
        pending = site.engine.top.read(0, [view])
        site.engine.top.unplug()
        await settle(pending)
        assert (view[0], view[BLOCK]) == (1, 2)
        assert site.engine.mirror.detached
        with pytest.raises(Error, match="the secondary serves"):
            await site.engine.stop()
        await site.vanish()
        with pytest.raises(Error):
            await site.write(2 * BLOCK, 3)

    run(site, story)


def test_host_that_goes_down_without_a_disk_of_its_own_calls_the_peer_not_outdated(tmp_path, monkeypatch):
    """D1: the peer alone had everything, and was told that it misses writes."""
    site = Site(tmp_path, detach=True)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.disk.failing = {"write"}
        await site.write(0, 1)
        site.disk.failing = set()
        site.reconnect_delay = 20.0
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (0, 2)
        assert site.engine.manifest.outdated_at == ""
        assert site.engine.out_of_sync_bytes == 0

    run(site, story)


def test_disk_whose_failure_cannot_be_written_down_is_kept(tmp_path, monkeypatch):
    """D1: else a restart would serve it."""
    site = Site(tmp_path, detach=True)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.disk.failing = {"write"}

        def save(directory, new, before):
            raise Error(Kind.IO, "the record is on a disk that failed too")

        with monkeypatch.context() as unwritable:
            unwritable.setattr(manifests, "save", save)
            with pytest.raises(Error, match="write failed"):
                await site.write(0, 1)
        assert not site.engine.mirror.detached
        site.disk.failing = set()
        while site.engine.out_of_sync_bytes:
            await asyncio.sleep(0)
        site.reconnect_delay = 20.0
        await site.reopen()
        await site.write(0, 3)
        assert site.byte(0) == (3, 3)

    run(site, story)


def test_local_failure_with_detach_after_a_gap_is_the_callers(tmp_path):
    site = Site(tmp_path, detach=True)

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        await site.write(0, 1)
        site.disk.failing = {"write"}
        with pytest.raises(Error, match="write failed"):
            await site.write(BLOCK, 2)

    run(site, story)


def test_roles_changed_under_a_running_secondary_are_refused(site):
    async def story():
        before = manifests.Manifest("disk0", Mode.SECONDARY, Stage.RUNNING, LENGTH, epoch=4)
        manifests.save(site.state, msgspec.structs.replace(before, sequence=1), before)
        with pytest.raises(Error, match="before the roles are changed"):
            await site.make().open()

    run(site, story)


def test_open_that_fails_does_not_mark_the_disks_clean(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.engine.missed.close()
        (site.state / "out-of-sync.map").write_bytes(b"torn")
        other = site.make()
        with pytest.raises(Error, match="no map"):
            await other.open()
        await other.close()
        assert not manifests.load(site.state).clean

    run(site, story)


def test_replica_that_was_removed_gets_nothing_and_comes_back_if_it_missed_nothing(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        await site.engine.remove_replica()
        assert site.engine.removed
        await settle(site.engine.top.flush())
        site.engine.get_error()
        with pytest.raises(Error, match="was removed from the mirror"):
            await site.engine.checkpoint()
        with pytest.raises(Error, match="no replica that could be removed"):
            await site.engine.remove_replica()
        await site.engine.add_replica()
        assert not site.engine.removed
        await site.write(0, 2)
        assert site.byte(0) == (2, 2)
        assert await site.engine.checkpoint() is not None

    run(site, story)


def test_replica_that_missed_a_write_is_not_added_again(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)
        await site.engine.remove_replica()
        await site.write(BLOCK, 2)
        assert site.byte(BLOCK) == (2, 0)
        assert site.engine.stage is Stage.RUNNING
        with pytest.raises(Error, match="misses writes"):
            await site.engine.add_replica()
        with pytest.raises(Error, match="I/O error occurred"):
            site.engine.get_error()
        assert site.engine.out_of_sync_bytes == BLOCK
        await site.reopen()
        await site.write(2 * BLOCK, 3)
        assert site.byte(2 * BLOCK) == (3, 0)
        assert await site.engine.stop()

    run(site, story)


def test_failures_of_the_local_disk_are_told_with_their_meaning(site):
    told = []
    site.engine.sender.failed = told.append

    async def story():
        site.disk.failing = {"write"}
        with pytest.raises(Error, match="write failed"):
            await site.write(BLOCK, 1)

    run(site, story)
    assert [(f.child, f.operation, f.offset, f.length, f.final) for f in told] == [
        ("disk", "write", BLOCK, BLOCK, True)
    ]


def test_start_anew_that_fails_leaves_the_stage(site):
    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.engine.stop()
        site.peer = site.peer._replace(stage=Stage.NONE)
        with pytest.raises(Error, match="start it first"):
            await site.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        assert site.engine.stage is Stage.DONE
        await site.write(0, 1)
        assert site.byte(0) == (1, 0)

    run(site, story)


def test_flush_that_the_peer_fails_is_the_end_of_forwarding_and_recorded(site):
    """D4: what the peer has acknowledged may be lost there, and nothing is forwarded from then on."""

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.write(0, 1)

        def flush():
            raise Error(Kind.IO, "no medium")

        site.theirs.flush = flush
        pending = site.engine.top.flush()
        site.engine.top.unplug()
        await settle(pending)
        assert not site.engine.forwards
        assert "no medium" in site.engine.machine.error
        assert manifests.load(site.state).outdated_at

    run(site, story)


def test_gap_that_cannot_be_written_down_is_told_to_the_peer_and_written_later(site, monkeypatch):
    """D7: a read-only overlay directory does not make the secondary good."""

    def refuse(*_):
        raise Error(Kind.READ_ONLY, "read-only file system")

    async def story():
        await site.engine.start(Mode.PRIMARY)
        with monkeypatch.context() as patch:
            patch.setattr(manifests, "save", refuse)
            await site.vanish()
            with pytest.raises(Error, match="cannot be written down"):
                await site.write(0, 1)
        await site.serve()
        with pytest.raises(Error, match="misses writes since"):
            await site.engine.verify()
        assert site.news.outdated_at
        await site.write(BLOCK, 1)
        assert manifests.load(site.state).outdated_at

    run(site, story)


def test_primary_that_was_down_waits_if_the_secondary_has_no_memory_of_the_pair(site, monkeypatch):
    """D8: it may have been promoted, and its overlay directory not be mounted."""

    async def story():
        await site.engine.start(Mode.PRIMARY)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        site.peer = PeerState(Stage.NONE, 0, "", LENGTH, None)
        await site.engine.close()
        site.engine = primary(
            "disk0", site.disk, site.connect, site, site.state, pulse=Pulse("disk0", 0.01), peer_name="beta"
        )
        await site.engine.open()
        while "knows nothing of this pair" not in str(site.engine.top.not_ready):
            await asyncio.sleep(0)
        with pytest.raises(Error, match="knows nothing of this pair"):
            await site.engine.start(Mode.PRIMARY)
        site.peer = PeerState(Stage.RUNNING, 1, "generation-1", LENGTH, None)
        while site.engine.top.not_ready is not None:
            await asyncio.sleep(0)
        assert site.engine.stage is Stage.RUNNING

    run(site, story)


def test_disk_that_could_not_make_writes_durable_is_remembered_as_the_one_that_lacks_them(site):
    """D4: status advised to copy it over the secondary's disk, which has them."""

    async def story():
        await site.engine.start(Mode.PRIMARY)
        site.disk.on_lost(Error(Kind.IO, "no medium"))
        await site.reopen()
        assert "no medium" in site.engine.manifest.disk_error
        assert "no medium" in site.engine.machine.error
        assert site.engine.forwards

    run(site, story)


def test_marks_are_stable_before_a_clean_end_is_written_down(site, monkeypatch):
    """D3: after a clean end and a loss of power nothing else says which blocks differ."""

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        await site.write(0, 1)
        synced = []
        real = os.fdatasync

        def note(fd):
            synced.append(
                (os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), manifests.load(site.state).clean)
            )
            real(fd)

        monkeypatch.setattr(os, "fdatasync", note)
        await site.engine.close()
        assert ("out-of-sync.map", False) in synced
        assert manifests.load(site.state).clean

    run(site, story)


def test_promotion_of_the_peer_after_a_gap_says_that_some_writes_are_here_alone(site):
    """D8: two hosts have acknowledged writes, and the advice was to copy the other's disk over this one."""

    async def story():
        await site.engine.start(Mode.PRIMARY)
        await site.vanish()
        await site.write(0, 1)
        site.peer = site.peer._replace(stage=Stage.DONE, promoted_at="2026-01-02T03:04:05+00:00")
        with pytest.raises(Error, match="is on no other disk: save it"):
            await site.engine.verify()
        while site.engine.top.not_ready is None:
            await asyncio.sleep(0)

    run(site, story)
