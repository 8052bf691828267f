"""The secondary becomes the one that counts, or stops."""

import asyncio

import pytest

from tcmu_replication.block import boot
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication import stages
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import BLOCK, MiB
from tests.unit.replication.secondary.site import (
    FORWARDED,
    OLD,
    OWN,
    Site,
    failed_over_unflushed,
    killed,
    run,
    started,
)


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


def test_failover_itself_does_not_wait_for_the_disk(tmp_path):
    async def story():
        site = await failed_over_unflushed(tmp_path)
        assert site.engine.stage is Stage.FAILOVER
        assert len(site.disk.syncing) == 1, "it is the commit's"
        await killed(site)

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
