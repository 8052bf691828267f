"""How a primary makes its secondary whole again: when it begins, what ends it, and that it lies to nobody."""

import asyncio

import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import healing, starting
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.assemble import primary
from tcmu_replication.replication.pulse import Pulse
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB
from tests.support.tools import PATIENCE_S
from tests.unit.replication.test_primary import LENGTH, Site, run


class Pair(Site):
    """A primary with a pulse, and a secondary that is an NBD server and remembers what it was told."""

    heals = True
    compare = False
    refuses = None
    answer_lost = False

    def make(self):
        self.begun, self.ended = [], 0
        return primary(
            "disk0",
            self.disk,
            self.connect,
            self,
            self.state,
            pulse=Pulse("disk0", 0.01),
            heals=self.heals,
            wait_after_crash=False,
            peer_name="beta",
        )

    async def hello(self, news, *, settled=False):
        state = await super().hello(news)
        if news.outdated_at and state.error is None:
            self.peer = state._replace(error="alpha goes on without this host")
        return self.peer

    async def resync(self, name):
        if self.refuses is not None:
            raise self.refuses
        self.begun.append(name)
        return self.compare

    async def resynced(self):
        self.ended += 1
        self.peer = self.peer._replace(error=None)
        if self.answer_lost:
            raise Error(Kind.PEER_LOST, "the answer did not come")

    async def digests(self, offset, length, piece):
        raise Error(Kind.UNSUPPORTED)  # so the disk is read over the link

    async def miss(self, offset=0, byte=7, length=BLOCK):
        """A write that the secondary does not get; then it is back."""
        await self.vanish()
        await self.write(offset, byte, length)
        assert self.engine.manifest.outdated_at
        await self.serve()

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def beats(self, count):
        """So often the peer was heard, and something could have begun."""
        for _ in range(count):
            self.calls.clear()
            await self.until(lambda: "hello" in self.calls)

    async def healed(self):
        await self.until(lambda: self.engine.forwards and self.engine.epoch > 1)


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No pause between attempts."""
    monkeypatch.setattr(healing, "LONGEST_PAUSE_S", 0.0)


def test_what_was_missed_is_sent_and_then_the_pair_is_in_sync(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.miss(3 * BLOCK, 7)
        await pair.healed()
        assert pair.theirs.data == pair.disk.data
        assert len(pair.begun) == pair.ended == 1
        found = manifests.load(pair.state)
        assert (found.error, found.outdated_at, found.map_complete) == (None, "", True)
        assert pair.engine.out_of_sync_bytes == 0
        await pair.write(0, 9)
        assert pair.byte(0) == (9, 9)

    run(pair, story)


def test_only_what_is_dirty_is_sent(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        pair.theirs.data[MiB] = 0x55  # not known to differ: only a comparison would find it
        await pair.miss()
        await pair.healed()
        assert pair.theirs.data[MiB] == 0x55

    run(pair, story)


@pytest.mark.parametrize("where", ["there", "here"])
def test_both_disks_are_compared_where_it_is_not_known_where_they_differ(pair, monkeypatch, where):
    """After a loss of power of the secondary's host, or of this one."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        pair.theirs.data[MiB] = 0x55
        if where == "there":
            pair.compare = True
            await pair.miss()
        else:
            monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
            await pair.reopen()
            assert not manifests.load(pair.state).map_complete
        await pair.healed()
        assert pair.theirs.data == pair.disk.data
        assert manifests.load(pair.state).map_complete

    run(pair, story)


def test_comparison_before_a_resync_is_told(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        asked, answer = asyncio.Event(), asyncio.Event()

        async def digests(offset, length, piece):
            asked.set()
            await answer.wait()
            raise Error(Kind.UNSUPPORTED)

        pair.digests = digests
        pair.compare = True
        assert pair.engine.resync_in_words is None
        await pair.miss()
        await asked.wait()
        assert pair.engine.resync_in_words == "both disks are compared first, 0 B of 4 MiB"
        answer.set()
        await pair.healed()
        assert pair.engine.resync_in_words is None

    run(pair, story)


def test_resync_that_is_paused_sends_nothing_until_it_is_resumed(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.engine.pace_resync(paused=True, limit=MiB)
        await pair.miss(0, 7, MiB)
        await pair.until(lambda: pair.engine.resyncing is not None and pair.engine.resyncing.waits)
        assert (pair.engine.resyncing.waits, pair.engine.resyncing.limit) == ("paused", MiB)
        assert pair.engine.resync_in_words == "1 MiB are left; paused"
        await pair.write(2 * MiB, 5)
        assert pair.byte(2 * MiB) == (5, 5), "what is new is forwarded"
        assert pair.byte(0) == (7, 0)
        await pair.engine.pace_resync(limit=0)
        assert (pair.engine.resyncing.paused, pair.engine.resyncing.limit) == (True, None)
        await pair.engine.pace_resync(paused=False)
        await pair.healed()
        assert pair.theirs.data == pair.disk.data
        await pair.engine.stop()
        with pytest.raises(Error, match="forwards nothing"):
            await pair.engine.pace_resync(paused=True)

    run(pair, story)


def test_writes_meanwhile_are_on_both_disks(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.miss(0, 7, 2 * MiB)
        for turn in range(50):
            await pair.write(turn * 3 * 512, turn + 1, 700)
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_secondary_that_refuses_is_left_as_it_is_and_asked_again(pair):
    """One of the version before does so always."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        pair.refuses = Error(Kind.UNSUPPORTED, "the secondary speaks protocol 2")
        await pair.miss()
        await pair.until(lambda: pair.engine.role.heals)
        await pair.until(lambda: not pair.engine.role.heals)
        await pair.write(BLOCK, 8)
        assert pair.byte(BLOCK) == (8, 0)
        assert pair.engine.manifest.outdated_at
        pair.refuses = None
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_end_that_is_not_confirmed_is_a_gap_again_and_the_next_one_ends_well(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        pair.answer_lost = True
        await pair.miss()
        await pair.until(lambda: pair.ended)
        await pair.until(lambda: not pair.engine.role.heals)
        assert "was not confirmed" in manifests.load(pair.state).error
        pair.answer_lost = False
        await pair.healed()
        assert pair.engine.machine.error is None

    run(pair, story)


def test_record_is_in_sync_before_the_secondarys(pair):
    """Else a primary that died in between would go on alone, and its peer would not know."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        seen = []

        async def resynced():
            seen.append(manifests.load(pair.state).outdated_at)
            seen.append(pair.engine.top.held)
            pair.peer = pair.peer._replace(error=None)

        pair.resynced = resynced
        await pair.miss()
        await pair.healed()
        assert seen == ["", True]

    run(pair, story)


def test_link_that_is_lost_during_a_resync_is_no_link_to_go_on_with(pair):
    """The secondary may have lost power meanwhile: it is asked anew."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        reading, go = asyncio.Event(), asyncio.Event()

        async def resync(name):
            pair.begun.append(name)
            if len(pair.begun) == 1:
                reading.set()
                await go.wait()
            return False

        pair.resync = resync
        pair.reconnect_delay = 5.0
        await pair.miss(0, 7, MiB)
        await reading.wait()
        await pair.vanish()
        await pair.serve()
        go.set()
        await pair.healed()
        assert len(pair.begun) > 1
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_disk_that_cannot_be_read_ends_the_attempt_and_keeps_the_marks(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.vanish()
        await pair.write(0, 7)
        pair.disk.failing = {"read"}
        await pair.serve()
        await pair.until(lambda: pair.engine.role.heals)
        await pair.until(lambda: not pair.engine.role.heals)
        assert pair.engine.out_of_sync_bytes == BLOCK
        assert pair.engine.manifest.outdated_at
        pair.disk.failing = set()
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_worker_that_dies_meanwhile_goes_on_with_what_is_left(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        pair.refuses = Error(Kind.PEER_LOST, "not yet")
        await pair.miss(0, 7, MiB)
        await pair.engine.role.leave()  # as its death does
        await pair.reopen()
        assert pair.engine.out_of_sync_bytes == MiB
        pair.refuses = None
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_disks_that_were_never_equal_take_the_operators_word(pair, monkeypatch):
    monkeypatch.setattr(starting, "PROBES", 0)  # they would find it, sometimes

    async def story():
        pair.theirs.data[2 * MiB + 5 * BLOCK : 2 * MiB + 6 * BLOCK] = b"u" * BLOCK
        await pair.engine.start(Mode.PRIMARY, again=True, compare=True, sync=False)
        await pair.until(lambda: pair.engine.machine.error)
        await pair.beats(3)
        assert not pair.begun
        await pair.engine.resync()
        await pair.healed()
        assert pair.theirs.data == pair.disk.data
        assert manifests.load(pair.state).verified

    run(pair, story)


def test_start_that_makes_the_secondary_equal(pair):
    async def story():
        pair.theirs.data[:] = b"u" * LENGTH
        await pair.engine.start(Mode.PRIMARY, again=True, compare=True, sync=True)
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_by_hand_it_is_refused_where_nothing_is_missed(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        with pytest.raises(Error, match="misses nothing") as refused:
            await pair.engine.resync()
        assert refused.value.kind is Kind.INVALID_STATE
        await pair.engine.stop()
        with pytest.raises(Error, match="forwards nothing"):
            await pair.engine.resync()

    run(pair, story)


def test_disk_whose_sync_failed_goes_over_no_other(pair):
    """D4: the secondary has all that was acknowledged, this disk may not."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.miss()
        pair.engine.role.disk_lost(Error(Kind.IO, "the medium is broken"))
        await pair.until(lambda: not pair.engine.role.heals)
        with pytest.raises(Error, match="own disk has failed"):
            await pair.engine.resync()

    pair.heals = False
    pair.engine = pair.make()
    run(pair, story)


def test_checkpoint_of_a_controller_is_not_moved_by_a_resync_unasked(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY)  # as QEMU's command does
        await pair.miss()
        await pair.beats(3)
        assert not pair.begun
        await pair.engine.resync()
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


async def paused(pair):
    """A resync is under way, and sends nothing."""
    await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
    await pair.engine.pace_resync(paused=True)
    await pair.miss(0, 7, MiB)
    await pair.until(lambda: pair.engine.resyncing is not None and pair.engine.resyncing.waits)


def test_disk_whose_sync_fails_during_a_resync_ends_it(pair):
    """D4: what is read here from then on may be older than what was acknowledged."""

    async def story():
        await paused(pair)
        pair.engine.role.disk_lost(Error(Kind.IO, "the medium is broken"))
        await pair.until(lambda: not pair.engine.role.heals)
        await pair.engine.pace_resync(paused=False)
        await pair.beats(3)
        assert not pair.ended
        assert len(pair.begun) == 1
        assert pair.byte(0) == (7, 0)
        assert pair.engine.manifest.disk_error

    run(pair, story)


def test_write_that_the_secondary_misses_again_ends_the_attempt_and_the_next_one_sends_it(pair):
    async def story():
        await paused(pair)
        await pair.vanish()
        await pair.write(2 * MiB, 9)
        await pair.until(lambda: not pair.engine.role.heals)
        assert pair.byte(2 * MiB) == (9, 0)
        await pair.engine.pace_resync(paused=False)
        await pair.serve()
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)


def test_secondary_that_follows_no_more_is_sent_nothing_more(pair):
    async def story():
        await paused(pair)
        pair.peer = pair.peer._replace(stage=Stage.DONE)
        await pair.until(lambda: not pair.engine.role.heals)
        await pair.engine.pace_resync(paused=False)
        await pair.beats(3)
        assert len(pair.begun) == 1
        assert pair.byte(0) == (7, 0)

    run(pair, story)


def test_manual_resync_does_not_begin_by_itself(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.miss()
        await pair.beats(3)
        assert not pair.begun
        await pair.engine.resync()
        await pair.healed()

    pair.heals = False
    pair.engine = pair.make()
    run(pair, story)


def test_stop_in_the_middle_leaves_disks_that_nobody_calls_equal(pair):
    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        began = asyncio.Event()

        async def resync(name):
            began.set()
            await asyncio.Event().wait()

        pair.resync = resync
        await pair.miss()
        await began.wait()
        await pair.engine.stop()
        assert pair.engine.stage is Stage.DONE
        assert manifests.load(pair.state).written_alone

    run(pair, story)


def test_flush_that_the_secondary_failed_is_followed_by_a_comparison(pair):
    """What it had taken may be lost there, and nobody knows what that was."""

    async def story():
        await pair.engine.start(Mode.PRIMARY, again=True, assume_clean=True)
        await pair.write(0, 1)
        flush = pair.theirs.flush

        def fail():
            pair.theirs.data[:BLOCK] = bytes(BLOCK)
            raise Error(Kind.IO, "no medium")

        pair.theirs.flush = fail
        pending = pair.engine.top.flush()
        pair.engine.top.unplug()
        await settle(pending)
        pair.theirs.flush = flush
        await pair.healed()
        assert pair.theirs.data == pair.disk.data

    run(pair, story)
