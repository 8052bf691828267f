"""A secondary that is made whole: the state before is a checkpoint, the disk a mix, and the end of it is durable."""

import pytest

from tcmu_replication.block import boot
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK
from tests.unit.replication.secondary.site import FORWARDED, OLD, OWN, Site, run, started

THEN = "2026-01-02T03:04:05.000+00:00"
RESENT = 0x44


async def outdated(site):
    """The secondary has the first block, and the primary goes on without it."""
    await started(site)
    await site.forward(0, BLOCK)
    await site.engine.hear(site.engine.manifest.generation, News(True, THEN, "the link was lost", BLOCK))
    return site


def generation(site):
    return site.engine.manifest.generation


def test_resync_begins_with_a_checkpoint_of_the_state_at_the_gap(site):
    async def story():
        await outdated(site)
        await site.own(BLOCK, BLOCK)
        assert await site.engine.begin_resync(generation(site), "gap") is False
        assert site.engine.epoch == 2
        await site.forward(0, 2 * BLOCK, RESENT)
        assert await site.top(0) == {FORWARDED}
        assert await site.top(BLOCK) == {OLD}
        assert manifests.load(site.directory).resync_since

    run(story())


def test_resync_that_was_begun_before_keeps_that_checkpoint(site):
    async def story():
        await outdated(site)
        await site.engine.begin_resync(generation(site), "gap")
        await site.forward(0, BLOCK, RESENT)
        await site.reopen()
        assert await site.engine.begin_resync(generation(site), "again") is False
        assert site.engine.epoch == 2
        assert await site.top(0) == {FORWARDED}

    run(story())


def test_end_of_a_resync_forgets_that_this_host_was_outdated(site):
    async def story():
        await outdated(site)
        await site.engine.begin_resync(generation(site), "gap")
        await site.engine.end_resync(generation(site))
        site.engine.get_error()
        found = manifests.load(site.directory)
        assert (found.error, found.outdated_at, found.resync_since, found.error_at) == (None, "", "", "")
        await site.engine.failover(latest=True, fenced=True)
        assert site.engine.stage is Stage.DONE

    run(story())


def test_news_of_a_gap_that_is_over_come_too_late(site):
    """The hello of every second has a connection of its own, and may come behind the end of the resync."""

    async def story():
        await outdated(site)
        await site.engine.begin_resync(generation(site), "gap")
        await site.engine.end_resync(generation(site))
        await site.engine.hear(generation(site), News(True, THEN, "the link was lost", BLOCK))
        assert not site.engine.manifest.outdated_at
        await site.engine.hear(
            generation(site), News(True, THEN.replace("05", "06"), "the link was lost again")
        )
        assert site.engine.manifest.outdated_at

    run(story())


def test_mix_is_not_served_as_the_latest_and_the_checkpoint_is(site):
    async def story():
        await outdated(site)
        await site.engine.begin_resync(generation(site), "gap")
        await site.forward(0, BLOCK, RESENT)
        with pytest.raises(Error, match="outdated since"):
            await site.engine.failover(latest=True, fenced=True)
        await site.engine.failover(latest=False, fenced=True)
        await site.committed()
        assert site.sec(0) == {FORWARDED}

    run(story())


def test_state_before_a_first_synchronisation_is_no_checkpoint_of_the_pair(site):
    """The disks were never equal: it is this host's old data, and after the end nobody would say so."""

    async def story():
        await started(site)
        await site.engine.hear(generation(site), News(False, THEN, "the disks differ"))
        await site.engine.begin_resync(generation(site), "before")
        await site.forward(0, BLOCK, RESENT)
        await site.engine.end_resync(generation(site))
        with pytest.raises(Error, match=r"may be damaged.*were not equal"):
            await site.engine.failover(latest=False, fenced=True)
        await site.engine.checkpoint("after")
        await site.engine.failover(latest=False, fenced=True)
        await site.committed()
        assert site.sec(0) == {RESENT}

    run(story())


def test_host_that_lost_power_asks_for_a_comparison_and_keeps_the_checkpoint_from_before(
    tmp_path, monkeypatch
):
    async def story():
        site = await started(Site(tmp_path))
        await site.forward(0, BLOCK)
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        assert await site.engine.begin_resync(generation(site), "gap") is True
        assert site.engine.epoch == 1, "what the disk has now may be a state that never was"
        assert await site.top(0) == {0}
        await site.engine.end_resync(generation(site))
        assert await site.engine.begin_resync(generation(site), "later") is False

    run(story())


def test_host_that_lost_power_during_a_resync_asks_for_a_comparison(tmp_path, monkeypatch):
    async def story():
        site = await outdated(Site(tmp_path))
        await site.engine.begin_resync(generation(site), "gap")
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
        await site.reopen()
        assert await site.engine.begin_resync(generation(site), "again") is True
        assert await site.top(0) == {FORWARDED}

    run(story())


@pytest.mark.parametrize("pairing", ["", "another", "x" * 256])
def test_resync_of_another_pairing_is_refused_and_changes_nothing(site, pairing):
    async def story():
        await outdated(site)
        before = manifests.load(site.directory)
        for call in (site.engine.begin_resync(pairing, "gap"), site.engine.end_resync(pairing)):
            with pytest.raises(Error) as refused:
                await call
            assert refused.value.kind is Kind.CONFLICT
        assert manifests.load(site.directory) == before

    run(story())


def test_end_of_a_resync_that_never_began_is_refused(site):
    async def story():
        await outdated(site)
        with pytest.raises(Error, match="no resync of disk0 is under way") as refused:
            await site.engine.end_resync(generation(site))
        assert refused.value.kind is Kind.CONFLICT
        assert site.engine.manifest.outdated_at == THEN

    run(story())


@pytest.mark.parametrize("stage", [Stage.NONE, Stage.DONE])
def test_host_that_does_not_follow_takes_part_in_no_resync(site, stage):
    async def story():
        await site.engine.open()
        if stage is Stage.DONE:
            await started(site)
            await site.own(0, BLOCK, OWN)
            await site.engine.stop()
        assert site.engine.stage is stage
        for call in (site.engine.begin_resync("", "gap"), site.engine.end_resync("")):
            with pytest.raises(Error) as refused:
                await call
            assert refused.value.kind is Kind.CONFLICT

    run(story())


def test_resync_that_cannot_be_written_down_does_not_begin(site, monkeypatch):
    async def story():
        await outdated(site)

        def refuse(*_):
            raise Error(Kind.NO_SPACE, "no space left")

        monkeypatch.setattr(manifests, "save", refuse)
        with pytest.raises(Error, match="no space left"):
            await site.engine.begin_resync(generation(site), "gap")
        assert site.engine.epoch == 1
        assert not site.engine.manifest.resync_since
        assert site.engine.manifest.outdated_at

    run(story())
