"""The host loses its page cache: what was flushed is there, and what may be torn is not served."""

import asyncio
import os
from pathlib import Path

import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error
from tcmu_replication.jobs import commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.replication import manifest as manifests
from tcmu_replication.replication import stages
from tcmu_replication.replication.stages import Stage
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
    until,
)


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


@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "closed"])
def test_power_loss_during_the_commit_goes_on_with_it(site, monkeypatch, stopped):
    async def story():
        monkeypatch.setattr(commit.Commit, "run", lambda self: asyncio.Event().wait())
        await started(site)
        await site.forward(0, MiB)
        assert await site.engine.failover(latest=False)
        await until(lambda: manifests.load(site.directory).whole)
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
        await until(lambda: manifests.load(site.directory).whole)
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
