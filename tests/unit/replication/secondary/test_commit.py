"""What follows a failover to the checkpoint: the disk becomes what the LUN shows."""

import asyncio

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication import stages
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB
from tests.unit.replication.secondary.site import (
    FORWARDED,
    LENGTH,
    OLD,
    OWN,
    ColdDisk,
    Site,
    failed_over_unflushed,
    killed,
    run,
    started,
    until,
)


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


def test_request_under_way_when_the_commit_ends_still_has_the_overlays(tmp_path):
    async def story():
        site = Site(tmp_path, ColdDisk(LENGTH))
        site.disk.data[:] = bytes([OLD]) * LENGTH
        await started(site)
        await site.own(BLOCK, BLOCK)
        site.disk.syncing = []
        assert await site.engine.failover(latest=False)
        await until(lambda: site.disk.syncing)
        assert site.engine.top.held
        site.disk.reading, pair = [], site.engine.receiver.pair
        reads = [asyncio.create_task(site.top(block * BLOCK)) for block in (0, 1)]
        await asyncio.sleep(0)
        syncing, site.disk.syncing = site.disk.syncing, None
        syncing[0].complete()
        await until(lambda: len(site.disk.reading) == len(reads))
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
        await until(lambda: site.engine.top.held)
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
