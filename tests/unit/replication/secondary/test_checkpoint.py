"""What the LUN shows while the primary writes, and how a checkpoint moves that, or fails to."""

import asyncio

import pytest

from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import following
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK, MiB
from tests.unit.replication.secondary.site import (
    FORWARDED,
    LENGTH,
    OLD,
    OWN,
    Site,
    run,
    started,
)


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
