"""The process dies between any two steps, or is closed, and another goes on."""

import asyncio

from tcmu_replication.jobs import commit
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK, MiB
from tests.unit.replication.secondary.site import (
    FORWARDED,
    OLD,
    OWN,
    failed_over_unflushed,
    killed,
    run,
    started,
)


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
